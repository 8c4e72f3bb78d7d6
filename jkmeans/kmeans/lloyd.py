"""Lloyd's algorithm: the whole loop as one program, on any number of devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans import bounds
from jkmeans.kmeans.assignment import (
    accumulation_dtype,
    middle_centroid,
    nearest,
    squared_distances,
)
from jkmeans.kmeans.collectives import AxisName, all_sum, n_devices, top_k_rows, vary_like
from jkmeans.kmeans.statistics import (
    ClusterStatistics,
    all_reduce,
    centroids_from,
    cluster_statistics,
    inertia_of,
    move_rows,
)

EMPTY_POLICIES = ("farthest", "keep")
ALGORITHMS = ("auto", "bounds", "lloyd")

# Clusters moved in one iteration at most; those still empty are moved in the next. It bounds the
# all-reduce of the candidates, devices × MAX_RELOCATIONS numbers.
MAX_RELOCATIONS = 1024

# Iterations after which sums that follow the moves of rows are made anew.
_UPDATES = 16
# Rows moved from sum to sum at a time.
_MOVED_ROWS = 2048


class KMeansResult(NamedTuple):
    """Where Lloyd's algorithm stopped. Labels, distances, counts and inertia fit the centroids.

    Attributes:
      centroids: [k, d] float.
      labels: [n] int32, the nearest centroid of each local row.
      distances: [n] float, the squared distance to it.
      counts: [k] float, the weight of each cluster over all devices.
      inertia: [] float, the weighted sum of the squared distances over all devices.
      n_iter: [] int32, the iterations run.
      n_empty: [] int32, the clusters without weight at the end.
      n_relocated: [] int32, how often an empty cluster was moved to a far point.
    """

    centroids: jax.Array
    labels: jax.Array
    distances: jax.Array
    counts: jax.Array
    inertia: jax.Array
    n_iter: jax.Array
    n_empty: jax.Array
    n_relocated: jax.Array


class _Sums(NamedTuple):
    """Sums of the local rows that follow the rows which change their cluster.

    Attributes:
      sums: [k, d].
      peak: [k], the largest count of each cluster since the sums were last made anew.
      n_updates: [] int32, the iterations since then.
    """

    sums: jax.Array
    peak: jax.Array
    n_updates: jax.Array


class _State(NamedTuple):
    centroids: jax.Array
    previous: jax.Array
    labels: jax.Array
    n_iter: jax.Array
    n_relocated: jax.Array
    counts: jax.Array
    labels_fit: jax.Array
    known: bounds.Knowledge | None
    sums: _Sums | None


def lloyd(
    x: jax.Array,
    centroids: jax.Array,
    *,
    weights: jax.Array | None = None,
    max_iter: int | jax.Array = 300,
    tol: float | jax.Array = 0.0,
    empty: str = "farthest",
    algorithm: str = "auto",
    axis_name: AxisName = None,
    block_size: int | None = None,
) -> KMeansResult:
    """Lloyd's algorithm from given centroids.

    Each iteration assigns every row to its nearest centroid and moves every centroid to the mean
    of its rows, until Σ_k ‖c_k' − c_k‖² ≤ tol or max_iter iterations are done; then rows are
    assigned once more if the last iteration moved a centroid. With tol=0 the iterations and the
    result are scikit-learn's ``KMeans(algorithm="lloyd", tol=0)``. An iteration takes one
    all-reduce of k(d+1)+1 numbers; one that finds an empty cluster, three.

    Args:
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      centroids: [k, d], the same on all devices.
      weights: [n] float, at least 0; None for ones. Rows of weight 0 are labelled but not counted.
      max_iter: [] int; 0 only assigns. May be traced.
      tol: [] float, an absolute bound on the squared shift. May be traced.
      empty: what happens to a cluster without weight. "keep": it keeps its centroid. "farthest":
        it moves to the row farthest from its own centroid, which leaves its old cluster; several
        take the farthest rows in turn (at most MAX_RELOCATIONS in an iteration). Rows that lie
        on their centroid are not taken: with fewer distinct rows than clusters, some stay empty.
      algorithm: how the nearest centroids are found; labels are the same. "lloyd": every distance
        in every iteration. "bounds": only those that bounds do not rule out (see ``bounds.py``),
        which takes n(3 + k/64) numbers of memory; do not ``vmap`` it: its loops would run as long
        as the longest of the batch needs. "auto": bounds for large data on a CPU, where they pay.
      axis_name: the mesh axis that rows are sharded over, or None.
      block_size: rows assigned at a time; None for what suits the device.

    Returns:
      KMeansResult.

    Raises:
      ValueError: ``empty`` is not one of EMPTY_POLICIES, ``algorithm`` none of ALGORITHMS.

    Source: Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28 (1982).
    """
    if empty not in EMPTY_POLICIES:
        raise ValueError(f"empty={empty!r}: expected one of {', '.join(EMPTY_POLICIES)}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    x, centroids = jnp.asarray(x), jnp.asarray(centroids)
    k = centroids.shape[0]
    dtype = accumulation_dtype(x, centroids)
    bounded = algorithm == "bounds" or (
        algorithm == "auto" and bounds.pay_off(x.shape[0], x.shape[1], k)
    )

    def replicated(value) -> jax.Array:
        return vary_like(value, x, weights, centroids, reduced=axis_name)

    def local(value) -> jax.Array:
        return vary_like(value, x, weights, centroids)

    centroids = replicated(centroids.astype(dtype))
    middle = middle_centroid(centroids)

    def assign_rows(state: _State) -> tuple[jax.Array, bounds.Knowledge | None]:
        if state.known is None:
            return nearest(x, state.centroids, block_size=block_size), None
        known = bounds.reassign(x, state.centroids, state.previous, middle, state.known)
        return known.bounds.labels, known

    def step(state: _State) -> _State:
        labels, known = assign_rows(state)
        if state.sums is None:
            sums = None
            statistics = cluster_statistics(x, labels, k, weights=weights, axis_name=axis_name)
        else:
            sums, statistics = _follow(x, state.labels, labels, state.sums)
            statistics = all_reduce(statistics, axis_name)
        n_relocated = state.n_relocated
        last = is_final(state)
        if empty == "farthest":
            statistics, moved = lax.cond(
                jnp.any(statistics.counts == 0) & ~last,
                lambda: _relocate(x, weights, state.centroids, labels, statistics, axis_name),
                lambda: (statistics, jnp.zeros_like(n_relocated)),
            )
            n_relocated = n_relocated + moved
        means = centroids_from(statistics, state.centroids)
        return _State(
            centroids=jnp.where(last, state.centroids, means),
            previous=state.centroids,
            labels=labels,
            n_iter=state.n_iter + jnp.where(last, 0, 1),
            n_relocated=n_relocated,
            counts=statistics.counts,
            labels_fit=last,
            known=known,
            sums=sums,
        )

    def shift(state: _State) -> jax.Array:
        # Between two iterations, of centroids as they are stored: fused into the iteration, the
        # means are not rounded before the difference is taken (a fused multiply-add), and centroids
        # at rest seem to move.
        return jnp.sum((state.centroids - state.previous) ** 2)

    def is_final(state: _State) -> jax.Array:
        """Whether the centroids are final, so that only their labels are wanting."""
        return (state.n_iter >= max_iter) | ((state.n_iter > 0) & (shift(state) <= tol))

    def at_rest(state: _State) -> jax.Array:
        """Whether the last iteration moved no centroid: its labels fit."""
        return (state.n_iter > 0) & (shift(state) == 0) & ~state.labels_fit

    state = _State(
        centroids=centroids,
        previous=centroids,
        labels=local(jnp.zeros(x.shape[0], jnp.int32)),
        n_iter=replicated(jnp.zeros((), jnp.int32)),
        n_relocated=replicated(jnp.zeros((), jnp.int32)),
        counts=replicated(jnp.zeros(k, dtype)),
        labels_fit=replicated(jnp.asarray(False)),
        known=bounds.nothing_known(x, centroids) if bounded else None,
        sums=_no_sums(local, k, x.shape[1], dtype) if bounded and weights is None else None,
    )
    # One turn for each iteration and, unless the last one left all centroids where they were, one
    # more that only assigns: in the loop, so that assignment is compiled once.
    state = lax.while_loop(lambda state: ~(state.labels_fit | at_rest(state)), step, state)
    centroids = state.centroids
    if state.sums is not None:
        # Means of their rows again, without the rounding that sums gathered on the way.
        centroids = lax.cond(
            at_rest(state),
            lambda: replicated(
                centroids_from(
                    cluster_statistics(x, state.labels, k, axis_name=axis_name), centroids
                )
            ),
            lambda: centroids,
        )
    distances = squared_distances(x, centroids, state.labels)
    return KMeansResult(
        centroids=centroids,
        labels=state.labels,
        distances=distances,
        counts=state.counts,
        inertia=all_sum(inertia_of(distances, weights), axis_name),
        n_iter=state.n_iter,
        n_empty=jnp.sum(state.counts == 0).astype(jnp.int32),
        n_relocated=state.n_relocated,
    )


def _no_sums(local, k: int, d: int, dtype) -> _Sums:
    """Sums that have to be made anew before they are used."""
    return _Sums(
        local(jnp.zeros((k, d), dtype)),
        local(jnp.full(k, jnp.inf, dtype)),
        local(jnp.zeros((), jnp.int32)),
    )


def _follow(
    x: jax.Array, before: jax.Array, after: jax.Array, old: _Sums
) -> tuple[_Sums, ClusterStatistics]:
    """The statistics of the local rows for the labels ``after``, from the sums for ``before``.

    Few rows change their cluster after the first iterations; only those are added and subtracted.
    Sums are made anew where many rows moved, every _UPDATES iterations, and when a cluster has
    lost most of its rows, whose rounding errors would stay behind in a small sum.
    """
    n, k = x.shape[0], old.sums.shape[0]
    # Only counts are wanted, so rows without features are summed.
    counts = cluster_statistics(x[:, :0], after, k).counts
    every = bounds.Rows(vary_like(jnp.arange(n, dtype=jnp.int32), x), jnp.asarray(n, jnp.int32))
    moved = bounds.select(every, before != after)
    anew = (moved.count > n // 4) | (old.n_updates >= _UPDATES) | jnp.any(8 * counts < old.peak)

    def sum_anew() -> _Sums:
        return _Sums(cluster_statistics(x, after, k).sums, counts, jnp.zeros_like(old.n_updates))

    def move() -> _Sums:
        size = min(n, _MOVED_ROWS)

        def step(i, sums):
            start = jnp.minimum(i * size, n - size)
            position = start + jnp.arange(size)
            rows = lax.dynamic_slice_in_dim(moved.rows, start, size)
            # A block that reaches back must not move rows twice.
            rows = jnp.where((position >= i * size) & (position < moved.count), rows, n)
            return move_rows(
                sums,
                x,
                rows,
                before.at[rows].get(mode="clip"),
                after.at[rows].get(mode="clip"),
            )

        sums = lax.fori_loop(0, -(-moved.count // size), step, old.sums)
        return _Sums(sums, jnp.maximum(old.peak, counts), old.n_updates + 1)

    new = lax.cond(anew, sum_anew, move)
    return new, ClusterStatistics(new.sums, counts, vary_like(jnp.zeros((), counts.dtype), x))


def _relocate(
    x: jax.Array,
    weights: jax.Array | None,
    centroids: jax.Array,
    labels: jax.Array,
    statistics: ClusterStatistics,
    axis_name: AxisName,
) -> tuple[ClusterStatistics, jax.Array]:
    """Gives each empty cluster one of the rows farthest from their centroids.

    Returns:
      The statistics with those rows in their new clusters, and how many were moved: [] int32.
    """
    k = centroids.shape[0]
    distances = squared_distances(x, centroids, labels)
    eligible = distances > 0 if weights is None else (distances > 0) & (weights > 0)
    at_most = min(k, MAX_RELOCATIONS, x.shape[0] * n_devices(axis_name))
    farthest, row, local = top_k_rows(jnp.where(eligible, distances, 0), at_most, axis_name)
    is_empty = statistics.counts == 0
    (clusters,) = jnp.nonzero(is_empty, size=at_most, fill_value=k)
    moved = (clusters < k) & (farthest > 0)
    # Rows of other devices, and those that stay, are written past the end: nowhere.
    row = jnp.where(moved & local, row, x.shape[0])
    labels = labels.at[row].set(clusters.astype(labels.dtype), mode="drop")
    # Summed anew: taking a row out of its old sum by subtraction would leave rounding behind.
    statistics = cluster_statistics(x, labels, k, weights=weights, axis_name=axis_name)
    return statistics, jnp.sum(moved).astype(jnp.int32)
