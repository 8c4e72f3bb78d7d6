"""Nearest centroid: exact, tiled over rows; an N×K matrix only where it is what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.collectives import AxisName, all_sum, axis_index, n_devices

# Features up to which squared differences are added one feature at a time.
_FEW_FEATURES = 8
# Numbers in all centroids together up to which they are compared one by one.
_FEW_NUMBERS = 64
PRECISIONS = ("full", "exact", "exact-tf32", "exact-kernel", "fast", "fast-tf32", "fast-kernel")
"""How scores are computed: see `nearest` and ``certified.py``."""


class Assignment(NamedTuple):
    """The nearest centroid of each row.

    Attributes:
      labels: [n] int32, in 0 … k-1.
      distances: [n] float, the squared Euclidean distance to that centroid.
    """

    labels: jax.Array
    distances: jax.Array


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The dtype to compute in: float32, or float64 if an array has it."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def map_rows(function: Callable[[jax.Array], Any], x: jax.Array, block_size: int | None) -> Any:
    """``function(x)`` for a function that treats rows apart, on one block of rows at a time.

    Args:
      function: from [b, d] to [b, ...], or a tree of such arrays.
      x: [n, d].
      block_size: the largest b; None for what suits the device.

    Returns:
      [n, ...], or a tree of such arrays.
    """
    n = x.shape[0]
    if block_size is None:
        # On a CPU a block's scores stay in the cache; elsewhere a block must fill the device.
        block_size = 512 if jax.default_backend() == "cpu" else 16384
    n_blocks = max(1, -(-n // block_size))
    if n_blocks == 1:
        return function(x)
    # Blocks of equal size; the last one reaches back over rows of the one before it rather than
    # past the end, which would need a padded copy of x.
    rows = -(-n // n_blocks)
    starts = jnp.minimum(jnp.arange(n_blocks) * rows, n - rows)
    blocks = lax.map(lambda start: function(lax.dynamic_slice_in_dim(x, start, rows)), starts)
    last = n - rows * (n_blocks - 1)

    def join(blocks: jax.Array) -> jax.Array:
        most = blocks[:-1].reshape(-1, *blocks.shape[2:])
        return jnp.concatenate([most, blocks[-1, rows - last :]])

    return jax.tree.map(join, blocks)


def nearest(
    x: jax.Array,
    centroids: jax.Array,
    *,
    block_size: int | None = None,
    centroid_axis: AxisName = None,
    precision: str = "full",
) -> jax.Array:
    """The label of each row's nearest centroid, without its distance.

    argmin_k ‖x − c_k‖² = argmin_k ½‖c_k‖² − x·c_k, one matrix product per block of rows. Rows and
    centroids are first shifted by a centroid in their middle, so that the products stay of the
    size of the data's spread and labels remain right far from the origin.

    Args:
      x: [n, d], any real dtype; computed in float32 (float64 if x or centroids are).
      centroids: [k, d].
      block_size: the largest number of rows whose scores are in memory at a time; None for what
        suits the device.
      centroid_axis: the mesh axis that centroids are sharded over, the same number on each of its
        devices; None if all of them are here.
      precision: "full" for every score in float32 or float64. "exact" for products in bfloat16 with
        a proven bound on their rounding: rows that it does not decide are computed anew in full
        precision, and labels are the same (see ``certified.py`` for what that means where float32
        itself cannot tell); "exact-tf32" for the same with TensorFloat-32. "fast" and "fast-tf32"
        for the labels of such products as they are. Made for GPUs: slower than "full" on a CPU.
        "exact-kernel" and "fast-kernel": "exact" and "fast" by a kernel for Hopper that has run on
        no GPU yet, and as they are without the kernel where it does not apply.

    Returns:
      [n] int32, among all centroids. Ties go to the lowest index; a row that holds NaN gets 0.

    Raises:
      ValueError: ``precision`` is none of PRECISIONS, or not "full" with a ``centroid_axis``; or x
        and centroids are of other shapes.
    """
    check_precision(precision, centroid_axis)
    if precision != "full":
        # It is built on this module.
        from jkmeans.kmeans.certified import certified_nearest

        found = certified_nearest(x, centroids, precision=precision, block_size=block_size)
        return found.labels
    x, centroids = jnp.asarray(x), jnp.asarray(centroids)
    check_shapes(x, centroids)
    k = centroids.shape[0]
    dtype = accumulation_dtype(x, centroids)
    x, centroids = lax.stop_gradient((x, centroids.astype(dtype)))
    middle = middle_centroid(centroids)
    if centroid_axis is not None:
        # The same for all: that of the first device.
        is_first = axis_index(centroid_axis) == 0
        middle = all_sum(jnp.where(is_first, middle, 0), centroid_axis)
    shifted_kd = centroids - middle
    half_norms = 0.5 * jnp.sum(shifted_kd**2, axis=1)
    if is_few(k, x.shape[1]) and centroid_axis is None:
        return _nearest_of_few(x, middle, shifted_kd, half_norms)
    numbers = jnp.arange(k, dtype=jnp.int32) + k * axis_index(centroid_axis)
    n_centroids = k * n_devices(centroid_axis)

    def find(x_bd: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lowest(
            score(x_bd.astype(dtype) - middle, shifted_kd, half_norms), numbers, n_centroids
        )

    if centroid_axis is None:
        labels = map_rows(lambda x_bd: find(x_bd)[1], x, block_size)
    else:
        scores, labels = map_rows(find, x, block_size)
        best = lax.pmin(scores, centroid_axis)
        labels = lax.pmin(jnp.where(scores == best, labels, n_centroids), centroid_axis)
    return jnp.where(labels < n_centroids, labels, 0)  # no score equals NaN


def check_precision(precision: str, centroid_axis: AxisName = None) -> None:
    """Raises ValueError if scores cannot be computed in this way."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    if precision != "full" and centroid_axis is not None:
        raise ValueError(f"precision={precision!r}: expected 'full' where centroids are sharded")


