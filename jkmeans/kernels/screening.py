"""Screening of rows for certified labels on Hopper: products, bounds and minima in one kernel.

A program takes 64 rows and streams over all centroids, 128 at a time: matrix units multiply a tile
of rows with a tile of centroids, and before the next tile its scores shrink to what
`jkmeans.kmeans.certified` needs of them. Scores never leave the chip.

Written with Pallas Mosaic GPU, tested in its interpreter on a CPU and lowered for CUDA. **It has
run on no GPU**, and no path of jkmeans takes it: a beginning for whoever has one. Copies do not
overlap products yet, and features are in shared memory all at once, so d is at most 512.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jkmeans.kmeans import certified

ROWS, CENTROIDS, FEATURES = 64, 128, 64
"""The tile of rows, of centroids, and what features are padded to a multiple of."""


MOST_FEATURES = 512
"""What shared memory has room for."""


class Screened(NamedTuple):
    """What is kept of the scores s and their bounds E of each row, all [n].

    Attributes:
      upper: the least s + E.
      labels: int32, the centroid of the least s − E, the lowest of equals.
      rivals: int32, that of the second least.
      second: the second least s − E.
      third: the third least.
    """

    upper: jax.Array
    labels: jax.Array
    rivals: jax.Array
    second: jax.Array
    third: jax.Array


def screen_rows(
    x: jax.Array, centroids: jax.Array, half_norms: jax.Array, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `certified.screening` gives, by the kernel.

    Args:
      x: [n, d] float32, shifted.
      centroids: [k, d] float32, shifted.
      half_norms: [k] float32.
      interpret: see `screen`.

    Returns:
      labels [n] int32, rivals [n] int32 and levels [n] int8.
    """
    d = x.shape[1]
    rows, means = certified.rounded(x, 7), certified.rounded(centroids, 7)
    size, change = certified.radii(x, rows)
    far, moved = certified.radii(centroids, means)
    # E of `certified`, as a sum of products of what a row has with what a centroid has.
    sums = certified.share_of_sums(d)
    of_rows = (1 + sums) * jnp.stack([change + sums * size, size])
    rest = (1 + sums) * (0.5 * sums * far**2 + d * certified.UNDERFLOW)
    found = screen(
        rows.astype(jnp.bfloat16),
        means.astype(jnp.bfloat16),
        of_rows,
        jnp.stack([half_norms, far, moved, rest]),
        interpret=interpret,
    )
    # A GPU's minima pass over NaN: where one may arise, nothing is decided.
    reach = jnp.max(far)
    certain = jnp.isfinite(4 * (size * reach + reach**2))
    levels = jnp.where(found.upper < found.third, certified.COMPARED, certified.RECOMPUTED)
    levels = jnp.where(found.upper < found.second, certified.CERTIFIED, levels)
    levels = jnp.where(certain, levels, certified.RECOMPUTED).astype(jnp.int8)
    return found.labels, found.rivals, levels


