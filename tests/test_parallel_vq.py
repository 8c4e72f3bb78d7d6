"""The experiment on parallel vector quantization: files, resuming, speed-ups, answers."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from configs import parallel_vq, parallel_vq_mnist, parallel_vq_patches
from jkmeans.errors import CollapseError, UserError
from jkmeans.interruption import Interrupted
from jkmeans.vq import Setting, data, experiment, figures
from jkmeans.vq.data import load_samples
from jkmeans.vq.experiment import run_experiment, validate
from jkmeans.vq.figures import Curve, speed_up, table, time_to


def small():
    config = parallel_vq.get_config()
    config.n_seeds = 2
    config.n_clusters = 5
    config.data.n_samples = 300
    config.mixture.n_components = 6
    config.mixture.n_features = 8
    config.mixture.n_knots = 12
    config.tau = 5
    config.duration = 100
    config.n_evaluations = 4
    config.figures.averaging = ()
    config.figures.displacements = ()
    config.figures.tau = (5,)
    config.figures.tau_workers = 2
    config.figures.delays = ()
    config.figures.scaling = (1, 2)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vq")
    return workdir, run_experiment(small(), workdir)


def curve(times, *distortion):
    setting = Setting("averaging", 2, 1, 1.0, ("constant", 0.1, 0.0), 10, 2)
    return Curve(setting, np.array(times), np.array(distortion, np.float64))


def test_an_experiment_leaves_its_figures_curves_and_table(finished):
    workdir, results = finished
    assert set(results) == {"tau", "scaling"}
    assert results == json.loads((workdir / "results.json").read_text())
    for found in results.values():
        assert found["sequential, M = 1"]["mean"] == 1
    for name in results:
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (workdir / "speed_ups.md").read_text()
    assert "0.05 (C₁(0) − C₁(T))" in text
    assert text.count("| B: displacements, M = 2, τ = 5 |") == 2
    lines = (workdir / "curves.csv").read_text().splitlines()
    # Three settings, of which two figures share one; two seeds; the beginning and 4 evaluations.
    assert len(lines) == 1 + 3 * 2 * 5
    assert lines[1].startswith("averaging,1,5,0,0,0,")


def test_a_resumed_experiment_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    workdir, results = finished
    made = []
    simulate = experiment.run

    def run_and_count(*arguments):
        made.append(arguments)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return simulate(*arguments)

    monkeypatch.setattr(experiment, "run", run_and_count)
    with pytest.raises(Interrupted) as caught:
        run_experiment(small(), tmp_path)
    assert caught.value.exit_status == 143
    assert len(list(tmp_path.glob("simulations/*.npz"))) == 3
    # One that is cut in half is made again.
    damaged = next(tmp_path.glob("simulations/*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run_experiment(small(), tmp_path) == results
    assert len(made) == 3 + 4
    for name in ("curves.csv", "speed_ups.md"):
        assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes()


def test_more_seeds_are_added_to_those_that_are_there(finished, monkeypatch):
    workdir, results = finished
    made = []
    simulate = experiment.run
    monkeypatch.setattr(experiment, "run", lambda *a: made.append(a) or simulate(*a))
    config = small()
    config.n_seeds = 3
    more = run_experiment(config, workdir)
    assert [arguments[1] for arguments in made] == [2, 2, 2]
    assert more["tau"]["sequential, M = 1"]["n_seeds"] == 3
    assert run_experiment(small(), workdir) == results


def test_another_config_or_other_data_are_refused(finished):
    workdir, _ = finished
    config = small()
    config.steps.a = 0.5
    with pytest.raises(UserError, match=r"another config: steps\.a is 0\.5 here and 0\.02 there"):
        run_experiment(config, workdir)
    np.save(workdir / "x.npy", np.zeros((300, 8)))
    config = small()
    config.data.input = str(workdir / "x.npy")
    with pytest.raises(UserError, match="the data are other ones"):
        run_experiment(config, workdir)


def test_experiments_do_not_share_a_folder(finished, tmp_path):
    workdir, _ = finished
    config = small()
    config.engine = "ray"
    with pytest.raises(UserError, match=r"holds .* \(config\.json\); accepted: another"):
        run_experiment(config, workdir)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an experiment \(settings\.json\); accepted"):
        run_experiment(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_divergence_is_told_after_all_others_are_done(tmp_path):
    config = small()
    config.n_seeds = 1
    config.steps.a = 2.5
    config.figures.scaling = ()
    with pytest.raises(CollapseError, match="2 of 2 simulations diverged") as caught:
        run_experiment(config, tmp_path)
    assert caught.value.exit_status == 3
    assert "| – |" in (tmp_path / "speed_ups.md").read_text()
    for path in tmp_path.glob("simulations/*.npz"):
        assert np.isfinite(np.load(path)["shared"]).all()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([[10, 6, 2], [10, 8, 4]], ""),
        ([[10, 60, 2], [10, 80, 4]], " (up to 70)"),
        ([[10, 60, 2], [10, 8, np.nan]], " (1 of 2 diverged, up to 34)"),
        ([[10, np.nan, np.nan], [10, np.nan, np.nan]], " (2 of 2 diverged)"),
    ],
)
def test_the_name_of_a_curve_says_what_the_picture_does_not_show(values, says):
    values = np.asarray(values, float)
    assert figures.fate(values, values.mean(axis=0), ceiling=11.0) == says


def test_time_to_a_threshold_goes_by_straight_lines():
    times = np.array([0, 10, 20])
    assert time_to(5, times, np.array([8.0, 6.0, 2.0])) == 12.5
    assert time_to(9, times, np.array([8.0, 6.0, 2.0])) == 0
    assert np.isnan(time_to(1, times, np.array([8.0, 6.0, 2.0])))
    assert np.isnan(time_to(1, times, np.array([8.0, 6.0, np.nan])))


def test_speed_ups_by_hand():
    one = curve([0, 10, 20], [10, 5, 0], [10, 5, 0])
    # To reach 10 % of the fall above the end, that is 1, takes one worker 18.
    other = curve([0, 10, 20], [10, 0, 0], [10, 4, 3])
    found = speed_up(one, other, 0.1)
    assert found.mean == pytest.approx(18 / 9)
    assert (found.n_reached, found.n_diverged, found.n_seeds) == (1, 0, 2)
    assert np.isnan(found.sd)
    lost = curve([0, 10, 20], [10, np.nan, np.nan], [10, 0, 0])
    assert speed_up(one, lost, 0.1).n_diverged == 1
    # One worker that ends worse than it began sets no aim.
    worse = curve([0, 10, 20], [10, 12, 11], [10, 5, 0])
    assert speed_up(worse, other, 0.1).n_reached == 0
    text = table({"x": ("Title", [one.setting])}, {one.setting: one}, 0.1)
    assert "| A: averaging, M = 2, τ = 1 | 1.00 ± 0.00 | 2 of 2 | 0 | 0 |" in text


def test_real_data_and_files(tmp_path):
    config = small()
    config.data.input, config.data.patch, config.data.n_samples = "digits", 4, 100
    patches = load_samples(validate(config))
    assert patches.shape == (100, 16)
    assert patches.dtype == np.float32
    assert 0 <= patches.min() < patches.max() <= 1
    np.save(tmp_path / "x.npy", np.arange(12).reshape(6, 2))
    config.data.input, config.data.patch, config.data.n_samples = str(tmp_path / "x.npy"), 0, 0
    np.testing.assert_array_equal(load_samples(validate(config)), np.arange(12).reshape(6, 2))
    config.data.input = "mnst"
    with pytest.raises(UserError, match=r"mnst does not exist; accepted: mixture, digits, mnist, "):
        load_samples(validate(config))


def test_a_file_is_read_in_chunks(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    config = small()
    config.data.input, config.data.n_samples = str(tmp_path / "x.npy"), 20
    whole = load_samples(validate(config))
    monkeypatch.setattr(data, "_CHUNK_BYTES", 7 * 3 * 4)
    np.testing.assert_array_equal(load_samples(validate(config)), whole)
    place = [int(np.flatnonzero((rows == row).all(axis=1))[0]) for row in whole]
    assert place == sorted(set(place))
    assert len(place) == 20
    rows[30] = np.nan
    np.save(tmp_path / "x.npy", rows)
    with pytest.raises(UserError, match="from row 28 on"):
        load_samples(validate(config))


@pytest.mark.parametrize("module", [parallel_vq, parallel_vq_mnist, parallel_vq_patches])
def test_configs_are_complete(module):
    validate(module.get_config())


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("figures.averaging", (0,), "a tuple of integers of at least 1"),
        ("tau", 0, "an integer of at least 1"),
        ("figures.tau_workers", 1, "an integer of at least 2"),
        ("figures.tau", (10, 0), "a tuple of integers of at least 1"),
        ("delay", 0.0, "a number of samples, at least 1"),
        ("delay", -2.0, "a number of samples, at least 1"),
        ("delay", float("nan"), "a number of samples, at least 1"),
        ("n_clusters", 301, "1 to 300"),
        ("init_samples", 61, "up to that many"),
        ("figures.scaling", (301,), "1 to 300"),
        ("steps.name", "linear", "'constant', 'inverse'"),
        ("engine", "dask", "'simulation', 'ray'"),
        ("duration", 4, "but tau is 5; accepted: at least 5"),
        ("figures.tau", (5, 1000), "but figures.tau goes up to 1,000; accepted: at least 1,000"),
        ("data.patch", 8, "0 for all but sets of images"),
        ("data.n_samples", 0, "at least 1 for the mixture"),
        ("threshold", 1.0, "0 to below 1"),
    ],
)
def test_bad_input_is_answered_before_anything_is_made(tmp_path, field, value, accepted):
    config = small()
    with config.ignore_type():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match="accepted") as caught:
        run_experiment(config, tmp_path / "vq")
    assert accepted in str(caught.value)
    assert not (tmp_path / "vq").exists()


@pytest.mark.slow
def test_launcher_answers_in_a_sentence(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.parallel_vq", "--config=configs/parallel_vq.py",
            f"--workdir={tmp_path / 'vq'}", "--config.tau=0",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "parallel_vq: config.tau is 0; accepted: an integer of at least 1\n"
