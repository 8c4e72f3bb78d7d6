"""The scikit-learn interface: thin estimators over `jkmeans.kmeans` and `jkmeans.sharded`."""

from jkmeans.estimators.kmeans import KMeans

__all__ = ["KMeans"]
