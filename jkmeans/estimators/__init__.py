"""The scikit-learn interface: thin estimators over `jkmeans.kmeans` and `jkmeans.sharded`."""

from typing import TYPE_CHECKING

from jkmeans.estimators.bisecting import BisectingKMeans
from jkmeans.estimators.hierarchical import HierarchicalKMeans
from jkmeans.estimators.kmeans import KMeans
from jkmeans.estimators.minibatch import MiniBatchKMeans
from jkmeans.estimators.spherical import SphericalKMeans

if TYPE_CHECKING:
    from jkmeans.estimators.deep import DeepClustering

__all__ = [
    "BisectingKMeans",
    "DeepClustering",
    "HierarchicalKMeans",
    "KMeans",
    "MiniBatchKMeans",
    "SphericalKMeans",
]


def __getattr__(name: str):
    """Deep clustering, imported when it is asked for: k-means needs no networks."""
    if name == "DeepClustering":
        from jkmeans.estimators.deep import DeepClustering

        return DeepClustering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
