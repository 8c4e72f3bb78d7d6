"""N2D: a mixture of Gaussians on the manifold of an autoencoder's embeddings.

The embeddings zᵢ of a trained autoencoder are laid out anew (`jkmeans.methods.layouts`) by UMAP,
t-SNE or eigenvectors of the graph of neighbours, which keep neighbours together and let clusters
fall apart, and a mixture of Gaussians with full covariances, or k-means, clusters the layout. The
network is not trained any further, so these are functions of the embeddings on the host, not a
`Method`.

The layout is of these embeddings only: UMAP places new ones by another optimisation, whose result
depends on what else is placed with them, and the others place no new ones. New data therefore get
the cluster of the nearest embedding of the data that were clustered (`nearest_labels`).

Source: McConville, Santos-Rodríguez, Piechocki and Craddock 2021, "N2D: (Not too) deep clustering
via clustering the local manifold of an autoencoded embedding", sections III and IV, which compare
UMAP and t-SNE.
"""

from typing import Any

import numpy as np

from jkmeans.errors import UserError
from jkmeans.methods.layouts import integer_in, kmeans_labels, lay_out

CLUSTERERS = ("mixture", "k-means")
"""What clusters a layout."""


def manifold_clusters(
    embeddings: Any,
    n_clusters: int,
    *,
    seed: int,
    layout: str = "umap",
    n_neighbors: int = 20,
    min_dist: float = 0.0,
    n_components: int | None = None,
    metric: str = "euclidean",
    clusterer: str = "mixture",
    starts: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters embeddings on their manifold.

    The defaults are those of the paper's experiments. The same seed, versions and machine give the
    same bits: the layout is made in one thread.

    Args:
      embeddings: [n, p] finite numbers, used in float32.
      n_clusters: components of the mixture, 1 to n; one that is nowhere the most probable leaves
        its number unused.
      seed: of the layout and of the start of the mixture, from 0 to 2³² − 1. t-SNE starts from
        principal components and draws nothing, where embeddings have as many dimensions as it.
      layout: ``umap``, ``t-sne``, ``spectral`` or ``consensus``.
      n_neighbors: rows that each row is tied to on the manifold, itself included; 2 to n − 1. Of
        t-SNE it is the perplexity.
      min_dist: least distance of neighbours in the layout, 0 to 1; 0 packs clusters densest. Of
        UMAP only.
      n_components: q, the dimension of the layout, at most n − 2, and at most 3 of t-SNE, whose
        trees have no more; if None, ``n_clusters``, 2 of t-SNE, and of the spectral layout what
        its eigenvalues tell. Of the consensus it is the most dimensions of a clustering, at least
        ``n_clusters``; if None, 2 ``n_clusters``. See `jkmeans.methods.layouts`.
      metric: distance between embeddings, one of `METRICS`.
      clusterer: of the layout: ``mixture``, or ``k-means``, which depends less on its start.
      starts: of the clusterer, of which the best is kept; at least 1.

    Returns:
      The labels [n] int32, and the layout [n, q] float32.

    Raises:
      UserError: an argument is not as described, or umap-learn is not installed.
    """
    embeddings = _rows("embeddings", embeddings)
    n = len(embeddings)
    n_clusters = integer_in("n_clusters", n_clusters, 1, n, "the number of embeddings")
    if clusterer not in CLUSTERERS:
        raise UserError(f"clusterer is {clusterer!r}; accepted: {', '.join(CLUSTERERS)}")
    if layout == "consensus" and clusterer != "k-means":
        raise UserError(
            f"clusterer is {clusterer!r}, but memberships, of 0 and 1, are no mixture of "
            "Gaussians; accepted with layout 'consensus': 'k-means'"
        )
    starts = integer_in("starts", starts, 1, 2**31 - 1)
    seed = integer_in("seed", seed, 0, 2**32 - 1)
    places = lay_out(
        embeddings,
        n_clusters,
        seed=seed,
        layout=layout,
        n_neighbors=n_neighbors,
        min_dist=min_dist,
        n_components=n_components,
        metric=metric,
    )
    if clusterer == "k-means":
        return kmeans_labels(places, n_clusters, seed, starts), places
    return _mixture_labels(places, n_clusters, seed, starts), places


def _mixture_labels(layout: np.ndarray, n_clusters: int, seed: int, starts: int) -> np.ndarray:
    """The most probable component of each row; the paper's code has one start of the mixture."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(n_clusters, covariance_type="full", n_init=starts, random_state=seed)
    # Dense clusters have covariances whose Cholesky factors float32 may not have.
    return mixture.fit_predict(layout.astype(np.float64)).astype(np.int32)


def nearest_labels(bank: Any, bank_labels: Any, queries: Any, n_neighbors: int = 1) -> np.ndarray:
    """Clusters of new embeddings: those of the nearest embeddings of the bank.

    With more than one neighbour, the most frequent of their clusters; among equally frequent ones,
    that of the nearest neighbour. Distances are Euclidean.

    Args:
      bank: [n, p] finite numbers, the embeddings that were clustered.
      bank_labels: [n] integers, their clusters.
      queries: [m, p] finite numbers; m may be 0.
      n_neighbors: neighbours that are asked, 1 to n.

    Returns:
      Labels [m] int32.

    Raises:
      UserError: an argument is not as described.
    """
    from sklearn.neighbors import NearestNeighbors

    bank = _rows("bank", bank, least=1)
    n, p = bank.shape
    queries = _rows("queries", queries, least=0)
    if queries.shape[1] != p:
        raise UserError(
            f"queries have {queries.shape[1]} numbers each, but the bank's embeddings have {p}"
        )
    labels = np.asarray(bank_labels)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"bank_labels is {labels.dtype} of shape {list(labels.shape)}; accepted: integers of "
            f"shape [{n}], one for each embedding of the bank"
        )
    n_neighbors = integer_in(
        "n_neighbors", n_neighbors, 1, n, "the number of embeddings in the bank"
    )
    if len(queries) == 0:
        return np.zeros(0, np.int32)
    search = NearestNeighbors(n_neighbors=n_neighbors).fit(bank)
    neighbors = labels[search.kneighbors(queries, return_distance=False)]  # [m, k], nearest first.
    return _majority(neighbors).astype(np.int32)


def _majority(neighbors: np.ndarray) -> np.ndarray:
    """The most frequent value of each row [m, k], the first of equally frequent ones: [m]."""
    votes = np.stack([np.sum(neighbors == v[:, None], axis=1) for v in neighbors.T], axis=1)
    first = np.argmax(votes, axis=1)
    return np.take_along_axis(neighbors, first[:, None], axis=1)[:, 0]


def _rows(name: str, value: Any, least: int = 3) -> np.ndarray:
    """Contiguous float32 [n, p] of what the user gave."""
    try:
        given = np.asarray(value)
    except ValueError:  # Rows of different lengths.
        given = np.empty(0)
    shape = list(given.shape)
    if given.dtype.kind not in "fiu" or given.ndim != 2 or shape[0] < least or shape[1] == 0:
        raise UserError(
            f"{name} is {given.dtype} of shape {shape}; accepted: numbers of shape [n, p], "
            f"n at least {least} and p at least 1"
        )
    with np.errstate(over="ignore"):  # What overflows is refused below.
        rows = np.ascontiguousarray(given, np.float32)
    if not np.isfinite(rows).all():
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise UserError(f"{name} has a number in row {row} that is not finite in float32")
    return rows
