"""Layouts of embeddings: places where neighbours are together and clusters have fallen apart.

UMAP (McInnes, Healy and Melville 2018; umap-learn is an extra: ``pip install "jkmeans[manifold]"``)
and t-SNE (van der Maaten and Hinton 2008, by trees (van der Maaten 2014), of scikit-learn) move
places by descent. Those of `spectral` are eigenvectors of the graph of neighbours, and those of
`consensus` say what clusterings by several numbers of these have in common.
"""

import warnings
from typing import Any

import numpy as np

from jkmeans.errors import UserError

LAYOUTS = ("umap", "t-sne", "spectral", "consensus")
"""What lays embeddings out anew."""

METRICS = ("euclidean", "cosine", "manhattan", "correlation", "chebyshev")
"""Distances between embeddings that a layout may use here."""

# Rows up to which all eigenvectors are computed.
_DENSE_ROWS = 256
_CONSENSUS_STARTS = 20
# How much an eigenvalue of the Laplacian is known to.
_EIGENVALUE_TOLERANCE = 1e-6


def lay_out(
    embeddings: np.ndarray,
    n_clusters: int,
    *,
    seed: int,
    layout: str,
    n_neighbors: int,
    min_dist: float,
    n_components: int | None,
    metric: str,
) -> np.ndarray:
    """The places [n, q] float32 of embeddings [n, p] float32.

    Arguments are those of `jkmeans.methods.manifold.manifold_clusters`.

    Raises:
      UserError: an argument is not as described there, or umap-learn is not installed.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}; accepted: {', '.join(LAYOUTS)}")
    n_components, n_neighbors = layout_sizes(
        len(embeddings), n_clusters, layout, n_components, n_neighbors
    )
    if isinstance(min_dist, bool) or not isinstance(min_dist, int | float):
        raise UserError(f"min_dist is {min_dist!r}; accepted: a number from 0 to 1")
    if not 0 <= min_dist <= 1:
        raise UserError(f"min_dist is {min_dist}; accepted: a number from 0 to 1")
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}; accepted: {', '.join(METRICS)}")
    if layout == "umap":
        return _umap(embeddings, seed, n_neighbors, float(min_dist), n_components, metric)
    if layout == "t-sne":
        return _t_sne(embeddings, seed, n_neighbors, n_components, metric)
    if layout == "consensus":
        most = n_components or min(2 * n_clusters, len(embeddings) - 2)
        return consensus(embeddings, n_clusters, n_neighbors, most, seed=seed, metric=metric)
    chosen = n_components or _dimensions_to_choose_from(len(embeddings), n_clusters)
    return spectral(embeddings, n_neighbors, chosen, seed=seed, metric=metric)


def layout_sizes(
    n: int,
    n_clusters: int,
    layout: str,
    n_components: int | None,
    n_neighbors: int,
    prefix: str = "",
) -> tuple[int, int]:
    """Dimensions and neighbours of a layout of n embeddings; 0 where the layout chooses.

    What stands before their names in an error is the ``prefix``.

    Raises:
      UserError: there are too few embeddings for them.
    """
    if n < 3:
        raise UserError(f"there are {n} examples; accepted: at least 3 for a layout of them")
    if n_components is None:
        n_components = {"umap": n_clusters, "t-sne": 2, "spectral": 0, "consensus": 0}[layout]
    if n_components or layout in ("umap", "t-sne"):
        least = min(n_clusters, n - 2) if layout == "consensus" else 1
        n_components = integer_in(
            f"{prefix}n_components", n_components, least, n - 2, "embeddings less two"
        )
    if layout == "t-sne":
        integer_in(f"{prefix}n_components", n_components, 1, 3, "what the trees of t-sne have")
    n_neighbors = integer_in(f"{prefix}n_neighbors", n_neighbors, 2, n - 1, "embeddings less one")
    return n_components, n_neighbors


def _dimensions_to_choose_from(n: int, n_clusters: int) -> range:
    """Of a spectral layout for K clusters: K to 3K/2, and fewer than there are embeddings."""
    least = min(n_clusters, n - 2)
    return range(least, min(3 * n_clusters // 2, n - 2) + 1)


def _t_sne(embeddings, seed, perplexity, n_components, metric) -> np.ndarray:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # Principal components of what is all in one place are scaled by one over zero.
    differ = np.ptp(embeddings, axis=0).any()
    start = "pca" if differ and n_components <= embeddings.shape[1] else "random"
    with threadpool_limits(limits=1):  # Sums of several threads differ in their last bits.
        t_sne = TSNE(
            n_components,
            perplexity=perplexity,
            metric=metric,
            init=start,
            random_state=seed,
        )
        return np.asarray(t_sne.fit_transform(embeddings), np.float32)


def _umap(embeddings, seed, n_neighbors, min_dist, n_components, metric) -> np.ndarray:
    umap = _import_umap()
    reducer = umap.UMAP(
        n_neighbors=n_neighbors,
        min_dist=min_dist,
        n_components=n_components,
        metric=metric,
        random_state=seed,
        n_jobs=1,  # A seed means this anyway, with a warning.
    )
    with warnings.catch_warnings():
        # Groups without a tie between them are what clusters look like; UMAP lays each out by
        # itself then, and says so.
        warnings.simplefilter("ignore", UserWarning)
        layout = np.asarray(reducer.fit_transform(embeddings), np.float32)
    if not np.isfinite(layout).all():
        # UMAP leaves rows out that have no neighbour.
        row = int(np.flatnonzero(~np.isfinite(layout).all(axis=1))[0])
        raise UserError(f"UMAP has no place for row {row} of the embeddings; is it an outlier?")
    return layout


def _import_umap():
    """umap-learn, without its warning that there is no TensorFlow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import umap  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"clustering on the manifold needs umap-learn, which cannot be imported ({error}); "
                'pip install "jkmeans[manifold]" installs it'
            ) from None
    return umap


