"""What a node sees of the others: values of its neighbours, once a round, and nothing else.

Algorithms are written for the nodes of one device, all or one of them, which are the first axis of
their arrays ([m, ...]), and talk by `exchange` only. (`mean_of_all` is no neighbour's business: it
is what an all-reduce would do, for comparison and for curves.)
There are two kinds of links, with which the same program gives the same results:

* `LocalLinks`: all nodes are here, m = N, thousands of them on one device. Messages go from row to
  row of an array, edge by edge, never through an N×N matrix.
* `MeshLinks`: a node a device, m = 1, inside ``shard_map``. Messages are ``ppermute``s, one for
  each colour of the directed edges, as many as the largest degree.

Both add up what a node receives colour by colour, so in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jkmeans.consensus.graphs import Graph
from jkmeans.errors import UserError
from jkmeans.kmeans.collectives import vary_like
from jkmeans.sharding import DATA_AXIS, REPLICATED, SHARDED, data_parallel

Tree = Any
"""A pytree of arrays."""

Arrive = Callable[[Tree, Tree, jax.Array, Tree], tuple[Tree, Tree]]
"""What happens where messages arrive: (here, there, number, slot) -> (what is added up, slot).

``here`` [b, ...] are the values of the receivers, ``there`` [b, ...] those of the senders,
``number`` [b] int32 the directed edges (see `Graph`), ``slot`` [b, ...] what is remembered of them.
"""


class LocalLinks:
    """All nodes on this device: m = N.

    Attributes:
      graph: of the nodes.
      n_nodes: N.
    """

    def __init__(self, graph: Graph):
        self.graph, self.n_nodes = graph, graph.n_nodes
        senders, receivers = graph.directed
        width = max(map(len, graph.colours))
        # Padding: edge −1, from node 0 to nodes that are not there, all different.
        self._numbers = _table(graph.colours, np.full(width, -1))
        self._senders = _table([senders[c] for c in graph.colours], np.zeros(width))
        self._receivers = _table(
            [receivers[c] for c in graph.colours], graph.n_nodes + np.arange(width)
        )

    def of_nodes(self, table: np.ndarray | jax.Array) -> jax.Array:
        """The rows of the nodes that are here, of a table of all: [N, ...] -> [m, ...]."""
        return jnp.asarray(table)

    def slots(self, values: Tree) -> Tree:
        """Zeros to remember something of each sender: of the shapes of ``values`` [m, ...]."""
        shape = self._numbers.shape
        return jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype), values)

    def exchange(self, values: Tree, arrive: Arrive, slots: Tree = ()) -> tuple[Tree, Tree]:
        """Every node sends its values to all its neighbours; what arrives is added up.

        Args:
          values: arrays [m, ...].
          arrive: see `Arrive`; what it adds up has the shapes that a node's values have.
          slots: of the last exchange, or as `slots` makes them; () where nothing is remembered.

        Returns:
          The sums over the neighbours, [m, ...], and the slots.
        """

        def of_colour(total: Tree, colour):
            senders, receivers, numbers, slot = colour
            there = jax.tree.map(lambda leaf: leaf[senders], values)
            # Out of range for padding: the last node, and nothing is added to it.
            here = jax.tree.map(lambda leaf: leaf.at[receivers].get(mode="clip"), values)
            added, new = arrive(here, there, jnp.maximum(numbers, 0), slot)
            total = jax.tree.map(
                lambda sums, leaf: sums.at[receivers].add(leaf, mode="drop", unique_indices=True),
                total,
                added,
            )
            return total, where_each(numbers >= 0, new, slot)

        zeros = jax.tree.map(jnp.zeros_like, values)
        colours = (self._senders, self._receivers, self._numbers, slots)
        return lax.scan(of_colour, zeros, jax.tree.map(jnp.asarray, colours))

    def mean_of_all(self, values: Tree) -> Tree:
        """The mean over all nodes, as an all-reduce has it: [m, ...] -> [...]."""
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), values)


class MeshLinks:
    """A node a device, inside ``shard_map``: m = 1.

    Attributes:
      graph: of the nodes, as many as the mesh axis has devices.
      n_nodes: N.
      axis_name: of that axis.
    """

    def __init__(self, graph: Graph, axis_name: str = DATA_AXIS):
        self.graph, self.n_nodes, self.axis_name = graph, graph.n_nodes, axis_name
        senders, receivers = graph.directed
        self._permutations = [
            [(int(senders[e]), int(receivers[e])) for e in colour] for colour in graph.colours
        ]
        # The edge along which a node hears something, by colour; −1 where it hears nothing.
        self._numbers = np.full((len(graph.colours), graph.n_nodes), -1, np.int32)
        for c, colour in enumerate(graph.colours):
            self._numbers[c, receivers[colour]] = colour

    def of_nodes(self, table: np.ndarray | jax.Array) -> jax.Array:
        """See `LocalLinks.of_nodes`."""
        return lax.dynamic_slice_in_dim(jnp.asarray(table), lax.axis_index(self.axis_name), 1)

    def slots(self, values: Tree) -> Tree:
        """See `LocalLinks.slots`."""
        n = len(self._permutations)
        return jax.tree.map(
            lambda leaf: vary_like(jnp.zeros((n, *leaf.shape), leaf.dtype), leaf), values
        )

    def exchange(self, values: Tree, arrive: Arrive, slots: Tree = ()) -> tuple[Tree, Tree]:
        """See `LocalLinks.exchange`."""
        total, kept = jax.tree.map(jnp.zeros_like, values), []
        for c, permutation in enumerate(self._permutations):
            number = self.of_nodes(self._numbers[c])
            there = jax.tree.map(
                lambda leaf, pairs=permutation: lax.ppermute(leaf, self.axis_name, pairs), values
            )
            slot = jax.tree.map(lambda leaf, c=c: leaf[c], slots)
            added, new = arrive(values, there, jnp.maximum(number, 0), slot)
            nothing = jax.tree.map(jnp.zeros_like, added)
            total = jax.tree.map(jnp.add, total, where_each(number >= 0, added, nothing))
            kept.append(where_each(number >= 0, new, slot))
        return total, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)

    def mean_of_all(self, values: Tree) -> Tree:
        """See `LocalLinks.mean_of_all`."""
        return jax.tree.map(lambda leaf: lax.pmean(leaf[0], self.axis_name), values)


Links = LocalLinks | MeshLinks


class Nodes(NamedTuple):
    """Where nodes are: all on one device, or each on a device of its own.

    Attributes:
      mesh: None, or a mesh with one axis, "data", and as many devices as there are nodes.
    """

    mesh: Mesh | None = None

    def compile(
        self, graph: Graph, program: Callable[..., Tree], n_sharded: int, out_specs: Tree = SHARDED
    ) -> Callable[..., Tree]:
        """A program of nodes, compiled.

        Args:
          graph: of the nodes.
          program: (links, *arrays) -> results; its first ``n_sharded`` arrays are of nodes,
            [m, ...], the others are the same for all.
          n_sharded: see there.
          out_specs: SHARDED for results that are of nodes, REPLICATED for those that are the same
            for all, or a tuple of these.

        Returns:
          The function of arrays [N, ...] and others, under ``jit``.

        Raises:
          UserError: the mesh does not have a device for each node.
        """
        if self.mesh is None:
            links = LocalLinks(graph)
            return jax.jit(lambda *arrays: program(links, *arrays))
        if self.mesh.size != graph.n_nodes:
            raise UserError(
                f"the graph {graph.name!r} has {graph.n_nodes} nodes, but the mesh has "
                f"{self.mesh.size} devices; accepted: one device for each node (several nodes on a "
                "device are not built: without a mesh all nodes are on one)"
            )
        mesh_links = MeshLinks(graph)
        mesh = self.mesh

        def call(*arrays):
            specs = tuple(SHARDED if i < n_sharded else REPLICATED for i in range(len(arrays)))
            function = data_parallel(
                lambda *local: program(mesh_links, *local), mesh, specs, out_specs
            )
            return function(*arrays)

        return jax.jit(call)


def along(factors: jax.Array, like: jax.Array) -> jax.Array:
    """Factors [b] in a shape that multiplies arrays [b, ...]."""
    return factors.reshape(factors.shape[0], *(1,) * (like.ndim - 1)).astype(like.dtype)


def where_each(chosen: jax.Array, yes: Tree, no: Tree) -> Tree:
    """Arrays [b, ...], row by row of one tree or the other, as ``chosen`` [b] says."""

    def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(of_leaf, yes, no)


def _table(rows: list[np.ndarray], padding: np.ndarray) -> np.ndarray:
    table = np.tile(padding.astype(np.int32), (len(rows), 1))
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
