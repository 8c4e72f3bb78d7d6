"""Decentralised estimation against the closed form; the bounds of steps; links that fail."""

import jax
import numpy as np
import pytest

from jkmeans.consensus.averaging import deviation, run_rounds
from jkmeans.consensus.estimation import (
    METHODS,
    LeastSquares,
    biased_limit,
    check_step,
    closed_form,
    curvature,
    exercise,
    largest_step,
    make_method,
    sensors,
    suggested_step,
)
from jkmeans.consensus.graphs import TOPOLOGIES, make_topology
from jkmeans.consensus.links import Nodes
from jkmeans.consensus.mixing import metropolis
from jkmeans.errors import UserError
from jkmeans.sharding import REPLICATED, SHARDED, make_mesh
from tests import tiny

MATRIX = np.array([[5.0, 1.0], [1.0, 4.0]])
EXACT = ("gradient_tracking", "extra")
EXACT_FIRST = tiny.all_but_slow(METHODS, *EXACT)


def run(graph, problem, name, n_rounds, step=None, loss=0.0, mesh=None, start=None):
    """Each node's estimate after so many rounds, and relative errors; in float64."""
    mixing, optimum = metropolis(graph), closed_form(problem)
    if step is None:
        step = suggested_step(name, curvature(problem), mixing)

    def program(links, a, y, x, optimum):
        gradient = LeastSquares(a, y).gradient
        key = jax.random.key(0) if loss else None
        method = make_method(name, links, mixing, gradient, step, key=key, loss=loss)
        state, errors = run_rounds(
            method.round,
            method.start(x),
            n_rounds,
            record=lambda state: deviation(links, state.x, optimum),
        )
        return state.x, errors

    with jax.enable_x64(True):
        start = np.zeros((graph.n_nodes, len(optimum))) if start is None else start
        compiled = Nodes(mesh).compile(graph, program, 3, (SHARDED, REPLICATED))
        x, errors = compiled(*problem, start, optimum)
        return np.asarray(x), np.asarray(errors) / np.linalg.norm(optimum)


def of_exercise(graph):
    return exercise(graph, MATRIX, np.array([8.0, 2.0]), 0.5, seed=0)


def test_the_exercise_by_hand():
    # Two nodes, a row each, without noise: the closed form solves A x = y.
    problem = exercise(make_topology("path", 2), MATRIX, np.array([8.0, 2.0]), 0.0, seed=0)
    assert problem.measured.ravel().tolist() == [42, 16]
    assert closed_form(problem) == pytest.approx([8, 2])
    found = curvature(problem)
    # ½ AᵀA = [[13, 4.5], [4.5, 8.5]]; the rows have squared lengths 26 and 17.
    assert found.mean == pytest.approx(10.75 + np.hypot(2.25, 4.5))
    assert found.least == pytest.approx(10.75 - np.hypot(2.25, 4.5))
    assert found.node == pytest.approx(26)


def test_the_closed_form_is_numpys():
    problem, x = sensors(make_topology("ring", 50), 5, 0.1, seed=2)
    theirs = np.linalg.lstsq(problem.matrix[:, 0], problem.measured[:, 0], rcond=None)[0]
    assert closed_form(problem) == pytest.approx(theirs)
    assert np.abs(theirs - x).max() < 0.2
    with pytest.raises(UserError, match="determine 3 of 5 unknowns"):
        closed_form(LeastSquares(problem.matrix[:3], problem.measured[:3]))


@pytest.mark.parametrize("name", tiny.all_but_slow(TOPOLOGIES, "ring", "exponential", "star"))
def test_exact_methods_reach_the_closed_form(name):
    graph = make_topology(name, 9 if name == "torus" else 8)
    for method in EXACT:
        _, errors = run(graph, of_exercise(graph), method, 1500)
        assert errors[-1] < 1e-5


