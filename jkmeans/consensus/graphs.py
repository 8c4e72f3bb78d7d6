"""Undirected graphs of nodes that talk to their neighbours: topologies, files, checks, colours."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, laplacian

from jkmeans.errors import UserError

EDGES = "edges"
"""What a graph is called that was read from a file of edges."""

_LISTED_NODES = 10**6
_SHOWN_NODES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A connected undirected graph without self-loops.

    Edge e between i < j is two directed edges: number 2e goes from i to j, 2e + 1 from j to i.

    Attributes:
      name: what it is called in tables.
      n_nodes: N, at least 2.
      edges: [E, 2] int32, each edge once, the smaller node first, in ascending order.
      positions: [N, 2] float, where nodes are drawn.
      weights: [E] float64, at least 0, what the user gave with the edges; None if nothing.
    """

    name: str
    n_nodes: int
    edges: np.ndarray
    positions: np.ndarray
    weights: np.ndarray | None = None

    @property
    def n_edges(self) -> int:
        """E."""
        return len(self.edges)

    @functools.cached_property
    def degrees(self) -> np.ndarray:
        """The number of neighbours of each node: [N] int64."""
        return np.bincount(self.edges.ravel(), minlength=self.n_nodes)

    @functools.cached_property
    def diameter(self) -> int:
        """The most edges on a shortest path between two nodes."""
        from scipy.sparse.csgraph import shortest_path

        matrix = _adjacency(self.n_nodes, self.edges).tocsr()
        return int(shortest_path(matrix, unweighted=True).max())

    @functools.cached_property
    def colours(self) -> list[np.ndarray]:
        """Directed edges in as few groups as possible, in each a node sends and receives once.

        As many groups as the largest degree (König's theorem: directed edges are the edges of a
        bipartite graph of senders and receivers); each is one ``ppermute``.

        Returns:
          For each group the numbers of its directed edges, ascending.
        """
        return _colour(self.n_nodes, *self.directed)

    @property
    def directed(self) -> tuple[np.ndarray, np.ndarray]:
        """Sender and receiver of each directed edge: two times [2E] int32."""
        return self.edges.ravel(), self.edges[:, ::-1].ravel()

    def neighbours(self, node: int) -> np.ndarray:
        """The neighbours of a node, ascending."""
        senders, receivers = self.directed
        return np.sort(senders[receivers == node])

    def without(self, nodes: Iterable[int]) -> tuple[Graph, np.ndarray]:
        """The graph once some nodes have left, its nodes numbered anew in their old order.

        Returns:
          The graph, and the old numbers of its nodes: [N'] int.

        Raises:
          UserError: no such node; or what remains is less than two nodes, or not connected.
        """
        gone = np.zeros(self.n_nodes, bool)
        for node in nodes:
            if not 0 <= node < self.n_nodes or node != int(node):
                raise UserError(
                    f"node {node} is to leave the graph {self.name!r}; accepted: a whole number "
                    f"from 0 to {self.n_nodes - 1}"
                )
            gone[int(node)] = True
        kept = np.flatnonzero(~gone)
        number = np.cumsum(~gone) - 1
        stays = ~gone[self.edges].any(axis=1)
        graph = make_graph(
            self.name,
            len(kept),
            number[self.edges[stays]],
            positions=self.positions[kept],
            weights=None if self.weights is None else self.weights[stays],
            names=kept,
        )
        return graph, kept


