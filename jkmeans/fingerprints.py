"""Checksums of arrays, the same on any number of devices and processes.

Those of what is saved are computed on the host, where it comes anyway (Orbax makes a copy of its
own): a program that adds up the bits of all arrays of a network takes a second to compile.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jkmeans import processes

_MULTIPLIER = 2654435761
_BLOCK = 2**18
_WORD = 2**32
_CHUNK_BYTES = 2**20


def fingerprint_of_rows(rows: np.ndarray) -> int:
    """A checksum of the bits of all rows on the host: at least 0 and below 2³².

    Some two gigabytes a second, and no more memory than a chunk.

    Args:
      rows: [n, ...], in memory or mapped. Processes that compute as one call with the same rows,
        and each reads its part.
    """
    step = max(1, _CHUNK_BYTES // max(1, rows[:1].nbytes))
    n_chunks = -(-len(rows) // step)
    first, last = (n_chunks * (processes.number() + end) // processes.count() for end in (0, 1))
    total = 0
    for i in range(first, last):
        chunk = np.ascontiguousarray(rows[i * step : (i + 1) * step])
        total += (2 * _MULTIPLIER * i + 1) * zlib.crc32(chunk.reshape(-1).view(np.uint8).data)
    return sum(processes.gather(total % _WORD)) % _WORD


def fingerprints(arrays: Sequence[Any]) -> list[int]:
    """A checksum of the bits of each array: at least 0 and below 2³².

    Bits are weighted by odd numbers that depend on the position and added modulo 2³², which is
    exact in any order; a changed element changes the sum, and so do nearly all swapped ones.

    Args:
      arrays: JAX arrays, on this process's devices or on those of several, or NumPy arrays. All
        processes call with theirs.
    """
    return added_up(arrays, sums_here(arrays))


def sums_here(arrays: Sequence[Any]) -> list[int]:
    """The sums of `fingerprints` over what this process has of each array."""
    return [_sum_here(array) for array in arrays]


def added_up(arrays: Sequence[Any], sums: Sequence[int]) -> list[int]:
    """The sums of `fingerprints`, of those of all processes; they all call."""
    sums = list(sums)
    split = [i for i, array in enumerate(arrays) if _is_split(array)]
    if split:
        of_all = np.array(processes.gather([sums[i] for i in split]), np.uint64)
        for i, total in zip(split, of_all.sum(axis=0), strict=True):
            sums[i] = int(total) % _WORD
    return sums


def _is_split(array: Any) -> bool:
    """Whether other processes have parts of an array that this one has not."""
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )


def _sum_here(array: Any) -> int:
    """The sum over what this process has of an array."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        parts = [(array, (0,) * array.ndim)]
    elif array.is_fully_replicated:
        parts = [(np.asarray(array.addressable_data(0)), (0,) * array.ndim)]
    else:
        parts = [
            (np.asarray(shard.data), tuple(piece.start or 0 for piece in shard.index))
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]
    return sum(_sum(_words(part), start, array.shape) for part, start in parts) % _WORD


def _words(part: np.ndarray) -> np.ndarray:
    """The bits of a part as unsigned integers; those of eight bytes are two, along a new axis."""
    word = {1: np.uint8, 2: np.uint16}.get(part.itemsize, np.uint32)
    return np.ascontiguousarray(part)[..., None].view(word)


def _sum(words: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """The sum over the words [*part, w] of a part of an array of a shape, where that starts."""
    n_inner = math.prod(shape[1:]) * words.shape[-1]
    if len(shape) > 1 and words.shape[1:-1] != tuple(shape[1:]):
        # Not one run of positions, but one for each index of the first axis.
        return sum(
            _sum(run, start[1:], shape[1:]) + _shifted(run, (start[0] + i) * n_inner)
            for i, run in enumerate(words)
        )
    first = start[0] * n_inner if len(start) else 0
    return _sum_of_run(words.reshape(-1), first)


def _sum_of_run(words: np.ndarray, first: int) -> int:
    """Σ (2 · multiplier · position + 1) · word of words [n] at positions from ``first`` on."""
    weights = 2 * np.arange(min(_BLOCK, len(words)), dtype=np.uint32) * np.uint32(_MULTIPLIER) + 1
    total = 0
    for begin in range(0, len(words), _BLOCK):
        block = words[begin : begin + _BLOCK].astype(np.uint32, copy=False)
        total += int(np.dot(block, weights[: len(block)])) + _shifted(block, first + begin)
    return total


def _shifted(words: np.ndarray, by: int) -> int:
    """By how much the sum of words grows where they stand so many positions further on."""
    return 2 * _MULTIPLIER * by * int(np.sum(words, dtype=np.uint64)) if by else 0
