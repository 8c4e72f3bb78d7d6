"""k-means on the devices of a mesh: rows are placed and padded, then one program does the rest.

The core (`jkmeans.kmeans`) does not know the mesh, and `jkmeans.sharding` knows no algorithm; this
module joins them. `place` brings rows to the devices, `run` compiles a function of the core once
for each mesh and choice of options, and `fit`, `assign`, `nearest`, `inertia` and `distances` are
what the estimators call. Rows that the mesh does not divide are filled up with rows of weight zero,
which never count; results are cut to the rows that came in.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jkmeans import kmeans, sharding
from jkmeans.kmeans.collectives import AxisName, Blocks, row_numbers


def result_specs(kind: type, by_row: tuple[str, ...] = ("labels", "distances")) -> Any:
    """Where the fields of a NamedTuple of results lie: those named by row, others everywhere.

    Fields that have a default are not always there, and are left out.
    """
    fields = getattr(kind, "_fields")  # noqa: B009, which no type checker knows
    optional = getattr(kind, "_field_defaults")  # noqa: B009
    return kind(
        *(
            sharding.SHARDED if field in by_row else sharding.REPLICATED
            for field in fields
            if field not in optional
        )
    )


RESULT_SPECS = result_specs(kmeans.KMeansResult)
"""How a KMeansResult lies on the mesh."""
CERTIFIED_SPECS = RESULT_SPECS._replace(recomputed=sharding.REPLICATED)
"""How it does where labels come from low precision and the share computed anew is told."""
LARGE_K_SPECS = RESULT_SPECS._replace(centroids=sharding.BY_CENTROID, counts=sharding.BY_CENTROID)
"""How it lies on a mesh with an axis of centroids."""
_ALIGNMENT = 64
"""Bytes at a multiple of which memory must start for a CPU device to share it."""
_COPIED_IN_PARALLEL = 2**24
BLOCKS = 16
"""Blocks that rows are cut into for results of the same bits on 1, 2, 4 and 8 devices."""


class Rows(NamedTuple):
    """Rows on the devices, padding last.

    Attributes:
      x: [n_padded, d].
      weights: [n_padded] float, 0 for padding; None where all rows count once.
      n_rows: n, the rows that came in.
      mesh: what they are sharded over; None for one device.
    """

    x: jax.Array
    weights: jax.Array | None
    n_rows: int
    mesh: Mesh | None


def precision(*arrays: Any) -> contextlib.AbstractContextManager:
    """A context in which JAX computes in float64 if one of the arrays is float64.

    Programs are cached apart for each setting, so entering it twice compiles once.
    """
    if any(getattr(array, "dtype", None) == np.float64 for array in arrays):
        return jax.enable_x64(True)
    return contextlib.nullcontext()


def mesh_of(x: Any) -> Mesh | None:
    """The mesh that a sharded array's rows already lie on, in the order of the rows.

    Args:
      x: [n, ...] anything.

    Returns:
      A mesh of the data axis over all devices of x; None for NumPy and for one device.
    """
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
        return None
    indices = x.sharding.devices_indices_map(x.shape)
    devices = sorted(indices, key=lambda device: (indices[device][0].start or 0, device.id))
    return Mesh(np.array(devices), (sharding.DATA_AXIS,), axis_types=(AxisType.Auto,))


def place(
    x: Any,
    weights: Any = None,
    *,
    mesh: Mesh | None = None,
    at_least: int = 0,
    multiple_of: int = 1,
) -> Rows:
    """Brings rows to the devices, padded to a multiple of their number.

    NumPy memory that is aligned to 64 bytes and C-contiguous (a memory map of a .npy file is) is
    shared with a CPU device rather than copied; only the last device's rows are copied, for the
    padding. Sharded arrays move from device to device, or not at all.

    Args:
      x: [n, d] NumPy or JAX array, real; float64 stays so inside ``precision`` only, integers of
        more than two bytes become float32. With several processes, either a global array or the
        whole of the same NumPy array on each of them.
      weights: [n], at least 0; None for ones.
      mesh: with the data axis; None takes the mesh that x lies on already, or else one device.
      at_least: rows to pad to, so that inputs of several sizes share a program.
      multiple_of: what the number of rows is padded to a multiple of, besides the devices.

    Returns:
      Rows.

    Raises:
      ValueError: the mesh has no data axis, or x has no rows.
    """
    mesh = mesh_of(x) if mesh is None else mesh
    if not isinstance(x, jax.Array) and x.dtype != np.float64:
        x = x.astype(sharding.device_dtype(x.dtype), copy=False)
    n_rows = x.shape[0]
    if n_rows == 0:
        raise ValueError(f"x has shape {x.shape}: expected at least one row")
    if weights is not None:
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        weights = weights.astype(dtype, copy=False)
    if mesh is not None and sharding.DATA_AXIS not in mesh.shape:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}: expected one called "
            f"{sharding.DATA_AXIS!r}, as jkmeans.sharding.make_mesh gives"
        )
    n_devices = 1 if mesh is None else mesh.shape[sharding.DATA_AXIS]
    multiple = math.lcm(n_devices, multiple_of)
    n_padded = -(-max(n_rows, at_least) // multiple) * multiple
    if weights is None and n_padded > n_rows:
        weights = np.ones(n_rows, np.float64 if x.dtype == np.float64 else np.float32)
    if mesh is None:
        if weights is not None and n_padded > n_rows:
            x = _fill(x, n_padded, x[:1])
            weights = _fill(weights, n_padded, np.zeros(1, weights.dtype))
        # Weights follow rows that are committed to a device of their own.
        home = x.sharding if isinstance(x, jax.Array) else None
        x = _aligned(x)
        weights = None if weights is None else jax.device_put(weights, home)
        return Rows(jax.device_put(x), weights, n_rows, None)
    # Padding is a copy of row 0, of the size of the data; its weight is 0.
    x = _place(x, n_padded, mesh, x[:1])
    if weights is not None:
        weights = _place(weights, n_padded, mesh, np.zeros(1, weights.dtype))
    return Rows(x, weights, n_rows, mesh)


def run(
    function: Callable,
    rows: Rows,
    *arguments: Any,
    out_specs: Any,
    argument_specs: tuple | None = None,
    **options: Any,
) -> Any:
    """Runs a function of the core on placed rows, as one program.

    Args:
      function: ``function(x, weights, *arguments, axis_name=…, **options)``, defined at module
        level: programs are cached by it, the mesh and the options.
      rows: from ``place``.
      *arguments: pytrees of arrays and numbers, traced, the same on all devices.
      out_specs: PartitionSpecs of the result; a hashable pytree.
      argument_specs: PartitionSpecs of the arguments; None where all devices have all of them.
      **options: static and hashable. With ``in_blocks=True`` the function runs on `BLOCKS` blocks
        of the rows as if each were on a device of its own, so that the result has the same bits on
        any number of devices.

    Returns:
      What the function returns, waited for.
    """
    program = _program(function, rows.mesh, out_specs, argument_specs, _sorted(options))
    home = rows.x.sharding if rows.mesh is None else NamedSharding(rows.mesh, sharding.REPLICATED)

    def bring(argument):
        moves = isinstance(argument, jax.Array) and argument.sharding.device_set != home.device_set
        if not moves:
            return argument
        if home.is_fully_addressable:
            return jax.device_put(argument, home)
        # Several processes, each of which holds the same value.
        assert rows.mesh is not None
        if not jnp.issubdtype(argument.dtype, jax.dtypes.prng_key):
            return sharding.place(np.asarray(argument), rows.mesh, sharding.REPLICATED)
        words = np.asarray(jax.random.key_data(argument))
        words = sharding.place(words, rows.mesh, sharding.REPLICATED)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(argument))

    arguments = jax.tree.map(bring, arguments)
    # Waited for: see "Collectives on several CPU devices can hang" in docs/architecture.md; and
    # NumPy memory that is shared may be written to once we return.
    return jax.block_until_ready(program(rows.x, rows.weights, *arguments))


def unpadded(array: jax.Array, n_rows: int) -> Any:
    """The first rows of an array, on the host where there are others.

    Not a slice on the devices, which would be a program of its own for every number of rows.
    """
    return array if array.shape[0] == n_rows else sharding.to_host(array)[:n_rows]


def cut(result: kmeans.KMeansResult, n_rows: int) -> kmeans.KMeansResult:
    """The result without the padding's labels and distances."""
    return result._replace(
        labels=unpadded(result.labels, n_rows), distances=unpadded(result.distances, n_rows)
    )


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
    if n_clusters > rows.n_rows:
        raise ValueError(f"n_samples={rows.n_rows} should be >= n_clusters={n_clusters}.")
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


