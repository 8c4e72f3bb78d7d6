"""The experiments on consensus: files, resuming, answers to bad input."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from configs import (
    consensus_kmeans,
    consensus_least_squares,
    consensus_sensors,
    consensus_training,
    consensus_vq,
)
from jkmeans.consensus.experiment import run_experiment, validate
from jkmeans.consensus.tasks import estimation
from jkmeans.consensus.tasks.base import Check, number_of_nodes, rounds_to, tables
from jkmeans.errors import CollapseError, UserError
from jkmeans.interruption import Interrupted, Interruption


def small(module=consensus_least_squares):
    config = module.get_config()
    config.graph.n_nodes = 4
    config.graph.topologies = ("ring", "star")
    if module is consensus_least_squares:
        config.estimation.methods = ("gradient_descent", "gradient_tracking")
        config.estimation.max_rounds = 1000
        return config
    config.data.input = "digits"
    config.data.n_samples = 200
    config.data.n_features = 4
    config.graph.topologies = ("ring",)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("consensus")
    return workdir, run_experiment(small(), workdir)


def test_estimation_leaves_pictures_tables_and_results(finished):
    workdir, results = finished
    assert results == json.loads((workdir / "results.json").read_text())
    for name in ("gossip", "estimation", "network"):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    ring, star = results["gossip"]
    assert abs(ring["rounds, slowest start"] - ring["rounds, predicted"]) <= 1
    # Four edges, both ways, two numbers of eight bytes; this process has eight devices.
    assert ring["bytes a round"] == ring["bytes a round, compiled"] == 4 * 2 * 2 * 8
    assert star["bytes a round"] == star["bytes a round, compiled"] == 3 * 2 * 2 * 8
    # Of the methods, all-reducing knows no topology.
    central, *tracked = results["estimation"]
    assert [row["topology"] for row in results["estimation"]] == ["all-reduce", "ring", "star"]
    for row in tracked:
        assert row["error, worst node"] < 1e-5
        # Two exchanges a round.
        assert row["bytes a round"] == row["bytes a round, compiled"]
    assert tracked[0]["bytes a round"] == 2 * ring["bytes a round"]
    assert central["bytes a round"] == 2 * 3 * 2 * 8
    with open(workdir / "estimation.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["error, worst node"]) == tracked[0]["error, worst node"]
    assert "| gradient_tracking | star |" in (workdir / "estimation.md").read_text()


def test_a_resumed_experiment_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    workdir, results = finished
    made = []
    compute = estimation._Work.gossip

    def compute_and_count(self, name, start, check):
        made.append((name, start))
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, name, start, check)

    monkeypatch.setattr(estimation._Work, "gossip", compute_and_count)
    with pytest.raises(Interrupted) as caught:
        run_experiment(small(), tmp_path)
    assert caught.value.exit_status == 143
    done = sorted(path.name for path in tmp_path.glob("cases/*.npz"))
    assert done == ["gossip_ring_random.npz", "gossip_ring_slowest.npz"]
    # One that is cut in half is made again.
    damaged = tmp_path / "cases" / done[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    made.clear()
    made += [None] * 3
    assert run_experiment(small(), tmp_path) == results
    assert made[3:] == [("ring", "random"), ("star", "slowest"), ("star", "random")]
    for name in ("gossip.csv", "estimation.csv"):
        assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes()


def test_another_config_or_graph_is_refused(finished, tmp_path):
    workdir, _ = finished
    config = small()
    config.estimation.noise = 0.1
    with pytest.raises(UserError, match=r"estimation\.noise is 0\.1 here and 0\.5 there"):
        run_experiment(config, workdir)
    with pytest.raises(UserError, match=r"another config|not the config"):
        run_experiment(small(consensus_kmeans), workdir)


@pytest.mark.slow
def test_kmeans_on_digits(tmp_path):
    config = small(consensus_kmeans)
    config.kmeans.n_clusters, config.kmeans.n_iter = 3, 30
    config.kmeans.deals = ("sorted",)
    results = run_experiment(config, tmp_path / "kmeans")
    assert [row["lost"] for row in results["kmeans"]] == ["none", "20% messages"]
    for row in results["kmeans"]:
        assert abs(row["worst node on all points, %"]) < 0.5
        assert row["bytes a round"] == row["bytes a round, compiled"]
    for name in ("kmeans", "disagreement", "network"):
        assert (tmp_path / "kmeans" / f"{name}.png").exists()


def small_kmeans(folder, rows, **fields):
    np.save(folder / "x.npy", np.asarray(rows, np.float32))
    config = small(consensus_kmeans)
    config.data.input = str(folder / "x.npy")
    config.data.n_samples = config.data.n_features = 0
    config.kmeans.n_clusters, config.kmeans.n_iter, config.loss.messages = 3, 3, 0.0
    config.update_from_flattened_dict(fields)
    return config


def test_kmeans_of_points_in_one_place(tmp_path):
    config = small_kmeans(tmp_path, np.full((40, 3), 0.3))  # Which no mean hits exactly.
    for row in run_experiment(config, tmp_path / "w")["kmeans"]:
        # Of nothing there are no percentages.
        assert row["inertia of all, %"] is row["worst node on all points, %"] is None
        assert row["disagreement"] < 1e-6
    assert (tmp_path / "w" / "results.json").exists()


@pytest.mark.parametrize("n_features", [0, 2])
def test_kmeans_of_values_whose_squares_overflow(n_features, tmp_path):
    rows = 1e25 * np.random.default_rng(0).normal(size=(40, 3))
    config = small_kmeans(tmp_path, rows, **{"data.n_features": n_features})
    with pytest.raises(UserError, match=r"overflow float32; accepted: rows scaled down") as caught:
        run_experiment(config, tmp_path / "w")
    # Principal components are of float32.
    assert ("float64" in str(caught.value)) == (n_features == 0)


def test_kmeans_of_nodes_that_hear_next_to_nothing(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 3))
    fields = {"loss.messages": 0.99, "kmeans.rounds": 400, "kmeans.deals": ("shuffled",)}
    with pytest.raises(CollapseError, match=r"lost their centroids on ring, 99% .* shuffled"):
        run_experiment(small_kmeans(tmp_path, rows, **fields), tmp_path / "w")
    assert (tmp_path / "w" / "kmeans.md").exists()
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["kmeans"][-1]["inertia of all, %"] is None


def test_what_diverges_is_written_and_said(tmp_path):
    config = small(consensus_vq)
    config.vq.n_clusters, config.vq.duration, config.vq.n_evaluations = 2, 200, 4
    config.vq.steps.name, config.vq.steps.a, config.vq.scheme = "constant", 3.0, "displacements"
    config.vq.deals = ("shuffled",)
    with pytest.raises(CollapseError, match="diverged on ring with samples shuffled; accepted"):
        run_experiment(config, tmp_path)
    (row,) = json.loads((tmp_path / "results.json").read_text())["vq"]
    assert row["distortion"] is None
    with open(tmp_path / "vq.csv") as file:
        (cells,) = csv.DictReader(file)
    assert cells["distortion"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_vq_in_float64(tmp_path, lost):
    config = small(consensus_vq)
    config.vq.n_clusters, config.vq.duration, config.vq.n_evaluations = 3, 120, 2
    config.vq.deals = ("shuffled",)
    config.loss.messages = lost
    (single,) = run_experiment(config, tmp_path / "float32")["vq"]
    config.precision = "float64"
    (double,) = run_experiment(config, tmp_path / "float64")["vq"]
    assert double["distortion"] == pytest.approx(single["distortion"], rel=1e-2)
    assert double["distortion"] != single["distortion"]


@pytest.mark.slow
def test_vq_and_training_as_experiments(tmp_path):
    config = small(consensus_vq)
    config.vq.n_clusters, config.vq.duration, config.vq.n_evaluations = 5, 200, 4
    config.vq.deals = ("shuffled",)
    (row,) = run_experiment(config, tmp_path / "vq")["vq"]
    assert row["bytes a round"] == row["bytes a round, compiled"]
    assert (tmp_path / "vq" / "vq.png").exists()
    config = consensus_training.get_config()
    config.graph.n_nodes, config.graph.topologies = 4, ("ring",)
    config.data.name, config.data.n_examples = "digits", 400
    config.problem.widths = (8,)
    rows = run_experiment(config, tmp_path / "training")["training"]
    assert [row["training"] for row in rows[:3]] == ["all-reduce", "gossip on ring", "alone"]
    assert rows[1]["bytes a step"] == rows[1]["bytes a step, compiled"]
    assert (tmp_path / "training" / "training.png").exists()


@pytest.mark.parametrize(
    "module",
    [
        consensus_least_squares,
        consensus_sensors,
        consensus_kmeans,
        consensus_vq,
        consensus_training,
    ],
)
def test_configs_are_complete(module):
    validate(module.get_config())


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({"graph.n_nodes": 12, "graph.topologies": ("hypercube",)}, "a power of two"),
        ({"graph.n_nodes": 14, "graph.topologies": ("torus",)}, "at least 3, such as 9"),
        ({"graph.topologies": ("ring", "ring")}, "a tuple of some of 'ring'"),
        ({"graph.topologies": ("geometric",), "graph.radius": 0.01}, "a radius above 0.01"),
        ({"graph.topologies": ("edges",)}, "a file, for topology 'edges'"),
        ({"graph.mixing": "given"}, "'metropolis' or 'maximum_degree'"),
        ({"graph.radius": 0.5}, "0"),
        ({"graph.n_nodes": 0}, "at least 2, or 0"),
        ({"nodes": "mesh", "graph.n_nodes": 16}, "one device for each node"),
        ({"loss.links": 1.0}, "at least 0 and below 1"),
        ({"loss.messages": 0.2}, "0, or loss.links"),
        ({"loss.links": 0.2, "estimation.methods": ("extra",)}, "the other methods, or 0"),
        ({"estimation.step": 0.2}, "below its stability bound"),
        ({"estimation.x": (8.0,)}, "as many"),
        ({"estimation.matrix": ((5.0, 1.0), (1.0,))}, "rows of equally many numbers"),
        ({"estimation.matrix": ((5.0, 1.0),)}, "more nodes or measurements"),
        ({"estimation.noise": -1.0}, "at least 0"),
        ({"estimation.x": (0.0, 0.0), "estimation.noise": 0.0}, "an x that is not 0"),
        ({"task": "sorting"}, "'estimation', 'kmeans'"),
        ({"gossip.tolerance": 0.0}, "above 0"),
        ({"gossip.tolerance": 1e300}, "above 0 and below 1"),
        ({"estimation.tolerance": 1.0}, "above 0 and below 1"),
        ({"estimation.matrix": ((1e-200, 0.0), (0.0, 1e-200))}, "not all so small"),
    ],
)
def test_bad_input_is_answered_before_anything_is_made(tmp_path, fields, accepted):
    config = small()
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match="accepted") as caught:
        run_experiment(config, tmp_path / "w")
    assert accepted in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_vector_quantization_loses_links_or_messages(tmp_path):
    config = small(consensus_vq)
    config.loss.links, config.loss.messages = 0.1, 0.2
    with pytest.raises(UserError, match=r"links is 0\.1 and .*messages is 0\.2; accepted: one of"):
        run_experiment(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_edges_of_a_file_that_fall_apart_are_refused(tmp_path):
    (tmp_path / "edges.txt").write_text("0 1\n2 3\n")
    config = small()
    config.graph.topologies, config.graph.n_nodes = ("edges",), 0
    config.graph.edges = str(tmp_path / "edges.txt")
    with pytest.raises(UserError, match=r"nodes 0, 1 \(2 of 4\) have no path"):
        run_experiment(config, tmp_path / "w")


def test_rounds_to_an_error():
    assert rounds_to(np.array([1, 0.1, 0.3, 0.01, 0.001]), 0.1) == 3
    assert rounds_to(np.array([1, 0.1]), 0.01) is None
    assert rounds_to(np.array([0.0, 0.0]), 0.01) == 0
    assert rounds_to(np.array([1, np.nan]), 0.01) is None


def test_tables():
    markdown, comma = tables(
        "T", "Text.", [{"a": "x", "b": 1234}, {"a": "y", "b": None, "c": 1e-9}]
    )
    assert "| x | 1,234 | – |" in markdown
    assert "| y | – | 1.00e-09 |" in markdown
    assert comma.splitlines() == ["a,b,c", "x,1234,", "y,,1e-09"]


@pytest.mark.slow
def test_launcher_answers_in_a_sentence(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.consensus",
            "--config=configs/consensus_least_squares.py", f"--workdir={tmp_path / 'w'}",
            "--config.graph.n_nodes=10",
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "consensus: the topology 'torus' does not fit 10 nodes; accepted: a product of two "
        "integers of at least 3, such as 9, 12, 15 or 16\n"
    )
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("method", ["gradient_tracking", "decentralised_descent"])
def test_rounds_in_which_no_link_works_are_no_standstill(method, tmp_path):
    """Of one link that fails nine times in ten, many rounds in a row; it then went on no more."""
    config = small()
    config.seed = 1
    config.graph.n_nodes, config.graph.topologies = 2, ("complete",)
    config.loss.links, config.estimation.methods = 0.9, (method,)
    (found,) = run_experiment(config, tmp_path)["estimation"]
    assert found["error, worst node"] < 1e-5


def test_no_more_rounds_than_asked_for(tmp_path):
    config = small()
    config.estimation.max_rounds = 13
    results = run_experiment(config, tmp_path)
    assert {row["rounds"] for row in results["estimation"]} == {13}


def test_a_standstill_is_seen_in_as_many_rounds_as_it_takes():
    falling, still = np.geomspace(1, 0.1, 10), np.full(10, 0.1)
    assert not estimation._stands_still([np.ones(1), falling], 10)
    assert estimation._stands_still([np.ones(1), falling, still], 10)
    assert not estimation._stands_still([np.ones(1), falling, still], 15)
    assert estimation._stands_still([np.ones(1), falling, still, still], 15)
    assert not estimation._stands_still([still], 15)


@pytest.mark.parametrize("module", [consensus_least_squares, consensus_kmeans])
def test_a_loss_with_which_an_average_takes_for_ever_is_refused(module, tmp_path):
    config = small(module)
    config.loss.links = 1 - 1e-10
    config.loss.messages = 0.0
    if module is consensus_least_squares:
        config.estimation.methods = ("gradient_tracking",)
    with pytest.raises(UserError, match=r"config\.loss\.links is 0\.99.* rounds; accepted: what"):
        run_experiment(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_nodes_on_a_mesh_are_as_many_as_the_file_of_edges_names(tmp_path):
    (tmp_path / "edges").write_text("0 1\n1 2\n2 3\n3 0\n")
    config = small()
    config.graph.topologies, config.graph.edges = ("edges",), str(tmp_path / "edges")
    config.graph.n_nodes, config.nodes = 0, "mesh"
    assert number_of_nodes(config) == 4
    (gossip,) = run_experiment(config, tmp_path / "w")["gossip"]
    assert gossip["nodes"] == 4
    (tmp_path / "edges").write_text("".join(f"{i} {i + 1}\n" for i in range(8)))
    with pytest.raises(UserError, match="'mesh' with 9 nodes, but JAX sees 8 devices"):
        run_experiment(config, tmp_path / "x")


def test_signals_are_heard_while_a_case_is_computed(capsys):
    class Slow:
        """An array that is there after it was waited for, and a signal came."""

        waited = 0

        def is_ready(self):
            self.waited += 1
            if self.waited == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.waited > 4

        def __array__(self, dtype=None, copy=None):
            return np.ones(3)

    with Interruption() as interruption:
        check = Check(interruption)
        check()
        np.testing.assert_array_equal(check.fetch(Slow()), np.ones(3))
        with pytest.raises(Interrupted):
            check()
    assert capsys.readouterr().err.count("once more to stop at once") == 1
