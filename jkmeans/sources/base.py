"""What a source is: rows that are read a range at a time, into memory that the caller owns."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jkmeans.errors import UserError, refuse_mask

ACCEPTED_PATHS = "a .npy file, a folder of .npy files, a .zarr array, a Parquet file or folder"
ACCEPTED = f"a matrix of numbers as an array, {ACCEPTED_PATHS}, or a list of those"

# A fingerprint is of all rows up to this many bytes, and of a few blocks, evenly spread, of more.
_WHOLE_BYTES = 2**30
_SAMPLED_BLOCKS = 8
_SAMPLED_BYTES = 2**18
# Rows of another type are converted in pieces of this size.
SCRATCH_BYTES = 2**22


class Source(abc.ABC):
    """A matrix that is read a range of rows at a time.

    Attributes:
      name: what it is called in messages.
      n_rows: N.
      n_features: D.
      dtype: the type that rows are read in, in native byte order.
      overhead_bytes: memory that reading takes besides the rows asked for.
      path: of the one file that it reads; None where there is no such.
    """

    name: str
    n_rows: int
    n_features: int
    dtype: np.dtype
    overhead_bytes: int = 0
    path: Path | None = None

    @abc.abstractmethod
    def _read(self, start: int, out: np.ndarray) -> None:
        """Fills ``out`` [rows, d], C order and of ``dtype``, with the rows from ``start`` on."""

    def check_unchanged(self) -> None:  # noqa: B027 - not every source has something to check
        """Raises a UserError if what is read is no longer what was opened."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop-1: [stop - start, d], a new array.

        Raises:
          UserError: they cannot be read.
        """
        rows = np.empty((stop - start, self.n_features), self.dtype)
        self.read_into(start, rows)
        return rows

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Reads as many rows as ``out`` has, converted to its type.

        Args:
          start: the first row.
          out: [rows, d], in C order.

        Raises:
          UserError: they cannot be read.
        """
        if start < 0 or start + len(out) > self.n_rows:
            raise ValueError(f"rows {start} to {start + len(out)} of {self.n_rows}")
        if out.dtype == self.dtype:
            self._read(start, out)
            return
        rows = max(1, SCRATCH_BYTES // max(1, self.n_features * self.dtype.itemsize))
        scratch = np.empty((min(rows, len(out)), self.n_features), self.dtype)
        for first in range(0, len(out), rows):
            piece = scratch[: len(out) - first]
            self._read(start + first, piece)
            with np.errstate(over="ignore", invalid="ignore"):
                out[first : first + len(piece)] = piece

    def fingerprint(self) -> str:
        """Identifies the data by shape, type and the bytes of its rows.

        Of more than 1 GiB only a few blocks of rows are read: what changes elsewhere goes unseen.
        It says nothing of where or in which format the data lies, so a copy has the same one.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.n_rows} {self.n_features} {self.dtype.name}".encode())
        row_bytes = max(1, self.n_features * self.dtype.itemsize)
        if self.n_rows * row_bytes <= _WHOLE_BYTES:
            rows = max(1, SCRATCH_BYTES // row_bytes)
            starts = range(0, self.n_rows, rows)
        else:
            rows = min(self.n_rows, max(1, _SAMPLED_BYTES // row_bytes // _SAMPLED_BLOCKS))
            last = self.n_rows - rows
            starts = [i * last // (_SAMPLED_BLOCKS - 1) for i in range(_SAMPLED_BLOCKS)]
        for start in starts:
            block = self.read(start, min(start + rows, self.n_rows))
            # Five times as fast as the digest.
            digest.update(zlib.crc32(block.view(np.uint8).data).to_bytes(4, "big"))
        return digest.hexdigest()


def check_matrix(shape: Sequence[int], dtype: np.dtype, name: str) -> None:
    """Raises a UserError unless that is a matrix of real numbers with at least one entry."""
    if len(shape) != 2:
        raise UserError(f"{name} is of shape {[*map(int, shape)]}; accepted: [rows, features].")
    numeric = dtype.kind in "biuf" or dtype == ml_dtypes.bfloat16
    if not numeric or (dtype.kind == "f" and dtype.itemsize > 8):
        raise UserError(
            f"{name} is of dtype {dtype}; accepted: integers, bool, bfloat16, float16, float32 "
            "and float64."
        )
    if 0 in shape:
        raise UserError(
            f"{name} is of shape {[*map(int, shape)]}; accepted: at least one row and one feature."
        )


class ArraySource(Source):
    """Rows of an array in memory.

    Args:
      array: [n, d], of any library.
      name: of the array, as sentences have it.
    """

    def __init__(self, array: Any, name: str = "the array"):
        self.name = name
        refuse_mask(name, array)
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            try:
                array = np.asarray(array)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{type(array).__name__} is no matrix; accepted: {ACCEPTED}."
                ) from error
        try:
            dtype = np.dtype(array.dtype)
        except TypeError:  # An array of another library, with types of its own.
            array = np.asarray(array)
            dtype = array.dtype
        check_matrix(array.shape, dtype, self.name)
        self._rows = array
        self.n_rows, self.n_features = map(int, array.shape)
        self.dtype = dtype.newbyteorder("=")

    def _read(self, start: int, out: np.ndarray) -> None:
        out[:] = np.asarray(self._rows[start : start + len(out)])


class Concatenated(Source):
    """Sources of the same width and type, one after the other."""

    def __init__(self, parts: Sequence[Source], name: str = ""):
        first = parts[0]
        for part in parts[1:]:
            if (part.n_features, part.dtype) != (first.n_features, first.dtype):
                raise UserError(
                    f"{part.name} has {part.n_features} features of {part.dtype}, but {first.name} "
                    f"has {first.n_features} of {first.dtype}; accepted: parts of one width and "
                    "dtype."
                )
        self.name = name or f"{first.name} and {len(parts) - 1} more"
        self._parts = parts
        self._ends = np.cumsum([part.n_rows for part in parts])
        self.n_rows, self.n_features = int(self._ends[-1]), first.n_features
        self.dtype = first.dtype
        self.overhead_bytes = max(part.overhead_bytes for part in parts)

    def check_unchanged(self) -> None:
        """Raises a UserError if what is read is no longer what was opened."""
        for part in self._parts:
            part.check_unchanged()

    def _read(self, start: int, out: np.ndarray) -> None:
        done = 0
        i = int(np.searchsorted(self._ends, start, side="right"))
        while done < len(out):
            part = self._parts[i]
            row = start + done - (int(self._ends[i]) - part.n_rows)
            rows = min(part.n_rows - row, len(out) - done)
            part.read_into(row, out[done : done + rows])
            done, i = done + rows, i + 1


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a file into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}); accepted: {ACCEPTED_PATHS}."
        ) from error