def check_shapes(x: jax.Array, centroids: jax.Array) -> None:
    """Raises ValueError if these are not rows [n, d] and at least one centroid, [k, d]."""
    rows, means = x.shape, centroids.shape
    if len(rows) != 2 or len(means) != 2 or rows[1] != means[1] or means[0] == 0:
        raise ValueError(
            f"x has shape {rows} and centroids have {means}: expected [n, d] and [k, d], as many "
            "columns in both and one centroid at least"
        )


def is_few(k: int, d: int) -> bool:
    """Whether centroids are so few and so short that no matrix product is worth it."""
    return k * d <= _FEW_NUMBERS


def _nearest_of_few(
    x: jax.Array, middle: jax.Array, centroids: jax.Array, half_norms: jax.Array
) -> jax.Array:
    """The labels [n] for centroids so few and so short that no matrix product is worth it.

    Features one by one, centroids one by one: the compiler makes one pass over the rows of it.
    """
    k, d = centroids.shape
    columns = [x[:, j].astype(centroids.dtype) - middle[0, j] for j in range(d)]
    best, labels = jnp.full(x.shape[0], jnp.inf, centroids.dtype), jnp.zeros(x.shape[0], jnp.int32)
    for i in range(k):
        scores = half_norms[i] - sum(centroids[i, j] * columns[j] for j in range(d))
        nearer = scores < best
        best, labels = jnp.where(nearer, scores, best), jnp.where(nearer, i, labels)
    return labels


def middle_centroid(centroids: jax.Array) -> jax.Array:
    """The centroid nearest to the mean of all: [1, d].

    A centroid rather than the mean itself: differences of integers stay integers, ties stay ties.
    """
    to_mean = jnp.sum((centroids - jnp.mean(centroids, axis=0, keepdims=True)) ** 2, axis=1)
    return lax.dynamic_slice_in_dim(centroids, jnp.argmin(to_mean), 1)


def score(x_bd: jax.Array, centroids_kd: jax.Array, half_norms: jax.Array) -> jax.Array:
    """½‖c‖² − x·c, which orders centroids as the distance does: [k, b].

    Centroids come first, so that a minimum over them runs across rows, in vector instructions.
    """
    products_kb = jnp.matmul(centroids_kd, x_bd.T, precision=lax.Precision.HIGHEST)
    return half_norms[:, None] - products_kb


def lowest(scores_kb: jax.Array, numbers: jax.Array, none: int) -> tuple[jax.Array, jax.Array]:
    """The lowest score of each column and whose it is.

    Two vectorised minima: XLA's argmin is scalar code on a CPU.

    Args:
      scores_kb: [k, b].
      numbers: [k] int32, what each row of scores is called; ties go to the lowest number.
      none: the number given where no score equals the lowest, which is then NaN.

    Returns:
      scores [b] and numbers [b].
    """
    best = jnp.min(scores_kb, axis=0)
    named = jnp.where(scores_kb == best[None, :], numbers[:, None], none)
    return best, jnp.min(named, axis=0)


