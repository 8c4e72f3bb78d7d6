"""The baseline: an autoencoder, and k-means on its embeddings.

The objective is the mean over the examples of a batch of ‖xᵢ − x̂ᵢ‖² / d, in both phases; the
clusters are those of k-means on the embeddings of all examples, made anew from the current
centroids after each epoch of clustering, and have no influence on the network. Every other method
starts from this.

Source: Hinton and Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks";
MacQueen 1967 and Lloyd 1982 for k-means.
"""

from jkmeans import kmeans
from jkmeans.kmeans.collectives import AxisName
from jkmeans.methods.base import (
    Batch,
    Clusters,
    Method,
    MethodSpec,
    assigned,
    check_pretraining,
    first_kmeans,
    lloyd_algorithm,
    mean_terms,
    reconstruction_error,
)


def objective(network, clusters: Clusters, batch: Batch):
    """The reconstruction error of each example."""
    del clusters
    embeddings = [network.encode(seen) for seen in batch.inputs]
    terms = [{"reconstruction": reconstruction_error(network, z, batch.x)} for z in embeddings]
    return embeddings[0], mean_terms(terms)


def autoencoder(config, axis_name: AxisName) -> Method:
    """The baseline as a `Method`.

    Args:
      config: a whole, validated config; ``centroids`` is read.
      axis_name: mesh axis of the examples.
    """
    return with_kmeans(config, axis_name, objective)


def with_kmeans(config, axis_name: AxisName, objective, warmup_epochs: float = 0.0) -> Method:
    """An objective whose clusters are k-means on the bank, continued after each epoch.

    Args:
      config: ``centroids`` is read.
      axis_name: mesh axis of the examples.
      objective: see `Method`.
      warmup_epochs: see `Method`.
    """
    first = first_kmeans(config, axis_name)

    def initialize(key, bank, weights, index):
        result = first(key, bank, weights, index)
        return Clusters(result.centroids), assigned(result)

    def update(key, clusters, bank, weights, index, n_iterations):
        del key, index  # Lloyd from the current centroids draws nothing.
        result = kmeans.lloyd(
            bank,
            clusters.centroids,
            weights=weights,
            max_iter=n_iterations,
            empty=config.centroids.empty,
            algorithm=lloyd_algorithm(config),
            axis_name=axis_name,
        )
        return Clusters(result.centroids), assigned(result)

    return Method(initialize, objective, update, warmup_epochs=warmup_epochs)


SPEC = MethodSpec(
    autoencoder,
    {},
    check_pretraining,
    "Hinton and Salakhutdinov 2006, and k-means",
    {"training.n_epochs": 0},
)
