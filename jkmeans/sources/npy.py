"""Matrices that lie uncompressed in a file: .npy."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from jkmeans.errors import UserError
from jkmeans.sources.base import SCRATCH_BYTES, Source, check_matrix, readable


class RawFile(Source):
    """A matrix that lies in a file uncompressed, from an offset on."""

    def __init__(
        self, path: Path, offset: int, shape: Sequence[int], dtype: np.dtype, by_column: bool
    ):
        self.name = str(path)
        self.path: Path = path
        self._offset = offset
        self.example_shape: tuple[int, ...] = (int(shape[1]),)
        self._swapped = not dtype.isnative
        self._by_column = by_column
        self.n_rows, self.n_features = map(int, shape)
        self.dtype = dtype.newbyteorder("=")
        with readable(path):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            self._opened = self._state()
        if self._by_column:
            self.overhead_bytes = SCRATCH_BYTES

    def _state(self) -> tuple[int, int]:
        status = os.stat(self._file)
        return status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raises a UserError if what is read is no longer what was opened."""
        with readable(self.path):
            state = self._state()
            status = os.stat(self.path)
            same_file = os.path.samestat(status, os.stat(self._file))
        if state != self._opened or not same_file:
            size, was = state[0], self._opened[0]
            how = f"it had {was:,} bytes and has {size:,}" if size != was else "it was written to"
            raise UserError(
                f"{self.name} changed while it was being read ({how}); accepted: a file that "
                "nothing writes to."
            )

    def _read(self, start: int, out: np.ndarray) -> None:
        itemsize = self.dtype.itemsize
        if not self._by_column:
            self._read_bytes(self._offset + start * self.n_features * itemsize, out)
        else:
            column_rows = max(1, SCRATCH_BYTES // itemsize)
            column = np.empty(min(column_rows, len(out)), self.dtype)
            for first in range(0, len(out), column_rows):
                piece = column[: len(out) - first]
                for j in range(self.n_features):
                    row = j * self.n_rows + start + first
                    self._read_bytes(self._offset + row * itemsize, piece)
                    out[first : first + len(piece), j] = piece
        if self._swapped:
            out.byteswap(inplace=True)

    def _read_bytes(self, position: int, out: np.ndarray) -> None:
        left = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        with readable(self.path):
            while left:
                n = os.preadv(self._file, [left], position)
                if n == 0:
                    raise UserError(
                        f"{self.name} ends at byte {position:,}, before all of its "
                        f"{self.n_rows:,} rows: it was truncated while it was being read."
                    )
                left, position = left[n:], position + n


def open_npy(path: Path, vector: bool = False, flatten: bool = False) -> RawFile:
    """A .npy file.

    Args:
      path: of it.
      vector: whether an array of one dimension is taken as a single column.
      flatten: whether what an array of more than two dimensions holds of a row is taken as one
        after the other; ``example_shape`` of the source is its shape.
    """
    form = np.lib.format
    with readable(path), open(path, "rb") as file:
        try:
            version = form.read_magic(file)
            read_header = (
                form.read_array_header_1_0 if version == (1, 0) else (form.read_array_header_2_0)
            )
            shape, by_column, dtype = read_header(file)
        except OSError:
            raise
        except Exception as error:  # The header is parsed by evaluating it: any of a dozen types.
            raise UserError(
                f"{path} is not a .npy file, or is truncated or damaged ({error}); accepted: a "
                "file written by numpy.save."
            ) from error
        offset = file.tell()
        size = os.stat(file.fileno()).st_size
    if dtype == np.dtype("V2"):
        dtype = np.dtype(ml_dtypes.bfloat16)
    if vector and len(shape) == 1:
        shape, by_column = (*shape, 1), False
    sizes: list[int] = [*map(int, shape)]
    example_shape = tuple(sizes[1:])
    if flatten and len(sizes) > 2:
        if by_column:
            raise UserError(
                f"{path} is of shape {sizes} in Fortran order; accepted: more than two "
                "dimensions in C order only."
            )
        sizes = [sizes[0], math.prod(example_shape)]
    check_matrix(sizes, dtype, str(path))
    expected = offset + sizes[0] * sizes[1] * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path} {'is truncated' if size < expected else 'is longer than it says'}: it has "
            f"{size:,} bytes; accepted: {expected:,}, as its header says (is it still being "
            "written?)."
        )
    file = RawFile(path, offset, sizes, dtype, by_column and sizes[1] > 1)
    file.example_shape = example_shape
    return file
