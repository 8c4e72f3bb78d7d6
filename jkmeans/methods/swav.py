"""SwAV: swapped prediction, each view predicts the code of the other.

Embeddings z, z' of two views of an example have length one, and so have the prototypes c, which are
learned by gradient. Codes Q maximise Σ Q (z · c) + ε H(Q) over the transport polytope whose
clusters are equally used by the batch; the Sinkhorn algorithm finds them in
``sinkhorn_iterations``. The objective is the mean over the examples of a batch of

    − ½ { Σₖ q'_k log softmaxₖ(z · c / τ)  +  Σₖ q_k log softmaxₖ(z' · c / τ) }

with codes constant. Row sums of Q run over the batch of all devices, so that one device and eight
agree. The cluster of an example is the prototype nearest in direction to its embedding.

Source: Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster
assignments", eqs. 1 to 5. Deviations: two views of the same size, no multi-crop, no queue; the
first prototypes are those of spherical k-means on the pretrained embeddings, not random.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jkmeans import kmeans
from jkmeans.augmentation import VIEWS
from jkmeans.errors import UserError
from jkmeans.fields import integer, number
from jkmeans.kmeans.collectives import AxisName, all_max, all_sum
from jkmeans.methods.base import Batch, Clusters, Method, MethodSpec, assign_by, only_assign
from jkmeans.methods.deepcluster_v2 import (
    check_sphere,
    cosines,
    logits_of,
    pretraining_terms,
    spherical_start,
)
from jkmeans.networks import unit_norm


def sinkhorn(
    scores: jax.Array, weights: jax.Array, epsilon: float, n_iterations: int, axis_name: AxisName
) -> jax.Array:
    """Codes of a batch: [b, k], rows summing to one, clusters equally used; constants.

    Args:
      scores: [b, k], z · c.
      weights: [b], 0 for padding, which uses no cluster.
      epsilon: ε, of the entropy.
      n_iterations: of the Sinkhorn algorithm.
      axis_name: mesh axis of the batch; two reductions for each iteration, and one before.
    """
    # In logarithms: exp(score / ε) leaves the range of float32 below ε = .012.
    scores = jax.lax.stop_gradient(scores)
    largest = all_max(jnp.max(scores), axis_name)
    log_q = jnp.where(weights[:, None] > 0, (scores - largest) / epsilon, -jnp.inf)
    for _ in range(n_iterations):
        peak = all_max(jnp.max(log_q, axis=0), axis_name)
        usage = all_sum(jnp.sum(jnp.exp(log_q - peak[None, :]), axis=0), axis_name)
        log_q = log_q - (jnp.log(usage) + peak)[None, :]
        log_q = log_q - jax.nn.logsumexp(
            jnp.where(weights[:, None] > 0, log_q, 0.0), axis=1, keepdims=True
        )
    return jnp.where(weights[:, None] > 0, jnp.exp(log_q), 0.0)


def objective(
    network,
    clusters: Clusters,
    batch: Batch,
    *,
    temperature: float,
    epsilon: float,
    sinkhorn_iterations: int,
):
    """The terms of the module's formula."""
    z = network.encode(batch.view)
    if not batch.clustering:
        return z, pretraining_terms(network, z, batch)
    other = network.encode(batch.other_view)

    def code(embeddings):
        scores = cosines(embeddings, clusters.centroids)
        return sinkhorn(scores, batch.weights, epsilon, sinkhorn_iterations, batch.axis_name)

    def surprise(embeddings, q):
        log_p = jax.nn.log_softmax(logits_of(embeddings, clusters.centroids, temperature))
        return -jnp.sum(q * log_p, axis=-1)

    return z, {"swapped": 0.5 * (surprise(z, code(other)) + surprise(other, code(z)))}


def predict(clusters: Clusters, embeddings: jax.Array) -> kmeans.Assignment:
    """The prototype nearest in direction, and the squared distance to it."""
    return kmeans.assign(embeddings, unit_norm(clusters.centroids))


def swav(config, axis_name: AxisName) -> Method:
    """SwAV as a `Method`.

    Args:
      config: a whole, validated config; ``objective`` holds τ, ε and the iterations, ``centroids``
        is of the spherical k-means at the start.
      axis_name: mesh axis of the examples.
    """
    first = spherical_start(config, axis_name)
    options = config.objective

    def initialize(key, bank, weights, index):
        clusters = Clusters(first(key, bank, weights, index))
        return clusters, assign_by(predict, clusters, bank, weights, axis_name)

    def after_step(clusters: Clusters, embeddings, batch: Batch) -> Clusters:
        # Their length has no part in the objective, and would only grow.
        return Clusters(unit_norm(clusters.centroids))

    chosen = functools.partial(
        objective,
        temperature=options.temperature,
        epsilon=options.epsilon,
        sinkhorn_iterations=options.sinkhorn_iterations,
    )
    return Method(
        initialize,
        chosen,
        only_assign(predict, axis_name),
        predict=predict,
        learned=("centroids",),
        after_step=after_step,
        decodes=False,
    )


def _check(values: Mapping[str, Any]) -> None:
    check_sphere(values)
    if not any(values[f"augmentation.{view}"] for view in VIEWS):
        raise UserError(
            "config.augmentation.shift, rotation and zoom are all 0, but swav learns from two "
            "different views; accepted: at least one above 0"
        )
    if values["augmentation.invariance"]:
        raise UserError(
            "config.augmentation.invariance is True, but swav compares two views of an example and "
            "does not see the example itself; accepted: False"
        )


SPEC = MethodSpec(
    swav,
    {
        "temperature": number("τ", positive=True),
        "epsilon": number("ε, of the entropy of the codes", positive=True),
        "sinkhorn_iterations": integer(1, "of the codes"),
    },
    _check,
    "Caron et al. 2020, Unsupervised learning by contrasting cluster assignments",
    {
        "objective.temperature": 0.1,
        "objective.epsilon": 0.05,
        "objective.sinkhorn_iterations": 3,
        "network.normalize": True,
        "augmentation.shift": 1.0,
        "augmentation.rotation": 10.0,
    },
)
