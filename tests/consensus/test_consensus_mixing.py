"""Mixing weights and spectra against closed forms."""

import itertools

import numpy as np
import pytest

from jkmeans.consensus import mixing
from jkmeans.consensus.graphs import TOPOLOGIES, make_graph, make_topology, random_geometric
from jkmeans.consensus.mixing import make_mixing, metropolis, spectrum
from jkmeans.errors import UserError


@pytest.mark.parametrize("weights", ["metropolis", "maximum_degree"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_weights_are_symmetric_doubly_stochastic_and_positive(name, weights):
    matrix = make_mixing(weights, make_topology(name, 16)).matrix().toarray()
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-14)
    assert matrix.min() >= -1e-15
    assert matrix.diagonal().min() > 0.05


def test_metropolis_by_hand():
    # Degrees 1, 3, 2, 2.
    graph = make_graph("paw", 4, [(0, 1), (1, 2), (1, 3), (2, 3)])
    assert metropolis(graph).weights.tolist() == [1 / 4, 1 / 4, 1 / 4, 1 / 3]
    assert metropolis(graph).own == pytest.approx([3 / 4, 1 / 4, 5 / 12, 5 / 12])
    assert set(make_mixing("maximum_degree", graph).weights) == {1 / 4}


def test_spectra_in_closed_form():
    n = 16
    ring = spectrum(metropolis(make_topology("ring", n)))
    assert ring.second == pytest.approx(1 - 2 / 3 * (1 - np.cos(2 * np.pi / n)))
    assert ring.last == pytest.approx(-1 / 3)
    cube = spectrum(metropolis(make_topology("hypercube", n)))
    assert (cube.second, cube.last) == pytest.approx((3 / 5, -3 / 5))
    star = spectrum(metropolis(make_topology("star", n)))
    assert star.rate == pytest.approx(1 - 1 / n)
    complete = spectrum(metropolis(make_topology("complete", n)))
    assert complete.rate == pytest.approx(0, abs=1e-12)
    assert complete.rounds(1e-6) == 1
    assert ring.rounds(1e-6) == np.ceil(np.log(1e-6) / np.log(ring.second))
    assert ring.gap == 1 - ring.rate


def test_slowest_mode_is_an_eigenvector():
    for name in ("ring", "hypercube", "star"):
        ours = metropolis(make_topology(name, 8))
        found = spectrum(ours)
        moved = ours.matrix() @ found.slowest
        assert np.abs(np.abs(moved) - found.rate * np.abs(found.slowest)).max() < 1e-12
        assert abs(found.slowest.sum()) < 1e-12


def test_lanczos_agrees_with_the_dense_solver(monkeypatch):
    ours = metropolis(random_geometric(120, seed=3))
    dense = spectrum(ours)
    monkeypatch.setattr(mixing, "_DENSE_NODES", 10)
    mixing._spectrum.cache_clear()
    sparse = spectrum(ours)
    assert sparse[:2] == pytest.approx(dense[:2], abs=1e-9)
    assert abs(sparse.slowest @ dense.slowest) == pytest.approx(1, abs=1e-6)
    mixing._spectrum.cache_clear()


@pytest.mark.parametrize("name", ["path", "ring", "barbell"])
def test_slow_graphs_beyond_the_dense_solver(monkeypatch, name):
    n = 400
    if name == "barbell":  # Two complete graphs at the ends of a path.
        hall, way = list(itertools.combinations(range(20), 2)), n - 40
        far = [(i + n - 20, j + n - 20) for i, j in hall]
        graph = make_graph(name, n, hall + far + [(i, i + 1) for i in range(19, 20 + way)])
    else:
        graph = make_topology(name, n)
    ours = metropolis(graph)
    dense = np.linalg.eigvalsh(ours.matrix().toarray())
    monkeypatch.setattr(mixing, "_DENSE_NODES", 10)
    monkeypatch.setattr(mixing, "_RESTARTS", 10)
    mixing._spectrum.cache_clear()
    sparse = spectrum(ours)
    mixing._spectrum.cache_clear()
    assert sparse.gap == pytest.approx(1 - dense[-2], rel=1e-8)
    assert sparse.last == pytest.approx(dense[0], abs=1e-12)
    moved = ours.matrix() @ sparse.slowest
    assert np.abs(moved - sparse.rate * sparse.slowest).max() < 1e-12
    assert abs(sparse.slowest.sum()) < 1e-6


def test_a_long_path_in_closed_form():
    n = 3000
    found = spectrum(metropolis(make_topology("path", n)))
    assert found.gap == pytest.approx(2 / 3 * (1 - np.cos(np.pi / n)), rel=1e-6)
    assert found.last == pytest.approx(1 / 3 - 2 / 3 * np.cos(np.pi / n), abs=1e-12)


def test_given_weights():
    edges = [(0, 1), (1, 2)]
    assert make_mixing("given", make_graph("g", 3, edges, weights=[0.3, 0.5])).own == pytest.approx(
        [0.7, 0.2, 0.5]
    )
    with pytest.raises(UserError, match="has no weights"):
        make_mixing("given", make_graph("g", 3, edges))
    with pytest.raises(UserError, match=r"add up to 1\.1 at node 1; accepted: at most 1"):
        make_mixing("given", make_graph("g", 3, edges, weights=[0.6, 0.5]))
    with pytest.raises(UserError, match=r"of 1 − .*never agree; accepted: larger .* is 1e-15"):
        make_mixing("given", make_graph("g", 3, edges, weights=[1e-15, 0.3]))
    with pytest.raises(UserError, match="of -1, with which gossip swings for ever; accepted: sm"):
        make_mixing("given", make_graph("g", 2, [(0, 1)], weights=[1.0]))
    with pytest.raises(UserError, match="accepted: 'metropolis', 'maximum_degree', 'given'"):
        make_mixing("best", make_graph("g", 2, [(0, 1)]))
