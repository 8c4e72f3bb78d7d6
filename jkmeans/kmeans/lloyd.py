"""Lloyd's algorithm: the whole loop as one program, on any number of devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.assignment import accumulation_dtype, nearest, squared_distances
from jkmeans.kmeans.collectives import AxisName, n_devices, top_k_rows, vary_like
from jkmeans.kmeans.statistics import ClusterStatistics, centroids_from, cluster_statistics

EMPTY_POLICIES = ("farthest", "keep")

# Clusters moved in one iteration at most; those still empty are moved in the next. It bounds the
# all-reduce of the candidates, devices × MAX_RELOCATIONS numbers.
MAX_RELOCATIONS = 1024


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


class _State(NamedTuple):
    centroids: jax.Array
    previous: jax.Array
    labels: jax.Array
    n_iter: jax.Array
    n_relocated: jax.Array


def lloyd(
    x: jax.Array,
    centroids: jax.Array,
    *,
    weights: jax.Array | None = None,
    max_iter: int | jax.Array = 300,
    tol: float | jax.Array = 0.0,
    empty: str = "farthest",
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
      axis_name: the mesh axis that rows are sharded over, or None.
      block_size: rows assigned at a time; None for what suits the device.

    Returns:
      KMeansResult.

    Raises:
      ValueError: ``empty`` is not one of EMPTY_POLICIES.

    Source: Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28 (1982).
    """
    if empty not in EMPTY_POLICIES:
        raise ValueError(f"empty={empty!r}: expected one of {', '.join(EMPTY_POLICIES)}")
    x, centroids = jnp.asarray(x), jnp.asarray(centroids)
    k = centroids.shape[0]
    dtype = accumulation_dtype(x, centroids)

    def step(state: _State) -> _State:
        labels = nearest(x, state.centroids, block_size=block_size)
        statistics = cluster_statistics(x, labels, k, weights=weights, axis_name=axis_name)
        n_relocated = state.n_relocated
        if empty == "farthest":
            statistics, moved = lax.cond(
                jnp.any(statistics.counts == 0),
                lambda: _relocate(x, weights, state.centroids, labels, statistics, axis_name),
                lambda: (statistics, jnp.zeros_like(n_relocated)),
            )
            n_relocated = n_relocated + moved
        return _State(
            centroids=centroids_from(statistics, state.centroids),
            previous=state.centroids,
            labels=labels,
            n_iter=state.n_iter + 1,
            n_relocated=n_relocated,
        )

    def shift(state: _State) -> jax.Array:
        # Between two iterations, of centroids as they are stored: fused into the iteration, the
        # means are not rounded before the difference is taken (a fused multiply-add), and centroids
        # at rest seem to move.
        return jnp.sum((state.centroids - state.previous) ** 2)

    def unfinished(state: _State) -> jax.Array:
        return (state.n_iter < max_iter) & ((state.n_iter == 0) | (shift(state) > tol))

    def replicated(value) -> jax.Array:
        return vary_like(value, x, weights, centroids, reduced=axis_name)

    centroids = replicated(centroids.astype(dtype))
    state = _State(
        centroids=centroids,
        previous=centroids,
        labels=vary_like(jnp.zeros(x.shape[0], jnp.int32), x, weights, centroids),
        n_iter=jnp.zeros((), jnp.int32),
        n_relocated=replicated(jnp.zeros((), jnp.int32)),
    )
    state = lax.while_loop(unfinished, step, state)
    # Centroids that did not move have the labels they were made from.
    labels = lax.cond(
        (state.n_iter > 0) & (shift(state) == 0),
        lambda: state.labels,
        lambda: vary_like(nearest(x, state.centroids, block_size=block_size), state.labels),
    )
    distances = squared_distances(x, state.centroids, labels)
    final = cluster_statistics(
        x, labels, k, weights=weights, distances=distances, axis_name=axis_name
    )
    return KMeansResult(
        centroids=state.centroids,
        labels=labels,
        distances=distances,
        counts=final.counts,
        inertia=final.inertia,
        n_iter=state.n_iter,
        n_empty=jnp.sum(final.counts == 0).astype(jnp.int32),
        n_relocated=state.n_relocated,
    )


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
