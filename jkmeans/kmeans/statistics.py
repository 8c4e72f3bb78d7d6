"""Cluster statistics (sums, counts, inertia): additive over rows, chunks, devices and time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans.kmeans.assignment import accumulation_dtype
from jkmeans.kmeans.collectives import (
    AxisName,
    all_sum,
    axis_index,
    per_block,
    stack_devices,
    vary_like,
)
from jkmeans.kmeans.sorted_sums import sorted_sums

# Rows, and numbers, summed at a time on a CPU: a block, weighted or converted, stays in the cache.
_SCATTER_ROWS = 4096
_SCATTER_ENTRIES = 2**21
# Rows whose sums are made apart from the others': at least so many, and so many for each cluster.
_PART_ROWS = 2**15
_PART_PER_CLUSTER = 16
# Numbers to sum, k (d + 1), that are few enough to be summed all in one pass over many rows; rows
# of one step of that pass, and steps whose sums are made apart from the others'.
_FEW_SUMS = 16
_MANY_ROWS = 2**15
_LANES = 256
_STEPS = 8
# Standard deviations from 0 from which on sums of a column are made around its mean.
_FAR = 64
# Elsewhere: entries of a one-hot matrix in memory at a time; products n k d so few that one with
# such a matrix takes less time than the dozen kernels, and the sort, of a sorted sum.
_ONE_HOT_ENTRIES = 2**24
_FEW_PRODUCTS = 2**28

_Sums = tuple[jax.Array, jax.Array]
"""Sums [k, d] and counts [k]."""


class ClusterStatistics(NamedTuple):
    """What k-means needs to know of a set of rows; the statistics of two sets add up.

    Attributes:
      sums: [k, d] float, the weighted sum of each cluster's rows, less what was taken from each.
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
    shift: jax.Array | None = None,
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
      shift: [d] float, what is taken from every row before it is added, the same on all devices;
        None for nothing. Sums of rows far from the origin leave no digits for what differs between
        them; around a shift among them they do. It counts as a constant in derivatives.
      axis_name: the mesh axis to sum over (one all-reduce), or None.

    Returns:
      ClusterStatistics. On a CPU rows are added one after another, or, where clusters and features
      are very few, all sums are made by one reduction; elsewhere in the order of sorted labels, or,
      where there is little to sum, by a product with the one-hot labels, because the order of a
      scatter's atomic additions changes from run to run.
    """
    dtype = accumulation_dtype(x)
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    weights = None if weights is None else jnp.asarray(weights, dtype)
    shift = None if shift is None else lax.stop_gradient(jnp.asarray(shift, dtype))

    def of_local_rows(x, labels, weights, distances, shift) -> ClusterStatistics:
        inertia = vary_like(jnp.zeros((), dtype), x)
        if distances is not None:
            inertia = inertia_of(distances, weights)
        zeros = (jnp.zeros((n_clusters, x.shape[1]), dtype), jnp.zeros(n_clusters, dtype))
        zeros = jax.tree.map(lambda leaf: vary_like(leaf, x, labels, weights, shift), zeros)
        sums, counts = _sums_of(zeros, x, labels, weights, shift)
        return ClusterStatistics(sums, counts, inertia)

    local = per_block(of_local_rows, axis_name)(x, labels, weights, distances, shift)
    return all_reduce(local, axis_name)


def mean_variance(
    x: jax.Array, counted: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
    """The mean over the columns of `column_moments`' variance: the unit of relative tolerances.

    Args:
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      counted: [n] bool, which rows count; None for all.
      axis_name: the mesh axis that rows are sharded over, or None.

    Returns:
      [] float, the same on all devices.
    """
    return jnp.mean(column_moments(x, counted, axis_name)[1])


def column_moments(
    x: jax.Array, counted: jax.Array | None = None, axis_name: AxisName = None
) -> tuple[jax.Array, jax.Array]:
    """Mean m and variance Σ (x − m)² / n of each column, over the rows: by one pass.

    Args:
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      counted: [n] bool, which rows count; None for all.
      axis_name: the mesh axis that rows are sharded over, or None.

    Returns:
      [d] and [d] float, the same on all devices.
    """
    dtype = accumulation_dtype(x)
    n, d = x.shape
    # Lest squares far from the origin leave no digits for their difference.
    shift = _first_counted(x, counted, axis_name)

    def moments_of(x, counted, shift) -> tuple[jax.Array, jax.Array]:
        # In the cache of a core; elsewhere so many that the device has something to do.
        rows = min(n, 1024 if jax.default_backend() == "cpu" else 2**16)

        def of_rows(start, size: int) -> tuple[jax.Array, jax.Array]:
            x_bd = lax.dynamic_slice_in_dim(x, start, size).astype(dtype) - shift
            if counted is not None:
                counted_b = lax.dynamic_slice_in_dim(counted, start, size)
                x_bd = jnp.where(counted_b[:, None], x_bd, 0)
            return jnp.sum(x_bd, axis=0), jnp.sum(x_bd**2, axis=0)

        def add_block(i, total):
            return jax.tree.map(jnp.add, total, of_rows(i * rows, rows))

        zeros = vary_like(jnp.zeros(d, dtype), x, counted)
        total = lax.fori_loop(0, n // rows, add_block, (zeros, zeros))
        if n % rows:
            total = jax.tree.map(jnp.add, total, of_rows(n - n % rows, n % rows))
        return total

    total = per_block(moments_of, axis_name)(x, counted, shift)
    n_rows = jnp.asarray(n, dtype) if counted is None else jnp.sum(counted.astype(dtype))
    n_rows = vary_like(n_rows, total[0])
    sums, squares, n_rows = all_sum((*total, n_rows), axis_name)
    return shift[0] + sums / n_rows, jnp.maximum(squares / n_rows - (sums / n_rows) ** 2, 0)


def _first_counted(x: jax.Array, counted: jax.Array | None, axis_name: AxisName) -> jax.Array:
    """The first of the rows that count, [1, d], the same on all devices; 0 where not finite."""
    first, device = 0, 0
    if counted is not None:
        # A minimum: XLA's argmax is scalar code on a CPU.
        n = x.shape[0]
        first = jnp.min(jnp.where(counted, jnp.arange(n, dtype=jnp.int32), n))
        device = jnp.argmin(stack_devices(first, axis_name) == n)
    # The last row where none counts: a slice reaches back rather than past the end.
    row = lax.dynamic_slice_in_dim(x, first, 1).astype(accumulation_dtype(x))
    row = jnp.where((axis_index(axis_name) == device) & jnp.isfinite(row), row, 0)
    return all_sum(row, axis_name)


def inertia_of(distances: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Σ w_i d_i in compensated arithmetic: [].

    Args:
      distances: [n] float, squared distances.
      weights: [n] float; a row of weight 0 never counts. None for ones.
    """
    if weights is not None:
        distances = jnp.where(weights > 0, distances * weights.astype(distances.dtype), 0)
    return exact_sum(distances)


