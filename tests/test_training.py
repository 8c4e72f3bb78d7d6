"""Whole runs: resumed, killed, moved, damaged, collapsed; labels that must not matter."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from jkmeans import datasets, training
from jkmeans.checkpoints import Checkpoints
from jkmeans.errors import CollapseError, UserError
from jkmeans.feeding import HostFeeder
from jkmeans.interruption import Interrupted
from jkmeans.recorder import Recorder, read_metrics
from jkmeans.training import collapse
from jkmeans.training.folder import describe_data, is_same_data
from tests import tiny
from tests.test_epoch import make_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path):
    """The blobs as .npy files, and changes to a config that name them."""
    examples, labels = tiny.blobs()
    np.save(tmp_path / "x.npy", examples)
    np.save(tmp_path / "y.npy", labels)
    return {
        "data__path": str(tmp_path / "x.npy"),
        "data__labels_path": str(tmp_path / "y.npy"),
        "n_devices": 1,
    }


def arrays_of(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by name, read without a mesh."""
    from orbax.checkpoint import v1 as ocp

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        position = checkpoints.positions()[-1]
    with warnings.catch_warnings():
        # Orbax would rather be told a mesh; here the arrays are wanted as they were saved.
        warnings.simplefilter("ignore")
        trees = ocp.load_checkpointables(
            workdir / "checkpoints" / str(position), {"model": None, "training": None}
        )
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(one: Path, other: Path) -> None:
    ours, theirs = arrays_of(one), arrays_of(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


class StopAfter:
    """Asks a run to stop once it has recorded so many epochs, as a signal would."""

    def __init__(self, monkeypatch, n_epochs: int):
        record = Recorder.epoch

        def epoch(recorder, phase, number, *arguments):
            record(recorder, phase, number, *arguments)
            if number == n_epochs:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Recorder, "epoch", epoch)


def without_time(lines: list[dict]) -> list[dict]:
    changing = ("time", "seconds", "examples_per_second")
    return [{k: v for k, v in line.items() if k not in changing} for line in lines]


