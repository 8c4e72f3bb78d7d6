"""Named data sets, the user's own arrays and files, and the checks on what comes in.

Everything here runs on the host with NumPy; nothing is moved to a device. Where the files of the
named sets come from: `jkmeans.named_data`.
"""

import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jkmeans import named_data
from jkmeans.errors import UserError

NAMED = ("digits", "mnist", "fashion-mnist")
"""Data sets that are found or downloaded."""
NAMES = (*NAMED, "npy")
SPLITS = ("all", "train", "test")
DTYPES = (
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "bool",
)

# Large enough to read a disk at its speed, small enough that the temporaries stay in a cache.
_CHUNK_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples to cluster, with their ground truth if there is one.

    Attributes:
      name: what the data set is called in reports.
      examples: [n, *example_shape], in the dtype they came in, C order, native byte order. An
        array from a .npy file stays a memory map.
      scale: the network sees `examples.astype(float32) * scale`.
      labels: [n] int32 ground truth, for metrics only; None where there is none.
    """

    name: str
    examples: np.ndarray
    scale: float
    labels: np.ndarray | None

    @property
    def n_examples(self) -> int:
        """The number of examples n."""
        return self.examples.shape[0]

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example, without the leading n."""
        return self.examples.shape[1:]

    def value_range(self, part: tuple[int, int] = (0, 1)) -> tuple[float, float]:
        """The least and the largest value that the network sees; (0, 0) of no examples.

        Args:
          part: (i, m) reads the i-th of m parts of the examples, chunk by chunk. Of a type whose
            values can only be from 0 to 1 once they are scaled, nothing is read.
        """
        dtype = self.examples.dtype
        if dtype.kind in "bu":
            most = self.scale * (1 if dtype.kind == "b" else np.iinfo(dtype).max)
            if most <= 1:
                return 0.0, most
        chunks = (chunk for _, chunk in _chunks(self.examples, part))
        ends = [(float(chunk.min()), float(chunk.max())) for chunk in chunks] or [(0.0, 0.0)]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        return low * self.scale, high * self.scale


