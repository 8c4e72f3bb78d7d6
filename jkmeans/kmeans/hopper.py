"""Certified labels on Hopper: what ``certified.py`` does in plain XLA, by a kernel.

The kernel, `kernels.screening`, tells, of each row, the nearest and the next centroid, and how far
behind the next and the third are. The bound E on the error of a score is that of ``certified.py``
for the largest of the centroids, one for all scores of a row, plus the unit to which the kernel
rounds them: a gap of more than 2E decides.

Rows with more than two centroids in reach are looked at again by the same kernel, with numbers in
two parts: x = x₁ + x₂ + δx with x₁ and x₂ in bfloat16, c likewise, and x·c ≈ x₁·c₁ + x₁·c₂ + x₂·c₁,
which is one product of rows of three times as many features. What it leaves out is at most
‖x₂‖ ‖c₂‖ + ‖δx‖ ‖c‖ + (‖x₁‖ + ‖x₂‖) ‖δc‖, and its sums are bounded as those of any 3d terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans.kernels import screening
from jkmeans.kmeans import bounds
from jkmeans.kmeans.certainty import (
    CERTIFIED,
    COMPARED,
    RECOMPUTED,
    REFINED,
    UNDERFLOW,
    Radii,
    error_of,
    radii,
    rounded,
    share_of_sums,
)
from jkmeans.kmeans.collectives import vary_like

# Bits of the significand that bfloat16 stores.
_STORED_BITS = 7
# Rows of a second look at a time, at the most: two waves of blocks on 132 multiprocessors. Of small
# problems an eighth of all rows, lest a few take as long as all.
_SECOND_ROWS = 132 * 2 * screening.ROWS
_SECOND_SHARE = 8
# Of a number that says which row, and what kind it is of.
_BITS_OF_ROWS = 30
# Of a row in two parts, up to which its bound is proven.
_MOST_FEATURES = 2**20 // 3
# The largest centroid, as a multiple of the geometric mean of all, up to which one bound, and one
# unit, will do for all scores of a row.
_EVEN = 64
# With fewer, tiles of the kernel would be mostly filling.
_FEWEST_CENTROIDS, _FEWEST_FEATURES = 32, 16


class Ready(NamedTuple):
    """Rows as the kernel takes them, the same for all centroids.

    Attributes:
      origin: [1, d], what was taken from them.
      rows: [n', d'] bfloat16, filled up with zeros to what the kernel divides by.
      radii: of the n rows; float32.
    """

    origin: jax.Array
    rows: jax.Array
    radii: Radii


class Centroids(NamedTuple):
    """Centroids as the kernel takes them.

    Attributes:
      at: as they are.
      rows: [k, d] bfloat16.
      largest: the largest of their radii, [] float32.
      are_even: whether they are of one size, more or less; [] bool. One far from all others is not.
    """

    at: bounds.Geometry
    rows: jax.Array
    largest: Radii
    are_even: jax.Array


class Look(NamedTuple):
    """What the kernel tells of n rows.

    Attributes:
      labels: [n] int32.
      rivals: [n] int32, whom a row is to be compared with where only that one is in reach.
      levels: [n] int8, CERTIFIED, COMPARED where it is to be, RECOMPUTED likewise.
    """

    labels: jax.Array
    rivals: jax.Array
    levels: jax.Array


def suits(n: int, d: int, k: int) -> bool:
    """Whether programs are compiled for Hopper, and the kernel is made for such a problem."""
    if jax.default_backend() != "gpu" or d < _FEWEST_FEATURES or k < _FEWEST_CENTROIDS:
        return False
    few_enough = screening.bits_of_slices(k) <= screening.MOST_BITS and n < 2**_BITS_OF_ROWS
    return (
        few_enough
        and n > 0
        and d <= _MOST_FEATURES
        and getattr(jax.devices()[0], "compute_capability", None) == "9.0"
    )


def make_centroids(at: bounds.Geometry) -> Centroids:
    """Centroids in bfloat16, and what bounds need of them."""
    low = rounded(at.centroids, _STORED_BITS)
    each = radii(at.centroids, low)
    largest = Radii(*(jnp.max(radius).astype(jnp.float32) for radius in each))
    are_even = jnp.max(each.size) <= _EVEN * jnp.exp(jnp.mean(jnp.log(each.size)))
    return Centroids(at, low.astype(jnp.bfloat16), largest, are_even)


def make_ready(x: jax.Array, origin: jax.Array) -> Ready:
    """Rows [n, d] less an origin [1, d], in bfloat16, and what bounds need of them."""
    shifted = x.astype(origin.dtype) - origin
    low = rounded(shifted, _STORED_BITS)
    return Ready(origin, _filled(low, screening.ROWS), _in_float32(radii(shifted, low)))


def nearest(ready: Ready, centroids: Centroids, screen: Callable = screening.screen) -> jax.Array:
    """The label of each row by products in bfloat16 as they are: [n]. 0 where they overflow.

    ``screen`` is here and below what tells of rows: the kernel, or `screening.screen_plainly`.
    """
    reach = _reach(ready, centroids)
    units = units_for(reach, centroids.rows.shape[0])
    found = _screen(screen, ready.rows, centroids.rows, centroids.at, units, only_nearest=True)
    return jnp.where(units.are_valid, found.labels[: reach.shape[0]], 0)


def look(ready: Ready, centroids: Centroids, screen: Callable = screening.screen) -> Look:
    """What products in bfloat16 tell of each row."""
    errors = error_of(centroids.largest, ready.radii, centroids.rows.shape[1])
    reach = _reach(ready, centroids)
    return _look(screen, ready.rows, centroids.rows, centroids.at, errors, reach)


class Undecided(NamedTuple):
    """Rows that a first look left open.

    Attributes:
      rows: those of level RECOMPUTED.
      with_pairs: the same, and after them those of level COMPARED.
    """

    rows: bounds.Rows
    with_pairs: bounds.Rows


def undecided(levels: jax.Array) -> Undecided:
    """The rows [n] that are not certified, by one sort: kernels cost more than small problems."""
    n = levels.shape[0]
    kinds = jnp.where(levels == COMPARED, 1, jnp.where(levels == RECOMPUTED, 0, 2))
    keys = (kinds.astype(jnp.uint32) << _BITS_OF_ROWS) | jnp.arange(n, dtype=jnp.uint32)
    order = lax.sort(keys, is_stable=False) & jnp.uint32(2**_BITS_OF_ROWS - 1)
    counts = jnp.sum(kinds[None] <= jnp.arange(2)[:, None], axis=1, dtype=jnp.int32)
    return Undecided(*(bounds.Rows(order.astype(jnp.int32), count) for count in counts))


def look_again(
    x: jax.Array,
    at: bounds.Geometry,
    first: Look,
    rows: bounds.Rows,
    screen: Callable = screening.screen,
) -> Look:
    """What products of numbers in two parts tell of some rows of level RECOMPUTED.

    Others stay as they were. Rows that it certifies get level REFINED.
    """
    n, d = x.shape
    high, rest, of_centroids = _in_parts(at.centroids)
    size_c, rest_c, change_c = (jnp.max(radius) for radius in of_centroids)
    # Those that shared a slot of the kernel, so that it could not tell the third, are neighbours.
    order = np.argsort(np.arange(at.centroids.shape[0]) % screening.FOLD, kind="stable")
    turned = jnp.concatenate([high, rest, high], axis=1)[order]
    reordered = at._replace(half_norms=at.half_norms[order])
    numbers = jnp.asarray(order, jnp.int32)
    sums = share_of_sums(3 * d)

    def step(carry: Look, rows_b, target, x_bd) -> Look:
        del rows_b
        high, rest, (size, rest_x, change) = _in_parts(x_bd)
        left_out = rest_x * rest_c + change * size_c + size * change_c
        of_sums = sums * (0.5 * size_c**2 + size * size_c) + 3 * d * UNDERFLOW
        rows = _filled(jnp.concatenate([high, high, rest], axis=1), screening.ROWS)
        errors = (1 + sums) * (left_out + of_sums)
        found = _look(screen, rows, turned, reordered, errors, reach_of(size, size_c, 3 * d))
        levels = jnp.where(found.levels == CERTIFIED, REFINED, found.levels).astype(jnp.int8)
        found = Look(numbers[found.labels], numbers[found.rivals], levels)
        put = (old.at[target].set(new, mode="drop") for old, new in zip(carry, found, strict=True))
        return Look(*put)

    share = -(-n // _SECOND_SHARE)
    share += -share % screening.ROWS
    return bounds.over_some(x, at, rows, first, step, 1, min(share, _SECOND_ROWS))


def _look(
    screen: Callable,
    rows: jax.Array,
    low: jax.Array,
    at: bounds.Geometry,
    errors: jax.Array,
    reach: jax.Array,
) -> Look:
    n = errors.shape[0]
    units = units_for(reach, low.shape[0])
    found = _screen(screen, rows, low, at, units, only_nearest=False)
    assert found.rivals is not None
    assert found.second is not None
    assert found.third is not None
    open_ = 2 * (errors + units.units)
    # Written so that NaN decides nothing.
    levels = jnp.where(found.third[:n] * units.units > open_, COMPARED, RECOMPUTED)
    levels = jnp.where(found.second[:n] * units.units > open_, CERTIFIED, levels)
    levels = jnp.where(units.are_valid, levels, RECOMPUTED).astype(jnp.int8)
    return Look(found.labels[:n], found.rivals[:n], levels)


class Units(NamedTuple):
    """The units of rows: powers of 2, the offsets that round to them, and where they hold."""

    units: jax.Array
    offsets: jax.Array
    are_valid: jax.Array


def units_for(reach: jax.Array, n_centroids: int) -> Units:
    """Units so small as `screening` allows for scores up to ``reach`` [n]."""
    bits = screening.bits_of_slices(n_centroids)
    # 2^m above reach · 2^(bits − 8): then no score reaches 2^(31 − bits) units of 2^(m − 23).
    exponent = (lax.bitcast_convert_type(reach, jnp.int32) >> 23) + (1 + bits - 8)
    # Finite offsets, units that are no subnormal numbers; 255 is that of infinity and NaN.
    clipped = jnp.clip(exponent, 64, 254)
    offsets = (clipped << 23) | (1 << 22)
    return Units(
        lax.bitcast_convert_type((clipped - 23) << 23, jnp.float32),
        lax.bitcast_convert_type(offsets, jnp.float32),
        jnp.isfinite(reach) & (exponent <= 254),
    )


def _screen(
    screen: Callable,
    rows: jax.Array,
    low: jax.Array,
    at: bounds.Geometry,
    units: Units,
    only_nearest: bool,
) -> screening.Screened:
    missing = rows.shape[0] - units.offsets.shape[0]
    found = screen(
        rows,
        _filled(low, 1),
        at.half_norms.astype(jnp.float32),
        jnp.pad(units.offsets, (0, missing), constant_values=1.0),
        only_nearest=only_nearest,
    )
    # Kernels lose along which axes of a mesh values differ.
    return jax.tree.map(lambda leaf: vary_like(leaf, rows, low), found)


def _in_parts(values: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """v₁ and v₂ [m, d], and at least ‖v₁‖ + ‖v₂‖, ‖v₂‖ and ‖δv‖ [m] in float32."""
    high = rounded(values, _STORED_BITS)
    left = values - high
    rest = rounded(left, _STORED_BITS)
    whole, part = _in_float32(radii(values, high)), _in_float32(radii(left, rest))
    # ‖v₁‖ is at most ‖v‖ + ‖v − v₁‖, and ‖v₂‖ at most ‖v − v₁‖ + ‖δv‖.
    return high, rest, (whole.size + part.size, part.size, part.change)


def reach_of(size: jax.Array, of_centroids: jax.Array, d: int) -> jax.Array:
    """At least |s| for all scores of a row: ½C² + X C, and what sums of d terms may add."""
    return (1.001 + share_of_sums(d)) * (0.5 * of_centroids**2 + size * of_centroids)


def _reach(ready: Ready, centroids: Centroids) -> jax.Array:
    return reach_of(ready.radii.size, centroids.largest.size, centroids.rows.shape[1])


def _in_float32(of_rows: Radii) -> Radii:
    # Rounded up: float64 has norms that float32 rounds down.
    return Radii(*((radius * (1 + 2.0**-22)).astype(jnp.float32) for radius in of_rows))


def _filled(values: jax.Array, multiple: int) -> jax.Array:
    """In bfloat16, with zeros for rows and features that tiles have and values [m, d] have not."""
    m, d = values.shape
    missing = ((0, -m % multiple), (0, -d % screening.FEATURES))
    return jnp.pad(values.astype(jnp.bfloat16), missing)


def nearest_scores(x: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel's scores of the nearest centroids and the bounds on their errors, for probing.

    Args:
      x: [n, d] float32, as it is: not shifted.
      centroids: [k, d] float32, likewise.

    Returns:
      labels [n] int32, scores ½‖c‖² − x·c [n] and bounds [n], both float32.
    """
    ready = make_ready(x, jnp.zeros((1, x.shape[1]), x.dtype))
    at = bounds.geometry(centroids, ready.origin, jnp.zeros((0, 0), jnp.int32))
    taken = make_centroids(at)
    units = units_for(_reach(ready, taken), centroids.shape[0])
    found = _screen(screening.screen, ready.rows, taken.rows, at, units, only_nearest=False)
    n, d = x.shape
    errors = error_of(taken.largest, ready.radii, d) + units.units
    return found.labels[:n], found.scores[:n] * units.units, errors
