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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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


class Block(NamedTuple):
    """What the devices compute at a time.

    Attributes:
      read: (first, last) -> rows first … last - 1 of the block, [last - first, *example_shape];
        zeros where there is no example any more.
      n_rows: of the block, zeros included: as many for each device.
      n_examples: of the block, from its start.
    """

    read: Callable[[int, int], np.ndarray]
    n_rows: int
    n_examples: int


def blocks(examples: np.ndarray, n_devices: int, dtype: np.dtype | None = None) -> Iterator[Block]:
    """Cuts rows into one block of `block_rows` for each device, and the next, and so on.

    Args:
      examples: [n, *example_shape]: a file, or a part of it that begins where a block begins and
        ends where a block or the file ends.
      n_devices: that share what is yielded.
      dtype: of what is read; None for the type that such examples have on devices.

    Yields:
      Block. The last one, for the rest of the file, has a smaller power of two of rows for each
      device.
    """
    size = block_rows(examples.shape[1:])
    dtype = device_dtype(examples.dtype) if dtype is None else dtype
    whole = len(examples) - len(examples) % size
    for start in range(0, whole, n_devices * size):
        stop = min(start + n_devices * size, whole)
        yield _block(examples[start:stop], n_devices * size, dtype)
    if whole < len(examples):
        # The first device has all of the rest, the others zeros.
        rest = len(examples) - whole
        smallest = max(FEWEST_ROWS, 1 << (rest - 1).bit_length())
        yield _block(examples[whole:], n_devices * smallest, dtype)


def _block(examples: np.ndarray, n_rows: int, dtype: np.dtype) -> Block:
    def read(first: int, last: int) -> np.ndarray:
        rows = np.zeros((last - first, *examples.shape[1:]), dtype)
        found = examples[first:last]
        rows[: len(found)] = found
        return rows

    return Block(read, n_rows, len(examples))
