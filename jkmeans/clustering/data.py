"""What a job clusters: a source of rows, and the rows of it that are in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jkmeans import datasets, processes
from jkmeans.configuration import Config
from jkmeans.device_memory import device_room
from jkmeans.sharding import clustered_dtype
from jkmeans.sources import Source, open_source
from jkmeans.streaming.pipeline import refuse_not_finite

_PIECE_BYTES = 2**25


class Data(NamedTuple):
    """What is clustered.

    Attributes:
      name: of the data set, or of the file.
      source: its rows.
      truth: [n] int32 classes, for metrics only; None where they are not known.
      shape: of an example that is an image; None otherwise.
    """

    name: str
    source: Source
    truth: np.ndarray | None
    shape: tuple[int, ...] | None


def open_data(config: Config) -> Data:
    """The data that a config names.

    Raises:
      UserError: it cannot be read.
    """
    if config.input not in datasets.NAMED:
        source = open_source(config.input, config.columns or None, datasets.NAMED)
        return Data(Path(config.input).name, source, None, None)
    dataset = datasets.load(config.input)
    rows = dataset.examples.reshape(dataset.n_examples, -1) * np.float32(dataset.scale)
    source = open_source(rows)
    source.name = dataset.name
    return Data(dataset.name, source, dataset.labels, dataset.example_shape)


def fits_into_memory(source: Source, mesh: Mesh, memory_mebibytes: int) -> bool:
    """Whether the rows, and what is kept of each, may lie on the devices.

    Args:
      source: of the rows.
      mesh: of the devices.
      memory_mebibytes: what all of it may take; 0 for the room that the devices have.
    """
    # At least float32 on the devices, and labels, distances and the like of every row.
    value_bytes = max(4, source.dtype.itemsize, clustered_dtype(source.dtype).itemsize)
    row_bytes = source.n_features * value_bytes + 64
    needed = source.n_rows * row_bytes + source.overhead_bytes
    if memory_mebibytes:
        return needed <= memory_mebibytes * 2**20
    return needed <= mesh.size * device_room(mesh)


def read_all(source: Source, mesh: Mesh, multiple_of: int) -> np.ndarray | OwnRows:
    """All rows in memory, checked, [n, d]; of several processes, each has those of its devices.

    Args:
      source: of the rows.
      mesh: over whose devices they are to be cut.
      multiple_of: what the number of rows will be padded to a multiple of, besides the devices.

    Raises:
      UserError: a row is not finite, or the source changed meanwhile.
    """
    if processes.count() > 1:
        return OwnRows(source, mesh, multiple_of)
    rows = source.read(0, source.n_rows)
    source.check_unchanged()
    return _checked(rows, source.name)


class OwnRows:
    """The rows of a source, of which those on this process's devices are in memory, checked.

    As much of an array [n, d] as `sharded.place` and a sample ask for; other rows are read when
    they are asked for.

    Args:
      source: of the rows.
      mesh: over whose devices they are to be cut.
      multiple_of: what the number of rows is padded to a multiple of, besides the devices.
    """

    def __init__(self, source: Source, mesh: Mesh, multiple_of: int):
        self._source = source
        self.shape = (source.n_rows, source.n_features)
        unit = math.lcm(mesh.size, multiple_of)
        n_each = -(-source.n_rows // unit) * unit // mesh.size
        own = [
            i
            for i, device in enumerate(mesh.devices.flat)
            if device.process_index == processes.number()
        ]
        self._first = min(own[0] * n_each, source.n_rows)
        last = min((own[-1] + 1) * n_each, source.n_rows)
        self._rows = self._read(self._first, last)
        self.dtype = self._rows.dtype
        source.check_unchanged()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if not isinstance(index, slice):
            return _checked(pick_rows(self._source, index), self._source.name)
        start, stop, _ = index.indices(len(self))
        first = start - self._first
        if first >= 0 and stop - self._first <= len(self._rows):
            return self._rows[first : stop - self._first]
        return self._read(start, stop)

    def astype(self, dtype: np.dtype, copy: bool = False) -> OwnRows:
        """The rows themselves, which have the type for the devices already."""
        assert dtype == self.dtype
        assert not copy
        return self

    def _read(self, start: int, stop: int) -> np.ndarray:
        rows = self._source.read(start, stop)
        # Numbered as in the file.
        refuse_not_finite(rows, None, start, self._source.name, only_if_any=True)
        return _checked(rows, self._source.name)


def _checked(rows: np.ndarray, name: str) -> np.ndarray:
    """Rows in the type for the devices; none of them NaN or infinite."""
    rows = rows.astype(clustered_dtype(rows.dtype), copy=False)
    return datasets.check_examples(rows, name=name) if len(rows) else rows


def pick_rows(source: Source, numbers: np.ndarray) -> np.ndarray:
    """Some rows of a source, read in one pass from its start: [s, d].

    Args:
      source: of the rows.
      numbers: [s] int, of the rows, rising.
    """
    piece_rows = max(1, _PIECE_BYTES // (source.n_features * source.dtype.itemsize))
    found = []
    for start in range(0, int(numbers[-1]) + 1, piece_rows):
        stop = min(start + piece_rows, source.n_rows)
        first, last = np.searchsorted(numbers, (start, stop))
        # Every piece, because Parquet and Zarr are quick only in their own order.
        found.append(source.read(start, stop)[numbers[first:last] - start])
    return np.concatenate(found)