def spectral(
    embeddings: np.ndarray,
    n_neighbors: int,
    n_components: int | range,
    *,
    seed: int,
    metric: str = "euclidean",
) -> np.ndarray:
    """Places by the first eigenvectors of the graph that ties every row to its nearest others.

    W_ij is the number of the two rows i and j that have the other among their nearest: 0, 1 or 2.
    The places are rows of the eigenvectors of D^-½ W D^-½ for its q largest eigenvalues λ₁ = 1 ≥
    λ₂ ≥ …, scaled to length one, so that each group of rows with few ties to the others has a
    direction of its own. More of them than clusters help where a cluster falls into several such
    groups; how many is told by the eigengap, the largest ratio (1 − λ_{q+1}) / (1 − λ_q) among the
    q to choose from.

    Args:
      embeddings: [n, p] float32.
      n_neighbors: rows that each row is tied to, itself included, at least 2.
      n_components: q, at most n − 2; or the q to choose from.
      seed: of the vector that the search for eigenvectors begins with.
      metric: one of `METRICS`.

    Returns:
      The places, [n, q] float32, each of length one, or 0 where the graph falls into more than q
      parts and none of the q vectors is of the row's.

    Source: Ng, Jordan and Weiss 2001, "On spectral clustering: analysis and an algorithm"; the
    eigengap: von Luxburg 2007, "A tutorial on spectral clustering", section 8.3.
    """
    choices = (
        range(n_components, n_components + 1) if isinstance(n_components, int) else n_components
    )
    values, vectors = _eigenvectors(embeddings, n_neighbors, choices[-1] + 1, seed, metric)
    missing = np.maximum(1 - values, _EIGENVALUE_TOLERANCE)  # Of the Laplacian, rising.
    q = max(choices, key=lambda q: missing[q] / missing[q - 1])
    return _directions(vectors, q)


def consensus(
    embeddings: np.ndarray,
    n_clusters: int,
    n_neighbors: int,
    most_components: int,
    *,
    seed: int,
    metric: str = "euclidean",
) -> np.ndarray:
    """Memberships of spectral clusterings of K, K + 1, … dimensions, side by side.

    Each is by k-means, the best of twenty starts, of the places that `spectral` has of so many
    dimensions. Rows that the clusterings put together are near each other; no one of them decides.

    Args:
      embeddings: [n, p] float32.
      n_clusters: K, of each clustering.
      n_neighbors: see `spectral`.
      most_components: dimensions of the last of them, at most n − 2; below K it is the only one.
      seed: of the search for eigenvectors and of all k-means.
      metric: one of `METRICS`.

    Returns:
      [n, K · number of clusterings] float32, of 0 and 1.

    Source: Strehl and Ghosh 2002, "Cluster ensembles: a knowledge reuse framework for combining
    multiple partitions", whose hypergraph this is; that k-means may cluster it: Topchy, Jain and
    Punch 2005, "Clustering ensembles: models of consensus and weak partitions".
    """
    dimensions = range(min(n_clusters, most_components), most_components + 1)
    _, vectors = _eigenvectors(embeddings, n_neighbors, dimensions[-1], seed, metric)
    memberships = []
    for q in dimensions:
        places = np.zeros(vectors.shape, np.float32)  # Of one width, for one compiled k-means.
        places[:, :q] = _directions(vectors, q)
        labels = kmeans_labels(places, n_clusters, seed, _CONSENSUS_STARTS)
        memberships.append(np.eye(n_clusters, dtype=np.float32)[labels])
    return np.concatenate(memberships, axis=1)


