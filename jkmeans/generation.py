"""Artificial data, made on the devices: a million points never cross from the host."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jkmeans.sharding import DATA_AXIS, REPLICATED, SHARDED, data_parallel

BLOCK_ROWS = 4096
"""Rows drawn from one key. Part of what a seed means: another number gives other data."""

_MOST_ROWS = 2**31 - 1 - BLOCK_ROWS
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Blobs(NamedTuple):
    """Points around centers.

    Attributes:
      x: [n, d] float, the points.
      labels: [n] int32, the center that each point was drawn around; −1 for padding.
      centers: [k, d] float.
    """

    x: jax.Array
    labels: jax.Array
    centers: jax.Array


def make_blobs(
    key: jax.Array | int,
    n_samples: int,
    n_features: int,
    n_clusters: int | jax.Array | np.ndarray = 5,
    *,
    cluster_std: float | jax.Array | np.ndarray = 1.0,
    center_box: tuple[float, float] = (-10.0, 10.0),
    weights: jax.Array | np.ndarray | None = None,
    mesh: Mesh | None = None,
    pad: bool = False,
    dtype=jnp.float32,
) -> Blobs:
    """Isotropic Gaussian blobs, generated on the devices and sharded over them.

    Each point draws its center c with probability ``weights`` and is c + σ_c · N(0, I). Noise
    belongs to blocks of rows numbered over the whole data set, not to devices: the numbers are the
    same on any number of devices, and the first rows of a larger data set are those of a smaller
    one. Unlike in scikit-learn, the sizes of the blobs are random.

    Args:
      key: a JAX random key, or an integer seed.
      n_samples: n, at least 1.
      n_features: d, at least 1.
      n_clusters: k, whose centers are then uniform in ``center_box``; or the centers, [k, d].
      cluster_std: σ, a number of at least 0 for all blobs, or one for each, [k].
      center_box: the lowest and the highest coordinate of random centers.
      weights: [k], at least 0, the share of each blob up to a factor; None for equal shares.
      mesh: with a data axis, as of `jkmeans.sharding.make_mesh`; None for the default device.
      pad: what to do where the mesh does not divide n_samples. False: x and labels have n_samples
        rows, and are replicated, because JAX has no shards of unequal size. True: they have as
        many rows as the mesh divides and stay sharded; rows of padding, at the end, have label −1
        (so that ``labels >= 0`` are their weights).
      dtype: of x and centers: float32, float64, float16 or bfloat16. Noise is drawn in float32
        for the two small ones.

    Returns:
      Blobs(x [n, d], labels [n] int32, centers [k, d]).

    Raises:
      ValueError: an argument is out of its range.
    """
    n_samples = _count(n_samples, "n_samples", _MOST_ROWS)
    n_features = _count(n_features, "n_features", 2**31 - 1)
    dtype = jnp.dtype(dtype)
    if dtype.name not in _FLOATS:
        raise ValueError(f"dtype is {dtype.name}; accepted: {', '.join(_FLOATS)}")
    drawn = jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))
    key = _as_key(key)
    centers = _centers(jax.random.fold_in(key, 0), n_clusters, n_features, center_box, drawn)
    k = len(centers)
    std = np.asarray(cluster_std, drawn)
    if std.shape not in ((), (k,)) or not np.isfinite(std).all() or (std < 0).any():
        raise ValueError(
            f"cluster_std is {cluster_std!r}; accepted: a number of at least 0, or {k} of them"
        )
    shares = np.ones(k) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (k,) or not np.isfinite(shares).all() or (shares < 0).any():
        raise ValueError(f"weights is {weights!r}; accepted: {k} numbers of at least 0")
    if shares.sum() == 0:
        raise ValueError("weights are all 0; accepted: at least one above 0")
    # The last number is above every uniform draw, and blobs of share 0 are never reached.
    bounds = np.cumsum(shares / shares.sum())
    bounds[bounds == bounds[-1]] = np.inf
    program = _program(n_samples, n_features, mesh, pad, dtype)
    noise_key = jax.random.fold_in(key, 1)
    x, labels = program(noise_key, centers, np.broadcast_to(std, (k,)), bounds.astype(np.float32))
    return Blobs(x, labels, jnp.asarray(centers.astype(dtype)))


@functools.lru_cache(maxsize=32)
def _program(n: int, d: int, mesh: Mesh | None, pad: bool, dtype: jnp.dtype):
    """The compiled generator of one shape."""
    n_devices = 1 if mesh is None else mesh.size
    rows_per_device = -(-n // n_devices)

    def block(key, centers, std, bounds, number):
        label_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        uniform = jax.random.uniform(label_key, (BLOCK_ROWS,))
        labels = jnp.sum(uniform[:, None] >= bounds[None, :], axis=1, dtype=jnp.int32)
        noise = jax.random.normal(noise_key, (BLOCK_ROWS, d), centers.dtype)
        x = centers[labels] + std[labels][:, None] * noise
        row = number * BLOCK_ROWS + jnp.arange(BLOCK_ROWS, dtype=jnp.int32)
        return x.astype(dtype), jnp.where(row < n, labels, -1)

    def rows_from(first, n_rows: int, n_blocks: int, *arguments):
        """Rows ``first`` to ``first + n_rows``, cut out of the blocks that hold them."""
        # One block after another: its numbers stay in the cache, and the code of a block is the
        # same on every device, which keeps its bits the same.
        numbers = first // BLOCK_ROWS + jnp.arange(n_blocks, dtype=jnp.int32)
        x, labels = lax.map(functools.partial(block, *arguments), numbers)
        start = first % BLOCK_ROWS
        return (
            lax.dynamic_slice_in_dim(x.reshape(-1, d), start, n_rows),
            lax.dynamic_slice_in_dim(labels.reshape(-1), start, n_rows),
        )

    if mesh is None:
        n_blocks = -(-n // BLOCK_ROWS)
        return jax.jit(functools.partial(rows_from, jnp.int32(0), n, n_blocks))

    def local_rows(*arguments):
        # Shards start anywhere in a block: one more may be touched.
        n_blocks = (rows_per_device + BLOCK_ROWS - 2) // BLOCK_ROWS + 1
        first = lax.axis_index(DATA_AXIS) * rows_per_device
        return rows_from(first, rows_per_device, n_blocks, *arguments)

    def all_rows(*arguments):
        x, labels = data_parallel(local_rows, mesh, (REPLICATED,) * 4, (SHARDED, SHARDED))(
            *arguments
        )
        return (x, labels) if pad else (x[:n], labels[:n])

    even = pad or n % n_devices == 0
    return jax.jit(all_rows, out_shardings=NamedSharding(mesh, SHARDED if even else REPLICATED))


def _as_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    try:
        return jax.random.key(operator.index(key))  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"key is {key!r}; accepted: a JAX random key or an integer") from None


def _centers(key, n_clusters, n_features: int, center_box, dtype) -> np.ndarray:
    """[k, d], on the host: they are few, and go to every device."""
    if np.ndim(n_clusters) > 0:
        centers = np.asarray(n_clusters)
        if centers.ndim != 2 or centers.shape[1] != n_features or len(centers) == 0:
            raise ValueError(f"centers are of shape {centers.shape}; accepted: [k, {n_features}]")
        if not np.isfinite(centers.astype(np.float64)).all():
            raise ValueError("centers hold NaN or infinity; accepted: finite numbers")
        return centers.astype(dtype)
    k = _count(n_clusters, "n_clusters", 2**31 - 1)
    low, high = (float(bound) for bound in center_box)
    if not (np.isfinite([low, high]).all() and low <= high):
        raise ValueError(f"center_box is {center_box!r}; accepted: a lower and a higher number")
    return np.asarray(jax.random.uniform(key, (k, n_features), dtype, low, high))


def _count(value, name: str, most: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count <= most:
        raise ValueError(f"{name} is {value!r}; accepted: an integer from 1 to {most:,}")
    return count
