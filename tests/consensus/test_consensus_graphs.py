"""Graphs: topologies by hand, colours, files, networkx, and graphs that are refused."""

import numpy as np
import pytest

from jkmeans.consensus.graphs import (
    TOPOLOGIES,
    from_networkx,
    make_graph,
    make_topology,
    random_geometric,
    read_edges,
)
from jkmeans.errors import UserError


def edges_of(graph):
    return [tuple(map(int, edge)) for edge in graph.edges]


def test_small_topologies_by_hand():
    assert edges_of(make_topology("ring", 4)) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert edges_of(make_topology("path", 3)) == [(0, 1), (1, 2)]
    assert edges_of(make_topology("star", 4)) == [(0, 1), (0, 2), (0, 3)]
    assert edges_of(make_topology("complete", 3)) == [(0, 1), (0, 2), (1, 2)]
    assert edges_of(make_topology("hypercube", 4)) == [(0, 1), (0, 2), (1, 3), (2, 3)]
    # 1, 2 and 4 places away on a circle of eight; 4 away is the same node both ways.
    exponential = make_topology("exponential", 8)
    assert exponential.neighbours(0).tolist() == [1, 2, 4, 6, 7]
    torus = make_topology("torus", 12)
    assert torus.neighbours(0).tolist() == [1, 3, 4, 8]
    assert torus.degrees.tolist() == [4] * 12


@pytest.mark.parametrize(("name", "diameter"), [("ring", 8), ("torus", 4), ("star", 2)])
def test_diameters(name, diameter):
    assert make_topology(name, 16).diameter == diameter


def check_colours(graph):
    senders, receivers = graph.directed
    # König: no more groups than the busiest node has neighbours.
    assert len(graph.colours) == graph.degrees.max()
    assert sorted(np.concatenate(graph.colours)) == list(range(2 * graph.n_edges))
    for group in graph.colours:
        assert len(set(senders[group])) == len(group) == len(set(receivers[group]))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_colours_of_topologies(name):
    check_colours(make_topology(name, 16))


@pytest.mark.parametrize("seed", range(8))
def test_colours_of_random_graphs(seed):
    # Uneven degrees, so that colours have to be swapped along paths.
    rng = np.random.default_rng(seed)
    tree = [(int(rng.integers(i)), i) for i in range(1, 30)]
    more = rng.integers(30, size=(60, 2))
    check_colours(make_graph("random", 30, [*tree, *map(tuple, more[more[:, 0] != more[:, 1]])]))


def test_an_edge_given_twice_counts_once():
    graph = make_graph("g", 3, [(1, 0), (0, 1), (2, 1)], weights=[0.2, 0.2, 0.3])
    assert edges_of(graph) == [(0, 1), (1, 2)]
    assert graph.weights.tolist() == [0.2, 0.3]


def test_geometric_graph_joins_the_near():
    graph = random_geometric(60, 0.3, seed=1)
    distances = np.linalg.norm(graph.positions[:, None] - graph.positions[None], axis=2)
    wanted = {(i, j) for i in range(60) for j in range(i + 1, 60) if distances[i, j] <= 0.3}
    assert set(edges_of(graph)) == wanted


