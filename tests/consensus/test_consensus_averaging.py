"""Gossip and push-sum: rates, means that stay, losses, nodes that leave, bytes; vmap and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans.consensus.averaging import (
    deviation,
    leave,
    push_sum,
    resume,
    run_rounds,
    settle,
    symmetric,
)
from jkmeans.consensus.graphs import TOPOLOGIES, make_topology
from jkmeans.consensus.links import LocalLinks, Nodes
from jkmeans.consensus.mixing import metropolis, spectrum
from jkmeans.consensus.traffic import all_reduce_bytes, bytes_per_round, measured_bytes
from jkmeans.errors import UserError
from jkmeans.sharding import REPLICATED, SHARDED, make_mesh
from tests import tiny

KINDS = {
    "symmetric": lambda links, key, loss: symmetric(links, metropolis(links.graph), key, loss),
    "push_sum": lambda links, key, loss: push_sum(links, key, loss),
}


def gossip(graph, values, n_rounds, kind="symmetric", loss=0.0, mesh=None):
    """Estimates after so many rounds, and the relative distance to the mean after each."""

    def program(links, values):
        averaging = KINDS[kind](links, jax.random.key(3) if loss else None, loss)
        mean = links.mean_of_all(values)
        state, errors = run_rounds(
            averaging.round,
            averaging.start(values),
            n_rounds,
            record=lambda state: deviation(links, averaging.read(state), mean),
        )
        return averaging.read(state), errors

    found, errors = Nodes(mesh).compile(graph, program, 1, (SHARDED, REPLICATED))(values)
    return np.asarray(found), np.asarray(errors) / float(errors[0])


def random_values(n_nodes, dtype=np.float32):
    return np.random.default_rng(0).normal(3, 1, (n_nodes, 3)).astype(dtype)


# The far, the near, and all through one node; the others are slow tests.
SOME_SLOW = tiny.all_but_slow(TOPOLOGIES, "ring", "exponential", "star")


@pytest.mark.parametrize("name", SOME_SLOW)
def test_the_spectral_gap_predicts_the_rounds(name):
    n_nodes = 9 if name == "torus" else 8
    graph = make_topology(name, n_nodes)
    found = spectrum(metropolis(graph))
    predicted = found.rounds(1e-6)
    with jax.enable_x64(True):
        start = 1 + np.outer(found.slowest, [1.0, -2.0])
        _, errors = gossip(graph, start, int(1.3 * predicted) + 3)
    reached = int(np.argmax(errors <= 1e-6))
    assert abs(reached - predicted) <= max(1, 0.2 * predicted)
    with jax.enable_x64(True):
        # From anywhere else it is an upper bound.
        _, errors = gossip(graph, random_values(n_nodes, np.float64), predicted)
    assert errors[-1] <= 1.0000001e-6


def test_float32_reaches_a_millionth_too():
    graph = make_topology("ring", 8)
    _, errors = gossip(graph, random_values(8), 120)
    assert errors[-1] < 1e-6


def test_nodes_that_agree_stay_to_the_bit():
    values = np.full((8, 3), 0.1, np.float32)
    found, _ = gossip(make_topology("star", 8), values, 20)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("name", "loss", "kind"),
    [
        pytest.param("star", 0.0, "symmetric", marks=pytest.mark.slow),
        ("ring", 0.3, "symmetric"),
        ("exponential", 0.3, "push_sum"),
    ],
)
def test_a_mesh_axis_and_a_vmap_axis_agree(name, loss, kind):
    graph, values = make_topology(name, 8), random_values(8)
    here, errors = gossip(graph, values, 25, kind, loss)
    there, errors_there = gossip(graph, values, 25, kind, loss, make_mesh(8))
    np.testing.assert_allclose(here, there, rtol=2e-5)
    np.testing.assert_allclose(errors, errors_there, rtol=0, atol=1e-5)


def test_failing_links_keep_the_mean_and_take_longer():
    graph, values = make_topology("ring", 8), random_values(8)
    with jax.enable_x64(True):
        values = values.astype(np.float64)
        found, errors = gossip(graph, values, 60, loss=0.3)
        _, without = gossip(graph, values, 60)
    np.testing.assert_allclose(found.mean(axis=0), values.mean(axis=0), rtol=1e-14)
    assert 10 * without[-1] < errors[-1] < 0.1


def masses_of(links, state):
    """The mass of all nodes and of all messages under way."""

    def missing(here, there, edge, heard):
        return jax.tree.map(jnp.subtract, there, heard), heard

    under_way, _ = links.exchange(state.sent, missing, state.heard)
    return [
        jnp.sum(held, axis=0) + jnp.sum(waiting, axis=0)
        for held, waiting in zip(
            jax.tree.leaves(state.mass), jax.tree.leaves(under_way), strict=True
        )
    ]


def test_no_mass_is_lost_whatever_is_lost():
    graph = make_topology("torus", 9)
    with jax.enable_x64(True):
        links, values = LocalLinks(graph), random_values(9, np.float64)
        averaging = push_sum(links, jax.random.key(5), 0.4)
        state = averaging.start(jnp.asarray(values))
        program = jax.jit(
            lambda state: run_rounds(
                averaging.round,
                state,
                80,
                record=lambda state: (masses_of(links, state), jnp.sum(state.mass[1])),
            )
        )
        state, ((values_kept, weights_kept), held) = program(state)
        np.testing.assert_allclose(values_kept, np.tile(values.sum(axis=0), (81, 1)), rtol=1e-12)
        np.testing.assert_allclose(weights_kept, 9, rtol=1e-12)
        # Some of it is under way: the nodes alone do not hold all.
        assert held.min() < 8.5
        # The average all the same, which lost mass would have moved.
        np.testing.assert_allclose(
            averaging.read(state), np.tile(values.mean(axis=0), (9, 1)), rtol=1e-8
        )


@pytest.mark.slow
def test_long_sums_in_float32_cost_resolution_but_no_mass():
    links, values = LocalLinks(make_topology("ring", 8)), 100 * random_values(8)
    averaging = push_sum(links, jax.random.key(5), 0.2)
    state, _ = jax.jit(lambda x: run_rounds(averaging.round, averaging.start(x), 5000))(values)
    held, weight = masses_of(links, state)
    np.testing.assert_allclose(held / weight, values.mean(axis=0), rtol=1e-5)
    # Sums of 5,000 rounds have numbers that are 5,000 times as large, and steps as coarse.
    found = averaging.read(state)
    np.testing.assert_allclose(found, np.tile(values.mean(axis=0), (8, 1)), rtol=5000 * 2**-23)


@pytest.mark.parametrize("kind", [pytest.param("symmetric", marks=pytest.mark.slow), "push_sum"])
def test_the_average_follows_changes(kind):
    graph = make_topology("hypercube", 8)
    with jax.enable_x64(True):
        values, change = random_values(8, np.float64), np.arange(24.0).reshape(8, 3)

        def program(links, values, change):
            averaging = KINDS[kind](links, None, 0.0)
            state, _ = run_rounds(averaging.round, averaging.start(values), 30)
            state = averaging.add(state, change)
            return averaging.read(run_rounds(averaging.round, state, 60)[0])

        found = Nodes().compile(graph, program, 2)(values, change)
    wanted = (values + change).mean(axis=0)
    np.testing.assert_allclose(found, np.tile(wanted, (8, 1)), rtol=1e-9)


@pytest.mark.parametrize("stays", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_node_that_leaves_hands_over_or_takes_along(stays):
    graph = make_topology("torus", 9)
    with jax.enable_x64(True):
        values = random_values(9, np.float64)
        links = LocalLinks(graph)
        averaging = push_sum(links, jax.random.key(1), 0.3)
        state, _ = run_rounds(averaging.round, averaging.start(jnp.asarray(values)), 4)
        masses = settle(links, state)
        np.testing.assert_allclose(masses[0].sum(axis=0), values.sum(axis=0))
        own = None if stays else values[4]
        smaller, masses, kept = leave(graph, masses, 4, own=own)
        assert kept.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
        assert smaller.n_nodes == 8
        rest = LocalLinks(smaller)
        averaging = push_sum(rest, jax.random.key(2), 0.3)
        state, _ = run_rounds(averaging.round, resume(rest, masses), 150)
        wanted = values.mean(axis=0) if stays else values[kept].mean(axis=0)
        np.testing.assert_allclose(averaging.read(state), np.tile(wanted, (8, 1)), rtol=1e-9)


def test_nobody_leaves_who_holds_the_graph_together():
    values, weights = random_values(5), np.ones(5, np.float32)
    with pytest.raises(UserError, match="node 1 has no path"):
        leave(make_topology("star", 5), (values, weights), 0)
    assert weights.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("star", "symmetric", 3),
        ("ring", "push_sum", 4),
        pytest.param("star", "push_sum", 4, marks=pytest.mark.slow),
        pytest.param("ring", "symmetric", 3, marks=pytest.mark.slow),
    ],
)
def test_bytes_by_formula_and_in_the_compiled_program(name, kind, numbers):
    graph = make_topology(name, 8)
    values = random_values(8)

    def program(links, values):
        averaging = KINDS[kind](links, None, 0.0)
        state, _ = run_rounds(averaging.round, averaging.start(values), 30)
        return averaging.read(state)

    compiled = Nodes(make_mesh(8)).compile(graph, program, 1).lower(values).compile()
    one = jax.ShapeDtypeStruct((numbers,), np.float32)
    assert bytes_per_round(graph, one) == 2 * graph.n_edges * numbers * 4
    assert measured_bytes(compiled) == bytes_per_round(graph, one)
    assert all_reduce_bytes(8, one) == 14 * numbers * 4


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(UserError, match="several nodes on a device are not built"):
        Nodes(make_mesh(4)).compile(make_topology("ring", 8), lambda links, x: x, 1)
