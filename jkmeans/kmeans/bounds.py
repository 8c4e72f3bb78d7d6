"""Exact assignment with fewer distances: bounds from one iteration to the next.

Between two iterations centroids move little, so most rows can be told to keep their centroid, and
most groups of centroids to be too far from a row, without looking at them. For each row an upper
bound on the distance to its own centroid is kept, and for each group of centroids a lower bound on
the distance to the nearest other centroid in it. A move of the centroids loosens the bounds by its
length (the triangle inequality); a pair of row and group is looked at only if its bounds cross.

Rows to look at are compacted into dense blocks, so that the work stays matrix products inside one
compiled program, with loops whose lengths depend on the data.

Source: Ding et al., Yinyang k-means: a drop-in replacement of the classic k-means with consistent
speedup, ICML 2015 (group filter); Hamerly, Making k-means even faster, SDM 2010 (one group).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.assignment import accumulation_dtype, lowest, score
from jkmeans.kmeans.collectives import vary_like

# Centroids of a group at most: fewer make the products of a gathered block too narrow to be fast,
# more make the groups too coarse to be excluded.
GROUP_SIZE = 128
# Numbers of a block of rows and its scores: what stays in a core's cache.
_BLOCK_ENTRIES = 2**19
# Rows that are passed over together if none of them is wanted.
_CHUNK = 8
# With more of the pairs open than this, one dense pass over all of them is faster.
_WORTH_ALL = 0.6


class Bounds(NamedTuple):
    """What is known about the distances of each row; bounds are distances, not squared.

    Attributes:
      labels: [n] int32, the nearest centroid.
      scores: [n] float, ½‖c‖² − x·c for that centroid where it was last looked at.
      upper: [n] float, at least the distance to that centroid.
      lower: [g, n] float, at most the distance to any other centroid of the group.
    """

    labels: jax.Array
    scores: jax.Array
    upper: jax.Array
    lower: jax.Array


class Knowledge(NamedTuple):
    """What one iteration leaves to the next.

    Attributes:
      bounds: which hold for the centroids of the iteration.
      order: [g, s] int32, the centroids of each group, see `group_centroids`.
    """

    bounds: Bounds
    order: jax.Array


class Rows(NamedTuple):
    """A list of row numbers, the first ``count`` of ``rows``."""

    rows: jax.Array
    count: jax.Array


class Geometry(NamedTuple):
    """Centroids as assignment sees them: shifted by a point in their middle, and in groups.

    Attributes:
      middle: [1, d], subtracted from rows and centroids.
      centroids: [k, d], shifted.
      half_norms: [k], ½‖c‖² of the shifted centroids.
      reach: [], the largest ‖c‖ of them.
      order: [g, s] int32, the centroids of each group; k where a slot is empty.
    """

    middle: jax.Array
    centroids: jax.Array
    half_norms: jax.Array
    reach: jax.Array
    order: jax.Array


def pay_off(n: int, d: int, n_clusters: int) -> bool:
    """Whether keeping bounds is faster than looking at every distance in every iteration.

    On a CPU a pair that is ruled out costs about as much as a distance in few dimensions, and the
    compaction is written for it; elsewhere nothing was measured yet.
    """
    large = n >= 4096 and n * d * n_clusters >= 2**24
    return jax.default_backend() == "cpu" and d >= 8 and n_clusters > 1 and large


def nothing_known(x: jax.Array, centroids: jax.Array) -> Knowledge:
    """Bounds that decide nothing: `reassign` looks at every distance."""
    n, k = x.shape[0], centroids.shape[0]
    dtype = accumulation_dtype(x, centroids)
    groups = n_groups(k)

    def fill(shape, value, dtype):
        return vary_like(jnp.full(shape, value, dtype), x, centroids)

    return Knowledge(
        Bounds(
            labels=fill(n, 0, jnp.int32),
            scores=fill(n, 0, dtype),
            upper=fill(n, jnp.inf, dtype),
            lower=fill((groups, n), 0, dtype),
        ),
        fill((groups, -(-k // groups)), 0, jnp.int32),
    )


def reassign(
    x: jax.Array,
    centroids: jax.Array,
    previous: jax.Array,
    middle: jax.Array,
    known: Knowledge,
) -> Knowledge:
    """The nearest centroids after the centroids have moved.

    Args:
      x: [n, d], any real dtype.
      centroids: [k, d] float.
      previous: [k, d], for which ``known`` holds.
      middle: [1, d], a point amid the centroids.
      known: from the last iteration, or `nothing_known`.

    Returns:
      Knowledge for ``centroids``; its labels are those of a comparison with every centroid, ties
      going to the lowest index, except where rounding decides.
    """
    moved = jnp.sqrt(jnp.sum((centroids - previous) ** 2, axis=1))
    loose = loosen(known.bounds, moved, known.order, x.shape[1])
    # Counted as integers: a float32 stands still at 2²⁴.
    n_open = jnp.sum(~(loose.upper[None, :] < loose.lower), axis=1, dtype=jnp.int32)
    open_pairs = jnp.mean(n_open.astype(jnp.float32)) / x.shape[0]

    def look_at_all() -> Knowledge:
        order = vary_like(group_centroids(centroids), known.order)
        return Knowledge(evaluate_all(x, geometry(centroids, middle, order), loose), order)

    def look_at_some() -> Knowledge:
        at = geometry(centroids, middle, known.order)
        return Knowledge(evaluate(x, at, loose), known.order)

    return lax.cond(open_pairs > _WORTH_ALL, look_at_all, look_at_some)


def n_groups(n_clusters: int) -> int:
    """How many groups the centroids are cut into: a power of two."""
    groups = 1
    while n_clusters / groups > GROUP_SIZE:
        groups *= 2
    return groups


def group_centroids(centroids: jax.Array) -> jax.Array:
    """Groups of equal size of centroids that are near each other: halved again and again.

    Each part is cut at its median along the line between two far points of it.

    Args:
      centroids: [k, d].

    Returns:
      [g, s] int32, every centroid once; empty slots, which hold k, come last in a group.
    """
    k = centroids.shape[0]
    groups = n_groups(k)
    size = -(-k // groups)
    # Empty slots are spread over the groups by being copies of the first centroids while sorting.
    n_slots = groups * size
    slot = jnp.arange(n_slots, dtype=jnp.int32)
    order = slot % k
    empty = slot >= k
    parts = 1
    while parts < groups:
        points = centroids[order].reshape(parts, n_slots // parts, -1)

        one = _farthest(points, jnp.mean(points, axis=1))
        other = _farthest(points, one)
        along = jnp.einsum("psd,pd->ps", points, other - one)
        by_projection = jnp.argsort(along, axis=1)
        order = jnp.take_along_axis(order.reshape(parts, -1), by_projection, axis=1).reshape(-1)
        empty = jnp.take_along_axis(empty.reshape(parts, -1), by_projection, axis=1).reshape(-1)
        parts *= 2
    return jnp.sort(jnp.where(empty, k, order).reshape(groups, size), axis=1)


def _farthest(points_psd: jax.Array, origin_pd: jax.Array) -> jax.Array:
    """The point of each part that is farthest from an origin of its own: [p, d]."""
    far = jnp.argmax(jnp.sum((points_psd - origin_pd[:, None, :]) ** 2, axis=2), axis=1)
    return jnp.take_along_axis(points_psd, far[:, None, None], axis=1)[:, 0]


def geometry(centroids: jax.Array, middle: jax.Array, order: jax.Array) -> Geometry:
    """Prepares centroids [k, d] for the functions below."""
    shifted = centroids - middle
    norms = jnp.sum(shifted**2, axis=1)
    return Geometry(middle, shifted, 0.5 * norms, jnp.sqrt(jnp.max(norms)), order)


def loosen(bounds: Bounds, moved: jax.Array, order: jax.Array, d: int) -> Bounds:
    """Bounds that hold after every centroid k has moved by the distance ``moved`` [k].

    These are allowed the rounding of a sum of d squares.
    """
    eps = jnp.finfo(moved.dtype).eps
    moved = moved * (1 + (d + 8) * eps)
    of_group = jnp.max(jnp.append(moved, 0)[order], axis=1)
    return bounds._replace(
        upper=(bounds.upper + moved[bounds.labels]) * (1 + 2 * eps),
        lower=bounds.lower * (1 - 2 * eps) - of_group[:, None],
    )


def undecided(bounds: Bounds) -> jax.Array:
    """Rows whose bounds do not rule out another centroid: [n] bool."""
    # Written so that NaN decides nothing.
    return ~(bounds.upper < jnp.min(bounds.lower, axis=0))


def evaluate_all(x: jax.Array, at: Geometry, bounds: Bounds) -> Bounds:
    """Looks at every pair of a row and a centroid.

    Args:
      x: [n, d], any real dtype.
      at: the centroids.
      bounds: of these rows, only for its shapes; its arrays are written over.

    Returns:
      Tight bounds.
    """

    def look(carry: Bounds, start: jax.Array, x_bd: jax.Array) -> Bounds:
        return jax.tree.map(
            lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, -1),
            carry,
            tight(x_bd),
        )

    tight = _tight_bounds(at)
    return _over_all(x, at, bounds, look, at.centroids.shape[1] + at.order.size)


def _tight_bounds(at: Geometry) -> Callable[[jax.Array], Bounds]:
    """A function from shifted rows [b, d] to their bounds, looking at every centroid."""
    groups, size = at.order.shape
    k, d = at.centroids.shape
    slots = at.order.reshape(-1)
    centroids_sd, half_norms = _slots(at, slots)

    def tight(x_bd: jax.Array) -> Bounds:
        norms = jnp.sum(x_bd**2, axis=1)
        slack = _slack(norms, at.reach, d)
        scores_sb = score(x_bd, centroids_sd, half_norms)
        best, labels = lowest(scores_sb, slots, k)
        others = jnp.where(slots[:, None] == labels[None, :], jnp.inf, scores_sb)
        others = jnp.min(others.reshape(groups, size, -1), axis=1)
        return Bounds(
            labels=jnp.where(labels < k, labels, 0),
            scores=best,
            upper=_distance(best, norms, slack),
            lower=_distance(others, norms[None, :], -slack[None, :]),
        )

    return tight


def evaluate(x: jax.Array, at: Geometry, bounds: Bounds) -> Bounds:
    """Looks at the pairs of a row and a group that the bounds do not decide.

    Args:
      x: [n, d], any real dtype.
      at: the centroids.
      bounds: which hold for these centroids.

    Returns:
      Bounds with the nearest centroids as labels; those that were looked at are tight.
    """
    groups, size = at.order.shape
    k, d = at.centroids.shape
    n = x.shape[0]
    rows = select(undecided(bounds))

    if groups == 1:
        # Its own centroid is in the group: with one look, a row is read once.
        tight = _tight_bounds(at)

        def look_once(carry: Bounds, rows_b, target: jax.Array, x_bd: jax.Array) -> Bounds:
            del rows_b
            return jax.tree.map(
                lambda whole, part: whole.at[..., target].set(part, mode="drop"),
                carry,
                tight(x_bd),
            )

        return over_some(x, at, rows, bounds, look_once, d + size)

    def tighten(carry: Bounds, rows_b: jax.Array, target: jax.Array, x_bd: jax.Array) -> Bounds:
        labels = carry.labels.at[rows_b].get(mode="clip")
        own_bd = at.centroids[labels]
        norms = jnp.sum(x_bd**2, axis=1)
        scores = at.half_norms[labels] - jnp.sum(x_bd * own_bd, axis=1)
        upper = _distance(scores, norms, _slack(norms, at.reach, d))
        return carry._replace(
            scores=carry.scores.at[target].set(scores, mode="drop"),
            upper=carry.upper.at[target].set(upper, mode="drop"),
        )

    bounds = over_some(x, at, rows, bounds, tighten, 2 * d)

    def look_at_group(g, bounds: Bounds) -> Bounds:
        numbers = at.order[g]
        centroids_sd, half_norms = _slots(at, numbers)

        def look(carry: Bounds, rows_b: jax.Array, target: jax.Array, x_bd: jax.Array) -> Bounds:
            labels = carry.labels.at[rows_b].get(mode="clip")
            own = carry.scores.at[rows_b].get(mode="clip")
            norms = jnp.sum(x_bd**2, axis=1)
            slack = _slack(norms, at.reach, d)
            scores_sb = score(x_bd, centroids_sd, half_norms)
            scores_sb = jnp.where(numbers[:, None] == labels[None, :], jnp.inf, scores_sb)
            best, challenger = lowest(scores_sb, numbers, k)
            wins = (best < own) | ((best == own) & (challenger < labels))
            scores_sb = jnp.where(numbers[:, None] == challenger[None, :], jnp.inf, scores_sb)
            second = jnp.min(scores_sb, axis=0)
            others = jnp.where(wins, second, best)
            lower = carry.lower.at[g, target].set(_distance(others, norms, -slack), mode="drop")
            # The centroid that lost its row becomes one of the others of its group.
            loser = jnp.where(wins, target, n)
            lower = lower.at[group_of[labels], loser].min(
                _distance(own, norms, -slack), mode="drop"
            )
            upper = _distance(best, norms, slack)
            return Bounds(
                labels=carry.labels.at[loser].set(challenger, mode="drop"),
                scores=carry.scores.at[loser].set(best, mode="drop"),
                upper=carry.upper.at[loser].set(upper, mode="drop"),
                lower=lower,
            )

        pairs = select(~(bounds.upper < bounds.lower[g]), rows)
        return over_some(x, at, pairs, bounds, look, d + size)

    group_numbers = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.int32)[:, None], at.order.shape)
    group_of = jnp.zeros(k, jnp.int32).at[at.order].set(group_numbers, mode="drop")
    return lax.fori_loop(0, groups, look_at_group, bounds)


def select(wanted: jax.Array, among: Rows | None = None) -> Rows:
    """The rows for which ``wanted`` holds, in order.

    Args:
      wanted: [n] bool.
      among: the rows to choose from; None for all.
    """
    n = wanted.shape[0]
    if among is None:
        everything = vary_like(jnp.arange(n, dtype=jnp.int32), wanted)
        among = Rows(everything, vary_like(jnp.asarray(n, jnp.int32), wanted))
        one_by_one = _select_by_chunks
    else:
        one_by_one = _select_one_by_one
    return lax.platform_dependent(
        among,
        wanted,
        cpu=one_by_one,
        default=_select_at_once,
    )


def _select_one_by_one(among: Rows, wanted: jax.Array) -> Rows:
    """A few nanoseconds a row on a CPU: less than a cumulative sum takes there."""

    def step(i, chosen: Rows) -> Rows:
        return _append(chosen, among.rows[i], wanted)

    return lax.fori_loop(0, among.count, step, _no_rows(among.rows, wanted))


def _select_by_chunks(among: Rows, wanted: jax.Array) -> Rows:
    """From all rows: first the chunks with any that is wanted, then the rows of those."""
    n = wanted.shape[0]
    chunks = -(-n // _CHUNK)
    padded = jnp.pad(wanted, (0, chunks * _CHUNK - n))
    numbers = vary_like(jnp.arange(chunks, dtype=jnp.int32), wanted)
    every_chunk = Rows(numbers, vary_like(jnp.asarray(chunks, jnp.int32), wanted))
    hit = _select_one_by_one(every_chunk, jnp.any(padded.reshape(chunks, _CHUNK), axis=1))

    def step(i, chosen: Rows) -> Rows:
        return _append(chosen, hit.rows[i // _CHUNK] * _CHUNK + i % _CHUNK, padded)

    # Room for all chunks: what is written past the end would be moved back onto other rows.
    room = vary_like(jnp.zeros(chunks * _CHUNK, jnp.int32), wanted)
    chosen = lax.fori_loop(0, hit.count * _CHUNK, step, _no_rows(room, wanted))
    return Rows(chosen.rows[:n], chosen.count)


def _append(chosen: Rows, row: jax.Array, wanted: jax.Array) -> Rows:
    # Written in any case, and written over by the next one if it is not wanted.
    row = row.astype(jnp.int32)
    rows = lax.dynamic_update_slice_in_dim(chosen.rows, row[None], chosen.count, 0)
    return Rows(rows, chosen.count + wanted[row].astype(jnp.int32))


def _no_rows(like: jax.Array, wanted: jax.Array) -> Rows:
    zero = vary_like(jnp.zeros((), jnp.int32), like, wanted)
    return Rows(vary_like(jnp.zeros_like(like), wanted), zero)


def _select_at_once(among: Rows, wanted: jax.Array) -> Rows:
    n = wanted.shape[0]
    members = jnp.where(jnp.arange(n) < among.count, among.rows, n)
    chosen = jnp.zeros(n, bool).at[members].set(True, mode="drop") & wanted
    # A GPU sorts unsigned numbers faster than it adds them up one after another.
    numbers = jnp.where(chosen, jnp.arange(n, dtype=jnp.uint32), jnp.uint32(n))
    rows = jnp.minimum(lax.sort(numbers, is_stable=False), jnp.uint32(max(n - 1, 0)))
    return Rows(rows.astype(jnp.int32), jnp.sum(chosen).astype(jnp.int32))


def _slots(at: Geometry, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centroids [s, d] and half norms [s] by number; an empty slot is infinitely far."""
    k = at.centroids.shape[0]
    centroids = at.centroids.at[numbers].get(mode="fill", fill_value=0)
    half_norms = jnp.where(numbers < k, at.half_norms.at[numbers].get(mode="clip"), jnp.inf)
    return centroids, half_norms


