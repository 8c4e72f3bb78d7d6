"""The notebook case in small: what it measures agrees with scikit-learn."""

import importlib
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from jkmeans.blobs import FIELDS, cluster_blobs, draw, validate
from jkmeans.configuration import convert_fields, to_json
from jkmeans.errors import UserError
from tests.test_launchers import run


def make_config(**changes) -> ConfigDict:
    config = importlib.import_module("configs.blobs_1m").get_config()
    config.blobs.n_samples = 5001
    config.n_init = 2
    for name, value in changes.items():
        *groups, leaf = name.split("__")
        node = config
        for group in groups:
            node = node[group]
        del node[leaf]
        node[leaf] = value
    return config


@pytest.mark.parametrize("n_devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_labels_are_those_of_scikit_learn(n_devices, tmp_path):
    results = cluster_blobs(make_config(n_devices=n_devices), tmp_path / "w")
    assert results["ari_truth"] == 1.0
    assert results["ari_scikit_learn"] == 1.0
    assert results["ari_one_run"] == 1.0
    np.testing.assert_allclose(results["inertia"], results["scikit_learn_inertia"], rtol=1e-4)
    seconds = {name: value for name, value in results.items() if name.endswith("_seconds")}
    assert len(seconds) == 11
    assert all(value >= 0 for value in seconds.values())
    assert json.loads((tmp_path / "w" / "results.json").read_text()) == results
    assert (tmp_path / "w" / "blobs.png").stat().st_size > 10_000


def test_the_picture_shows_every_cluster_where_it_is():
    x = np.asarray([[0.0, 0.0]] * 50 + [[1.0, 1.0]] * 50, np.float32)
    labels = np.repeat([0, 1], 50)
    figure = draw(x, labels, np.asarray([[0.0, 0.0], [1.0, 1.0]]), "title")
    axes = figure.axes[0]
    image = np.asarray(axes.images[0].get_array())
    from matplotlib import colormaps

    # Two cells only, each in the full colour of its cluster: low left, and high right.
    rows, columns = np.nonzero((image < 1).any(axis=2))
    assert len(rows) == 2
    assert rows[0] < 100
    assert columns[0] < 100
    assert rows[1] > 500
    assert columns[1] > 500
    np.testing.assert_allclose(image[rows, columns], colormaps["tab10"].colors[:2], atol=1e-6)


def test_one_feature(tmp_path):
    results = cluster_blobs(
        make_config(
            blobs__n_features=1, blobs__n_clusters=2, blobs__cluster_std=0.01, n_devices=1,
            scikit_learn=False,
        ),
        tmp_path / "w",
    )  # fmt: skip
    assert results["ari_truth"] == 1.0
    assert "scikit_learn_inertia" not in results
    assert (tmp_path / "w" / "blobs.png").exists()


def test_the_config_keeps_the_contract():
    module = importlib.import_module("configs.blobs_1m")
    config = module.get_config()
    assert (config.blobs.n_samples, config.blobs.n_features) == (1_000_000, 2)
    valid = validate(config)
    assert valid == config
    values = ConfigDict(json.loads(json.dumps(to_json(valid))))
    assert convert_fields(values, FIELDS) == convert_fields(valid, FIELDS)
    assert "python -m experiments.blobs --config configs/blobs_1m.py --workdir" in module.__doc__


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blobs__n_samples", 0),
        ("blobs__n_clusters", 6000),
        ("blobs__cluster_std", -1.0),
        ("blobs__center_box", (1.0, 0.0)),
        ("blobs__center_box", (0.0, 1.0, 2.0)),
        ("blobs__center_box", 10.0),
        ("blobs__center_box", ("a", "b")),
        ("init", "best"),
        ("n_devices", 999),
    ],
)
def test_bad_values(name, value, tmp_path):
    with pytest.raises(UserError) as caught:
        cluster_blobs(make_config(**{name: value}), tmp_path / "w")
    assert name.replace("__", ".") in str(caught.value)
    assert "accepted" in str(caught.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_command(tmp_path):
    ended = run(
        "blobs", "--config=configs/blobs_1m.py", f"--workdir={tmp_path / 'w'}",
        "--config.blobs.n_samples=5000", "--config.n_init=1", "--config.pictures=False",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "fit_seconds" in ended.stdout
    assert "scikit_learn_fit_seconds" in ended.stdout


def test_the_command_answers_in_a_sentence(tmp_path):
    ended = run(
        "blobs", "--config=configs/blobs_1m.py", f"--workdir={tmp_path / 'v'}",
        "--config.blobs.n_samples=-5",
    )  # fmt: skip
    assert ended.returncode == 2
    assert "config.blobs.n_samples is -5; accepted: an integer of at least 1" in ended.stderr
