"""Lloyd's algorithm: the whole loop as one program, on any number of devices."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import zero_from_primal

from jkmeans.kmeans import bounds, certified
from jkmeans.kmeans.assignment import (
    accumulation_dtype,
    check_precision,
    check_shapes,
    middle_centroid,
    nearest,
    squared_distances,
)
from jkmeans.kmeans.collectives import (
    AxisName,
    Blocks,
    all_sum,
    axis_index,
    names_of,
    per_block,
    vary_like,
)
from jkmeans.kmeans.differentiation import tangents
from jkmeans.kmeans.moving_sums import MovingSums, follow, no_sums
from jkmeans.kmeans.relocation import relocate
from jkmeans.kmeans.statistics import (
    all_reduce,
    centroids_from,
    cluster_statistics,
    inertia_of,
)

EMPTY_POLICIES = ("farthest", "keep")
ALGORITHMS = ("auto", "bounds", "lloyd")


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
      recomputed: [] float32, with ``precision="exact"`` or "exact-…": the share of rows with
        weight that low precision did not decide, and that were computed anew, over all
        assignments and devices; None otherwise.
    """

    centroids: jax.Array
    labels: jax.Array
    distances: jax.Array
    counts: jax.Array
    inertia: jax.Array
    n_iter: jax.Array
    n_empty: jax.Array
    n_relocated: jax.Array
    recomputed: jax.Array | None = None


class _State(NamedTuple):
    centroids: jax.Array
    previous: jax.Array
    labels: jax.Array
    n_iter: jax.Array
    n_relocated: jax.Array
    relocated: jax.Array
    counts: jax.Array
    labels_fit: jax.Array
    known: bounds.Knowledge | None
    sums: MovingSums | None
    recomputed: jax.Array | None


