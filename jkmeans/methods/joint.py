"""Joint deep k-means: the network and its centroids learned together, in turns.

The objective of a batch B with centroids c₁…c_K, embeddings zᵢ = f(xᵢ) of dimension p, and
reconstructions x̂ᵢ = g(zᵢ) of dimension d is the mean over the examples of B of

    ρ · ‖xᵢ − x̂ᵢ‖² / d  +  λ(t) · ‖zᵢ − c_s(i)‖² / p  +  β · (log K − H(p̄))

* s(i) is the nearest centroid at the time of the step (``assignment = "nearest"``), or the cluster
  of example i at the last re-computation ("stored"): with augmentation, every view of an example
  is then pulled to the cluster of the example.
* Where the config asks for augmentation, zᵢ is the embedding of a random view of xᵢ, and x̂ᵢ its
  reconstruction, which is compared with xᵢ itself: a denoising autoencoder (Vincent et al. 2010)
  whose noise is affine, so that embeddings lose what shifts, rotations and zooms change.
* λ(t) = λ · min(1, t / T) rises over T epochs of clustering (``warmup_epochs``); t counts epochs
  since clustering began, fractions included. While pretraining only the first term stands, and ρ
  is 1.
* p̄ is the mean over the batch of softmaxₖ(−‖zᵢ − cₖ‖² / τ), H its entropy in nats: the term is
  zero when clusters are equally used and log K when one takes all. It stands only where β > 0.
* Centroids are constants of the step. After each epoch they are recomputed from the embeddings of
  all examples by Lloyd iterations that start from the current centroids.

‖z − c‖² alone is minimised by an encoder that maps everything to one point. With a decoder the
reconstruction keeps the embedding from shrinking; without one the network must normalise its
embeddings to length one and β must be positive (`jkmeans.configuration` refuses anything else).

Sources: alternating k-means and representation learning as in Song et al. 2013, "Auto-encoder
based data clustering" (AEC), eq. 4, with centroids recomputed over all data after each epoch;
Yang et al. 2017, "Towards k-means-friendly spaces" (DCN), eq. 5, for the joint loss. Deviations:
both terms are divided by their dimension, so that λ carries over between image sizes; λ warms up.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jkmeans.errors import UserError
from jkmeans.fields import number
from jkmeans.kmeans.collectives import AxisName
from jkmeans.methods.autoencoder import with_kmeans
from jkmeans.methods.base import (
    ASSIGNMENT,
    Batch,
    Clusters,
    Method,
    MethodSpec,
    all_squared_distances,
    distances_of,
    mean_terms,
    reconstruction_error,
)
from jkmeans.naming import resolve


def objective(
    network,
    clusters: Clusters,
    batch: Batch,
    *,
    reconstruction_weight: float,
    centroid_weight: float,
    warmup_epochs: float,
    balance_weight: float,
    temperature: float,
    assignment: str,
    decoder: bool,
):
    """The terms of the module's formula for each example.

    Args:
      network: with ``encode`` and, where ``decoder``, ``decode``.
      clusters: the current centroids [k, p].
      batch: examples of this device.
      reconstruction_weight: ρ.
      centroid_weight: λ.
      warmup_epochs: T; 0 for no warm-up.
      balance_weight: β.
      temperature: τ.
      assignment: ``nearest`` or ``stored``.
      decoder: whether there is a reconstruction term.

    Returns:
      embeddings [b, p] and ``{"reconstruction": [b], "centroid": [b], "balance": [b]}``, of which
      only the terms that stand are present.
    """

    def terms_of(z) -> dict[str, jax.Array]:
        terms = {}
        if decoder:
            weight = reconstruction_weight if batch.clustering else 1.0
            terms["reconstruction"] = weight * reconstruction_error(network, z, batch.x)
        if batch.clustering:
            weight = centroid_weight * warmup(batch.progress, warmup_epochs)
            distances = distances_of(z, clusters.centroids, batch, assignment)
            terms["centroid"] = weight * distances / z.shape[-1]
            if balance_weight > 0:
                value = imbalance(z, clusters.centroids, temperature, batch)
                terms["balance"] = balance_weight * jnp.broadcast_to(value, z.shape[:1])
        return terms

    embeddings = [network.encode(seen) for seen in batch.inputs]
    return embeddings[0], mean_terms([terms_of(z) for z in embeddings])


def warmup(progress: jax.Array, warmup_epochs: float) -> jax.Array:
    """λ(t) / λ = min(1, t / T)."""
    return jnp.minimum(progress / warmup_epochs, 1.0) if warmup_epochs > 0 else jnp.float32(1)


def imbalance(z, centroids, temperature: float, batch: Batch) -> jax.Array:
    """Log K − H(p̄) in nats, over the batch of all devices: 0 (balanced) to log K (one cluster)."""
    squared = all_squared_distances(z, centroids)
    usage = batch.mean(jax.nn.softmax(-squared / temperature, axis=-1))
    return jnp.log(usage.shape[0]) + jnp.sum(usage * jnp.log(jnp.maximum(usage, 1e-12)))


OBJECTIVES: dict[str, Callable] = {"joint": objective}


def joint(config, axis_name: AxisName) -> Method:
    """Joint deep k-means as a `Method`.

    Args:
      config: a whole, validated config; ``objective`` and ``centroids`` are read.
      axis_name: mesh axis of the examples.

    Raises:
      UserError: ``objective.name`` is neither ``joint`` nor an importable ``module:function``.
    """
    from jkmeans.methods import METHODS  # Which imports this module.

    chosen = resolve(config.objective.name, OBJECTIVES, "objective.name", METHODS)
    if chosen is objective:
        chosen = functools.partial(
            objective,
            reconstruction_weight=config.objective.reconstruction_weight,
            centroid_weight=config.objective.centroid_weight,
            warmup_epochs=config.objective.warmup_epochs,
            balance_weight=config.objective.balance_weight,
            temperature=config.objective.temperature,
            assignment=config.objective.assignment,
            decoder=config.network.decoder,
        )
    method = with_kmeans(config, axis_name, chosen, config.objective.warmup_epochs)
    # Clustering is pretraining with one term more. Momentum is of ten steps: it is not worth a
    # pretraining of one's own. What the user's objective pretrains, only it knows.
    options = config.training
    goes_on = options.clustering_optimizer == options.optimizer != "sgd"
    ours = config.objective.name in OBJECTIVES
    return method._replace(fresh_optimizer=ours and not goes_on)


def _check(values: Mapping[str, Any]) -> None:
    if values["network.decoder"] or values["objective.name"] != "joint":
        return
    if not values["network.normalize"] or values["objective.balance_weight"] == 0:
        raise UserError(
            "config.network.decoder is False, so nothing keeps the embeddings apart; accepted: "
            "network.normalize = True together with objective.balance_weight above 0"
        )
    if values["training.n_pretrain_epochs"] > 0:
        raise UserError(
            f"config.training.n_pretrain_epochs is {values['training.n_pretrain_epochs']}, but "
            "without a decoder there is nothing to pretrain; accepted: 0"
        )


SPEC = MethodSpec(
    joint,
    {
        "assignment": ASSIGNMENT,
        "reconstruction_weight": number("ρ, while clustering"),
        "centroid_weight": number("λ"),
        "warmup_epochs": number("T, epochs over which λ rises"),
        "balance_weight": number("β"),
        "temperature": number("τ of the balance term", positive=True),
    },
    _check,
    "Song et al. 2013, Auto-encoder based data clustering; Yang et al. 2017 (DCN)",
    {
        "objective.assignment": "nearest",
        "objective.reconstruction_weight": 1.0,
        "objective.centroid_weight": 0.1,
        "objective.warmup_epochs": 10.0,
        "objective.balance_weight": 0.0,
        "objective.temperature": 1.0,
    },
)