def exact_sum(values: jax.Array) -> jax.Array:
    """The sum of many numbers, right to a rounding or two however many there are.

    Halves are added pairwise, and the rounding error of every addition is added up beside.

    Args:
      values: [n] float.

    Returns:
      [] of the same dtype.

    Source: Ogita, Rump and Oishi, Accurate sum and dot product, SIAM J. Sci. Comput. 26 (2005).
    """
    # First down to a few thousand numbers, each the compensated sum of a strided set; elsewhere
    # than on a CPU to a few dozen steps.
    width = 4096 if jax.default_backend() == "cpu" else max(4096, values.shape[0] // 64)
    if values.shape[0] > width:
        n_blocks = values.shape[0] // width

        def add_block(i, carry):
            block = lax.dynamic_slice_in_dim(values, i * width, width)
            return two_sum(carry[0], carry[1], block)

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
        values, new = two_sum(values[:half], jnp.zeros(half, values.dtype), values[half:])
        errors = errors[:half] + errors[half:] + new
    return jnp.sum(values + errors)


def two_sum(total: jax.Array, error: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Total + value, and error plus what rounding took from it (Knuth)."""
    new = total + value
    virtual = new - total
    return new, error + ((total - (new - virtual)) + (value - virtual))


def far_origin(mean: Any, variance: Any) -> Any:
    """What to take from rows before they are added: [d].

    Args:
      mean: [d] of the rows, NumPy or JAX; see `column_moments`.
      variance: [d].

    Returns:
      The mean of a column that is more than _FAR standard deviations from 0: rows less it keep
      their digits, which sums of the rows themselves would not. Elsewhere 0.
    """
    xp = np if isinstance(mean, np.ndarray) else jnp
    return xp.where(xp.abs(mean) > _FAR * xp.sqrt(variance), mean, xp.zeros_like(mean))


def move_rows(
    sums: jax.Array,
    x: jax.Array,
    rows: jax.Array,
    before: jax.Array,
    after: jax.Array,
    shift: jax.Array | None,
) -> jax.Array:
    """Sums of clusters after some rows of weight 1 have changed their cluster.

    Args:
      sums: [k, d], of the labels before.
      x: [n, d], any real dtype.
      rows: [b] int32, the rows that move; those outside 0 … n-1 do not count.
      before: [b] int32, their old labels.
      after: [b] int32, their new ones.
      shift: [d], what the sums have of every row taken away; None for nothing.

    Returns:
      [k, d]. Each move leaves a rounding error behind; whoever calls this often sums anew from
      time to time.
    """
    k, n = sums.shape[0], x.shape[0]
    x_bd = _shifted(x.at[rows].get(mode="clip"), shift, sums.dtype)
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
    packed = all_sum(packed, axis_name)
    return ClusterStatistics(packed[:size].reshape(shape), packed[size:-1], packed[-1])


def centroids_from(
    statistics: ClusterStatistics, previous: jax.Array, shift: jax.Array | None = None
) -> jax.Array:
    """The mean of each cluster; an empty cluster keeps its previous centroid.

    Args:
      statistics: of all rows.
      previous: [k, d].
      shift: [d], what the sums have of every row taken away; None for nothing.

    Returns:
      [k, d], of the dtype of ``previous``.
    """
    counts = statistics.counts[:, None]
    # The inner where keeps 0/0 out of the gradient.
    means = statistics.sums / jnp.where(counts > 0, counts, 1)
    # Of the shift, a constant, sums have no derivative either.
    means = means if shift is None else means + lax.stop_gradient(shift)[None, :]
    return jnp.where(counts > 0, means.astype(previous.dtype), previous)


@jax.custom_jvp
def _sums_of(zeros: _Sums, x, labels, weights, shift) -> _Sums:
    """Sums and counts of the local rows, in the way that suits the platform and the shapes."""
    k, d = zeros[0].shape
    arrays = (x, labels) if weights is None else (x, labels, weights)
    on_cpu = _scattered
    if k * (d + 1) <= _FEW_SUMS and x.shape[0] >= _MANY_ROWS:
        on_cpu = _in_one_pass
    n_entries = x.shape[0] * k
    few = n_entries <= _ONE_HOT_ENTRIES and n_entries * d <= _FEW_PRODUCTS
    elsewhere = _one_hot if few else _sorted
    return lax.platform_dependent(zeros, shift, *arrays, cpu=on_cpu, default=elsewhere)


@_sums_of.defjvp
def _sums_and_directions(primals, directions):
    # Loops and reductions with several results have no reverse derivative; a scatter has.
    zeros, x, labels, weights, shift = primals
    given = (x,) if weights is None else (x, weights)

    def scatter(x, *weights) -> _Sums:
        ones = weights[0] if weights else jnp.ones(labels.shape, zeros[1].dtype)
        rows = jnp.where(ones[:, None] > 0, _shifted(x, shift, zeros[0].dtype) * ones[:, None], 0)
        return (
            jax.ops.segment_sum(rows, labels, zeros[1].size),
            jax.ops.segment_sum(ones, labels, zeros[1].size),
        )

    _, changes = jax.jvp(scatter, given, (directions[1], directions[3])[: len(given)])
    return _sums_of(*primals), changes


def _shifted(x: jax.Array, shift: jax.Array | None, dtype: Any) -> jax.Array:
    """Rows as they are added."""
    x = x.astype(dtype)
    return x if shift is None else x - shift[None, :]


def _over_blocks(add_rows, zeros: _Sums, arrays, rows: int, n_in_part: int) -> _Sums:
    """Folds ``add_rows(sums, *block)`` over blocks of rows, the shorter last one included.

    Parts of ``n_in_part`` blocks are summed apart and then together: rows added one by one to a
    sum that is already large lose digits, and a float32 count stands still at 2²⁴.
    """
    n_blocks, rest = divmod(arrays[0].shape[0], rows)

    def plus(a: _Sums, b: _Sums) -> _Sums:
        return jax.tree.map(jnp.add, a, b)

    def add_block(i, sums: _Sums) -> _Sums:
        return add_rows(sums, *(lax.dynamic_slice_in_dim(a, i * rows, rows) for a in arrays))

    def add_part(i, sums: _Sums) -> _Sums:
        first = i * n_in_part
        last = jnp.minimum(first + n_in_part, n_blocks)
        return plus(sums, lax.fori_loop(first, last, add_block, zeros))

    sums = zeros
    if n_blocks > n_in_part:
        sums = lax.fori_loop(0, -(-n_blocks // n_in_part), add_part, zeros)
    elif n_blocks:
        sums = lax.fori_loop(0, n_blocks, add_block, zeros)
    if rest:
        sums = plus(sums, add_rows(zeros, *(array[n_blocks * rows :] for array in arrays)))
    return sums


def _in_one_pass(zeros: _Sums, shift, x, labels, weights=None) -> _Sums:
    """The same sums as one reduction with k (d + 1) results, which several cores share."""
    k, d = zeros[0].shape
    dtype = zeros[0].dtype
    parts, rest = divmod(x.shape[0], _LANES * _STEPS)
    most = x.shape[0] - rest

    def blocks(values: jax.Array) -> jax.Array:
        return values[:most].reshape(parts, _STEPS, _LANES)

    def column(j: int) -> jax.Array:
        values = blocks(x[:, j]).astype(dtype)
        return values if shift is None else values - shift[j]

    ones = jnp.ones((), dtype) if weights is None else blocks(weights)
    columns = [column(j) * ones for j in range(d)] + [ones]
    members = [blocks(labels) == i for i in range(k)]
    if weights is not None:
        members = [member & (ones > 0) for member in members]
    terms = [jnp.where(member, column, 0) for member in members for column in columns]
    zero = vary_like(jnp.zeros((), dtype), x, labels, weights, shift)
    sums = lax.reduce(
        terms, [zero] * len(terms), lambda a, b: [p + q for p, q in zip(a, b, strict=True)], (1,)
    )
    found = jnp.sum(jnp.sum(jnp.stack(sums), axis=1), axis=1).reshape(k, d + 1)
    total = (found[:, :d], found[:, d])
    if not rest:
        return total
    arrays = (x, labels) if weights is None else (x, labels, weights)
    left = (array[most:] for array in arrays)
    return jax.tree.map(jnp.add, total, _scattered(zeros, shift, *left))


def _scattered(zeros: _Sums, shift: jax.Array | None, *arrays: jax.Array) -> _Sums:
    """Row by row; ``arrays`` are x [n, d], labels [n] and, unless all are 1, weights [n]."""
    k, d = zeros[0].shape

    def add_rows(sums: _Sums, x, labels, weights=None) -> _Sums:
        rows, ones = _shifted(x, shift, sums[0].dtype), jnp.ones(labels.shape, sums[1].dtype)
        if weights is not None:
            rows, ones = jnp.where(weights[:, None] > 0, rows * weights[:, None], 0), weights
        # Like segment_sum: a label out of range, negative ones too, is dropped.
        labels = jnp.where(labels < 0, k, labels)
        return (
            sums[0].at[labels].add(rows, mode="drop"),
            sums[1].at[labels].add(ones, mode="drop"),
        )

    rows = max(1, min(_SCATTER_ROWS, _SCATTER_ENTRIES // max(d, 1)))
    n_in_part = max(1, max(_PART_ROWS, _PART_PER_CLUSTER * k) // rows)
    return _over_blocks(add_rows, zeros, arrays, rows, n_in_part)


def _sorted(zeros: _Sums, shift: jax.Array | None, x, labels, weights=None) -> _Sums:
    """The same sums in the order of sorted labels, which never changes either."""
    sums, counts = sorted_sums(x, labels, zeros[1].size, weights, shift, zeros[1].dtype)
    return vary_like(sums, zeros[0]), vary_like(counts, zeros[1])


def _one_hot(zeros: _Sums, shift: jax.Array | None, *arrays: jax.Array) -> _Sums:
    """The same sums as one-hot matrix products, in an order that never changes."""
    k = zeros[0].shape[0]

    def add_rows(sums: _Sums, x, labels, weights=None) -> _Sums:
        one_hot = jax.nn.one_hot(labels, k, dtype=sums[0].dtype)
        rows, ones = _shifted(x, shift, sums[0].dtype), jnp.ones(labels.shape, sums[1].dtype)
        if weights is not None:
            rows, ones = jnp.where(weights[:, None] > 0, rows * weights[:, None], 0), weights
        product = jnp.matmul(one_hot.T, rows, precision=lax.Precision.HIGHEST)
        return sums[0] + product, sums[1] + jnp.sum(one_hot * ones[:, None], axis=0)

    return _over_blocks(add_rows, zeros, arrays, max(1, _ONE_HOT_ENTRIES // k), 1)