def make_graph(
    name: str,
    n_nodes: int,
    edges: np.ndarray | Iterable[tuple[int, int]],
    *,
    positions: np.ndarray | None = None,
    weights: np.ndarray | Iterable[float] | None = None,
    names: np.ndarray | None = None,
) -> Graph:
    """A graph from its edges, checked.

    Args:
      name: what it is called.
      n_nodes: N; nodes are 0 … N − 1.
      edges: pairs of nodes, in any order; one that is given in both directions counts once.
      positions: [N, 2], where nodes are drawn; None for what the Laplacian suggests.
      weights: one number an edge, at least 0; None for none. Needed by mixing "given" only.
      names: [N], what nodes are called in errors; None for their numbers.

    Raises:
      UserError: fewer than two nodes, a node that does not exist, a self-loop, a negative weight,
        two weights of one edge, or a graph that is not connected: it names a component.
    """
    pairs = np.asarray(list(edges) if not isinstance(edges, np.ndarray) else edges)
    called = np.arange(n_nodes) if names is None else names
    if n_nodes < 2:
        raise UserError(f"the graph {name!r} has {n_nodes} nodes; accepted: at least 2")
    if pairs.size == 0:
        pairs = np.empty((0, 2), np.int32)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise UserError(
            f"the edges of the graph {name!r} have shape {list(pairs.shape)} and type "
            f"{pairs.dtype}; accepted: pairs of node numbers"
        )
    strange = (pairs < 0) | (pairs >= n_nodes)
    if strange.any():
        raise UserError(
            f"the graph {name!r} has an edge to node {pairs[strange][0]}; accepted: 0 to "
            f"{n_nodes - 1}"
        )
    loops = pairs[:, 0] == pairs[:, 1]
    if loops.any():
        node = called[pairs[loops][0, 0]]
        raise UserError(
            f"the graph {name!r} has a self-loop at node {node}; accepted: edges between different "
            "nodes (a node keeps a part of its own value anyway)"
        )
    given = None if weights is None else np.asarray(list(weights), np.float64)
    if given is not None:
        bad = np.flatnonzero(~(given >= 0) | ~np.isfinite(given))
        if bad.size:
            i, j = called[pairs[bad[0]]]
            raise UserError(
                f"the graph {name!r} has weight {given[bad[0]]:g} on edge {i}–{j}; accepted: "
                "finite weights of at least 0"
            )
        # An edge without weight carries nothing: it must not make a graph look connected.
        pairs, given = pairs[given > 0], given[given > 0]
    ordered = np.sort(pairs, axis=1)
    unique, first, inverse = np.unique(ordered, axis=0, return_index=True, return_inverse=True)
    if given is not None:
        chosen = given[first]
        unlike = np.flatnonzero(chosen[inverse.ravel()] != given)
        if unlike.size:
            i, j = called[ordered[unlike[0]]]
            raise UserError(
                f"the graph {name!r} has two weights on edge {i}–{j}; accepted: one, for mixing "
                "is symmetric"
            )
        given = chosen
    _refuse_disconnected(name, n_nodes, unique, called)
    unique = unique.astype(np.int32)
    places = _suggested_positions(n_nodes, unique) if positions is None else positions
    return Graph(name, n_nodes, unique, places, given)


def ring(n_nodes: int) -> Graph:
    """Each node between two others. N is at least 3."""
    _at_least("ring", n_nodes, 3)
    i = np.arange(n_nodes)
    return make_graph("ring", n_nodes, _pairs(i, (i + 1) % n_nodes), positions=_circle(n_nodes))


def path(n_nodes: int) -> Graph:
    """Nodes in a row, the ends with one neighbour. N is at least 2."""
    i = np.arange(n_nodes - 1)
    places = np.column_stack([np.linspace(-1, 1, n_nodes), np.zeros(n_nodes)])
    return make_graph("path", n_nodes, _pairs(i, i + 1), positions=places)


def torus(n_nodes: int) -> Graph:
    """A grid that closes in both directions, as square as N allows; its sides are at least 3."""
    rows = next((r for r in range(math.isqrt(n_nodes), 2, -1) if n_nodes % r == 0), 0)
    if not rows:
        raise UserError(
            f"the topology 'torus' does not fit {n_nodes} nodes; accepted: a product of two "
            "integers of at least 3, such as 9, 12, 15 or 16"
        )
    columns = n_nodes // rows
    node = np.arange(n_nodes)
    row, column = node // columns, node % columns
    right = row * columns + (column + 1) % columns
    below = (row + 1) % rows * columns + column
    x, y = 2 * column / (columns - 1) - 1, 1 - 2 * row / (rows - 1)
    # Bent by nearly half a step, so that the edges which close the grid are seen beside the others.
    bent_x, bent_y = x + 0.9 / (columns - 1) * (1 - y**2), y + 0.9 / (rows - 1) * (1 - x**2)
    places = np.column_stack([bent_x, bent_y])
    return make_graph(
        "torus",
        n_nodes,
        np.concatenate([_pairs(node, right), _pairs(node, below)]),
        positions=places,
    )


def hypercube(n_nodes: int) -> Graph:
    """Nodes whose binary numbers differ in one place are neighbours. N is a power of two."""
    if n_nodes < 2 or n_nodes & (n_nodes - 1):
        raise UserError(
            f"the topology 'hypercube' does not fit {n_nodes} nodes; accepted: a power of two, "
            "such as 2, 4, 8 or 16"
        )
    node = np.arange(n_nodes)
    bits = n_nodes.bit_length() - 1
    edges = np.concatenate([_pairs(node, node ^ (1 << b)) for b in range(bits)])
    # The number of a node is its height, and read from its other end how far right it is: no two
    # are level, and none is near another (the points of Hammersley).
    powers = 2.0 ** np.arange(bits)
    corners = node[:, None] >> np.arange(bits)[None, :] & 1
    places = corners @ np.column_stack([powers[::-1], powers]) * 2 / (n_nodes - 1) - 1
    return make_graph("hypercube", n_nodes, edges, positions=places)


