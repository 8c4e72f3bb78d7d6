"""Examples that stay on the host and flow to the devices in chunks, while these compute."""

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jkmeans.sharding import BY_STEP, Layout, device_dtype


class HostFeeder:
    """Feeds chunks of steps to the devices, one chunk ahead.

    Args:
      examples: [n, *example_shape]; may be a memory map.
      layout: how rows lie on the mesh.
      mesh: of the data axis.
      chunk_bytes: about how large a chunk may be, over all devices.
    """

    def __init__(self, examples: np.ndarray, layout: Layout, mesh: Mesh, chunk_bytes: int):
        self._examples = examples
        self._layout = layout
        self._sharding = NamedSharding(mesh, BY_STEP)
        self._dtype = device_dtype(examples.dtype)
        rows_per_step = layout.n_rows // layout.n_steps
        row_bytes = int(np.prod(examples.shape[1:])) * self._dtype.itemsize
        self._n_steps = max(1, min(layout.n_steps, chunk_bytes // (rows_per_step * row_bytes)))
        self._example_of_row = np.maximum(layout.row_index(), 0)

    def chunks(self, order: np.ndarray, first_step: int = 0) -> Iterator[tuple]:
        """Yields ``(order [c, r], examples [c, r, *example_shape])`` on the devices.

        Args:
          order: [n_steps, r] int32, rows of each step, counted from the first row of the device
            that has the column.
          first_step: steps before it are left out.

        Padding rows get some example's values; their weight is zero.
        """
        starts = range(first_step, self._layout.n_steps, self._n_steps)
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
            ahead: concurrent.futures.Future | None = None
            for start in starts:
                current = ahead or reader.submit(self._read, order[start : start + self._n_steps])
                following = start + self._n_steps
                ahead = None
                if following < self._layout.n_steps:
                    ahead = reader.submit(self._read, order[following : following + self._n_steps])
                yield current.result()

    def in_row_order(self) -> np.ndarray:
        """An order that visits the rows of each device one after the other."""
        layout = self._layout
        rows_per_device = layout.n_rows // layout.n_devices
        local = np.arange(rows_per_device, dtype=np.int32).reshape(layout.n_steps, -1)
        return np.tile(local, (1, layout.n_devices))

    def _read(self, order: np.ndarray) -> tuple[jax.Array, jax.Array]:
        layout = self._layout
        rows_per_device = layout.n_rows // layout.n_devices
        columns = order.shape[1] // layout.n_devices
        first_row = np.repeat(np.arange(layout.n_devices) * rows_per_device, columns)

        def read(index: Any) -> np.ndarray:
            rows = order[:, index[1]] + first_row[index[1]][None, :]
            wanted = self._example_of_row[rows].reshape(-1)
            # In the order of the file, which is what a disk is fast at.
            ascending = np.argsort(wanted, kind="stable")
            values = np.empty((wanted.size, *self._examples.shape[1:]), self._dtype)
            values[ascending] = self._examples[wanted[ascending]]
            return values.reshape(*rows.shape, *self._examples.shape[1:])

        shape = (*order.shape, *self._examples.shape[1:])
        examples = jax.make_array_from_callback(shape, self._sharding, read)
        rows = jax.make_array_from_callback(order.shape, self._sharding, lambda index: order[index])
        return rows, examples
