"""Spherical k-means: clusters of directions, by cosine similarity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.assignment import nearest, squared_distances
from jkmeans.kmeans.collectives import AxisName, vary_like
from jkmeans.kmeans.fit import best_of
from jkmeans.kmeans.initialization import INITIALIZATIONS
from jkmeans.kmeans.lloyd import EMPTY_POLICIES, KMeansResult
from jkmeans.kmeans.relocation import relocate
from jkmeans.kmeans.statistics import cluster_statistics


def unit_rows(x: jax.Array) -> jax.Array:
    """x_i / ‖x_i‖: [n, d] in float32 (float64 if x is); rows of zeros stay zeros."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # By the largest entry first, so that no square overflows or vanishes.
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    norms = jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True))
    return x / jnp.where(norms > 0, norms, 1)


def cosine_distances(x: jax.Array, centroids: jax.Array, labels: jax.Array) -> jax.Array:
    """1 − cos(x_i, c_{labels_i}) of unit rows and unit centroids: [n] float; 1 for rows of zeros.

    As ½‖x_i − c‖², which has no cancellation where the two are close.
    """
    half = squared_distances(x, centroids, labels) / 2
    return jnp.where(jnp.any(x != 0, axis=1), half, 1)


def spherical(
    key: jax.Array,
    x: jax.Array,
    n_clusters: int,
    *,
    init: str | jax.Array = "k-means++",
    n_init: int = 1,
    max_iter: int | jax.Array = 300,
    tol: float | jax.Array = 0.0,
    empty: str = "farthest",
    weights: jax.Array | None = None,
    index: jax.Array | None = None,
    axis_name: AxisName = None,
) -> KMeansResult:
    """Spherical k-means: minimises Σ_i w_i (1 − cos(x_i, c_{labels_i})) over unit centroids.

    Lloyd's algorithm on x_i / ‖x_i‖, whose centroids are the directions of the clusters' sums,
    Σ_i w_i x_i / ‖x_i‖. Empty clusters move to the rows of largest cosine distance, as in
    ``lloyd``, or keep their centroids; a cluster whose rows cancel out keeps its centroid.

    Args:
      key: a JAX random key, the same on all devices.
      x: [n, d], any real dtype; the local rows inside ``shard_map``. Only directions matter. Rows
        of zeros have cosine distance 1 to every centroid and move none. A normalised copy is made.
      n_clusters: k.
      init: a name in INITIALIZATIONS, used on the unit rows, or the first centroids [k, d], which
        are normalised.
      n_init: restarts; the one of lowest inertia is returned.
      max_iter: [] int, iterations of a restart at most.
      tol: [] float, bound on the squared shift of the centroids that ends a restart.
      empty: one of EMPTY_POLICIES.
      weights: [n] float, at least 0; None for ones.
      index: [n] int32, see ``sample``.
      axis_name: the mesh axis that rows are sharded over, or None.

    Returns:
      KMeansResult, of which centroids have norm 1, and distances and inertia are 1 − cos.

    Raises:
      ValueError: an unknown ``init`` or ``empty``, centroids of another shape than [k, d], or fewer
        than k rows.

    Source: Dhillon and Modha, Concept decompositions for large sparse text data using clustering,
    Machine Learning 42 (2001).
    """
    if empty not in EMPTY_POLICIES:
        raise ValueError(f"empty={empty!r}: expected one of {', '.join(EMPTY_POLICIES)}")
    x = unit_rows(x)
    if not isinstance(init, str):
        if init.shape != (n_clusters, x.shape[1]):
            raise ValueError(f"init has shape {init.shape}: expected {(n_clusters, x.shape[1])}")
        return _iterate(x, unit_rows(init), weights, max_iter, tol, empty, axis_name)
    if init not in INITIALIZATIONS:
        raise ValueError(f"init={init!r}: expected an array or one of {', '.join(INITIALIZATIONS)}")

    def restart(r) -> KMeansResult:
        first = INITIALIZATIONS[init](
            jax.random.fold_in(key, r),
            x,
            n_clusters,
            weights=weights,
            index=index,
            axis_name=axis_name,
        )
        return _iterate(x, first, weights, max_iter, tol, empty, axis_name)

    return best_of(restart, n_init)


def _iterate(x, centroids, weights, max_iter, tol, empty, axis_name) -> KMeansResult:
    """Lloyd's algorithm on unit rows, with unit centroids."""
    k = centroids.shape[0]

    def replicated(value) -> jax.Array:
        return vary_like(value, x, weights, centroids, reduced=axis_name)

    def step(carry):
        centroids, _, n_iter, n_relocated = carry
        labels = nearest(x, centroids)
        found = cluster_statistics(x, labels, k, weights=weights, axis_name=axis_name)
        sums, moved = found.sums, jnp.zeros_like(n_relocated)
        if empty == "farthest":
            sums, moved = lax.cond(
                jnp.any(found.counts == 0),
                lambda: _relocate(x, weights, centroids, labels, found, axis_name),
                lambda: (sums, moved),
            )
        directions = unit_rows(sums)
        cancelled = ~jnp.any(directions != 0, axis=1, keepdims=True)
        directions = jnp.where(cancelled, centroids, directions).astype(centroids.dtype)
        return directions, centroids, n_iter + 1, n_relocated + moved

    def unfinished(carry):
        centroids, previous, n_iter, _ = carry
        shift = jnp.sum((centroids - previous) ** 2)
        return (n_iter < max_iter) & ((n_iter == 0) | (shift > tol))

    zero = replicated(jnp.zeros((), jnp.int32))
    centroids = replicated(centroids.astype(x.dtype))
    carry = lax.while_loop(unfinished, step, (centroids, centroids, zero, zero))
    centroids, _, n_iter, n_relocated = carry
    labels = nearest(x, centroids)
    distances = cosine_distances(x, centroids, labels)
    found = cluster_statistics(
        x, labels, k, weights=weights, distances=distances, axis_name=axis_name
    )
    return KMeansResult(
        centroids=centroids,
        labels=labels,
        distances=distances,
        counts=found.counts,
        inertia=found.inertia,
        n_iter=n_iter,
        n_empty=jnp.sum(found.counts == 0).astype(jnp.int32),
        n_relocated=n_relocated,
    )


def _relocate(x, weights, centroids, labels, found, axis_name) -> tuple[jax.Array, jax.Array]:
    """The sums after each empty cluster took one of the rows of largest cosine distance."""
    distances = cosine_distances(x, centroids, labels)
    # Rows of zeros have no direction to move to.
    distances = jnp.where(jnp.any(x != 0, axis=1), distances, 0)
    labels, moved = relocate(labels, distances, weights, found.counts, axis_name)
    k = centroids.shape[0]
    sums = cluster_statistics(x, labels, k, weights=weights, axis_name=axis_name).sums
    return sums, moved