@pytest.mark.parametrize(
    ("name", "n_nodes", "accepted"),
    [
        ("ring", 2, "at least 3"),
        ("torus", 13, "a product of two integers of at least 3"),
        ("torus", 8, "a product of two integers of at least 3"),
        ("hypercube", 12, "a power of two"),
        ("star", 1, "at least 2"),
        ("mesh", 8, "'ring', 'path'"),
    ],
)
def test_topologies_that_do_not_fit(name, n_nodes, accepted):
    with pytest.raises(UserError, match=f"accepted: .*{accepted}") as caught:
        make_topology(name, n_nodes)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("edges", "weights", "sentence"),
    [
        ([(0, 1), (2, 3), (3, 4)], None, r"nodes 0, 1 \(2 of 5\) have no path .* 2 components"),
        ([(0, 1), (1, 2), (2, 3)], None, r"node 4 has no path to the others"),
        ([(0, 1), (1, 1)], None, "a self-loop at node 1"),
        ([(0, 5)], None, "an edge to node 5; accepted: 0 to 4"),
        ([(-1, 0)], None, "an edge to node -1"),
        ([(0, 1), (1, 2)], [0.5, -0.1], "weight -0.1 on edge 1–2"),
        ([(0, 1), (1, 2)], [0.5, np.nan], "weight nan on edge 1–2"),
        ([(0, 1), (1, 0)], [0.5, 0.4], "two weights on edge 0–1"),
        ([(0, 1), (1, 2), (2, 3), (3, 4)], [1, 0, 1, 1], "is not connected"),
        ([(0.5, 1.0)], None, "accepted: pairs of node numbers"),
        ([], None, "is not connected"),
    ],
)
def test_graphs_that_are_refused(edges, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        make_graph("g", 5, edges, weights=weights)


def test_a_large_component_is_not_listed_whole():
    with pytest.raises(UserError, match=r"nodes 0, 1, 2, 3, 4, 5, 6, 7 … \(10 of 20\)"):
        make_graph("g", 20, [(i, i + 1) for i in range(19) if i != 9])


def test_edges_are_read_from_a_file(tmp_path):
    path = tmp_path / "edges.txt"
    path.write_text("# sensors\n0 1 0.25\n\n2 1 0.5  # the long one\n")
    graph = read_edges(path)
    assert graph.n_nodes == 3
    assert edges_of(graph) == [(0, 1), (1, 2)]
    assert graph.weights.tolist() == [0.25, 0.5]
    path.write_text("0 1\n1 2\n")
    assert read_edges(path).weights is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0 1\n1 two\n", "line 2 of .* is '1 two'"),
        ("0 1 0.5\n1 2\n", "line 2 of .* is '1 2'"),
        ("0 1\n1 2 0.5\n", "line 2 of"),
        ("0 1 0.5 0.5\n", "line 1 of"),
        ("0\n", "line 1 of"),
        ("# nothing\n", "holds no edge"),
        ("0 1\n2 3\n", "not connected"),
        ("0 1\n1 0\n1 2\n2 0\n3 3\n", "self-loop"),
        ("-1 0\n", "names node -1; accepted: nodes numbered from 0"),
        ("0 1\n-5 -3\n", "names node -5; accepted: nodes numbered from 0"),
        (f"0 {10**30}\n", "names node 1,000,000.*, but has 1 edges"),
    ],
)
def test_files_that_are_refused(tmp_path, text, sentence):
    (tmp_path / "edges.txt").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_edges(tmp_path / "edges.txt")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the edges in"):
        read_edges(tmp_path / "none.txt")


def test_networkx():
    networkx = pytest.importorskip("networkx")
    theirs = networkx.grid_2d_graph(3, 4, periodic=True)
    graph = from_networkx(theirs)
    assert graph.n_nodes == 12
    assert set(edges_of(graph)) == set(edges_of(make_topology("torus", 12)))
    weighted = networkx.Graph()
    weighted.add_edge("b", "a", weight=0.3)
    assert from_networkx(weighted).weights.tolist() == [0.3]
    with pytest.raises(UserError, match="directed"):
        from_networkx(theirs.to_directed())
    theirs.add_node("lonely")
    with pytest.raises(UserError, match="node lonely has no path"):
        from_networkx(theirs)


def test_nodes_leave():
    graph, kept = make_topology("ring", 6).without([2])
    assert kept.tolist() == [0, 1, 3, 4, 5]
    assert edges_of(graph) == [(0, 1), (0, 4), (2, 3), (3, 4)]
    with pytest.raises(UserError, match=r"nodes 1, 2 \(2 of 4\) have no path"):
        make_topology("ring", 6).without([0, 3])
    for node in (6, 1.5):
        with pytest.raises(UserError, match=f"node {node} is to leave"):
            make_topology("ring", 6).without([node])
