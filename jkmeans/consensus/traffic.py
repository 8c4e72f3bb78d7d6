"""Bytes that nodes send: by formula, and as the compiled program says."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from jkmeans.consensus.graphs import Graph

_PERMUTE = re.compile(
    r"= (?P<shape>.+?) collective-permute(?:-start)?\(.*source_target_pairs=\{(?P<pairs>.*?)\}\}"
)
_ARRAY = re.compile(r"(?:f|bf|s|u|c|pred)(?P<bits>\d*)\[(?P<sizes>[\d,]*)\]")


def bytes_per_round(graph: Graph, values: Any) -> int:
    """What all nodes together send in one exchange: 2 E times the bytes of a node's values.

    Args:
      graph: with E edges.
      values: arrays, or their ShapeDtypeStructs, of one node.
    """
    return 2 * graph.n_edges * node_bytes(values)


def all_reduce_bytes(n_nodes: int, values: Any) -> int:
    """What all nodes together send in a ring all-reduce: 2 (N − 1) times the bytes of the values.

    Each of N nodes sends 2 (N − 1) parts of 1/N: the least that an all-reduce can do (Patarasu and
    Yuan, J. Parallel Distrib. Comput. 69 (2009)). It needs a backbone over which anybody can send
    to the next of an order of all.
    """
    return 2 * (n_nodes - 1) * node_bytes(values)


def node_bytes(values: Any) -> int:
    """Bytes of the arrays, or ShapeDtypeStructs, of a tree."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(values))


def measured_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that the ``ppermute``s of a compiled program send, over all pairs of devices.

    Each is counted once, as it stands in the program: of a program whose only permutes are in the
    loop over rounds, these are the bytes of a round.

    Args:
      compiled: a program on a mesh, as ``jax.jit(f).lower(...).compile()`` gives it.
    """
    total = 0
    for line in (compiled.as_text() or "").splitlines():
        if found := _PERMUTE.search(line):
            n_pairs = found["pairs"].count("{")
            arrays = _ARRAY.findall(found["shape"])
            if "collective-permute-start" in line:  # Its result holds operand and result.
                arrays = arrays[: len(arrays) // 2]
            total += n_pairs * sum(_bytes(bits, sizes) for bits, sizes in arrays)
    return total


def _bytes(bits: str, sizes: str) -> int:
    n = int(np.prod([int(size) for size in sizes.split(",") if size], dtype=np.int64))
    return n * max(1, int(bits or 8) // 8)
