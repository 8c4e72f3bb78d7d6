"""Chunks of rows on their way from a source to the devices, read ahead by a thread of their own."""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import threading
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jkmeans.errors import UserError, weight_bounds
from jkmeans.sharding import DATA_AXIS, SHARDED, clustered_dtype, device_dtype
from jkmeans.sources import Source

# One is being read, one waits, two are with the devices.
N_BUFFERS = 4
# A chunk larger than this reads no faster.
_CHUNK_BYTES = 2**25
# float32 counts the rows of a chunk exactly up to 2²⁴.
_ROWS_PER_DEVICE = 2**20
# Labels, distances and the like that a chunk's computation leaves in memory.
_ROW_OVERHEAD_BYTES = 64
_DEFAULT_BUDGET = 2**30
BLOCK_ROWS = 256
"""Chunks hold a multiple of this on each device, where they can. XLA takes memory over without a
copy where it starts at a multiple of 64 bytes."""


class Chunk(NamedTuple):
    """Rows ``start`` … ``start + count - 1`` of the source, on the host and on the devices.

    Of several processes, each has read the rows of its own devices only.

    Attributes:
      start: the global number of the first row.
      count: how many rows count; the rest is padding.
      first: the number, within the chunk, of the first row that this process has read.
      rows: [m, d] on the host, m of the rows that count; valid until the chunk is released.
      x: [c, d], sharded over the data axis; padded with zeros.
      host_weights: [m] float32 (float64 where rows are computed in it) or None.
      weights: [c], the same type, sharded, 0 for padding; None if all rows weigh the same.
      buffer: which buffer it occupies.
    """

    start: int
    count: int
    first: int
    rows: np.ndarray
    x: jax.Array
    host_weights: np.ndarray | None
    weights: jax.Array | None
    buffer: int


