"""Several seeds in one program are the runs that each of them would be."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from jkmeans import evaluation, training
from jkmeans.checkpoints import Checkpoints
from jkmeans.errors import CollapseError, UserError
from jkmeans.interruption import Interrupted
from jkmeans.methods import with_method
from jkmeans.recorder import read_metrics
from jkmeans.training import collapse, seeds
from jkmeans.training import side_by_side as side_by_side_module
from tests import tiny
from tests.test_training import stop_in_third_epoch

N_SEEDS = 4


def side_by_side(workdir, config, **changes):
    for name, value in {"n_seeds": N_SEEDS, "seed": 3, **changes}.items():
        setattr(config, name, value)
    return training.train(config, tiny.dataset(), workdir)


def alone(workdir, config, seed):
    config = config.copy_and_resolve_references()
    config.n_seeds, config.seed = 1, seed
    return training.train(config, tiny.dataset(), workdir)


def records(workdir):
    timed = ("seconds", "examples_per_second")
    return [
        {k: v for k, v in record.items() if k not in timed and isinstance(v, float)}
        for record in read_metrics(workdir)
    ]


def check_summary(workdir, summary):
    values = summary["inertia"]["values"]
    assert len(set(values)) == N_SEEDS
    np.testing.assert_allclose(summary["inertia"]["mean"], np.mean(values))
    np.testing.assert_allclose(summary["inertia"]["sd"], np.std(values, ddof=1))
    assert json.loads((workdir / "seeds.json").read_text()) == summary


# One method that re-clusters, one with learned clusters, one with steps of its own.
@pytest.mark.parametrize(
    ("method", "n_devices"),
    [
        ("joint", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("joint", 8), ("dcn", 1), ("dec", 2), ("dec", 3))
        ),
    ],
)
def test_equal_to_a_run_of_its_own(tmp_path, method, n_devices):
    config = tiny.config(n_devices=n_devices)  # Of joint training.
    if method != "joint":
        config = with_method(config, method)
    began = time.perf_counter()
    summary = side_by_side(tmp_path / "together", config)
    # Of the seconds that all took, each has its share; they are rounded to .1.
    limit = time.perf_counter() - began + 0.05 * N_SEEDS
    assert sum(summary["train_seconds"]["values"]) <= limit
    check_summary(tmp_path / "together", summary)
    # As if it had been killed before it was reported.
    (tmp_path / "together" / "seed_4" / "results.json").unlink()
    assert side_by_side(tmp_path / "together", config) == summary
    assert (tmp_path / "together" / "seed_4" / "results.json").exists()
    first, seed = 3, 5  # Neither the first nor the last.
    one = alone(tmp_path / "alone", config, seed)
    folder = tmp_path / "together" / f"seed_{seed}"
    results = json.loads((folder / "results.json").read_text())
    assert summary["inertia"]["values"][seed - first] == results["inertia"]
    np.testing.assert_allclose(results["inertia"], one["inertia"], rtol=1e-4)
    assert results["acc"] == one["acc"]
    for ours, theirs in zip(records(folder), records(tmp_path / "alone"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    model = evaluation.load_model(folder)
    x, _ = tiny.blobs()
    np.testing.assert_allclose(
        model.centroids, evaluation.load_model(tmp_path / "alone").centroids, rtol=1e-3, atol=1e-3
    )
    assert evaluation.predict(model, x).labels.shape == (len(x),)


@pytest.mark.slow
def test_seeds_differ_and_are_summarised(tmp_path):
    summary = side_by_side(tmp_path, tiny.config())
    check_summary(tmp_path, summary)
    means = [record["loss"] for record in read_metrics(tmp_path)]
    each = [
        [record["loss"] for record in read_metrics(tmp_path / f"seed_{seed}")]
        for seed in range(3, 3 + N_SEEDS)
    ]
    np.testing.assert_allclose(means, np.mean(each, axis=0), rtol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = side_by_side(tmp_path / "whole", tiny.config())

    class Once:
        """An interruption that is asked for in the second epoch."""

        requested = True

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def announced(self):
            return False

        def leave(self):
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr("jkmeans.training.side_by_side.Interruption", Once)
        began = time.perf_counter()
        with pytest.raises(Interrupted):
            side_by_side(tmp_path / "parts", tiny.config())
    assert spent(tmp_path / "parts") <= time.perf_counter() - began
    assert len(read_metrics(tmp_path / "parts")) == 1
    began, before = time.perf_counter(), spent(tmp_path / "parts")
    parts = side_by_side(tmp_path / "parts", tiny.config())
    # Seconds of each are rounded to tenths.
    rounding = 0.05 * N_SEEDS
    limit = before + time.perf_counter() - began + rounding
    assert before - rounding <= sum(parts["train_seconds"]["values"]) <= limit
    assert parts["inertia"]["values"] == whole["inertia"]["values"]
    assert len(read_metrics(tmp_path / "parts" / "seed_3")) == 4
    # And a finished one is only read.
    again = side_by_side(tmp_path / "parts", tiny.config())
    assert again["inertia"] == parts["inertia"]


def spent(workdir):
    """The seconds that the newest checkpoints of all seeds stand for."""
    seconds = 0.0
    for folder in workdir.glob("seed_*/checkpoints"):
        with Checkpoints(folder) as checkpoints:
            seconds += checkpoints.record(checkpoints.positions()[-1])["seconds"]
    return seconds


def kept(**changes):
    """A config that keeps the state after every epoch."""
    return tiny.config(checkpoint__every=1, checkpoint__keep=9, **changes)


def files(workdir):
    """Contents by name, of what a finished run must keep."""
    names = ("metrics.jsonl", "config.json", "checkpoints/*/*/*")
    return {path: path.read_bytes() for n in names for path in workdir.glob(n) if path.is_file()}


def damage(folder):
    for path in folder.glob("training/**/d/*"):
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.slow
def test_more_seeds_train_the_new_ones_only(tmp_path, capfd):
    two = side_by_side(tmp_path / "w", tiny.config(), n_seeds=2)
    before = files(tmp_path / "w" / "seed_3") | files(tmp_path / "w" / "seed_4")
    three = side_by_side(tmp_path / "w", tiny.config(), n_seeds=3)
    assert "holds the finished runs of seeds 3, 4" in capfd.readouterr().out
    assert files(tmp_path / "w" / "seed_3") | files(tmp_path / "w" / "seed_4") == before
    assert three["inertia"]["values"][:2] == two["inertia"]["values"]
    seconds = three["train_seconds"]["values"]
    assert seconds[:2] == two["train_seconds"]["values"]
    assert three["inertia"]["values"][2] == alone(tmp_path / "one", tiny.config(), 5)["inertia"]


@pytest.mark.slow
def test_more_seeds_than_one_train_together(tmp_path):
    side_by_side(tmp_path / "w", tiny.config(), n_seeds=2)
    means = (tmp_path / "w" / "metrics.jsonl").read_bytes()
    four = side_by_side(tmp_path / "w", tiny.config())
    whole = side_by_side(tmp_path / "whole", tiny.config())
    np.testing.assert_allclose(four["inertia"]["values"], whole["inertia"]["values"], rtol=1e-3)
    assert (tmp_path / "w" / "metrics.jsonl").read_bytes() == means
    assert len(read_metrics(tmp_path / "w" / "seeds_5_6")) == 4


# Orbax leaves what it could not read to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "damaged", "trained"),
    [
        # Of seeds 3 and 4, the numbers of their newest checkpoints that are gone; a seed, and the
        # number of its checkpoint, from the newest on, that is damaged.
        ((1, 1), (0, 0), "nothing"),
        ((1, 2), (0, 0), "together"),
        ((1, 1), (4, 2), "together"),
        ((1, 2), (3, 3), "apart, for what they had together is damaged"),
        ((1, 4), (0, 0), "apart"),
        ((1, 4), (0, 0), "apart, though they once were together"),
    ],
)
def test_seeds_that_stopped_at_different_places(lost, damaged, trained, tmp_path, capfd):
    whole = side_by_side(tmp_path, kept(), n_seeds=2)
    capfd.readouterr()
    for seed, n_lost in zip((3, 4), lost, strict=True):
        folder = tmp_path / f"seed_{seed}" / "checkpoints"
        newest = sorted(map(int, (p.name for p in folder.iterdir() if p.name.isdecimal())))
        for position in newest[-n_lost:]:
            shutil.rmtree(folder / str(position))
        if seed == damaged[0]:
            damage(folder / str(newest[-damaged[1]]))
        if trained in ("apart", "apart, though they once were together") and seed == 3:
            for position in newest[1 if "once" in trained else 0 : -2]:
                shutil.rmtree(folder / str(position))
    again = side_by_side(tmp_path, kept(), n_seeds=2)
    said = capfd.readouterr()
    assert ("training seeds" in said.out) == trained.startswith("apart")
    assert ("going back to the one before" in said.err + said.out) == any(damaged)
    rtol = 1e-4 if trained.startswith("apart") else 0
    np.testing.assert_allclose(again["inertia"]["values"], whole["inertia"]["values"], rtol=rtol)
    for seed in (3, 4):
        assert [r["epoch"] for r in read_metrics(tmp_path / f"seed_{seed}")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_seed_that_stopped_within_an_epoch_goes_on_from_there(tmp_path, monkeypatch, capfd):
    whole = side_by_side(tmp_path / "whole", tiny.config(), n_seeds=2)
    with monkeypatch.context() as patch:
        stop_in_third_epoch(patch)
        with pytest.raises(Interrupted):
            alone(tmp_path / "w" / "seed_3", tiny.config(data__placement="host"), 3)
    capfd.readouterr()
    found = side_by_side(tmp_path / "w", tiny.config(), n_seeds=2)
    assert "training seeds 3 from epoch 2 on" in capfd.readouterr().out
    np.testing.assert_allclose(found["inertia"]["values"], whole["inertia"]["values"], rtol=1e-3)
    for seed in (3, 4):
        ours, theirs = (records(tmp_path / w / f"seed_{seed}") for w in ("w", "whole"))
        assert [one["loss"] for one in ours] == pytest.approx([one["loss"] for one in theirs], 1e-4)


@pytest.mark.slow
def test_a_run_that_one_seed_left_can_go_on_alone(tmp_path):
    side_by_side(tmp_path, tiny.config())
    config = tiny.config()
    assert alone(tmp_path / "seed_4", config, 4)["n_epochs"] == 4


def test_one_after_the_other_from_the_seed_of_the_config(tmp_path, monkeypatch):
    trained = []

    def train(config, workdir):
        trained.append((config.seed, config.n_seeds, workdir.name))
        return {"acc": 0.5}

    monkeypatch.setattr(seeds, "train_and_evaluate", train)
    config = tiny.config(seed=3, data__path=str(tmp_path / "x.npy"))
    seeds.train_seeds(config, tmp_path, 2)
    assert trained == [(3, 1, "seed_3"), (4, 1, "seed_4")]
    config.n_seeds = 2
    with pytest.raises(UserError, match=r"config.n_seeds is 2, .* accepted: 1, with --n_seeds"):
        seeds.train_seeds(config, tmp_path, 2)


def test_a_last_seed_that_is_too_large_is_refused_before_the_first_trains(tmp_path):
    config, sentence = (
        tiny.config(seed=2**31 - 1),
        "config.seed is 2147483648; accepted: an integer",
    )
    with pytest.raises(UserError, match=f"{sentence} from 0 to 2147483647"):
        seeds.train_seeds(config, tmp_path / "w", 2)
    with pytest.raises(UserError, match=sentence):
        side_by_side(tmp_path / "w", config, n_seeds=2, seed=2**31 - 1)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_seeds_of_which_one_is_pretrained_begin_together(tmp_path, monkeypatch):
    """No seed takes up a network unless all do; the first clusters of each are looked at."""
    by_descent = {"training__optimizer": "sgd", "training__clustering_optimizer": "sgd"}
    config = tiny.config(**by_descent, training__learning_rate=0.1)
    whole = side_by_side(tmp_path / "whole", config.copy_and_resolve_references(), n_seeds=2)
    config.training.pretrained_folder = str(tmp_path / "networks")
    alone(tmp_path / "alone", config, 4)
    looked_at = []
    check = collapse.check_pretrained

    def note(config, workdir, found):
        looked_at.append(workdir.name)
        check(config, workdir, found)

    monkeypatch.setattr(collapse, "check_pretrained", note)
    found = side_by_side(tmp_path / "w", config, n_seeds=2)
    assert found["inertia"] == whole["inertia"]
    assert looked_at == ["seed_3", "seed_4"]


@pytest.mark.slow
def test_a_stop_at_the_very_end_is_heard(tmp_path, monkeypatch):
    finish = side_by_side_module.SideBySide._finish

    def stop(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side_module.SideBySide, "_finish", stop)
        with pytest.raises(Interrupted):
            side_by_side(tmp_path, tiny.config(), n_seeds=2)
    assert not (tmp_path / "seeds.json").exists()
    before = files(tmp_path / "seed_4")
    side_by_side(tmp_path, tiny.config(), n_seeds=2)
    assert files(tmp_path / "seed_4") == before


def test_folders_of_one_run_and_of_several_are_not_mixed(tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several / "seed_3"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"holds a run, a job or an experiment .*; accepted: another"
    ):
        side_by_side(one, tiny.config())
    with pytest.raises(UserError, match=r"holds a run, a job or an"):
        seeds.train_seeds(tiny.config(), one, 2)
    with pytest.raises(UserError, match=r"holds the runs of several seeds"):
        alone(several, tiny.config(), 3)
    assert [path.name for path in one.iterdir()] == ["config.json"]
    assert [path.name for path in several.iterdir()] == ["seed_3"]
    with pytest.raises(UserError, match=r"accepted: one of the folders of its seeds, .*/seed_3"):
        evaluation.load_model(several)
    # Where both are, of before that was refused, the one run goes on.
    shutil.copytree(several / "seed_3", one / "seed_3")
    with pytest.raises(UserError, match=r"is not the config of a run"):
        alone(one, tiny.config(), 3)


def test_fed_examples_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"n_seeds is 4, but the examples are fed .* accepted: 1"):
        side_by_side(tmp_path, tiny.config(data__placement="host"))


def test_the_collapse_of_one_seed_ends_them_all(tmp_path):
    config = tiny.config(training__collapse_ratio=0.999)
    with pytest.raises(CollapseError):
        side_by_side(tmp_path, config)
