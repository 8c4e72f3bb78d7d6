"""A whole fit as one program over a mesh, on rows or on rows and centroids that are sharded."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jkmeans import kmeans, sharding
from jkmeans.kmeans.collectives import AxisName, row_numbers
from jkmeans.sharded.placing import Rows, place, precision, refuse_few_rows, unpadded
from jkmeans.sharded.programs import BLOCKS, result_specs, run

RESULT_SPECS = result_specs(kmeans.KMeansResult)
"""How a KMeansResult lies on the mesh."""
CERTIFIED_SPECS = RESULT_SPECS._replace(recomputed=sharding.REPLICATED)
"""How it does where labels come from low precision and the share computed anew is told."""
LARGE_K_SPECS = RESULT_SPECS._replace(centroids=sharding.BY_CENTROID, counts=sharding.BY_CENTROID)
"""How it lies on a mesh with an axis of centroids."""


def fit(
    key: jax.Array,
    x: Any,
    n_clusters: int,
    *,
    mesh: Mesh | None = None,
    weights: Any = None,
    init: Any = "k-means++",
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 0.0,
    relative_tol: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> kmeans.KMeansResult:
    """`kmeans.fit` on the devices of a mesh: the whole fit is one program.

    A second fit of the same shapes, mesh and options compiles nothing; ``max_iter``, ``tol``, the
    key and the values of an array ``init`` may differ.

    Args:
      key: a JAX random key.
      x: [n, d], NumPy or JAX array, see ``place``. float64 is computed in float64, all else in
        float32.
      n_clusters: k, at most n.
      mesh: from ``sharding.make_mesh``; None for the devices that x lies on, or else one.
      weights: [n], at least 0; None for ones.
      init: the name of an initialisation, or the first centroids [k, d].
      n_init: restarts; the one of lowest inertia is returned.
      max_iter: iterations of a restart at most.
      tol: bound on the squared shift of the centroids that ends a restart.
      relative_tol: whether ``tol`` is in units of the mean variance of the columns, as in
        scikit-learn.
      deterministic: whether the result is to have the same bits on 1, 2, 4 and 8 devices. Rows
        are then cut into `BLOCKS` blocks whose sums are added in order, which takes that many times
        the traffic of an all-reduce, and bounds are not used.
      **options: static keyword arguments of ``kmeans.fit``.

    Returns:
      KMeansResult of JAX arrays, labels and distances [n] without padding; those are NumPy where
      there was some.

    Raises:
      ValueError: fewer than k rows, or what ``kmeans.fit`` raises.
    """
    with precision(x):
        rows = place(x, weights, mesh=mesh, multiple_of=BLOCKS if deterministic else 1)
        return fit_rows(
            key,
            rows,
            n_clusters,
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            relative_tol=relative_tol,
            deterministic=deterministic,
            **options,
        )


def fit_rows(
    key: jax.Array,
    rows: Rows,
    n_clusters: int,
    *,
    init: Any = "k-means++",
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 0.0,
    relative_tol: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> kmeans.KMeansResult:
    """`fit` on rows that are placed already; arguments as there.

    ``oversampling_factor`` is an option too, of "k-means||".
    """
    refuse_few_rows(rows.n_rows, n_clusters)
    by_name = isinstance(init, str)
    large_k = rows.mesh is not None and rows.mesh.shape.get(sharding.CENTROID_AXIS, 1) > 1
    if "oversampling_factor" in options and not (by_name and init == "k-means||"):
        raise ValueError("oversampling_factor: accepted with init='k-means||' only")
    if deterministic and large_k:
        raise ValueError("deterministic=True: not accepted where the mesh shards the centroids")
    if deterministic:
        options |= {"in_blocks": True, "algorithm": "lloyd"}
    if large_k:
        _check_large_k(rows.mesh, n_clusters, init, options)
    static = {"init": init if by_name else None, "n_init": n_init if by_name else 1, **options}
    # The core draws candidates by its own factor; with another one restarts are run one by one.
    drawn_here = "oversampling_factor" in options or large_k
    restarts = range(static["n_init"]) if drawn_here else range(1)
    if drawn_here:
        static["n_init"] = 1

    if large_k:
        specs = LARGE_K_SPECS
    elif str(options.get("precision", "full")).startswith("exact"):
        specs = CERTIFIED_SPECS
    else:
        specs = RESULT_SPECS

    def run_once(restart: int) -> kmeans.KMeansResult:
        everywhere = (sharding.REPLICATED,) * 6
        return run(
            _fit_large_k if large_k else _fit,
            rows,
            key,
            None if by_name else init,
            restart,
            max_iter,
            tol,
            rows.n_rows,
            out_specs=specs,
            argument_specs=(everywhere[0], sharding.BY_CENTROID, *everywhere[2:])
            if large_k
            else None,
            n_clusters=n_clusters,
            relative_tol=relative_tol,
            **static,
        )

    with precision(rows.x):
        best = run_once(restarts[0])
        for restart in restarts[1:]:
            result = run_once(restart)
            ours, theirs = float(result.inertia), float(best.inertia)
            best = (
                result if ours < theirs or (math.isnan(theirs) and not math.isnan(ours)) else best
            )
        return cut(best, rows.n_rows)


def cut(result: kmeans.KMeansResult, n_rows: int) -> kmeans.KMeansResult:
    """The result without the padding's labels and distances."""
    return result._replace(
        labels=unpadded(result.labels, n_rows), distances=unpadded(result.distances, n_rows)
    )