def default_budget() -> int:
    """Bytes of host memory used where nothing is said: 1 GiB, or a quarter of what there is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(_DEFAULT_BUDGET, memory // 4)


def precision(source: Source, centroids: Any = None) -> contextlib.AbstractContextManager:
    """A context in which JAX computes in float64 where rows, or centroids, need it.

    Args:
      source: of the rows; they need it if they are float64 or integers of more than two bytes.
      centroids: [k, d] or None; they need it if they are float64.
    """
    dtypes = (clustered_dtype(source.dtype), getattr(centroids, "dtype", None))
    return jax.enable_x64(True) if np.float64 in dtypes else contextlib.nullcontext()


def streamed_dtype(source: Source) -> np.dtype:
    """The type that rows have on the devices: `clustered_dtype`, where JAX has 64 bits enabled."""
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return clustered_dtype(source.dtype)
    return device_dtype(source.dtype)


def computed_dtype(source: Source, centroids: Any = None) -> np.dtype:
    """The type that sums and centroids have: float32, or float64 if the rows or centroids have it.

    Args:
      source: of the rows.
      centroids: [k, d] where they are there already.
    """
    dtypes = (streamed_dtype(source), getattr(centroids, "dtype", None))
    wide = np.float64 in dtypes and jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return np.dtype(np.float64 if wide else np.float32)


def checked_sizes(memory_budget: Any, chunk_rows: Any) -> tuple[int | None, int | None]:
    """Both as integers, or None where they are.

    Raises:
      ValueError: the budget is no number of bytes above 0, or the rows are no positive integer.
    """
    if memory_budget is not None:
        number = isinstance(memory_budget, Real) and not isinstance(memory_budget, bool)
        if not number or not 0 < float(memory_budget) < float("inf"):
            raise ValueError(f"memory_budget={memory_budget!r}: expected bytes, more than 0")
        memory_budget = int(float(memory_budget))
    if chunk_rows is not None:
        integer = isinstance(chunk_rows, Integral) and not isinstance(chunk_rows, bool)
        if not integer or chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows!r}: expected an integer of at least 1")
        chunk_rows = int(chunk_rows)
    return memory_budget, chunk_rows


def rows_per_chunk(source: Source, mesh: Mesh, memory_budget: int, row_extra_bytes: int = 0) -> int:
    """How many rows a chunk has, so that all that is in memory fits the budget.

    Args:
      source: of the rows.
      mesh: they are sharded over its data axis.
      memory_budget: bytes of host memory.
      row_extra_bytes: what the results of a row take.

    Raises:
      UserError: not even a few rows for each device fit.
    """
    n_devices = mesh.shape[DATA_AXIS]
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    row_bytes = source.n_features * streamed_dtype(source).itemsize
    # On a CPU the memory of the devices is that of the host: a chunk's intermediate results, two
    # chunks at a time. Half precision is computed with as float32, block by block.
    computed = 2 * max(row_bytes, 4 * source.n_features) if on_cpu else 0
    cost = N_BUFFERS * row_bytes + computed + 2 * (_ROW_OVERHEAD_BYTES + row_extra_bytes)
    largest = min(
        _CHUNK_BYTES * (1 if on_cpu else n_devices) // row_bytes, _ROWS_PER_DEVICE * n_devices
    )
    rows = min(largest, (memory_budget - source.overhead_bytes) // cost, source.n_rows)
    if rows < min(n_devices, source.n_rows):
        raise UserError(
            f"memory_budget={memory_budget:,} bytes does not hold a row for each of {n_devices} "
            f"devices; accepted with {source.name} (rows of {row_bytes:,} bytes, "
            f"{source.overhead_bytes:,} bytes to read any): at least "
            f"{source.overhead_bytes + n_devices * cost:,}."
        )
    unit = n_devices * BLOCK_ROWS
    return rows // unit * unit if rows >= unit else -(-rows // n_devices) * n_devices


class Feeder:
    """Feeds a source to the devices, chunk by chunk, one pass at a time.

    Args:
      source: of the rows.
      mesh: chunks are sharded over its data axis.
      chunk_rows: rows of a chunk, a multiple of the devices.
      weights: [n_rows, 1], or None.
    """

    def __init__(self, source: Source, mesh: Mesh, chunk_rows: int, weights: Source | None = None):
        if chunk_rows % mesh.shape[DATA_AXIS]:
            raise ValueError(
                f"chunk_rows={chunk_rows} is no multiple of {mesh.shape[DATA_AXIS]} devices"
            )
        self.source = source
        self.weights = weights
        self.mesh = mesh
        self.chunk_rows = chunk_rows
        self.dtype = streamed_dtype(source)
        self.weight_dtype = computed_dtype(source)
        self._sharding = NamedSharding(mesh, SHARDED)
        self.local = _own_rows(self._sharding, chunk_rows)

    @contextlib.contextmanager
    def chunks(self, first_row: int = 0) -> Iterator[_Pass]:
        """A pass over the rows from ``first_row`` on: an iterable of `Chunk`.

        At most N_BUFFERS chunks exist at a time: whoever iterates gives each one back with
        ``release`` when the devices are done with it.

        Raises:
          UserError: the source cannot be read, changed, or holds weights that are none.
        """
        self.source.check_unchanged()
        run = _Pass(self, first_row)
        try:
            yield run
        finally:
            run.close()
        self.source.check_unchanged()

    def place(self, host: np.ndarray) -> jax.Array:
        """Puts the rows of this process on its devices; their memory may be used without a copy.

        Args:
          host: [m, …], the rows ``local`` of a chunk.

        Returns:
          [c, …], the chunk.
        """
        shape = (self.chunk_rows, *host.shape[1:])
        shards = []
        for device, index in self._sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            start, stop, _ = index[0].indices(self.chunk_rows)
            shards.append(
                jax.device_put(host[start - self.local.start : stop - self.local.start], device)
            )
        return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)


def _own_rows(sharding: NamedSharding, chunk_rows: int) -> slice:
    """The rows of a chunk that lie on this process's devices, which are neighbours."""
    indices = sharding.addressable_devices_indices_map((chunk_rows,)).values()
    bounds = [index[0].indices(chunk_rows) for index in indices if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


class _Pass:
    def __init__(self, feeder: Feeder, first_row: int):
        self._feeder = feeder
        shape = (feeder.local.stop - feeder.local.start, feeder.source.n_features)
        n_chunks = max(1, -(-(feeder.source.n_rows - first_row) // feeder.chunk_rows))
        n_buffers = min(N_BUFFERS, n_chunks)
        # New ones for every pass: what the devices may still read is never written to.
        self._buffers = [_page_aligned(shape, feeder.dtype) for _ in range(n_buffers)]
        self._weights = [
            _page_aligned(shape[:1], feeder.weight_dtype) if feeder.weights else None
            for _ in range(n_buffers)
        ]
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for i in range(n_buffers):
            self._free.put(i)
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        self._reader = threading.Thread(target=self._read, args=(first_row,), daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            i, start, count, own = item
            rows, weights = self._buffers[i], self._weights[i]
            yield Chunk(
                start=start,
                count=count,
                first=self._feeder.local.start,
                rows=rows[:own],
                x=self._feeder.place(rows),
                host_weights=None if weights is None else weights[:own],
                weights=None if weights is None else self._feeder.place(weights),
                buffer=i,
            )

    def release(self, chunk: Chunk) -> None:
        """Lets the buffer of a chunk be read into again."""
        self._free.put(chunk.buffer)

    def close(self) -> None:
        """Stops reading."""
        self._closed = True
        self._free.put(None)
        self._reader.join()

    def _read(self, first_row: int) -> None:
        feeder = self._feeder
        n_rows, total_weight = feeder.source.n_rows, 0.0
        try:
            for start in range(first_row, n_rows, feeder.chunk_rows):
                i = self._free.get()
                if i is None or self._closed:
                    return
                count = min(feeder.chunk_rows, n_rows - start)
                first, last = feeder.local.start, min(feeder.local.stop, count)
                own = max(0, last - first)
                rows, weights = self._buffers[i], self._weights[i]
                if own:
                    feeder.source.read_into(start + first, rows[:own])
                rows[own:] = 0
                if weights is not None and feeder.weights is not None:
                    if own:
                        feeder.weights.read_into(start + first, weights[:own, None])
                    weights[own:] = 0
                    total_weight += sum_of_weights(weights, start + first, feeder.weights.name)
                    # That they are too small is seen in the sums of all rows.
                    if total_weight > weight_bounds(weights.dtype)[1]:
                        refuse_total_weight(total_weight, weights.dtype)
                self._ready.put((i, start, count, own))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)


def _page_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    n = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, n * dtype.itemsize), dtype, n).reshape(shape)


def sum_of_weights(weights: np.ndarray, start: int, name: str) -> float:
    """The sum of weights that are such.

    Args:
      weights: [n] float.
      start: the global number of their first row.
      name: of their source.

    Raises:
      UserError: one is not finite, or negative.
    """
    good = np.isfinite(weights) & (weights >= 0)
    if not good.all():
        row = int(good.argmin())
        raise UserError(
            f"weight {start + row:,} of {name} is {weights[row]} in {weights.dtype}; accepted: "
            "finite numbers of at least 0."
        )
    with np.errstate(over="ignore"):
        return float(np.sum(weights, dtype=np.float64))


def refuse_total_weight(total: float, dtype: Any) -> None:
    """Refuses weights that there is nothing to compute with.

    Args:
      total: their sum, or the number of rows that have one.
      dtype: that they are computed in.

    Raises:
      UserError: it is 0, or too small or large for the dtype.
    """
    least, most = weight_bounds(dtype)
    if not least <= total <= most:
        found = f"add up to {total:g}" if total else "are all 0"
        raise UserError(
            f"the weights {found} in {dtype}; accepted: a sum of {least:.1g} to {most:.1g} (only "
            "ratios of weights matter, so they can be scaled)."
        )


def refuse_not_finite(
    rows: np.ndarray,
    weights: np.ndarray | None,
    start: int,
    name: str,
    *,
    only_if_any: bool = False,
) -> None:
    """Raises a UserError that says which rows cannot be clustered.

    Args:
      rows: [n, d], as the devices have them.
      weights: [n] or None; rows of weight 0 may hold anything.
      start: the global number of the first row.
      name: of the source.
      only_if_any: whether the rows may be all right; otherwise the devices found that they are not.
    """
    if only_if_any and rows.dtype.kind in "biu":
        return
    bad = ~np.isfinite(as_float(rows)).all(axis=1)
    if weights is not None:
        bad &= weights > 0
    last = start + len(rows) - 1
    if bad.any():
        raise UserError(
            f"{name} has NaN, infinity or values that overflow {rows.dtype} in "
            f"{int(bad.sum()):,} of the rows {start:,} to {last:,}, the first is row "
            f"{start + int(bad.argmax()):,} (counted from 0); accepted: finite values."
        )
    if not only_if_any:
        dtype, most = ("float64", "1e153") if rows.dtype == np.float64 else ("float32", "1e18")
        raise UserError(
            f"{name} has values in the rows {start:,} to {last:,} whose squared distances overflow "
            f"{dtype}; accepted: values of magnitude below {most}; scale the data."
        )


def as_float(rows: np.ndarray) -> np.ndarray:
    """Rows in a type that NumPy can judge them in, which loses none of them: float32 or float64."""
    return rows if rows.dtype == np.float64 else rows.astype(np.float32, copy=False)
