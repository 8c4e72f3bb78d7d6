"""DKM: deep k-means, differentiable by a softmax over distances.

The objective is the mean over the examples of a batch of

    ‖xᵢ − x̂ᵢ‖² / d  +  λ · Σₖ G_k(zᵢ; α) ‖zᵢ − cₖ‖²,      G_k = softmaxₖ(−α ‖zᵢ − cₖ‖²)

over network and centroids. As the inverse temperature α grows, G becomes the assignment of k-means.
Two ways to choose it:

* ``n_temperatures = 1``: α = ``alpha`` throughout, after pretraining (the paper's α = 1000).
* ``n_temperatures > 1``: annealed from scratch, α₁ = ``alpha`` and α_{i+1} = 2^{1 / ln(i + 1)²} αᵢ,
  each for
  an equal part of the epochs (the paper's 40 of 5 epochs each, from .1).

Source: Fard, Thonet and Gaussier 2020, "Deep k-means: jointly clustering with k-means and learning
representations", eqs. 2 to 5 and section 3.3. Deviations: the reconstruction error is a mean over
pixels, so λ is smaller by their number than in the authors' code; without pretraining the first
centroids are chosen by ``centroids.init``, not uniformly in a cube.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jkmeans.fields import integer, number
from jkmeans.kmeans.collectives import AxisName
from jkmeans.methods.base import (
    Batch,
    Clusters,
    Method,
    MethodSpec,
    all_squared_distances,
    assigned,
    check_pretraining,
    first_kmeans,
    mean_terms,
    nearest_centroid,
    only_assign,
    reconstruction_error,
)


def inverse_temperatures(first: float, n: int) -> np.ndarray:
    """α₁ … α_n of section 3.3: [n] float32; the rule gives α₂ = 2^{1 / ln(2)²} α₁."""
    alphas = [first]
    for i in range(1, n):
        alphas.append(alphas[-1] * 2.0 ** (1.0 / np.log(i + 1) ** 2))
    return np.asarray(alphas, np.float32)


def soft_distance(squared: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """Σₖ G_k ‖z − cₖ‖² of squared distances [b, k]: [b]."""
    return jnp.sum(jax.nn.softmax(-alpha * squared, axis=-1) * squared, axis=-1)


def objective(
    network, clusters: Clusters, batch: Batch, *, centroid_weight: float, alphas, n_epochs: int
):
    """The terms of the module's formula; the reconstruction alone while pretraining."""
    # By comparison: a quotient rounds, and a part would begin a step late.
    starts = np.asarray([i * n_epochs / len(alphas) for i in range(len(alphas))], np.float32)
    alpha = jnp.asarray(alphas)[jnp.sum(batch.progress >= starts) - 1]

    def terms_of(z):
        terms = {"reconstruction": reconstruction_error(network, z, batch.x)}
        if batch.clustering:
            squared = all_squared_distances(z, clusters.centroids)
            terms["centroid"] = centroid_weight * soft_distance(squared, alpha)
        return terms

    embeddings = [network.encode(seen) for seen in batch.inputs]
    return embeddings[0], mean_terms([terms_of(z) for z in embeddings])


def dkm(config, axis_name: AxisName) -> Method:
    """DKM as a `Method`.

    Args:
      config: a whole, validated config; ``objective`` holds λ and α, ``centroids`` is of the
        k-means at the start.
      axis_name: mesh axis of the examples.
    """
    first = first_kmeans(config, axis_name)
    options = config.objective

    def initialize(key, bank, weights, index):
        result = first(key, bank, weights, index)
        return Clusters(result.centroids), assigned(result)

    chosen = functools.partial(
        objective,
        centroid_weight=options.centroid_weight,
        alphas=inverse_temperatures(options.alpha, options.n_temperatures),
        n_epochs=config.training.n_epochs,
    )
    return Method(
        initialize, chosen, only_assign(nearest_centroid, axis_name), learned=("centroids",)
    )


SPEC = MethodSpec(
    dkm,
    {
        "centroid_weight": number("λ"),
        "alpha": number("α, of the first epochs where it is annealed", positive=True),
        "n_temperatures": integer(1, "how many values α takes in turn"),
    },
    check_pretraining,
    "Fard et al. 2020, Deep k-means",
    {
        "objective.centroid_weight": 0.01,
        "objective.alpha": 1000.0,
        "objective.n_temperatures": 1,
    },
)
