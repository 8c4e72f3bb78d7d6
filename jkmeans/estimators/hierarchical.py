"""HierarchicalKMeans: k-means of k-means, for data curation, in scikit-learn's interface."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

import jax
import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted

from jkmeans import sharded
from jkmeans.estimators.base import COMMON_CONSTRAINTS, CentroidEstimator, at_least, to_numpy
from jkmeans.estimators.inputs import (
    at_most_int32,
    keeps_model,
    random_key,
    read_rows,
    read_weights,
)
from jkmeans.estimators.kmeans import CORE_NAMES, check_outcome
from jkmeans.kmeans.hierarchical import balanced_sample, hierarchy


class HierarchicalKMeans(CentroidEstimator):
    """Levels of clusters, each of the centroids below, spread evenly over the data.

    The first level clusters the rows; each further level clusters the centroids of the level
    below. Within a level, k-means is repeated on the points nearest to its centroids, so that
    centroids do not crowd where rows are dense. ``sample`` draws training rows balanced over the
    hierarchy: common concepts no longer drown rare ones.

    Args:
      n_clusters: the number of clusters of each level, the finest first; one number for one level.
      init: of each k-means: "k-means++", "k-means||" or "random".
      n_init: restarts of each k-means.
      max_iter: iterations of a restart at most.
      tol: as in ``KMeans``.
      n_resampling: how often each level is resampled; 0 is plain hierarchical k-means.
      resample_size: points nearest to each centroid that are taken; by default half of the mean
        size of the level's clusters, at least 1. Rows of weight 0 are left out of both.
      random_state: a seed, a RandomState, or None for NumPy's global one.
      verbose: whether to print what was reached.
      mesh: the devices to spread rows over, see ``KMeans``.

    Attributes:
      cluster_centers_: [k, d], those of the finest level.
      labels_: [n] int32, the finest cluster of each row.
      inertia_: the weighted sum of squared distances to the finest centroids.
      n_iter_: iterations of the last k-means of the finest level.
      level_centers_: [k_t, d] for each level, the finest first.
      level_parents_: for each level but the last, [k_t] int32: the cluster of the next level that
        each cluster belongs to.
      level_labels_: [n] int32 for each level, the cluster of each row; ``labels_`` is the first.
      n_features_in_: d.
      feature_names_in_: [d], if X is a data frame with names.

    Source: Vo et al., Automatic data curation for self-supervised learning: a clustering-based
    approach, TMLR 2024.
    """

    _parameter_constraints: ClassVar[dict] = {
        **COMMON_CONSTRAINTS,
        "n_clusters": [at_least(Integral, 1), "array-like"],
        "init": [StrOptions({"k-means++", "k-means||", "random"})],
        "n_init": [at_least(Integral, 1)],
        "n_resampling": [at_least(Integral, 0)],
        "resample_size": [at_least(Integral, 1), None],
    }

    def __init__(
        self,
        n_clusters=(8, 4),
        *,
        init: Any = "k-means++",
        n_init=1,
        max_iter=300,
        tol=1e-4,
        n_resampling=10,
        resample_size=None,
        random_state=None,
        verbose=0,
        mesh=None,
    ):
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_resampling = n_resampling
        self.resample_size = resample_size
        self.random_state = random_state
        self.verbose = verbose
        self.mesh = mesh

    @keeps_model
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> HierarchicalKMeans:
        """Computes all levels.

        Args:
          X: [n, d], see ``KMeans``.
          y: ignored.
          sample_weight: [n], at least 0; None for ones. Centroids of the finest level are weighted
            means of rows; in levels above, each centroid counts once. Rows of weight 0 get labels,
            but are not resampled.

        Returns:
          The estimator.

        Raises:
          ValueError: a parameter, X or the weights cannot be used.
        """
        self._validate_params()
        X = read_rows(self, X, reset=True)
        weights = read_weights(sample_weight, X)
        sizes = self._sizes(X.shape[0])
        key = random_key(self.random_state)
        mesh = sharded.mesh_of(X) if self.mesh is None else self.mesh

        def cluster(points, k, level, step, n_padded, chosen):
            of_points = weights if level == 0 else None
            if of_points is not None and chosen is not None:
                of_points = of_points[chosen]
            rows = sharded.place(points, of_points, mesh=mesh, at_least=n_padded)
            result = sharded.fit_rows(
                jax.random.fold_in(jax.random.fold_in(key, level), step),
                rows,
                k,
                init=CORE_NAMES[self.init],
                n_init=self.n_init,
                max_iter=at_most_int32(self.max_iter),
                tol=float(self.tol),
                relative_tol=True,
            )
            return to_numpy(result.centroids), int(result.n_iter)

        def assign(points, centroids, level):
            rows = sharded.place(points, weights if level == 0 else None, mesh=mesh)
            result = sharded.evaluate_rows(rows, centroids)
            return to_numpy(result.labels), to_numpy(result.distances), float(result.inertia)

        with sharded.precision(X):
            levels = hierarchy(
                cluster,
                assign,
                X,
                sizes,
                weights=weights,
                n_resampling=self.n_resampling,
                resample_size=self.resample_size,
            )
        self.level_centers_ = [level.centroids for level in levels]
        self.level_parents_ = [level.labels for level in levels[1:]]
        self.level_labels_ = self._through_levels(levels[0].labels)
        self.cluster_centers_ = self.level_centers_[0]
        self.labels_ = self.level_labels_[0]
        self.inertia_ = levels[0].inertia
        self.n_iter_ = levels[0].n_iter
        check_outcome(self)
        if self.verbose:
            print(f"{len(sizes)} levels, inertia of the finest {self.inertia_}.")
        return self

    def predict_levels(self, X: Any) -> np.ndarray:
        """The cluster of each row in each level, going up from the nearest finest centroid.

        Args:
          X: [n, d].

        Returns:
          [n, levels] int32, the finest first.
        """
        check_is_fitted(self)
        return np.stack(self._through_levels(self.predict(X)), axis=1)

    def sample(self, n_samples: int, random_state: Any = None) -> np.ndarray:
        """Training rows, spread as evenly as possible over the clusters of each level.

        Args:
          n_samples: how many, at most the rows of the fit.
          random_state: a seed, a RandomState, or None for NumPy's global one.

        Returns:
          [n_samples] different row numbers, ascending.

        Raises:
          ValueError: it is no integer, or more rows are wanted than there are.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, Integral) or n_samples < 0:
            raise ValueError(f"n_samples={n_samples!r}: expected an integer of at least 0")
        return balanced_sample(self.level_labels_, n_samples, check_random_state(random_state))

    def _sizes(self, n_rows: int) -> list[int]:
        sizes = [self.n_clusters] if np.ndim(self.n_clusters) == 0 else self.n_clusters
        sizes = [int(size) if isinstance(size, Integral) else size for size in sizes]
        valid = sizes and all(isinstance(size, int) and size >= 1 for size in sizes)
        if not valid or sorted(sizes, reverse=True) != sizes:
            raise ValueError(
                f"n_clusters={self.n_clusters!r}: expected a number of clusters of at least 1 for "
                "each level, none larger than the one before it."
            )
        sharded.refuse_few_rows(n_rows, sizes[0])
        return sizes

    def _through_levels(self, labels: np.ndarray) -> list[np.ndarray]:
        found = [labels]
        for parents in self.level_parents_:
            found.append(parents[found[-1]])
        return found
