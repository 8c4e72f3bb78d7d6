"""Sums of clusters that follow the rows which change their cluster."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.bounds import select
from jkmeans.kmeans.collectives import vary_like
from jkmeans.kmeans.statistics import ClusterStatistics, cluster_statistics, move_rows

# Iterations after which sums are made anew.
_UPDATES = 16
# Rows moved from sum to sum at a time.
_MOVED_ROWS = 2048


class MovingSums(NamedTuple):
    """Sums of the local rows, all of weight 1, for the labels of the last iteration.

    Attributes:
      sums: [k, d].
      peak: [k], the largest count of each cluster since the sums were last made anew.
      n_updates: [] int32, the iterations since then.
    """

    sums: jax.Array
    peak: jax.Array
    n_updates: jax.Array


def no_sums(x: jax.Array, centroids: jax.Array) -> MovingSums:
    """Sums that `follow` has to make anew."""
    k, d = centroids.shape
    return MovingSums(
        vary_like(jnp.zeros((k, d), centroids.dtype), x),
        vary_like(jnp.full(k, jnp.inf, centroids.dtype), x),
        vary_like(jnp.zeros((), jnp.int32), x),
    )


def follow(
    x: jax.Array, before: jax.Array, after: jax.Array, old: MovingSums, origin: jax.Array | None
) -> tuple[MovingSums, ClusterStatistics]:
    """The statistics of the local rows for new labels, from the sums for the labels before.

    Few rows change their cluster after the first iterations; only those are added and subtracted.
    Sums are made anew where many rows moved, every _UPDATES iterations, and when a cluster has
    lost most of its rows, whose rounding errors would stay behind in a small sum.

    Args:
      x: [n, d], any real dtype.
      before: [n] int32, the labels that ``old`` belongs to.
      after: [n] int32.
      old: from the last iteration, or `no_sums`.
      origin: [d], what is taken from every row, always the same; None for nothing.

    Returns:
      The sums for ``after``, and the statistics made of them, without inertia.
    """
    n, k = x.shape[0], old.sums.shape[0]
    # Only counts are wanted, so rows without features are summed.
    counts = cluster_statistics(x[:, :0], after, k).counts
    moved = select(before != after)
    # Not where no row moved: then sums, and centroids with them, keep their bits.
    many = (moved.count > n // 4) | ((moved.count > 0) & (old.n_updates >= _UPDATES))
    anew = many | jnp.any(8 * counts < old.peak)

    def sum_anew() -> MovingSums:
        sums = cluster_statistics(x, after, k, shift=origin).sums
        return MovingSums(sums, counts, jnp.zeros_like(old.n_updates))

    def move() -> MovingSums:
        size = min(n, _MOVED_ROWS)

        def step(i, sums):
            start = jnp.minimum(i * size, n - size)
            position = start + jnp.arange(size)
            rows = lax.dynamic_slice_in_dim(moved.rows, start, size)
            # A block that reaches back must not move rows twice.
            rows = jnp.where((position >= i * size) & (position < moved.count), rows, n)
            labels = (labels.at[rows].get(mode="clip") for labels in (before, after))
            return move_rows(sums, x, rows, *labels, shift=origin)

        sums = lax.fori_loop(0, -(-moved.count // size), step, old.sums)
        return MovingSums(sums, jnp.maximum(old.peak, counts), old.n_updates + 1)

    new = lax.cond(anew, sum_anew, move)
    no_inertia = vary_like(jnp.zeros((), counts.dtype), x)
    return new, ClusterStatistics(new.sums, counts, no_inertia)