def kmeans_labels(places: np.ndarray, n_clusters: int, seed: int, starts: int) -> np.ndarray:
    """The clusters of places [n, q] by k-means, the best of so many starts: [n] int32."""
    import jax

    from jkmeans import sharded

    key = jax.random.key(np.random.RandomState(seed).randint(2**31 - 1))
    fitted = sharded.fit(key, places, n_clusters, n_init=starts, tol=1e-4, relative_tol=True)
    return np.asarray(fitted.labels, np.int32)


def _directions(vectors: np.ndarray, q: int) -> np.ndarray:
    places = vectors[:, :q]
    lengths = np.linalg.norm(places, axis=1, keepdims=True)
    return (places / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)


def _eigenvectors(
    embeddings: np.ndarray, n_neighbors: int, count: int, seed: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Of the graph of neighbours: eigenvalues [count], falling, and eigenvectors [n, count]."""
    from scipy.sparse import csr_array
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    n, m = len(embeddings), n_neighbors - 1
    with threadpool_limits(limits=1):  # Sums of several threads differ in their last bits.
        search = NearestNeighbors(n_neighbors=m, metric=metric).fit(embeddings)
        nearest = search.kneighbors(return_distance=False)
        ends = np.arange(0, n * m + 1, m)
        ties = csr_array((np.ones(n * m), nearest.ravel(), ends), shape=(n, n))
        return _leading_eigenvectors(ties + ties.T, count, seed)


def _leading_eigenvectors(ties: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of D^-½ W D^-½ [count], falling, and eigenvectors [n, count].

    Of each connected part by itself: they have λ = 1 in common, and a search that begins with one
    vector finds only one vector of an eigenvalue.
    """
    from scipy.sparse import dia_array
    from scipy.sparse.csgraph import connected_components

    n = ties.shape[0]
    scales = 1 / np.sqrt(ties.sum(axis=0))
    scaling = dia_array((scales[None], [0]), shape=(n, n))
    matrix = (scaling @ ties @ scaling).tocsr()
    n_parts, part = connected_components(matrix, directed=False)
    found = []
    for number in range(n_parts):
        rows = np.flatnonzero(part == number)
        values, vectors = _of_connected(matrix[rows][:, rows], min(count, len(rows)), seed)
        found += [(value, rows, vectors[:, i]) for i, value in enumerate(values)]
        found.sort(key=lambda one: -one[0])
        del found[count:]
    vectors = np.zeros((n, count))
    for i, (_, rows, vector) in enumerate(found):
        vectors[rows, i] = vector
    return np.array([value for value, _, _ in found]), vectors


def _of_connected(matrix: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of a matrix whose graph is connected."""
    from scipy.sparse.linalg import eigsh

    n = matrix.shape[0]
    if n <= max(_DENSE_ROWS, 4 * count):
        values, vectors = np.linalg.eigh(matrix.toarray())
        values, vectors = values[-count:], vectors[:, -count:]
    else:
        start = np.random.default_rng(seed).uniform(size=n)
        tolerance: Any = _EIGENVALUE_TOLERANCE  # An int, by SciPy's annotation.
        values, vectors = eigsh(
            matrix, k=count, which="LA", v0=start, ncv=max(20, 4 * count), tol=tolerance
        )
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order]


def integer_in(name: str, value: Any, least: int, most: int, what_most_is: str = "") -> int:
    """The value as an int.

    Raises:
      UserError: it is no integer from ``least`` to ``most``.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not least <= value <= most
    ):
        explained = f" ({what_most_is})" if what_most_is else ""
        raise UserError(
            f"{name} is {value!r}; accepted: an integer from {least} to {most}{explained}"
        )
    return int(value)
