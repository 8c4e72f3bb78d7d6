"""Data that fits the budget: read once, kept on the devices, clustered by one program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jkmeans import kmeans, processes
from jkmeans.sharding import DATA_AXIS, REPLICATED, SHARDED, data_parallel, place, read_to_devices
from jkmeans.sources import Source
from jkmeans.streaming.pipeline import (
    Feeder,
    refuse_not_finite,
    refuse_total_weight,
    streamed_dtype,
    sum_of_weights,
)

# Labels, distances and the like that Lloyd's algorithm has in memory for a row.
_ROW_OVERHEAD_BYTES = 64
_CHECKED_BYTES = 2**22


def needed_bytes(source: Source) -> int:
    """Bytes of memory that `load` and a fit take."""
    row_bytes = source.n_features * streamed_dtype(source).itemsize
    # A fit computes in float32, block by block.
    return source.n_rows * (row_bytes + _ROW_OVERHEAD_BYTES) + source.overhead_bytes


def load(feeder: Feeder) -> Resident:
    """Reads all rows and puts them on the devices.

    Raises:
      UserError: the source cannot be read, or holds NaN or infinity, or the weights are none.
    """
    source, mesh = feeder.source, feeder.mesh
    n_devices = mesh.shape[DATA_AXIS]
    n_padded = -(-source.n_rows // n_devices) * n_devices
    source.check_unchanged()
    weights = None
    if feeder.weights is not None or n_padded > source.n_rows:
        weights = np.ones(n_padded, feeder.weight_dtype)
        weights[source.n_rows :] = 0
        if feeder.weights is not None:
            feeder.weights.read_into(0, weights[: source.n_rows, None])
            total = sum_of_weights(weights, 0, feeder.weights.name)
            refuse_total_weight(total, weights.dtype)

    def read(start: int, stop: int) -> np.ndarray:
        rows = np.zeros((stop - start, source.n_features), feeder.dtype)
        count = max(0, min(stop, source.n_rows) - start)
        step = max(1, _CHECKED_BYTES // rows[0].nbytes)
        for first in range(0, count, step):
            # Checked while still in the cache.
            piece = rows[first : min(first + step, count)]
            source.read_into(start + first, piece)
            row = start + first
            used = None if weights is None else weights[row : row + len(piece)]
            refuse_not_finite(piece, used, row, source.name, only_if_any=True)
        return rows

    shape = (n_padded, source.n_features)
    x = processes.together(lambda: read_to_devices(read, shape, mesh))
    source.check_unchanged()
    return Resident(x, None if weights is None else place(weights, mesh, SHARDED), mesh)


class Resident:
    """Rows on the devices.

    Args:
      x: [n, d], sharded.
      weights: [n], sharded, 0 for padding; or None for ones.
      mesh: of the data axis.
    """

    def __init__(self, x: jax.Array, weights: jax.Array | None, mesh: Mesh):
        self._x = x
        self._weights = weights
        self._mesh = mesh

    def fit(self, key: jax.Array, init: Any, **options: Any) -> kmeans.KMeansResult:
        """One restart of k-means, as NumPy arrays.

        Args:
          key: for the initialisation.
          init: a name in `kmeans.INITIALIZATIONS`, or centroids [k, d].
          options: n_clusters, max_iter, tol (relative), oversampling_factor, n_rounds.
        """
        name = init if isinstance(init, str) else None
        centroids = None if name else jnp.asarray(init)
        result = _fit(key, self._x, self._weights, centroids, init=name, mesh=self._mesh, **options)
        return jax.tree.map(np.asarray, result)


@functools.partial(
    jax.jit,
    static_argnames=("init", "mesh", "n_clusters", "oversampling_factor", "n_rounds"),
)
def _fit(
    key,
    x,
    weights,
    centroids,
    max_iter,
    tol,
    *,
    init,
    mesh,
    n_clusters,
    oversampling_factor,
    n_rounds,
):
    def local(key, x, weights, centroids, max_iter, tol):
        if init is not None:
            extra = (
                {"oversampling_factor": oversampling_factor, "n_rounds": n_rounds}
                if init == "k-means||"
                else {}
            )
            centroids = kmeans.INITIALIZATIONS[init](
                key, x, n_clusters, weights=weights, axis_name=DATA_AXIS, **extra
            )
        counted = None if weights is None else weights > 0
        mean, variance = kmeans.column_moments(x, counted, DATA_AXIS)
        result = kmeans.lloyd(
            x,
            centroids,
            weights=weights,
            max_iter=max_iter,
            tol=tol * jnp.mean(variance),
            origin=kmeans.far_origin(mean, variance),
            axis_name=DATA_AXIS,
        )
        # Labels and distances stay behind: they are sharded, and not asked for.
        return result._replace(labels=None, distances=None)

    in_specs = (REPLICATED, SHARDED, SHARDED, REPLICATED, REPLICATED, REPLICATED)
    return data_parallel(local, mesh, in_specs, REPLICATED)(
        key, x, weights, centroids, max_iter, tol
    )
