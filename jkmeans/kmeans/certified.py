"""Nearest centroids by products in low precision, with labels that are proven to be exact.

Scores ½‖c‖² − x·c are computed from rows and centroids rounded to a short format, added up in
float32. With a bound on the rounding of every pair, the two most promising centroids of each row
are kept, and a lower bound on the scores of all others: they tell which rows are decided. The
others, 3 to 18 in a hundred where it was measured, are computed anew: by two products in full
precision where only two centroids are left, and otherwise against every centroid. Rows to compute
anew are compacted into dense blocks; an N×K matrix never exists.

What "exact" means. All evaluations begin with the same shifted rows x and centroids c, as
`assignment.nearest` makes them, in the dtype T to compute in (float32, or float64). Write S = ½‖c‖²
− x·c for the true score. A label of level CERTIFIED or COMPARED is the nearest centroid in exact
arithmetic, of the shifted rows and of the original ones as T holds them, and the label that *every*
evaluation of the scores in T gives, in whatever order its sums are taken. A label of level
RECOMPUTED is what the routine of `nearest` (`score`, `lowest`) gives for its row. REFINED and
SETTLED come from the kernel only: the first is proven like the others, the second is the nearer of
two, which T cannot tell apart for certain, by two sums in T. So labels are those of `nearest`,
except that matrix products of different shapes may add in different orders, and then only in rows
where T itself cannot tell which centroid is nearer. Ties go to the lowest index: a tie is never
certified.

The bound. Let u be the unit roundoff of float32 (2⁻²⁴), x̂ and ĉ the rounded arrays, δx = x̂ − x and
δc = ĉ − c (which are exact in T), X = ‖x‖ + ‖δx‖, C = ‖c‖ + ‖δc‖.

1. Inputs. x̂·ĉ − x·c = δx·ĉ + x·δc, at most ‖δx‖ C + X ‖δc‖. These norms are measured: rows that the
   format holds (bytes, bfloat16) have ‖δx‖ = 0, and others about 0.4 of the worst case.
2. Sums. Products of two rounded numbers are exact in float32: 16 bits of bfloat16, 22 of
   TensorFloat-32. A sum of d terms in any order, each addition rounded to nearest or fused with a
   product, errs by at most d u Σ|x̂ⱼ ĉⱼ| / (1 − d u), and Σ|x̂ⱼ ĉⱼ| ≤ X C. A tensor core aligns b
   products and the accumulator to the largest and cuts each at 2u of it, and the result once more:
   2u (b + 2) X C a step, so 2u (d + 2d/b) X C in all, at most 3 d u X C for b ≥ 4. The 3 is used
   everywhere. NVIDIA does not document how its units add. Models that agree with them bit for bit
   (Khattak and Mikaitis, Accurate models of NVIDIA tensor cores, ACM TACO, for Volta to Blackwell;
   first probed by Fasi, Higham, Mikaitis and Pranesh, PeerJ Computer Science 2021) cut later than
   assumed: 1 bit (A100) or 2 (H100, H200, B200) beyond those of float32, with b = 8 or 16. The
   tests hold the bound against such a model, ``python -m benchmarks.gpu`` against the device it
   runs on. Products of 8-bit floats, which Hopper cuts 10 bits earlier, are not covered.
3. ½‖c‖² is a sum of d squares: (d + 1) u ½C². Taken to float32 and its difference with the product
   rounded: 2u (½C² + X C).
4. Any evaluation in T that a certified label must agree with errs by (d + 2) u (½C² + X C) at most,
   and the shift of the original rows and centroids, rounded once, by 3u (½C² + X C).

Together, with a reserve in the 16s for the rounding of s − E below,

    E = ‖δx‖ C + X ‖δc‖ + 4 (d + 16) u (½C² + X C) + underflow,

all multiplied by 1 + 4 (d + 16) u for the rounding of norms and of E itself and for 1/(1 − d u),
with d ≤ 2²⁰. Underflow: a number below m = 2⁻¹²⁶ may become 0, as an input, product or sum. Norms
are therefore taken 2 √(d m) larger, which also covers squares that vanish, and d 2⁻¹²² is added.

A centroid can be the nearest of a row, in any evaluation, only if its s − E is at most the least
s + E of all. The label is the centroid of least s − E, its rival that of the second. If the second
least s − E is above the least s + E, the row is certified; if only the third is, label and rival
are left. Written so that NaN and ∞ decide nothing: a row or centroid that the format cannot hold
has E = ∞ or NaN.

For the two products in T, E = 2 (d + 16) u_T (½C² + X C) + underflow, with the norms of x and c.

Rows and centroids are shifted by a centroid amid the others (`middle_centroid`), so that X and C
are of the size of the data's spread, not of its distance from the origin.

The format is reached by `lax.reduce_precision`, which compilers must not remove; a conversion to
bfloat16 and back they may, and δx would come out as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kernels import screening
from jkmeans.kmeans import bounds, hopper
from jkmeans.kmeans.assignment import (
    PRECISIONS,
    accumulation_dtype,
    check_shapes,
    is_few,
    lowest,
    map_rows,
    middle_centroid,
    nearest,
    score,
)
from jkmeans.kmeans.certainty import (
    CERTIFIED,
    COMPARED,
    RECOMPUTED,
    SETTLED,
    Radii,
    error_of,
    full_error_of,
    radii,
    rounded,
)

# Bits of the significand that a format stores; exponents have the 8 bits of float32.
_STORED_BITS = {name: 10 if name.endswith("-tf32") else 7 for name in PRECISIONS if name != "full"}
# Features up to which the bound is proven.
_MOST_FEATURES = 2**20
# Elsewhere than on a CPU: numbers of a block of gathered rows and its scores, at the most; and the
# shares of all rows that such a block holds of pairs, and of rows that are compared with every
# centroid, for a block takes as long if it is nearly empty. Not measured.
_DEVICE_ENTRIES = 2**27
_SHARE_OF_PAIRS, _SHARE_OF_ROWS = 8, 64
_FEWEST_ROWS = 1024


class Certified(NamedTuple):
    """Nearest centroids, and what each took.

    Attributes:
      labels: [n] int32, in 0 … k-1.
      levels: [n] int8. CERTIFIED: products in low precision proved it. REFINED: products of numbers
        in two parts of low precision did. COMPARED: two products in full precision did. SETTLED:
        they were all that was left, and full precision can hardly tell. RECOMPUTED: the row was
        compared with every centroid in full precision. The last two are not proven.
    """

    labels: jax.Array
    levels: jax.Array


def certified_nearest(
    x: jax.Array,
    centroids: jax.Array,
    *,
    precision: str = "exact",
    block_size: int | None = None,
    ready: hopper.Ready | None = None,
) -> Certified:
    """The label of each row's nearest centroid, found by products in low precision; see above.

    Under ``vmap`` its loops run as long as the longest of the batch needs.

    Args:
      x: [n, d], any real dtype; computed in float32 (float64 if x or centroids are: then rows that
        are not certified are computed in float64).
      centroids: [k, d].
      precision: "exact" for products in bfloat16, "exact-tf32" in TensorFloat-32 (on other devices
        than NVIDIA's: float32 products of numbers rounded to it); "fast" and "fast-tf32" for the
        labels of these products as they are, without any guarantee. "exact-kernel" and
        "fast-kernel" are "exact" and "fast" by a kernel written for Hopper (see ``hopper.py``),
        which has run on no GPU yet; where it does not apply they are "exact" and "fast".
      block_size: the largest number of rows whose scores are in memory at a time; None for what
        suits the device.
      ready: x as `make_ready` left it, for who assigns the same rows again and again; or None.

    Returns:
      Certified. Ties go to the lowest index; a row that holds NaN gets 0. With "fast", levels tell
      that nothing was recomputed, not that labels are certified. Where all centroids hold so few
      numbers that one pass of full precision is fastest, or d exceeds 2²⁰, every row is recomputed.

    Raises:
      ValueError: another ``precision``, or x and centroids are of other shapes.
    """
    if precision not in _STORED_BITS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(_STORED_BITS)}")
    x, centroids = lax.stop_gradient((jnp.asarray(x), jnp.asarray(centroids)))
    check_shapes(x, centroids)
    d, k = x.shape[1], centroids.shape[0]
    if is_few(k, d) or d > _MOST_FEATURES:
        labels = nearest(x, centroids, block_size=block_size)
        return Certified(labels, jnp.full_like(labels, RECOMPUTED, jnp.int8))
    centroids = centroids.astype(accumulation_dtype(x, centroids))
    plain = partial(_nearest_by_products, precision=precision, block_size=block_size)
    if not _takes_kernel(x, centroids, precision):
        return plain(x, centroids, ready)
    by_kernel = partial(nearest_by_kernel, precision=precision, block_size=block_size)
    return lax.platform_dependent(x, centroids, ready, cuda=by_kernel, default=plain)


def make_ready(x: jax.Array, centroids: jax.Array, precision: str) -> hopper.Ready | None:
    """What `certified_nearest` needs of rows whatever the centroids, where it needs anything.

    Args:
      x: [n, d].
      centroids: [k, d], near those that rows will be compared with: the rows' origin is amid them.
      precision: see `certified_nearest`.
    """
    x, centroids = lax.stop_gradient((jnp.asarray(x), jnp.asarray(centroids)))
    centroids = centroids.astype(accumulation_dtype(x, centroids))
    if not _takes_kernel(x, centroids, precision):
        return None
    return hopper.make_ready(x, middle_centroid(centroids))


def _takes_kernel(x: jax.Array, centroids: jax.Array, precision: str) -> bool:
    (n, d), k = x.shape, centroids.shape[0]
    return precision.endswith("-kernel") and not is_few(k, d) and hopper.suits(n, d, k)


def nearest_by_kernel(
    x: jax.Array,
    centroids: jax.Array,
    ready: hopper.Ready | None,
    *,
    precision: str,
    block_size: int | None,
    screen: Callable = screening.screen,
) -> Certified:
    """`certified_nearest` by the kernel, or by what it must equal.

    Where a few centroids are far from all others, one bound for all scores of a row would leave
    most rows open, and units would swallow the differences between the near ones: then it is by
    plain products after all.
    """
    if ready is None:
        ready = hopper.make_ready(x, middle_centroid(centroids))
    at = bounds.geometry(centroids, ready.origin, jnp.zeros((0, 0), jnp.int32))
    plain = partial(_nearest_by_products, precision=precision, block_size=block_size)

    taken = hopper.make_centroids(at)

    def by_kernel() -> Certified:
        if precision.startswith("fast"):
            labels = hopper.nearest(ready, taken, screen)
            return Certified(labels, jnp.full_like(labels, CERTIFIED, jnp.int8))
        return _exact_by_kernel(x, taken, ready, block_size, screen)

    return lax.cond(taken.are_even, by_kernel, lambda: plain(x, centroids, None))


def _exact_by_kernel(
    x: jax.Array,
    centroids: hopper.Centroids,
    ready: hopper.Ready,
    block_size: int | None,
    screen: Callable,
) -> Certified:
    at = centroids.at
    found = hopper.look(ready, centroids, screen)
    undecided = hopper.undecided(found.levels)
    found = hopper.look_again(x, at, found, undecided.rows, screen)
    # Which of two is nearer is float32's to say, also where it hardly can: "full" adds in another
    # order, that is all.
    labels, levels = _compare_pairs(x, at, *found, rows=undecided.with_pairs, settle=True)
    # Few rows are left, often none: then not even a list of them is made.
    return lax.cond(
        jnp.any(levels == RECOMPUTED),
        lambda: Certified(*_recompute(x, at, labels, levels, block_size)),
        lambda: Certified(labels, levels),
    )


def _nearest_by_products(
    x: jax.Array,
    centroids: jax.Array,
    ready: hopper.Ready | None,
    *,
    precision: str,
    block_size: int | None,
) -> Certified:
    del ready
    k, dtype = centroids.shape[0], centroids.dtype
    at = bounds.geometry(centroids, middle_centroid(centroids), jnp.zeros((0, 0), jnp.int32))
    bits = _STORED_BITS[precision]
    numbers = jnp.arange(k, dtype=jnp.int32)

    def shifted(x_bd: jax.Array) -> jax.Array:
        return x_bd.astype(dtype) - at.middle

    if precision.startswith("fast"):
        scores = _low_scores(at, bits)

        def find(x_bd: jax.Array) -> jax.Array:
            return _valid(lowest(scores(rounded(shifted(x_bd), bits)), numbers, k)[1], k)

        labels = map_rows(find, x, block_size)
        return Certified(labels, jnp.full_like(labels, CERTIFIED, jnp.int8))
    screen = screen_plainly(at, bits)
    first = map_rows(lambda x_bd: screen(shifted(x_bd)), x, block_size)
    labels, levels = _compare_pairs(x, at, *first, rows=bounds.select(first[2] == COMPARED))
    return Certified(*_recompute(x, at, labels, levels, block_size))


def screen_plainly(at: bounds.Geometry, bits: int):
    """A function from shifted rows [b, d] to their labels, rivals and levels, all [b].

    The rival is the centroid that the row is to be compared with, where its level is COMPARED.
    """
    k, d = at.centroids.shape
    scores = _low_scores(at, bits)
    numbers = jnp.arange(k, dtype=jnp.int32)
    size, change = radii(at.centroids, rounded(at.centroids, bits))
    of_centroids = Radii(size[:, None], change[:, None])

    def screen(x_bd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        low_bd = rounded(x_bd, bits)
        size, change = radii(x_bd, low_bd)
        scores_kb = scores(low_bd)
        errors_kb = error_of(of_centroids, Radii(size[None], change[None]), d)
        upper = jnp.min(scores_kb + errors_kb, axis=0)
        lower_kb = scores_kb - errors_kb
        _, labels = lowest(lower_kb, numbers, k)
        lower_kb = jnp.where(numbers[:, None] == labels[None, :], jnp.inf, lower_kb)
        second, rivals = lowest(lower_kb, numbers, k)
        lower_kb = jnp.where(numbers[:, None] == rivals[None, :], jnp.inf, lower_kb)
        third = jnp.min(lower_kb, axis=0)
        # Written so that NaN decides nothing.
        levels = jnp.where(upper < third, COMPARED, RECOMPUTED)
        levels = jnp.where(upper < second, CERTIFIED, levels).astype(jnp.int8)
        return _valid(labels, k), _valid(rivals, k), levels

    return screen


def _compare_pairs(
    x: jax.Array,
    at: bounds.Geometry,
    labels: jax.Array,
    rivals: jax.Array,
    levels: jax.Array,
    rows: bounds.Rows,
    settle: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Labels and levels after rows of level COMPARED, among some, were compared with two centroids.

    Where full precision cannot tell the two apart, whatever the order of its sums, the level
    becomes RECOMPUTED; or SETTLED, if pairs are to be settled: by the sums made here, and where
    these are equal by the lower index.
    """
    d = x.shape[1]
    kind = at.centroids.dtype
    size = radii(at.centroids, at.centroids, kind).size

    def compare(carry, rows_b, target, x_bd):
        labels, levels = carry
        is_pair = levels.at[rows_b].get(mode="clip") == COMPARED
        target = jnp.where(is_pair, target, x.shape[0])
        of_rows = radii(x_bd, x_bd, kind)

        def look(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
            products = jnp.sum(x_bd * at.centroids[numbers], axis=1)
            own = Radii(size[numbers], jnp.zeros_like(products))
            return at.half_norms[numbers] - products, full_error_of(own, of_rows, d)

        first, second = labels.at[rows_b].get(mode="clip"), rivals.at[rows_b].get(mode="clip")
        (one, one_error), (other, other_error) = look(first), look(second)
        decided = (one + one_error < other - other_error) | (other + other_error < one - one_error)
        is_first = (one < other) | ((one == other) & (first < second))
        labels = labels.at[target].set(jnp.where(is_first, first, second), mode="drop")
        # NaN settles nothing.
        settled = settle & jnp.isfinite(one) & jnp.isfinite(other)
        new = jnp.where(settled, SETTLED, RECOMPUTED)
        new = jnp.where(decided, COMPARED, new).astype(jnp.int8)
        return labels, levels.at[target].set(new, mode="drop")

    entries = _block_entries(x.shape[0], _SHARE_OF_PAIRS, 3 * d)
    return bounds.over_some(x, at, rows, (labels, levels), compare, 3 * d, entries)


def _recompute(
    x: jax.Array,
    at: bounds.Geometry,
    labels: jax.Array,
    levels: jax.Array,
    block_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Labels and levels after rows of level RECOMPUTED were compared with every centroid."""
    k, d = at.centroids.shape
    numbers = jnp.arange(k, dtype=jnp.int32)

    def look(labels, rows_b, target, x_bd):
        del rows_b
        found = _valid(lowest(score(x_bd, at.centroids, at.half_norms), numbers, k)[1], k)
        return labels.at[target].set(found, mode="drop")

    entries = _block_entries(x.shape[0], _SHARE_OF_ROWS, k + d)
    if block_size is not None:
        entries = block_size * (k + d)
    rows = bounds.select(levels == RECOMPUTED)
    return bounds.over_some(x, at, rows, labels, look, k + d, entries), levels


def _block_entries(n: int, share: int, numbers_per_row: int) -> int | None:
    """Numbers of a block of some of n rows, see `bounds.over_some`."""
    if jax.default_backend() == "cpu":
        return None
    return min(_DEVICE_ENTRIES, max(_FEWEST_ROWS, -(-n // share)) * numbers_per_row)


def _low_scores(at: bounds.Geometry, bits: int):
    """A function from rounded rows [b, d] to ½‖c‖² − x̂·ĉ: [k, b] float32."""
    centroids_kd = rounded(at.centroids, bits).astype(jnp.float32)
    half_norms = at.half_norms.astype(jnp.float32)

    def scores(x_bd: jax.Array) -> jax.Array:
        # Every conversion here is of numbers that the format holds.
        products = _bfloat16_products if bits == 7 else _tf32_products
        return half_norms[:, None] - products(centroids_kd, x_bd.astype(jnp.float32).T)

    return scores


def _bfloat16_products(left: jax.Array, right: jax.Array) -> jax.Array:
    def products(left: jax.Array, right: jax.Array) -> jax.Array:
        left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
        return lax.dot(left, right, preferred_element_type=jnp.float32)

    # The same products of the same numbers; a CPU computes them faster in float32.
    return lax.platform_dependent(left, right, cpu=_float32_products, default=products)


def _tf32_products(left: jax.Array, right: jax.Array) -> jax.Array:
    def products(left: jax.Array, right: jax.Array) -> jax.Array:
        # On NVIDIA's devices the default is TensorFloat-32, or float32 where they have no other.
        return lax.dot(left, right, precision=lax.Precision.DEFAULT)

    return lax.platform_dependent(left, right, cuda=products, default=_float32_products)


def _float32_products(left: jax.Array, right: jax.Array) -> jax.Array:
    return lax.dot(left, right, precision=lax.Precision.HIGHEST)


def _valid(labels: jax.Array, k: int) -> jax.Array:
    return jnp.where(labels < k, labels, 0)  # no score equals NaN


def low_scores(
    x: jax.Array, centroids: jax.Array, precision: str = "exact"
) -> tuple[jax.Array, jax.Array]:
    """Scores ½‖c‖² − x·c in low precision and the bounds E on their errors, to probe a device.

    Args:
      x: [n, d] float32, as it is: not shifted.
      centroids: [k, d] float32, likewise.
      precision: "exact" or "exact-tf32".

    Returns:
      scores and bounds, both [k, n] float32: all of them are in memory.
    """
    x, centroids, bits = jnp.asarray(x), jnp.asarray(centroids), _STORED_BITS[precision]
    origin = jnp.zeros((1, x.shape[1]), x.dtype)
    at = bounds.geometry(centroids, origin, jnp.zeros((0, 0), jnp.int32))
    low = rounded(x, bits)
    of_rows, of_centroids = radii(x, low), radii(centroids, rounded(centroids, bits))
    each = Radii(of_centroids.size[:, None], of_centroids.change[:, None])
    row = Radii(of_rows.size[None], of_rows.change[None])
    return _low_scores(at, bits)(low), error_of(each, row, x.shape[1])


def share(levels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The share of rows, of those with weight, that were computed anew: [] float32."""
    anew = levels != CERTIFIED
    if weights is None:
        return jnp.mean(anew, dtype=jnp.float32)
    counted = weights > 0
    return jnp.sum(anew & counted) / jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
