"""The nearest centroids of rows by products in bfloat16, in one kernel for Hopper.

A block of the kernel takes a few hundred rows and streams over all centroids, a tile at a time.
One warpgroup copies tiles into shared memory (TMA); two others multiply them with their rows
(wgmma) in turns, so that one's products run while the other takes what is needed out of its scores.
Scores never leave the registers: there is no matrix of n × k.

What is kept is little, because it costs more than the products where rows are short. Each score
s = ½‖c‖² − x·c becomes an integer key of 32 bits: the upper ones are s in units of its row,
rounded, the lower ones say in which slice of which tile it was met. Columns of a tile are folded
into `FOLD` slots, and each slot keeps its two least keys, with two and a half minima or maxima of
integers a score; only after the last tile the slots of a row are compared with each other.

Written with Pallas Mosaic GPU. It is tested in its interpreter on a CPU, and compiled down to
Hopper's own instructions without a GPU (``python -m benchmarks.gpu_code``). **It has run on no
GPU yet**, and is taken only where it is asked for by name.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FEATURES = 64
"""What features are padded to a multiple of: a line of swizzled shared memory, 128 bytes."""

ROWS = 256
"""What rows are padded to a multiple of."""

FOLD = 16
"""Slots of a row."""

FEWEST_BITS = 10
"""Of a key, for slices: so many push exponent and first bit of an offset out of it."""

MOST_BITS = 16
"""Of a key, for slices: fewer bits would be left of a score than bfloat16 is worth."""

_SHARED_MEMORY = 227 * 1024
_WORKERS = 2
# Chunks of features up to which the loop over them is written out.
_FEW_CHUNKS = 12
# Registers of a thread that copies, and of one that multiplies: 128 × (40 + 2 × 232) fit.
_FEW_REGISTERS, _MANY_REGISTERS = 40, 232


class Tiles(NamedTuple):
    """How a problem is cut up.

    Attributes:
      rows: of a warpgroup, a multiple of 64.
      centroids: of a tile, a multiple of 2 `FOLD`.
      stages: parts of tiles, of `FEATURES` features, that are under way; at least 2.
      resident: whether all features of a block's rows stay in shared memory; otherwise they are
        copied again with each tile of centroids.
    """

    rows: int
    centroids: int
    stages: int
    resident: bool


class Screened(NamedTuple):
    """The nearest centroids of rows by rounded scores.

    Attributes:
      labels: [n] int32, the nearest.
      scores: [n] float32, its score, in units of the row.
      rivals: [n] int32, the next; None where only the nearest was asked for.
      second: [n] float32, how much larger its score is, in units of the row; likewise.
      third: [n] float32, at most how much larger the score of any other centroid is; likewise.
    """

    labels: jax.Array
    scores: jax.Array
    rivals: jax.Array | None
    second: jax.Array | None
    third: jax.Array | None


def bits_of_slices(n_centroids: int) -> int:
    """The bits of a key that say which slice of which tile a score is from."""
    return max(FEWEST_BITS, (-(-n_centroids // FOLD) - 1).bit_length())


def tiles_for(d: int) -> Tiles:
    """The tiles for rows of d features, a multiple of `FEATURES`: chosen without a GPU so far."""
    for rows in (128, 64):
        tiles = Tiles(rows, 128, 4, True)
        if fits(d, tiles):
            return tiles
    return Tiles(128, 128, 4, False)


def fits(d: int, tiles: Tiles) -> bool:
    """Whether a block with rows of d features has room in shared memory."""
    return tiles.stages >= 2 and _shared_memory(d, tiles) <= _SHARED_MEMORY


def _shared_memory(d: int, tiles: Tiles) -> int:
    """Bytes of shared memory that a block takes, about."""
    rows = _WORKERS * tiles.rows
    of_stage = 2 * FEATURES * tiles.centroids + 4 * tiles.centroids
    if not tiles.resident:
        of_stage += 2 * FEATURES * rows
    return tiles.stages * of_stage + tiles.resident * 2 * d * rows + 24 * rows + 2048


def screen(
    rows: jax.Array,
    centroids: jax.Array,
    half_norms: jax.Array,
    offsets: jax.Array,
    *,
    only_nearest: bool = False,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> Screened:
    """The nearest centroids of rows by scores s = h − x·c, rounded to multiples of a unit.

    Args:
      rows: [n, d] bfloat16, n a multiple of `ROWS` and d one of `FEATURES`.
      centroids: [k, d] bfloat16.
      half_norms: [k] float32: h.
      offsets: [n] float32, 1.5 · 2^23 times the unit of each row, a power of 2. A unit must be so
        large that no score of its row reaches 2^(31 − bits) units, with `bits_of_slices`. Finite,
        like all else here.
      only_nearest: whether the rest of `Screened` is left out, which is faster.
      tiles: None for `tiles_for`.
      interpret: parameters of Pallas' interpreter; None to run on the device.

    Returns:
      Screened. Of centroids whose rounded scores are equal any may come first.

    Raises:
      ValueError: more centroids than `MOST_BITS` can tell apart.
    """
    (n, d), k = rows.shape, centroids.shape[0]
    tiles = tiles_for(d) if tiles is None else tiles
    bits = bits_of_slices(k)
    if bits > MOST_BITS:
        raise ValueError(f"{k} centroids: expected at most {FOLD * 2**MOST_BITS}")
    missing = -k % tiles.centroids
    turned = jnp.pad(centroids, ((0, missing), (0, 0))).T
    run = _kernel(n, d, k, bits, 1 if only_nearest else 2, tiles, interpret)
    keys, numbers = run(rows, turned, jnp.pad(half_norms, (0, missing)), offsets)
    units = keys >> bits
    scores = units[0].astype(jnp.float32)
    if only_nearest:
        return Screened(numbers[0], scores, None, None, None)
    second, third = ((units[i] - units[0]).astype(jnp.float32) for i in (1, 2))
    return Screened(numbers[0], scores, numbers[1], second, third)


def screen_plainly(
    rows: jax.Array,
    centroids: jax.Array,
    half_norms: jax.Array,
    offsets: jax.Array,
    *,
    only_nearest: bool = False,
) -> Screened:
    """What `screen` must equal, in plain XLA for any device; sums may differ in their last bits.

    Of centroids whose rounded scores are equal the first comes first.
    """
    k = centroids.shape[0]
    most = jnp.float32(jnp.inf)

    def of_rows(block: tuple[jax.Array, jax.Array]) -> Screened:
        x, offsets = block
        right = centroids.astype(jnp.float32).T
        products = lax.dot(x.astype(jnp.float32), right, precision="highest")
        # An offset is 1.5 · 2^23 units, and a sum with it is rounded to them.
        exponents = (lax.bitcast_convert_type(offsets, jnp.int32) >> 23) - 23
        unit = lax.bitcast_convert_type(exponents << 23, jnp.float32)
        rounded = lax.optimization_barrier(half_norms[None, :] - products + offsets[:, None])
        units = (rounded - offsets[:, None]) / unit[:, None]
        labels = jnp.argmin(units, axis=1).astype(jnp.int32)
        scores = jnp.min(units, axis=1)
        if only_nearest:
            return Screened(labels, scores, None, None, None)
        units = jnp.where(jnp.arange(k)[None, :] == labels[:, None], most, units)
        rivals, second = jnp.argmin(units, axis=1).astype(jnp.int32), jnp.min(units, axis=1)
        third = jnp.min(jnp.where(jnp.arange(k)[None, :] == rivals[:, None], most, units), axis=1)
        third = jnp.where(labels % FOLD == rivals % FOLD, second, third)
        return Screened(labels, scores, rivals, second - scores, third - scores)

    blocks = rows.reshape(-1, ROWS, rows.shape[1]), offsets.reshape(-1, ROWS)
    return jax.tree.map(lambda leaf: leaf.reshape(-1), lax.map(of_rows, blocks))


def _kernel(n: int, d: int, k: int, bits: int, keep: int, tiles: Tiles, interpret: Any):
    """The kernel: keys [3, n] and numbers of centroids [2, n], or one of each."""
    # Here, because it takes a fifth of a second, and few have such a GPU.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    mine, width, stages, resident = tiles
    chunks, n_slices = d // FEATURES, width // FOLD
    whole, rest = divmod(k, width)
    n_steps = (whole + (rest > 0)) * chunks
    in_block = _WORKERS * mine
    # A turn ends with the tile, or where no stage is left: the other has to hand back the first.
    turn_ends = min(chunks, stages) - 1
    most = 2**31 - 1

    def body(x_gmem, c_gmem, h_gmem, offsets_gmem, keys_gmem, numbers_gmem, **scratch):
        memory = _Memory(**scratch)
        worker = lax.axis_index("worker")
        first = lax.axis_index("block") * in_block

        @pl.when(worker == _WORKERS)
        def _():
            plgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
            block = pl.ds(first, in_block)
            plgpu.copy_gmem_to_smem(offsets_gmem.at[block], memory.offsets, memory.block_is_there)
            if resident:
                for chunk in range(chunks):
                    features = pl.ds(chunk * FEATURES, FEATURES)
                    part = x_gmem.at[block, features]
                    plgpu.copy_gmem_to_smem(part, memory.x.at[chunk], memory.block_is_there)

            def copy(step, _):
                stage = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(memory.is_free.at[stage])

                features = pl.ds(lax.rem(step, chunks) * FEATURES, FEATURES)
                columns = pl.ds(lax.div(step, chunks) * width, width)
                arrived = memory.is_there.at[stage]
                plgpu.copy_gmem_to_smem(c_gmem.at[features, columns], memory.c.at[stage], arrived)
                plgpu.copy_gmem_to_smem(h_gmem.at[columns], memory.h.at[stage], arrived)
                if not resident:
                    part = x_gmem.at[block, features]
                    plgpu.copy_gmem_to_smem(part, memory.x.at[stage], arrived)
                return ()

            lax.fori_loop(0, n_steps, copy, ())

            def wait(step, _):
                plgpu.barrier_wait(memory.is_free.at[lax.rem(step, stages)])
                return ()

            lax.fori_loop(max(0, n_steps - stages), n_steps, wait, ())

        @pl.when(worker < _WORKERS)
        def _():
            plgpu.set_max_registers(_MANY_REGISTERS, action="increase")
            rows = pl.ds(worker * mine, mine)
            plgpu.barrier_wait(memory.block_is_there)
            offsets = lax.broadcast_in_dim(memory.offsets[rows], (mine, FOLD), (0,))
            column = lax.broadcasted_iota(jnp.int32, (mine, FOLD), 1)

            # The first turn is the first worker's.
            @pl.when(worker == 1)
            def _():
                plgpu.barrier_arrive(memory.turn.at[0])

            def scores_of(tile):
                """Scores of the rows and a tile of centroids: [mine, width]."""
                step = tile * chunks

                def stage(chunk):
                    # A constant where it can be: it is the address of operands.
                    return lax.rem(chunk if chunks % stages == 0 else step + chunk, stages)

                def multiply(products):
                    last = chunks - 1

                    def begin(chunk):
                        now = stage(chunk)
                        x = memory.x.at[chunk if resident else now, rows]
                        plgpu.wgmma(products, x, memory.c.at[now])
                        if isinstance(chunk, int) and chunk == turn_ends:
                            # The other's products queue up behind these.
                            plgpu.barrier_arrive(memory.turn.at[1 - worker])

                    def end_all_but_one(chunk):
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(memory.is_free.at[stage(chunk)])

                    def go_on(chunk, _):
                        plgpu.barrier_wait(memory.is_there.at[stage(chunk)])
                        begin(chunk)
                        end_all_but_one(chunk - 1)
                        return ()

                    begin(0)
                    written_out = last if chunks <= _FEW_CHUNKS else min(stages, last)
                    for chunk in range(1, written_out):
                        go_on(chunk, ())
                    if written_out < last:
                        lax.fori_loop(written_out, last, go_on, ())
                    if last:
                        plgpu.barrier_wait(memory.is_there.at[stage(last)])
                        begin(last)
                    h = memory.h[stage(last)]
                    # Read before copies write over it; products are under way meanwhile.
                    plgpu.commit_smem()
                    if last:
                        end_all_but_one(last - 1)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(memory.is_free.at[stage(last)])
                    return products[...], h

                plgpu.barrier_wait(memory.is_there.at[stage(0)])
                plgpu.barrier_wait(memory.turn.at[worker])
                room = plgpu.ACC((mine, width), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
                products, h = pl.run_scoped(multiply, room)
                return lax.broadcast_in_dim(h, (mine, width), (1,)) - products

            def look_at(tile, kept, n_columns=width):
                scores = scores_of(tile)

                def keys_of(piece):
                    start = piece * FOLD
                    if start >= n_columns:
                        return jnp.full((mine, FOLD), most, jnp.int32)
                    # The sum is rounded to the unit, and its low bits are the score.
                    shifted = scores[:, start : start + FOLD] + offsets
                    whole_units = lax.bitcast_convert_type(shifted, jnp.int32)
                    keys = whole_units * jnp.int32(1 << bits) + (tile * n_slices + piece)
                    left = n_columns - start
                    return keys if left >= FOLD else jnp.where(column < left, keys, jnp.int32(most))

                return functools.reduce(
                    lambda kept, piece: _merge(kept, keys_of(piece), keys_of(piece + 1)),
                    range(0, n_slices, 2),
                    kept,
                )

            kept = (jnp.full((mine, FOLD), most, jnp.int32),) * keep
            kept = lax.fori_loop(0, whole, look_at, kept)
            if rest:
                kept = look_at(whole, kept, rest)

            @pl.when(worker == 0)
            def _():
                plgpu.barrier_wait(memory.turn.at[0])

            keys, numbers = _best(kept, column, bits)
            target = pl.ds(first + worker * mine, mine)
            for values, shared in ((keys, memory.keys), (numbers, memory.numbers)):
                for i, value in enumerate(values):
                    shared[worker, i] = value
            plgpu.commit_smem()
            for i in range(len(keys)):
                plgpu.copy_smem_to_gmem(memory.keys.at[worker, i], keys_gmem.at[i, target])
            for i in range(len(numbers)):
                plgpu.copy_smem_to_gmem(memory.numbers.at[worker, i], numbers_gmem.at[i, target])
            plgpu.wait_smem_to_gmem(0)

    n_keys, n_numbers = (3, 2) if keep == 2 else (1, 1)
    tiled = (plgpu.TilingTransform((8, FEATURES)), plgpu.SwizzleTransform(2 * FEATURES))
    held = chunks if resident else stages
    memory = _Memory(
        x=plgpu.SMEM((held, in_block, FEATURES), jnp.bfloat16, transforms=tiled),
        c=plgpu.SMEM((stages, FEATURES, width), jnp.bfloat16, transforms=tiled),
        h=plgpu.SMEM((stages, width), jnp.float32),
        offsets=plgpu.SMEM((in_block,), jnp.float32),
        keys=plgpu.SMEM((_WORKERS, n_keys, mine), jnp.int32),
        numbers=plgpu.SMEM((_WORKERS, n_numbers, mine), jnp.int32),
        block_is_there=plgpu.Barrier(num_arrivals=1 + resident * chunks),
        is_there=plgpu.Barrier(num_arrivals=2 if resident else 3, num_barriers=stages),
        is_free=plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=_WORKERS),
    )
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((n_keys, n), jnp.int32),
            jax.ShapeDtypeStruct((n_numbers, n), jnp.int32),
        ),
        grid=(n // in_block,),
        grid_names=("block",),
        num_threads=_WORKERS + 1,
        thread_name="worker",
        scratch_types=memory._asdict(),
        # The compiler infers the layouts of registers.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )


class _Memory(NamedTuple):
    """Shared memory of a block, and its barriers."""

    x: Any
    c: Any
    h: Any
    offsets: Any
    keys: Any
    numbers: Any
    block_is_there: Any
    is_there: Any
    is_free: Any
    turn: Any


def _merge(kept: tuple[jax.Array, ...], one: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
    """The least of what was kept and two more keys of each slot; or the two least."""
    if len(kept) == 1:
        return (jnp.minimum(jnp.minimum(kept[0], one), other),)
    least, second = kept
    lower, upper = jnp.minimum(one, other), jnp.maximum(one, other)
    beaten = jnp.maximum(least, lower)
    return jnp.minimum(least, lower), jnp.minimum(jnp.minimum(second, upper), beaten)


def _best(
    kept: tuple[jax.Array, ...], column: jax.Array, bits: int
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The least keys of each row among those of its slots, and the centroids of the first two.

    The third is only a bound from below where the first two are of one slot: the second again.
    """

    def least(slots):
        key = jnp.min(slots, axis=1)
        is_least = slots == lax.broadcast_in_dim(key, column.shape, (0,))
        slot = jnp.min(jnp.where(is_least, column, FOLD), axis=1)
        number = (key & jnp.int32((1 << bits) - 1)) * FOLD + slot
        return key, number, column == lax.broadcast_in_dim(slot, column.shape, (0,))

    slots = kept[0]
    key, number, is_first = least(slots)
    if len(kept) == 1:
        return [key], [number]
    slots = jnp.where(is_first, kept[1], slots)
    second, rival, is_second = least(slots)
    slots = jnp.where(is_second, jnp.where(is_first, slots, kept[1]), slots)
    return [key, second, jnp.min(slots, axis=1)], [number, rival]
