"""Files to predict for: which there are, what is in them, and reading a range of their rows."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jkmeans import datasets
from jkmeans.dispatch.master import Shard
from jkmeans.errors import UserError
from jkmeans.sources import Source, natural_order, open_source
from jkmeans.sources.npy import open_npy

_PARQUET = (".parquet", ".pq")
SUFFIXES = (".npy", *_PARQUET, ".zarr")


class InputFile(NamedTuple):
    """A file that can be read, and whose rows are examples of the model.

    Attributes:
      name: within the input; unique.
      path: of it.
      n_rows: of it.
      identity: what changes when somebody writes to it.
    """

    name: str
    path: Path
    n_rows: int
    identity: str


def find_files(path: str | os.PathLike[str]) -> list[Path]:
    """The file, or the files of a folder in natural order: part-2 before part-10.

    Raises:
      UserError: there is nothing that could be read.
    """
    there = Path(path).expanduser().absolute()
    accepted = f"one of {', '.join(SUFFIXES)}, or a folder of those"
    if not there.exists():
        raise UserError(f"--input {path} does not exist; accepted: {accepted}")
    if there.suffix in SUFFIXES:
        return [there]
    if not there.is_dir():
        raise UserError(f"--input {path} is no file of a kind that is known; accepted: {accepted}")
    if (there / ".zarray").exists() or (there / "zarr.json").exists():
        return [there]
    files = [f for f in there.iterdir() if f.suffix in SUFFIXES and not f.name.startswith(".")]
    if not files:
        raise UserError(f"--input {path} has no file in it; accepted: {accepted}")
    return sorted(files, key=natural_order)


def inspect(
    path: Path, example_shape: tuple[int, ...], columns: Sequence[str] | None = None
) -> InputFile:
    """Opens a file to see that it holds examples; its rows are not read.

    Args:
      path: see `find_files`.
      example_shape: of the model. A Parquet file, which has no shapes, holds such an example in as
        many numbers.
      columns: of a Parquet file, where they are not all; a file without them may have just as many.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    source, shape = _open(path, example_shape, columns)
    if shape != example_shape:
        raise UserError(
            f"{path.name} is of shape {_shown(source.n_rows, shape)}; accepted: "
            f"{_shown('n', example_shape)}, the shape of the model's examples"
        )
    return InputFile(path.name, path, source.n_rows, identity(path, source))


def cut(file: InputFile, shard_rows: int) -> list[Shard]:
    """The shards of a file, of ``shard_rows`` rows each but the last."""
    return [
        Shard(file.name, start, min(start + shard_rows, file.n_rows))
        for start in range(0, file.n_rows, shard_rows)
    ]


def identity(path: Path, source: Source) -> str:
    """Size and time of a file; of a folder (Zarr) what a few of its rows are."""
    if path.is_dir():
        return source.fingerprint()
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


class Reader:
    """Reads ranges of rows; the file that was read last stays open.

    Args:
      files: that may be asked for.
      example_shape: of their rows.
      columns: see `inspect`.
    """

    def __init__(
        self,
        files: list[InputFile],
        example_shape: tuple[int, ...],
        columns: Sequence[str] | None = None,
    ):
        self._files = {file.name: file for file in files}
        self._shape = example_shape
        self._columns = columns
        self._open: tuple[str, Source] | None = None

    def read(self, shard: Shard) -> np.ndarray:
        """[rows, *example_shape], checked.

        Raises:
          UserError: they cannot be read, are not finite, or the file is no longer what it was.
        """
        file = self._files[shard.file]
        if self._open is None or self._open[0] != file.name:
            source, _ = _open(file.path, self._shape, self._columns)
            changed = identity(file.path, source) != file.identity
            if changed or source.n_rows != file.n_rows:
                raise UserError(f"{file.name} was changed after the run began")
            self._open = file.name, source
        source = self._open[1]
        try:
            rows = source.read(shard.start, shard.stop)
            source.check_unchanged()
        except UserError:
            self._open = None
            raise
        rows = rows.reshape(len(rows), *self._shape)
        return datasets.check_examples(rows, name=str(shard))


def _open(
    path: Path, example_shape: tuple[int, ...], columns: Sequence[str] | None
) -> tuple[Source, tuple[int, ...]]:
    """A file as a matrix, and the shape that its rows have."""
    if path.suffix == ".npy":
        source = open_npy(path, flatten=True)
        return source, source.example_shape
    if path.suffix not in _PARQUET:
        source = open_source(path)
        return source, (source.n_features,)
    n_features = math.prod(example_shape)
    try:
        source = open_source(path, columns)
    except UserError:
        source = open_source(path)
        if columns is None or source.n_features != n_features:
            raise
    shape = (source.n_features,)
    return source, example_shape if shape == (n_features,) else shape


def _shown(n_rows: int | str, shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, (n_rows, *shape)))}]"
