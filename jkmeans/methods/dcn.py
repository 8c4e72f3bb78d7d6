"""DCN: deep clustering network, k-means by small steps beside the autoencoder.

The objective is the mean over the examples of a batch of

    ‖xᵢ − x̂ᵢ‖² / d  +  (λ / 2) · ‖zᵢ − c_s(i)‖²

where s(i) is the nearest centroid (``assignment = "nearest"``), or the cluster of example i at the
last re-computation ("stored"): with augmentation, every view of an example is then pulled to the
cluster of the example, as in Guo et al. 2018, "Deep embedded clustering with data augmentation",
where clusters are found without views. Centroids are constants of the step and follow it: each
example, in turn, moves its centroid by c ← c − (c − z) / n, where n counts the examples the
centroid has had, beginning with ``initial_count`` at the first centroids (k-means on the pretrained
embeddings). A batch of them is applied at once, with the embeddings and centroids of the step:
c ← (n c + Σ z) / (n + m) for m examples, which is what their turns would give.

Source: Yang, Fu, Sidiropoulos and Hong 2017, "Towards k-means-friendly spaces", eqs. 5 and 8, and
algorithm 1. Deviations: the reconstruction error is a mean over pixels, as in ClustPy.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jkmeans import kmeans
from jkmeans.fields import number
from jkmeans.kmeans.collectives import AxisName
from jkmeans.methods.base import (
    ASSIGNMENT,
    Batch,
    Method,
    MethodSpec,
    assigned,
    check_bank_of_examples,
    check_pretraining,
    distances_of,
    first_kmeans,
    mean_terms,
    nearest_centroid,
    only_assign,
    reconstruction_error,
)


class DCNClusters(NamedTuple):
    """Centroids, and how much each of them has seen.

    Attributes:
      centroids: [k, p] float32.
      counts: [k] float32, examples so far.
    """

    centroids: jax.Array
    counts: jax.Array


def objective(
    network, clusters: DCNClusters, batch: Batch, *, centroid_weight: float, assignment: str
):
    """The terms of the module's formula; the reconstruction alone while pretraining."""

    def terms_of(z):
        terms = {"reconstruction": reconstruction_error(network, z, batch.x)}
        if batch.clustering:
            distances = distances_of(z, clusters.centroids, batch, assignment)
            terms["centroid"] = 0.5 * centroid_weight * distances
        return terms

    embeddings = [network.encode(seen) for seen in batch.inputs]
    return embeddings[0], mean_terms([terms_of(z) for z in embeddings])


def dcn(config, axis_name: AxisName) -> Method:
    """DCN as a `Method`.

    Args:
      config: a whole, validated config; ``objective.centroid_weight`` is λ,
        ``objective.assignment`` is of s, and ``centroids`` is of the k-means at the start.
      axis_name: mesh axis of the examples.
    """
    first = first_kmeans(config, axis_name)
    options = config.objective

    def initialize(key, bank, weights, index):
        result = first(key, bank, weights, index)
        counts = jnp.full_like(result.counts, options.initial_count)
        return DCNClusters(result.centroids, counts), assigned(result)

    def after_step(clusters: DCNClusters, embeddings, batch: Batch) -> DCNClusters:
        k = clusters.centroids.shape[0]
        labels = (
            kmeans.nearest(embeddings, clusters.centroids)
            if options.assignment == "nearest"
            else batch.labels
        )
        of_batch = kmeans.cluster_statistics(
            embeddings, labels, k, weights=batch.weights, axis_name=axis_name
        )
        counts = clusters.counts + of_batch.counts
        sums = clusters.counts[:, None] * clusters.centroids + of_batch.sums
        # A centroid of initial_count 0 that has seen nothing stays where it is.
        moved = sums / jnp.maximum(counts, 1e-12)[:, None]
        return DCNClusters(jnp.where(counts[:, None] > 0, moved, clusters.centroids), counts)

    def blank(k: int, p: int, n: int) -> DCNClusters:
        del n
        return DCNClusters(jnp.zeros((k, p), jnp.float32), jnp.zeros((k,), jnp.float32))

    return Method(
        initialize,
        functools.partial(
            objective, centroid_weight=options.centroid_weight, assignment=options.assignment
        ),
        only_assign(nearest_centroid, axis_name),
        blank,
        after_step=after_step,
    )


def _check(values: Mapping[str, Any]) -> None:
    check_pretraining(values)
    if values["objective.assignment"] == "stored":
        check_bank_of_examples(values, "stored assignments")


SPEC = MethodSpec(
    dcn,
    {
        "centroid_weight": number("λ"),
        "assignment": ASSIGNMENT,
        "initial_count": number("examples that a first centroid stands for"),
    },
    _check,
    "Yang et al. 2017, Towards k-means-friendly spaces",
    {
        "objective.centroid_weight": 0.05,
        "objective.assignment": "nearest",
        "objective.initial_count": 100.0,
    },
)
