"""The derivative of k-means: the implicit function theorem at a fixed point of Lloyd's iteration.

At the end C = T(C; x, w), where T takes the mean of each cluster. Labels are constant almost
everywhere, so ∂T/∂C = 0 and dC = ∂T/∂x dx + ∂T/∂w dw: with W_k the weight of cluster k,

    dC_k = Σ_{i in k} (w_i dx_i + (x_i − C_k) dw_i) / W_k.

It takes one pass over the rows, whatever the number of iterations was, and no memory of them. Rows
of weight 0 may hold anything, and have derivative 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jkmeans.kmeans.collectives import AxisName, all_sum


class Tangents(NamedTuple):
    """Derivatives of the fields of the result that have one, of their shapes."""

    centroids: jax.Array
    distances: jax.Array
    counts: jax.Array
    inertia: jax.Array


def tangents(
    x: jax.Array,
    weights: jax.Array | None,
    dx: Any,
    dw: Any,
    result: Any,
    axis_name: AxisName,
) -> Tangents:
    """Derivatives of a result in the direction of changes of the rows and weights.

    Args:
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      weights: [n], or None for ones.
      dx: like x; None or of dtype float0 for no change.
      dw: like weights, likewise.
      result: KMeansResult for x and weights.
      axis_name: the mesh axis that rows are sharded over, or None.
    """
    k, labels = result.centroids.shape[0], result.labels
    x_nd = x.astype(result.centroids.dtype)
    dx = _or_zero(dx, x_nd)
    w = jnp.ones(x.shape[0], x_nd.dtype) if weights is None else weights.astype(x_nd.dtype)
    dw = jnp.where(w > 0, _or_zero(dw, w), 0)
    offsets_nd = x_nd - result.centroids[labels]
    moved_nd = jnp.where((w > 0)[:, None], w[:, None] * dx + dw[:, None] * offsets_nd, 0)
    sums = jax.ops.segment_sum(moved_nd, labels, k)
    sums, d_counts = all_sum((sums, jax.ops.segment_sum(dw, labels, k)), axis_name)
    counts = result.counts[:, None]
    d_centroids = jnp.where(counts > 0, sums / jnp.where(counts > 0, counts, 1), 0)
    d_distances = 2 * jnp.sum(offsets_nd * (dx - d_centroids[labels]), axis=1)
    of_rows = jnp.where(w > 0, w * d_distances + dw * result.distances, 0)
    return Tangents(d_centroids, d_distances, d_counts, all_sum(jnp.sum(of_rows), axis_name))


def _or_zero(tangent: Any, like: jax.Array) -> jax.Array:
    """A tangent in the dtype to compute in; 0 for what cannot change, such as bytes."""
    if tangent is None or tangent.dtype == jax.dtypes.float0:
        return jnp.zeros_like(like)
    return tangent.astype(like.dtype)
