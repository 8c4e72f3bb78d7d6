"""The scikit-learn interface: thin estimators over `jkmeans.kmeans` and `jkmeans.sharded`."""

from jkmeans.estimators.bisecting import BisectingKMeans
from jkmeans.estimators.hierarchical import HierarchicalKMeans
from jkmeans.estimators.kmeans import KMeans
from jkmeans.estimators.minibatch import MiniBatchKMeans
from jkmeans.estimators.spherical import SphericalKMeans

__all__ = [
    "BisectingKMeans",
    "HierarchicalKMeans",
    "KMeans",
    "MiniBatchKMeans",
    "SphericalKMeans",
]
