"""IDEC: DEC that keeps the decoder, so that the embedding keeps the structure of the data.

The objective is the mean over the examples of a batch of

    ‖xᵢ − x̂ᵢ‖² / d  +  γ · KL(pᵢ‖qᵢ)

with P and Q of `jkmeans.methods.dec`, and the first centroids by k-means on the pretrained
embeddings.

Source: Guo, Gao, Liu and Yin 2017, "Improved deep embedded clustering with local structure
preservation", eq. 9; γ = .1 there. The reconstruction error is the mean over the pixels, as in the
authors' code (the paper's formula sums them).
"""

import functools

from jkmeans.fields import number
from jkmeans.kmeans.collectives import AxisName
from jkmeans.methods.base import Batch, Method, MethodSpec, mean_terms, reconstruction_error
from jkmeans.methods.dec import TARGETS, DECClusters, check_targets, divergence, self_training


def objective(network, clusters: DECClusters, batch: Batch, *, cluster_weight: float):
    """The terms of the module's formula; the reconstruction alone while pretraining."""

    def terms_of(z):
        terms = {"reconstruction": reconstruction_error(network, z, batch.x)}
        if batch.clustering:
            terms["divergence"] = cluster_weight * divergence(z, clusters, batch)
        return terms

    embeddings = [network.encode(seen) for seen in batch.inputs]
    return embeddings[0], mean_terms([terms_of(z) for z in embeddings])


def idec(config, axis_name: AxisName) -> Method:
    """IDEC as a `Method`.

    Args:
      config: a whole, validated config; ``objective.cluster_weight`` is γ, ``centroids`` is read as
        by `jkmeans.methods.dec.dec`.
      axis_name: mesh axis of the examples.
    """
    chosen = functools.partial(objective, cluster_weight=config.objective.cluster_weight)
    return self_training(config, axis_name, chosen, decodes=True)


SPEC = MethodSpec(
    idec,
    {"cluster_weight": number("γ, of the divergence")},
    check_targets,
    "Guo et al. 2017, Improved deep embedded clustering with local structure preservation",
    TARGETS | {"objective.cluster_weight": 0.1},
)