def _slack(norms: jax.Array, reach: jax.Array, d: int) -> jax.Array:
    """A bound on the rounding error of ‖x‖² + 2·score: (d + 8) u (‖x‖ + ‖c‖)², twice over."""
    eps = jnp.finfo(norms.dtype).eps
    return (d + 8) * eps * (jnp.sqrt(norms) + reach) ** 2


def _distance(scores: jax.Array, norms: jax.Array, slack: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(2 * scores + norms + slack, 0))


def _over_all(
    x: jax.Array, at: Geometry, carry: Any, body: Callable[..., Any], numbers_per_row: int
) -> Any:
    """Folds ``body(carry, start, shifted rows)`` over blocks of rows that follow each other."""
    n, dtype = x.shape[0], at.centroids.dtype
    size = min(n, max(1, _BLOCK_ENTRIES // numbers_per_row))

    def step(i, carry):
        # The last block reaches back over rows that were done before.
        start = jnp.minimum(i * size, n - size)
        x_bd = lax.dynamic_slice_in_dim(x, start, size).astype(dtype) - at.middle
        return body(carry, start, x_bd)

    return lax.fori_loop(0, -(-n // size), step, carry)


def over_some(
    x: jax.Array,
    at: Geometry,
    some: Rows,
    carry: Any,
    body: Callable[..., Any],
    numbers_per_row: int,
    entries: int | None = None,
) -> Any:
    """Folds ``body(carry, rows, target, shifted rows)`` over blocks of the rows of a list.

    ``target`` is where results go: the row, or n for what fills up the last block. A block has
    as many rows as fit ``entries`` numbers, by default what stays in a core's cache.
    """
    n, dtype = x.shape[0], at.centroids.dtype
    size = min(n, max(1, (entries or _BLOCK_ENTRIES) // numbers_per_row))

    def step(i, carry):
        start = jnp.minimum(i * size, n - size)
        rows_b = lax.dynamic_slice_in_dim(some.rows, start, size)
        # The last block reaches back over rows that were done before.
        place = start + jnp.arange(size)
        target = jnp.where((place >= i * size) & (place < some.count), rows_b, n)
        x_bd = x.at[rows_b].get(mode="clip").astype(dtype) - at.middle
        return body(carry, rows_b, target, x_bd)

    return lax.fori_loop(0, -(-some.count // size), step, carry)
