"""One pass over a source: what is summed on the devices, and which rows are picked on the way.

A `Program` says what each chunk adds. Every device adds up its own rows, without talking to the
others; one all-reduce ends the pass. Sums are pairs of numbers (a sum and what rounding left out
of it), so that 10⁸ terms add up as in float64.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans import processes
from jkmeans.errors import UserError
from jkmeans.kmeans.statistics import two_sum
from jkmeans.sharding import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    data_parallel,
    local_rows,
    place,
    to_host,
)
from jkmeans.streaming import picking
from jkmeans.streaming.picking import Picked
from jkmeans.streaming.pipeline import Chunk, Feeder, refuse_not_finite
from jkmeans.streaming.programs import Program, Rows

# Chunks with the devices at a time: one computes while the next one is on its way.
IN_FLIGHT = 2
MEETING_CHUNKS = 8
"""Of several processes: chunks between two places where they agree to stop, to save, to refuse."""


class Partial(NamedTuple):
    """A pass that is not finished.

    Attributes:
      position: rows done.
      high: [devices, p], the sums of each device.
      low: [devices, p], what rounding left out of them.
      picked: so far.
    """

    position: int
    high: np.ndarray
    low: np.ndarray
    picked: Picked


class _Found(NamedTuple):
    """What a chunk adds, per device: numbers, whether they are finite, and the rows picked."""

    numbers: jax.Array
    finite: jax.Array
    priority: jax.Array | None
    row: jax.Array | None
    labels: jax.Array | None


@functools.partial(jax.jit, static_argnames=("program", "mesh", "n_picked"))
def contribute(x, weights, start, count, parameters, *, program, mesh, n_picked):
    """What one chunk adds on each device: no communication.

    Chunks do not wait for each other's sums, so a CPU computes several at a time.

    Args:
      x: [c, d], sharded.
      weights: [c], sharded, or None.
      start: [] uint32, the global number of the chunk's first row.
      count: [] int32, rows that are not padding.
      parameters: replicated arrays for the program.
      program: a Program.
      mesh: of the data axis.
      n_picked: rows picked on each device.
    """

    def local(x, weights, start, count, parameters):
        n = x.shape[0]
        row = lax.axis_index(DATA_AXIS) * n + jnp.arange(n, dtype=jnp.int32)
        valid = row < count
        if weights is not None:
            valid = valid & (weights > 0)
        index = start + row.astype(jnp.uint32)
        added = program(Rows(x, weights, valid, index), *parameters)
        finite = jnp.isfinite(jnp.sum(added.numbers))[None]
        found = _Found(added.numbers[None], finite, None, None, None)
        if n_picked and added.priority is not None:
            priority, chosen = lax.top_k(added.priority, min(n_picked, n))
            labels = None if added.labels is None else added.labels[chosen]
            found = found._replace(priority=priority, row=row[chosen], labels=labels)
        return found

    in_specs = (SHARDED, SHARDED, REPLICATED, REPLICATED, REPLICATED)
    return data_parallel(local, mesh, in_specs, SHARDED)(x, weights, start, count, parameters)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def accumulate(high, low, numbers):
    """Adds to sums, and what rounding leaves out to ``low``: all [devices, p], sharded."""
    return two_sum(high, low, numbers.astype(high.dtype))


@functools.partial(jax.jit, static_argnames="mesh")
def reduce(high, low, *, mesh):
    """The sums over all devices, [p] float64, in one all-reduce of p numbers.

    Traced with 64 bits enabled: the pairs become float64 first, so nothing is lost.
    """

    def local(high, low):
        pair = high[0].astype(jnp.float64) + low[0].astype(jnp.float64)
        return lax.psum(pair, DATA_AXIS)

    return data_parallel(local, mesh, (SHARDED, SHARDED), REPLICATED)(high, low)


def run_pass(
    feeder: Feeder,
    program: Program,
    parameters: tuple[np.ndarray | jax.Array, ...],
    *,
    n_picked: int = 0,
    partial: Partial | None = None,
    on_chunk: Callable[[int, Callable[[], Partial]], None] = lambda done, snapshot: None,
) -> tuple[np.ndarray, Picked]:
    """Runs a program over all rows of a source.

    Args:
      feeder: of the rows.
      program: what to sum.
      parameters: for the program, in the dtype to compute in.
      n_picked: rows to pick.
      partial: where an unfinished pass of the same program stopped.
      on_chunk: called after each chunk with the rows done and a function that gives the unfinished
        pass; it may raise to stop there. With several processes it is called after every eighth
        chunk, by all at the same place, and may ask the others.

    Returns:
      The sums [p] float64, and the rows picked.

    Raises:
      UserError: the source cannot be read, or holds NaN or infinity.
    """
    parameters = tuple(
        value if isinstance(value, jax.Array) else place(value, feeder.mesh, REPLICATED)
        for value in parameters
    )
    n_devices = feeder.mesh.shape[DATA_AXIS]
    if partial is None:
        partial = _nothing_done(feeder, program, parameters)
    elif len(partial.high) != n_devices:
        partial = _for_devices(partial, n_devices)
    meeting_chunks = 1 if processes.count() == 1 else MEETING_CHUNKS
    with feeder.chunks(partial.position) as chunks:
        current = _Pass(feeder, program, parameters, n_picked, partial, chunks.release)
        for n_chunks, chunk in enumerate(chunks, start=1):
            current.add(chunk)
            if n_chunks % meeting_chunks == 0:
                current.meet()
                on_chunk(current.position, current.partial)
        current.finish()
        current.meet()
    return current.sums(), picking.of_all(current.picked, n_picked)


class _Pass:
    """A pass under way.

    Attributes:
      position: rows done.
      picked: so far, by this process.
    """

    def __init__(
        self,
        feeder: Feeder,
        program: Program,
        parameters: tuple[jax.Array, ...],
        n_picked: int,
        partial: Partial,
        release: Callable[[Chunk], None],
    ):
        """Goes on where ``partial`` stopped; chunks that are done are given back by ``release``."""
        self._feeder = feeder
        self._program = program
        self._parameters = parameters
        self._n_picked = n_picked
        self._release = release
        self._high = place(partial.high, feeder.mesh, SHARDED)
        self._low = place(partial.low, feeder.mesh, SHARDED)
        self._in_flight: deque[tuple[Chunk, _Found]] = deque()
        self._refusal: UserError | None = None
        self.position = partial.position
        self.picked = partial.picked

    def add(self, chunk: Chunk) -> None:
        """Gives a chunk to the devices, and waits for the one before the last.

        Raises:
          UserError: a row is not finite; with several processes, `meet` raises.
        """
        found = contribute(
            chunk.x,
            chunk.weights,
            np.uint32(chunk.start),
            np.int32(chunk.count),
            self._parameters,
            program=self._program,
            mesh=self._feeder.mesh,
            n_picked=self._n_picked,
        )
        self._high, self._low = accumulate(self._high, self._low, found.numbers)
        self._in_flight.append((chunk, found))
        if len(self._in_flight) == IN_FLIGHT:
            self._finish_oldest()

    def finish(self) -> None:
        """Waits for all chunks that the devices have."""
        while self._in_flight:
            self._finish_oldest()

    def meet(self) -> None:
        """A row that one process refuses ends the pass of all.

        Raises:
          UserError: of that process.
        """

        def say() -> None:
            if self._refusal is not None:
                raise self._refusal

        processes.together(say)

    def partial(self) -> Partial:
        """The pass as it stands after the chunks that were added."""
        self.finish()
        every = picking.of_all(self.picked, self._n_picked)
        return Partial(self.position, to_host(self._high).copy(), to_host(self._low).copy(), every)

    def sums(self) -> np.ndarray:
        """Over all devices: [p] float64."""
        with jax.enable_x64(True):
            return np.asarray(reduce(self._high, self._low, mesh=self._feeder.mesh))

    def _finish_oldest(self) -> None:
        chunk, found = self._in_flight.popleft()
        if not local_rows(found.finite).all():
            self._refuse(chunk)
        self.picked = _merge(self.picked, chunk, found, self._n_picked)
        self.position = chunk.start + chunk.count
        self._release(chunk)

    def _refuse(self, chunk: Chunk) -> None:
        first = chunk.start + chunk.first
        try:
            refuse_not_finite(chunk.rows, chunk.host_weights, first, self._feeder.source.name)
        except UserError as error:
            if processes.count() == 1:
                raise
            self._refusal = self._refusal or error


def _nothing_done(feeder: Feeder, program: Program, parameters: tuple[jax.Array, ...]) -> Partial:
    """A pass before its first chunk."""
    d = feeder.source.n_features
    one_row = Rows(
        jnp.zeros((1, d), feeder.dtype), None, jnp.ones(1, bool), jnp.zeros(1, jnp.uint32)
    )
    n_numbers = jax.eval_shape(program, one_row, *parameters).numbers.size
    n_devices = feeder.mesh.shape[DATA_AXIS]
    zeros = np.zeros((n_devices, n_numbers), parameters[0].dtype)
    return Partial(0, zeros, zeros, picking.nothing(d, feeder.dtype))


def _for_devices(partial: Partial, n_devices: int) -> Partial:
    """The sums so far, as if the first device had made them all."""
    total = np.sum(partial.high.astype(np.float64) + partial.low, axis=0)
    high, low = (np.zeros((n_devices, len(total)), partial.high.dtype) for _ in range(2))
    high[0] = total
    low[0] = total - high[0]
    return partial._replace(high=high, low=low)


def _merge(picked: Picked, chunk: Chunk, found: _Found, n_picked: int) -> Picked:
    if found.priority is None or found.row is None:
        return picked
    priority, row = local_rows(found.priority), local_rows(found.row)
    # Rows come in order: one that only equals what is there already stays behind it.
    lowest = picked.priority[-1] if len(picked.priority) == n_picked else -np.inf
    better = priority > lowest
    if not better.any():
        return picked
    priority, row = priority[better], row[better]
    labels = np.zeros(len(row), np.int32)
    if found.labels is not None:
        labels = local_rows(found.labels)[better]
    own = row - chunk.first
    # Padding has the lowest priority, and is no row.
    real = own < len(chunk.rows)
    priority, row, labels, own = priority[real], row[real], labels[real], own[real]
    weights = np.ones(len(row)) if chunk.host_weights is None else chunk.host_weights[own]
    new = Picked(priority, chunk.start + row.astype(np.int64), labels, weights, chunk.rows[own])
    both = [np.concatenate(pair) for pair in zip(picked, new, strict=True)]
    return picking.best(both, n_picked)
