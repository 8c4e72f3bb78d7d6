"""Decentralised k-means against Lloyd's algorithm on all points; quantization; training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from sklearn.datasets import make_blobs

from jkmeans import kmeans
from jkmeans.consensus import training
from jkmeans.consensus import vq as decentralised_vq
from jkmeans.consensus.averaging import push_sum, symmetric
from jkmeans.consensus.graphs import make_topology
from jkmeans.consensus.kmeans import Shares, Trace, agreed_centroids, begin, iterate
from jkmeans.consensus.links import Nodes
from jkmeans.consensus.mixing import metropolis, spectrum
from jkmeans.consensus.tasks.data import order_of, stretches
from jkmeans.errors import UserError
from jkmeans.problems import make_problem
from jkmeans.sharding import BY_STEP, REPLICATED, SHARDED, make_mesh
from jkmeans.vq.simulation import Setting, deal, run
from jkmeans.vq.steps import make_steps

K = 5


@pytest.fixture(scope="module")
def points():
    # 163 do not divide by 8: padding.
    x, _ = make_blobs(163, 3, centers=6, cluster_std=2.0, random_state=1)
    return x.astype(np.float32)


def cluster(points, graph, first, n_iter, n_rounds, *, order="shuffled", loss=None, mesh=None):
    """Centroids [N, k, d], trace."""
    x = points[order_of(points, order, 0)]
    shares = Shares(*stretches(x, graph.n_nodes))
    mixing = metropolis(graph)

    def program(links, shares, first):
        averaging = symmetric(links, mixing)
        if loss is not None:
            averaging = push_sum(links, jax.random.key(2), loss)
        state = begin(averaging, shares, first)
        state, trace = iterate(
            links, averaging, shares, state, n_iter, n_rounds, spectrum(mixing).rate
        )
        return state.centroids, trace

    out = (SHARDED, Trace(REPLICATED, REPLICATED, REPLICATED, BY_STEP))
    compiled = Nodes(mesh).compile(graph, program, 2, out)
    return jax.tree.map(np.asarray, compiled(shares, np.tile(first, (graph.n_nodes, 1, 1))))


def lloyd(points, first, n_iter):
    return _lloyd(points, first, n_iter)


@jax.jit
def _lloyd(points, first, n_iter):
    return kmeans.lloyd(points, first, max_iter=n_iter, tol=-1.0, empty="keep")


@pytest.mark.parametrize("order", [pytest.param("shuffled", marks=pytest.mark.slow), "sorted"])
def test_with_enough_rounds_it_is_lloyd(points, order):
    graph, first = make_topology("ring", 8), points[:K]
    wanted = lloyd(points, first, 6)
    found, trace = cluster(points, graph, first, 6, 200, order=order)
    for node in found:
        np.testing.assert_allclose(node, wanted.centroids, rtol=1e-4)
        labels = np.asarray(kmeans.nearest(jnp.asarray(points), node))
        np.testing.assert_array_equal(labels, wanted.labels)
    # The inertia of an iteration is that of the centroids before it.
    for n_iter in range(6):
        before = float(lloyd(points, first, n_iter).inertia)
        assert trace.inertia[n_iter] == pytest.approx(before, rel=1e-5)


@pytest.mark.slow
def test_one_round_on_a_complete_graph_is_lloyd(points):
    found, trace = cluster(points, make_topology("complete", 8), points[:K], 8, 1)
    wanted = lloyd(points, points[:K], 8)
    np.testing.assert_allclose(found, np.tile(wanted.centroids, (8, 1, 1)), rtol=1e-4)
    assert trace.spread.shape == (8, 8)
    assert trace.spread.max() < 1e-4


def test_the_disagreement_stays_below_its_bound_and_fades(points):
    _, trace = cluster(points, make_topology("ring", 8), points[:K], 30, 6, order="sorted")
    # As long as it is more than rounding.
    seen = trace.disagreement > 1e-3
    assert seen.sum() > 5
    assert (trace.disagreement <= 1.0001 * trace.bound)[seen].all()
    # And the bound is no wide one.
    assert trace.bound[0] < 10 * trace.disagreement[0]
    assert trace.disagreement[-1] < 1e-3 * trace.disagreement[0]


@pytest.mark.parametrize("order", [pytest.param("shuffled", marks=pytest.mark.slow), "sorted"])
def test_lost_messages_do_not_move_it_far(points, order):
    end = float(lloyd(points, points[:K], 100).inertia)
    found, _ = cluster(points, make_topology("hypercube", 8), points[:K], 40, 12, order=order,
                       loss=0.2)  # fmt: skip
    for node in found:
        inertia = float(kmeans.assign(jnp.asarray(points), node).distances.sum())
        assert inertia == pytest.approx(end, rel=5e-3)


def test_an_empty_cluster_keeps_its_centroid(points):
    first = np.concatenate([points[: K - 1], np.full((1, 3), 1e3, np.float32)])
    found, _ = cluster(points, make_topology("torus", 9), first, 5, 8)
    np.testing.assert_array_equal(found[:, -1], np.full((9, 3), 1e3))
    assert np.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, 0.2])
def test_a_mesh_axis_and_a_vmap_axis_agree(points, loss):
    graph = make_topology("ring", 8)
    here, trace = cluster(points, graph, points[:K], 6, 5, loss=loss)
    there, other = cluster(points, graph, points[:K], 6, 5, loss=loss, mesh=make_mesh(8))
    np.testing.assert_allclose(here, there, rtol=2e-4)
    np.testing.assert_allclose(trace.inertia, other.inertia, rtol=1e-5)


def test_first_centroids_are_agreed_upon(points):
    graph = make_topology("torus", 9)
    shares = Shares(*stretches(points, 9))

    def program(links, shares):
        averaging = symmetric(links, metropolis(graph))
        return agreed_centroids(averaging, jax.random.key(1), shares, 4000, 60)

    found = np.asarray(Nodes().compile(graph, program, 1)(shares))
    np.testing.assert_allclose(found, np.tile(found[:1], (9, 1, 1)), atol=1e-4)
    np.testing.assert_allclose(found[0].mean(axis=0), points.mean(axis=0), atol=0.4)
    np.testing.assert_allclose(found[0].std(axis=0), points.std(axis=0), rtol=0.05)


def test_sorted_nodes_see_different_points(points):
    dealt, counted = stretches(points[order_of(points, "sorted", 0)], 8)
    assert counted.sum() == 163
    means = dealt.sum(axis=1) / counted.sum(axis=1)[:, None]
    others, _ = stretches(points[order_of(points, "shuffled", 0)], 8)
    assert means.std(axis=0).sum() > 2 * others.mean(axis=1).std(axis=0).sum()
    assert sorted(order_of(points, "sorted", 0)) == list(range(163))
    with pytest.raises(UserError, match="163 points for 200 nodes"):
        stretches(points, 200)


@pytest.mark.parametrize(
    "scheme", [pytest.param("averaging", marks=pytest.mark.slow), "displacements"]
)
def test_quantization_on_a_complete_graph_is_the_scheme_itself(points, scheme):
    samples, first = points[:160], points[:K]
    steps = ("constant", 0.05, 0.0)
    wanted = run(Setting(scheme, 8, 5, 1.0, steps, 60, 4), 0, first, samples)

    def program(links, shares, prototypes):
        return decentralised_vq.quantize_together(
            links,
            symmetric(links, metropolis(links.graph)),
            shares,
            prototypes,
            make_steps(*steps),
            gain=decentralised_vq.GAINS[scheme](8),
            tau=5,
            n_rounds=1,
            n_exchanges=3,
            n_evaluations=4,
        )

    graph = make_topology("complete", 8)
    found, trace = Nodes().compile(graph, program, 2)(deal(samples, 8), np.tile(first, (8, 1, 1)))
    np.testing.assert_allclose(found, np.tile(wanted.shared, (8, 1, 1)), rtol=1e-4)
    np.testing.assert_allclose(trace.distortion, wanted.distortion, rtol=1e-5)
    assert trace.spread.max() < 1e-4


@pytest.fixture(scope="module")
def digits():
    return make_problem(
        ConfigDict(
            {
                "data": {"name": "digits", "n_examples": 500},
                "problem": {"name": "multilayer_perceptron", "widths": (8,)},
            }
        )
    )


def trained(problem, graph, mode, n_steps, order="shuffled", mesh=None):
    optimizer = optax.sgd(0.1)

    def program(links, shares):
        state = training.begin(problem, optimizer, links, jax.random.key(0))
        state, _ = training.train(
            problem, optimizer, links, metropolis(graph), shares, state, jax.random.key(1),
            mode=mode, batch_size=16, n_steps=n_steps,
        )  # fmt: skip
        return state.parameters, jax.vmap(problem.error)(state.parameters)

    shares = training.deal_examples(problem, graph.n_nodes, order, 0)
    return jax.tree.map(np.asarray, Nodes(mesh).compile(graph, program, 1)(shares))


def test_training_on_a_complete_graph_is_all_reduce_training(digits):
    # A mean of steps of plain descent from one point is a step with the mean of gradients.
    graph = make_topology("complete", 8)
    by_gossip, _ = trained(digits, graph, "gossip", 20)
    by_reducing, _ = trained(digits, graph, "all_reduce", 20)
    for one, other in zip(jax.tree.leaves(by_gossip), jax.tree.leaves(by_reducing), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_gossip_helps_nodes_that_saw_few_classes(digits):
    graph = make_topology("torus", 9)
    _, together = trained(digits, graph, "gossip", 150, "sorted")
    _, alone = trained(digits, graph, "alone", 150, "sorted")
    assert together.mean() < alone.mean() - 0.2
    assert together.shape == (9,)


@pytest.mark.slow
def test_training_on_a_mesh_axis_and_a_vmap_axis_agree(digits):
    graph = make_topology("ring", 8)
    here, errors = trained(digits, graph, "gossip", 10)
    there, others = trained(digits, graph, "gossip", 10, mesh=make_mesh(8))
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(errors, others, atol=0.03)


def test_every_example_is_dealt_once(digits):
    shares = training.deal_examples(digits, 7, "sorted", 0)
    labels = shares.examples[1]
    dealt = np.concatenate([row[:n] for row, n in zip(labels, shares.counts, strict=True)])
    assert sorted(dealt) == sorted(digits.examples[1])
    assert (np.diff(dealt) >= 0).all()
    with pytest.raises(UserError, match=r"\d+ examples for 5000 nodes"):
        training.deal_examples(digits, 5000, "shuffled", 0)