def lloyd(
    x: jax.Array,
    centroids: jax.Array,
    *,
    weights: jax.Array | None = None,
    max_iter: int | jax.Array = 300,
    tol: float | jax.Array = 0.0,
    origin: jax.Array | None = None,
    empty: str = "farthest",
    algorithm: str = "auto",
    axis_name: AxisName = None,
    centroid_axis: AxisName = None,
    block_size: int | None = None,
    precision: str = "full",
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
      origin: [d], what is taken from every row before it is added to others: where rows are far
        from 0, a point among them (`far_origin`) saves the digits that tell them apart; None for
        0. Centroids are the same but for rounding.
      empty: what happens to a cluster without weight. "keep": it keeps its centroid. "farthest":
        it moves to the row farthest from its own centroid, which leaves its old cluster; several
        take the farthest rows in turn (at most MAX_RELOCATIONS in an iteration). Rows that lie
        on their centroid are not taken: with fewer distinct rows than clusters, some stay empty.
      algorithm: how the nearest centroids are found; labels are the same. "lloyd": every distance
        in every iteration. "bounds": only those that bounds do not rule out (see ``bounds.py``),
        which takes some n(8 + k/32) numbers of memory; do not ``vmap`` it: its loops would run as
        long as the longest of the batch needs. "auto": bounds for large data on a CPU, where they
        pay.
      axis_name: the mesh axis that rows are sharded over, or None.
      centroid_axis: a second mesh axis, that centroids are sharded over, for more of them than a
        device can hold: ``centroids``, and the centroids and counts of the result, are then the
        local ones, the same number on each device, and an iteration takes the nearest of the local
        nearest by two all-reduces of n numbers. Without derivatives, and with "lloyd" only.
      block_size: rows assigned at a time; None for what suits the device.
      precision: how scores are computed, see `nearest`: "full"; "exact" or "exact-…", from
        products in low precision with the labels of "full"; "fast" or "fast-…", with the labels of
        these products. Means, distances and inertia are always in full precision. All but
        "full" look at every distance: ``algorithm`` is "auto" or "lloyd" then.

    Returns:
      KMeansResult.

    Raises:
      ValueError: ``empty`` is not one of EMPTY_POLICIES, ``algorithm`` none of ALGORITHMS,
        ``precision`` none of PRECISIONS; or "bounds" or another ``precision`` than "full" with a
        ``centroid_axis``, or with each other; or x and centroids are of other shapes.

    The result is differentiable with respect to x and weights, forward and backward, at the cost of
    one pass over the rows whatever the number of iterations: by the implicit function theorem at
    the fixed point, labels held fixed. It is exact where the iterations have come to rest
    (``tol=0``) and no row is as near to another centroid as to its own; stopped earlier, it is the
    derivative of one more iteration. The first centroids get derivative 0.

    Source: Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28 (1982).
    """
    if empty not in EMPTY_POLICIES:
        raise ValueError(f"empty={empty!r}: expected one of {', '.join(EMPTY_POLICIES)}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    check_precision(precision, centroid_axis)
    if algorithm == "bounds" and precision != "full":
        raise ValueError(f"precision={precision!r}: expected 'full' with algorithm='bounds'")
    x, centroids = jnp.asarray(x), jnp.asarray(centroids)
    check_shapes(x, centroids)
    all_here = centroid_axis is None and precision == "full"
    pays_off = all_here and bounds.pay_off(x.shape[0], x.shape[1], centroids.shape[0])
    if algorithm == "auto":
        algorithm = "bounds" if pays_off else "lloyd"
    if algorithm == "bounds" and centroid_axis is not None:
        raise ValueError("algorithm='bounds': expected 'lloyd' where centroids are sharded")
    options = _Options(
        algorithm == "bounds", empty, axis_name, centroid_axis, block_size, precision
    )
    solve = _solve if centroid_axis is None else _iterate
    return solve(options, x, weights, centroids, max_iter, tol, origin)


class _Options(NamedTuple):
    bounded: bool
    empty: str
    axis_name: AxisName
    centroid_axis: AxisName
    block_size: int | None
    precision: str


def _iterate(
    options: _Options,
    x: jax.Array,
    weights: jax.Array | None,
    centroids: jax.Array,
    max_iter: int | jax.Array,
    tol: float | jax.Array,
    origin: jax.Array | None,
) -> KMeansResult:
    """The loop; see `lloyd`."""
    bounded, empty, axis_name, centroid_axis, block_size, precision = options
    certifies = precision.startswith("exact")
    k, dtype = centroids.shape[0], accumulation_dtype(x, centroids)
    first = k * axis_index(centroid_axis)
    # What differs between the devices of each axis: rows along the first, centroids along the
    # second, the state of the loop along neither.
    both = (*names_of(axis_name), *names_of(centroid_axis))

    def replicated(value: Any) -> jax.Array:
        return vary_like(jnp.asarray(value), x, weights, centroids, reduced=both)

    def of_rows(value: jax.Array) -> jax.Array:
        return vary_like(value, x, weights, centroids, reduced=centroid_axis)

    def of_centroids(value: jax.Array) -> jax.Array:
        return vary_like(value, x, weights, centroids, reduced=axis_name)

    centroids = of_centroids(centroids.astype(dtype))
    origin = None if origin is None else jnp.asarray(origin, dtype)
    if dtype == jnp.float64:
        x = x.astype(dtype)  # Sums of float32 rows would be float32.

    find_nearest = per_block(
        partial(nearest, block_size=block_size, centroid_axis=centroid_axis), axis_name
    )
    # Once, before the loop; blocks of rows are taken one after another, and not kept ready.
    is_whole = precision != "full" and not isinstance(axis_name, Blocks)
    ready = certified.make_ready(x, centroids, precision) if is_whole else None
    find_certified = per_block(
        partial(
            certified.certified_nearest, block_size=block_size, precision=precision, ready=ready
        ),
        axis_name,
    )
    distances_to = per_block(partial(squared_distances, centroid_axis=centroid_axis), axis_name)
    local_inertia = per_block(inertia_of, axis_name)

    def assign_rows(state: _State) -> tuple[jax.Array, bounds.Knowledge | None, jax.Array | None]:
        if precision != "full":
            labels, levels = find_certified(x, state.centroids)
            if state.recomputed is None:
                return labels, None, None
            return labels, None, state.recomputed + certified.share(levels, weights)
        if state.known is None:
            return find_nearest(x, state.centroids), None, None
        middle = middle_centroid(state.centroids)
        known = bounds.reassign(x, state.centroids, state.previous, middle, state.known)
        return known.bounds.labels, known, None

    def statistics_of(labels: jax.Array):
        # Labels of other devices' centroids are out of range, and left out.
        return cluster_statistics(
            x, labels - first, k, weights=weights, shift=origin, axis_name=axis_name
        )

    def step(state: _State) -> _State:
        labels, known, recomputed = assign_rows(state)
        if state.sums is None:
            sums, statistics = None, statistics_of(labels)
        else:
            sums, statistics = follow(x, state.labels, labels, state.sums, origin)
            statistics = all_reduce(statistics, axis_name)
        last, moved = is_final(state), jnp.zeros_like(state.n_relocated)
        if empty == "farthest":
            n_empty = all_sum(jnp.sum(statistics.counts == 0), centroid_axis)

            def fill():
                distances = distances_to(x, state.centroids, labels)
                filled, moved = relocate(
                    labels, distances, weights, statistics.counts, axis_name, centroid_axis
                )
                # Summed anew: taking a row out of a sum by subtraction leaves rounding behind.
                return statistics_of(filled), moved

            statistics, moved = lax.cond((n_empty > 0) & ~last, fill, lambda: (statistics, moved))
        means = centroids_from(statistics, state.centroids, origin)
        return _State(
            centroids=jnp.where(last, state.centroids, means),
            previous=state.centroids,
            labels=labels,
            n_iter=state.n_iter + jnp.where(last, 0, 1),
            n_relocated=state.n_relocated + moved,
            relocated=moved > 0,
            counts=statistics.counts,
            labels_fit=last,
            known=known,
            sums=sums,
            recomputed=recomputed,
        )

    def shift(state: _State) -> jax.Array:
        # Between two iterations, of centroids as they are stored: fused into the iteration, the
        # means are not rounded before the difference is taken (a fused multiply-add), and centroids
        # at rest seem to move.
        return all_sum(jnp.sum((state.centroids - state.previous) ** 2), centroid_axis)

    def is_final(state: _State) -> jax.Array:
        """Whether the centroids are final, so that only their labels are wanting."""
        return (state.n_iter >= max_iter) | ((state.n_iter > 0) & (shift(state) <= tol))

    def at_rest(state: _State) -> jax.Array:
        """Whether the last iteration moved no centroid and no row: its labels fit."""
        n_moved = all_sum(jnp.sum(state.centroids != state.previous), centroid_axis)
        return (state.n_iter > 0) & (n_moved == 0) & ~state.relocated & ~state.labels_fit

    def mean_share(state: _State) -> jax.Array:
        # The assignments: one an iteration, and one of final centroids that had no labels yet.
        n_assigned = state.n_iter + state.labels_fit
        n_rows = x.shape[0] if weights is None else jnp.sum(weights > 0)
        n_rows = jnp.asarray(n_rows, jnp.float32)
        share = jnp.asarray(state.recomputed)
        total, n_rows = all_sum((share * n_rows, n_rows), axis_name)
        return total / jnp.maximum(n_rows * n_assigned, 1)

    state = _State(
        centroids=centroids,
        previous=centroids,
        labels=of_rows(jnp.zeros(x.shape[0], jnp.int32)),
        n_iter=replicated(np.int32(0)),
        n_relocated=replicated(np.int32(0)),
        relocated=replicated(False),
        counts=of_centroids(jnp.zeros(k, dtype)),
        labels_fit=replicated(False),
        known=bounds.nothing_known(x, centroids) if bounded else None,
        sums=no_sums(x, centroids) if bounded and weights is None else None,
        # Of this device's rows, summed over the assignments.
        recomputed=of_rows(jnp.zeros((), jnp.float32)) if certifies else None,
    )
    # One turn for each iteration and, unless the last one left all centroids where they were, one
    # more that only assigns: in the loop, so that assignment is compiled once.
    state = lax.while_loop(lambda state: ~(state.labels_fit | at_rest(state)), step, state)
    centroids = state.centroids
    if state.sums is not None:
        # Means of their rows again, without the rounding that sums gathered on the way.
        centroids = lax.cond(
            at_rest(state),
            lambda: of_centroids(centroids_from(statistics_of(state.labels), centroids, origin)),
            lambda: centroids,
        )
    distances = distances_to(x, centroids, state.labels)
    return KMeansResult(
        centroids=centroids,
        labels=state.labels,
        distances=distances,
        counts=state.counts,
        inertia=all_sum(local_inertia(distances, weights), axis_name),
        n_iter=state.n_iter,
        n_empty=all_sum(jnp.sum(state.counts == 0), centroid_axis).astype(jnp.int32),
        n_relocated=state.n_relocated,
        recomputed=mean_share(state) if certifies else None,
    )


_solve = jax.custom_jvp(_iterate, nondiff_argnums=(0,))


@_solve.defjvp
def _solve_and_differentiate(options: _Options, primals, directions):
    x, weights = primals[:2]
    result = _solve(options, *primals)
    changes = tangents(x, weights, directions[0], directions[1], result, options.axis_name)
    # What is not there has no derivative either.
    none = {
        name: jax.tree.map(zero_from_primal, value)
        for name, value in result._asdict().items()
        if name not in changes._fields
    }
    return result, KMeansResult(**changes._asdict(), **none)
