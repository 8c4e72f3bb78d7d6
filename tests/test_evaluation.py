"""A trained run used from its folder alone."""

import json
import os
import shutil

import numpy as np
import pytest

from jkmeans import evaluation, training
from jkmeans.checkpoints import Checkpoints
from jkmeans.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and its data."""
    folder = tmp_path_factory.mktemp("run")
    examples, labels = tiny.blobs()
    np.save(folder / "x.npy", examples)
    np.save(folder / "y.npy", labels)
    config = tiny.config(
        data__path=str(folder / "x.npy"),
        data__labels_path=str(folder / "y.npy"),
        training__n_epochs=3,
        n_devices=1,
    )
    results = training.train_and_evaluate(config, folder / "work")
    return folder, folder / "work", examples, labels, results


@pytest.mark.parametrize("n_devices", [1, pytest.param(3, marks=pytest.mark.slow), 8])
def test_evaluation_repeats_the_results_of_the_run(run, n_devices):
    _, workdir, _, _, results = run
    again = evaluation.evaluate(workdir, n_devices=n_devices)
    for name in ("acc", "nmi", "ari", "purity", "empty_clusters", "n_examples", "n_clusters"):
        assert again[name] == pytest.approx(results[name], abs=1e-9), name
    assert again["inertia"] == pytest.approx(results["inertia"], rel=1e-4)
    assert json.loads((workdir / "evaluation.json").read_text()) == again


@pytest.mark.parametrize(("factor", "warns"), [(1.0, False), (255.0, True)])
def test_examples_in_other_units_are_worth_a_warning(factor, warns, run, tmp_path, capsys):
    _, workdir, examples, _, results = run
    np.save(tmp_path / "new.npy", (factor * examples).astype(np.float32))
    evaluation.predict_file(workdir, str(tmp_path / "new.npy"), str(tmp_path / "found.npz"))
    said = "".join(capsys.readouterr())
    assert ("as far from the centroids (squared) as those of training" in said) == warns
    # What it is measured by is the distance of the training data.
    distances = np.load(tmp_path / "found.npz")["distances"]
    model = evaluation.load_model(workdir)
    assert model.mean_distance == pytest.approx(results["inertia"] / len(examples))
    assert (distances.mean() > 10 * model.mean_distance) == warns
    if not warns:
        assert distances.mean() == pytest.approx(model.mean_distance, rel=1e-3)


def test_prediction_equals_the_network_by_hand(run):
    _, workdir, examples, _, _ = run
    model = evaluation.load_model(workdir)
    new = tiny.blobs(seed=3)[0]
    found = evaluation.predict(model, new)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert model.position == checkpoints.positions()[-1]
    from tests.test_training import arrays_of

    arrays = arrays_of(workdir)
    w = {k.split("'")[-2]: v.astype(np.float64) for k, v in arrays.items() if "parameters" in k}
    hidden = np.maximum(new @ w["encoder/0/kernel"] + w["encoder/0/bias"], 0)
    z = hidden @ w["encoder/1/kernel"] + w["encoder/1/bias"]
    distances = ((z[:, None] - model.centroids[None]) ** 2).sum(-1)
    np.testing.assert_allclose(found.embeddings, z, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.labels, distances.argmin(1))
    np.testing.assert_allclose(found.distances, distances.min(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(evaluation.embed(model, new), found.embeddings)
    assert len(found.labels) == len(new) != len(examples) + 1


def test_prediction_in_blocks_tells_how_far_it_is(run):
    _, workdir, examples, _, _ = run
    model = evaluation.load_model(workdir, n_devices=2)
    many = np.concatenate([examples] * 12)  # 2,436 rows: a pair of blocks, and a rest.
    seen = []
    found = evaluation.predict(model, many, seen.append)
    assert seen == [2048, 2436]
    whole = evaluation.predict(model, examples)
    np.testing.assert_array_equal(found.labels, np.concatenate([whole.labels] * 12))
    np.testing.assert_allclose(
        found.embeddings, np.concatenate([whole.embeddings] * 12), rtol=1e-5, atol=1e-6
    )


def test_predict_file(run, tmp_path):
    folder, workdir, examples, _, _ = run
    output = tmp_path / "clusters.npz"
    evaluation.predict_file(workdir, str(folder / "x.npy"), str(output), embeddings=True)
    with np.load(output) as file:
        assert file["labels"].shape == file["distances"].shape == (len(examples),)
        assert file["labels"].dtype == np.int32
        assert file["embeddings"].shape == (len(examples), 4)
        assert file["centroids"].shape == (3, 4)
        nearest = file["centroids"][file["labels"]]
        squared = ((file["embeddings"] - nearest) ** 2).sum(1)
        np.testing.assert_allclose(file["distances"], squared, rtol=1e-3, atol=1e-5)


def test_other_examples_and_labels(run, tmp_path):
    _, workdir, examples, labels, _ = run
    evaluation.evaluate(workdir)
    own = (workdir / "evaluation.json").read_bytes()
    np.save(tmp_path / "new.npy", examples[:50])
    np.save(tmp_path / "new_labels.npy", labels[:50])
    results = evaluation.evaluate(
        workdir,
        input_path=str(tmp_path / "new.npy"),
        labels_path=str(tmp_path / "new_labels.npy"),
    )
    assert results["n_examples"] == 50
    assert 0 <= results["acc"] <= 1
    assert results["data"] == str(tmp_path / "new.npy")
    assert json.loads((workdir / "evaluation-new.json").read_text()) == results
    assert (workdir / "evaluation.json").read_bytes() == own
    assert "acc" not in evaluation.evaluate(workdir, input_path=str(tmp_path / "new.npy"))
    with pytest.raises(UserError, match=r"--split is 'val'; accepted: 'all', 'train', 'test'"):
        evaluation.evaluate(workdir, split="val")


@pytest.mark.parametrize("wanted", ["latest", "best"])
def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_damaged(
    wanted, run, tmp_path, monkeypatch, capsys
):
    _, workdir, _, _, _ = run
    copy = tmp_path / "work"
    shutil.copytree(workdir, copy)
    position = evaluation.load_model(copy, wanted).position
    chosen = copy / "checkpoints" / str(position)
    os.rename(chosen, tmp_path / "newer")
    chosen.mkdir()  # As if it was being removed.
    listed, times = Checkpoints.positions, []
    monkeypatch.setattr(Checkpoints, "best", lambda self: listed(self)[-1])

    def positions(self):
        times.append(len(times))
        if times[-1] == 2:
            chosen.rmdir()
            os.rename(tmp_path / "newer", copy / "checkpoints" / str(position + 1))
        return listed(self)

    monkeypatch.setattr(Checkpoints, "positions", positions)
    assert evaluation.load_model(copy, wanted).position == position + 1
    assert "going back" not in "".join(capsys.readouterr())


def test_best_and_numbered_checkpoints(run):
    _, workdir, _, _, _ = run
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        positions, best = checkpoints.positions(), checkpoints.best()
    assert evaluation.load_model(workdir, "best").position == best
    assert evaluation.load_model(workdir, str(positions[0])).position == positions[0]
    for wrong in ("12345", "²"):
        sentence = rf"--checkpoint is '{wrong}'; accepted: 'latest', 'best'"
        with pytest.raises(UserError, match=sentence):
            evaluation.load_model(workdir, wrong)


def test_a_damaged_newest_checkpoint_falls_back(run, tmp_path, capsys):
    _, workdir, _, _, _ = run
    shutil.copytree(workdir, tmp_path / "copy")
    with Checkpoints(tmp_path / "copy" / "checkpoints") as checkpoints:
        positions = checkpoints.positions()
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / str(positions[-1]) / "model")
    model = evaluation.load_model(tmp_path / "copy")
    assert model.position == positions[-2]
    assert "going back to the one before" in capsys.readouterr().out
    # Reading changes nothing: the damaged one is still where it was.
    with Checkpoints(tmp_path / "copy" / "checkpoints") as checkpoints:
        assert checkpoints.positions() == positions


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (np.zeros((5, 11), np.float32), r"\[.*11\].*12"),
        (np.zeros((0, 12), np.float32), "holds no data"),
        (np.full((5, 12), np.nan, np.float32), "NaN or infinity in 5 of 5 rows"),
        (np.zeros((5, 12), complex), "complex"),
    ],
)
def test_bad_examples(run, examples, message):
    model = evaluation.load_model(run[1])
    with pytest.raises(UserError, match=message):
        evaluation.predict(model, examples)


def test_no_run(tmp_path):
    with Checkpoints(tmp_path / "stream" / "checkpoints") as checkpoints:
        checkpoints.save(1, {"state": {"sums": np.zeros(3)}}, {"options": {}}, None)
        checkpoints.wait()
    with pytest.raises(
        UserError, match=r"checkpoints, but not of a network; accepted: a --workdir"
    ):
        evaluation.load_model(tmp_path / "stream")
    (tmp_path / "stream" / "centroids.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"this one is of experiments\.cluster"):
        evaluation.load_model(tmp_path / "stream")
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluation.evaluate(tmp_path)


@pytest.mark.parametrize("output", ["clusters.txt", "missing/clusters.npz"])
def test_bad_output(run, output, tmp_path):
    folder, workdir, *_ = run
    with pytest.raises(UserError, match="--output"):
        evaluation.predict_file(workdir, str(folder / "x.npy"), str(tmp_path / output))
    assert not list(tmp_path.iterdir())