def load(
    name: str,
    *,
    split: str = "all",
    path: str = "",
    labels_path: str = "",
    n_examples: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Dataset:
    """Load a data set by its name.

    | name | examples | scale | source |
    | --- | --- | --- | --- |
    | digits | [1797, 8, 8] uint8 | 1/16 | ships inside scikit-learn |
    | mnist | [70000, 28, 28] uint8 | 1/255 | LeCun, Cortes, Burges |
    | fashion-mnist | [70000, 28, 28] uint8 | 1/255 | Xiao, Rasul, Vollgraf 2017 |
    | npy | the array in `path` | 1 | the user's file |

    Args:
      name: one of the above.
      split: "all", and for the two MNISTs also "train" (60,000) or "test" (10,000); their "all" is
        the 70,000 of train followed by test, as clustering papers use it.
      path: the .npy file, for "npy" only. It is memory-mapped, not read into memory, unless its
        array is in Fortran order or of foreign byte order: then a converted copy is made in memory.
        Two-byte records without a type are taken as bfloat16, which NumPy stores like that.
      labels_path: a .npy file with one integer per example, for "npy" only; "" for none.
      n_examples: how many to take from the start; 0 takes all.
      part: (i, n): of an .npy file only the values of the i-th of n parts are checked, and read,
        for n processes that each look at their own.

    Returns:
      The data set.

    Raises:
      UserError: an argument, a file or its content cannot be used, or a download failed.
    """
    if name not in NAMES:
        raise UserError(f"no data set is called {name!r}; accepted: {_listed(NAMES)}.")
    if split not in SPLITS:
        raise UserError(f"no split is called {split!r}; accepted: {_listed(SPLITS)}.")
    if split != "all" and name not in named_data.MD5:
        raise UserError(f"data set {name!r} has no split {split!r}; accepted: 'all'.")
    n_examples = _checked_count(n_examples)
    if name == "npy":
        if not path:
            raise UserError("data set 'npy' needs a path: the .npy file that holds the examples.")
        examples = _open_npy(path)
        labels = _open_npy(labels_path) if labels_path else None
        return _checked_dataset(
            examples,
            labels,
            name="npy",
            scale=1.0,
            n_examples=n_examples,
            examples_source=str(path),
            labels_source=str(labels_path),
            part=part,
        )
    for argument, value in (("path", path), ("labels_path", labels_path)):
        if value:
            raise UserError(
                f"{argument} {str(value)!r} cannot be used with data set {name!r}: "
                "it is accepted with 'npy' only."
            )
    if name == "digits":
        examples, labels, scale = *named_data.digits(), 1 / 16
    else:
        examples, labels, scale = *named_data.mnist(name, split), 1 / 255
    return _checked_dataset(examples, labels, name=name, scale=scale, n_examples=n_examples)


def from_arrays(
    examples: Any, labels: Any = None, *, name: str = "array", scale: float = 1.0
) -> Dataset:
    """Make a data set of arrays in memory, or memory maps, after checking them.

    Args:
      examples: [n, *example_shape], of a dtype in `DTYPES`, finite, also as float32 after scaling.
      labels: [n] integers that fit into int32, or None.
      name: what it is called in reports and errors.
      scale: finite and above zero; the network sees `examples.astype(float32) * scale`.

    Returns:
      The data set. The arrays are not copied unless they have to be converted to C order or native
      byte order.

    Raises:
      UserError: one of the above does not hold.
    """
    return _checked_dataset(examples, labels, name=name, scale=scale, n_examples=0)


def check_examples(
    array: Any,
    *,
    expected_shape: Sequence[int] | None = None,
    name: str = "input",
    part: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Check that an array can be clustered, or given to a trained run.

    Args:
      array: [n, *example_shape], of a dtype in `DTYPES`, finite, also as float32.
      expected_shape: the example shape it must have; None accepts any.
      name: what to call the array in errors.
      part: as for `load`.

    Returns:
      The array, [n, *example_shape], same dtype, C order, native byte order; copied only where it
      was not.

    Raises:
      UserError: one of the above does not hold.
    """
    array = _check_form(array, expected_shape, name)
    _check_values(array, 1.0, name, part)
    return array


def _checked_dataset(
    examples: Any,
    labels: Any,
    *,
    name: str,
    scale: float,
    n_examples: int,
    examples_source: str = "",
    labels_source: str = "",
    part: tuple[int, int] = (0, 1),
) -> Dataset:
    source = examples_source or name
    scale = _checked_scale(scale, source)
    examples = _check_form(examples, None, source)
    if n_examples > len(examples):
        raise UserError(
            f"n_examples is {n_examples:,}, but {source} has {len(examples):,} examples; "
            "accepted: up to that many, or 0 for all."
        )
    if labels is not None:
        labels = _checked_labels(labels, len(examples), labels_source or f"labels of {name}")
    if n_examples:
        examples = examples[:n_examples]
        labels = None if labels is None else labels[:n_examples]
    # After the cut: what is not used need not be finite, and is not read from the disk.
    _check_values(examples, scale, source, part)
    return Dataset(name=name, examples=examples, scale=scale, labels=labels)


def _checked_count(n_examples: int) -> int:
    try:
        count = operator.index(n_examples)
    except TypeError:
        count = -1
    if count < 0:
        raise UserError(
            f"n_examples is {n_examples!r}; accepted: a whole number from 1, or 0 for all."
        )
    return count


def _checked_scale(scale: float, source: str) -> float:
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    # As float32 as well, because that is what it is multiplied in.
    if not (0.0 < value <= float(np.finfo(np.float32).max) and float(np.float32(value)) > 0.0):
        raise UserError(
            f"the scale of {source} is {scale!r}; accepted: a finite float32 above zero."
        )
    return value


def _check_form(array: Any, expected_shape: Sequence[int] | None, name: str) -> np.ndarray:
    """Check type, dtype and shape; nothing of the data is read unless it has to be converted."""
    if isinstance(array, np.ma.MaskedArray):
        raise UserError(f"{name} is a masked array; accepted: an array without a mask.")
    if hasattr(array, "toarray") and not isinstance(array, np.ndarray):
        raise UserError(f"{name} is a sparse matrix; accepted: a dense array (x.toarray()).")
    # np.asarray would turn a memory map into a plain view of it.
    if type(array) is not np.memmap:
        try:
            array = np.asarray(array)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name} cannot be read as an array; accepted: one array of numbers, "
                "all of its examples of one shape."
            ) from error
    if array.dtype.name not in DTYPES:
        raise UserError(f"{name} is of dtype {array.dtype}; accepted: {', '.join(DTYPES)}.")
    accepted = "[n, ...] with at least two dimensions, one example per row"
    if expected_shape is not None:
        expected_shape = tuple(expected_shape)
        accepted = _shape(("n", *expected_shape))
    if array.ndim < 2 or (expected_shape is not None and array.shape[1:] != expected_shape):
        raise UserError(f"{name} is of shape {_shape(array.shape)}; accepted: {accepted}.")
    if array.size == 0:
        raise UserError(
            f"{name} is of shape {_shape(array.shape)}, which holds no data; "
            "accepted: at least one example of at least one number."
        )
    if array.flags.c_contiguous and array.dtype.isnative:
        return array
    try:
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    except MemoryError as error:
        raise UserError(
            f"{name} is too large to be converted in memory: an array of {array.nbytes:,} bytes "
            "is accepted in C order and native byte order only."
        ) from error


def _chunks(array: np.ndarray, part: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """Part i of m of the rows, where part is (i, m): chunks, with the number of their first row."""
    first, last = (len(array) * (part[0] + end) // part[1] for end in (0, 1))
    rows = max(1, _CHUNK_BYTES // (array.itemsize * math.prod(array.shape[1:])))
    for start in range(first, last, rows):
        yield start, array[start : min(start + rows, last)]


def _check_values(
    array: np.ndarray, scale: float, name: str, part: tuple[int, int] = (0, 1)
) -> None:
    """Check that the values are finite as the float32 the network will see, chunk by chunk."""
    if array.dtype.kind in "biu" and scale <= 1.0:
        return
    # For each chunk that has any: how many rows, and the first of them. The second list includes
    # the first, but speaks only when the first is empty.
    not_finite: list[tuple[int, int]] = []
    not_finite_as_seen: list[tuple[int, int]] = []
    for start, chunk in _chunks(array, part):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            seen = chunk.astype(np.float32, copy=False)
            if scale != 1.0:
                seen = seen * np.float32(scale)
        if np.isfinite(seen).all():
            continue
        for found, values in ((not_finite, chunk), (not_finite_as_seen, seen)):
            bad = ~np.isfinite(values).reshape(len(chunk), -1).all(axis=1)
            if bad.any():
                found.append((int(bad.sum()), start + int(bad.argmax())))
    for what, accepted, found in (
        ("NaN or infinity", "finite values", not_finite),
        (
            "values that overflow float32" + (f" when scaled by {scale:g}" * (scale != 1.0)),
            f"values of magnitude up to {np.finfo(np.float32).max:.3g}",
            not_finite_as_seen,
        ),
    ):
        if found:
            raise UserError(
                f"{name} has {what} in {sum(count for count, _ in found):,} of {len(array):,} "
                f"rows, the first is row {found[0][1]:,} (counted from 0); accepted: {accepted}."
            )


def _checked_labels(labels: Any, n: int, name: str) -> np.ndarray:
    try:
        labels = np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be read as an array; accepted: [{n}] integers.") from error
    if labels.dtype.kind not in "iu":
        raise UserError(f"{name} is of dtype {labels.dtype}; accepted: integers.")
    if labels.ndim != 1:
        raise UserError(f"{name} is of shape {_shape(labels.shape)}; accepted: {_shape((n,))}.")
    if len(labels) != n:
        raise UserError(
            f"{name} has {len(labels):,} entries for {n:,} examples; accepted: one each."
        )
    limits = np.iinfo(np.int32)
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < limits.min or largest > limits.max:
        raise UserError(
            f"{name} has values from {smallest:,} to {largest:,}; accepted: those of int32."
        )
    return labels.astype(np.int32)


def _open_npy(path: str) -> np.ndarray:
    """Memory-map the array of a .npy file, read-only."""
    try:
        array = np.lib.format.open_memmap(Path(path).expanduser(), mode="r")
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}); accepted: a readable .npy file."
        ) from error
    except MemoryError as error:
        raise UserError(
            f"cannot map {path} into memory: the array it declares is too large."
        ) from error
    except Exception as error:  # the header is parsed by evaluating it: any of a dozen types
        if "Python objects" in str(error):
            raise UserError(f"{path} is of dtype object; accepted: {', '.join(DTYPES)}.") from error
        raise UserError(
            f"{path} is not a .npy file, or is truncated or damaged ({error}); "
            "accepted: a file written by numpy.save."
        ) from error
    if array.dtype == np.dtype("V2"):
        return array.view(ml_dtypes.bfloat16)
    return array


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _shape(sizes: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def __getattr__(name: str):
    # Made on the devices, so it needs JAX, which nothing else here does.
    if name == "make_blobs":
        from jkmeans.generation import make_blobs

        return make_blobs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
