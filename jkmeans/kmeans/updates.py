"""The update of online k-means, stated once: centroids move towards what they were given.

Mini-batch k-means gives a centroid the mean of its rows of a batch, and a rate of its own;
stochastic vector quantization gives the nearest prototype one sample, and all the same rate.
"""

from __future__ import annotations

import jax


def move_towards(centroids: jax.Array, targets: jax.Array, rates: jax.Array) -> jax.Array:
    """w_l ← w_l − ε_l (w_l − z_l): a convex combination of centroid and target for 0 ≤ ε_l ≤ 1.

    Args:
      centroids: w, [k, d] float.
      targets: z, what each centroid moves to; of a shape that broadcasts to [k, d] by axes of
        length 1. Must be finite where the rate is 0 too.
      rates: ε, likewise; 0 where a centroid stays, which it then does exactly.

    Returns:
      [k, d].

    Source: MacQueen, Some methods for classification and analysis of multivariate observations,
    1967: with ε = 1/v for a centroid's v-th row it is the mean of its rows.
    """
    return centroids - rates * (centroids - targets)
