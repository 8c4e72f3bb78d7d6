"""SphericalKMeans in scikit-learn's interface."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.utils.validation import check_is_fitted

from jkmeans import sharded, sharding
from jkmeans.estimators.base import to_numpy
from jkmeans.estimators.inputs import read_rows, read_weights
from jkmeans.estimators.kmeans import KMeans
from jkmeans.kmeans import KMeansResult
from jkmeans.kmeans.spherical import spherical, unit_rows


class SphericalKMeans(KMeans):
    """k-means of directions: minimises Σ_i w_i (1 − cos(x_i, c_{labels_i})).

    The lengths of rows do not matter; rows of zeros have cosine distance 1 to every centroid. The
    parameters are those of ``KMeans`` that are listed in the signature; ``tol`` is relative to the
    variance of the normalised rows. Files are not read.

    Attributes:
      cluster_centers_: [k, d] float32 or float64, of norm 1.
      labels_: [n] int32, the centroid of largest cosine similarity.
      inertia_: the weighted sum of 1 − cos.
      n_iter_: iterations of the best restart.
      n_features_in_: d.
      feature_names_in_: [d], if X is a data frame with names.

    Source: Dhillon and Modha, Machine Learning 42 (2001).
    """

    _streams = False
    _parameter_constraints: ClassVar[dict] = {
        name: constraint
        for name, constraint in KMeans._parameter_constraints.items()
        if name not in ("oversampling_factor", "deterministic")
    }

    def __init__(
        self,
        n_clusters=8,
        *,
        init: Any = "k-means++",
        n_init: Any = "auto",
        max_iter=300,
        tol=1e-4,
        verbose=0,
        random_state=None,
        copy_x=True,
        algorithm="lloyd",
        mesh=None,
    ):
        super().__init__(
            n_clusters,
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            verbose=verbose,
            random_state=random_state,
            copy_x=copy_x,
            algorithm=algorithm,
            mesh=mesh,
        )

    def predict(self, X: Any) -> np.ndarray:
        """The centroid of largest cosine similarity of each row.

        Args:
          X: [n, d].

        Returns:
          [n] int32.
        """
        check_is_fitted(self)
        return to_numpy(self._evaluate(read_rows(self, X, reset=False), None).labels)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the weighted sum of 1 − cos.

        Args:
          X: [n, d].
          y: ignored.
          sample_weight: [n], at least 0; None for ones.
        """
        check_is_fitted(self)
        X = read_rows(self, X, reset=False)
        return -float(self._evaluate(X, read_weights(sample_weight, X)).inertia)

    def _transform(self, X: Any) -> np.ndarray:
        """1 − cos of each row and each centroid: [n, k]."""
        X = read_rows(self, X, reset=False)
        with sharded.precision(X, self.cluster_centers_):
            rows = sharded.place(X, mesh=self.mesh)
            result = sharded.run(_cosines, rows, self.cluster_centers_, out_specs=sharding.SHARDED)
            return to_numpy(sharded.unpadded(result, rows.n_rows))

    def _evaluate(self, X: np.ndarray | jax.Array, weights: np.ndarray | None) -> KMeansResult:
        with sharded.precision(X, self.cluster_centers_):
            rows = sharded.place(X, weights, mesh=self.mesh)
            return self._run(rows, self.cluster_centers_, jax.random.key(0), 1, max_iter=0)

    def _run(
        self, rows: sharded.Rows, init: Any, key: jax.Array, n_init: int, max_iter: int
    ) -> KMeansResult:
        by_name = isinstance(init, str)
        result = sharded.run(
            _fit,
            rows,
            key,
            None if by_name else init,
            max_iter,
            float(self.tol),
            rows.n_rows,
            out_specs=sharded.RESULT_SPECS,
            init=init if by_name else None,
            n_clusters=self.n_clusters if by_name else len(init),
            n_init=n_init,
        )
        return sharded.cut(result, rows.n_rows)


def _fit(x, weights, key, centroids, max_iter, tol, n_rows, *, init, axis_name, **options):
    x = unit_rows(x)
    return spherical(
        key,
        x,
        init=centroids if init is None else init,
        max_iter=max_iter,
        tol=sharded.scaled_tol(tol, x, n_rows, axis_name),
        weights=weights,
        axis_name=axis_name,
        **options,
    )


def _cosines(x, weights, centroids, *, axis_name):
    del weights, axis_name
    x = unit_rows(x)
    similarity = jnp.matmul(x, jnp.asarray(centroids, x.dtype).T, precision=lax.Precision.HIGHEST)
    return jnp.clip(1 - similarity, 0, 2)