def exponential(n_nodes: int) -> Graph:
    """Neighbours are 1, 2, 4, … places away on a circle, both ways. N is at least 3."""
    _at_least("exponential", n_nodes, 3)
    i = np.arange(n_nodes)
    hops = [1 << b for b in range((n_nodes - 1).bit_length()) if 1 << b <= n_nodes // 2]
    edges = np.concatenate([_pairs(i, (i + hop) % n_nodes) for hop in hops])
    return make_graph("exponential", n_nodes, edges, positions=_circle(n_nodes))


def star(n_nodes: int) -> Graph:
    """Node 0 in the middle is everybody's only neighbour. N is at least 2."""
    _at_least("star", n_nodes, 2)
    places = np.concatenate([np.zeros((1, 2)), _circle(n_nodes - 1)])
    leaf = np.arange(1, n_nodes)
    return make_graph("star", n_nodes, _pairs(0 * leaf, leaf), positions=places)


def complete(n_nodes: int) -> Graph:
    """Everybody is a neighbour of everybody. N is at least 2."""
    _at_least("complete", n_nodes, 2)
    edges = np.column_stack(np.triu_indices(n_nodes, 1))
    return make_graph("complete", n_nodes, edges, positions=_circle(n_nodes))


TOPOLOGIES: dict[str, Callable[[int], Graph]] = {
    "ring": ring,
    "path": path,
    "torus": torus,
    "hypercube": hypercube,
    "exponential": exponential,
    "star": star,
    "complete": complete,
}
"""Makers of graphs by name, from the number of nodes."""


def random_geometric(n_nodes: int, radius: float = 0.0, seed: int = 0) -> Graph:
    """Nodes at random places of the unit square, neighbours if nearer than the radius.

    Args:
      n_nodes: N.
      radius: in sides of the square; 0 for √(2 ln N / (π N)), with which the graph is connected
        with high probability (Gupta and Kumar 1998: the threshold is √(ln N / (π N))).
      seed: of the places.

    Raises:
      UserError: the graph is not connected.
    """
    from scipy.spatial import KDTree

    radius = radius or math.sqrt(2 * math.log(max(n_nodes, 2)) / (math.pi * n_nodes))
    places = np.random.default_rng(seed).uniform(size=(n_nodes, 2))
    edges = KDTree(places).query_pairs(radius, output_type="ndarray")
    try:
        return make_graph("geometric", n_nodes, edges, positions=places)
    except UserError as error:
        raise UserError(f"{error}: a radius above {radius:.3g}, or another seed") from None


def from_networkx(graph: Any, name: str = "networkx") -> Graph:
    """A graph of networkx: its nodes in their order, and edge attributes ``weight`` if all have it.

    Args:
      graph: a ``networkx.Graph``; networkx itself is not imported.
      name: what it is called.

    Raises:
      UserError: it is directed; or see `make_graph`.
    """
    if graph.is_directed():
        raise UserError(f"the graph {name!r} is directed; accepted: an undirected one")
    number = {node: i for i, node in enumerate(graph.nodes)}
    edges = np.array([(number[i], number[j]) for i, j in graph.edges()], np.int64).reshape(-1, 2)
    weights = [weight for _, _, weight in graph.edges(data="weight")]
    has_weights = bool(weights) and all(weight is not None for weight in weights)
    return make_graph(
        name,
        len(number),
        edges,
        weights=weights if has_weights else None,
        names=np.array([str(node) for node in number]),
    )


def read_edges(path: str | Path, n_nodes: int = 0) -> Graph:
    """A graph from a text file with an edge a line: two node numbers, and a weight if all have one.

    Empty lines, and what follows a ``#``, do not count.

    Args:
      path: of the file.
      n_nodes: N; 0 for the largest number in the file and one more.

    Raises:
      UserError: the file cannot be read, or a line is something else; or see `make_graph`.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the edges in {path}: {error}") from error
    edges, weights = [], []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            i, j, *rest = words
            edges.append((int(i), int(j)))
            weights += [float(word) for word in rest]
            known = len(weights) in (0, len(edges)) and len(rest) <= 1
        except ValueError:
            known = False
        if not known:
            raise UserError(
                f"line {number} of {path} is {line.strip()!r}; accepted: two node numbers, and a "
                "weight if all lines have one"
            )
    if not edges:
        raise UserError(f"{path} holds no edge; accepted: two node numbers a line")
    smallest = min(min(edge) for edge in edges)
    if smallest < 0:
        raise UserError(f"{path} names node {smallest:,}; accepted: nodes numbered from 0")
    largest = max(max(edge) for edge in edges)
    # It is not connected anyway; but to say which nodes are not takes an array of all of them.
    if largest > max(len(edges), _LISTED_NODES):
        raise UserError(
            f"{path} names node {largest:,}, but has {len(edges):,} edges, which connect at most "
            f"the nodes 0 to {len(edges):,}; accepted: nodes numbered from 0, all connected"
        )
    n_nodes = n_nodes or largest + 1
    return make_graph(EDGES, n_nodes, np.array(edges), weights=weights or None)


def make_topology(name: str, n_nodes: int) -> Graph:
    """The graph of a name in `TOPOLOGIES`.

    Raises:
      UserError: an unknown name, or a number of nodes that it does not fit.
    """
    if name not in TOPOLOGIES:
        raise UserError(f"the topology is {name!r}; accepted: {', '.join(map(repr, TOPOLOGIES))}")
    return TOPOLOGIES[name](n_nodes)


def _pairs(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    return np.column_stack([i, j])


def _circle(n: int) -> np.ndarray:
    angles = np.pi / 2 - 2 * np.pi * np.arange(n) / max(n, 1)
    return np.column_stack([np.cos(angles), np.sin(angles)])


def _at_least(name: str, n_nodes: int, least: int) -> None:
    if n_nodes < least:
        raise UserError(
            f"the topology {name!r} does not fit {n_nodes} nodes; accepted: at least {least}"
        )


def _adjacency(n_nodes: int, edges: np.ndarray) -> coo_array:
    ones = np.ones(2 * len(edges))
    both = np.concatenate([edges, edges[:, ::-1]])
    return coo_array((ones, (both[:, 0], both[:, 1])), shape=(n_nodes, n_nodes))


def _refuse_disconnected(name: str, n_nodes: int, edges: np.ndarray, called: np.ndarray) -> None:
    n_parts, part = connected_components(_adjacency(n_nodes, edges), directed=False)
    if n_parts == 1:
        return
    smallest = np.argmin(np.bincount(part))
    nodes = called[part == smallest]
    listed = ", ".join(map(str, nodes[:_SHOWN_NODES])) + (" …" if len(nodes) > _SHOWN_NODES else "")
    many = (
        f"nodes {listed} ({len(nodes)} of {n_nodes}) have"
        if len(nodes) > 1
        else (f"node {listed} has")
    )
    raise UserError(
        f"the graph {name!r} is not connected: {many} no path to the others (it has {n_parts} "
        "components); accepted: a connected graph"
    )


def _suggested_positions(n_nodes: int, edges: np.ndarray) -> np.ndarray:
    """Coordinates from the two smoothest modes of the Laplacian; a circle for very few nodes."""
    if n_nodes < 4 or n_nodes > 2000:
        return _circle(n_nodes)
    matrix = laplacian(_adjacency(n_nodes, edges).toarray(), normed=True)
    places = np.linalg.eigh(matrix)[1][:, 1:3]
    # Ranks partly: modes alone put most nodes of an uneven graph on one spot.
    ranks = places.argsort(axis=0).argsort(axis=0) / (n_nodes - 1) - 0.5
    return places / np.abs(places).max(axis=0) + ranks


def _colour(n_nodes: int, senders: np.ndarray, receivers: np.ndarray) -> list[np.ndarray]:
    hops = (receivers - senders) % n_nodes
    found, counts = np.unique(hops, return_counts=True)
    if (counts == n_nodes).all():  # A circulant graph: everybody sends as far at once.
        return [np.flatnonzero(hops == hop) for hop in found]
    degree = int(np.bincount(senders).max())
    sent = np.full((n_nodes, degree), -1)  # The edge that a node sends along, by colour.
    heard = np.full((n_nodes, degree), -1)
    uses = np.zeros(degree, int)
    for edge, (i, j) in enumerate(zip(senders, receivers, strict=True)):
        both = np.flatnonzero((sent[i] < 0) & (heard[j] < 0))
        if both.size:
            colour = both[np.argmin(uses[both])]  # Groups of like size waste the least.
        else:
            colour = np.flatnonzero(sent[i] < 0)[0]
            _free(colour, np.flatnonzero(heard[j] < 0)[0], j, sent, heard, senders, receivers)
        sent[i, colour] = heard[j, colour] = edge
        uses[colour] += 1
    return [np.sort(sent[sent[:, c] >= 0, c]) for c in range(degree)]


def _free(a, b, node, sent, heard, senders, receivers) -> None:
    """Frees colour a at a receiver by swapping it with b along the path that begins there."""
    path, receiver = [], node
    while (edge := heard[receiver, a]) >= 0:
        path.append((edge, a))
        sender = senders[edge]
        if (edge := sent[sender, b]) < 0:
            break
        path.append((edge, b))
        receiver = receivers[edge]
    for edge, colour in path:
        sent[senders[edge], colour] = heard[receivers[edge], colour] = -1
    for edge, colour in path:
        other = b if colour == a else a
        sent[senders[edge], other] = heard[receivers[edge], other] = edge
