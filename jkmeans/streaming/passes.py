"""One pass over a source: what is summed on the devices, and which rows are picked on the way.

A `Program` says what each chunk adds. Every device adds up its own rows, without talking to the
others; one all-reduce ends the pass. Sums are pairs of numbers (a sum and what rounding left out
of it), so that 10⁸ terms add up as in float64.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans import kmeans, processes
from jkmeans.errors import UserError
from jkmeans.kmeans.initialization import draw_priorities
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
from jkmeans.streaming.pipeline import (
    BLOCK_ROWS,
    Chunk,
    Feeder,
    computed_dtype,
    refuse_not_finite,
)

# Chunks with the devices at a time: one computes while the next one is on its way.
IN_FLIGHT = 2
MEETING_CHUNKS = 8
"""Of several processes: chunks between two places where they agree to stop, to save, to refuse."""


class Rows(NamedTuple):
    """The rows of a chunk that one device has.

    Attributes:
      x: [n, d].
      weights: [n] or None for ones; 0 for padding.
      valid: [n] bool, False for padding and for rows of weight 0.
      index: [n] uint32, global row numbers.
    """

    x: jax.Array
    weights: jax.Array | None
    valid: jax.Array
    index: jax.Array


class Contribution(NamedTuple):
    """What a device's rows of a chunk add to a pass.

    Attributes:
      numbers: [p] float, to be added up.
      priority: [n] float: the rows of highest priority are picked. None to pick none.
      labels: [n] int32, known of the rows picked. None for none.
    """

    numbers: jax.Array
    priority: jax.Array | None = None
    labels: jax.Array | None = None


Program = Callable[..., Contribution]
"""From Rows and parameters (replicated arrays) to a Contribution."""


class Picked(NamedTuple):
    """Rows picked in a pass, highest priority first; among equals, in the order of the source.

    Attributes:
      priority: [m] float32.
      index: [m] int64, global row numbers.
      labels: [m] int32.
      weights: [m] float64.
      rows: [m, d], of the type that rows have on the devices.
    """

    priority: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


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


def statistics(rows: Rows, centroids: jax.Array, shift: jax.Array) -> Contribution:
    """Sums [k, d] of x − shift, counts [k] and inertia of the clusters; farthest rows first."""
    k = centroids.shape[0]
    nearest = kmeans.nearest(rows.x, centroids)
    distances = jnp.where(rows.valid, _distances(rows.x, centroids, nearest), 0)
    # Out of range: padding is left out of sums and counts.
    labels = jnp.where(rows.valid, nearest, k)
    added = kmeans.cluster_statistics(
        rows.x, labels, k, weights=rows.weights, distances=distances, shift=shift
    )
    numbers = jnp.concatenate([added.sums.reshape(-1), added.counts, added.inertia[None]])
    return Contribution(numbers, jnp.where(rows.valid, distances, -jnp.inf), nearest)


def counts(rows: Rows, candidates: jax.Array) -> Contribution:
    """The weight [k] of the rows nearest to each candidate."""
    k = candidates.shape[0]
    labels = jnp.where(rows.valid, kmeans.nearest(rows.x, candidates), k)
    # Only the counts are wanted, so rows without features are summed.
    added = kmeans.cluster_statistics(rows.x[:, :0], labels, k, weights=rows.weights)
    return Contribution(added.counts)


def moments(rows: Rows, shift: jax.Array, key: jax.Array) -> Contribution:
    """Row count, Σ(x − shift) and Σ(x − shift)² of each feature; rows drawn by weight."""
    x = jnp.where(rows.valid[:, None], rows.x.astype(shift.dtype) - shift[None, :], 0)
    n = jnp.sum(rows.valid).astype(shift.dtype)
    numbers = jnp.concatenate([n[None], jnp.sum(x, axis=0), jnp.sum(x**2, axis=0)])
    weights = _weights(rows, shift.dtype)
    return Contribution(numbers, draw_priorities(key, weights, weights, rows.index))


def moments_and_sample(rows: Rows, shift: jax.Array, key: jax.Array) -> Contribution:
    """As `moments`, but rows are drawn uniformly."""
    weights = _weights(rows, shift.dtype)
    drawn = draw_priorities(key, jnp.ones_like(weights), weights, rows.index)
    return moments(rows, shift, key)._replace(priority=drawn)


def draw(rows: Rows, candidates: jax.Array, key: jax.Array) -> Contribution:
    """The potential Σ w D²; rows drawn by w D², D² the squared distance to the candidates."""
    closest = _closest(rows.x, candidates)
    weights = _weights(rows, closest.dtype)
    scores = jnp.where(rows.valid, weights * closest, 0)
    return Contribution(jnp.sum(scores)[None], draw_priorities(key, scores, weights, rows.index))


def potentials(rows: Rows, candidates: jax.Array, trials: jax.Array) -> Contribution:
    """The potential [t] that each trial would leave if it joined the candidates."""
    closest = _closest(rows.x, candidates)
    weights = _weights(rows, closest.dtype)

    def potential(trial: jax.Array) -> jax.Array:
        distances = jnp.sum((rows.x.astype(trial.dtype) - trial[None, :]) ** 2, axis=1)
        left = jnp.minimum(closest, distances)
        return jnp.sum(jnp.where(rows.valid, weights * left, 0))

    return Contribution(lax.map(potential, trials))


def _distances(x: jax.Array, centroids: jax.Array, labels: jax.Array) -> jax.Array:
    """`kmeans.squared_distances`, [n]; on a CPU three times as fast.

    There a block of rows stays in the cache, and XLA's sum along a row is scalar code, where a
    product with ones is vectorised.
    """
    n, d = x.shape
    if n % BLOCK_ROWS or jax.default_backend() != "cpu":
        return kmeans.squared_distances(x, centroids, labels)
    ones = jnp.ones((d, 1), centroids.dtype)

    def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        squares = (block[0].astype(centroids.dtype) - centroids[block[1]]) ** 2
        return jnp.matmul(squares, ones, precision=lax.Precision.HIGHEST)[:, 0]

    blocks = (x.reshape(-1, BLOCK_ROWS, d), labels.reshape(-1, BLOCK_ROWS))
    return lax.map(of_block, blocks).reshape(-1)


def _closest(x: jax.Array, candidates: jax.Array) -> jax.Array:
    return _distances(x, candidates, kmeans.nearest(x, candidates))


def _weights(rows: Rows, dtype: Any) -> jax.Array:
    return rows.valid.astype(dtype) if rows.weights is None else rows.weights.astype(dtype)


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
    mesh = feeder.mesh
    n_devices = mesh.shape[DATA_AXIS]
    parameters = tuple(
        value if isinstance(value, jax.Array) else place(value, mesh, REPLICATED)
        for value in parameters
    )
    if partial is None:
        one_row = Rows(
            jnp.zeros((1, feeder.source.n_features), feeder.dtype),
            None,
            jnp.ones(1, bool),
            jnp.zeros(1, jnp.uint32),
        )
        n_numbers = jax.eval_shape(program, one_row, *parameters).numbers.size
        zeros = np.zeros((n_devices, n_numbers), computed_dtype(feeder.source))
        nothing = Picked(
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0),
            np.zeros((0, feeder.source.n_features), feeder.dtype),
        )
        partial = Partial(0, zeros, zeros, nothing)
    elif len(partial.high) != n_devices:
        partial = _for_devices(partial, n_devices)
    high, low = place(partial.high, mesh, SHARDED), place(partial.low, mesh, SHARDED)
    position, picked = partial.position, partial.picked

    with feeder.chunks(position) as chunks:
        in_flight: deque[tuple[Chunk, _Found]] = deque()

        refusal: UserError | None = None

        def meet() -> None:
            # A row that one process refuses ends the pass of all.
            def say() -> None:
                if refusal is not None:
                    raise refusal

            processes.together(say)

        def finish_oldest() -> None:
            nonlocal position, picked, refusal
            chunk, found = in_flight.popleft()
            if not local_rows(found.finite).all():
                try:
                    refuse_not_finite(
                        chunk.rows,
                        chunk.host_weights,
                        chunk.start + chunk.first,
                        feeder.source.name,
                    )
                except UserError as error:
                    if processes.count() == 1:
                        raise
                    refusal = refusal or error
            picked = _merge(picked, chunk, found, n_picked)
            position = chunk.start + chunk.count
            chunks.release(chunk)

        def snapshot() -> Partial:
            while in_flight:
                finish_oldest()
            every = _of_all(picked, n_picked)
            return Partial(position, to_host(high).copy(), to_host(low).copy(), every)

        several = processes.count() > 1
        for n_chunks, chunk in enumerate(chunks, start=1):
            found = contribute(
                chunk.x,
                chunk.weights,
                np.uint32(chunk.start),
                np.int32(chunk.count),
                parameters,
                program=program,
                mesh=mesh,
                n_picked=n_picked,
            )
            high, low = accumulate(high, low, found.numbers)
            in_flight.append((chunk, found))
            if len(in_flight) == IN_FLIGHT:
                finish_oldest()
            if not several:
                on_chunk(position, snapshot)
            elif n_chunks % MEETING_CHUNKS == 0:
                meet()
                on_chunk(position, snapshot)
        while in_flight:
            finish_oldest()
        meet()
        picked = _of_all(picked, n_picked)
    with jax.enable_x64(True):
        numbers = np.asarray(reduce(high, low, mesh=mesh))
    return numbers, picked


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
    return _best(both, n_picked)


def _best(columns: list[np.ndarray], n_picked: int) -> Picked:
    order = np.lexsort((columns[1], -columns[0]))[:n_picked]
    return Picked(*(array[order] for array in columns))


def _of_all(picked: Picked, n_picked: int) -> Picked:
    """The rows that all processes together have picked, on each of them."""
    if processes.count() == 1 or not n_picked:
        return picked
    from jax.experimental import multihost_utils

    # One shape for all: what is lacking has a priority below that of any row.
    n_missing = n_picked - len(picked.priority)
    filled = [
        np.concatenate([array, np.zeros((n_missing, *array.shape[1:]), array.dtype)])
        for array in picked
    ]
    there = np.arange(n_picked) < len(picked.priority)
    # As bytes: float64 and int64 would come back with 32 bits where JAX has no 64 enabled.
    gathered = [
        np.asarray(multihost_utils.process_allgather(array.view(np.uint8).reshape(n_picked, -1)))
        for array in map(np.ascontiguousarray, [*filled, there])
    ]
    columns = [
        np.ascontiguousarray(got.reshape(-1, got.shape[-1]))
        .view(array.dtype)
        .reshape(-1, *array.shape[1:])
        for got, array in zip(gathered, [*filled, there], strict=True)
    ]
    real = columns.pop()
    return _best([column[real] for column in columns], n_picked)
