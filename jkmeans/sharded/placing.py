"""Rows on the devices of a mesh: placed, shared where that is possible, padded, and cut again."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jkmeans import sharding

_ALIGNMENT = 64
"""Bytes at a multiple of which memory must start for a CPU device to share it."""
_COPIED_IN_PARALLEL = 2**24


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


def refuse_few_rows(n_rows: int, n_clusters: int) -> None:
    """Refuses more clusters than rows, in the words of scikit-learn.

    Raises:
      ValueError: there are more.
    """
    if n_rows < n_clusters:
        raise ValueError(f"n_samples={n_rows} should be >= n_clusters={n_clusters}.")


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
    x = sharding.automatic(x) if isinstance(x, jax.Array) else x
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


def unpadded(array: jax.Array, n_rows: int) -> Any:
    """The first rows of an array, on the host where there are others.

    Not a slice on the devices, which would be a program of its own for every number of rows.
    """
    return array if array.shape[0] == n_rows else sharding.to_host(array)[:n_rows]


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

    def read(first: int, last: int) -> Any:
        part = array[first : min(last, n_rows)]
        return _fill(part, last - first, padding) if last > n_rows else part

    return sharding.read_to_devices(read, (n_padded, *array.shape[1:]), mesh)


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