def _sorted(options: dict[str, Any]) -> tuple:
    return tuple(sorted(options.items()))


@functools.lru_cache(maxsize=512)
def _program(
    function: Callable, mesh: Mesh | None, out_specs: Any, argument_specs: Any, options: tuple
) -> Callable:
    """The compiled function; jit itself caches by shapes and dtypes."""
    static = dict(options)
    in_blocks = static.pop("in_blocks", False)
    function = functools.partial(function, **static)
    if in_blocks:
        function = _in_blocks(function, out_specs)
    if mesh is None:
        return jax.jit(functools.partial(function, axis_name=None))
    local = functools.partial(function, axis_name=sharding.DATA_AXIS)

    def over_mesh(x, weights, *arguments):
        specs = argument_specs or (sharding.REPLICATED,) * len(arguments)
        specs = (sharding.SHARDED, sharding.SHARDED, *specs)
        # JAX 0.10 cannot type collectives over a `vmap` axis inside loops; tests compare the bits.
        parallel = sharding.data_parallel(local, mesh, specs, out_specs, check=not in_blocks)
        return parallel(x, weights, *arguments)

    return jax.jit(over_mesh)


def _in_blocks(function: Callable, out_specs: Any) -> Callable:
    """A function of the core that runs on blocks of rows as if each were on its own device."""

    def run_blocks(x, weights, *arguments, axis_name):
        n_devices = 1 if axis_name is None else lax.axis_size(axis_name)
        # With a single block on a device the compiler would take its loop apart.
        if (BLOCKS // 2) % n_devices:
            raise ValueError(
                f"{n_devices} devices: deterministic=True expects a divisor of {BLOCKS // 2}"
            )
        if x.shape[0] % (BLOCKS // n_devices):
            raise ValueError(f"{x.shape[0]} rows cannot be cut into equal blocks")

        def cut_rows(rows):
            return rows.reshape(BLOCKS // n_devices, -1, *rows.shape[1:])

        in_axes = (0, None if weights is None else 0, *(None for _ in arguments))
        of_block = functools.partial(function, axis_name=Blocks("block", axis_name))
        result = jax.vmap(of_block, in_axes=in_axes, axis_name="block")(
            cut_rows(x), None if weights is None else cut_rows(weights), *arguments
        )

        def join(spec, leaf):
            return leaf.reshape(-1, *leaf.shape[2:]) if spec == sharding.SHARDED else leaf[0]

        is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
        return jax.tree.map(join, out_specs, result, is_leaf=is_spec)

    return run_blocks


def _place(array: Any, n_padded: int, mesh: Mesh, padding: Any) -> jax.Array:
    """[n_padded, ...] sharded over the mesh; ``padding`` is the row to fill up with, [1, ...]."""
    layout = NamedSharding(mesh, sharding.SHARDED)
    n_rows = array.shape[0]
    if n_rows == n_padded and isinstance(array, jax.Array):
        return jax.device_put(array, layout)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        # No process has all rows to read from.
        fill = jax.jit(_fill, static_argnums=1, out_shardings=layout)
        return fill(array, n_padded, padding)

    def read(index: Any) -> Any:
        start, stop, _ = index[0].indices(n_padded)
        part = array[start : min(stop, n_rows)]
        return _fill(part, stop - start, padding) if stop > n_rows else part

    return jax.make_array_from_callback((n_padded, *array.shape[1:]), layout, read)


def _aligned(x: Any) -> Any:
    """NumPy memory that a CPU device can share: as it is, or a copy made faster than JAX would.

    NumPy asks for huge pages, and several threads take their faults.
    """
    shares = isinstance(x, np.ndarray) and x.flags.c_contiguous
    large = shares and x.nbytes >= _COPIED_IN_PARALLEL
    if not large or x.ctypes.data % _ALIGNMENT == 0 or jax.default_backend() != "cpu":
        return x
    room = np.empty(x.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    n_threads = min(8, os.cpu_count() or 1)
    bounds = [len(x) * i // n_threads for i in range(n_threads + 1)]
    with ThreadPoolExecutor(n_threads) as pool:
        parts = [slice(*part) for part in itertools.pairwise(bounds)]
        list(pool.map(lambda part: np.copyto(copy[part], x[part]), parts))
    return copy


def _fill(array: Any, n_padded: int, padding: Any) -> Any:
    """Rows of an array followed by copies of the padding."""
    concatenate = jnp.concatenate if isinstance(array, jax.Array) else np.concatenate
    return concatenate([array, padding.repeat(n_padded - array.shape[0], axis=0)])


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
    scale, origin = scale_and_origin(x, n_rows, axis_name)
    if relative_tol:
        tol = tol * scale
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
    scale, origin = scale_and_origin(x, n_rows, axis_name)
    if relative_tol:
        tol = tol * scale
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
    centroids = jnp.asarray(centroids, jnp.float64)
    norms = jnp.sum(centroids**2, axis=1)

    def of_row(row):
        row = row.astype(jnp.float64)
        products = jnp.matmul(centroids, row, precision=lax.Precision.HIGHEST)
        return jnp.sqrt(jnp.maximum(jnp.sum(row**2) - 2 * products + norms, 0)).astype(dtype)

    return lax.map(of_row, x, batch_size=min(1024, x.shape[0]))
