"""k-means on arrays: pure functions, usable under jit, vmap, grad and shard_map."""

from jkmeans.kmeans.assignment import (
    PRECISIONS,
    Assignment,
    assign,
    distances_to_all,
    nearest,
    squared_distances,
)
from jkmeans.kmeans.certified import Certified, certified_nearest
from jkmeans.kmeans.fit import fit
from jkmeans.kmeans.initialization import (
    INITIALIZATIONS,
    kmeans_parallel,
    kmeans_plus_plus,
    sample,
)
from jkmeans.kmeans.lloyd import ALGORITHMS, EMPTY_POLICIES, KMeansResult, lloyd
from jkmeans.kmeans.relocation import MAX_RELOCATIONS
from jkmeans.kmeans.statistics import (
    ClusterStatistics,
    add,
    all_reduce,
    centroids_from,
    cluster_statistics,
    column_moments,
    far_origin,
    mean_variance,
)

__all__ = [
    "ALGORITHMS",
    "EMPTY_POLICIES",
    "INITIALIZATIONS",
    "MAX_RELOCATIONS",
    "PRECISIONS",
    "Assignment",
    "Certified",
    "ClusterStatistics",
    "KMeansResult",
    "add",
    "all_reduce",
    "assign",
    "centroids_from",
    "certified_nearest",
    "cluster_statistics",
    "column_moments",
    "distances_to_all",
    "far_origin",
    "fit",
    "kmeans_parallel",
    "kmeans_plus_plus",
    "lloyd",
    "mean_variance",
    "nearest",
    "sample",
    "squared_distances",
]
