"""DeepCluster-v2: classify views by the cluster that their example had in the bank.

Embeddings and centroids have length one. The objective is the mean over the examples of a batch of

    − log softmax_k(zᵢ · cₖ / τ)[s(i)]

where zᵢ is the embedding of a view of example i, and s(i) its cluster at the last re-computation.
Centroids are constants of the step; after each epoch they are those of spherical k-means on the
bank (``centroids.n_iterations`` iterations), an empty one moving to a far example or staying where
it is (``centroids.empty``). Labels and prototypes change together, so that no classifier has to be
learned anew.

Source: Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster
assignments", section 4 and appendix ("DeepCluster-v2"), after Caron et al. 2018. Deviations: one
set of prototypes, not three; spherical k-means begins with the current centroids, not anew; empty
clusters keep their centroid only if asked to; the bank is of the examples themselves, where it is
refreshed; no multi-crop. With a decoder the network is pretrained as an autoencoder, which a paper
on ImageNet does not do.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jkmeans.errors import UserError
from jkmeans.fields import number
from jkmeans.kmeans.collectives import AxisName
from jkmeans.kmeans.spherical import spherical
from jkmeans.methods.base import (
    Batch,
    Clusters,
    Method,
    MethodSpec,
    assign_by,
    mean_terms,
    nearest_centroid,
    reconstruction_error,
)
from jkmeans.networks import unit_norm


def logits_of(z: jax.Array, centroids: jax.Array, temperature: float) -> jax.Array:
    """Z · c / τ for centroids brought to length one: [b, k]."""
    return cosines(z, centroids) / temperature


def cosines(z: jax.Array, centroids: jax.Array) -> jax.Array:
    """Z · c of unit embeddings and centroids brought to length one: [b, k]."""
    return jnp.dot(z, unit_norm(centroids).T, precision=jax.lax.Precision.HIGHEST)


def pretraining_terms(network, z: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """What the network learns before there are clusters."""
    return {"reconstruction": reconstruction_error(network, z, batch.x)}


def objective(network, clusters: Clusters, batch: Batch, *, temperature: float):
    """The terms of the module's formula."""
    embeddings = [network.encode(seen) for seen in batch.inputs]
    if not batch.clustering:
        return embeddings[0], pretraining_terms(network, embeddings[0], batch)

    def terms_of(z):
        losses = jax.nn.log_softmax(logits_of(z, clusters.centroids, temperature), axis=-1)
        chosen = jnp.take_along_axis(losses, batch.labels[:, None], axis=-1)[:, 0]
        return {"classification": -chosen}

    return embeddings[0], mean_terms([terms_of(z) for z in embeddings])


def spherical_start(config, axis_name: AxisName):
    """Spherical k-means on the bank: ``(key, bank, weights, index) -> centroids [k, p]``."""
    options = config.centroids

    def first(key, bank, weights, index) -> jax.Array:
        return spherical(
            key,
            bank,
            config.n_clusters,
            init=options.init,
            n_init=options.n_init,
            max_iter=options.init_max_iter,
            empty=options.empty,
            weights=weights,
            index=index,
            axis_name=axis_name,
        ).centroids

    return first


def deepcluster_v2(config, axis_name: AxisName) -> Method:
    """DeepCluster-v2 as a `Method`.

    Args:
      config: a whole, validated config; ``objective.temperature`` is τ, and ``centroids`` is read.
      axis_name: mesh axis of the examples.
    """
    first = spherical_start(config, axis_name)

    def initialize(key, bank, weights, index):
        clusters = Clusters(first(key, bank, weights, index))
        return clusters, assign_by(nearest_centroid, clusters, bank, weights, axis_name)

    def update(key, clusters, bank, weights, index, n_iterations):
        result = spherical(
            key,
            bank,
            config.n_clusters,
            init=clusters.centroids,
            max_iter=n_iterations,
            empty=config.centroids.empty,
            weights=weights,
            index=index,
            axis_name=axis_name,
        )
        clusters = Clusters(result.centroids)
        return clusters, assign_by(nearest_centroid, clusters, bank, weights, axis_name)

    chosen = functools.partial(objective, temperature=config.objective.temperature)
    return Method(initialize, chosen, update, decodes=False)


def check_sphere(values: Mapping[str, Any]) -> None:
    """Refuses embeddings of any length, and a pretraining with nothing to learn.

    Raises:
      UserError: naming the field.
    """
    name = values["objective.name"]
    if not values["network.normalize"]:
        raise UserError(
            f"config.network.normalize is False, but {name} compares directions; accepted: True"
        )
    if not values["network.decoder"] and values["training.n_pretrain_epochs"] > 0:
        raise UserError(
            f"config.training.n_pretrain_epochs is {values['training.n_pretrain_epochs']}, but "
            "without a decoder there is nothing to pretrain; accepted: 0"
        )


SPEC = MethodSpec(
    deepcluster_v2,
    {"temperature": number("τ", positive=True)},
    check_sphere,
    "Caron et al. 2020, Unsupervised learning by contrasting cluster assignments",
    {
        "objective.temperature": 0.1,
        "network.normalize": True,
        "centroids.bank": "refreshed",
        "centroids.n_iterations": 10,
    },
)
