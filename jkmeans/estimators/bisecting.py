"""BisectingKMeans in scikit-learn's interface."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted

from jkmeans import sharded, sharding
from jkmeans.estimators.base import (
    COMMON_CONSTRAINTS,
    CentroidEstimator,
    at_least,
    to_numpy,
)
from jkmeans.estimators.inputs import (
    at_most_int32,
    keeps_model,
    random_key,
    read_centroids,
    read_rows,
    read_weights,
)
from jkmeans.estimators.kmeans import CORE_NAMES, check_outcome
from jkmeans.kmeans import KMeansResult, centroids_from, cluster_statistics
from jkmeans.kmeans.assignment import accumulation_dtype
from jkmeans.kmeans.hierarchical import BISECTING_STRATEGIES, Split, bisect, descend

_SMALLEST = 256


class BisectingKMeans(CentroidEstimator):
    """Bisecting k-means: one cluster is split in two by k-means until there are k.

    Parameters, attributes and rules are those of ``sklearn.cluster.BisectingKMeans``; ``predict``
    goes down the tree of splits, as it does there. A split sees the rows of its cluster only,
    padded to one of a few sizes, so that few programs are compiled.

    Args:
      n_clusters: k.
      init: of each split: "k-means++", "k-means||", "random", or a callable
        ``(X, 2, random_state) -> [2, d]``.
      n_init: restarts of each split.
      random_state: a seed, a RandomState, or None for NumPy's global one.
      max_iter: iterations of a restart at most.
      verbose: whether to print what was reached.
      tol: a restart ends when the squared shift of its centroids is at most this; absolute, as in
        scikit-learn.
      copy_x: accepted for compatibility; X is never modified.
      algorithm: "lloyd" or "elkan"; both are exact, and computed in the same way here.
      bisecting_strategy: split the cluster of "biggest_inertia", or the "largest_cluster".
      mesh: the devices to spread rows over, see ``KMeans``.

    Attributes:
      cluster_centers_: [k, d] float32 or float64, leaves from left to right.
      labels_: [n] int32.
      inertia_: the weighted sum of squared distances.
      n_features_in_: d.
      feature_names_in_: [d], if X is a data frame with names.

    Source: Steinbach, Karypis and Kumar, KDD workshop on text mining 2000.
    """

    _parameter_constraints: ClassVar[dict] = {
        **COMMON_CONSTRAINTS,
        "init": [StrOptions({"k-means++", "k-means||", "random"}), callable],
        "n_init": [at_least(Integral, 1)],
        "copy_x": ["boolean"],
        "algorithm": [StrOptions({"lloyd", "elkan"})],
        "bisecting_strategy": [StrOptions(set(BISECTING_STRATEGIES))],
    }

    def __init__(
        self,
        n_clusters=8,
        *,
        init: Any = "random",
        n_init=1,
        random_state=None,
        max_iter=300,
        verbose=0,
        tol=1e-4,
        copy_x=True,
        algorithm="lloyd",
        bisecting_strategy="biggest_inertia",
        mesh=None,
    ):
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.random_state = random_state
        self.max_iter = max_iter
        self.verbose = verbose
        self.tol = tol
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.bisecting_strategy = bisecting_strategy
        self.mesh = mesh

    @keeps_model
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> BisectingKMeans:
        """Computes bisecting k-means.

        Args:
          X: [n, d], see ``KMeans``.
          y: ignored.
          sample_weight: [n], at least 0; None for ones.

        Returns:
          The estimator.

        Raises:
          ValueError: a parameter, X or the weights cannot be used.
        """
        self._validate_params()
        X = read_rows(self, X, reset=True)
        weights = read_weights(sample_weight, X)
        n_rows = X.shape[0]
        sharded.refuse_few_rows(n_rows, self.n_clusters)
        random_state = check_random_state(self.random_state)
        key = random_key(random_state)
        mesh = sharded.mesh_of(X) if self.mesh is None else self.mesh

        def split(rows: np.ndarray, number: int) -> Split:
            part = X[rows]
            part_weights = np.ones(len(rows)) if weights is None else weights[rows]
            return self._split(
                part, part_weights, mesh, jax.random.fold_in(key, number), random_state
            )

        with sharded.precision(X):
            rows = sharded.place(X, weights, mesh=self.mesh)
            center = to_numpy(sharded.run(_mean, rows, out_specs=sharding.REPLICATED))
            self._tree, self.labels_, self.inertia_ = bisect(
                split, n_rows, self.n_clusters, center[0], strategy=self.bisecting_strategy
            )
            leaves = np.flatnonzero(self._tree.labels >= 0)
            leaves = leaves[np.argsort(self._tree.labels[leaves])]
            self.cluster_centers_ = self._tree.centroids[leaves]
            if self.n_clusters == 1:
                self.inertia_ = float(sharded.evaluate_rows(rows, center).inertia)
        check_outcome(self)
        if self.verbose:
            print(f"{self.n_clusters} clusters, inertia {self.inertia_}.")
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The leaf of each row, going down the tree to the nearer of two children.

        Args:
          X: [n, d].

        Returns:
          [n] int32.
        """
        check_is_fitted(self)
        X = read_rows(self, X, reset=False)
        with sharded.precision(X, self.cluster_centers_):
            rows = sharded.place(X, mesh=self.mesh)
            labels = sharded.run(_descend, rows, self._tree, out_specs=sharding.SHARDED)
            return to_numpy(sharded.unpadded(labels, rows.n_rows))

    def _split(
        self,
        part: np.ndarray | jax.Array,
        weights: np.ndarray,
        mesh: Mesh | None,
        key: jax.Array,
        random_state: np.random.RandomState,
    ) -> Split:
        """The best of ``n_init`` 2-means of the rows of one cluster."""
        rows = sharded.place(part, weights, mesh=mesh, at_least=padded_size(len(weights)))

        def run(init: Any, n_init: int) -> KMeansResult:
            return sharded.fit_rows(
                key,
                rows,
                2,
                init=init,
                n_init=n_init,
                max_iter=at_most_int32(self.max_iter),
                tol=float(self.tol),
            )

        if isinstance(self.init, str):
            result = run(CORE_NAMES[self.init], self.n_init)
        else:
            result = None
            for _ in range(self.n_init):
                centers = self.init(np.asarray(part), 2, random_state=random_state)
                found = run(read_centroids(centers, 2, part), 1)
                if result is None or float(found.inertia) < float(result.inertia) * (1 - 1e-6):
                    result = found
            assert result is not None
        labels, distances = to_numpy(result.labels), to_numpy(result.distances)
        return Split(
            labels, to_numpy(result.centroids), np.bincount(labels, weights * distances, 2)
        )


def padded_size(n_rows: int) -> int:
    """The rows that a subset is padded to: the next of 256, 512, 1024 and so on."""
    return max(_SMALLEST, 1 << (n_rows - 1).bit_length())


def _mean(x, weights, *, axis_name):
    labels = jnp.zeros_like(x[:, 0], jnp.int32)
    mean = jnp.zeros((1, x.shape[1]), accumulation_dtype(x))
    # Again around what was found, which has more digits where rows are far from the origin.
    for _ in range(2):
        found = cluster_statistics(
            x, labels, 1, weights=weights, shift=mean[0], axis_name=axis_name
        )
        mean = centroids_from(found, mean, mean[0])
    return mean


def _descend(x, weights, tree, *, axis_name):
    del weights, axis_name
    return descend(x, tree)