@pytest.mark.parametrize(
    ("stop", "n_devices"),
    [
        (3, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product((1, 2, 3, 4), (1, 8))
            if case != (3, 1)
        ),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, files, monkeypatch, stop, n_devices, whole_runs):
    config = tiny.config(**files | {"n_devices": n_devices})
    whole = whole_runs(n_devices)
    with monkeypatch.context() as patch:
        StopAfter(patch, stop)
        with pytest.raises(Interrupted, match="SIGTERM"):
            training.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    training.train_and_evaluate(config, tmp_path / "run")
    assert_same_bits(tmp_path / "run", whole)
    assert without_time(read_metrics(tmp_path / "run")) == without_time(read_metrics(whole))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Uninterrupted runs by device count, made once."""
    folder = tmp_path_factory.mktemp("whole")
    examples, labels = tiny.blobs()
    np.save(folder / "x.npy", examples)
    np.save(folder / "y.npy", labels)
    paths = {"data__path": str(folder / "x.npy"), "data__labels_path": str(folder / "y.npy")}
    done: dict[int, Path] = {}

    def run(n_devices: int) -> Path:
        if n_devices not in done:
            done[n_devices] = folder / str(n_devices)
            training.train_and_evaluate(tiny.config(n_devices=n_devices, **paths), done[n_devices])
        return done[n_devices]

    return run


@pytest.fixture
def finished(tmp_path, whole_runs) -> Path:
    """A copy of an uninterrupted run on one device."""
    return shutil.copytree(whole_runs(1), tmp_path / "run")


def test_what_a_run_leaves(whole_runs):
    workdir = whole_runs(1)
    results = json.loads((workdir / "results.json").read_text())
    assert results["n_examples"] == tiny.N_EXAMPLES
    assert {"acc", "nmi", "ari", "purity", "inertia", "train_seconds"} <= results.keys()
    lines = read_metrics(workdir)
    assert [line["phase"] for line in lines] == ["pretrain"] * 2 + ["cluster"] * 2
    wanted = {"loss", "loss/reconstruction", "loss/centroid", "label_change", "inertia"}
    wanted |= {"empty_clusters", "embedding_variance", "acc", "nmi", "ari"}
    assert wanted <= lines[-1].keys()
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["n_clusters"] == 3


def test_a_finished_run_is_reported_again_and_left_alone(finished, files, capsys):
    results = json.loads((finished / "results.json").read_text())
    (finished / "results.json").unlink()
    before = arrays_of(finished)
    again = training.train_and_evaluate(tiny.config(**files), finished)
    assert again == results
    assert "finished run" in capsys.readouterr().out
    after = arrays_of(finished)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert len(read_metrics(finished)) == 4


def test_a_finished_run_is_scored_by_the_labels_of_now(finished, files, tmp_path):
    before = json.loads((finished / "results.json").read_text())
    np.save(tmp_path / "other.npy", np.arange(tiny.N_EXAMPLES) % 7)
    other = files | {"data__labels_path": str(tmp_path / "other.npy")}
    results = training.train_and_evaluate(tiny.config(**other), finished)
    assert before["acc"] > 0.9
    assert max(results["acc"], results["purity"]) < 0.5
    assert list(results) == list(before)
    assert json.loads((finished / "results.json").read_text()) == results
    unlabelled = training.train_and_evaluate(
        tiny.config(**files | {"data__labels_path": ""}), finished
    )
    assert set(before) - set(unlabelled) == {"acc", "nmi", "ari", "purity"}
    assert training.train_and_evaluate(tiny.config(**files), finished) == before


def test_labels_never_matter(tmp_path, files, whole_runs):
    """Shuffled labels and no labels at all: the same bits everywhere."""
    rng = np.random.default_rng(1)
    np.save(tmp_path / "shuffled.npy", rng.permutation(np.load(files["data__labels_path"])))
    for name, labels in (("shuffled", str(tmp_path / "shuffled.npy")), ("none", "")):
        changed = files | {"data__labels_path": labels}
        training.train_and_evaluate(tiny.config(**changed), tmp_path / name)
    assert_same_bits(whole_runs(1), tmp_path / "shuffled")
    assert_same_bits(whole_runs(1), tmp_path / "none")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (8, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 8), (1, 8), (8, 3))),
    ],
)
def test_a_run_goes_on_with_other_devices(tmp_path, files, monkeypatch, before, after, whole_runs):
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(Interrupted):
            training.train_and_evaluate(
                tiny.config(**files | {"n_devices": before}), tmp_path / "run"
            )
    training.train_and_evaluate(tiny.config(**files | {"n_devices": after}), tmp_path / "run")
    ours = json.loads((tmp_path / "run" / "results.json").read_text())
    theirs = json.loads((whole_runs(1) / "results.json").read_text())
    assert ours["inertia"] == pytest.approx(theirs["inertia"], rel=1e-2)
    assert ours["nmi"] == pytest.approx(theirs["nmi"], abs=1e-6)


@pytest.mark.parametrize("then", [pytest.param("host", marks=pytest.mark.slow), "device"])
def test_a_fed_run_stops_within_an_epoch_and_goes_on(tmp_path, files, monkeypatch, then):
    """The position inside an epoch is saved; the rest of it is trained after the resume."""
    changes = files | {"data__placement": "host"}
    monkeypatch.setattr(HostFeeder, "chunks", one_step_at_a_time)
    training.train_and_evaluate(tiny.config(**changes), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_in_third_epoch(patch)
        with pytest.raises(Interrupted, match="SIGINT"):
            training.train_and_evaluate(tiny.config(**changes), tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        record = checkpoints.record(checkpoints.positions()[-1])
    assert record["step"] > 0
    # Where there is room is asked anew each time, so that it may go on otherwise.
    training.train_and_evaluate(
        tiny.config(**changes | {"data__placement": then}), tmp_path / "run"
    )
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def stop_in_third_epoch(monkeypatch):
    """Interrupts a fed run before the fourth step of its third epoch."""
    n_passes = 0

    def chunks(feeder, order, first_step=0):
        nonlocal n_passes
        for n, chunk in enumerate(one_step_at_a_time(feeder, order, first_step)):
            if n_passes == 2 and n == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield chunk
        n_passes += 1

    monkeypatch.setattr(HostFeeder, "chunks", chunks)


def one_step_at_a_time(feeder, order, first_step=0):
    for step in range(first_step, feeder._layout.n_steps):
        yield feeder._read(order[step : step + 1])


# Orbax leaves what it could not read to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, files, monkeypatch, capsys, whole_runs):
    config = tiny.config(**files)
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(Interrupted):
            training.train_and_evaluate(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    newest = max((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    data = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data.write_bytes(data.read_bytes()[:100])
    training.train_and_evaluate(config, tmp_path / "run")
    assert f"damaged-{newest.name}" in capsys.readouterr().out
    assert_same_bits(tmp_path / "run", whole_runs(1))


# Orbax leaves what it could not read to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_all_checkpoints_damaged(finished, files):
    for checkpoint in (finished / "checkpoints").iterdir():
        (checkpoint / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        training.train_and_evaluate(tiny.config(**files), finished)


def test_another_config_in_the_workdir(finished, files):
    before = arrays_of(finished)
    with pytest.raises(UserError, match=r"another config: n_clusters is 4 here and 3 there"):
        training.train_and_evaluate(tiny.config(n_clusters=4, **files), finished)
    after = arrays_of(finished)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_other_data_in_the_workdir(finished, files):
    examples = tiny.blobs()[0]
    examples[1, 0] += 0.5  # One number of them all.
    np.save(files["data__path"], examples)
    with pytest.raises(UserError, match="a run on other data"):
        training.train_and_evaluate(tiny.config(**files), finished)


def test_data_of_older_versions_is_known_again():
    examples = np.arange(4000.0, dtype=np.float32).reshape(1000, 4)
    dataset = datasets.Dataset(name="mine", examples=examples, scale=1.0, labels=None)
    here = describe_data(dataset)
    old = {name: value for name, value in here.items() if name != "checksum_of_all"}
    assert is_same_data(here, here)
    assert is_same_data(old, here)
    for other in (old | {"checksum": 1}, here | {"checksum_of_all": 1}, old | {"scale": 2.0}):
        assert not is_same_data(other, here)
    examples[2] += 1  # Not among the 256 rows that older versions look at.
    changed = describe_data(dataset)
    assert changed["checksum"] == here["checksum"]
    assert not is_same_data(here, changed)


def test_too_few_examples_for_the_run_in_the_workdir(finished, files):
    np.save(files["data__path"], tiny.blobs()[0][:2])
    np.save(files["data__labels_path"], tiny.blobs()[1][:2])
    with pytest.raises(UserError, match="n_clusters is 3, but there are 2 examples"):
        training.train_and_evaluate(tiny.config(**files), finished)


def test_a_folder_in_the_place_of_the_lock(finished, files):
    (finished / ".lock").unlink()
    (finished / ".lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write to --workdir .*: Is a directory"):
        training.train_and_evaluate(tiny.config(**files), finished)


def test_foreign_checkpoints_in_the_workdir(tmp_path, files):
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no config.json"):
        training.train_and_evaluate(tiny.config(**files), tmp_path / "run")


def test_more_clusters_than_examples_leaves_no_workdir(tmp_path, files):
    with pytest.raises(UserError, match=r"n_clusters is 204, but there are 203 examples"):
        training.train_and_evaluate(tiny.config(n_clusters=204, **files), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_collapse_stops_the_run_and_keeps_what_was(tmp_path, files):
    config = tiny.config(
        n_clusters=1,  # Everything is pulled to one point.
        objective__centroid_weight=1e2,
        objective__warmup_epochs=0.0,
        training__n_epochs=100,
        training__collapse_ratio=1e-2,
        **files,
    )
    with pytest.raises(CollapseError, match=r"collapsed in epoch \d+: their variance is"):
        training.train_and_evaluate(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.positions()
    assert read_metrics(tmp_path / "run")[-1]["embedding_variance"] >= 0


def test_divergence_stops_the_run(tmp_path, files):
    config = tiny.config(training__optimizer="sgd", training__learning_rate=1e6, **files)
    with pytest.raises(CollapseError, match="training diverged"):
        training.train_and_evaluate(config, tmp_path / "run")


def test_divergence_in_the_last_step_of_pretraining_is_not_kept(tmp_path, files, monkeypatch):
    # The loss of an epoch is that before its last step, so nothing shows until k-means.
    config = tiny.config(
        objective__name="joint",
        training__optimizer="sgd",
        training__clustering_optimizer="sgd",
        training__pretrained_folder=str(tmp_path / "pretrained"),
        **files,
    )
    run_epoch = training.Run.run_epoch

    def diverge(self, state, epoch):
        state, values = run_epoch(self, state, epoch)
        return state._replace(
            parameters=jax.tree.map(lambda p: p * np.nan, state.parameters)
        ), values

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "run_epoch", diverge)
        config.training.n_pretrain_epochs = 1
        with pytest.raises(
            CollapseError, match=r"not finite after 1 epochs of pretraining: .*rate"
        ):
            training.train_and_evaluate(config, tmp_path / "run")
    assert not list((tmp_path / "pretrained").glob("*"))


@pytest.mark.parametrize(
    ("loss", "variance", "sentence"),
    [
        (float("nan"), float("inf"), "the loss is nan in epoch 2: training diverged"),
        (0.5, float("inf"), "the variance of the embeddings is inf in epoch 2: training diverged"),
    ],
)
def test_what_is_not_finite_is_named(tmp_path, loss, variance, sentence):
    values = {"loss": loss, "embedding_variance": variance}
    with pytest.raises(CollapseError, match=sentence):
        collapse.check_epoch(tiny.config(), tmp_path, values, 1.0, 2)


def test_what_was_saved_is_named_only_where_something_was(tmp_path):
    run = make_run(n_devices=1)
    run.workdir = tmp_path
    values = {"loss": float("nan"), "embedding_variance": 1.0}
    with pytest.raises(CollapseError, match=r"rate$"):
        collapse.check_epoch(run.config, run.workdir, values, 1.0, 1)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(CollapseError, match=r"rate; what was saved before is in .*checkpoints$"):
        collapse.check_epoch(run.config, run.workdir, values, 1.0, 1)
    run.config.training.n_pretrain_epochs = 0
    diverged = values | {"embedding_variance": float("nan")}
    with pytest.raises(CollapseError, match=r"as it was drawn are not finite"):
        collapse.check_pretrained(run.config, run.workdir, diverged)


def test_a_workdir_that_cannot_be_claimed(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    for workdir, message in (
        (tmp_path, r"is not the config of a run of this version of jkmeans"),
        (tmp_path / ("x" * 300), r"cannot write to --workdir .*: File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            training.claim_workdir(workdir, tiny.config())


@pytest.mark.slow
def test_without_a_decoder_the_embedding_keeps_its_spread(tmp_path, files):
    config = tiny.config(
        network__decoder=False,
        network__normalize=True,
        objective__balance_weight=1.0,
        objective__temperature=0.1,
        training__n_pretrain_epochs=0,
        training__n_epochs=20,
        **files,
    )
    training.train_and_evaluate(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["embedding_variance"] > 0.3
    assert lines[-1]["empty_clusters"] == 0
    assert lines[-1]["acc"] > 0.9


@pytest.mark.slow
def test_the_baseline_without_clustering_epochs(tmp_path, files):
    results = training.train_and_evaluate(
        tiny.config(training__n_epochs=0, **files), tmp_path / "run"
    )
    assert results["acc"] > 0.9


COMMAND = [sys.executable, "-m", "experiments.train", "--config", "configs/npy.py"]


def small_flags(files, workdir) -> list[str]:
    return [
        f"--workdir={workdir}",
        f"--config.data.path={files['data__path']}",
        "--config.n_clusters=3",
        "--config.network.widths=(16,)",
        "--config.network.embedding_dim=4",
        "--config.training.batch_size=32",
        "--config.training.n_pretrain_epochs=40",
        "--config.training.n_epochs=400",
        "--config.checkpoint.every=1",
        "--config.n_devices=1",
        "--config.report.pictures=False",
    ]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_a_signal_from_outside_loses_at_most_the_work_since_a_checkpoint(tmp_path, files, number):
    workdir = tmp_path / "run"
    command = COMMAND + small_flags(files, workdir)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while len(read_metrics(workdir)) < 12:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in errors
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        record = checkpoints.record(checkpoints.positions()[-1])
    n_recorded = len(read_metrics(workdir))
    if number == signal.SIGKILL:
        # One epoch may be recorded and not yet saved, one may still be in the background.
        assert record["epoch"] >= n_recorded - 2
    else:
        assert record["epoch"] == n_recorded
        assert f"goes on from epoch {record['epoch']}" in errors


CLUSTERING, JOINT = "a smaller training.clustering_learning_rate", " or objective.centroid_weight;"


@pytest.mark.parametrize(
    ("loss", "variance", "epoch", "fields", "message"),
    [
        (0.5, 2.0, 7, {}, None),
        (0.5, 1e-3, 7, {}, "collapsed in epoch 7: their variance is 0.001, below"),
        (0.5, 1e-3, 7, {}, f"try {CLUSTERING}{JOINT}"),
        (0.5, 1e-3, 1, {}, "try a smaller training.learning_rate;"),
        (0.5, 2e5, 7, {}, r"ran away in epoch 7: their variance is 2e\+05, and was 2 at first"),
        (0.5, 2e5, 7, {}, f"try network.normalize = True or {CLUSTERING}{JOINT}"),
        (0.5, 2e5, 7, {"network__normalize": True}, f"try {CLUSTERING}{JOINT}"),
        (0.5, 2e5, 7, {"objective__name": "tests.user_code:objective"}, f"{CLUSTERING};"),
        (float("nan"), 2.0, 7, {}, "the loss is nan in epoch 7: training diverged"),
        (0.5, float("inf"), 7, {}, f"training diverged; try {CLUSTERING}{JOINT}"),
    ],
)
def test_what_stops_a_run(loss, variance, epoch, fields, message, tmp_path):
    run = make_run(training__collapse_ratio=1e-3, n_devices=1, **fields)
    run.workdir = tmp_path
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    values = {"loss": loss, "embedding_variance": variance}
    if message is None:
        collapse.check_epoch(run.config, run.workdir, values, 2.0, epoch)
        return
    # What was saved stands after the advice.
    with pytest.raises(CollapseError, match=message):
        collapse.check_epoch(run.config, run.workdir, values, 2.0, epoch)


@pytest.mark.parametrize(
    "changes", [{"network.widths": (10**9,)}, {"network.embedding_dim": 2**31 - 1}]
)
def test_a_network_that_fits_no_memory_is_refused_before_anything_is_written(tmp_path, changes):
    with pytest.raises(UserError, match=r"the network has .* parameters, .* GiB; accepted: what"):
        training.train(tiny.config(**changes), tiny.dataset(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
