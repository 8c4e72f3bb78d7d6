"""Rows on disk or in memory, read in pieces: .npy files and folders, Zarr, Parquet, arrays.

A `Source` is a matrix [n_rows, n_features] that is read a range of rows at a time, into memory that
the caller owns. Files are read with plain reads rather than through a memory map: a map's pages
count as memory of the process, and a file that shrinks under a map kills it. zarr and pyarrow are
imported when a source needs them. Everything here runs on the host.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans.errors import UserError
from jkmeans.sources.base import ACCEPTED_PATHS, ArraySource, Concatenated, Source, check_matrix
from jkmeans.sources.npy import RawFile, open_npy
from jkmeans.sources.parquet import ParquetSource
from jkmeans.sources.zarr_array import ZarrSource, open_zarr

__all__ = ["Source", "natural_order", "open_source", "open_weights"]


def open_source(
    what: Any, columns: Sequence[str] | None = None, named: Sequence[str] = ()
) -> Source:
    """Opens anything that holds a matrix of numbers, without reading it.

    Args:
      what: a NumPy or JAX array or anything with ``__array__`` [n, d]; the path of a .npy file, of
        a folder of .npy files (in natural order: part-2 before part-10), of a Zarr array (.zarr),
        of a Parquet file or a folder of them; a ``zarr.Array``; a `Source`; or a list of those,
        one after the other. bfloat16 in .npy files is what NumPy makes of it, two bytes without a
        type.
      columns: of Parquet only: numeric columns, or one column of vectors; None for all but what
        pandas has written as the index of a data frame.
      named: data sets that could have been named instead of a path, for the error.

    Returns:
      The source.

    Raises:
      UserError: it cannot be read, or is no matrix of numbers.
    """
    if isinstance(what, Source):
        return what
    if isinstance(what, list | tuple) and not _is_array(what):
        return Concatenated([open_source(part, columns) for part in what])
    if isinstance(what, str | os.PathLike):
        return _open_path(Path(what).expanduser(), columns, named)
    if columns is not None:
        raise UserError(
            f"columns={list(columns)} was given for {type(what).__name__}: only "
            "Parquet has columns."
        )
    if type(what).__module__.partition(".")[0] == "zarr":
        return ZarrSource(what, str(getattr(what, "store_path", "the Zarr array")))
    # A view of a map does not know where in the file it lies, and a copy-on-write map may hold what
    # the file does not.
    if (
        isinstance(what, np.memmap)
        and isinstance(what.base, mmap.mmap)
        and what.filename
        and what.flags.c_contiguous
        and what.mode != "c"
    ):
        check_matrix(what.shape, what.dtype, str(what.filename))
        return RawFile(Path(what.filename), what.offset, what.shape, what.dtype, False)
    return ArraySource(what)


def open_weights(what: Any, n_rows: int) -> Source:
    """Opens one weight for each row: [n] or [n, 1], of any kind that `open_source` takes.

    One number is the weight of every row.

    Raises:
      UserError: it cannot be read, or is not one number a row.
    """
    if isinstance(what, str | os.PathLike) and Path(what).suffix == ".npy":
        source = open_npy(Path(what).expanduser(), vector=True)
    elif _is_array(what):
        array: Any = what if hasattr(what, "reshape") else np.asarray(what)
        if array.ndim == 0:
            array = np.broadcast_to(np.asarray(array), (n_rows, 1))
        column = array.reshape(-1, 1) if array.ndim == 1 else array
        source = ArraySource(column, "the array of weights")
    else:
        source = open_source(what)
    if source.n_features != 1:
        raise UserError(
            f"{source.name} is of shape [{source.n_rows}, {source.n_features}]; accepted as "
            "weights: [rows] or [rows, 1]."
        )
    if source.n_rows != n_rows:
        raise UserError(
            f"{source.name} has {source.n_rows:,} weights; accepted: one for each of the "
            f"{n_rows:,} rows."
        )
    return source


def _is_array(what: Any) -> bool:
    if isinstance(what, list | tuple):
        return not what or np.isscalar(what[0])
    return not isinstance(what, Source | str | os.PathLike)


def _open_path(path: Path, columns: Sequence[str] | None, named: Sequence[str]) -> Source:
    if not path.exists():
        accepted = ", ".join([*named, ACCEPTED_PATHS])
        raise UserError(f"{path} does not exist; accepted: {accepted}.")
    if path.suffix in (".parquet", ".pq"):
        return _open_parquet(path, columns)
    is_zarr = path.suffix == ".zarr" or (
        path.is_dir() and any((path / name).exists() for name in (".zarray", "zarr.json"))
    )
    if path.is_dir() and not is_zarr:
        if any(path.glob("*.parquet")):
            return _open_parquet(path, columns)
        files = sorted(path.glob("*.npy"), key=natural_order)
        if not files:
            raise UserError(
                f"folder {path} has no .npy or .parquet files; accepted: {ACCEPTED_PATHS}."
            )
    else:
        files = [path]
    if columns is not None:
        raise UserError(f"columns={list(columns)} was given for {path}: only Parquet has columns.")
    if is_zarr:
        return open_zarr(path)
    parts = [open_npy(file) for file in files]
    return parts[0] if len(parts) == 1 else Concatenated(parts, str(path))


def natural_order(path: Path) -> list[tuple[int, str]]:
    """A key for sorting: part-2 comes before part-10."""
    return [
        (int(piece), "") if piece.isdecimal() else (-1, piece)
        for piece in re.split(r"(\d+)", path.name)
    ]


def _open_parquet(path: Path, columns: Sequence[str] | None) -> Source:
    files = sorted(path.glob("*.parquet"), key=natural_order) if path.is_dir() else [path]
    if not files:
        raise UserError(f"folder {path} has no .parquet files; accepted: {ACCEPTED_PATHS}.")
    parts = [ParquetSource(file, columns) for file in files]
    return parts[0] if len(parts) == 1 else Concatenated(parts, str(path))
