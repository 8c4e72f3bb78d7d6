"""N2D: not too deep clustering, a mixture on the manifold of an autoencoder's embeddings.

The network is an autoencoder that is only pretrained: its objective is ‖xᵢ − x̂ᵢ‖² / d. At the end
of the run the embeddings of all examples are laid out by UMAP, t-SNE or eigenvectors of the graph
of neighbours, and clustered there by a mixture of Gaussians or k-means
(`jkmeans.methods.manifold`), on the host and in one process. The clusters of the run are those; the
cluster of anything else is that of the nearest embedding among the examples that were clustered.
The clusters therefore hold all embeddings, n · p numbers, on every device.

Source: McConville et al. 2021, "N2D: (Not too) deep clustering via clustering the local manifold of
an autoencoded embedding". The paper's autoencoder is trained for 1,000 epochs.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jkmeans import kmeans
from jkmeans.errors import UserError
from jkmeans.fields import choice, integer, number
from jkmeans.kmeans.collectives import AxisName
from jkmeans.methods.autoencoder import objective, with_kmeans
from jkmeans.methods.base import Method, MethodSpec, check_pretraining
from jkmeans.methods.layouts import LAYOUTS, layout_sizes
from jkmeans.methods.manifold import CLUSTERERS, manifold_clusters

# Numbers of the scores of a block of queries.
_BLOCK_ENTRIES = 2**22


class ManifoldClusters(NamedTuple):
    """Clusters of any shape: every example, and which cluster it is in.

    Attributes:
      centroids: [k, p] float32, the mean embedding of each cluster.
      bank: [n, p] float32, the embeddings that were clustered.
      labels: [n] int32, the cluster of each.
    """

    centroids: jax.Array
    bank: jax.Array
    labels: jax.Array


def predict(clusters: ManifoldClusters, embeddings: jax.Array) -> kmeans.Assignment:
    """The cluster of the nearest embedding of the bank, and the distance to that cluster's mean."""
    rows = max(1, _BLOCK_ENTRIES // clusters.bank.shape[0])
    nearest = kmeans.nearest(embeddings, clusters.bank, block_size=rows)
    labels = clusters.labels[nearest]
    return kmeans.Assignment(
        labels, kmeans.squared_distances(embeddings, clusters.centroids, labels)
    )


def n2d(config, axis_name: AxisName) -> Method:
    """N2D as a `Method`.

    Args:
      config: a whole, validated config; ``objective`` holds the settings of the layout and the
        mixture, and ``centroids`` is of a k-means whose clusters only stand in until the mixture is
        made.
      axis_name: mesh axis of the examples.
    """
    baseline = with_kmeans(config, axis_name, objective)
    options, k = config.objective, config.n_clusters

    def on_host(embeddings: np.ndarray, seed: int) -> tuple[ManifoldClusters, np.ndarray]:
        labels, _ = manifold_clusters(
            embeddings,
            k,
            seed=seed,
            layout=options.layout,
            n_neighbors=options.n_neighbors,
            min_dist=options.min_dist,
            n_components=options.n_components or None,
            clusterer=options.clusterer,
            starts=options.starts,
        )
        counts = np.bincount(labels, minlength=k)
        sums = np.zeros((k, embeddings.shape[1]))
        np.add.at(sums, labels, embeddings)
        means = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        return ManifoldClusters(means, embeddings, labels), labels  # type: ignore[arg-type]

    def blank(k: int, p: int, n: int) -> ManifoldClusters:
        return ManifoldClusters(
            jnp.zeros((k, p), jnp.float32),
            jnp.zeros((n, p), jnp.float32),
            jnp.zeros((n,), jnp.int32),
        )

    return baseline._replace(blank=blank, predict=predict, on_host=on_host)


def _check(values: Mapping[str, Any]) -> None:
    check_pretraining(values)
    if values["training.n_epochs"] > 0:
        raise UserError(
            f"config.training.n_epochs is {values['training.n_epochs']}, but the network of n2d is "
            "only pretrained; accepted: 0"
        )
    if values["objective.min_dist"] > 1:
        raise UserError(
            f"config.objective.min_dist is {values['objective.min_dist']}; accepted: 0 to 1"
        )
    layout, n_components = values["objective.layout"], values["objective.n_components"]
    clusterer = values["objective.clusterer"]
    if layout == "consensus" and clusterer != "k-means":
        raise UserError(
            f"config.objective.clusterer is {clusterer!r}, but layout 'consensus' has memberships "
            "of 0 and 1, which are no mixture of Gaussians; accepted: 'k-means'"
        )
    if layout == "t-sne" and n_components > 3:
        raise UserError(
            f"config.objective.n_components is {n_components}, but a layout of t-sne has 1 to 3 "
            "dimensions; accepted: 0 to 3"
        )
    if layout == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError(
            "config.objective.layout is 'umap', which needs umap-learn; pip install "
            '"jkmeans[manifold]" installs it, and the other layouts need nothing more'
        )


def _check_data(config: Any, dataset: Any, part: tuple[int, int]) -> None:
    """What `manifold_clusters` would refuse once the network is trained."""
    del part
    options = config.objective
    layout_sizes(
        dataset.n_examples,
        config.n_clusters,
        options.layout,
        options.n_components or None,
        options.n_neighbors,
        prefix="config.objective.",
    )


SPEC = MethodSpec(
    n2d,
    {
        "layout": choice(LAYOUTS, "what lays the embeddings out anew"),
        "n_neighbors": integer(2, "rows that each row is tied to; the perplexity of t-SNE"),
        "min_dist": number("least distance of neighbours in a layout by UMAP"),
        "n_components": integer(
            0,
            "dimension of the layout; 0 for K, 2 of t-SNE, what eigenvalues tell of spectral, and "
            "2K of consensus",
        ),
        "clusterer": choice(CLUSTERERS, "what clusters the layout"),
        "starts": integer(1, "starts of the clusterer, of which the best is kept"),
    },
    _check,
    "McConville et al. 2021, N2D: (Not too) deep clustering",
    {
        "objective.layout": "umap",
        "objective.n_neighbors": 20,
        "objective.min_dist": 0.0,
        "objective.n_components": 0,
        "objective.clusterer": "mixture",
        "objective.starts": 1,
        "training.n_epochs": 0,
    },
    check_data=_check_data,
)
