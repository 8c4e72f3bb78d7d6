"""Sums of clusters that never change their bits: rows are sorted by label and added in blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.collectives import vary_like

# Rows of a block at the first level, at the least and at the most.
_FEWEST_ROWS = 8
_MOST_ROWS = 64
# Rows of a block at the other levels: large ones need few levels, but nearly all of their slots are
# empty, which costs more than a level where sums have many numbers.
_LATER_ROWS = 64
_LATER_ROWS_OF_MANY = 16
_MANY_NUMBERS = 2**22


def sorted_sums(
    x: jax.Array,
    labels: jax.Array,
    n_clusters: int,
    weights: jax.Array | None,
    shift: jax.Array | None,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Sums and counts of the clusters, by additions in an order that depends on the labels alone.

    Row numbers are sorted by label. The sorted order is cut at every multiple of b, and wherever a
    cluster ends, into n/b + k blocks at most, each of one cluster: row i of the order, of cluster
    c, is in block i // b + c, so that nothing has to be counted or looked up. Each block's rows
    are gathered and summed. The sums, in the order of their clusters too, are cut and summed
    again, until no cluster, had it all the rows, could have more sums left than one block holds.

    Args:
      x: [n, d], any real dtype.
      labels: [n] int; rows with a label outside 0 … n_clusters-1 are left out.
      n_clusters: k.
      weights: [n] of ``dtype``, at least 0; None for ones. A row of weight 0 never counts.
      shift: [d] of ``dtype``, what is taken from every row; None for nothing.
      dtype: of the sums.

    Returns:
      Sums [k, d] and counts [k] of ``dtype``; counts of rows of weight 1 are exact up to their
      rounding to it. No array of n·d or n·k numbers is made: the largest hold the n + k b row
      numbers of the blocks, and their sums, [n/b + k, d].
    """
    (n, d), k = x.shape, n_clusters
    if n == 0:
        sums, counts = jnp.zeros((k, d), dtype), jnp.zeros(k, dtype)
        return vary_like(sums, x, labels, weights, shift), vary_like(counts, labels, weights)
    keys, order = _sort(labels, k)
    bounds = _bounds(keys, k)
    unweighted = (bounds[1] - bounds[0]).astype(dtype)
    if weights is None and d == 0:
        return vary_like(jnp.zeros((k, 0), dtype), x, labels, shift), unweighted
    first, *later = _slots(keys, order, bounds, d)

    # Not a comparison with n, which slots were filled with: XLA would read that array, too.
    used, rows = first <= n - 1, jnp.minimum(first, n - 1)
    factors = None
    if weights is not None:
        # Once for each slot: the gather of rows would find them anew for each feature.
        factors = lax.optimization_barrier(jnp.where(used, _gather(weights, rows), 0))
        used = factors > 0
    x_bmd = _gather(x, rows).astype(dtype)
    if shift is not None:
        x_bmd = x_bmd - shift[None, None, :]
    if factors is not None:
        x_bmd = x_bmd * factors[:, :, None]
    sums = jnp.sum(jnp.where(used[:, :, None], x_bmd, 0), axis=0)
    counts = None if factors is None else jnp.sum(factors, axis=0)
    for blocks in later:
        sums = jnp.sum(_gather(sums, blocks), axis=0)
        counts = None if counts is None else jnp.sum(_gather(counts, blocks), axis=0)
    return sums, unweighted if counts is None else counts


def _gather(values: jax.Array, i: jax.Array) -> jax.Array:
    """Values at positions that are known to exist."""
    return values.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _sort(labels: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Labels in order, k for those out of range, and the rows they belong to: [n] int32 each."""
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    labels = jnp.where((labels >= 0) & (labels < k), labels, k)
    # On GPUs XLA sorts pairs with unsigned keys by CUB's radix sort, a pass for each byte of a key.
    kinds = (jnp.uint8, jnp.uint16, jnp.uint32)
    kind = next(kind for kind in kinds if k <= jnp.iinfo(kind).max)
    rows = vary_like(lax.iota(jnp.int32, labels.shape[0]), labels)
    keys, order = lax.sort((labels.astype(kind), rows), num_keys=1, is_stable=True)
    return keys.astype(jnp.int32), order


def _bounds(keys: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Where each cluster begins in the sorted order and where it ends; 0, 0 if empty: [k] int32."""
    row = lax.iota(jnp.int32, keys.shape[0])
    first, last = _changes(keys), jnp.flip(_changes(jnp.flip(keys)))
    cluster = jnp.where(first | last, keys, k)
    # Each bound gets one number besides zeros, and integers have the same sum in any order.
    values = jnp.stack([jnp.where(first, row, 0), jnp.where(last, row + 1, 0)], axis=1)
    bounds = vary_like(jnp.zeros((k, 2), jnp.int32), keys)
    bounds = bounds.at[cluster].add(values, mode="drop", wrap_negative_indices=False)
    return bounds[:, 0], bounds[:, 1]


def _changes(values: jax.Array) -> jax.Array:
    """Where a value differs from the one before, the first one included: [n] bool."""
    i = lax.iota(jnp.int32, values.shape[0])
    return (i == 0) | (values != _gather(values, jnp.maximum(i - 1, 0)))


def _plan(n: int, d: int, k: int) -> tuple[list[int], int]:
    """Rows of a block at each level, and the most blocks of a cluster left for a last sum."""
    # Small blocks leave many sums to be added again; of large ones, k b slots may be empty.
    size = _FEWEST_ROWS
    while size < _MOST_ROWS and size * size * k < 4 * n:
        size *= 2
    later = _LATER_ROWS if k * d <= _MANY_NUMBERS else _LATER_ROWS_OF_MANY
    # The most blocks that a cluster of n rows can have, wherever they are cut.
    sizes, most = [size], -(-n // size) + 1
    while most > later:
        sizes.append(later)
        most = -(-most // later) + 1
    return sizes, most


def _slots(
    keys: jax.Array, order: jax.Array, bounds: tuple[jax.Array, jax.Array], d: int
) -> list[jax.Array]:
    """What each block adds up: a list of [b, blocks] int32 for each level, [b, k] for the last.

    At the first level rows of x, n in a slot that is not used. At the others blocks of the level
    before, whose block 0 is empty and fills the slots that are not used.
    """
    n, k = keys.shape[0], bounds[0].shape[0]
    sizes, most = _plan(n, d, k)
    row = lax.iota(jnp.int32, n)
    # The block of each row, and those of the first and the last row of each cluster.
    n_blocks, block, begin, end = n, row, bounds[0], bounds[1] - 1
    cluster = lax.iota(jnp.int32, k)
    found = []
    for level, size in enumerate(sizes):
        n_blocks = n_blocks // size + k + 1
        into = 1 + block // size + keys
        # The first row of a block stands for it.
        stands = (keys < k) if level == 0 else (keys < k) & _changes(block)
        slots = jnp.full((size, n_blocks), 0 if level else n, jnp.int32)
        slots = vary_like(slots, keys, None if level else order)
        # Indices that are left out collide with none, though they are all the same.
        slots = slots.at[block % size, jnp.where(stands, into, n_blocks)].set(
            block if level else order, mode="drop", unique_indices=True, wrap_negative_indices=False
        )
        found.append(slots)
        block = into
        begin, end = 1 + begin // size + cluster, 1 + end // size + cluster
    block = begin[None, :] + lax.broadcasted_iota(jnp.int32, (most, 1), 0)
    is_block = (block <= end[None, :]) & (bounds[0] < bounds[1])[None, :]
    return [*found, jnp.where(is_block, block, 0)]