def squared_distances(
    x: jax.Array, centroids: jax.Array, labels: jax.Array, *, centroid_axis: AxisName = None
) -> jax.Array:
    """‖x_i − c_{labels_i}‖², from the differences themselves: accurate far from the origin.

    Args:
      x: [n, d], any real dtype.
      centroids: [k, d].
      labels: [n] int, among all centroids.
      centroid_axis: the mesh axis that centroids are sharded over, see ``nearest``.

    Returns:
      [n] float; differentiable with respect to x and centroids.

    Raises:
      ValueError: x and centroids are of other shapes.
    """
    dtype = accumulation_dtype(x, centroids)
    x, centroids = jnp.asarray(x), jnp.asarray(centroids, dtype)
    check_shapes(x, centroids)
    n, d = x.shape
    if centroid_axis is not None:
        k = centroids.shape[0]
        labels = labels - k * axis_index(centroid_axis)
        here = (labels >= 0) & (labels < k)
        distances = squared_distances(x, centroids, jnp.clip(labels, 0, k - 1))
        return all_sum(jnp.where(here, distances, 0), centroid_axis)
    if d <= _FEW_FEATURES:
        columns = ((x[:, j].astype(dtype) - centroids[:, j][labels]) ** 2 for j in range(d))
        return sum(columns, jnp.zeros(n, dtype))

    def of_rows(start) -> jax.Array:
        x_bd = lax.dynamic_slice_in_dim(x, start, rows).astype(dtype)
        labels_b = lax.dynamic_slice_in_dim(labels, start, rows)
        return jnp.sum((x_bd - centroids[labels_b]) ** 2, axis=1)

    # The compiler writes centroids[labels] out: in blocks, lest it take as much room as x. That for
    # GPUs does not.
    rows = {"cpu": 1024, "gpu": n}.get(jax.default_backend(), 16384)
    if n <= rows:
        return jnp.sum((x.astype(dtype) - centroids[labels]) ** 2, axis=1)
    n_blocks, rest = divmod(n, rows)
    blocks = lax.map(of_rows, jnp.arange(n_blocks) * rows).reshape(-1)
    return jnp.concatenate([blocks, of_rows(n - rows)[rows - rest :]]) if rest else blocks


def distances_to_all(x: jax.Array, centroids: jax.Array, dtype: Any = None) -> jax.Array:
    """The Euclidean distance of each row to every centroid, by ‖x‖² − 2x·c + ‖c‖².

    Rows and centroids are first shifted by a centroid in their middle. What the formula loses near
    a centroid is half of the digits, in relation to how far the farthest centroid is: whoever wants
    the digits of float32 gives centroids in float64.

    Args:
      x: [n, d], any real dtype; computed in float32 (float64 if x or centroids are).
      centroids: [k, d].
      dtype: of the result; None for that of the computation.

    Returns:
      [n, k] float. A row that holds NaN has distances of NaN.
    """
    computed = accumulation_dtype(x, centroids)
    centroids = jnp.asarray(centroids, computed)
    middle = middle_centroid(centroids)
    shifted_kd = centroids - middle
    norms_k = jnp.sum(shifted_kd**2, axis=1)

    def of_rows(x_bd: jax.Array) -> jax.Array:
        x_bd = x_bd.astype(computed) - middle
        products_bk = jnp.matmul(x_bd, shifted_kd.T, precision=lax.Precision.HIGHEST)
        norms_b = jnp.sum(x_bd**2, axis=1)
        squares_bk = norms_b[:, None] - 2 * products_bk + norms_k[None, :]
        # Not maximum(…, 0) alone, which would make 0 of NaN on some devices.
        return jnp.sqrt(jnp.where(squares_bk < 0, 0, squares_bk)).astype(dtype or computed)

    return map_rows(of_rows, jnp.asarray(x), None)


def assign(
    x: jax.Array,
    centroids: jax.Array,
    *,
    block_size: int | None = None,
    precision: str = "full",
) -> Assignment:
    """The nearest centroid of each row in squared Euclidean distance, and that distance.

    Args:
      x: [n, d], any real dtype; computed in float32 (float64 if x or centroids are).
      centroids: [k, d].
      block_size: the largest number of rows whose scores are in memory at a time; None for what
        suits the device.
      precision: how labels are found, see `nearest`; distances are always in full precision.

    Returns:
      Assignment(labels [n] int32, distances [n] float). Ties go to the lowest index. A row that
      holds NaN gets a valid label and the distance NaN. The distances are differentiable with
      respect to x and centroids, the labels held fixed: the gradient of k-means' inertia.

    Raises:
      ValueError: as `nearest`.
    """
    labels = nearest(x, centroids, block_size=block_size, precision=precision)
    return Assignment(labels, squared_distances(x, centroids, labels))
