"""The job from the shell: what it writes, against scikit-learn; resuming; refusals; pictures."""

import importlib
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from jkmeans import selection, whole_files
from jkmeans.clustering import FIELDS, cluster, folder, memory, stream, validate
from jkmeans.clustering.data import read_all
from jkmeans.clustering.folder import read_sweep
from jkmeans.clustering.session import Session
from jkmeans.configuration import convert_fields, from_json, to_json
from jkmeans.errors import UserError
from jkmeans.interruption import Interrupted
from jkmeans.sharding import make_mesh
from jkmeans.sources import open_source
from jkmeans.streaming import plan
from jkmeans.whole_files import write_json
from tests.test_launchers import ROOT, run

N, D, K = 1205, 3, 4
CENTERS = 6.0 * np.asarray([[1, 1, 0], [-1, 1, 1], [0, -1, -1], [2, -2, 2]])
OUTPUTS = ("centroids", "labels", "distances", "sizes")


def make_config(**changes) -> ConfigDict:
    """The config of the shell with some fields replaced, of whatever type; a.b is a__b."""
    config = importlib.import_module("configs.cluster").get_config()
    config.report.pictures = False
    for name, value in changes.items():
        *groups, leaf = name.split("__")
        node = config
        for group in groups:
            node = node[group]
        del node[leaf]  # ml_collections would convert to the type that was there.
        node[leaf] = value
    return config


def outputs(workdir: Path) -> dict[str, np.ndarray]:
    return {name: np.load(workdir / f"{name}.npy") for name in OUTPUTS}


@pytest.fixture(scope="module")
def blobs():
    generator = np.random.default_rng(0)
    truth = np.arange(N) % K
    return (CENTERS[truth] + generator.normal(size=(N, D))).astype(np.float32), truth


@pytest.fixture(scope="module")
def cloud():
    """Without clusters: Lloyd's algorithm takes its time."""
    return np.random.default_rng(1).uniform(size=(N, D)).astype(np.float32)


