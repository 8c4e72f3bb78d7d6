"""What rows are to centroids that are there: labels, distances, inertia, over a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jkmeans import kmeans, sharding
from jkmeans.sharded.fits import RESULT_SPECS, cut
from jkmeans.sharded.placing import Rows, place, precision, unpadded
from jkmeans.sharded.programs import result_specs, run


def assign(
    x: Any, centroids: Any, *, mesh: Mesh | None = None, **options: Any
) -> kmeans.Assignment:
    """`kmeans.assign` on the devices of a mesh.

    Args:
      x: [n, d], see ``place``.
      centroids: [k, d].
      mesh: as in ``fit``.
      **options: static keyword arguments of ``kmeans.assign``.

    Returns:
      Assignment(labels [n] int32, distances [n] float, squared).
    """
    specs = result_specs(kmeans.Assignment)
    with precision(x, centroids):
        rows = place(x, mesh=mesh)
        result = run(_assign, rows, centroids, out_specs=specs, **options)
        return kmeans.Assignment(
            unpadded(result.labels, rows.n_rows), unpadded(result.distances, rows.n_rows)
        )


def nearest(x: Any, centroids: Any, *, mesh: Mesh | None = None, **options: Any) -> jax.Array:
    """`kmeans.nearest` on the devices of a mesh: [n] int32; arguments as in ``assign``."""
    with precision(x, centroids):
        rows = place(x, mesh=mesh)
        labels = run(_nearest, rows, centroids, out_specs=sharding.SHARDED, **options)
        return unpadded(labels, rows.n_rows)


def inertia(x: Any, centroids: Any, *, weights: Any = None, mesh: Mesh | None = None) -> jax.Array:
    """The weighted sum of squared distances to the nearest centroid: [] float.

    Args:
      x: [n, d], see ``place``.
      centroids: [k, d].
      weights: [n], at least 0; None for ones.
      mesh: as in ``fit``.
    """
    with precision(x, centroids):
        return evaluate_rows(place(x, weights, mesh=mesh), centroids).inertia


def evaluate_rows(rows: Rows, centroids: Any) -> kmeans.KMeansResult:
    """Labels, distances, counts and inertia of placed rows under given centroids.

    Args:
      rows: from ``place``.
      centroids: [k, d].

    Returns:
      KMeansResult of no iteration.
    """
    with precision(rows.x, centroids):
        result = run(_evaluate, rows, centroids, out_specs=RESULT_SPECS)
        return cut(result, rows.n_rows)


def distances(x: Any, centroids: Any, *, mesh: Mesh | None = None) -> jax.Array:
    """The Euclidean distances of all rows to all centroids.

    Computed in float64, as in scikit-learn, because ‖x‖² − 2x·c + ‖c‖² leaves only half of the
    digits where a row lies near its centroid.

    Args:
      x: [n, d], see ``place``.
      centroids: [k, d].
      mesh: as in ``fit``.

    Returns:
      [n, k] float32, or float64 if x or the centroids are.
    """
    both = np.float64 in (x.dtype, centroids.dtype)
    with jax.enable_x64(True):
        rows = place(x, mesh=mesh)
        dtype = "float64" if both else "float32"
        result = run(_distances, rows, centroids, out_specs=sharding.SHARDED, dtype=dtype)
        return unpadded(result, rows.n_rows)


def _assign(x, weights, centroids, *, axis_name, **options):
    del weights, axis_name
    return kmeans.assign(x, centroids, **options)


def _nearest(x, weights, centroids, *, axis_name, **options):
    del weights, axis_name
    return kmeans.nearest(x, centroids, **options)


def _evaluate(x, weights, centroids, *, axis_name):
    # No iteration: only the last assignment and its sums.
    return kmeans.lloyd(
        x,
        centroids,
        weights=weights,
        max_iter=0,
        empty="keep",
        algorithm="lloyd",
        axis_name=axis_name,
    )


def _distances(x, weights, centroids, *, axis_name, dtype):
    del weights, axis_name
    return kmeans.distances_to_all(x, jnp.asarray(centroids, jnp.float64), dtype)
