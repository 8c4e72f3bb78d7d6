"""DEC: deep embedded clustering by self-training on soft assignments.

With embeddings zᵢ and centroids cₖ, both learned by gradient,

    q_ik ∝ (1 + ‖zᵢ − cₖ‖²)⁻¹,      p_ik ∝ q_ik² / fₖ,      fₖ = Σᵢ q_ik,

rows of q and p summing to one, the objective is KL(P‖Q) = Σ_k p_ik log(p_ik / q_ik), the mean over
the examples of a batch, with P constant. Before, the autoencoder is pretrained, and the centroids
are those of k-means on its embeddings. The decoder is not used after pretraining.

P is of the whole data set: fₖ is a sum over all examples. It is never stored: p_i follows from the
stored embedding of example i, and from the centroids and frequencies of the end of the last epoch,
when P is made anew (the paper's interval is a number of steps, 140 of 256 examples in DEC-keras:
half an epoch of MNIST). With ``centroids.bank = "refreshed"``, as in the paper, all embeddings are
of one set of weights, and the network embeds every example once more for them. With "stored" each
is what the step of its example has computed, which takes a fifth of the time off an epoch; the
first targets are of one set of weights all the same.

With ``augmentation`` the network sees a view, and P is of the example itself, as in Guo et al.
2018, "Deep embedded clustering with data augmentation", eq. 7; with ``augmentation.invariance`` Q
is of both.

Source: Xie, Girshick and Farhadi 2016, "Unsupervised deep embedding for clustering analysis", eqs.
1 to 3, section 3.1.3 for the start.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jkmeans.errors import UserError
from jkmeans.kmeans.collectives import AxisName, all_sum
from jkmeans.methods.base import (
    Batch,
    Method,
    MethodSpec,
    all_squared_distances,
    assign_by,
    assigned,
    check_bank_of_examples,
    check_pretraining,
    first_kmeans,
    mean_terms,
    nearest_centroid,
    reconstruction_error,
)


class DECClusters(NamedTuple):
    """Clusters, and what the target distribution is made from.

    Attributes:
      centroids: [k, p] float32, learned.
      target_centroids: [k, p] float32, the centroids when the targets were last made.
      frequencies: [k] float32, fₖ at that time.
    """

    centroids: jax.Array
    target_centroids: jax.Array
    frequencies: jax.Array


def soft_assignment(z: jax.Array, centroids: jax.Array) -> jax.Array:
    """q_ik of eq. 1, Student's t with one degree of freedom: [b, k] of [b, p] and [k, p]."""
    similarity = 1.0 / (1.0 + all_squared_distances(z, centroids))
    return similarity / jnp.sum(similarity, axis=-1, keepdims=True)


def target_distribution(q: jax.Array, frequencies: jax.Array) -> jax.Array:
    """p_ik of eq. 3: [b, k] of q [b, k] and the frequencies [k] of all examples."""
    sharpened = q * q / jnp.maximum(frequencies, 1e-12)[None, :]
    return sharpened / jnp.sum(sharpened, axis=-1, keepdims=True)


def divergence(network_embeddings: jax.Array, clusters: DECClusters, batch: Batch) -> jax.Array:
    """KL(P‖Q) of each example, in nats: [b]."""
    q = soft_assignment(network_embeddings, clusters.centroids)
    stored = soft_assignment(batch.stored, jax.lax.stop_gradient(clusters.target_centroids))
    p = jax.lax.stop_gradient(target_distribution(stored, clusters.frequencies))
    return jnp.sum(p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.log(q)), axis=-1)


def objective(network, clusters: DECClusters, batch: Batch):
    """The terms of the module's formula; the reconstruction while pretraining."""
    embeddings = [network.encode(seen) for seen in batch.inputs]
    if not batch.clustering:
        return embeddings[0], {
            "reconstruction": reconstruction_error(network, embeddings[0], batch.x)
        }
    terms = [{"divergence": divergence(z, clusters, batch)} for z in embeddings]
    return embeddings[0], mean_terms(terms)


def self_training(config, axis_name: AxisName, objective, *, decodes: bool) -> Method:
    """DEC's clusters with an objective: what DEC and its descendants share."""
    first = first_kmeans(config, axis_name)

    def frequencies_of(bank, weights, centroids) -> jax.Array:
        q = soft_assignment(bank, centroids)
        return all_sum(jnp.sum(weights[:, None] * q, axis=0), axis_name)

    def initialize(key, bank, weights, index):
        result = first(key, bank, weights, index)
        frequencies = frequencies_of(bank, weights, result.centroids)
        return DECClusters(result.centroids, result.centroids, frequencies), assigned(result)

    def update(key, clusters, bank, weights, index, n_iterations):
        del key, index
        frequencies = frequencies_of(bank, weights, clusters.centroids)
        anew = DECClusters(clusters.centroids, clusters.centroids, frequencies)
        # Between two updates P stays, although the bank moves on: see `_check`.
        clusters = jax.tree.map(lambda a, b: jnp.where(n_iterations > 0, a, b), anew, clusters)
        return clusters, assign_by(nearest_centroid, clusters, bank, weights, axis_name)

    def blank(k: int, p: int, n: int) -> DECClusters:
        del n
        zeros = jnp.zeros((k, p), jnp.float32)
        return DECClusters(zeros, zeros, jnp.zeros((k,), jnp.float32))

    return Method(initialize, objective, update, blank, learned=("centroids",), decodes=decodes)


def dec(config, axis_name: AxisName) -> Method:
    """DEC as a `Method`.

    Args:
      config: a whole, validated config; ``centroids`` is read, where ``n_init`` and ``init`` are of
        the k-means at the start, and ``every`` is the interval of P in epochs.
      axis_name: mesh axis of the examples.
    """
    return self_training(config, axis_name, objective, decodes=False)


def check_targets(values: Mapping[str, Any]) -> None:
    """Refuses what would make P of something else than the examples at the end of an epoch.

    Raises:
      UserError: naming the field.
    """
    check_pretraining(values)
    name = values["objective.name"]
    check_bank_of_examples(values, "targets")
    if values["centroids.every"] != 1:
        raise UserError(
            f"config.centroids.every is {values['centroids.every']}, but the targets of {name} are "
            "made from the bank, which is new after every epoch; accepted: 1"
        )
    if values["centroids.n_iterations"] == 0:
        raise UserError(
            "config.centroids.n_iterations is 0, so the targets would never be made anew; "
            "accepted: at least 1"
        )


TARGETS = {"centroids.bank": "refreshed", "centroids.every": 1, "centroids.n_iterations": 1}
"""Settings of methods whose targets are made anew after every epoch."""

SPEC = MethodSpec(
    dec,
    {},
    check_targets,
    "Xie et al. 2016, Unsupervised deep embedding for clustering analysis",
    TARGETS,
)
