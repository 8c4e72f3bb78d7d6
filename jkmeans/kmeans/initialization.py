"""First centroids: a random sample, k-means++ and k-means‖.

What is chosen does not depend on how rows are spread over devices, except where rounding in a sum
over devices decides between two near-equal candidates. k-means++ draws single rows by their place
in the cumulative sum of D² over all rows. `sample` and k-means‖ draw many different rows at once:
every row has noise of its own, drawn from ``fold_in(key, its global number)``, and rows are chosen
by the largest noisy score (the Gumbel top-k trick).

Every initialisation has the signature ``(key, x, n_clusters, *, weights, index, axis_name)`` and is
listed in ``INITIALIZATIONS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.assignment import accumulation_dtype, assign, map_rows, score
from jkmeans.kmeans.collectives import (
    AxisName,
    all_sum,
    axis_index,
    n_devices,
    per_block,
    row_numbers,
    stack_devices,
    top_k_rows,
    vary_like,
)
from jkmeans.kmeans.statistics import cluster_statistics

# Added to the log-score of a row that repeats a centroid already chosen: below any other row's
# log-score, and small enough for the noise to keep three digits.
_LAST_RESORT = -1e4
# Rows of a block of the cumulative sum.
_DRAW_ROWS = 1024


def sample(
    key: jax.Array,
    x: jax.Array,
    n_clusters: int,
    *,
    weights: jax.Array | None = None,
    index: jax.Array | None = None,
    axis_name: AxisName = None,
    centroid_axis: AxisName = None,
) -> jax.Array:
    """Different rows, drawn uniformly from those with weight above 0.

    Args:
      key: a JAX random key, the same on all devices.
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      n_clusters: k.
      weights: [n] float, at least 0; only whether it is above 0 matters. None for ones.
      index: [n] int32, the global number of each row; by default rows are numbered in order, over
        the devices too.
      axis_name: the mesh axis that rows are sharded over, or None.
      centroid_axis: a second mesh axis, on each device of which is an equal part of the result.

    Returns:
      [k, d] float32 (float64 if x is), the same on all devices of ``axis_name``. With fewer than k
      rows of weight above 0, rows are repeated.

    Raises:
      ValueError: x has fewer than k rows or is no matrix, or k is below 1.
    """
    x, weights, index = _prepare(x, n_clusters, weights, index, axis_name)
    priority = draw_priorities(key, jnp.ones_like(weights), weights, index)
    if centroid_axis is None:
        return _choose(priority, x, n_clusters, axis_name)
    row, local = _choose_rows(priority, n_clusters, axis_name)
    part = n_clusters // n_devices(centroid_axis)
    first = part * axis_index(centroid_axis)
    row, local = (lax.dynamic_slice_in_dim(a, first, part) for a in (row, local))
    return _gather(x, row, local, axis_name)


def kmeans_plus_plus(
    key: jax.Array,
    x: jax.Array,
    n_clusters: int,
    *,
    weights: jax.Array | None = None,
    index: jax.Array | None = None,
    n_local_trials: int | None = None,
    axis_name: AxisName = None,
    block_size: int | None = None,
) -> jax.Array:
    """Greedy k-means++: each new centroid is the best of a few rows drawn by D².

    With D(x)² the squared distance of x to the nearest centroid so far, each round draws
    ``n_local_trials`` rows with probability proportional to w(x) D(x)² and keeps the one that
    lowers the potential Σ w D² most. A round takes three small all-reduces.

    Args:
      key: a JAX random key, the same on all devices.
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      n_clusters: k.
      weights: [n] float, at least 0; rows of weight 0 are never chosen. None for ones.
      index: unused: rows are drawn by their place.
      n_local_trials: rows drawn in a round; by default 2 + ⌊log k⌋. 1 is plain k-means++.
      axis_name: the mesh axis that rows are sharded over, or None.
      block_size: rows compared with the trials at a time; None for what suits the device.

    Returns:
      [k, d] float32 (float64 if x is), rows of x, the same on all devices; different ones as long
      as x has k different rows of weight above 0.

    Raises:
      ValueError: x has fewer than k rows or is no matrix, or k is below 1.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007,
    section 2.2; the greedy variant is that of its conclusion.
    """
    x, weights, index = _prepare(x, n_clusters, weights, index, axis_name)
    n_rows = x.shape[0] * n_devices(axis_name)
    if n_clusters > n_rows:
        raise ValueError(f"{n_clusters} rows are wanted, but x has only {n_rows}")
    trials = 2 + int(math.log(n_clusters)) if n_local_trials is None else n_local_trials
    distances_to = _distances_to(x, weights, axis_name, block_size)

    def choose_next(i, carry):
        centroids, closest = carry
        row, local = _draw(jax.random.fold_in(key, i), weights, closest, trials, axis_name)
        candidates = _gather(x, row, local, axis_name)
        distances = jnp.minimum(closest[None, :], distances_to(candidates))
        potentials = all_sum(per_block(_potentials, axis_name)(weights, distances), axis_name)
        best = jnp.argmin(potentials)
        return centroids.at[i].set(candidates[best]), distances[best]

    row, local = _draw(jax.random.fold_in(key, 0), weights, jnp.ones_like(weights), 1, axis_name)
    first = _gather(x, row, local, axis_name)
    centroids = vary_like(jnp.zeros((n_clusters, x.shape[1]), x.dtype), first).at[0].set(first[0])
    closest = distances_to(first)[0]
    centroids, _ = lax.fori_loop(1, int(n_clusters), choose_next, (centroids, closest))
    return centroids


def kmeans_parallel(
    key: jax.Array,
    x: jax.Array,
    n_clusters: int,
    *,
    weights: jax.Array | None = None,
    index: jax.Array | None = None,
    oversampling_factor: float = 2.0,
    n_rounds: int = 5,
    axis_name: AxisName = None,
    block_size: int | None = None,
) -> jax.Array:
    """k-means‖: many candidates in a few passes over the data, then k-means++ among them.

    Starting from one row, each of ``n_rounds`` rounds draws ℓ = oversampling_factor · k rows by
    w(x) D(x)². Every candidate is weighted by the rows nearest to it, and weighted k-means++
    chooses k of them. For large k it needs far fewer passes than k-means++.

    Where the paper keeps each row independently with probability ℓ D²/φ, ℓ rows are drawn without
    replacement with probabilities proportional to w D²: the arrays of a compiled program have
    fixed sizes.

    Args:
      key: a JAX random key, the same on all devices.
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      n_clusters: k.
      weights: [n] float, at least 0; rows of weight 0 are never chosen. None for ones.
      index: [n] int32, the global number of each row; by default rows are numbered in order, over
        the devices too.
      oversampling_factor: ℓ / k, above 0.
      n_rounds: passes over the data; there are 1 + n_rounds · ℓ candidates.
      axis_name: the mesh axis that rows are sharded over, or None.
      block_size: rows assigned at a time; None for what suits the device.

    Returns:
      [k, d] float32 (float64 if x is), rows of x, the same on all devices; different ones as long
      as the candidates hold k different rows.

    Raises:
      ValueError: x has fewer than k rows or is no matrix, k is below 1, or there are fewer than k
        candidates.

    Source: Bahmani et al., Scalable k-means++, VLDB 2012, algorithm 2.
    """
    x, weights, index = _prepare(x, n_clusters, weights, index, axis_name)
    n_rows = x.shape[0] * n_devices(axis_name)
    if n_clusters > n_rows:
        raise ValueError(f"{n_clusters} rows are wanted, but x has only {n_rows}")
    per_round = min(max(1, round(oversampling_factor * n_clusters)), n_rows)
    n_candidates = 1 + n_rounds * per_round
    if n_candidates < n_clusters:
        raise ValueError(
            f"oversampling_factor={oversampling_factor} and n_rounds={n_rounds} give "
            f"{n_candidates} candidates for {n_clusters} clusters: raise one of them"
        )

    assign_rows = per_block(partial(assign, block_size=block_size), axis_name)

    def draw(r, carry):
        candidates, labels, closest = carry
        priority = draw_priorities(jax.random.fold_in(key, r), weights * closest, weights, index)
        drawn = _choose(priority, x, per_round, axis_name)
        nearest = assign_rows(x, drawn)
        # Strictly nearer: a candidate that repeats an earlier one gets no rows, hence no weight.
        nearer = nearest.distances < closest
        first = 1 + (r - 1) * per_round
        labels = jnp.where(nearer, first + nearest.labels, labels)
        closest = jnp.where(nearer, nearest.distances, closest)
        return lax.dynamic_update_slice_in_dim(candidates, drawn, first, 0), labels, closest

    first = _choose(
        draw_priorities(jax.random.fold_in(key, 0), weights, weights, index), x, 1, axis_name
    )
    candidates = vary_like(jnp.zeros((n_candidates, x.shape[1]), x.dtype), first)
    candidates = candidates.at[0].set(first[0])
    closest = assign_rows(x, first).distances
    labels = vary_like(jnp.zeros(x.shape[0], jnp.int32), closest)
    candidates, labels, _ = lax.fori_loop(1, n_rounds + 1, draw, (candidates, labels, closest))
    # Only the counts are wanted, so rows without features are summed.
    counts = cluster_statistics(
        x[:, :0], labels, n_candidates, weights=weights, axis_name=axis_name
    ).counts
    key = jax.random.fold_in(key, n_rounds + 1)
    return kmeans_plus_plus(key, candidates, n_clusters, weights=counts, block_size=block_size)


INITIALIZATIONS: dict[str, Callable[..., jax.Array]] = {
    "sample": sample,
    "k-means++": kmeans_plus_plus,
    "k-means||": kmeans_parallel,
}


def _distances_to(x: jax.Array, weights: jax.Array, axis_name: AxisName, block_size: int | None):
    """A function from candidates [t, d] to the squared distances of all rows from them: [t, n].

    A row is at 0 from itself and from rows that equal it, and from no others.
    """
    n, d = x.shape
    if d <= 8:

        def one_by_one(candidates) -> jax.Array:
            columns = ((x[None, :, j] - candidates[:, j, None]) ** 2 for j in range(d))
            return sum(columns, jnp.zeros((candidates.shape[0], n), x.dtype))

        return one_by_one
    # As products: ‖x‖² − 2x·c + ‖c‖², around the mean. Where rounding could be all that is left, in
    # the blocks of the candidates themselves, from the differences.
    counted = per_block(_sum_of_counted, axis_name)(x, weights)
    total, n_counted = all_sum(counted, axis_name)
    mean = (total / jnp.maximum(n_counted, 1))[None, :]
    doubt = 4 * (16 + math.sqrt(d)) * float(jnp.finfo(x.dtype).eps)

    def distances_of(x, mean, candidates) -> jax.Array:
        shifted = candidates - mean
        half_norms = 0.5 * jnp.sum(shifted**2, axis=1)

        def to_rows(x_bd: jax.Array) -> jax.Array:
            centered = x_bd - mean
            norms = jnp.sum(centered**2, axis=1)
            squared = 2 * score(centered, shifted, half_norms) + norms[None, :]
            reach = jnp.sqrt(2 * half_norms)[:, None] + jnp.sqrt(norms)[None, :]

            def as_differences() -> jax.Array:
                each = lax.map(lambda c: jnp.sum((x_bd - c[None, :]) ** 2, axis=1), candidates)
                return jnp.where(squared > doubt * reach**2, squared, each)

            near = jnp.any(~(squared > doubt * reach**2))
            return lax.cond(near, as_differences, lambda: squared).T

        return map_rows(to_rows, x, block_size).T

    def as_products(candidates) -> jax.Array:
        return per_block(distances_of, axis_name)(x, mean, candidates)

    return as_products


def _sum_of_counted(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(jnp.where(weights[:, None] > 0, x, 0), axis=0), jnp.sum(weights > 0)


def _potentials(weights: jax.Array, distances_tn: jax.Array) -> jax.Array:
    """Σ w D² for each of several D²: [t]."""
    weighted = jnp.where(weights[None, :] > 0, weights[None, :] * distances_tn, 0)
    return jnp.sum(weighted, axis=1)


def _draw(
    key: jax.Array, weights: jax.Array, scores: jax.Array, m: int, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """Draws m rows of all devices with probability proportional to weights · scores.

    With replacement; where all products are 0, by the weights alone.

    Returns:
      row [m] int32, a valid local row; local [m] bool, whether the choice is this device's ``row``
      (of exactly one device).
    """
    n = weights.shape[0]
    mass = jnp.where(weights > 0, weights * scores, 0)
    # The cumulative sum in two levels: of blocks of rows, and inside the block that is hit.
    rows = min(n, _DRAW_ROWS)
    n_blocks = -(-n // rows)

    def ends_of(padded: jax.Array) -> jax.Array:
        # A parallel sum need not grow everywhere; a search needs that it does.
        return lax.cummax(jnp.cumsum(jnp.sum(padded, axis=1)))

    def totals_of(mass: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        padded = jnp.pad(mass, (0, n_blocks * rows - n)).reshape(n_blocks, rows)
        ends = per_block(ends_of, axis_name)(padded)
        return padded, ends, all_sum(ends[-1], axis_name)

    padded, ends, everything = totals_of(mass)
    nothing = ~(everything > 0)
    by_weight = totals_of(jnp.where(weights > 0, weights, 0))
    padded = jnp.where(nothing, by_weight[0], padded)
    ends = jnp.where(nothing, by_weight[1], ends)
    first = jnp.zeros((), mass.dtype)
    everything = jnp.where(nothing, by_weight[2], everything)
    is_last = jnp.asarray(True)
    if axis_name is not None:
        device, devices = axis_index(axis_name), n_devices(axis_name)
        of_devices = stack_devices(ends[-1], axis_name)
        after = lax.cummax(jnp.cumsum(of_devices))
        everything = after[-1]
        first = jnp.where(device > 0, after[jnp.maximum(device - 1, 0)], 0)
        last_device = jnp.max(jnp.where(of_devices > 0, jnp.arange(devices), -1))
        is_last = device == last_device
        limit = after[device]
    else:
        limit = ends[-1]
    at = jax.random.uniform(key, (m,), mass.dtype) * everything
    local = (at >= first) & ((at < limit) | is_last) & (ends[-1] > 0)
    inside = jnp.clip(at - first, 0, ends[-1])
    place = per_block(_find, axis_name)(padded, ends, inside)
    return jnp.minimum(place, n - 1).astype(jnp.int32), local


def _find(padded: jax.Array, ends: jax.Array, inside: jax.Array) -> jax.Array:
    """Where in the cumulative sum of ``padded`` [blocks, rows] the values ``inside`` [m] fall."""
    n_blocks, rows = padded.shape
    block = jnp.searchsorted(ends, inside, side="right")
    # Rounding may lead past the last block, or into one without mass: the last one that has any.
    occupied = jnp.max(jnp.where(ends > jnp.append(0, ends[:-1]), jnp.arange(n_blocks), 0))
    block = jnp.minimum(block, occupied)
    inside = inside - jnp.where(block > 0, ends[jnp.maximum(block - 1, 0)], 0)
    of_block = padded[block]
    hit = (jnp.cumsum(of_block, axis=1) > inside[:, None]) & (of_block > 0)
    position = jnp.arange(rows)
    last = jnp.max(jnp.where(of_block > 0, position[None, :], 0), axis=1)
    return block * rows + jnp.where(jnp.any(hit, axis=1), jnp.argmax(hit, axis=1), last)


def _gather(x: jax.Array, row: jax.Array, local: jax.Array, axis_name: AxisName) -> jax.Array:
    """Rows of any device on all of them: [m, d]."""
    return all_sum(jnp.where(local[:, None], x[row], 0), axis_name)


def _prepare(x, n_clusters, weights, index, axis_name) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows in the dtype to compute in, weights and global row numbers filled in.

    Raises:
      ValueError: x is no matrix, or fewer than one cluster is wanted.
    """
    x = jnp.asarray(x, accumulation_dtype(x))
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}: expected [n, d]")
    if n_clusters < 1:
        raise ValueError(f"n_clusters={n_clusters}: expected at least 1")
    n = x.shape[0]
    weights = jnp.ones(n, x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
    if index is None:
        index = row_numbers(x, axis_name)
    # All three varying alike, so that what is made from them has one type in a loop.
    arrays = (x, weights, jnp.asarray(index))
    x, weights, index = (vary_like(array, *arrays) for array in arrays)
    return x, weights, index


def draw_priorities(
    key: jax.Array, scores: jax.Array, weights: jax.Array, index: jax.Array
) -> jax.Array:
    """log(scores) + Gumbel noise: its top k are k draws without replacement by the scores.

    Rows of score 0 come after all others, rows of weight 0 are at −∞.
    """
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    noise = jax.vmap(lambda row_key: jax.random.gumbel(row_key, dtype=scores.dtype))(row_keys)
    positive = scores > 0
    log_scores = jnp.where(positive, jnp.log(jnp.where(positive, scores, 1)), _LAST_RESORT)
    return jnp.where(weights > 0, log_scores + noise, -jnp.inf)


def _choose(priority: jax.Array, x: jax.Array, k: int, axis_name: AxisName) -> jax.Array:
    """The k rows of highest priority over all devices: [k, d], the same on all devices."""
    return _gather(x, *_choose_rows(priority, k, axis_name), axis_name)


def _choose_rows(priority: jax.Array, k: int, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    """Local numbers [k] of the k rows of highest priority, and which of them are local [k].

    Rows at −∞ are never taken: if fewer than k are left, those are repeated in turn.
    """
    values, row, local = top_k_rows(priority, k, axis_name)
    n_valid = jnp.maximum(jnp.sum(values > -jnp.inf), 1)
    turn = jnp.arange(k) % n_valid
    return row[turn], local[turn]
