"""MiniBatchKMeans in scikit-learn's interface."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.utils import check_random_state

from jkmeans import sharded
from jkmeans.errors import refuse_overflow
from jkmeans.estimators.base import COMMON_CONSTRAINTS, CentroidEstimator, at_least, to_numpy
from jkmeans.estimators.inputs import (
    at_most_int32,
    keeps_model,
    random_key,
    read_centroids,
    read_rows,
    read_weights,
)
from jkmeans.estimators.kmeans import CORE_NAMES, resolve_n_init, warn_of_underflow
from jkmeans.kmeans.minibatch import (
    MiniBatchResult,
    MiniBatchState,
    initial_state,
    minibatch,
    minibatch_step,
)

_STATE_SPECS = sharded.result_specs(MiniBatchState, ())
_RESULT_SPECS = sharded.result_specs(MiniBatchResult, ())._replace(state=_STATE_SPECS)


class MiniBatchKMeans(CentroidEstimator):
    """Mini-batch k-means: random batches, a learning rate for each centroid.

    All steps of a fit are one compiled program, and so is a call of ``partial_fit``. Parameters,
    attributes and rules are those of ``sklearn.cluster.MiniBatchKMeans``.

    Batches are summed as they are, while ``KMeans`` takes a far origin away first: give columns
    whose mean is more than some 10⁴ standard deviations from 0 less that mean, or as float64.

    Args:
      n_clusters: k.
      init: "k-means++", "k-means||", "random", the first centroids [k, d], or a callable
        ``(X, n_clusters, random_state) -> [k, d]``; names and callables see ``init_size`` rows.
      max_iter: passes over the data at most, counted in rows.
      batch_size: rows of a batch.
      verbose: whether to print what was reached.
      compute_labels: whether labels and inertia of all rows are computed after the last step.
      random_state: a seed, a RandomState, or None for NumPy's global one.
      tol: above 0, the fit ends with a step whose squared shift of the centroids is at most ``tol``
        times the mean variance of the columns.
      max_no_improvement: the fit ends after as many steps in a row without a new lowest average
        inertia; None for never.
      init_size: rows of a sample for an initialisation; by default three batches, but 3 k at least.
      n_init: samples tried; "auto" is 3 for "random" and a callable, 1 otherwise.
      reassignment_ratio: centroids with less than this share of the largest count are moved to
        random rows.
      mesh: the devices to spread rows over, see ``KMeans``.

    Attributes:
      cluster_centers_: [k, d] float32 or float64.
      labels_: [n] int32, if ``compute_labels``.
      inertia_: the weighted sum of squared distances; without ``compute_labels`` an estimate from
        the last batches.
      n_iter_: passes over the data.
      n_steps_: batches.
      n_features_in_: d.
      feature_names_in_: [d], if X is a data frame with names.

    Source: Sculley, Web-scale k-means clustering, WWW 2010.
    """

    _parameter_constraints: ClassVar[dict] = {
        **COMMON_CONSTRAINTS,
        "batch_size": [at_least(Integral, 1)],
        "compute_labels": ["boolean"],
        "max_no_improvement": [at_least(Integral, 0), None],
        "init_size": [at_least(Integral, 1), None],
        "reassignment_ratio": [at_least(Real, 0)],
    }

    def __init__(
        self,
        n_clusters=8,
        *,
        init: Any = "k-means++",
        max_iter=100,
        batch_size=1024,
        verbose=0,
        compute_labels=True,
        random_state=None,
        tol=0.0,
        max_no_improvement=10,
        init_size=None,
        n_init: Any = "auto",
        reassignment_ratio=0.01,
        mesh=None,
    ):
        self.n_clusters = n_clusters
        self.init = init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.verbose = verbose
        self.compute_labels = compute_labels
        self.random_state = random_state
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.init_size = init_size
        self.n_init = n_init
        self.reassignment_ratio = reassignment_ratio
        self.mesh = mesh

    @keeps_model
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> MiniBatchKMeans:
        """Computes mini-batch k-means from the beginning.

        Args:
          X: [n, d], see ``KMeans``.
          y: ignored.
          sample_weight: [n], at least 0; None for ones. Rows are drawn by weight.

        Returns:
          The estimator.

        Raises:
          ValueError: a parameter, X or the weights cannot be used.
        """
        self._validate_params()
        X, weights = self._read(X, sample_weight, reset=True)
        n_rows = X.shape[0]
        batch_size = min(self.batch_size, n_rows)
        with sharded.precision(X):
            rows = sharded.place(X, weights, mesh=self.mesh)
            result = sharded.run(
                _fit,
                # Rows are drawn by number, so weights that only mark padding are not needed.
                rows._replace(weights=None) if weights is None else rows,
                random_key(self.random_state),
                None if isinstance(self.init, str) else self._first_centroids(X),
                at_most_int32(self.max_iter * n_rows // batch_size),
                float(self.tol),
                self.max_no_improvement,
                float(self.reassignment_ratio),
                n_rows,
                out_specs=_RESULT_SPECS,
                n_clusters=self.n_clusters,
                init=CORE_NAMES[self.init] if isinstance(self.init, str) else None,
                n_init=resolve_n_init(self, default=3) if isinstance(self.init, str) else 1,
                init_size=self._init_size(n_rows),
                batch_size=batch_size,
            )
            self._keep(result.state)
            self.n_steps_ = int(result.n_steps)
            self.n_iter_ = math.ceil(self.n_steps_ * batch_size / n_rows)
            if self.compute_labels:
                self._label(rows)
            else:
                if self.n_steps_ > 1:
                    total = n_rows if weights is None else float(weights.sum(dtype=np.float64))
                    inertia = float(result.ewa_inertia) * total
                else:  # Of one step there is no average.
                    inertia = float(sharded.evaluate_rows(rows, self.cluster_centers_).inertia)
                refuse_overflow(inertia, self.cluster_centers_.dtype, ValueError)
                self.inertia_ = inertia
        warn_of_underflow(self)
        if self.verbose:
            print(f"{self.n_steps_} steps, inertia {self.inertia_}.")
        return self

    @keeps_model
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> MiniBatchKMeans:
        """One step on X as a batch; the first call initialises.

        Args:
          X: [b, d]; the first batch has at least k rows.
          y: ignored.
          sample_weight: [b], at least 0; None for ones.

        Returns:
          The estimator.

        Raises:
          ValueError: a parameter, X or the weights cannot be used.
        """
        self._validate_params()
        first = not hasattr(self, "cluster_centers_")
        X, weights = self._read(X, sample_weight, reset=first)
        with sharded.precision(X, getattr(self, "cluster_centers_", None)):
            if first:
                self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
                self._keep(initial_state(jnp.asarray(self._first_batch_centroids(X, weights))))
                self.n_steps_ = 0
            elif not hasattr(self, "_seed"):
                self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            rows = sharded.place(X, weights, mesh=self.mesh)
            state = sharded.run(
                _step,
                rows,
                jax.random.key(self._seed),
                self.n_steps_,
                MiniBatchState(
                    jnp.asarray(self.cluster_centers_),
                    jnp.asarray(self._counts),
                    jnp.asarray(self._n_since_last_reassign, jnp.int32),
                ),
                float(self.reassignment_ratio),
                rows.n_rows,
                out_specs=_STATE_SPECS,
            )
            self._keep(state)
            self.n_steps_ += 1
            if self.compute_labels:
                self._label(rows)
        return self

    def _read(self, X: Any, sample_weight: Any, *, reset: bool) -> tuple[Any, np.ndarray | None]:
        X = read_rows(self, X, reset=reset)
        if reset:
            sharded.refuse_few_rows(X.shape[0], self.n_clusters)
        return X, read_weights(sample_weight, X)

    def _init_size(self, n_rows: int) -> int | None:
        """Rows of a sample; None for all of them."""
        size = self.init_size
        if size is None:
            size = 3 * min(self.batch_size, n_rows)
            size = 3 * self.n_clusters if size < self.n_clusters else size
        elif size < self.n_clusters:
            warnings.warn(
                f"init_size={size} should be larger than n_clusters={self.n_clusters}. Setting it "
                "to min(3*n_clusters, n_samples)",
                RuntimeWarning,
                stacklevel=3,
            )
            size = 3 * self.n_clusters
        return None if size >= n_rows else size

    def _first_centroids(self, X: np.ndarray | jax.Array) -> np.ndarray:
        """The array ``init``, or the best of the callable's, on samples as for a name."""
        n_init = resolve_n_init(self, default=3)
        if not callable(self.init):
            return read_centroids(self.init, self.n_clusters, X)
        random_state, size = check_random_state(self.random_state), self._init_size(X.shape[0])

        def sample() -> np.ndarray:
            if size is None:
                return np.asarray(X)
            return np.asarray(X[random_state.randint(0, X.shape[0], size)])

        judges, found = sample(), []
        for _ in range(n_init):
            centers = self.init(sample(), self.n_clusters, random_state=random_state)
            centers = read_centroids(centers, self.n_clusters, X)
            found.append((float(sharded.inertia(judges, centers)), centers))
        return min(found, key=lambda pair: pair[0])[1]

    def _first_batch_centroids(self, X: Any, weights: np.ndarray | None) -> jax.Array | np.ndarray:
        if not isinstance(self.init, str):
            return self._first_centroids(X)
        rows = sharded.place(X, weights, mesh=self.mesh)
        no_steps = sharded.run(
            _fit,
            rows,
            jax.random.key(self._seed),
            None,
            0,
            0.0,
            None,
            0.0,
            rows.n_rows,
            out_specs=_RESULT_SPECS,
            n_clusters=self.n_clusters,
            init=CORE_NAMES[self.init],
            n_init=1,
            init_size=self._init_size(rows.n_rows),
            batch_size=1,
        )
        return no_steps.state.centroids

    def _keep(self, state: MiniBatchState) -> None:
        self.cluster_centers_ = to_numpy(state.centroids)
        self._counts = to_numpy(state.counts)
        self._n_since_last_reassign = int(state.since_reassignment)

    def _label(self, rows: sharded.Rows) -> None:
        result = sharded.evaluate_rows(rows, self.cluster_centers_)
        refuse_overflow(float(result.inertia), self.cluster_centers_.dtype, ValueError)
        self.labels_ = to_numpy(result.labels)
        self.inertia_ = float(result.inertia)


def _fit(
    x,
    weights,
    key,
    centroids,
    n_steps,
    tol,
    max_no_improvement,
    reassignment_ratio,
    n_rows,
    *,
    init,
    axis_name,
    **options,
):
    return minibatch(
        key,
        x,
        init=centroids if init is None else init,
        n_steps=n_steps,
        tol=sharded.scaled_tol(tol, x, n_rows, axis_name),
        max_no_improvement=max_no_improvement,
        reassignment_ratio=reassignment_ratio,
        weights=weights,
        n_rows=n_rows,
        axis_name=axis_name,
        **options,
    )


def _step(x, weights, key, number, state, reassignment_ratio, n_rows, *, axis_name):
    state, _ = minibatch_step(
        jax.random.fold_in(key, number),
        state,
        x,
        weights=weights,
        n_rows=n_rows,
        reassignment_ratio=reassignment_ratio,
        axis_name=axis_name,
    )
    return state
