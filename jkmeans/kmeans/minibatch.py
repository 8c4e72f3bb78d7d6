"""Mini-batch k-means: small random batches, a learning rate for each centroid.

A step assigns the rows of a batch and moves each centroid towards the mean of its rows: after the
step it is the mean of all rows it was ever given. `minibatch` runs all steps as one program.

Source: Sculley, Web-scale k-means clustering, WWW 2010, algorithm 1; reassignment of centroids that
get few rows, and the rules for stopping, as in scikit-learn's ``MiniBatchKMeans``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.assignment import assign
from jkmeans.kmeans.collectives import (
    AxisName,
    all_sum,
    n_devices,
    row_numbers,
    top_k_rows,
    vary_like,
)
from jkmeans.kmeans.initialization import INITIALIZATIONS
from jkmeans.kmeans.statistics import centroids_from, cluster_statistics
from jkmeans.kmeans.updates import move_towards


class MiniBatchState(NamedTuple):
    """What a step needs to know of those before it.

    Attributes:
      centroids: [k, d] float.
      counts: [k] float, the weight of the rows that each centroid was given.
      since_reassignment: [] int32, rows seen since centroids of low count were last looked for.
    """

    centroids: jax.Array
    counts: jax.Array
    since_reassignment: jax.Array


class MiniBatchResult(NamedTuple):
    """Where mini-batch k-means stopped.

    Attributes:
      state: after the last step.
      n_steps: [] int32, the steps done.
      ewa_inertia: [] float, the exponentially weighted average of the batches' mean inertia; NaN
        where only one step was done.
    """

    state: MiniBatchState
    n_steps: jax.Array
    ewa_inertia: jax.Array


class _Progress(NamedTuple):
    state: MiniBatchState
    step: jax.Array
    ewa: jax.Array
    lowest: jax.Array
    no_improvement: jax.Array
    done: jax.Array


def initial_state(centroids: jax.Array) -> MiniBatchState:
    """The state before the first step: no centroid has been given a row."""
    return MiniBatchState(
        centroids=centroids,
        counts=jnp.zeros(centroids.shape[0], centroids.dtype),
        since_reassignment=jnp.zeros((), jnp.int32),
    )


def minibatch_step(
    key: jax.Array,
    state: MiniBatchState,
    x: jax.Array,
    *,
    weights: jax.Array | None = None,
    n_rows: int | jax.Array | None = None,
    reassignment_ratio: float | jax.Array = 0.01,
    axis_name: AxisName = None,
) -> tuple[MiniBatchState, jax.Array]:
    """One step on one batch.

    With v_k the count of centroid k before and m_k, w_k the weighted mean and weight of its rows in
    the batch, c_k ← c_k − w_k / (v_k + w_k) (c_k − m_k). Then, once 10 k rows were seen since the
    last time or while a centroid has never been given a row, centroids whose count is below
    ``reassignment_ratio`` times the largest (the lowest counts first, half a batch at most) move
    to random rows of the batch, and take the lowest count of the others.

    Args:
      key: a JAX random key, the same on all devices.
      state: of the steps before.
      x: [b, d], any real dtype; the local rows of the batch inside ``shard_map``.
      weights: [b] float, at least 0; None for ones. Rows of weight 0 are never chosen.
      n_rows: [] int, the rows of the batch over all devices without padding; None for b times the
        devices.
      reassignment_ratio: [] float, at least 0; 0 never reassigns. May be traced.
      axis_name: the mesh axis that the batch is sharded over, or None.

    Returns:
      The new state, and the inertia of the batch under the old centroids: [] float.
    """
    k, dtype = state.centroids.shape[0], state.centroids.dtype
    labels, distances = assign(x, state.centroids)
    found = cluster_statistics(
        x, labels, k, weights=weights, distances=distances, axis_name=axis_name
    )
    counts = state.counts + found.counts.astype(dtype)
    rates = found.counts.astype(dtype) / jnp.where(found.counts > 0, counts, 1)
    means = centroids_from(found, state.centroids)
    centroids = move_towards(state.centroids, means, rates[:, None])

    n_batch = x.shape[0] * n_devices(axis_name)
    n_rows = n_batch if n_rows is None else n_rows
    since = state.since_reassignment + jnp.asarray(n_rows, jnp.int32)
    # Of the counts before this step, as in scikit-learn.
    due = jnp.any(state.counts == 0) | (since >= 10 * k)
    low = counts < reassignment_ratio * jnp.max(counts)
    low &= jnp.argsort(jnp.argsort(counts)) < n_rows // 2
    at_most = min(k, n_batch // 2)
    if at_most > 0:
        centroids, counts = lax.cond(
            due & jnp.any(low),
            lambda: _reassign(key, x, weights, centroids, counts, low, at_most, axis_name),
            lambda: (centroids, counts),
        )
    return MiniBatchState(centroids, counts, jnp.where(due, 0, since)), found.inertia


def minibatch(
    key: jax.Array,
    x: jax.Array,
    n_clusters: int,
    *,
    init: str | jax.Array = "k-means++",
    n_init: int = 1,
    init_size: int | None = None,
    batch_size: int = 1024,
    n_steps: int | jax.Array = 1000,
    tol: float | jax.Array = 0.0,
    max_no_improvement: int | jax.Array | None = 10,
    reassignment_ratio: float | jax.Array = 0.01,
    weights: jax.Array | None = None,
    n_rows: int | jax.Array | None = None,
    axis_name: AxisName = None,
) -> MiniBatchResult:
    """Mini-batch k-means: initialise on a sample, then step until nothing improves.

    Batches are drawn with replacement, a row with probability proportional to its weight; inside a
    batch every row counts once. Rows are numbered over all devices and drawn by number, so that
    batches do not depend on the devices.

    Args:
      key: a JAX random key, the same on all devices.
      x: [n, d], any real dtype; the local rows inside ``shard_map``, padding last.
      n_clusters: k.
      init: a name in INITIALIZATIONS, or the first centroids [k, d].
      n_init: samples that are tried; the one whose centroids have the lowest inertia on another
        sample is taken.
      init_size: rows of a sample, drawn uniformly; None for all rows, each once.
      batch_size: b.
      n_steps: [] int, steps at most. May be traced.
      tol: [] float; above 0, a step whose squared shift of the centroids is at most this is the
        last. May be traced.
      max_no_improvement: [] int; stop after as many steps in a row in which the average inertia
        has no new minimum. None never does.
      reassignment_ratio: see ``minibatch_step``.
      weights: [n] float, at least 0, 0 for padding; None for ones.
      n_rows: [] int, the rows over all devices that are not padding; None for all.
      axis_name: the mesh axis that rows are sharded over, or None.

    Returns:
      MiniBatchResult.

    Raises:
      ValueError: an unknown ``init``, or fewer than k rows in a sample.
    """
    x = jnp.asarray(x)
    n_rows = x.shape[0] * n_devices(axis_name) if n_rows is None else n_rows
    draw = _drawer(weights, n_rows, axis_name)
    if isinstance(init, str):
        centroids = _initialize(
            key, x, n_clusters, init, n_init, init_size, weights, n_rows, axis_name
        )
    else:
        centroids = jnp.asarray(init)
    dtype = jnp.promote_types(jnp.result_type(x, centroids), jnp.float32)
    centroids = vary_like(centroids.astype(dtype), x, weights, reduced=axis_name)
    alpha = jnp.minimum(2 * batch_size / (n_rows + 1), 1).astype(dtype)
    batch_key = jax.random.fold_in(key, 1)
    # A batch is spread over the devices; the rows that fill it up have weight 0.
    devices = n_devices(axis_name)
    n_padded = -(-batch_size // devices) * devices

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.step < n_steps) & ~progress.done

    def step(progress: _Progress) -> _Progress:
        rows_key, reassign_key = jax.random.split(jax.random.fold_in(batch_key, progress.step))
        batch, counts = _spread(x, draw(rows_key, batch_size), n_padded, axis_name)
        state, inertia = minibatch_step(
            reassign_key,
            progress.state,
            batch,
            weights=counts,
            n_rows=batch_size,
            reassignment_ratio=reassignment_ratio,
            axis_name=axis_name,
        )
        mean = (inertia / batch_size).astype(dtype)
        # The first step's inertia is that of the initialisation, and not looked at.
        first, second = progress.step == 0, progress.step == 1
        ewa = jnp.where(second, mean, progress.ewa * (1 - alpha) + mean * alpha)
        ewa = jnp.where(first, jnp.nan, ewa)
        better = ewa < progress.lowest
        no_improvement = jnp.where(first | better, 0, progress.no_improvement + 1)
        shift = jnp.sum((state.centroids - progress.state.centroids) ** 2)
        done = (tol > 0) & (shift <= tol)
        if max_no_improvement is not None:
            done |= no_improvement >= max_no_improvement
        return _Progress(
            state=state,
            step=progress.step + 1,
            ewa=ewa,
            lowest=jnp.where(better, ewa, progress.lowest),
            no_improvement=no_improvement,
            done=done & ~first,
        )

    def start(value) -> jax.Array:
        return vary_like(value, x, weights, centroids, reduced=axis_name)

    progress = _Progress(
        state=jax.tree.map(start, initial_state(centroids)),
        step=start(jnp.zeros((), jnp.int32)),
        ewa=start(jnp.full((), jnp.nan, dtype)),
        lowest=start(jnp.full((), jnp.inf, dtype)),
        no_improvement=start(jnp.zeros((), jnp.int32)),
        done=start(jnp.zeros((), bool)),
    )
    progress = lax.while_loop(unfinished, step, progress)
    return MiniBatchResult(progress.state, progress.step, progress.ewa)


def gather_rows(values: jax.Array, rows: jax.Array, axis_name: AxisName) -> jax.Array:
    """Rows by their global number, from whichever device has them: [*rows.shape, ...], on all.

    Args:
      values: [n, ...], the local rows.
      rows: int32 of any shape, the same on all devices.
      axis_name: the mesh axis, or None.
    """
    if axis_name is None:
        return values[rows]
    n_local = values.shape[0]
    local = rows - n_local * lax.axis_index(axis_name)
    here = (local >= 0) & (local < n_local)
    here = here.reshape(here.shape + (1,) * (values.ndim - 1))
    # A sum of zeros and one row, which is exact; small types are not summed by every backend.
    wide = jnp.promote_types(values.dtype, jnp.float32)
    found = values[jnp.clip(local, 0, n_local - 1)].astype(wide)
    return lax.psum(jnp.where(here, found, 0), axis_name)


def _spread(x, rows, n_padded, axis_name) -> tuple[jax.Array, jax.Array | None]:
    """This device's part of a batch, and the weights of its rows (0 for padding)."""
    if axis_name is None:
        return x[rows], None
    n_local, n_batch = x.shape[0], rows.shape[0]
    numbers = jnp.pad(rows, (0, n_padded - n_batch), constant_values=-1)
    local = numbers - n_local * lax.axis_index(axis_name)
    here = (numbers >= 0) & (local >= 0) & (local < n_local)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    found = jnp.where(here[:, None], x[jnp.clip(local, 0, n_local - 1)].astype(wide), 0)
    # Every device sends the rows it has to the device that works on them.
    batch = lax.psum_scatter(found, axis_name, scatter_dimension=0, tiled=True)
    first = batch.shape[0] * lax.axis_index(axis_name)
    return batch, (first + jnp.arange(batch.shape[0]) < n_batch).astype(wide)


