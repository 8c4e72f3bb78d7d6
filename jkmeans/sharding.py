"""Where data lives: the mesh, the layout of examples over it, padding and masks.

This is the only module that names the mesh axis. Everything else either takes ``axis_name`` (the
core, the methods) or asks this module to wrap a function (`data_parallel`) or to place an array
(`place_rows`).

The layout is what makes one device and eight compute the same thing. The examples are cut into
``n_shards`` contiguous shards whose number does not depend on the devices; every batch takes the
same number of rows from every shard, and rows are shuffled within their shard. A device holds
whole shards, so a batch contains the same examples on any number of devices up to ``n_shards``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jkmeans.errors import UserError
from jkmeans.kmeans.collectives import varying_axes

DATA_AXIS = "data"
CENTROID_AXIS = "centroids"
SHARDED = PartitionSpec(DATA_AXIS)
REPLICATED = PartitionSpec()
BY_CENTROID = PartitionSpec(CENTROID_AXIS)
BY_STEP = PartitionSpec(None, DATA_AXIS)
"""Steps first, then the rows of each step: sharded along the second."""


def automatic(x: jax.Array) -> jax.Array:
    """The same array, without a copy, on a mesh whose axes JAX assigns by itself.

    ``jax.make_mesh`` makes Explicit axes, on which an operation with two ways to lay its result out
    is an error; those of this project's programs are not meant.
    """
    there = x.sharding
    if not isinstance(there, NamedSharding):
        return x
    mesh = there.mesh
    if not isinstance(mesh, Mesh) or all(kind == AxisType.Auto for kind in mesh.axis_types):
        return x
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    parts = [shard.data for shard in x.addressable_shards]
    layout = NamedSharding(auto, there.spec, memory_kind=there.memory_kind)
    return jax.make_array_from_single_device_arrays(x.shape, layout, parts)


def make_mesh(n_devices: int = 0, n_centroid_shards: int = 1) -> Mesh:
    """Devices over which examples are sharded, along one axis.

    Args:
      n_devices: how many of the devices that JAX sees; 0 takes all of them.
      n_centroid_shards: above 1, a second axis: k-means then keeps that part of the centroids on
        each device, for more clusters than one can hold.

    Raises:
      UserError: more devices were asked for than exist, or fewer than none, or the shards do not
        divide them.
    """
    available = jax.devices()
    if n_devices < 0:
        raise UserError(f"n_devices is {n_devices}; accepted: 0 (all of them) to {len(available)}")
    if n_devices > len(available):
        platform = available[0].platform
        hint = (
            "; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{n_devices} makes that many"
            if platform == "cpu"
            else ""
        )
        raise UserError(
            f"n_devices is {n_devices}, but JAX sees {len(available)} ({platform}); "
            f"accepted: 0 (all of them) to {len(available)}{hint}"
        )
    if 0 < n_devices < len(available) and jax.process_count() > 1:
        raise UserError(
            f"n_devices is {n_devices}, but {jax.process_count()} processes have "
            f"{len(available)}; accepted: 0 (all of them), and fewer processes for fewer devices"
        )
    devices = np.array(available[: n_devices or len(available)])
    if n_centroid_shards == 1:
        return Mesh(devices, (DATA_AXIS,), axis_types=(AxisType.Auto,))
    if n_centroid_shards < 1 or len(devices) % n_centroid_shards:
        raise UserError(
            f"n_centroid_shards is {n_centroid_shards}; accepted: a divisor of the "
            f"{len(devices)} devices"
        )
    grid = devices.reshape(-1, n_centroid_shards)
    return Mesh(grid, (DATA_AXIS, CENTROID_AXIS), axis_types=(AxisType.Auto,) * 2)


def data_parallel(
    function: Callable, mesh: Mesh, in_specs, out_specs, *, check: bool = True
) -> Callable:
    """``jax.shard_map`` over the mesh.

    Args:
      function: of local arrays.
      mesh: the devices.
      in_specs: PartitionSpecs of the arguments.
      out_specs: of the result.
      check: whether JAX proves that what is declared replicated is so (``check_vma``). It does not
        on a mesh of one device, where `all_sum` is free then; mistakes show on two.
    """
    check = check and mesh.size > 1
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How ``n_examples`` rows lie on ``n_devices`` devices in batches of about ``batch_size``.

    Shard v holds ``rows_per_shard`` rows: its examples first, padding after. ``n_shards`` and the
    batches do not depend on the number of devices; where that does not divide ``n_shards``, the
    last devices hold shards of padding only.

    Attributes:
      n_examples: N, the rows that count.
      batch_size: B, the wanted number of examples of a step; it is rounded down to a multiple of
        ``n_shards`` (but to one row of each shard at least), then spread evenly over the steps.
      n_shards: V, the most devices that get different work.
      n_devices: devices of the mesh.
    """

    n_examples: int
    batch_size: int
    n_shards: int
    n_devices: int

    @property
    def n_steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self._largest_shard / max(1, self.batch_size // self.n_shards))

    @property
    def rows_per_step(self) -> int:
        """Rows that one shard gives to one step."""
        return math.ceil(self._largest_shard / self.n_steps)

    @property
    def rows_per_shard(self) -> int:
        """Rows of a shard, padding included."""
        return self.n_steps * self.rows_per_step

    @property
    def shards_per_device(self) -> int:
        """Shards that a device holds, shards of padding included."""
        return math.ceil(self.n_shards / self.n_devices)

    @property
    def n_rows(self) -> int:
        """Rows of the global arrays, padding included."""
        return self.n_devices * self.shards_per_device * self.rows_per_shard

    @property
    def effective_batch_size(self) -> int:
        """Rows of a step over all shards, padding included."""
        return self.rows_per_step * self.n_shards

    @property
    def _largest_shard(self) -> int:
        return math.ceil(self.n_examples / self.n_shards)

    def shard_bounds(self, shard: int) -> tuple[int, int]:
        """First and one-past-last example of a shard; empty for a shard of padding."""
        if shard >= self.n_shards:
            return self.n_examples, self.n_examples
        return (
            shard * self.n_examples // self.n_shards,
            (shard + 1) * self.n_examples // self.n_shards,
        )

    def row_index(self) -> np.ndarray:
        """The example of each row: [n_rows] int32, −1 for padding."""
        rows = np.full(self.n_rows, -1, np.int32)
        for shard in range(self.n_shards):
            first, last = self.shard_bounds(shard)
            start = shard * self.rows_per_shard
            rows[start : start + last - first] = np.arange(first, last)
        return rows

    def read(self, examples: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the padded array, of which padding rows are example 0.

        An example and not zeros, which a network that divides by a norm would turn into NaN.

        Args:
          examples: [n, *example_shape]; only the rows asked for are read, so it may be a memory
            map.
          start: first padded row; a multiple of rows_per_shard.
          stop: one past the last padded row; a multiple of rows_per_shard.
        """
        rows = np.empty((stop - start, *examples.shape[1:]), device_dtype(examples.dtype))
        rows[:] = examples[0]
        for shard in range(start // self.rows_per_shard, stop // self.rows_per_shard):
            first, last = self.shard_bounds(shard)
            offset = shard * self.rows_per_shard - start
            rows[offset : offset + last - first] = examples[first:last]
        return rows


def device_dtype(dtype: np.dtype) -> np.dtype:
    """The type that examples have on the devices: small types stay, others become float32."""
    if dtype == np.bool_:
        return np.dtype(np.uint8)
    small = dtype.itemsize <= 2 or dtype == np.float32
    return np.dtype(dtype) if small else np.dtype(np.float32)


def clustered_dtype(dtype: np.dtype) -> np.dtype:
    """The type that rows have which k-means clusters as they are.

    That of `device_dtype`, but float64 where float32 would not tell all values apart: for float64
    and for integers of more than two bytes.
    """
    dtype = np.dtype(dtype)
    wide = dtype == np.float64 or (dtype.kind in "iu" and dtype.itemsize > 2)
    return np.dtype(np.float64) if wide else device_dtype(dtype)


def place_rows(
    examples: np.ndarray, layout: Layout, mesh: Mesh, spec: PartitionSpec = SHARDED
) -> jax.Array:
    """Puts examples on the devices: [n_rows, *example_shape], sharded, or as ``spec`` says.

    Each process reads the rows of its own devices only.
    """

    def read(first: int, last: int) -> np.ndarray:
        return layout.read(examples, first, last)

    return read_to_devices(read, (layout.n_rows, *examples.shape[1:]), mesh, spec)


def read_to_devices(
    read: Callable[[int, int], Any],
    shape: tuple[int, ...],
    mesh: Mesh,
    spec: PartitionSpec = SHARDED,
) -> jax.Array:
    """Rows on the devices of a mesh, each of which is given those that it shall have.

    Args:
      read: (first, last) -> rows first … last - 1, [last - first, ...]; asked for the rows of this
        process's devices only.
      shape: of all of them; rows are a multiple of the number of devices.
      mesh: the devices.
      spec: how rows lie on them.
    """

    def of_device(index: Any) -> Any:
        first, last, _ = index[0].indices(shape[0])
        return read(first, last)

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), of_device)


def place(array: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Puts an array that every process holds whole on the devices of the mesh."""
    array = np.asarray(array)
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def relayout(
    rows: jax.Array | np.ndarray, layout: Layout, mesh: Mesh, spec: PartitionSpec = SHARDED
) -> jax.Array:
    """Moves rows that were laid out for another number of devices onto this mesh.

    Args:
      rows: [rows, …] in the layout of the same examples, batch size and shards; only the shards
        of padding at the end may differ.
      layout: on this mesh.
      mesh: of the data axis.
      spec: how they lie on it.
    """
    wanted = layout.n_rows
    # Of embeddings and labels, never of examples: small enough to pass through every process.
    rows = (to_host(rows) if isinstance(rows, jax.Array) else rows)[:wanted]
    if len(rows) < wanted:
        padding = np.zeros((wanted - len(rows), *rows.shape[1:]), rows.dtype)
        rows = np.concatenate([rows, padding])
    return place(rows, mesh, spec)


def gather_examples(rows: jax.Array, layout: Layout) -> np.ndarray:
    """The rows of a sharded array in the order of the examples, on the host: [n_examples, …]."""
    return to_host(rows)[layout.row_index() >= 0]


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array, sharded by them, that lie on this process's devices, in their order."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array as NumPy, on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def to_varying(tree, axis_name: str | None):
    """Marks replicated values as device-varying, so that gradients of them stay local.

    A gradient with respect to a replicated value is summed over devices by JAX, one all-reduce a
    leaf; with respect to a varying one it is left to the caller, who sums everything at once.
    """
    if axis_name is None:
        return tree

    def cast(leaf: jax.Array) -> jax.Array:
        if axis_name in varying_axes(leaf):
            return leaf
        return jax.lax.pcast(leaf, axis_name, to="varying")

    return jax.tree.map(cast, tree)
