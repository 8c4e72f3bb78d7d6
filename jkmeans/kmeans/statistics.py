"""Cluster statistics (sums, counts, inertia): additive over rows, chunks, devices and time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.assignment import accumulation_dtype
from jkmeans.kmeans.collectives import AxisName, vary_like

# Rows summed at a time on a CPU: a block of weighted rows then stays in the cache.
_SCATTER_ROWS = 1024
# Entries of the one-hot matrix in memory at a time elsewhere.
_ONE_HOT_ENTRIES = 2**24
# A float32 count stands still at 2²⁴ when ones are added to it one by one.
_COUNT_ROWS = 2**20


class ClusterStatistics(NamedTuple):
    """What k-means needs to know of a set of rows; the statistics of two sets add up.

    Attributes:
      sums: [k, d] float, the weighted sum of each cluster's rows.
      counts: [k] float, the sum of their weights.
      inertia: [] float, the weighted sum of the squared distances.
    """

    sums: jax.Array
    counts: jax.Array
    inertia: jax.Array


def cluster_statistics(
    x: jax.Array,
    labels: jax.Array,
    n_clusters: int,
    *,
    weights: jax.Array | None = None,
    distances: jax.Array | None = None,
    axis_name: AxisName = None,
) -> ClusterStatistics:
    """Sums, counts and inertia of the clusters.

    Args:
      x: [n, d], any real dtype; summed in float32 (float64 if x is).
      labels: [n] int; rows with a label outside 0 … n_clusters-1 are left out of sums and counts.
      n_clusters: k.
      weights: [n] float, at least 0; None for ones. A row of weight 0 never counts, not even one
        that holds NaN.
      distances: [n] float, squared distances to the centroids; None leaves the inertia at 0.
      axis_name: the mesh axis to sum over (one all-reduce), or None.

    Returns:
      ClusterStatistics. On a CPU rows are added one after another; elsewhere by a product with
      the one-hot labels, because the order of a scatter's atomic additions changes from run to
      run.
    """
    dtype = accumulation_dtype(x)
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    weights = None if weights is None else jnp.asarray(weights, dtype)
    ones = jnp.ones(labels.shape, dtype) if weights is None else weights
    counts = jax.ops.segment_sum(ones, labels, n_clusters, bucket_size=_COUNT_ROWS)
    inertia = jnp.zeros((), dtype)
    if distances is not None:
        inertia = exact_sum(jnp.where(ones > 0, distances * ones, 0))
    zeros = vary_like(jnp.zeros((n_clusters, x.shape[1]), dtype), x, labels, weights)
    operands = (zeros, x, labels) if weights is None else (zeros, x, labels, weights)
    sums = lax.platform_dependent(*operands, cpu=_scattered_sums, default=_one_hot_sums)
    return all_reduce(ClusterStatistics(sums, counts, inertia), axis_name)


def exact_sum(values: jax.Array) -> jax.Array:
    """The sum of many numbers, right to a rounding or two however many there are.

    Halves are added pairwise, and the rounding error of every addition is added up beside.

    Args:
      values: [n] float.

    Returns:
      [] of the same dtype.

    Source: Ogita, Rump and Oishi, Accurate sum and dot product, SIAM J. Sci. Comput. 26 (2005).
    """
    # First down to a few thousand numbers, each the compensated sum of a strided set.
    width = 4096
    if values.shape[0] > width:
        n_blocks = values.shape[0] // width

        def add_block(i, carry):
            block = lax.dynamic_slice_in_dim(values, i * width, width)
            return _two_sum(*carry, block)

        zeros = vary_like(jnp.zeros(width, values.dtype), values)
        total, error = lax.fori_loop(0, n_blocks, add_block, (zeros, zeros))
        rest = values[n_blocks * width :]
        values = jnp.concatenate([total, rest])
        errors = jnp.concatenate([error, jnp.zeros_like(rest)])
    else:
        errors = jnp.zeros_like(values)
    while values.shape[0] > 1:
        if values.shape[0] % 2:
            values, errors = jnp.append(values, 0), jnp.append(errors, 0)
        half = values.shape[0] // 2
        values, new = _two_sum(values[:half], jnp.zeros(half, values.dtype), values[half:])
        errors = errors[:half] + errors[half:] + new
    return jnp.sum(values + errors)


def _two_sum(total: jax.Array, error: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Total + value, and error plus what rounding took from it (Knuth)."""
    new = total + value
    virtual = new - total
    return new, error + ((total - (new - virtual)) + (value - virtual))


