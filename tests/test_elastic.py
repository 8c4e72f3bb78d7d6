"""Several processes train and cluster as one, and go on after deaths with the same bits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jkmeans import chaos, clustering
from jkmeans.chaos import rounds
from jkmeans.chaos.records import read_faults, table, write_faults
from jkmeans.chaos.supervised_run import fingerprints
from jkmeans.errors import UserError
from jkmeans.processes.supervisor import EVENTS_FILE
from tests import tiny
from tests.test_clustering import make_config as cluster_config

ROOT = Path(__file__).parent.parent


def supervised(program: str, n: int, *flags: str, more: tuple[str, ...] = ()) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [
            sys.executable, "-m", "experiments.launch", f"--processes={n}", *more, "--",
            sys.executable, "-m", f"experiments.{program}", *flags,
        ],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def train_flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    examples, labels = tiny.blobs()
    np.save(folder / "x.npy", examples)
    np.save(folder / "y.npy", labels)
    return (
        "--config=configs/npy.py",
        f"--config.data.path={folder / 'x.npy'}",
        f"--config.data.labels_path={folder / 'y.npy'}",
        "--config.n_clusters=3",
        "--config.network.widths=(16,)",
        "--config.network.embedding_dim=4",
        "--config.training.batch_size=64",
        "--config.training.n_pretrain_epochs=2",
        "--config.training.n_epochs=20",
        "--config.centroids.n_init=1",
        "--config.checkpoint.every=2",
        "--config.report.pictures=False",
    )


def events(workdir: Path, kind: str) -> list[dict]:
    path = workdir / "processes" / EVENTS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def epochs_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for_epoch(workdir: Path, epoch: int, process: subprocess.Popen) -> None:
    while epochs_done(workdir) < epoch:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit(train_flags, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(supervised("train", 2, *train_flags, f"--workdir={undisturbed}"))
    keep = ("--min_processes=2",)
    process = supervised("train", 2, *train_flags, f"--workdir={killed}", more=keep)
    wait_for_epoch(killed, 7, process)
    os.kill(events(killed, "start")[-1]["pids"][1], signal.SIGKILL)
    output = finish(process)
    assert "process 1 was killed by SIGKILL; going on from the last checkpoint with 2" in output
    assert "going on after epoch" in output
    assert fingerprints(killed) == fingerprints(undisturbed)


@pytest.mark.slow
def test_sigterm_is_heard_before_the_first_epoch(train_flags, tmp_path):
    """JAX's preemption service would hear it in our place, and the run would go on to its end."""
    workdir = tmp_path / "run"
    process = supervised("train", 2, *train_flags, f"--workdir={workdir}")
    while not (workdir / "config.json").exists():  # All have joined.
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert epochs_done(workdir) < 20


@pytest.mark.slow
def test_fewer_processes_and_more_again(train_flags, tmp_path):
    workdir = tmp_path / "run"
    process = supervised("train", 3, *train_flags, f"--workdir={workdir}")
    wait_for_epoch(workdir, 5, process)
    os.kill(events(workdir, "start")[-1]["pids"][0], signal.SIGKILL)
    while len(events(workdir, "start")) < 2:
        time.sleep(0.01)
    before = epochs_done(workdir)
    wait_for_epoch(workdir, before + 2, process)
    (workdir / "processes" / "wanted").write_text("3")
    output = finish(process)
    assert [event["n"] for event in events(workdir, "start")] == [3, 2, 3]
    assert "starting 3 processes, as asked" in output
    results = json.loads((workdir / "results.json").read_text())
    assert results["n_examples"] == tiny.N_EXAMPLES
    assert results["acc"] > 0.9
    # Every epoch once, and every example once in each.
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == list(range(1, 23))
    sizes = [sum(r["cluster_sizes"]) for r in records if "cluster_sizes" in r]
    assert set(sizes) == {tiny.N_EXAMPLES}