def _drawer(weights, n_rows, axis_name):
    """A function (key, number) -> [number] int32: rows drawn with replacement by weight."""
    if weights is None:
        return lambda key, number: jax.random.randint(key, (number,), 0, n_rows, jnp.int32)
    # The cumulative sum of all weights in one float32 would round the weight of a row away. So
    # two sums: over blocks of about √n rows, and inside of a block. Blocks are cut by global row
    # numbers, and so do not depend on the devices.
    n_all = weights.shape[0] * n_devices(axis_name)
    n_block = 2 ** round(math.log2(n_all) / 2)
    n_blocks = -(-n_all // n_block)
    block_of_row = row_numbers(weights, axis_name) // n_block
    block_sums = all_sum(jax.ops.segment_sum(weights, block_of_row, n_blocks), axis_name)
    bounds = jnp.cumsum(block_sums)

    def draw(key: jax.Array, number: int) -> jax.Array:
        block_key, row_key = jax.random.split(key)
        target = jax.random.uniform(block_key, (number,), bounds.dtype) * bounds[-1]
        block = jnp.searchsorted(bounds, target, side="right")
        # Rounding may reach the end of the last block, or one that holds nothing.
        last = jnp.max(jnp.where(block_sums > 0, jnp.arange(n_blocks), 0))
        block = jnp.minimum(block, last).astype(jnp.int32)
        rows = block[:, None] * n_block + jnp.arange(n_block, dtype=jnp.int32)[None, :]
        inside = gather_rows(weights, jnp.minimum(rows, n_all - 1), axis_name)
        inside = jnp.where(rows < n_all, inside, 0)
        within = jnp.cumsum(inside, axis=1)
        target = jax.random.uniform(row_key, (number, 1), bounds.dtype) * within[:, -1:]
        offset = jnp.sum(within <= target, axis=1)
        last = jnp.max(jnp.where(inside > 0, jnp.arange(n_block)[None, :], 0), axis=1)
        return block * n_block + jnp.minimum(offset, last).astype(jnp.int32)

    return draw


def _initialize(key, x, n_clusters, init, n_init, init_size, weights, n_rows, axis_name):
    """The best of ``n_init`` initialisations, each on a sample of the rows, judged on another."""
    if init not in INITIALIZATIONS:
        raise ValueError(f"init={init!r}: expected an array or one of {', '.join(INITIALIZATIONS)}")
    initialize = INITIALIZATIONS[init]
    n_all = x.shape[0] * n_devices(axis_name)

    def sample(sample_key) -> tuple[jax.Array, jax.Array]:
        size = n_all if init_size is None else init_size
        rows = jnp.arange(n_all, dtype=jnp.int32)
        if init_size is not None:
            rows = jax.random.randint(sample_key, (size,), 0, n_rows, jnp.int32)
        points = gather_rows(x, rows, axis_name)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        ones = jnp.ones(x.shape[0], dtype) if weights is None else weights
        return points, gather_rows(ones, rows, axis_name) * (rows < n_rows)

    judges, judges_weights = sample(jax.random.fold_in(key, 0))
    init_key = jax.random.fold_in(key, 2)

    def attempt(i):
        sample_key, own_key = jax.random.split(jax.random.fold_in(init_key, i))
        points, point_weights = sample(sample_key)
        # Every device does the same: a sample is small.
        centroids = initialize(own_key, points, n_clusters, weights=point_weights)
        if n_init == 1:
            return centroids, jnp.zeros((), centroids.dtype)
        distances = assign(judges, centroids).distances
        return centroids, jnp.sum(judges_weights * distances)

    if n_init == 1:
        return attempt(0)[0]
    centroids, inertias = lax.map(attempt, jnp.arange(n_init))
    return centroids[jnp.argmin(inertias)]


def _reassign(key, x, weights, centroids, counts, low, at_most, axis_name):
    """Moves the centroids marked ``low`` to different random rows of the batch."""
    k = centroids.shape[0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_numbers(x, axis_name))
    priority = jax.vmap(jax.random.uniform)(keys)
    if weights is not None:
        priority = jnp.where(weights > 0, priority, -1)
    values, row, local = top_k_rows(priority, at_most, axis_name)
    rows = all_sum(jnp.where(local[:, None], x[row].astype(centroids.dtype), 0), axis_name)
    (clusters,) = jnp.nonzero(low, size=at_most, fill_value=k)
    clusters = jnp.where(values >= 0, clusters, k)
    reassigned = jnp.zeros(k, bool).at[clusters].set(True, mode="drop")
    lowest = jnp.min(jnp.where(reassigned, jnp.inf, counts))
    return (
        centroids.at[clusters].set(rows, mode="drop"),
        jnp.where(reassigned, lowest, counts),
    )


__all__ = [
    "MiniBatchResult",
    "MiniBatchState",
    "gather_rows",
    "initial_state",
    "minibatch",
    "minibatch_step",
]
