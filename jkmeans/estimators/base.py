"""What the estimators share: everything that needs nothing but the centroids."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from jkmeans import sharded, sharding
from jkmeans.estimators.files import is_source, opened, written
from jkmeans.estimators.inputs import read_rows, read_weights


def at_least(kind: type, lowest: int) -> Interval:
    """The constraint on a number that has no upper bound."""
    return Interval(kind, lowest, None, closed="left")


COMMON_CONSTRAINTS: dict[str, list] = {
    "n_clusters": [at_least(Integral, 1)],
    "init": [StrOptions({"k-means++", "k-means||", "random"}), callable, "array-like"],
    "n_init": [StrOptions({"auto"}), at_least(Integral, 1)],
    "max_iter": [at_least(Integral, 1)],
    "tol": [at_least(Real, 0)],
    "verbose": ["verbose"],
    "random_state": ["random_state"],
    "mesh": [Mesh, None],
}


class CentroidEstimator(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator
):
    """The part of a k-means estimator that follows from ``cluster_centers_``.

    A subclass has the parameters n_clusters and mesh, and implements ``fit``.
    """

    _parameter_constraints: ClassVar[dict] = COMMON_CONSTRAINTS

    n_clusters: Any
    mesh: Any
    cluster_centers_: np.ndarray
    labels_: np.ndarray
    inertia_: float
    n_features_in_: int

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None):
        """Computes the clusters; see the class.

        Args:
          X: [n, d].
          y: ignored.
          sample_weight: [n], at least 0; None for ones.
        """
        raise NotImplementedError

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Computes the clusters and returns the label of each row.

        Args:
          X: [n, d].
          y: ignored.
          sample_weight: [n], at least 0; None for ones.

        Returns:
          [n] int32.
        """
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Computes the clusters and returns the distance of each row to each centroid.

        Args:
          X: [n, d].
          y: ignored.
          sample_weight: [n], at least 0; None for ones.

        Returns:
          [n, k], as ``transform``.
        """
        return self.fit(X, sample_weight=sample_weight)._transform(X)

    def predict(self, X: Any) -> np.ndarray:
        """The nearest centroid of each row.

        Args:
          X: [n, d], of any accepted type, not only that of the fit.

        Returns:
          [n] int32.
        """
        check_is_fitted(self)
        if is_source(X):
            return self._predict_source(X)
        X = read_rows(self, X, reset=False)
        labels = sharded.nearest(X, self.cluster_centers_, mesh=self.mesh, **self._precision)
        return to_numpy(labels)

    def transform(self, X: Any) -> np.ndarray:
        """The Euclidean distance of each row to each centroid.

        Args:
          X: [n, d].

        Returns:
          [n, k] float32, or float64 if X or the centroids are.
        """
        check_is_fitted(self)
        return self._transform(X)

    def _transform(self, X: Any) -> np.ndarray:
        if is_source(X):
            with opened(X, self.cluster_centers_) as (streaming, source):
                return written(
                    lambda path: streaming.transform_stream(
                        source, self.cluster_centers_, path, mesh=self._stream_mesh
                    )
                )
        X = read_rows(self, X, reset=False)
        return to_numpy(sharded.distances(X, self.cluster_centers_, mesh=self.mesh))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of rows under the fitted centroids.

        Args:
          X: [n, d].
          y: ignored.
          sample_weight: [n], at least 0; None for ones.
        """
        check_is_fitted(self)
        if is_source(X):
            with opened(X, self.cluster_centers_) as (streaming, source):
                return streaming.score_stream(
                    source, self.cluster_centers_, weights=sample_weight, mesh=self._stream_mesh
                )
        X = read_rows(self, X, reset=False)
        weights = read_weights(sample_weight, X)
        centers = self.cluster_centers_
        return -float(sharded.inertia(X, centers, weights=weights, mesh=self.mesh))

    def _predict_source(self, X: Any) -> np.ndarray:
        with opened(X, self.cluster_centers_) as (streaming, source):
            return written(
                lambda path: streaming.predict_stream(
                    source, self.cluster_centers_, path, mesh=self._stream_mesh
                )
            )

    @property
    def _precision(self) -> dict[str, str]:
        """The option of the core that says how scores are computed, where it is not its default."""
        precision = getattr(self, "precision", "full")
        return {} if precision == "full" else {"precision": precision}

    @property
    def _stream_mesh(self) -> Mesh:
        """Streaming takes all devices where no mesh is given; the estimators take one."""
        return sharding.make_mesh(1) if self.mesh is None else self.mesh

    @property
    def _n_features_out(self) -> int:
        return self.cluster_centers_.shape[0]

    def __getstate__(self) -> dict:
        """The mesh stays behind: its devices are those of this process."""
        state: Any = super().__getstate__()
        return {**state, "mesh": None}

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy array of its own, which may be written to."""
    return np.array(sharding.to_host(array) if isinstance(array, jax.Array) else array)
