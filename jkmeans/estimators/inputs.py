"""What comes into an estimator: arrays of any kind, weights, initial centroids; checked once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import validate_data

from jkmeans.errors import refuse_mask, weight_bounds
from jkmeans.estimators.files import is_source
from jkmeans.sharding import automatic

F = TypeVar("F", bound=Callable[..., Any])

# Kept as they are on the devices; whatever else comes becomes float64, as in scikit-learn.
KEPT_DTYPES = (
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int8,
    np.uint8,
    np.int16,
    np.uint16,
)
_CHECKED_BYTES = 4 * 2**20


def read_rows(estimator: Any, X: Any, *, reset: bool) -> np.ndarray | jax.Array:
    """The rows that an estimator was given, without a copy where none is needed.

    Args:
      estimator: whose ``n_features_in_`` and ``feature_names_in_`` are set or compared.
      X: [n, d]; a JAX array stays on its devices, also a sharded one; anything else that has
        ``__dlpack__`` or ``__array__``, a data frame or a list becomes NumPy.
      reset: whether this is a fit, which sets the features.

    Returns:
      [n, d] NumPy (C order) or JAX array of a dtype in KEPT_DTYPES.

    Raises:
      ValueError: X is not a matrix of finite real numbers, or has other features than in fit.
      TypeError: X is sparse, or the path of a file.
    """
    if is_source(X):
        raise TypeError(
            f"X is a file or a folder ({X}), which {type(estimator).__name__} does not read here; "
            "accepted: an array; KMeans fits files."
        )
    refuse_mask("X", X, ValueError)
    X = _exchanged(X)
    if isinstance(X, jax.Array):
        X = automatic(X)
        matrix: Any = X
        if X.ndim != 2:
            raise ValueError(f"Expected 2D array, got an array of shape {X.shape} instead.")
        if 0 in X.shape:
            raise ValueError(
                f"Found array with {X.shape[0]} sample(s) and {X.shape[1]} feature(s) "
                f"(shape={X.shape}) while a minimum of 1 is required."
            )
        if jnp.issubdtype(X.dtype, jnp.complexfloating):
            raise ValueError("Complex data not supported")
        validate_data(estimator, matrix, reset=reset, skip_check_array=True)
        if X.dtype not in KEPT_DTYPES:
            with jax.enable_x64(True):
                X = X.astype(jnp.float64)
    else:
        X = validate_data(
            estimator,
            X,
            reset=reset,
            dtype=_kept_dtype(X) or list(KEPT_DTYPES),
            order="C",
            ensure_all_finite=False,
        )
    _check_finite(X)
    return X


def read_weights(sample_weight: Any, X: np.ndarray | jax.Array) -> np.ndarray | None:
    """The weight of each row: [n] float32 (float64 for float64 rows); None where all are 1.

    Raises:
      ValueError: weights of another shape than [n], not finite, negative, or all zero.
    """
    if sample_weight is None:
        return None
    refuse_mask("sample_weight", sample_weight, ValueError)
    dtype: Any = np.float64 if X.dtype == np.float64 else np.float32
    if isinstance(sample_weight, Real):
        sample_weight = np.full(X.shape[0], sample_weight)
    weights = check_array(
        sample_weight, dtype=dtype, ensure_2d=False, input_name="sample_weight", order="C"
    )
    if weights.ndim != 1:
        raise ValueError("Sample weights must be 1D array or scalar")
    if len(weights) != X.shape[0]:
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(X.shape[0],)}!")
    if np.any(weights < 0):
        row = int(np.argmax(weights < 0))
        raise ValueError(
            "Negative values in data passed to `sample_weight`: "
            f"{int((weights < 0).sum())} of {len(weights)}, the first is {weights[row]:g} in row "
            f"{row}; accepted: weights of at least 0."
        )
    if not np.any(weights):
        raise ValueError("sample_weight is zero for all samples; accepted: at least one above 0.")
    least, most = weight_bounds(dtype)
    largest, total = float(weights.max()), float(weights.sum(dtype=np.float64))
    if largest < least or total > most:
        raise ValueError(
            f"sample_weight is up to {largest:g} and adds up to {total:g}; accepted in "
            f"{dtype.__name__}: a largest weight of at least {least:.1g} and a sum of at most "
            f"{most:.1g} (only ratios of weights matter, so they can be scaled)."
        )
    return None if np.all(weights == 1) else weights


def read_centroids(centers: Any, n_clusters: int, X: np.ndarray | jax.Array) -> np.ndarray:
    """Initial centroids: [k, d] float32, or float64 for float64 rows.

    Raises:
      ValueError: another shape, or not finite.
    """
    dtype: Any = np.float64 if X.dtype == np.float64 else np.float32
    centers = check_array(centers, dtype=dtype, copy=True, order="C", input_name="init")
    if centers.shape[0] != n_clusters:
        raise ValueError(
            f"The shape of the initial centers {centers.shape} does not "
            f"match the number of clusters {n_clusters}."
        )
    if centers.shape[1] != X.shape[1]:
        raise ValueError(
            f"The shape of the initial centers {centers.shape} does not "
            f"match the number of features of the data {X.shape[1]}."
        )
    return centers


def random_key(random_state: Any) -> jax.Array:
    """A JAX key drawn from a seed, a RandomState (which moves on) or NumPy's global one (None)."""
    return jax.random.key(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def keeps_model(fit: F) -> F:
    """A fit that leaves an estimator as it was where it fails.

    The model of the fit before then goes on as if there had been no other.
    """

    @functools.wraps(fit)
    def fit_or_restore(estimator: Any, *arguments: Any, **options: Any) -> Any:
        before = vars(estimator).copy()
        try:
            return fit(estimator, *arguments, **options)
        except BaseException:
            vars(estimator).clear()
            vars(estimator).update(before)
            raise

    return fit_or_restore  # type: ignore[return-value]


def at_most_int32(n: int) -> int:
    """A number of iterations as compiled programs count them."""
    return min(int(n), 2**31 - 1)


def _exchanged(X: Any) -> Any:
    """X, or the array behind its DLPack interface: without a copy, on the device it is on."""
    if isinstance(X, np.ndarray | jax.Array):
        return X
    if not hasattr(X, "__dlpack__"):
        # Its dtype is known only then; data frames and the like have one, or several.
        bare = hasattr(X, "__array__") and not (hasattr(X, "dtype") or hasattr(X, "dtypes"))
        return np.asarray(X) if bare else X
    try:
        return np.from_dlpack(X)
    except (BufferError, RuntimeError, TypeError, ValueError):
        # Not on the CPU, or of a type that NumPy does not have, such as bfloat16.
        return jax.dlpack.from_dlpack(X)


def _kept_dtype(X: Any) -> Any:
    """The dtype in KEPT_DTYPES that an array or all columns of a data frame have; None if none.

    scikit-learn knows it of native NumPy types only, not of other byte orders and not of the types
    that pandas ("Float32") and polars have beside NumPy's. Integers of the latter may be missing,
    which only a float can say.
    """
    dtypes = getattr(X, "dtypes", None)
    columns = [getattr(X, "dtype", None)] if dtypes is None else dtypes
    names = {
        dtype.newbyteorder("=").name if isinstance(dtype, np.dtype) else str(dtype)
        for dtype in (columns if np.iterable(columns) else [columns])
    }
    for kept in KEPT_DTYPES:
        if kept is ml_dtypes.bfloat16:
            continue  # scikit-learn takes it in a list of dtypes only, and always knows it.
        name = np.dtype(kept).name
        accepted = {name, name.capitalize()} if name.startswith("float") else {name}
        if len(names) == 1 and names <= accepted:
            return kept
    return None


def _check_finite(X: np.ndarray | jax.Array) -> None:
    if not jnp.issubdtype(X.dtype, jnp.floating):
        return
    if isinstance(X, jax.Array):
        n_bad, first = (int(value) for value in _count_not_finite(X))
    elif _has_finite_norm(X):
        return
    else:
        n_bad, first = 0, -1
        rows = max(1, _CHECKED_BYTES // max(1, X.itemsize * X.shape[1]))
        for start in range(0, len(X), rows):
            finite = np.isfinite(X[start : start + rows])
            if not finite.all():
                bad = ~finite.all(axis=1)
                first = start + int(bad.argmax()) if first < 0 else first
                n_bad += int(bad.sum())
    if n_bad:
        raise ValueError(
            f"Input X contains NaN or infinity (inf) in {n_bad} of {X.shape[0]} rows, the first is "
            f"row {first} (counted from 0); accepted: finite values."
        )


def _has_finite_norm(X: np.ndarray) -> bool:
    """Whether Σ x² is finite, as it is for finite values that are not huge: one fast pass."""
    if X.dtype not in (np.float32, np.float64) or not X.flags.c_contiguous:
        return False
    flat = X.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)))


@jax.jit
def _count_not_finite(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    bad = ~jnp.all(jnp.isfinite(X), axis=1)
    return jnp.sum(bad), jnp.argmax(bad)
