"""Rows in blocks of fixed shapes: what is computed of a row does not depend on who computes it.

A file is cut into blocks of `block_rows` rows, from its first row on; the rest at its end is padded
to a power of two. A device computes a block at a time. So a row always lies at the same place in a
block of the same shape with the same neighbours, whichever process or device computes it, and
however many others there are: its results have the same bits wherever the same program on the same
kind of device gives the same bits for the same input, as on a CPU. It also means that few
programs are compiled for files of all lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jkmeans.sharding import device_dtype

MOST_ROWS = 1024
MOST_BYTES = 2**26
# The rest of a file is padded to a power of two, from this on.
FEWEST_ROWS = 8


def block_rows(example_shape: Sequence[int]) -> int:
    """Rows of a block: a power of two that depends on the shape of an example alone."""
    row_bytes = 4 * math.prod(example_shape)
    most = max(FEWEST_ROWS, min(MOST_ROWS, MOST_BYTES // row_bytes))
    return 1 << (most.bit_length() - 1)


def blocks(
    examples: np.ndarray, n_devices: int, dtype: np.dtype | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts rows into one block for each device, and the next, and so on.

    Args:
      examples: [n, *example_shape]: a file, or a part of it that begins where a block begins and
        ends where a block or the file ends.
      n_devices: that share what is yielded, along its first axis.
      dtype: of what is yielded; None for the type that such examples have on devices.

    Yields:
      [n_devices · b, *example_shape], padded with zeros at the end; and how many of them, from the
      start, are examples. b is `block_rows`, and for the rest of the file a smaller power of two.
    """
    size = block_rows(examples.shape[1:])
    dtype = device_dtype(examples.dtype) if dtype is None else dtype
    whole = len(examples) - len(examples) % size
    for start in range(0, whole, n_devices * size):
        stop = min(start + n_devices * size, whole)
        yield _padded(examples[start:stop], n_devices * size, dtype)
    if whole < len(examples):
        # The first device has all of the rest, the others zeros.
        rest = len(examples) - whole
        smallest = max(FEWEST_ROWS, 1 << (rest - 1).bit_length())
        yield _padded(examples[whole:], n_devices * smallest, dtype)


def _padded(examples: np.ndarray, n_rows: int, dtype: np.dtype) -> tuple[np.ndarray, int]:
    chunk = np.zeros((n_rows, *examples.shape[1:]), dtype)
    chunk[: len(examples)] = examples
    return chunk, len(examples)
