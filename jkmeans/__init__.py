"""jkmeans: k-means and deep clustering in JAX, on any number of devices."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jkmeans.estimators import (
        BisectingKMeans,
        DeepClustering,
        HierarchicalKMeans,
        KMeans,
        MiniBatchKMeans,
        SphericalKMeans,
    )

__version__ = "0.1.0"

__all__ = [
    "BisectingKMeans",
    "DeepClustering",
    "HierarchicalKMeans",
    "KMeans",
    "MiniBatchKMeans",
    "SphericalKMeans",
]


def __getattr__(name: str):
    """The estimators, imported when they are first asked for: scikit-learn takes a second."""
    if name in __all__:
        from jkmeans import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
