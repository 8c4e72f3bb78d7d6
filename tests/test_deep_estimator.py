"""The scikit-learn interface of deep clustering: the same bits as a run, whatever carries them."""

import copy
import gc
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from jkmeans import DeepClustering, evaluation, recorder
from jkmeans.errors import CollapseError
from jkmeans.estimators import deep, deep_config
from jkmeans.estimators.deep import FITTED_FILE
from jkmeans.estimators.deep_config import BASE
from jkmeans.training import train_and_evaluate
from tests import tiny

TINY = {
    "n_clusters": 3,
    "embedding_dim": 4,
    "widths": (16,),
    "n_pretrain_epochs": 2,
    "n_epochs": 2,
    "batch_size": 32,
    "options": {"centroids.n_init": 1, "checkpoint.every": 1},
    "n_devices": 1,
}


def make(method="idec", **changes) -> DeepClustering:
    """An estimator small enough for tests."""
    return DeepClustering(method, **(TINY | {"random_state": 0} | changes))


@pytest.fixture(scope="module")
def blobs():
    return tiny.blobs()


@pytest.fixture(scope="module")
def fitted(blobs):
    return make().fit(blobs[0])


def check_same(ours, theirs, x):
    """All that was fitted has the same bits, and so has what it says of x."""
    for name in ("labels_", "embeddings_", "cluster_centers_", "inertia_"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
    np.testing.assert_array_equal(ours.transform(x), theirs.transform(x))
    assert ours.score(x) == theirs.score(x)
    assert ours.n_features_in_ == theirs.n_features_in_
    assert ours.n_epochs_ == theirs.n_epochs_
    assert ours.history_ == theirs.history_


def without_times(history):
    """What the same training finds again."""
    times = ("time", "seconds", "examples_per_second")
    return [{k: v for k, v in record.items() if k not in times} for record in history]


# The fit


def test_attributes_agree_with_each_other(fitted, blobs):
    x, truth = blobs
    assert fitted.labels_.dtype == np.int32
    assert fitted.labels_.shape == (len(x),)
    assert fitted.cluster_centers_.shape == (3, 4)
    assert fitted.embeddings_.shape == (len(x), 4)
    assert (fitted.n_features_in_, fitted.n_epochs_) == (12, 4)
    assert [record["epoch"] for record in fitted.history_] == [1, 2, 3, 4]
    assert [record["phase"] for record in fitted.history_] == ["pretrain"] * 2 + ["cluster"] * 2
    np.testing.assert_array_equal(fitted.predict(x), fitted.labels_)
    np.testing.assert_array_equal(fitted.transform(x), fitted.embeddings_)
    offsets = fitted.embeddings_ - fitted.cluster_centers_[fitted.labels_]
    np.testing.assert_allclose(fitted.inertia_, (offsets**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(fitted.score(x), -fitted.inertia_, rtol=1e-5)
    assert adjusted_rand_score(truth, fitted.labels_) > 0.9
    assert fitted.get_feature_names_out().tolist() == [f"deepclustering{i}" for i in range(4)]


def test_it_is_the_run_of_train_and_evaluate(fitted, blobs, tmp_path):
    x, _ = blobs
    np.save(tmp_path / "x.npy", x)
    config = fitted.config_.copy_and_resolve_references()
    config.data.path = str(tmp_path / "x.npy")
    results = train_and_evaluate(config, tmp_path / "run")
    assert results["inertia"] == fitted.inertia_
    model = evaluation.load_model(tmp_path / "run", n_devices=1)
    found = evaluation.predict(model, x)
    np.testing.assert_array_equal(model.centroids, fitted.cluster_centers_)
    np.testing.assert_array_equal(found.labels, fitted.labels_)
    np.testing.assert_array_equal(found.embeddings, fitted.embeddings_)

    loaded = DeepClustering.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.predict(x), fitted.labels_)
    assert loaded.inertia_ == fitted.inertia_
    assert not hasattr(loaded, "labels_")
    with pytest.raises(ValueError, match="was not written by save; accepted: a new or empty"):
        fitted.save(tmp_path / "run")


def test_base_is_the_config_of_arrays(fitted):
    """What every estimator starts from says the same as the config of .npy files."""
    config = deep_config._flat(importlib.import_module("configs.npy").get_config())
    different = {
        name for name, value in BASE.items() if config[name] != value and name != "data.path"
    }
    assert different == {"report.pictures"}
    assert {name for name in config if not name.startswith("objective.")} == set(BASE)
    assert fitted.config_.objective.to_dict() == {"name": "idec", "cluster_weight": 0.1}
    assert fitted.config_.centroids.bank == "refreshed"  # A setting of IDEC.


class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"y was looked at: {name}")


def test_y_is_not_looked_at_and_seeds_are_all(fitted, blobs):
    again = make(random_state=np.int64(0))
    embeddings = again.fit_transform(blobs[0], Untouchable())
    np.testing.assert_array_equal(embeddings, fitted.embeddings_)
    np.testing.assert_array_equal(again.labels_, fitted.labels_)
    assert without_times(again.history_) == without_times(fitted.history_)


def test_random_states(blobs):
    generator = np.random.RandomState(3)
    model = make(random_state=generator)
    seeds = [model._seed(), model._seed()]
    assert seeds[0] != seeds[1]
    assert make(random_state=np.random.RandomState(3))._seed() == seeds[0]
    assert make(random_state=5)._seed() == 5
    assert 0 <= make(random_state=2**32 - 1)._seed() < 2**31


@pytest.mark.parametrize("method", ["autoencoder", pytest.param("vade", marks=pytest.mark.slow)])
def test_methods(method, blobs):
    x = blobs[0] / np.ptp(blobs[0])
    x -= x.min()
    changes = {"n_epochs": 50} if method == "autoencoder" else {}
    model = make(method, **changes)
    labels = model.fit_predict(x)
    np.testing.assert_array_equal(model.predict(x.tolist()), labels)
    np.testing.assert_allclose(model.score(x), -model.inertia_, rtol=1e-5)
    # Defaults give way to what the method cannot do without.
    assert model.n_epochs_ == (2 if method == "autoencoder" else 4)
    assert model.config_.network.name == (
        "variational" if method == "vade" else model.get_params()["network"]
    )


class Image:
    """Images that only convert."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype=dtype)


@pytest.mark.slow
def test_images_of_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8)).astype(np.uint8)
    options = {
        "network": "convolutional",
        "widths": [4, 8],
        "n_pretrain_epochs": 1,
        "n_epochs": 1,
        "augmentation": {"shift": 1.0, "rotation": 5},
    }
    model = make(**options).fit(Image(images))
    assert model.n_features_in_ == 64
    assert model.config_.augmentation.to_dict() == {
        "shift": 1.0,
        "rotation": 5.0,
        "zoom": 0.0,
        "pretraining": True,
        "invariance": False,
    }
    model.save(tmp_path / "model")
    loaded = DeepClustering.load(tmp_path / "model")
    check_same(loaded, model, images)
    assert loaded.scale == 1 / 255
    # Units are those of the fit, whatever the type.
    np.testing.assert_array_equal(loaded.predict(images.astype(np.float64)), model.labels_)
    with pytest.raises(ValueError, match=r"X is of shape \[64, 64\]; accepted: \[n, 8, 8\]"):
        model.predict(images.reshape(64, 64))


def test_scales():
    model = make()
    assert model._scale(np.zeros((2, 2), np.uint8)) == 1 / 255
    assert model._scale(np.zeros((2, 2), np.int16)) == 1.0
    assert make(scale=0.5)._scale(np.zeros((2, 2), np.uint8)) == 0.5


# What carries a fit


def test_pickles_and_copies(fitted, blobs):
    x = blobs[0]
    content = pickle.dumps(fitted)
    for other in (pickle.loads(content), copy.deepcopy(fitted), copy.copy(fitted)):
        check_same(other, fitted, x)
    # Of a pickle, of which nothing has been read yet.
    twice = pickle.loads(pickle.dumps(pickle.loads(content)))
    check_same(twice, fitted, x)


def test_a_copy_has_a_folder_of_its_own_and_is_saved_before_it_predicts(fitted, blobs, tmp_path):
    other = copy.deepcopy(fitted)
    assert Path(other.workdir_) == other._run.path != Path(fitted.workdir_)
    other.save(tmp_path / "model")
    check_same(DeepClustering.load(tmp_path / "model"), fitted, blobs[0])
    with pytest.raises(NotFittedError):
        make().workdir_  # noqa: B018


def test_a_model_of_more_devices_than_there_are(fitted, blobs, tmp_path, monkeypatch):
    fitted.save(tmp_path / "model")

    def of_99_devices(*arguments):
        return deep_config.parameters_of(*arguments) | {"n_devices": 99}

    monkeypatch.setattr(deep, "parameters_of", of_99_devices)
    said = "n_devices is 99, but JAX sees 8: predicting on 8; accepted without a warning: 0 "
    with pytest.warns(RuntimeWarning, match=said):
        loaded = DeepClustering.load(tmp_path / "model")
    check_same(loaded, fitted, blobs[0])
    assert loaded.n_devices == 99
    unpickled = pickle.loads(pickle.dumps(loaded))
    with pytest.warns(RuntimeWarning, match=said):
        np.testing.assert_array_equal(unpickled.predict(blobs[0]), fitted.labels_)
    with pytest.raises(ValueError, match=r"n_devices is 99, but JAX sees 8 \(cpu\); accepted: 0"):
        DeepClustering.load(tmp_path / "model", n_devices=99)


def test_temporary_folders_go_with_the_estimator(fitted):
    other = copy.deepcopy(fitted)
    folder = other._run.path
    assert (folder / "config.json").is_file()
    del other
    gc.collect()
    assert not folder.exists()


def test_save_and_load(fitted, blobs, tmp_path):
    x, folder = blobs[0], tmp_path / "new" / "model"
    fitted.save(folder)
    loaded = DeepClustering.load(folder)
    check_same(loaded, fitted, x)
    assert loaded.config_ == fitted.config_
    assert (loaded.method, loaded.widths, loaded.n_clusters) == ("idec", (16,), 3)
    assert loaded.options == TINY["options"]
    # A command reads it too.
    np.save(tmp_path / "x.npy", x)
    evaluation.predict_file(folder, tmp_path / "x.npy", str(tmp_path / "found.npz"), n_devices=1)
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_array_equal(found["labels"], fitted.labels_)
    # Saving replaces what save has written, also where it came from.
    (folder / "stray").write_text("of before")
    loaded.save(folder)
    assert not (folder / "stray").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    second = DeepClustering.load(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    check_same(second, fitted, x)
    again = clone(second).fit(x)
    np.testing.assert_array_equal(again.embeddings_, fitted.embeddings_)


def test_a_fit_that_is_stopped_after_training_leaves_the_model_of_before(blobs, monkeypatch):
    x = blobs[0]
    model = make().fit(x)
    labels, history = model.labels_.copy(), model.history_

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "predict", stop)
    with pytest.raises(KeyboardInterrupt):
        model.fit(-x)
    monkeypatch.undo()
    assert model.history_ is history
    np.testing.assert_array_equal(model.labels_, labels)
    np.testing.assert_array_equal(model.predict(x), labels)


def test_threads_leave_stdout_where_it_is(fitted, blobs):
    before = sys.stdout
    with ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(fitted.predict, blobs[0]) for _ in range(40)]:
            np.testing.assert_array_equal(found.result(), fitted.labels_)
    assert sys.stdout is before


def test_folders_that_are_none_or_at_home(blobs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="workdir is empty; accepted: a folder, or None"):
        make(workdir="").fit(blobs[0])
    monkeypatch.setenv("HOME", str(tmp_path))
    first = make(workdir="~/run", random_state=None).fit(blobs[0])
    assert (tmp_path / "run" / "config.json").exists()
    again = make(workdir="~/run", random_state=None).fit(blobs[0])  # Of the seed of the first.
    assert again.config_ == first.config_


def test_a_save_to_a_link_goes_where_it_leads(fitted, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        fitted.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert DeepClustering.load(tmp_path / "real").inertia_ == fitted.inertia_


def test_a_save_that_fails_leaves_what_was_there(fitted, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    fitted.save(folder)
    rename = os.rename

    def fail_in_between(source, target):
        if Path(target) == folder and ".new-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_in_between)
    with pytest.raises(OSError, match="No space left"):
        fitted.save(folder)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert DeepClustering.load(folder).inertia_ == fitted.inertia_


def test_a_saved_file_that_is_cut_has_a_sentence(fitted, tmp_path):
    folder = tmp_path / "model"
    fitted.save(folder)
    content = (folder / FITTED_FILE).read_bytes()
    (folder / FITTED_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is damaged .*without this file the model loads"):
        DeepClustering.load(folder)
    (folder / FITTED_FILE).unlink()
    assert DeepClustering.load(folder).inertia_ == fitted.inertia_


def test_folders_that_are_something_else(fitted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="was not written by save; accepted: a new or empty"):
            fitted.save(folder)
        with pytest.raises(ValueError, match=r"holds no config\.json; accepted: a folder that"):
            DeepClustering.load(folder)
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file; accepted: a new or empty"):
        fitted.save(tmp_path / "notes.txt" / "model")
    (tmp_path / "empty").mkdir()
    fitted.save(tmp_path / "empty")
    assert DeepClustering.load(tmp_path / "empty").inertia_ == fitted.inertia_


def test_parameters(fitted):
    parameters = fitted.get_params()
    assert parameters == make().get_params()
    other = clone(fitted).set_params(n_clusters=5, options={"objective.cluster_weight": 0.2})
    assert not hasattr(other, "labels_")
    config = other._config(0)
    assert (config.n_clusters, config.objective.cluster_weight) == (5, 0.2)
    given = make(widths=np.array([8, 4]), batch_size=np.int64(16), learning_rate=np.float32(0.5))
    config = given._config(0)
    assert (config.network.widths, config.training.batch_size) == ((8, 4), 16)
    assert config.training.learning_rate == 0.5
    # What was given stands against the settings of the method.
    views = make("swav", augmentation={"shift": 3.0})._config(0).augmentation
    assert views.shift == 3.0
    assert make("swav")._config(0).augmentation.shift == 1.0


# Interruption


@pytest.mark.slow
def test_an_interrupted_fit_goes_on(blobs, tmp_path, monkeypatch, capfd):
    x, workdir = blobs[0], tmp_path / "run"
    epochs = []
    plain = recorder.Recorder.epoch

    def stop_in_the_third(self, phase, epoch, *rest):
        epochs.append(epoch)
        plain(self, phase, epoch, *rest)
        if epoch == 3 and len(epochs) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(recorder.Recorder, "epoch", stop_in_the_third)
    model = make(workdir=workdir, random_state=None)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"):
        model.fit(x)
    with pytest.raises(NotFittedError):
        model.predict(x)
    assert capfd.readouterr() == ("", "")
    resumed = clone(model).set_params(verbose=True).fit(x)
    output = capfd.readouterr()
    assert "going on after epoch 3 of 4" in output.err
    assert "Results in" in output.out
    assert epochs == [1, 2, 3, 4]
    seed = json.loads((workdir / "config.json").read_text())["seed"]
    straight = make(random_state=seed).fit(x)
    np.testing.assert_array_equal(resumed.embeddings_, straight.embeddings_)
    np.testing.assert_array_equal(resumed.labels_, straight.labels_)
    assert without_times(resumed.history_) == without_times(straight.history_)
    # Finished: the same fit trains nothing, another one is refused.
    epochs.clear()
    check_same(clone(model).fit(x), resumed, x)
    assert epochs == []
    with pytest.raises(ValueError, match=r"holds a run with another config: n_clusters is 4"):
        clone(model).set_params(n_clusters=4).fit(x)
    with pytest.raises(ValueError, match="holds a run on other data"):
        clone(model).fit(x + 1)


def test_collapse_says_that_a_temporary_folder_goes(blobs):
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(CollapseError, match="a temporary folder, which is removed"),
    ):
        make(learning_rate=1e30).fit(blobs[0])


# Bad input


def test_bad_parameters(blobs):
    x = blobs[0]
    for changes, message in (
        ({"method": "none"}, "the method is 'none'; accepted: 'joint', "),
        ({"n_clusters": 0}, "'n_clusters' parameter of DeepClustering must be an int"),
        ({"n_clusters": 204}, "n_samples=203 should be >= n_clusters=204"),
        ({"n_epochs": -1}, "'n_epochs' parameter of DeepClustering must be"),
        ({"widths": ()}, r"config\.network\.widths is \(\); accepted"),
        ({"widths": (2.5,)}, r"config\.network\.widths is \(2\.5,\); accepted"),
        ({"network": "none"}, r"config\.network\.name is 'none'; accepted: "),
        ({"scale": "big"}, "'scale' parameter of DeepClustering must be"),
        ({"augmentation": {"shear": 1}}, "augmentation has a key 'shear'; accepted: shift, "),
        ({"augmentation": {"shift": 1}}, r"asks for views, but the examples have shape \[12\]"),
        ({"options": {"objective.gamma": 1.0}}, r"'objective\.gamma' that is not known"),
        ({"options": {"objective": 1}}, "options has a key 'objective'; accepted: full names"),
        ({"options": {"seed.x": 1}}, "options has a key 'seed.x'; accepted: full names"),
        ({"options": {"n_seeds": 2}}, "options has n_seeds = 2; accepted: 1"),
        ({"options": {"data.n_examples": 20}}, "options has a key 'data.n_examples'; accepted"),
        ({"random_state": -1}, "'random_state' parameter of DeepClustering must be"),
        ({"n_devices": 99}, "99"),
    ):
        model = make(**changes)
        with pytest.raises(ValueError, match=message):
            model.fit(x)
        assert not hasattr(model, "labels_")


def test_a_path_is_no_array():
    with pytest.raises(ValueError, match=r"X is the path 'x\.npy'; accepted: an array"):
        DeepClustering(n_clusters=3).fit("x.npy")


def test_bad_examples(fitted, blobs):
    x = blobs[0]
    with pytest.raises(NotFittedError):
        make().predict(x)
    with pytest.raises(NotFittedError):
        make().save("nowhere")
    with_nan = x.copy()
    with_nan[17, 2] = np.nan
    for use in (make().fit, fitted.predict, fitted.transform, fitted.score):
        with pytest.raises(ValueError, match="X has NaN or infinity in 1 of 203 rows, the first "):
            use(with_nan)
        with pytest.raises(ValueError, match="Reshape your data"):
            use(x[0])
        with pytest.raises(ValueError, match="minimum of 1 is required"):
            use(x[:0])
        with pytest.raises(TypeError, match="Sparse data was passed"):
            use(csr_array(x))
        with pytest.raises(ValueError, match="Complex data not supported"):
            use(x + 1j)
    with pytest.raises(ValueError, match="X has 5 features, but DeepClustering is expecting 12 "):
        fitted.predict(x[:, :5])
    with pytest.raises(ValueError, match=r"X is of shape \[203, 3, 4\]; accepted: \[n, 12\]"):
        fitted.predict(x.reshape(203, 3, 4))
    np.testing.assert_array_equal(fitted.predict(jax.numpy.asarray(x)), fitted.labels_)


@pytest.mark.slow
def test_import_stays_light():
    program = (
        "import jkmeans, sys; getattr(jkmeans, sys.argv[1]) if len(sys.argv) > 1 else 0;"
        "print(sorted({'flax', 'orbax', 'sklearn', 'optax'} & set(sys.modules)))"
    )
    for arguments, expected in (
        ([], "[]"),
        (["KMeans"], "['sklearn']"),
        (["DeepClustering"], "['flax', 'optax', 'orbax', 'sklearn']"),
    ):
        run = [sys.executable, "-c", program, *arguments]
        assert subprocess.check_output(run, text=True).strip() == expected


@pytest.mark.slow
@parametrize_with_checks([make(n_pretrain_epochs=1, n_epochs=1, n_clusters=2)])
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_checks(estimator, check):
    check(estimator)
