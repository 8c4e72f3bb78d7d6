"""Empty clusters move to the rows that are farthest from their centroids."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jkmeans.kmeans.collectives import AxisName, n_devices, stack_devices, top_k_rows

# Clusters moved in one iteration at most; those still empty are moved in the next. It bounds the
# all-reduce of the candidates, devices × MAX_RELOCATIONS numbers.
MAX_RELOCATIONS = 1024


def relocate(
    labels: jax.Array,
    distances: jax.Array,
    weights: jax.Array | None,
    counts: jax.Array,
    axis_name: AxisName,
    centroid_axis: AxisName = None,
) -> tuple[jax.Array, jax.Array]:
    """Gives each empty cluster one of the rows farthest from their centroids.

    Args:
      labels: [n] int32, of the local rows, among all clusters.
      distances: [n] float, squared distances to their centroids.
      weights: [n], or None for ones. Rows of weight 0 are not taken, nor are rows that lie on their
        centroid.
      counts: [k] of the local clusters, over all rows.
      axis_name: the mesh axis of the rows, or None.
      centroid_axis: the mesh axis of the clusters, or None.

    Returns:
      The labels with those rows in their new clusters, and how many clusters were filled: [] int32.
    """
    k = counts.shape[0] * n_devices(centroid_axis)
    eligible = distances > 0 if weights is None else (distances > 0) & (weights > 0)
    at_most = min(k, MAX_RELOCATIONS, labels.shape[0] * n_devices(axis_name))
    farthest, row, local = top_k_rows(jnp.where(eligible, distances, 0), at_most, axis_name)
    is_empty = stack_devices((counts == 0).astype(jnp.int32), centroid_axis).reshape(-1) > 0
    (clusters,) = jnp.nonzero(is_empty, size=at_most, fill_value=k)
    moved = (clusters < k) & (farthest > 0)
    # Rows of other devices, and those that stay, are written past the end: nowhere.
    row = jnp.where(moved & local, row, labels.shape[0])
    labels = labels.at[row].set(clusters.astype(labels.dtype), mode="drop")
    return labels, jnp.sum(moved).astype(jnp.int32)
