"""The asynchronous engine: the server and the worker loop without Ray, and kills with Ray."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from benchmarks.ray_exchanges import Hang, Killer
from configs import consensus_training
from configs.parallel_sgd import get_config
from jkmeans import ray_session
from jkmeans.asynchronous import Problem, curve, engine, gradients, quantization
from jkmeans.asynchronous.curve import CURVE_FILE, LAST_GOOD_FILE, SHOWN, Curve, follow
from jkmeans.asynchronous.journal import RECORD, Journal, read_history
from jkmeans.asynchronous.quantization import QuantizationJob, quantize_in_parallel
from jkmeans.asynchronous.rules import displacement_rule, gradient_rule
from jkmeans.asynchronous.server import (
    CHECKPOINT_FOLDER,
    DIVERGED,
    FINISHED,
    JOURNAL_FILE,
    STOPPED,
    ParameterServer,
    Reply,
)
from jkmeans.asynchronous.work import Work, gradient_work, quantization_work
from jkmeans.asynchronous.worker import work_on
from jkmeans.consensus import experiment
from jkmeans.errors import CollapseError, UserError
from jkmeans.experiment_folder import claim_settings
from jkmeans.interruption import Interrupted, Interruption
from jkmeans.sources.base import ArraySource
from jkmeans.vq import experiment as vq_experiment
from jkmeans.vq import make_steps

ONE = np.ones((2, 3), np.float32)


def serve(folder, **options):
    """A server of zeros [2, 3]."""
    options = {"n_workers": 2, "budget": 1000, "interval": 4} | options
    return ParameterServer(0 * ONE, options.pop("rule", displacement_rule()), folder, **options)


def give(server, worker, sequence, value=1.0, *, life=1, seen=0):
    return server.exchange(worker, life, sequence, value * ONE, seen, 10 * sequence)


def kill(server):
    """What the operating system does to one that is killed; the last save is complete or not."""
    server._journal.close()
    server._checkpoints.wait()


class InProcess:
    """A port to a server of this process, whose exchanges run in a thread."""

    def __init__(self, server):
        self.server = server
        self.thread = ThreadPoolExecutor(1)

    def enter(self, *arguments):
        return self.server.enter(*arguments)

    def exchange(self, *arguments):
        return self.thread.submit(self.server.exchange, *arguments)


def run_workers(server, work, reads, **options):
    """All workers to the end of the run, each in a thread."""
    with ThreadPoolExecutor(len(reads)) as pool:
        running = [
            pool.submit(work_on, worker, InProcess(server), work, read, **options)
            for worker, read in enumerate(reads)
        ]
        for one in running:
            one.result(timeout=60)


def test_displacements_are_subtracted_once(tmp_path):
    server = serve(tmp_path)
    server.enter(0, 1, 0)
    server.enter(1, 1, 0)
    first = give(server, 0, 1)
    assert first.accepted
    again = give(server, 0, 1)  # The same call, retried.
    assert again.accepted
    assert again.clock == first.clock == 1
    reply = give(server, 1, 1, 2.0)
    np.testing.assert_array_equal(reply.shared, -3 * ONE)
    assert (reply.clock, server.sequences, server.positions) == (2, [1, 1], [10, 10])
    server.close()
    read_history(tmp_path / JOURNAL_FILE).check_counted_once([1, 1])


def test_a_former_life_of_a_worker_is_refused(tmp_path):
    server = serve(tmp_path)
    server.enter(0, 1, 0)
    give(server, 0, 1)
    entry = server.enter(0, 2, 0)
    assert (entry.sequence, entry.position) == (1, 10)
    late = give(server, 0, 2, life=1)
    assert not late.accepted
    assert late.clock == 1
    assert give(server, 0, 2, life=2).accepted
    server.close()


def test_a_server_that_comes_back_loses_at_most_its_interval(tmp_path):
    server = serve(tmp_path, interval=4)
    server.enter(0, 1, 0)
    server.enter(1, 1, 0)
    for n in range(1, 12):
        give(server, 0, n)
    kill(server)
    back = serve(tmp_path, interval=4)
    assert 11 - 4 <= back.clock < 11
    kept = back.clock
    np.testing.assert_array_equal(back.snapshot()[0], -kept * ONE)
    # It knows no life, so what was under way is refused, whatever its number.
    for n in (kept, kept + 1, 12):
        assert not give(back, 0, n).accepted
    entry = back.enter(0, 1, 0)
    assert (entry.sequence, entry.position) == (kept, 10 * kept)
    assert give(back, 0, kept + 1).accepted
    history = read_history(tmp_path / JOURNAL_FILE)
    assert history.rolled_back == [0, 11 - kept]
    history.check_counted_once([kept + 1, 0])
    assert back.status().life == 2
    back.close()


def test_staleness_is_what_others_applied_meanwhile(tmp_path):
    server = serve(tmp_path)
    server.enter(0, 1, 0)
    server.enter(1, 1, 0)
    give(server, 0, 1, seen=0)
    give(server, 0, 2, seen=1)
    give(server, 1, 1, seen=0)
    server.close()
    np.testing.assert_array_equal(read_history(tmp_path / JOURNAL_FILE).staleness, [0, 0, 2])


def test_the_budget_ends_the_run_and_is_on_the_disk(tmp_path):
    server = serve(tmp_path, budget=25)
    server.enter(0, 1, 0)
    assert [give(server, 0, n).ended for n in (1, 2, 3)] == [False, False, True]
    late = give(server, 0, 4)
    assert late.ended
    assert not late.accepted
    kill(server)
    back = serve(tmp_path, budget=25)
    assert back.status().ended == FINISHED
    np.testing.assert_array_equal(back.snapshot()[0], -3 * ONE)
    back.close()


def test_a_version_that_diverges_is_not_taken(tmp_path):
    server = serve(tmp_path)
    server.enter(0, 1, 0)
    give(server, 0, 1)
    assert give(server, 0, 2, np.inf).ended
    shared, status = server.snapshot()
    assert status.ended == DIVERGED
    assert status.clock == 1
    np.testing.assert_array_equal(shared, -ONE)
    server.close()


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    server = serve(tmp_path, interval=100)
    server.enter(0, 1, 0)
    give(server, 0, 1)
    server.stop()
    assert server.status().ended == STOPPED
    server.close()
    back = serve(tmp_path, interval=100)
    assert (back.clock, back.status().ended) == (1, "")
    back.close()
    with pytest.raises(UserError, match="is of 2 workers, not 3"):
        serve(tmp_path, n_workers=3)


def test_a_damaged_checkpoint_is_put_aside(tmp_path, capsys):
    server = serve(tmp_path, interval=4)
    server.enter(0, 1, 0)
    for n in range(1, 7):
        give(server, 0, n)
    server.stop()
    server.close()
    newest = max((tmp_path / CHECKPOINT_FOLDER).iterdir(), key=lambda p: int(p.name))
    (newest / "_CHECKPOINT_METADATA").write_text("{}")
    back = serve(tmp_path, interval=4)
    assert "damaged" in capsys.readouterr().out
    assert 0 < back.clock < 6
    np.testing.assert_array_equal(back.snapshot()[0], -back.clock * ONE)
    back.close()


def test_a_record_that_was_cut_is_dropped(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.begin([0])
    journal.applied([(0, 1, 1, 0, 10)])
    journal.close()
    with open(tmp_path / "j", "ab") as file:
        file.write(b"x" * (RECORD.itemsize - 1))
    journal = Journal(tmp_path / "j")
    journal.begin([1])
    journal.applied([(0, 2, 2, 1, 10)])
    journal.close()
    history = read_history(tmp_path / "j")
    assert history.rolled_back == [0, 0]
    history.check_counted_once([2])
    with pytest.raises(RuntimeError, match="journal is wrong: it does not count 3"):
        history.check_counted_once([3])
    with pytest.raises(RuntimeError, match="journal is wrong: it counts 2 displacements, not 1"):
        history.check_counted_once([1])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: b"", "does not count 3 displacements from 1 on"),
        (lambda content: content[: -RECORD.itemsize], "does not count 3 displacements from 1 on"),
        (lambda content: b"x" + content[1:], "does not count 3 displacements from 1 on"),
        (
            lambda content: content[: -RECORD.itemsize] + b"\1" + content[1 - RECORD.itemsize :],
            "of worker 0 displacements 1 to 3 are not there once",
        ),
    ],
    ids=["gone", "cut", "begun by nobody", "of another worker"],
)
def test_a_damaged_journal_is_refused_before_anything_is_computed(tmp_path, damage, why):
    server = serve(tmp_path)
    server.enter(0, 1, 0)
    for n in range(1, 4):
        give(server, 0, n)
    server.stop()
    server.close()
    content = (tmp_path / JOURNAL_FILE).read_bytes()
    damaged = damage(content)
    (tmp_path / JOURNAL_FILE).write_bytes(damaged)
    with pytest.raises(UserError, match=rf"journal\.bin is damaged: .*{why}.*; accepted: the fi"):
        serve(tmp_path)
    assert (tmp_path / JOURNAL_FILE).read_bytes() == damaged
    (tmp_path / JOURNAL_FILE).write_bytes(content)
    serve(tmp_path).close()


def test_one_worker_that_waits_is_the_sequential_algorithm(tmp_path):
    rng = np.random.default_rng(0)
    samples, start = rng.normal(size=(40, 3)).astype(np.float32), 2 * ONE
    start = start + rng.normal(size=start.shape).astype(np.float32)
    server = ParameterServer(
        start, displacement_rule(), tmp_path, n_workers=1, budget=40, interval=100
    )
    work = quantization_work(make_steps("rational", 0.5, 0.1))
    run_workers(server, work, [lambda p, n: samples[p : p + n]], tau=8, ahead=0)
    expected = start.astype(np.float64)
    for t, z in enumerate(samples, 1):
        nearest = np.argmin(((expected - z) ** 2).sum(1))
        expected[nearest] += 0.5 / (1 + 0.1 * t) * (z - expected[nearest])
    shared, status = server.snapshot()
    assert status.sequences == [5]
    np.testing.assert_allclose(shared, expected, rtol=1e-5)
    server.close()


COUNTING = Work(
    start=lambda shared: 0.0,
    advance=lambda local, samples, t: local + float(samples.sum()),
    take=lambda local: (np.float32(local) * ONE, 0.0),
    receive=lambda local, shared: local,
    carries_over=True,
)
"""Counts samples: the sum of what is sent does not depend on who comes when."""


def test_workers_that_overlap_lose_no_displacement(tmp_path):
    server = serve(tmp_path, n_workers=3, budget=600)
    run_workers(server, COUNTING, [lambda p, n: np.ones(n)] * 3, tau=5, ahead=4)
    shared, status = server.snapshot()
    assert status.samples >= 600
    np.testing.assert_array_equal(shared, -status.samples * ONE)
    server.close()
    history = read_history(tmp_path / JOURNAL_FILE)
    history.check_counted_once(status.sequences)
    assert history.applied["samples"].sum() == status.samples
    assert (history.staleness >= 0).all()


class Script:
    """A server that answers when the worker waits, and whose clock is 10 ahead every time."""

    def __init__(self, n_exchanges):
        self.n_exchanges = n_exchanges
        self.seen = []

    def enter(self, *arguments):
        return Reply(True, False, 0 * ONE, 0, 0, 0)

    def exchange(self, worker, life, sequence, sent, seen, position):
        del worker, life, sent, position
        self.seen.append(seen)
        self.reply = Reply(True, sequence == self.n_exchanges, 0 * ONE, 10 * sequence, sequence, 0)
        return self

    def done(self):
        return False

    def result(self):
        return self.reply


@pytest.mark.parametrize(
    ("carries_over", "ahead", "seen"),
    [
        (True, 1, [0, 10, 20, 30]),
        (False, 0, [0, 10, 20, 30]),
        # A gradient computed while its forerunner was under way is of the version before.
        (False, 1, [0, 0, 10, 20]),
    ],
)
def test_a_worker_says_which_version_its_work_is_based_on(carries_over, ahead, seen):
    script = Script(4)
    work = COUNTING._replace(carries_over=carries_over)
    work_on(0, script, work, lambda p, n: np.ones(n), tau=1, ahead=ahead)
    assert script.seen == seen


def loss(parameters, batch):
    return jnp.mean((batch @ parameters["w"] - 1.0) ** 2)


def test_synchronous_rounds_are_steps_with_the_mean_gradient(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 24, 3)).astype(np.float32)
    start = {"w": np.zeros(3, np.float32)}
    rule = gradient_rule(optax.sgd(0.1, momentum=0.9))
    server = ParameterServer(
        start, rule, tmp_path, n_workers=2, budget=40, interval=4, synchronous=True
    )
    reads = [lambda p, n, own=own: own[np.arange(p, p + n) % 24] for own in x]
    run_workers(server, gradient_work(loss), reads, tau=4, ahead=0)
    w, momentum = np.zeros(3), np.zeros(3)
    for r in range(5):
        rows = x[:, np.arange(4 * r, 4 * r + 4) % 24].reshape(8, 3)
        momentum = 0.9 * momentum + 2 * rows.T @ (rows @ w - 1) / 8
        w = w - 0.1 * momentum
    shared, status = server.snapshot()
    assert (status.clock, status.sequences) == (10, [5, 5])
    np.testing.assert_allclose(shared["w"], w, rtol=1e-5)
    server.close()
    assert (read_history(tmp_path / JOURNAL_FILE).staleness == 0).all()
    # The optimizer's state comes back too.
    back = ParameterServer(
        start, rule, tmp_path, n_workers=2, budget=40, interval=4, synchronous=True
    )
    np.testing.assert_allclose(back._state[0].trace["w"], momentum, rtol=1e-5)
    back.close()


def test_every_example_is_seen_once_an_epoch_however_it_is_read():
    whole = gradients._Order(0, 1, 10).rows(0, 30)
    for epoch in whole.reshape(3, 10):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert (whole[:10] != whole[10:20]).any()
    pieces = gradients._Order(0, 1, 10)
    np.testing.assert_array_equal(
        np.concatenate([pieces.rows(start, 7) for start in range(0, 28, 7)]), whole[:28]
    )
    # As after a death: from the middle, without what came before.
    np.testing.assert_array_equal(gradients._Order(0, 1, 10).rows(13, 9), whole[13:22])


def own_problem(config):
    return Problem(lambda key: {"w": jnp.zeros(2)}, loss, np.ones((config.workers, 2)), sum)


def uneven_problem(config):
    return own_problem(config)._replace(examples=(np.ones(3), np.ones(4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem.name": "nothing"}, "config.problem.name is 'nothing'; accepted"),
        ({"problem.name": f"{__name__}:clusters"}, "which returns ndarray; accepted"),
        ({"problem.name": f"{__name__}:uneven_problem"}, r"of \[3, 4\] rows; accepted"),
        (
            {
                "problem.name": "multilayer_perceptron",
                "data.name": "digits",
                "data.n_examples": 5,
            },
            "config.data.n_examples is 5, of which none is held out; accepted: at least 6",
        ),
        (
            {
                "problem.name": "multilayer_perceptron",
                "data.name": "digits",
                "data.n_examples": 12,
                "workers": 12,
            },
            "config.workers is 12, but there are 10 examples; accepted: 1 to 10",
        ),
        ({"workers": 0}, "config.workers is 0; accepted: an integer of at least 1"),
        ({"ray.checkpoint_exchanges": 5}, "is 5, but a round has 3; accepted: at least 6"),
        ({"asynchronous.learning_rate": 0.0}, "learning_rate is 0.0; accepted: a number above 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, changes, message):
    config = get_config()
    config.problem.name = f"{__name__}:own_problem"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        gradients.run_sgd(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()  # So that the corrected command can have it.


def test_what_ray_fields_mean_is_said_in_the_words_of_each_experiment():
    of_sgd, of_vq = gradients.FIELDS, vq_experiment.FIELDS
    assert "batches a worker computes" in of_sgd["ray.ahead"].meaning
    assert of_sgd["ray.checkpoint_exchanges"].meaning.startswith("gradients that")
    assert "times tau samples a worker computes" in of_vq["ray.ahead"].meaning
    assert of_vq["ray.checkpoint_exchanges"].meaning.startswith("displacements that")
    # No experiment speaks of a field that is another's.
    assert not any("tau" in field.meaning.split() for field in of_sgd.values())


class _Begun(Exception):
    """Raised where a run would begin."""


@pytest.mark.parametrize("change", ["bits", "type", "name"])
def test_other_examples_in_the_same_folder_are_refused(tmp_path, monkeypatch, change):
    examples = {"x": np.ones((3, 2), np.float32)}

    def begin(*arguments):
        raise _Begun

    def problem(config):
        return Problem(lambda key: {"w": jnp.zeros(2)}, loss, dict(examples), sum)

    monkeypatch.setattr(sys.modules[__name__], "own_problem_of_now", problem, raising=False)
    monkeypatch.setattr(gradients, "_train", begin)
    monkeypatch.setattr(experiment, "_compute", begin)
    sgd, training = get_config(), consensus_training.get_config()
    training.graph.n_nodes, training.graph.topologies = 3, ("ring",)
    training.training.deals = ("shuffled",)
    for config in (sgd, training):
        config.problem.name = f"{__name__}:own_problem_of_now"

    def both_raise(error, sentence=None):
        with pytest.raises(error, match=sentence):
            gradients.run_sgd(sgd, tmp_path / "sgd")
        with pytest.raises(error, match=sentence):
            experiment.run_experiment(training, tmp_path / "training")

    both_raise(_Begun)
    both_raise(_Begun)
    if change == "bits":
        examples["x"] = np.array([[1, 1], [1, 1], [1, 1 + 2**-23]], np.float32)
    elif change == "type":
        examples["x"] = np.ones((3, 2))
    else:
        examples["y"] = examples.pop("x")
    both_raise(UserError, "the data are other ones; accepted: the same config, or another")


POINTS = [{"seconds": n / 2, "clock": n, "samples": 5 * n, "value": 2.0} for n in range(3)]


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"3\n", b'{"seconds": 1.0}\n', b'{"seco'])
def test_of_a_damaged_curve_the_whole_points_are_kept(tmp_path, damage):
    path = tmp_path / CURVE_FILE
    first, second, third = (json.dumps(point).encode() + b"\n" for point in POINTS)
    path.write_bytes(first + second + damage)
    assert Curve(path).points == POINTS[:2]
    assert path.read_bytes() == first + second
    path.write_bytes(first + damage.strip() + b"\n" + third)
    assert Curve(path).points == [POINTS[0], POINTS[2]]


@pytest.mark.parametrize("content", [b"", b'{"value"', b"[]", b"{}", b"\xff\xfe\x00"])
def test_damaged_results_are_made_again(tmp_path, monkeypatch, content):
    whole = dict.fromkeys(SHOWN, 1.0)

    def finish(*arguments, **options):
        return whole

    monkeypatch.setattr(quantization, "_quantize", finish)
    config = ConfigDict()
    arguments = corners_job(10), tmp_path / "vq", config, {}, clusters()
    quantize_in_parallel(*arguments)
    (tmp_path / "vq" / "results.json").write_bytes(content)
    assert quantize_in_parallel(*arguments) == whole

    def begin(*arguments, **options):
        raise _Begun

    monkeypatch.setattr(gradients, "follow", begin)
    config = get_config()
    config.problem.name = f"{__name__}:own_problem"
    folder = tmp_path / "sgd" / "asynchronous"
    for results, points in ((content, POINTS), (json.dumps(whole).encode(), [])):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_bytes(results)
        (folder / CURVE_FILE).write_text("".join(f"{json.dumps(point)}\n" for point in points))
        with pytest.raises(_Begun):
            gradients.run_sgd(config, tmp_path / "sgd")


# With Ray.

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='needs pip install "jkmeans[ray]"'
)

RAY_OPTIONS = {
    "address": "local",
    "checkpoint_exchanges": 40,
    "max_restarts": -1,
    "ahead": 2,
    "evaluate_seconds": 0.5,
    "patience_seconds": 2.0,
    "gpus_per_worker": 0.0,
}


@pytest.fixture(scope="module")
def ray():
    """One cluster for all tests; its processes are gone afterwards, whatever happens."""
    ray = ray_session.import_ray()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's threads and Ray's forks.
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR",
        )  # fmt: skip
    yield ray
    ray.shutdown()


def clusters(config=None):
    """Samples around four corners."""
    del config
    rng = np.random.default_rng(0)
    corners = np.array([[-4, -4], [-4, 4], [4, -4], [4, 4]], np.float32)
    return (corners[np.arange(400) % 4] + rng.normal(size=(400, 2))).astype(np.float32)


def corners_job(budget, n_workers=2):
    samples = clusters()
    return QuantizationJob(
        clusters, samples[:4], ("rational", 0.3, 0.01), n_workers, tau=5, budget=budget
    )


def distortion(shared):
    return float(np.mean(((clusters()[:, None] - shared[None]) ** 2).sum(-1).min(1)))


@needs_ray
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_survives_a_killed_worker_a_killed_server_and_a_worker_that_hangs(ray, tmp_path):
    victims = [0, "server", Hang(1)]
    killer = Killer(victims, 100)
    end = []

    def evaluate(shared, status, seconds):
        """Until all has happened, and the worker that is left has worked for a while."""
        if killer.killed == victims and not end:
            end.append(status.clock + 200)
        return not end or status.clock < end[0]

    options = ConfigDict(RAY_OPTIONS)
    outcome = engine.run(corners_job(10**9), tmp_path, options, evaluate=evaluate, watch=killer)
    # engine.run has compared the journal with the server's clock; once more, by hand.
    applied = outcome.history.applied
    assert outcome.status.clock == len(applied) == sum(outcome.status.sequences) >= end[0]
    numbers = set(zip(applied["worker"].tolist(), applied["sequence"].tolist(), strict=True))
    assert len(numbers) == len(applied)
    assert applied["samples"].sum() == outcome.status.samples
    assert len(outcome.history.rolled_back) == 2
    assert outcome.history.rolled_back[1] <= options.checkpoint_exchanges
    assert outcome.lives[0] >= 2
    assert outcome.missing == [1]
    best = distortion(np.array([clusters()[i::4].mean(0) for i in range(4)]))
    assert distortion(outcome.shared) < 1.1 * best


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_is_stopped_goes_on_and_loses_nothing(ray, tmp_path):
    job, options = corners_job(4000), ConfigDict(RAY_OPTIONS)

    def stop(status):
        if status.clock > 50 and not sent:
            sent.append(status.clock)  # A second signal would end the process.
            os.kill(os.getpid(), signal.SIGTERM)

    sent = []
    claim_settings(tmp_path, {"seed": 0}, ArraySource(clusters()).fingerprint())
    with pytest.raises(Interrupted):
        engine.run(job, tmp_path, options, evaluate=lambda *_: True, watch=stop)
    results = quantize_in_parallel(job, tmp_path, options, {"seed": 0}, clusters())
    assert results["rolled_back"] == 0
    assert results["server_lives"] == 2
    assert results["samples"] >= 4000
    assert sum(results["shares"]) == pytest.approx(1)
    assert results["value"] == pytest.approx(distortion(np.load(tmp_path / "prototypes.npy")))
    for name in ("staleness.png", "distortion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # What is there is not computed again; and not taken for something else.
    assert quantize_in_parallel(job, tmp_path, options, {"seed": 0}, clusters()) == results
    with pytest.raises(UserError, match="seed is 1 here and 0 there"):
        quantize_in_parallel(job, tmp_path, options, {"seed": 1}, clusters())
    with pytest.raises(UserError, match="the data are other ones"):
        quantize_in_parallel(job, tmp_path, options, {"seed": 0}, 2 * clusters())


def test_a_version_that_explodes_stops_the_run_and_the_last_good_one_is_kept(tmp_path, monkeypatch):
    def run(job, folder, options, *, evaluate, watch):
        server = serve(folder, n_workers=1)
        server.enter(0, 1, 0)
        for n, value in enumerate((1.0, 5.0, 500.0), 1):
            give(server, 0, n, value)
            shared, status = server.snapshot()
            going_on = evaluate(shared, status, float(n))
            assert going_on == (value < 500)
        server.close()
        return engine.Outcome(shared, status, read_history(folder / JOURNAL_FILE), [1], [], 3.0)

    monkeypatch.setattr(engine, "run", run)
    with pytest.raises(CollapseError, match="the size diverged after 3 exchanges"):
        follow(corners_job(1000), tmp_path, ConfigDict(), lambda w: abs(w).max(), name="size")
    np.testing.assert_array_equal(np.load(tmp_path / LAST_GOOD_FILE)["shared"], -6 * ONE)
    assert [point["value"] for point in Curve(tmp_path / CURVE_FILE).points] == [1, 6]


def test_a_first_version_that_cannot_be_judged_is_refused(tmp_path, monkeypatch):
    def run(job, folder, options, *, evaluate, watch):
        server = serve(folder, n_workers=1)
        try:
            return evaluate(*server.snapshot(), 0.0)
        finally:
            server.close()

    monkeypatch.setattr(engine, "run", run)
    with pytest.raises(UserError, match="the size of the first version is nan; accepted"):
        follow(corners_job(1000), tmp_path, ConfigDict(), lambda w: np.nan, name="size")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:1", "no Ray cluster at config.ray.address 'localhost:1' .*refused"),
        ("somewhere", "config.ray.address is 'somewhere'; accepted"),
        ("ray://localhost:1", "config.ray.address is 'ray://localhost:1'; accepted"),
    ],
)
def test_no_cluster_is_said_at_once(address, message):
    with pytest.raises(UserError, match=message):
        ray_session.find_cluster(address, "config.ray.address")


@needs_ray
def test_something_else_that_listens_is_no_cluster(monkeypatch):
    monkeypatch.setattr(ray_session, "_JOIN_SECONDS", 0.5)
    with socket.create_server(("localhost", 0)) as listener:
        address = f"localhost:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match="no cluster that has this machine in it"):
            ray_session.find_cluster(address, "config.ray.address")


@needs_ray
def test_an_address_of_a_cluster_that_is_gone_is_said(monkeypatch):
    monkeypatch.setattr(ray_session, "_JOIN_SECONDS", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", "localhost:1")
    with pytest.raises(UserError, match=r"at config\.ray\.address 'auto' .*RAY_ADDRESS names"):
        ray_session.find_cluster("auto", "config.ray.address")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "jkmeans\[ray\]"'):
        ray_session.import_ray()


@needs_ray
@pytest.mark.slow
def test_twenty_random_kills_change_nothing_but_the_time(tmp_path):
    flags = "--kills 20 --kill-every 100 --undisturbed 1 --budget 200000 --ahead 1"
    path = tmp_path / "result.json"
    program = [sys.executable, "-m", "benchmarks.ray_exchanges", "--json", str(path)]
    subprocess.run([*program, *flags.split()], check=True, timeout=1200)
    result = json.loads(path.read_text())
    disturbed, (undisturbed,) = result["disturbed"], result["undisturbed"]
    assert len(disturbed["killed"]) == 20
    assert max(disturbed["rolled_back"]) <= 500
    assert disturbed["samples"] >= 200_000
    # Undisturbed runs differ by up to 5 % among themselves: who is when is by chance.
    assert disturbed["distortion"] == pytest.approx(undisturbed["distortion"], rel=0.08)


def test_ray_is_not_imported_with_the_package():
    program = "import sys, jkmeans, jkmeans.asynchronous; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


class _Deaf:
    """Ray as far as `ray_session.session` needs it; SIGTERM comes while it begins."""

    def __init__(self, number):
        self.number, self.n_shutdowns = number, 0
        self.utils = SimpleNamespace(set_sigterm_handler=partial(signal.signal, signal.SIGTERM))
        self._private = SimpleNamespace(utils=self.utils)

    def is_initialized(self):
        return False

    def init(self, **options):
        # What Ray does, and what an exception comes to in a callback.
        self.utils.set_sigterm_handler(lambda number, frame: sys.exit(number))
        with contextlib.suppress(SystemExit):
            if self.number:
                os.kill(os.getpid(), self.number)

    def shutdown(self):
        self.n_shutdowns += 1


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
def test_sigterm_while_ray_begins_is_heard(monkeypatch, number):
    ray, before = _Deaf(number), signal.getsignal(signal.SIGTERM)
    theirs = ray.utils.set_sigterm_handler
    monkeypatch.setattr(ray_session, "import_ray", lambda: ray)
    if number:
        with pytest.raises(Interrupted) as caught, ray_session.session("local", 1):
            pass
        assert caught.value.exit_status == 143
    else:
        with ray_session.session("local", 1):
            assert signal.getsignal(signal.SIGTERM) == before  # Not that of Ray.
    assert ray.n_shutdowns == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert ray.utils.set_sigterm_handler is theirs


def test_an_ignored_sigterm_stays_so(monkeypatch):
    monkeypatch.setattr(ray_session, "import_ray", lambda: _Deaf(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ray_session.session("local", 1):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_whoever_listens_hears_the_sigterm_too(monkeypatch):
    monkeypatch.setattr(ray_session, "import_ray", lambda: _Deaf(signal.SIGTERM))
    with Interruption() as interruption:
        with pytest.raises(Interrupted), ray_session.session("local", 1):
            pass
        assert interruption.requested


@pytest.mark.parametrize("value", [0, 0.0001, 0.5, 1, 1.0, 3])
def test_gpus_that_can_be_dealt(value):
    assert ray_session.gpus_of_worker(value) == value


@pytest.mark.parametrize("value", [-1, 1e-5, 1.5, float("nan"), float("inf"), True, "1", None])
def test_gpus_that_cannot_be_dealt(value):
    with pytest.raises((TypeError, ValueError)):
        ray_session.gpus_of_worker(value)


def test_a_cluster_without_room_is_refused():
    ray = types.SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0})
    assert [ray_session.room_for_workers(ray, n) for n in (0.0, 0.25, 0.5, 1.0, 2.0)] == [
        4, 4, 2, 1, 0,
    ]  # fmt: skip
    ray_session.refuse_no_room(ray, 1.0, "less")
    with pytest.raises(UserError, match=r"4 CPUs and 1 GPUs, .* 2 GPUs has room .*accepted: less"):
        ray_session.refuse_no_room(ray, 2.0, "less")


def test_progress_begins_anew_where_samples_are_taken_back(monkeypatch, capsys):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(curve.time, "monotonic", lambda: next(now))
    progress = curve._Progress(10_000, "distortion")
    for samples in (1000, 2000, 500, 600):
        progress.tell(SimpleNamespace(samples=samples, ended=""), 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert ["samples/s" in line for line in lines] == [False, True, False, True]
    assert "100 samples/s" in lines[1]
    assert "10 samples/s, 15m 40s left" in lines[3]