@pytest.mark.slow
def test_evaluation_and_prediction_across_processes(train_flags, tmp_path):
    workdir, data = tmp_path / "run", Path(train_flags[1].partition("=")[2])
    finish(supervised("train", 2, *train_flags, f"--workdir={workdir}"))
    found = []
    for n in (1, 3):
        output = tmp_path / f"{n}.npz"
        finish(
            supervised(
                "predict", n, f"--workdir={workdir}", f"--input={data}", f"--output={output}"
            )
        )
        finish(supervised("evaluate", n, f"--workdir={workdir}"))
        evaluation = json.loads((workdir / "evaluation.json").read_text())
        with np.load(output) as arrays:
            found.append((arrays["labels"], evaluation["acc"], evaluation["n_examples"]))
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.slow
def test_more_processes_than_work_are_refused(train_flags, tmp_path):
    flags = (*train_flags, "--config.data.n_shards=1", f"--workdir={tmp_path / 'run'}")
    process = supervised("train", 2, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "process 1 would have none; accepted: up to 1 processes" in output
    assert "Traceback" not in output
    assert len(events(tmp_path / "run", "start")) == 1


@pytest.mark.slow
def test_kmeans_of_other_numbers_of_processes_has_the_same_bits(tmp_path):
    np.save(tmp_path / "x.npy", tiny.blobs(n=1003)[0])
    centroids, inertias = [], []
    for name, n, memory in (("1", 1, 0), ("2", 2, 0), ("streamed", 1, 1), ("streamed-3", 3, 1)):
        workdir = tmp_path / name
        finish(
            supervised(
                "cluster", n, "--config=configs/cluster.py", f"--workdir={workdir}",
                f"--config.input={tmp_path / 'x.npy'}", "--config.n_clusters=5",
                f"--config.deterministic={memory == 0}", f"--config.memory_mebibytes={memory}",
                "--config.report.pictures=False",
            )
        )  # fmt: skip
        centroids.append(np.load(workdir / "centroids.npy"))
        inertias.append(json.loads((workdir / "summary.json").read_text())["inertia"])
    assert centroids[0].tobytes() == centroids[1].tobytes()
    np.testing.assert_allclose(centroids[2], centroids[3], rtol=1e-5)
    np.testing.assert_allclose(inertias[2], inertias[3], rtol=1e-6)


@pytest.mark.slow
def test_deterministic_clustering_has_the_same_bits_on_any_devices(tmp_path):
    x = tiny.blobs(n=203)[0]
    x[:, 0] += 4096  # A column that is summed around its mean.
    np.save(tmp_path / "x.npy", x)
    found = []
    for n_devices in (1, 8):
        workdir = tmp_path / str(n_devices)
        changes = {"input": str(tmp_path / "x.npy"), "n_devices": n_devices, "init": "sample"}
        clustering.cluster(cluster_config(n_clusters="4", deterministic=True, **changes), workdir)
        found.append((workdir / "centroids.npy").read_bytes())
    assert found[0] == found[1]


def test_deterministic_clustering_refuses_other_devices(tmp_path):
    np.save(tmp_path / "x.npy", tiny.blobs(n=203)[0])
    changes = {"input": str(tmp_path / "x.npy"), "n_devices": 3, "deterministic": True}
    with pytest.raises(UserError, match="3 devices; accepted: 1, 2, 4 or 8"):
        clustering.cluster(cluster_config(n_clusters="4", **changes), tmp_path / "run")


# Chaos


def chaos_config(**changes):
    import importlib

    config = importlib.import_module("configs.chaos").get_config()
    for name, value in changes.items():
        config[name] = value
    return config


FAULTS = [
    chaos.Fault(0, 0, "worker", 5, 0.1, 2.0, 3.0, 1, 0.5, True, True),
    chaos.Fault(1, 0, "slow", 9, None, None, None, 0, 0.0, True, True),
    chaos.Fault(2, 1, "worker", 7, 0.3, 4.0, 5.0, 2, 1.0, False, False),
]


def test_the_table_counts_by_kind():
    text = table(FAULTS, chaos_config())
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "| 1 of 2 | 0.20, 0.30 | 3.0, 4.0 | 4.0 | 2, 2 | 1 of 2 |" in rows["SIGKILL of a worker"]
    assert "| 1 of 1 | – | – | – | – | 1 of 1 |" in rows["a slow worker"]
    assert "| 2 of 3 |" in rows["all"]


def test_faults_are_kept(tmp_path):
    write_faults(tmp_path / "faults.csv", FAULTS)
    assert read_faults(tmp_path / "faults.csv") == FAULTS


@pytest.mark.parametrize("end", [b"0,0,wor", b"3,1,worker,7,,,,0,0.0,True,Fal", b"\xff"])
def test_faults_that_were_cut_are_named(tmp_path, end):
    write_faults(tmp_path / "faults.csv", FAULTS)
    with open(tmp_path / "faults.csv", "ab") as file:
        file.write(end)
    with pytest.raises(UserError, match=r"faults\.csv is damaged \(.*\); delete it to begin anew"):
        read_faults(tmp_path / "faults.csv")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_reference_is_made_again(tmp_path, monkeypatch, content):
    made = {"arrays": [1], "results": {}}

    class Undisturbed(contextlib.nullcontext):
        def status(self):
            return 0

        def last_epoch(self):
            return 1

    monkeypatch.setattr(rounds, "SupervisedRun", lambda config, folder: Undisturbed())
    monkeypatch.setattr(rounds, "fingerprints", lambda folder: made)
    config = chaos_config(kinds=("worker",))
    experiment = rounds.Chaos(config, tmp_path, SimpleNamespace(requested=False))
    (tmp_path / "reference.json").write_bytes(content)
    assert experiment._reference() == made
    monkeypatch.delattr(rounds, "SupervisedRun")  # What is whole is taken as it is.
    assert experiment._reference() == made


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kinds": ("worker", "fire")}, r"config\.kinds is .*fire.*; accepted: a tuple of worker"),
        ({"n_processes": 2}, "kinds holds 'two'; accepted: at least 3"),
        ({"hang_seconds": 1.0}, r"config\.hang_seconds is 1\.0; accepted: at least 2"),
        ({"n_faults": 0}, r"config\.n_faults is 0"),
    ],
)
def test_bad_chaos(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        chaos.validate(chaos_config(**changes))


@pytest.mark.slow
def test_a_round_of_chaos(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.chdir(ROOT)
    flags = [flag.replace("n_epochs=300", "n_epochs=120") for flag in chaos_config().train_flags]
    config = chaos_config(n_faults=9, spares=0, train_flags=tuple(flags))
    faults = chaos.run_chaos(config, tmp_path)
    assert len(faults) == 9
    assert all(fault.survived and fault.equal for fault in faults)
    assert "| all | 9 of 9 |" in (tmp_path / "chaos.md").read_text()