def scale_and_origin(
    x: jax.Array, n_rows: jax.Array | int, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """The unit of relative tolerances, and the ``origin`` of `kmeans.lloyd`, by one pass.

    Args:
      x: [n, d], the local rows inside ``shard_map``, with padding at the end.
      n_rows: [] int, the rows that are no padding.
      axis_name: the mesh axis of the rows.

    Returns:
      The mean over columns of their variance, [] float, and [d] float.
    """
    counted = row_numbers(x, axis_name) < n_rows
    mean, variance = kmeans.column_moments(x, counted, axis_name)
    return jnp.mean(variance), kmeans.far_origin(mean, variance)


def scaled_tol(tol: Any, x: jax.Array, n_rows: Any, axis_name: AxisName) -> jax.Array:
    """``tol`` times the mean variance of the columns, which takes no pass where it is 0."""
    return lax.cond(
        tol > 0,
        lambda: tol * kmeans.mean_variance(x, row_numbers(x, axis_name) < n_rows, axis_name),
        lambda: jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32)),
    )


def _tol_and_origin(x, n_rows, tol, relative_tol, axis_name):
    scale, origin = scale_and_origin(x, n_rows, axis_name)
    return (tol * scale if relative_tol else tol), origin


def _fit(
    x,
    weights,
    key,
    centroids,
    restart,
    max_iter,
    tol,
    n_rows,
    *,
    n_clusters,
    init,
    relative_tol,
    axis_name,
    oversampling_factor=None,
    **options,
):
    tol, origin = _tol_and_origin(x, n_rows, tol, relative_tol, axis_name)
    if oversampling_factor is not None:
        centroids = kmeans.kmeans_parallel(
            jax.random.fold_in(key, restart),
            x,
            n_clusters,
            weights=weights,
            oversampling_factor=oversampling_factor,
            axis_name=axis_name,
        )
        init = None
    return kmeans.fit(
        key,
        x,
        n_clusters,
        init=centroids if init is None else init,
        max_iter=max_iter,
        tol=tol,
        origin=origin,
        weights=weights,
        axis_name=axis_name,
        **options,
    )


def _check_large_k(mesh: Any, n_clusters: int, init: Any, options: dict[str, Any]) -> None:
    shards = mesh.shape[sharding.CENTROID_AXIS]
    if n_clusters % shards:
        raise ValueError(
            f"n_clusters={n_clusters}: expected a multiple of the {shards} devices that the mesh "
            "keeps centroids on"
        )
    if isinstance(init, str) and init != "sample":
        raise ValueError(
            f"init={init!r}: expected random rows or an array where the mesh shards the centroids"
        )
    if options:
        raise ValueError(
            f"{', '.join(sorted(options))}: not accepted where the mesh shards the centroids"
        )


def _fit_large_k(
    x,
    weights,
    key,
    centroids,
    restart,
    max_iter,
    tol,
    n_rows,
    *,
    n_clusters,
    init,
    relative_tol,
    axis_name,
    n_init,
):
    del n_init
    tol, origin = _tol_and_origin(x, n_rows, tol, relative_tol, axis_name)
    if init is not None:
        centroids = kmeans.sample(
            jax.random.fold_in(key, restart),
            x,
            n_clusters,
            weights=weights,
            axis_name=axis_name,
            centroid_axis=sharding.CENTROID_AXIS,
        )
    return kmeans.lloyd(
        x,
        centroids,
        weights=weights,
        max_iter=max_iter,
        tol=tol,
        origin=origin,
        axis_name=axis_name,
        centroid_axis=sharding.CENTROID_AXIS,
        algorithm="lloyd",
    )
