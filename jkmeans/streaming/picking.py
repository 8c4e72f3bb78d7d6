"""The rows of highest priority: picked chunk by chunk, on each process, and of all processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jkmeans import processes


class Picked(NamedTuple):
    """Rows picked in a pass, highest priority first; among equals, in the order of the source.

    Attributes:
      priority: [m] float32.
      index: [m] int64, global row numbers.
      labels: [m] int32.
      weights: [m] float64.
      rows: [m, d], of the type that rows have on the devices.
    """

    priority: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


def nothing(n_features: int, dtype: Any) -> Picked:
    """No rows, of so many features."""
    return Picked(
        np.zeros(0, np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, np.int32),
        np.zeros(0),
        np.zeros((0, n_features), dtype),
    )


def best(columns: list[np.ndarray], n_picked: int) -> Picked:
    """So many of highest priority, of rows that are given as the fields of `Picked`."""
    order = np.lexsort((columns[1], -columns[0]))[:n_picked]
    return Picked(*(array[order] for array in columns))


def of_all(picked: Picked, n_picked: int) -> Picked:
    """The rows that all processes together have picked, on each of them."""
    if processes.count() == 1 or not n_picked:
        return picked
    from jax.experimental import multihost_utils

    # One shape for all: what is lacking has a priority below that of any row.
    n_missing = n_picked - len(picked.priority)
    filled = [
        np.concatenate([array, np.zeros((n_missing, *array.shape[1:]), array.dtype)])
        for array in picked
    ]
    there = np.arange(n_picked) < len(picked.priority)
    # As bytes: float64 and int64 would come back with 32 bits where JAX has no 64 enabled.
    gathered = [
        np.asarray(multihost_utils.process_allgather(array.view(np.uint8).reshape(n_picked, -1)))
        for array in map(np.ascontiguousarray, [*filled, there])
    ]
    columns = [
        np.ascontiguousarray(got.reshape(-1, got.shape[-1]))
        .view(array.dtype)
        .reshape(-1, *array.shape[1:])
        for got, array in zip(gathered, [*filled, there], strict=True)
    ]
    real = columns.pop()
    return best([column[real] for column in columns], n_picked)
