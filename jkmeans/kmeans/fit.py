"""k-means from a key: initialise, run Lloyd, keep the best of several restarts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.collectives import AxisName, vary_like
from jkmeans.kmeans.initialization import INITIALIZATIONS
from jkmeans.kmeans.lloyd import KMeansResult, lloyd


def fit(
    key: jax.Array,
    x: jax.Array,
    n_clusters: int,
    *,
    init: str | jax.Array = "k-means++",
    n_init: int = 1,
    max_iter: int | jax.Array = 300,
    tol: float | jax.Array = 0.0,
    origin: jax.Array | None = None,
    empty: str = "farthest",
    weights: jax.Array | None = None,
    index: jax.Array | None = None,
    algorithm: str = "auto",
    axis_name: AxisName = None,
    block_size: int | None = None,
    precision: str = "full",
) -> KMeansResult:
    """k-means: the run of lowest inertia among ``n_init`` restarts, all in one program.

    Restart r is keyed by ``fold_in(key, r)``; restarts run one after another, so that memory does
    not grow with their number.

    Args:
      key: a JAX random key, the same on all devices.
      x: [n, d], any real dtype; the local rows inside ``shard_map``.
      n_clusters: k.
      init: a name in INITIALIZATIONS, or the first centroids [k, d], which are run once whatever
        ``n_init`` says.
      n_init: restarts, at least 1.
      max_iter: [] int, iterations of a restart at most.
      tol: [] float, an absolute bound on the squared shift of the centroids.
      origin: [d], a point among rows that are far from 0, see ``lloyd``.
      empty: what happens to empty clusters, see ``lloyd``.
      weights: [n] float, at least 0; None for ones.
      index: [n] int32, the global number of each row, see ``sample``.
      algorithm: how nearest centroids are found, see ``lloyd``.
      axis_name: the mesh axis that rows are sharded over, or None.
      block_size: rows assigned at a time; None for what suits the device.
      precision: how scores are computed, see ``lloyd``; first centroids are always drawn in full
        precision.

    Returns:
      KMeansResult of the best restart, the first among equals; differentiable like ``lloyd``'s,
      for ``n_init=1`` also backward.

    Raises:
      ValueError: an unknown ``init``, ``empty`` or ``precision``, rows or centroids of another
        shape than [n, d] and [k, d], ``n_clusters`` or ``n_init`` below 1, or fewer than k rows.
    """

    def run(centroids: jax.Array) -> KMeansResult:
        return lloyd(
            x,
            centroids,
            weights=weights,
            max_iter=max_iter,
            tol=tol,
            origin=origin,
            empty=empty,
            algorithm=algorithm,
            axis_name=axis_name,
            block_size=block_size,
            precision=precision,
        )

    if not isinstance(init, str):
        if init.shape != (n_clusters, x.shape[1]):
            raise ValueError(
                f"init has shape {init.shape}: expected {(n_clusters, x.shape[1])}, "
                "one centroid for each cluster"
            )
        return run(init)
    if init not in INITIALIZATIONS:
        raise ValueError(f"init={init!r}: expected an array or one of {', '.join(INITIALIZATIONS)}")
    if n_init < 1:
        raise ValueError(f"n_init={n_init}: expected at least 1")
    initialize = INITIALIZATIONS[init]

    def restart(r) -> KMeansResult:
        restart_key = jax.random.fold_in(key, r)
        # The first centroids do not enter the derivative, see ``lloyd``.
        rows, row_weights = lax.stop_gradient((x, weights))
        return run(
            initialize(
                restart_key,
                rows,
                n_clusters,
                weights=row_weights,
                index=index,
                axis_name=axis_name,
            )
        )

    return best_of(restart, n_init)


def best_of(restart: Callable[[Any], KMeansResult], n_init: int) -> KMeansResult:
    """The result of lowest inertia of ``restart(r)`` for r = 0 … n_init − 1, the first of equals.

    They run one after another, and are compiled once. A number is better than NaN.
    """
    if n_init == 1:
        return restart(0)

    def keep_better(r, best: KMeansResult) -> KMeansResult:
        result = restart(r)
        # The first one replaces the blank, and a number what is not one.
        better = (r == 0) | (result.inertia < best.inertia)
        better |= jnp.isnan(best.inertia) & ~jnp.isnan(result.inertia)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), result, best)

    blank = jax.tree.map(
        lambda leaf: vary_like(jnp.zeros(leaf.shape, leaf.dtype), leaf),
        jax.eval_shape(restart, 0),
    )
    blank = blank._replace(inertia=blank.inertia + jnp.inf)
    return lax.fori_loop(0, n_init, keep_better, blank)
