"""KMeans in scikit-learn's interface."""

from __future__ import annotations

import warnings
from numbers import Real
from typing import Any, ClassVar

import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions

from jkmeans import sharded
from jkmeans.errors import refuse_overflow, underflow_sentence
from jkmeans.estimators.base import COMMON_CONSTRAINTS, CentroidEstimator, to_numpy
from jkmeans.estimators.files import is_source, opened
from jkmeans.estimators.inputs import (
    at_most_int32,
    keeps_model,
    random_key,
    read_centroids,
    read_rows,
    read_weights,
)
from jkmeans.kmeans import PRECISIONS, KMeansResult

CORE_NAMES = {"k-means++": "k-means++", "k-means||": "k-means||", "random": "sample"}


class KMeans(CentroidEstimator):
    """k-means: Lloyd's algorithm, exact, on any number of devices.

    Minimises Σ_i w_i ‖x_i − c_{labels_i}‖². The whole fit, restarts included, is one compiled
    program; a second fit of the same shape compiles nothing. From the same initial centroids the
    labels, centroids, inertia and number of iterations are those of
    ``sklearn.cluster.KMeans``, to rounding: float32 has seven digits, of which a column far from 0
    spends some on its distance from there, as it does in the data themselves.

    Rows may be NumPy or JAX arrays (sharded ones stay where they are), anything with ``__array__``
    or ``__dlpack__``, or a data frame. float64 is computed in float64; float32, bfloat16, float16
    and integers of one or two bytes are kept as they are and computed in float32; what else comes
    becomes float64. Results are NumPy.

    Data larger than memory: X may also be the path of a .npy, Zarr or Parquet file or folder, or a
    ``jkmeans.sources.Source``, in every method; it is read in chunks (``jkmeans.streaming``), and
    only what is returned has to fit into memory.

    Args:
      n_clusters: k.
      init: "k-means++" (greedy), "k-means||" (for large k), "random" (different rows), the first
        centroids [k, d], or a callable ``(X, n_clusters, random_state) -> [k, d]``.
      n_init: restarts; "auto" is 10 for "random" and a callable, 1 otherwise.
      max_iter: iterations of a restart at most.
      tol: a restart ends when the squared shift of the centroids is at most ``tol`` times the mean
        variance of the columns, or when no label changes.
      verbose: whether to print what was reached.
      random_state: a seed, a RandomState, or None for NumPy's global one.
      copy_x: accepted for compatibility; X is never modified.
      algorithm: "lloyd" or "elkan"; both are exact, and computed in the same way here.
      mesh: the devices to spread rows over, from ``jkmeans.sharding.make_mesh``; None for the
        devices that X lies on, or else the default one. Not part of a pickle.
      oversampling_factor: candidates of a round of "k-means||", divided by k.
      deterministic: whether results are to have the same bits on any number of devices.
      precision: how rows are compared with centroids. "full": in float32 (float64 for such X).
        "exact": by products in bfloat16 with a proven bound on their rounding; rows that it does
        not decide, some in a hundred, are computed anew, and labels are those of "full"
        (see docs/exactness.md). "exact-tf32": the same with TensorFloat-32. "fast", "fast-tf32":
        the labels of these products as they are. Centroids and inertia are always in full
        precision, and so are the labels of files. Made for GPUs, and not measured there yet: on a
        CPU "full" is the fastest. "exact-kernel", "fast-kernel": "exact" and "fast" by a kernel for
        Hopper that has run on no GPU yet; without it where it does not apply.

    Attributes:
      cluster_centers_: [k, d] float32 or float64.
      labels_: [n] int32, the nearest centroid of each row.
      inertia_: the weighted sum of squared distances.
      n_iter_: iterations of the best restart.
      n_features_in_: d.
      feature_names_in_: [d], if X is a data frame with names.
      recomputed_: with precision "exact…", the share of rows that were computed
        anew, over all iterations of the best restart; else None.
    """

    _streams: ClassVar[bool] = True
    _parameter_constraints: ClassVar[dict] = {
        **COMMON_CONSTRAINTS,
        "copy_x": ["boolean"],
        "algorithm": [StrOptions({"lloyd", "elkan"})],
        "oversampling_factor": [Interval(Real, 0, None, closed="neither")],
        "deterministic": ["boolean"],
        "precision": [StrOptions(set(PRECISIONS))],
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
        oversampling_factor=2.0,
        deterministic=False,
        precision="full",
    ):
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.mesh = mesh
        self.oversampling_factor = oversampling_factor
        self.deterministic = deterministic
        self.precision = precision

    @keeps_model
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Computes k-means.

        Args:
          X: [n, d], see the class.
          y: ignored.
          sample_weight: [n], at least 0; None for ones. Rows of weight 0 get a label.

        Returns:
          The estimator.

        Raises:
          ValueError: a parameter, X or the weights cannot be used.

        Warns:
          ConvergenceWarning: fewer clusters than asked for have rows.
        """
        self._validate_params()
        if self._streams and is_source(X):
            return self._fit_source(X, sample_weight)
        X = read_rows(self, X, reset=True)
        weights = read_weights(sample_weight, X)
        sharded.refuse_few_rows(X.shape[0], self.n_clusters)
        with sharded.precision(X):
            rows = sharded.place(X, weights, mesh=self.mesh, multiple_of=self._multiple_of)
            result = self._best_of_restarts(X, rows)
            self.cluster_centers_ = to_numpy(result.centroids)
            self.labels_ = to_numpy(result.labels)
            self.inertia_ = float(result.inertia)
            self.n_iter_ = int(result.n_iter)
            share = result.recomputed
            self.recomputed_ = None if share is None else float(share)
        check_outcome(self)
        if self.verbose:
            anew = "" if share is None else f", {share:.2%} of rows computed anew"
            print(f"{self.n_iter_} iterations, inertia {self.inertia_}{anew}.")
        return self

    def _fit_source(self, X: Any, sample_weight: Any) -> KMeans:
        if self.precision != "full":
            raise ValueError(f"precision={self.precision!r}: expected 'full' where X is a file")
        if self.deterministic or not (isinstance(self.init, str) or hasattr(self.init, "shape")):
            raise ValueError(
                "init must be a name or an array, and deterministic False, where X is a file"
            )
        by_name = isinstance(self.init, str)
        with opened(X) as (streaming, source):
            result = streaming.fit_stream(
                random_key(self.random_state),
                source,
                self.n_clusters,
                init=CORE_NAMES[self.init] if by_name else self.init,
                n_init=resolve_n_init(self, default=10),
                max_iter=at_most_int32(self.max_iter),
                tol=float(self.tol),
                weights=sample_weight,
                oversampling_factor=float(self.oversampling_factor),
                mesh=self._stream_mesh,
                progress=bool(self.verbose),
            )
            self.n_features_in_ = source.n_features
            # Of an earlier fit to a data frame.
            vars(self).pop("feature_names_in_", None)
            self.cluster_centers_ = np.array(result.centroids)
            self.inertia_, self.n_iter_ = float(result.inertia), int(result.n_iter)
            self.labels_ = self._predict_source(source)
            self.recomputed_ = None
        check_outcome(self)
        return self

    def _best_of_restarts(self, X: np.ndarray | jax.Array, rows: sharded.Rows) -> KMeansResult:
        def run(init: Any, key: jax.Array, n_init: int = 1) -> KMeansResult:
            return self._run(rows, init, key, n_init, at_most_int32(self.max_iter))

        n_init = resolve_n_init(self, default=10)
        if isinstance(self.init, str):
            return run(CORE_NAMES[self.init], random_key(self.random_state), n_init)
        if not callable(self.init):
            return run(read_centroids(self.init, self.n_clusters, X), jax.random.key(0))
        random_state, best = check_random_state(self.random_state), None
        for _ in range(n_init):
            centers = self.init(np.asarray(X), self.n_clusters, random_state=random_state)
            centers = read_centroids(centers, self.n_clusters, X)
            result = run(centers, jax.random.key(0))
            if best is None or result.inertia < best.inertia:
                best = result
        assert best is not None
        return best

    @property
    def _multiple_of(self) -> int:
        return sharded.BLOCKS if getattr(self, "deterministic", False) else 1

    def _run(
        self, rows: sharded.Rows, init: Any, key: jax.Array, n_init: int, max_iter: int
    ) -> KMeansResult:
        """The restarts from a named initialisation, or the one from an array."""
        # Keywords of the core that are only given where they are not its default.
        options: dict[str, Any] = {"deterministic": True} if self.deterministic else {}
        options |= self._precision
        if isinstance(init, str) and init == "k-means||":
            options["oversampling_factor"] = float(self.oversampling_factor)
        return sharded.fit_rows(
            key,
            rows,
            self.n_clusters,
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=float(self.tol),
            relative_tol=True,
            **options,
        )


def check_outcome(estimator: Any) -> None:
    """Warns, for the caller of ``fit``, of clusters without rows and of squares that vanish.

    Raises:
      ValueError: squares of the rows overflow.
    """
    refuse_overflow(estimator.inertia_, estimator.cluster_centers_.dtype, ValueError)
    if warn_of_underflow(estimator, stacklevel=4):
        return
    n_wanted = len(estimator.cluster_centers_)
    labels = estimator.labels_
    # The first rows nearly always have them all.
    for some in (labels[: 64 * n_wanted], labels):
        n_found = np.count_nonzero(np.bincount(some, minlength=n_wanted))
        if n_found == n_wanted:
            return
    warnings.warn(
        f"Number of distinct clusters ({n_found}) found smaller than n_clusters ({n_wanted}). "
        "Possibly due to duplicate points in X.",
        ConvergenceWarning,
        stacklevel=3,
    )


def warn_of_underflow(estimator: Any, stacklevel: int = 3) -> bool:
    """Warns of rows so small that their squares vanish; whether there was a reason."""
    sentence = underflow_sentence(estimator.cluster_centers_)
    if sentence:
        warnings.warn(sentence, ConvergenceWarning, stacklevel=stacklevel)
    return bool(sentence)


def resolve_n_init(estimator: Any, *, default: int) -> int:
    """The number of restarts that ``n_init`` stands for.

    Args:
      estimator: with the parameters ``init`` and ``n_init``.
      default: what "auto" is for "random" and a callable.
    """
    init, n_init = estimator.init, estimator.n_init
    drawn = isinstance(init, str) or callable(init)
    if n_init == "auto":
        return default if drawn and init not in ("k-means++", "k-means||") else 1
    if not drawn and n_init != 1:
        warnings.warn(
            "Explicit initial center position passed: performing only one init in "
            f"{type(estimator).__name__} instead of n_init={n_init}.",
            RuntimeWarning,
            stacklevel=4,
        )
        return 1
    return n_init