def move_rows(
    sums: jax.Array, x: jax.Array, rows: jax.Array, before: jax.Array, after: jax.Array
) -> jax.Array:
    """Sums of clusters after some rows of weight 1 have changed their cluster.

    Args:
      sums: [k, d], of the labels before.
      x: [n, d], any real dtype.
      rows: [b] int32, the rows that move; those outside 0 … n-1 do not count.
      before: [b] int32, their old labels.
      after: [b] int32, their new ones.

    Returns:
      [k, d]. Each move leaves a rounding error behind; whoever calls this often sums anew from
      time to time.
    """
    k, n = sums.shape[0], x.shape[0]
    x_bd = x.at[rows].get(mode="clip").astype(sums.dtype)
    counted = (rows >= 0) & (rows < n)
    sums = sums.at[jnp.where(counted, after, k)].add(x_bd, mode="drop")
    return sums.at[jnp.where(counted, before, k)].add(-x_bd, mode="drop")


def add(a: ClusterStatistics, b: ClusterStatistics) -> ClusterStatistics:
    """The statistics of two sets of rows together."""
    return jax.tree.map(jnp.add, a, b)


def all_reduce(statistics: ClusterStatistics, axis_name: AxisName) -> ClusterStatistics:
    """Adds the statistics of all devices in one all-reduce of k(d+1)+1 numbers.

    Args:
      statistics: of the local rows.
      axis_name: the mesh axis; None returns the statistics as they are.
    """
    if axis_name is None:
        return statistics
    shape, size = statistics.sums.shape, statistics.sums.size
    packed = jnp.concatenate(
        [statistics.sums.reshape(-1), statistics.counts, statistics.inertia[None]]
    )
    packed = lax.psum(packed, axis_name)
    return ClusterStatistics(packed[:size].reshape(shape), packed[size:-1], packed[-1])


def centroids_from(statistics: ClusterStatistics, previous: jax.Array) -> jax.Array:
    """The mean of each cluster; an empty cluster keeps its previous centroid.

    Args:
      statistics: of all rows.
      previous: [k, d].

    Returns:
      [k, d], of the dtype of ``previous``.
    """
    counts = statistics.counts[:, None]
    # The inner where keeps 0/0 out of the gradient.
    means = statistics.sums / jnp.where(counts > 0, counts, 1)
    return jnp.where(counts > 0, means.astype(previous.dtype), previous)


def _over_blocks(add_rows, sums: jax.Array, arrays: tuple[jax.Array, ...], rows: int) -> jax.Array:
    """Folds ``add_rows(sums, *block)`` over blocks of rows, the shorter last one included."""
    n_blocks, rest = divmod(arrays[0].shape[0], rows)

    def step(sums, start):
        block = [lax.dynamic_slice_in_dim(array, start, rows) for array in arrays]
        return add_rows(sums, *block), None

    if n_blocks:
        sums, _ = lax.scan(step, sums, jnp.arange(n_blocks) * rows)
    if rest:
        sums = add_rows(sums, *(array[n_blocks * rows :] for array in arrays))
    return sums


def _scattered_sums(zeros: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Row by row; ``arrays`` are x [n, d], labels [n] and, unless all are 1, weights [n]."""

    def add_rows(sums, x, labels, weights=None):
        rows = x.astype(sums.dtype)
        if weights is not None:
            rows = jnp.where(weights[:, None] > 0, rows * weights[:, None], 0)
        # Like segment_sum: a label out of range, negative ones too, is dropped.
        labels = jnp.where(labels < 0, sums.shape[0], labels)
        return sums.at[labels].add(rows, mode="drop")

    return _over_blocks(add_rows, zeros, arrays, _SCATTER_ROWS)


def _one_hot_sums(zeros: jax.Array, *arrays: jax.Array) -> jax.Array:
    """The same sums as one-hot matrix products, in an order that never changes."""
    k = zeros.shape[0]

    def add_rows(sums, x, labels, weights=None):
        one_hot = jax.nn.one_hot(labels, k, dtype=sums.dtype)
        rows = x.astype(sums.dtype)
        if weights is not None:
            rows = jnp.where(weights[:, None] > 0, rows * weights[:, None], 0)
        return sums + jnp.matmul(one_hot.T, rows, precision=lax.Precision.HIGHEST)

    return _over_blocks(add_rows, zeros, arrays, max(1, _ONE_HOT_ENTRIES // k))