@pytest.fixture(scope="module")
def files(blobs, cloud, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    x, _ = blobs
    np.save(folder / "x.npy", x)
    np.save(folder / "cloud.npy", cloud)
    bad = x.copy()
    bad[[17, 40]] = np.nan
    np.save(folder / "nan.npy", bad)
    np.save(folder / "images.npy", np.zeros((5, 4, 3), np.uint8))
    (folder / "truncated.npy").write_bytes((folder / "x.npy").read_bytes()[:-100])
    (folder / "parts").mkdir()
    np.save(folder / "parts" / "part-2.npy", x[:400])
    np.save(folder / "parts" / "part-10.npy", x[400:])
    return folder


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """A job that ran to its end, pictures and all."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    config = make_config(input=str(files / "x.npy"), n_clusters="4", report__pictures=True)
    return workdir, config, cluster(config, workdir)


# What it writes


def test_outputs_are_those_of_scikit_learn(done, blobs):
    workdir, _, summary = done
    x, truth = blobs
    found = outputs(workdir)
    assert found["labels"].dtype == np.int32
    assert found["distances"].dtype == found["centroids"].dtype == np.float32
    assert found["sizes"].dtype == np.int64
    assert adjusted_rand_score(truth, found["labels"]) == 1.0
    # scikit-learn, from where the job ended, stays there.
    there = KMeans(K, init=found["centroids"], n_init=1, tol=0).fit(x)
    np.testing.assert_array_equal(there.labels_, found["labels"])
    np.testing.assert_allclose(there.cluster_centers_, found["centroids"], atol=1e-5)
    np.testing.assert_allclose(summary["inertia"], there.inertia_, rtol=1e-5)
    distances = there.transform(x)[np.arange(N), found["labels"]]
    np.testing.assert_allclose(found["distances"], distances**2, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found["sizes"], np.bincount(truth)[truth[_firsts(found)]])
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["n_rows"] == N
    assert summary["n_features"] == D
    assert summary["n_clusters"] == K
    assert summary["converged"]
    assert summary["n_empty"] == 0
    assert summary["smallest"] == found["sizes"].min()
    assert summary["largest"] == found["sizes"].max()
    assert summary["history"][-1]["iteration"] == summary["n_iter"]


def _firsts(found) -> np.ndarray:
    """The first row of each cluster."""
    return np.asarray([int(np.argmax(found["labels"] == c)) for c in range(K)])


def test_silhouette_is_scikit_learns(done, blobs):
    workdir, _, summary = done
    expected = silhouette_score(blobs[0], outputs(workdir)["labels"])
    np.testing.assert_allclose(summary["silhouette"], expected, atol=1e-4)


def test_pictures(done):
    from matplotlib.image import imread

    workdir, _, _ = done
    pictures = sorted(p.name for p in (workdir / "report").iterdir())
    assert pictures == ["inertia.png", "map.png", "silhouette.png", "sizes.png"]
    for name in pictures:
        image = imread(workdir / "report" / name)
        assert image.shape[0] > 300
        assert image[..., :3].std() > 0.02


@pytest.mark.slow
def test_devices_do_not_matter(done, files, tmp_path):
    workdir, _, _ = done
    # Neither 3 nor 8 divides the rows.
    cluster(make_config(input=str(files / "x.npy"), n_clusters=4, n_devices=3), tmp_path / "w")
    there, here = outputs(workdir), outputs(tmp_path / "w")
    np.testing.assert_array_equal(here["labels"], there["labels"])
    np.testing.assert_allclose(here["centroids"], there["centroids"], atol=1e-5)


def test_a_folder_of_files(done, files, tmp_path):
    cluster(make_config(input=str(files / "parts"), n_clusters="4"), tmp_path / "w")
    there, here = outputs(done[0]), outputs(tmp_path / "w")
    for name in OUTPUTS:
        np.testing.assert_array_equal(here[name], there[name])


def test_parquet_columns(done, blobs, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")

    x, truth = blobs
    columns = {"a": x[:, 0], "b": x[:, 1], "class": truth, "c": x[:, 2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    config = make_config(input=str(tmp_path / "x.parquet"), columns=("a", "b", "c"), n_clusters="4")
    cluster(config, tmp_path / "w")
    there, here = outputs(done[0]), outputs(tmp_path / "w")
    np.testing.assert_array_equal(here["labels"], there["labels"])


def test_zarr(done, blobs, tmp_path):
    zarr = pytest.importorskip("zarr", reason="needs zarr")
    array = zarr.create_array(str(tmp_path / "x.zarr"), shape=(N, D), chunks=(100, D), dtype="f4")
    array[:] = blobs[0]
    cluster(make_config(input=str(tmp_path / "x.zarr"), n_clusters="4"), tmp_path / "w")
    there, here = outputs(done[0]), outputs(tmp_path / "w")
    np.testing.assert_array_equal(here["labels"], there["labels"])


def test_float64_stays_float64(blobs, tmp_path):
    x, truth = blobs
    np.save(tmp_path / "x.npy", x.astype(np.float64) + 1e6)
    summary = cluster(make_config(input=str(tmp_path / "x.npy"), n_clusters="4"), tmp_path / "w")
    found = outputs(tmp_path / "w")
    assert found["centroids"].dtype == np.float64
    expected = silhouette_score(x, found["labels"])
    np.testing.assert_allclose(summary["silhouette"], expected, atol=1e-4)
    assert adjusted_rand_score(truth, found["labels"]) == 1.0
    means = [x[found["labels"] == c].mean(axis=0, dtype=np.float64) for c in range(K)]
    np.testing.assert_allclose(found["centroids"] - 1e6, means, atol=1e-6)


def test_a_named_data_set_has_classes_and_pictures_of_centroids(tmp_path):
    summary = cluster(make_config(max_iter=5, report__pictures=True), tmp_path / "w")
    assert summary["n_rows"] == 1797
    labels = np.load(tmp_path / "w" / "labels.npy")
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.testing.assert_allclose(summary["ari"], adjusted_rand_score(digits.target, labels))
    assert (tmp_path / "w" / "report" / "centroids.png").exists()
    means = np.stack([digits.data[labels == c].mean(axis=0) / 16 for c in range(10)])
    # Not at rest yet, so near.
    assert np.abs(np.load(tmp_path / "w" / "centroids.npy") - means).max() < 0.1


def test_fewer_different_rows_than_clusters(tmp_path, capfd):
    np.save(tmp_path / "x.npy", np.repeat(np.eye(3, dtype=np.float32), 50, axis=0))
    summary = cluster(make_config(input=str(tmp_path / "x.npy"), n_clusters="5"), tmp_path / "w")
    assert summary["n_empty"] == 2
    assert summary["inertia"] == 0
    assert "2 of 5 clusters are empty" in capfd.readouterr().err


def test_one_cluster_has_no_silhouette(files, blobs, tmp_path):
    config = make_config(input=str(files / "x.npy"), n_clusters="1", report__pictures=True)
    summary = cluster(config, tmp_path / "w")
    assert summary["silhouette"] is None
    assert not (tmp_path / "w" / "report" / "silhouette.png").exists()
    np.testing.assert_allclose(outputs(tmp_path / "w")["centroids"][0], blobs[0].mean(0), atol=1e-5)


def test_restarts_keep_the_best(files, tmp_path):
    config = make_config(
        input=str(files / "cloud.npy"), n_clusters="12", n_init=4, init="sample", max_iter=100
    )
    summary = cluster(config, tmp_path / "w")
    last = {h["restart"]: h["inertia"] for h in summary["history"]}
    assert sorted(last) == [0, 1, 2, 3]
    assert len(set(last.values())) > 1
    np.testing.assert_allclose(summary["inertia"], min(last.values()), rtol=1e-6)


# Data that does not fit


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    generator = np.random.default_rng(0)
    truth = np.arange(200_000) % K
    np.save(folder / "x.npy", (CENTERS[truth] + generator.normal(size=(200_000, D))).astype("f4"))
    return folder / "x.npy", truth


def test_streamed_data(large, tmp_path, capfd):
    path, truth = large
    config = make_config(
        input=str(path), n_clusters="4", n_devices=2, memory_mebibytes=8, report__pictures=True
    )
    summary = cluster(config, tmp_path / "w")
    assert "streamed to 2 × cpu" in capfd.readouterr().err
    found = outputs(tmp_path / "w")
    assert adjusted_rand_score(truth, found["labels"]) == 1.0
    x = np.load(path)
    there = KMeans(K, init=found["centroids"], n_init=1, tol=0).fit(x)
    np.testing.assert_allclose(summary["inertia"], there.inertia_, rtol=1e-5)
    np.testing.assert_array_equal(found["sizes"], np.bincount(found["labels"]))
    np.testing.assert_allclose(found["distances"].sum(dtype=np.float64), summary["inertia"])
    assert {"map.png", "silhouette.png", "sizes.png"} == {
        p.name for p in (tmp_path / "w" / "report").iterdir()
    }
    # A finished job is only reported.
    assert cluster(config, tmp_path / "w") == summary


@pytest.mark.parametrize(
    "memory",
    [pytest.param(1, id="streamed"), pytest.param(0, id="whole", marks=pytest.mark.slow)],
)
def test_integers_that_float32_cannot_tell_apart(memory, tmp_path):
    truth = np.arange(20_000) % 3
    x = np.random.default_rng(0).integers(-2, 3, (20_000, 2)) + 20 * truth[:, None] + 1_700_000_000
    np.save(tmp_path / "x.npy", x)
    config = make_config(
        input=str(tmp_path / "x.npy"), n_clusters="3", memory_mebibytes=memory, n_devices=1,
        report__sample_size=500,
    )  # fmt: skip
    assert read_all(open_source(x[:9]), make_mesh(1), 1).dtype == np.float64
    summary = cluster(config, tmp_path / "w")
    found = outputs(tmp_path / "w")
    assert adjusted_rand_score(truth, found["labels"]) == 1
    assert found["centroids"].dtype == found["distances"].dtype == np.float64
    assert summary["silhouette"] > 0.8


@pytest.mark.parametrize(
    "memory",
    [pytest.param(1, id="streamed"), pytest.param(0, id="whole", marks=pytest.mark.slow)],
)
def test_values_whose_squares_overflow(memory, tmp_path):
    x = np.random.default_rng(0).normal(size=(40_000, 10)).astype(np.float32) * 1e30
    np.save(tmp_path / "x.npy", x)
    config = make_config(input=str(tmp_path / "x.npy"), n_clusters="4", memory_mebibytes=memory)
    with pytest.raises(UserError, match="overflow float32"):
        cluster(config, tmp_path / "w")


@pytest.mark.slow
def test_large_float64_has_a_sweep_and_a_silhouette(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)) + 4 * (np.arange(300) % 3)[:, None]
    np.save(tmp_path / "x.npy", x * 1e20)
    config = make_config(input=str(tmp_path / "x.npy"), n_clusters="auto")
    config.sweep.n_clusters, config.sweep.n_refits = (2, 3, 4), 2
    summary = cluster(config, tmp_path / "w")
    assert summary["n_clusters"] == 3
    assert summary["silhouette"] > 0.5
    np.save(tmp_path / "x.npy", (x * 1e20).astype(np.float32))
    with pytest.raises(UserError, match="overflow float32"):
        cluster(config, tmp_path / "other")
    assert not (tmp_path / "other" / "sweep.json").exists()


@pytest.mark.parametrize("stage", [pytest.param("iteration 2", marks=pytest.mark.slow), "labels"])
def test_a_stopped_stream_goes_on(stage, large, tmp_path, monkeypatch):
    config = make_config(
        input=str(large[0]), n_clusters="7", n_devices=2, memory_mebibytes=8, max_iter=4,
        report__sample_size=500,
    )  # fmt: skip
    whole = cluster(config, tmp_path / "whole")
    line = stream._line

    def signal_at_stage(now, *arguments):
        if now.stage == stage:
            os.kill(os.getpid(), signal.SIGTERM)
            patch.undo()
        return line(now, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_line", signal_at_stage)
        with pytest.raises(Interrupted, match="SIGTERM"):
            cluster(config, tmp_path / "parts")
    assert not (tmp_path / "parts" / "summary.json").exists()
    parts = cluster(config, tmp_path / "parts")
    assert parts["inertia"] == whole["inertia"]
    there, here = outputs(tmp_path / "whole"), outputs(tmp_path / "parts")
    for name in OUTPUTS:
        np.testing.assert_array_equal(here[name], there[name])


@pytest.fixture(scope="module")
def fog(tmp_path_factory):
    """More rows than a mebibyte has room for, in whose clusters the first centroids are seen."""
    path = tmp_path_factory.mktemp("fog") / "x.npy"
    np.save(path, np.random.default_rng(1).uniform(size=(30_000, D)).astype(np.float32))
    return path


@pytest.mark.slow
def test_the_answer_does_not_depend_on_the_memory_there_is(fog, tmp_path):
    changes = {"input": str(fog), "n_clusters": "7", "n_init": 2, "max_iter": 3, "n_devices": 2}
    found = [
        cluster(make_config(**changes, memory_mebibytes=memory), tmp_path / str(memory))["inertia"]
        for memory in (0, 1)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_stop_after_the_last_chunk_is_heard(fog, tmp_path, monkeypatch):
    config = make_config(input=str(fog), n_clusters="7", max_iter=1, memory_mebibytes=1)
    following = plan.Plan.next

    def stop_at_the_end(self, *arguments):
        state = following(self, *arguments)
        if state.stage == "done":
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(plan.Plan, "next", stop_at_the_end)
        with pytest.raises(Interrupted, match="SIGTERM"):
            cluster(config, tmp_path / "w")
    assert not (tmp_path / "w" / "summary.json").exists()
    assert cluster(config, tmp_path / "w")["n_rows"] == 30_000


def test_other_memory_when_a_job_goes_on(fog, tmp_path, monkeypatch, capfd):
    changes = {"input": str(fog), "n_clusters": "7", "max_iter": 2, "n_devices": 2}
    streamed = make_config(**changes, memory_mebibytes=1)
    whole = cluster(streamed, tmp_path / "whole")

    def stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_line", stop)
        with pytest.raises(Interrupted):
            cluster(streamed, tmp_path / "w")
    shutil.copytree(tmp_path / "w", tmp_path / "copy")
    # Where memory decides, a job goes on as it began; to the same bits.
    automatic = make_config(**changes, memory_mebibytes=0)
    capfd.readouterr()
    assert cluster(automatic, tmp_path / "w")["inertia"] == whole["inertia"]
    assert "streamed to 2 × cpu" in capfd.readouterr().err
    # Where the user decides, that holds, and is said.
    more = make_config(**changes, memory_mebibytes=100)
    assert cluster(more, tmp_path / "copy")["inertia"] == pytest.approx(whole["inertia"], rel=1e-5)
    assert "the rows have room in memory now" in capfd.readouterr().err
    # What began in memory and has no room any more begins anew, and says so.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.npz").write_bytes(b"")
    (tmp_path / "other" / "config.json").write_bytes((tmp_path / "w/config.json").read_bytes())
    assert cluster(streamed, tmp_path / "other")["inertia"] == whole["inertia"]
    assert "the rows have no room in memory now" in capfd.readouterr().err
    # The checkpoints of a job that cannot have streamed are those of something else.
    other = make_config(**changes, empty="keep")
    with pytest.raises(UserError, match="holds a job with another config: empty is"):
        cluster(other, tmp_path / "w")


@pytest.mark.slow
def test_a_sweep_over_streamed_data(large, tmp_path):
    path, _ = large
    config = make_config(
        input=str(path), n_clusters="auto", n_devices=2, memory_mebibytes=8,
        sweep__n_clusters=(3, 4, 5), sweep__n_refits=3, sweep__sample_size=500,
        report__sample_size=500,
    )  # fmt: skip
    assert cluster(config, tmp_path / "w")["n_clusters"] == 4


# The sweep


def sweep_config(files, **changes):
    return make_config(
        input=str(files / "x.npy"), n_clusters="auto", sweep__n_clusters=(2, 3, 4, 5, 6),
        sweep__n_refits=3, sweep__sample_size=500, **changes,
    )  # fmt: skip


def test_auto_finds_the_blobs(files, blobs, tmp_path):
    summary = cluster(sweep_config(files, report__pictures=True), tmp_path / "w")
    assert summary["suggestion"] == summary["n_clusters"] == 4
    assert "K = 4 has the highest silhouette" in summary["reason"]
    found = outputs(tmp_path / "w")
    assert adjusted_rand_score(blobs[1], found["labels"]) == 1.0
    sweep = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert sweep["n_clusters"] == [2, 3, 4, 5, 6]
    assert sweep["n_rows"] == 500
    assert (tmp_path / "w" / "report" / "sweep.png").exists()


def test_a_stopped_sweep_goes_on(files, tmp_path, monkeypatch):
    judged = []
    judge = selection.Sweep.judge

    def judge_and_signal(self, k):
        judged.append(k)
        if judged == [2, 3]:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(self, k)

    monkeypatch.setattr(selection.Sweep, "judge", judge_and_signal)
    with pytest.raises(Interrupted, match="SIGTERM"):
        cluster(sweep_config(files), tmp_path / "w")
    cluster(sweep_config(files), tmp_path / "w")
    assert judged == [2, 3, 4, 5, 6]
    cluster(sweep_config(files), tmp_path / "whole")
    parts, whole = (json.loads((tmp_path / w / "sweep.json").read_text()) for w in ("w", "whole"))
    assert parts == whole


# Stopping and going on


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("at", [pytest.param((0, 4), marks=pytest.mark.slow), (1, 2)])
def test_resumed_is_uninterrupted(number, at, files, tmp_path, monkeypatch):
    config = make_config(
        input=str(files / "cloud.npy"), n_clusters="12", n_init=2, iterations_per_program=4, tol=0
    )
    whole = cluster(config, tmp_path / "whole")
    tell = memory._Fit._tell

    def tell_and_signal(self, *arguments):
        tell(self, *arguments)
        if (self._state.restart, self._state.n_iter) == at:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(memory._Fit, "_tell", tell_and_signal)
        with pytest.raises(Interrupted, match=number.name):
            cluster(config, tmp_path / "parts")
    assert not (tmp_path / "parts" / "summary.json").exists()
    parts = cluster(config, tmp_path / "parts")
    there, here = outputs(tmp_path / "whole"), outputs(tmp_path / "parts")
    for name in OUTPUTS:
        np.testing.assert_array_equal(here[name], there[name])
    assert parts["history"] == whole["history"]
    assert parts["n_iter"] == whole["n_iter"]


@pytest.mark.parametrize(
    ("module", "name"), [(memory, "write_npy"), (selection, "silhouette_samples")]
)
def test_a_stop_after_the_fit_is_heard(module, name, files, tmp_path, monkeypatch):
    config = make_config(input=str(files / "x.npy"), n_clusters="4")
    function = getattr(module, name)

    def signal_first(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        patch.undo()
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, signal_first)
        with pytest.raises(Interrupted, match="SIGTERM"):
            cluster(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert cluster(config, tmp_path)["n_clusters"] == 4


def test_a_finished_job_is_only_reported(done, capfd):
    workdir, config, summary = done
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"}
    assert cluster(config, workdir) == summary
    assert "holds a finished job" in capfd.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_lost_output_is_made_again(files, tmp_path):
    config = make_config(input=str(files / "x.npy"), n_clusters="4")
    cluster(config, tmp_path / "w")
    there = outputs(tmp_path / "w")
    (tmp_path / "w" / "labels.npy").unlink()
    cluster(config, tmp_path / "w")
    np.testing.assert_array_equal(outputs(tmp_path / "w")["labels"], there["labels"])


def test_another_config_is_refused(done, files):
    workdir, _, _ = done
    with pytest.raises(UserError, match="n_clusters is '5' here and '4' there"):
        cluster(make_config(input=str(files / "x.npy"), n_clusters="5"), workdir)


def test_nothing_is_written_over(files, tmp_path):
    shutil.copy(files / "x.npy", tmp_path / "centroids.npy")
    for name in ("centroids.npy", "x.npy"):
        config = make_config(input=str(files / "x.npy"), n_clusters="4")
        if name == "centroids.npy":
            config.input = str(tmp_path / name)
        with pytest.raises(UserError, match=r"holds centroids\.npy, which is of no job"):
            cluster(config, tmp_path)
    assert len(np.load(tmp_path / "centroids.npy")) == N
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "in").mkdir()
    shutil.copy(files / "x.npy", tmp_path / "in")
    config = make_config(input=str(tmp_path / "in"), n_clusters="4")
    with pytest.raises(UserError, match=r"--workdir is .*/in, which is config\.input itself"):
        cluster(config, tmp_path / "in")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["x.npy"]


def test_other_data_is_refused(done, files, tmp_path, monkeypatch):
    workdir, _, _ = done
    with pytest.raises(UserError, match="holds a job on other data"):
        cluster(make_config(input=str(files / "cloud.npy"), n_clusters="4"), workdir)
    # The same before it is finished.
    config = make_config(input=str(files / "cloud.npy"), n_clusters="12", iterations_per_program=1)
    tell = memory._Fit._tell

    def signal_at_once(self, *arguments):
        tell(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(memory._Fit, "_tell", signal_at_once)
        with pytest.raises(Interrupted):
            cluster(config, tmp_path / "w")
    config.input = str(files / "x.npy")
    with pytest.raises(UserError, match="holds a job on other data"):
        cluster(config, tmp_path / "w")


@pytest.mark.parametrize("content", ["[]", "{}", "7"])
def test_a_summary_that_is_none_is_named(content, tmp_path):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json is damaged .*; delete it"):
        folder.read_summary(tmp_path, "print")


def test_a_state_without_a_part_is_named(tmp_path):
    folder.State().save(tmp_path / "state.npz", "print")
    assert folder.State.load(tmp_path / "state.npz", "print").restart == 0
    arrays = whole_files.read_arrays(tmp_path / "state.npz")
    for name in arrays:
        whole_files.write_arrays(
            tmp_path / "state.npz", {n: a for n, a in arrays.items() if n != name}
        )
        with pytest.raises(UserError, match=r"state\.npz is damaged .*; delete it"):
            folder.State.load(tmp_path / "state.npz", "print")


def test_an_error_of_the_call_is_no_reason_to_wait_for_it():
    session = types.SimpleNamespace(_interruption=types.SimpleNamespace(announced=lambda: False))

    def call():
        raise TimeoutError("the disk of another host")

    with pytest.raises(TimeoutError, match="the disk of another host"):
        Session.compute(session, call)  # type: ignore[arg-type]
    assert Session.compute(session, lambda: 7) == 7  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["state.npz", "summary.json", pytest.param("config.json", marks=pytest.mark.slow)]
)
def test_damaged_files_are_named(name, files, tmp_path):
    config = make_config(input=str(files / "x.npy"), n_clusters="4")
    cluster(config, tmp_path / "w")
    if name == "state.npz":
        (tmp_path / "w" / "summary.json").unlink()
    (tmp_path / "w" / name).write_bytes(b"{PK")
    with pytest.raises(UserError, match=name):
        cluster(config, tmp_path / "w")


def test_one_process_to_a_workdir(done):
    import fcntl

    workdir, config, _ = done
    with open(workdir / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            cluster(config, workdir)


# The config


def test_the_config_keeps_the_contract():
    module = importlib.import_module("configs.cluster")
    config = module.get_config()
    valid = validate(config)
    assert valid == config  # What the file says is what runs.
    values = json.loads(json.dumps(to_json(valid)))
    assert convert_fields(ConfigDict(values), FIELDS) == convert_fields(valid, FIELDS)
    assert "python -m experiments.cluster --config configs/cluster.py --workdir" in module.__doc__
    with pytest.raises(UserError):
        from_json(values)  # It is not that of a training run.


BAD_FIELDS = {
    "seed": (-1, 0.5, "0"),
    "n_devices": (-1, 10_000, True),
    "input": ("", 3, "/nowhere/x.npy"),
    "columns": ("a", (1,), ("a",)),
    "memory_mebibytes": (-1, "1"),
    "n_clusters": ("0", "-3", "ten", 2.5, True, "1798", 1798),
    "init": ("kmeans", 3),
    "n_init": (0, 1.5),
    "max_iter": (0, "9"),
    "tol": (-1.0, float("nan"), "1e-4"),
    "empty": ("drop", None),
    "iterations_per_program": (0, "3"),
    "report__pictures": (1, "yes"),
    "report__sample_size": (1, 10**6),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_FIELDS.items() for value in values]
)
def test_bad_values(name, value, tmp_path):
    with pytest.raises(UserError) as caught:
        cluster(make_config(**{name: value}), tmp_path / "w")
    message = str(caught.value)
    field = name.replace("__", ".")
    assert field in message or "/nowhere/x.npy" in message
    assert "accepted" in message
    assert "\n" not in message
    assert not (tmp_path / "w").exists()


def test_a_misspelt_data_set_is_answered_with_their_names(tmp_path):
    with pytest.raises(UserError, match="mnst does not exist; accepted: digits, mnist, fashion-"):
        cluster(make_config(input="mnst"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("ks", [(), (1, 2), (2, 3000), ("2",), 5, (2.5,)])
def test_bad_sweeps(ks, tmp_path):
    config = make_config(n_clusters="auto", sweep__n_clusters=ks)
    with pytest.raises(UserError, match=r"config\.sweep\.n_clusters"):
        cluster(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_sweep_of_few_rows_says_what_fits(tmp_path):
    np.save(tmp_path / "few.npy", np.eye(9, dtype=np.float32))
    config = make_config(input=str(tmp_path / "few.npy"), n_clusters="auto")
    message = r"config\.sweep\.n_clusters has 32 in it, but .*few.npy has 9 rows; accepted: 2 to 8"
    with pytest.raises(UserError, match=message):
        cluster(config, tmp_path / "w")


def test_a_sweep_needs_three_rows(tmp_path):
    np.save(tmp_path / "two.npy", np.eye(2, dtype=np.float32))
    config = make_config(input=str(tmp_path / "two.npy"), n_clusters="auto")
    with pytest.raises(UserError, match=r"the sample has 2 rows; accepted: .* at least 3 rows"):
        cluster(config, tmp_path / "w")


def test_a_sweep_without_silhouettes_is_read_again(tmp_path):
    """Rows in one place have no silhouette; JSON has no NaN."""
    path = tmp_path / "sweep.json"
    write_json(path, {
        "fingerprint": "f", "n_clusters": [2], "inertia": [0.0], "silhouette": [float("nan")],
        "stability": [1.0],
    })  # fmt: skip
    assert "NaN" not in path.read_text()
    ((k, (inertia, silhouette, stability)),) = read_sweep(path, "f").items()
    assert (k, inertia, stability) == (2, 0.0, 1.0)
    assert np.isnan(silhouette)


def test_missing_and_unknown_fields(tmp_path):
    config = make_config()
    del config.tol
    with pytest.raises(UserError, match="lacks the field 'tol'"):
        cluster(config, tmp_path / "w")
    config = make_config()
    config.n_cluster = "3"
    with pytest.raises(UserError, match="did you mean 'n_clusters'"):
        cluster(config, tmp_path / "w")


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("nan.npy", "NaN or infinity in 2 of 1,205 rows, the first is row 17"),
        ("images.npy", r"shape \[5, 4, 3\]"),
        ("truncated.npy", "truncated"),
        ("none.npy", "none.npy"),
    ],
)
def test_bad_data(file, sentence, files, tmp_path):
    with pytest.raises(UserError, match=sentence):
        cluster(make_config(input=str(files / file), n_clusters="2"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


# The command


def command(files, workdir, *more) -> tuple[str, ...]:
    return (
        "--config=configs/cluster.py",
        f"--workdir={workdir}",
        f"--config.input={files / 'x.npy'}",
        "--config.report.pictures=False",
        *more,
    )


def test_the_command(files, blobs, tmp_path):
    arguments = command(files, tmp_path / "w", "--config.n_clusters=4")
    ended = run("cluster", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "n_clusters" in ended.stdout
    assert "iteration" in ended.stderr
    labels = np.load(tmp_path / "w" / "labels.npy")
    assert adjusted_rand_score(blobs[1], labels) == 1.0
    ended = run("cluster", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "nothing to do" in ended.stdout


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--config.n_clutsers=3"], "n_clutsers"),
        (["--config.max_iter=many"], "max_iter"),
        (["--config.input={files}/nan.npy"], "NaN or infinity in 2 of 1,205 rows"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--config.input=none.npy"], "none.npy does not exist"),
                (["--config.n_clusters=2000"], "n_clusters is 2000, but"),
                (["--config.n_clusters=ten"], "config.n_clusters is 'ten'; accepted: an integer"),
            )
        ),
    ],
)
def test_bad_command_lines(more, sentence, files, tmp_path):
    more = [argument.format(files=files) for argument in more]
    ended = run("cluster", *command(files, tmp_path / "w", *more))
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert sentence in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command(number, tmp_path):
    import subprocess

    x = np.random.default_rng(0).uniform(size=(60_000, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    arguments = (
        "--config=configs/cluster.py", f"--workdir={tmp_path / 'w'}", "--config.n_clusters=300",
        f"--config.input={tmp_path / 'x.npy'}", "--config.tol=0.0", "--config.max_iter=5000",
        "--config.iterations_per_program=2", "--config.report.pictures=False",
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.cluster", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "rows/s" in line:
                break
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 128 + number
    assert "the same command goes on" in rest
    assert "Traceback" not in rest
    with np.load(tmp_path / "w" / "state.npz") as state:
        assert state["centroids"].shape == (300, 16)
        assert len(state["history"]) >= 2