def test_plain_descent_stops_where_theory_says_and_the_step_halves_its_bias():
    graph = make_topology("ring", 8)
    problem, mixing = of_exercise(graph), metropolis(graph)
    biases = []
    for step in (0.01, 0.005):
        x, errors = run(graph, problem, "decentralised_descent", 1500, step)
        np.testing.assert_allclose(x, biased_limit(problem, mixing, step), rtol=1e-8)
        biases.append(errors[-1])
    assert biases[0] > 100 * 1e-5
    assert biases[1] / biases[0] == pytest.approx(0.5, abs=0.15)


def test_all_reducing_is_gradient_descent():
    graph = make_topology("ring", 8)
    problem = of_exercise(graph)
    step = 0.05
    x, wanted = np.zeros(2), closed_form(problem)
    a, y = problem.matrix[:, 0], problem.measured[:, 0]
    for _ in range(7):
        x = x - step * a.T @ (a @ x - y) / 8
    found, _ = run(graph, problem, "gradient_descent", 7, step)
    np.testing.assert_allclose(found, np.tile(x, (8, 1)), rtol=1e-12)
    assert run(graph, problem, "gradient_descent", 60)[1][-1] < 1e-9
    assert np.linalg.norm(x - wanted) > 1e-6


@pytest.mark.parametrize("name", EXACT_FIRST)
def test_steps_below_the_bound_are_stable_and_those_beyond_it_are_not(name):
    # All rows of one direction and length: there the bounds are tight.
    graph = make_topology("ring", 8)
    problem = LeastSquares(np.full((8, 1, 1), 2.0), np.zeros((8, 1)))
    found, mixing = curvature(problem), metropolis(graph)
    start = np.random.default_rng(0).normal(size=(8, 1))
    sizes = []
    for factor in (0.98, 1.05):
        step = factor * largest_step(name, found, mixing)
        optimum_at_0 = LeastSquares(problem.matrix, problem.measured + 1e-12)
        x, _ = run(graph, optimum_at_0, name, 1200, step, start=start)
        sizes.append(np.abs(x).max())
    assert sizes[0] < 2
    # EXTRA's bound is of all functions; on these it is stable a little beyond.
    assert sizes[1] > 1e3 or name == "extra"


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("ring", "star")), "exponential"]
)
def test_uneven_nodes_are_stable_below_the_bound_too(name):
    graph = make_topology(name, 8)
    problem, _ = sensors(graph, 3, 0.5, seed=4)
    for method in EXACT:
        step = 0.98 * largest_step(method, curvature(problem), metropolis(graph))
        _, errors = run(graph, problem, method, 1500, step)
        assert errors[-1] < 1
        assert errors[-1] <= errors[300]


def test_a_step_beyond_the_bound_is_refused_with_the_bound():
    graph = make_topology("hypercube", 16)
    found, mixing = curvature(of_exercise(graph)), metropolis(graph)
    with pytest.raises(UserError, match=r"is 0\.0154; accepted: above 0 and below .* 0\.01538"):
        check_step("extra", 0.0154, found, mixing)
    check_step("extra", 0.0153, found, mixing)
    check_step("gradient_tracking", 2 / 26.1, found, mixing)
    with pytest.raises(UserError, match=r"0\.07692"):
        check_step("gradient_tracking", 2 / 25.9, found, mixing)


def test_tracking_stands_links_that_fail():
    graph = make_topology("hypercube", 8)
    _, errors = run(graph, of_exercise(graph), "gradient_tracking", 600, loss=0.2)
    assert errors[-1] < 1e-5
    with pytest.raises(UserError, match="EXTRA does not stand"):
        run(graph, of_exercise(graph), "extra", 10, loss=0.2)


@pytest.mark.parametrize("name", EXACT_FIRST)
def test_a_mesh_axis_and_a_vmap_axis_agree(name):
    graph = make_topology("star", 8)
    problem = of_exercise(graph)
    here, _ = run(graph, problem, name, 40)
    there, _ = run(graph, problem, name, 40, mesh=make_mesh(8))
    np.testing.assert_allclose(here, there, rtol=1e-12)