def screen(
    rows: jax.Array,
    centroids: jax.Array,
    of_rows: jax.Array,
    of_centroids: jax.Array,
    *,
    interpret: Any = None,
) -> Screened:
    """Scores s = h − x·c and bounds E = C a + D b + q of all pairs, reduced to `Screened`.

    Args:
      rows: [n, d] bfloat16.
      centroids: [k, d] bfloat16.
      of_rows: [2, n] float32: a and b. Finite, like all else here: a GPU's minima pass over NaN.
      of_centroids: [4, k] float32: h, C, D and q.
      interpret: parameters of Pallas' interpreter; None to run on the device.

    Returns:
      Screened.

    Raises:
      ValueError: more than MOST_FEATURES features.
    """
    n, d = rows.shape
    if d > MOST_FEATURES:
        raise ValueError(f"rows have {d} features: expected at most {MOST_FEATURES}")
    k = centroids.shape[0]
    n_rows, n_tiles = -(-n // ROWS), -(-k // CENTROIDS)
    width = -(-d // FEATURES) * FEATURES
    rows = jnp.pad(rows, ((0, n_rows * ROWS - n), (0, width - d)))
    centroids = jnp.pad(centroids, ((0, n_tiles * CENTROIDS - k), (0, width - d)))
    of_rows = jnp.pad(of_rows, ((0, 0), (0, n_rows * ROWS - n)))
    more = n_tiles * CENTROIDS - k
    # What fills up the last tile is infinitely far.
    far = jnp.full((1, more), jnp.inf, jnp.float32)
    filling = jnp.concatenate([far, jnp.zeros((3, more), jnp.float32)])
    of_centroids = jnp.concatenate([of_centroids, filling], axis=1)

    def body(x_ref, c_ref, a_ref, b_ref, h_ref, size_ref, change_ref, q_ref, *rest):
        outputs, (x, c, a, b, h, size, change, q, results, numbers, barrier) = rest[:5], rest[5:]
        first = lax.axis_index("rows") * ROWS
        mine = pl.ds(first, ROWS)
        for source, target in ((x_ref, x), (a_ref, a), (b_ref, b)):
            plgpu.copy_gmem_to_smem(source.at[mine], target, barrier)
            plgpu.barrier_wait(barrier)
        a_b, b_b = a[...], b[...]

        def spread(of_rows):
            return lax.broadcast_in_dim(of_rows, (ROWS, CENTROIDS), (0,))

        def across(ref):
            return lax.broadcast_in_dim(ref[...], (ROWS, CENTROIDS), (1,))

        def step(tile, kept):
            theirs = pl.ds(tile * CENTROIDS, CENTROIDS)
            plgpu.copy_gmem_to_smem(c_ref.at[:, theirs], c, barrier)
            plgpu.barrier_wait(barrier)
            sources = (h_ref, size_ref, change_ref, q_ref)
            for source, target in zip(sources, (h, size, change, q), strict=True):
                plgpu.copy_gmem_to_smem(source.at[theirs], target, barrier)
                plgpu.barrier_wait(barrier)

            def multiply(accumulator):
                plgpu.wgmma(accumulator, x, c)
                plgpu.wgmma_wait(0)
                return accumulator[...]

            room = plgpu.ACC((ROWS, CENTROIDS), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
            products = pl.run_scoped(multiply, room)
            scores = across(h) - products
            errors = across(size) * spread(a_b) + across(change) * spread(b_b) + across(q)
            number = tile * CENTROIDS + lax.broadcasted_iota(jnp.int32, (ROWS, CENTROIDS), 1)
            lower = scores - errors
            upper, one, i, two, j, three = kept
            upper = jnp.minimum(upper, jnp.min(scores + errors, axis=1))
            for _ in range(3):
                # The least that is left of the tile takes its place among the kept.
                value = jnp.min(lower, axis=1)
                is_least = lower == spread(value)
                whose = jnp.min(jnp.where(is_least, number, jnp.int32(2**30)), axis=1)
                lower = jnp.where(number == spread(whose), jnp.float32(jnp.inf), lower)
                before_one, before_two, before_three = value < one, value < two, value < three
                three = jnp.where(before_two, two, jnp.where(before_three, value, three))
                two, j = (
                    jnp.where(before_one, old, jnp.where(before_two, new, kept_))
                    for old, new, kept_ in ((one, value, two), (i, whose, j))
                )
                one, i = jnp.where(before_one, value, one), jnp.where(before_one, whose, i)
            return upper, one, i, two, j, three

        infinite = jnp.full((ROWS,), jnp.inf, jnp.float32)
        zero = jnp.zeros((ROWS,), jnp.int32)
        start = (infinite, infinite, zero, infinite, zero, infinite)
        upper, _, i, two, j, three = lax.fori_loop(0, n_tiles, step, start)
        for shared, output, value in zip(
            (results, numbers, numbers, results, results),
            outputs,
            (upper, i, j, two, three),
            strict=True,
        ):
            shared[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared, output.at[mine])
            plgpu.wait_smem_to_gmem(0)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    of_row = jax.ShapeDtypeStruct((n_rows * ROWS,), jnp.float32)
    number = jax.ShapeDtypeStruct((n_rows * ROWS,), jnp.int32)
    vector = functools.partial(plgpu.SMEM, dtype=jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=(of_row, number, number, of_row, of_row),
        grid=(n_rows,),
        grid_names=("rows",),
        scratch_types=[
            plgpu.SMEM((ROWS, width), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((width, CENTROIDS), jnp.bfloat16, transforms=tiled),
            *(vector((ROWS,)) for _ in range(2)),
            *(vector((CENTROIDS,)) for _ in range(4)),
            vector((ROWS,)),
            plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.Barrier(),
        ],
        # The compiler infers the layouts of registers.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    found = kernel(rows, centroids.T, *of_rows, *of_centroids)
    return Screened(*(values[:n] for values in found))
