"""Pretrained networks that runs share: the same bits as pretraining, and never another's."""

import functools
import json

import jax
import numpy as np
import pytest

from jkmeans import datasets, pretrained, training
from jkmeans.configuration import validate
from jkmeans.methods import with_method
from jkmeans.pretrained import Pretrained
from jkmeans.training import checkpointing
from jkmeans.training.folder import describe_data
from jkmeans.training.seeds import train_side_by_side
from jkmeans.workdir import CHECKPOINT_FOLDER
from tests import tiny

# What compiles fast.
CHEAP = {"centroids__init": "sample", "centroids__empty": "keep", "n_devices": 1}
DATA = {"name": "blobs", "n_examples": 203, "checksum": 7}
FOUND = Pretrained({"encoder/0/kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, 2.5, 0.25)


def config_of(name, folder, **changes):
    named = {"training__pretrained_folder": str(folder)} | CHEAP | changes
    return validate(with_method(tiny.config(), name, **named))


# Files.


def test_what_is_saved_is_loaded(tmp_path):
    config = config_of("dec", tmp_path / "deep" / "er")
    assert pretrained.load(config, DATA) is None
    pretrained.save(config, DATA, FOUND)
    found = pretrained.load(config, DATA)
    assert found is not None
    assert (found.reference_variance, found.seconds) == (2.5, 0.25)
    assert set(found.parameters) == set(FOUND.parameters)
    for path, value in FOUND.parameters.items():
        np.testing.assert_array_equal(found.parameters[path], value)
        assert found.parameters[path].dtype == value.dtype
    assert len(list((tmp_path / "deep" / "er").iterdir())) == 1  # Nothing temporary is left.


@pytest.mark.parametrize(
    "changes", [{"training__pretrained_folder": ""}, {"training__n_pretrain_epochs": 0}]
)
def test_nothing_is_kept_without_a_folder_or_a_pretraining(changes, tmp_path):
    config = config_of("dec", tmp_path, **changes)
    pretrained.save(config, DATA, FOUND)
    assert pretrained.load(config, DATA) is None
    assert list(tmp_path.iterdir()) == []


OTHERS = {
    "seed": {"seed": 1},
    "shards": {"data__n_shards": 4},
    "embedding": {"network__embedding_dim": 5},
    "widths": {"network__widths": (17,)},
    "network": {"network__name": "convolutional"},
    "precision": {"training__pretrain_precision": "bfloat16"},
    "views": {"augmentation__shift": 1.0},
    "batch": {"training__batch_size": 33},
    "epochs": {"training__n_pretrain_epochs": 3},
    "optimizer": {"training__optimizer": "sgd"},
    "rate": {"training__learning_rate": 2e-3},
    "schedule": {"training__schedule": "cosine"},
    "decay": {"training__weight_decay": 0.5},
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_pretraining_has_another_network(other, tmp_path):
    pretrained.save(config_of("dec", tmp_path), DATA, FOUND)
    assert pretrained.load(config_of("dec", tmp_path, **OTHERS[other]), DATA) is None


def test_other_data_has_another_network(tmp_path):
    config = config_of("dec", tmp_path)
    pretrained.save(config, DATA, FOUND)
    assert pretrained.load(config, DATA | {"checksum": 8}) is None
    assert pretrained.load(config, dict(reversed(DATA.items()))) is not None


SAME = {
    "clusters": {"n_clusters": 4},
    "optimizer of clustering": {"training__clustering_optimizer": "sgd"},
    "schedule of clustering": {"training__clustering_schedule": "cosine"},
    "precision of clustering": {"network__precision": "bfloat16"},
    "rate of clustering": {"training__clustering_learning_rate": 0.1},
    "epochs of clustering": {"training__n_epochs": 5},
    "restarts": {"centroids__n_init": 3},
    "resets": {"reset__every": 1},
    "invariance": {"augmentation__invariance": True},
    "views of clustering alone": {"augmentation__shift": 1.0, "augmentation__pretraining": False},
    "devices": {"n_devices": 8},
}


@pytest.mark.parametrize("other", SAME)
def test_what_comes_after_pretraining_changes_nothing(other, tmp_path):
    pretrained.save(config_of("dec", tmp_path), DATA, FOUND)
    assert pretrained.load(config_of("dec", tmp_path, **SAME[other]), DATA) is not None


@pytest.mark.parametrize("name", ["joint", "autoencoder", "dec", "idec", "dcn", "dkm"])
def test_methods_of_the_same_pretraining_share(name, tmp_path):
    pretrained.save(config_of("idec", tmp_path), DATA, FOUND)
    assert pretrained.load(config_of(name, tmp_path), DATA) is not None


def test_vade_does_not_take_a_reconstruction_network(tmp_path):
    pretrained.save(config_of("dec", tmp_path), DATA, FOUND)
    vade = config_of("vade", tmp_path)
    assert pretrained.load(vade, DATA) is None
    pretrained.save(vade, DATA, FOUND)
    assert pretrained.load(vade, DATA) is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_vade_of_gaussian_pixels_does(tmp_path):
    pretrained.save(config_of("dec", tmp_path), DATA, FOUND)
    gaussian = config_of("vade", tmp_path, objective__likelihood="gaussian")
    assert pretrained.load(gaussian, DATA) is not None


def test_an_objective_of_the_user_shares_with_itself_alone(tmp_path):
    def users(name):
        config = tiny.config(training__pretrained_folder=str(tmp_path), objective__name=name)
        return validate(config)

    pretrained.save(users("tests.user_code:objective"), DATA, FOUND)
    assert pretrained.load(users("tests.user_code:objective"), DATA) is not None
    assert pretrained.load(users("tests.user_code:another"), DATA) is None
    assert pretrained.load(config_of("joint", tmp_path), DATA) is None


def test_another_source_of_a_users_network_has_another_one(tmp_path, monkeypatch):
    source = "def make(size, key):\n    return None\n"
    (tmp_path / "my_network.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny.config(
        training__pretrained_folder=str(tmp_path / "networks"), network__name="my_network:make"
    )
    pretrained.save(config, DATA, FOUND)
    assert pretrained.load(config, DATA) is not None
    (tmp_path / "my_network.py").write_text(source + "\n")
    assert pretrained.load(config, DATA) is None


def test_what_is_there_stays_unless_it_is_of_other_layers(tmp_path):
    config = config_of("dec", tmp_path)
    pretrained.save(config, DATA, FOUND)
    pretrained.save(config, DATA, FOUND._replace(reference_variance=3.0))
    found = pretrained.load(config, DATA)
    assert found is not None
    assert found.reference_variance == 2.5
    pretrained.save(config, DATA, FOUND._replace(parameters={"encoder/0/bias": np.zeros(3)}))
    found = pretrained.load(config, DATA)
    assert found is not None
    assert [*found.parameters] == ["encoder/0/bias"]


def damaged(how, whole: bytes) -> bytes:
    if how == "cut":
        return whole[: len(whole) // 2]
    if how == "changed":
        at = whole.index(np.float32(5).tobytes())
        return whole[:at] + b"\x01\x02\x03\x04" + whole[at + 4 :]
    return {"empty": b"", "text": b"not a network", "pickle": b"\x80\x04N."}[how]


@pytest.mark.parametrize("how", ["cut", "changed", "empty", "text", "pickle"])
def test_a_damaged_file_counts_as_none_and_is_replaced(how, tmp_path, capsys):
    config = config_of("dec", tmp_path)
    pretrained.save(config, DATA, FOUND)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damaged(how, path.read_bytes()))
    assert pretrained.load(config, DATA) is None
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {path} cannot be read (")
    assert said.endswith("; pretraining anew\n")
    pretrained.save(config, DATA, FOUND)
    assert pretrained.load(config, DATA) is not None


@pytest.mark.parametrize("kind", ["array", "archive"])
def test_a_file_of_something_else_counts_as_none(kind, tmp_path, capsys):
    config = config_of("dec", tmp_path)
    pretrained.save(config, DATA, FOUND)
    (path,) = tmp_path.iterdir()
    with open(path, "wb") as file:
        if kind == "array":
            np.save(file, np.zeros(3))
        else:
            np.savez(file, **{"encoder/0/kernel": np.zeros(3)})  # type: ignore[arg-type]
    assert pretrained.load(config, DATA) is None
    assert "cannot be read" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    pretrained.save(config_of("dec", file), DATA, FOUND)
    said = capsys.readouterr().out
    assert said.startswith("warning: the pretrained network is not kept for other runs (")


def test_the_description_is_plain(tmp_path):
    text = json.dumps(pretrained.description(config_of("dec", tmp_path), DATA))
    assert json.loads(text)["objective"] == "reconstruction"
    assert str(tmp_path) not in text


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def blobs() -> datasets.Dataset:
    return tiny.dataset()


def run_in(workdir, name, networks, **changes):
    """A whole run: its results, the bits of its model, and the epochs that it trained."""
    config = config_of(name, networks, **changes)
    results = training.train(config, blobs(), workdir)
    results = {k: v for k, v in results.items() if not k.endswith(("seconds", "mebibytes"))}
    run = training.Run(config, workdir, blobs(), training.make_mesh(1))
    with training.Checkpoints(workdir / CHECKPOINT_FOLDER, keep=2) as checkpoints:
        restored = checkpointing.restore(run, checkpoints)
    assert restored is not None
    state = restored[0]
    model = (state.parameters, state.clusters, state.labels, state.bank)
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return results, bits, [json.loads(line)["phase"] for line in lines]


@functools.cache
def alone(folder, name, **changes):
    return run_in(folder / f"alone-{name}", name, "", **changes)


OF = {"vade": {"objective__likelihood": "gaussian"}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # A network with a head more, which pretraining does not reach: both ways.
        ("dec", "vade"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("vade", "dec"), ("idec", "dec"), ("dec", "dec"), ("dec", "dcn"))
        ),
    ],
)
def test_a_run_that_takes_its_network_equals_one_that_pretrains(first, second, folder, capsys):
    networks = folder / f"networks-of-{first}"
    if not networks.exists():
        _, _, phases = run_in(folder / f"giver-{first}", first, networks, **OF.get(first, {}))
        assert phases == ["pretrain"] * 2 + ["cluster"] * 2
    assert len(list(networks.iterdir())) == 1
    capsys.readouterr()
    changes = OF.get(second, {})
    results, bits, phases = run_in(folder / f"taker-{first}-{second}", second, networks, **changes)
    assert "the network was pretrained by another run" in capsys.readouterr().out
    assert phases == ["cluster"] * 2
    expected, expected_bits, _ = alone(folder, second, **changes)
    assert results == expected
    assert bits == expected_bits
    assert len(list(networks.iterdir())) == 1


@pytest.mark.slow
def test_seeds_side_by_side_leave_the_networks_of_others(folder, capsys):
    networks = folder / "networks-of-seeds"
    run_in(folder / "giver-of-seeds", "dec", networks)
    (path,) = networks.iterdir()
    before = path.read_bytes()
    capsys.readouterr()
    config = config_of("dec", networks, n_seeds=2)
    train_side_by_side(config, blobs(), folder / "two-seeds")
    assert "pretrained by another run" not in capsys.readouterr().out
    assert path.read_bytes() == before
    assert len(list(networks.iterdir())) == 2
    train_side_by_side(config, blobs(), folder / "two-seeds-again")
    assert capsys.readouterr().out.count("pretrained by another run") == 2


@pytest.mark.parametrize("how", ["missing", "other shape"])
def test_a_network_of_other_layers_is_not_taken(how, tmp_path, capsys):
    """The user's own code has changed under its name; nothing of it may stay as it was drawn."""
    config = config_of("dec", tmp_path)
    run = training.Run(config, tmp_path / "run", blobs(), training.make_mesh(1))
    drawn = run.create()
    whole = {name: np.asarray(value) + 1 for name, value in drawn.parameters.items()}
    pretrained.save(config, run.data_record, Pretrained(whole, 2.0, 1.0))
    state, seconds = checkpointing.create_pretrained(run, checkpointing.find_pretrained(run))
    assert seconds == 1.0
    for name, value in whole.items():
        np.testing.assert_array_equal(state.parameters[name], value)
    kernel = whole.pop("encoder/0/kernel")
    if how == "other shape":
        whole["encoder/0/kernel"] = kernel[:, :-1]
    pretrained.save(config, run.data_record, Pretrained(whole, 2.0, 1.0))
    state, seconds = checkpointing.create_pretrained(run, checkpointing.find_pretrained(run))
    assert "has other layers than this one; pretraining anew" in capsys.readouterr().out
    assert seconds == 0.0
    assert int(state.epoch) == 0
    jax.tree.map(np.testing.assert_array_equal, state.parameters, drawn.parameters)


@pytest.mark.slow
def test_a_baseline_takes_a_network_too(folder):
    networks = folder / "networks-of-dec"
    run_in(folder / "giver-dec", "dec", networks)  # Reported again, where it is there.
    results, bits, phases = run_in(folder / "taker-autoencoder", "autoencoder", networks)
    assert phases == []
    expected, expected_bits, phases = alone(folder, "autoencoder")
    assert (results, bits, phases) == (expected, expected_bits, ["pretrain"] * 2)


@pytest.mark.slow
def test_a_run_with_a_damaged_network_pretrains_anew(folder, capsys):
    networks = folder / "damaged"
    networks.mkdir()
    record = describe_data(blobs())
    pretrained.save(config_of("dec", networks), record, FOUND)
    (path,) = networks.iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    results, bits, phases = run_in(folder / "damaged-run", "dec", networks)
    assert f"warning: {path} cannot be read" in capsys.readouterr().out
    assert phases == ["pretrain"] * 2 + ["cluster"] * 2
    expected, expected_bits, _ = alone(folder, "dec")
    assert (results, bits) == (expected, expected_bits)
    found = pretrained.load(config_of("dec", networks), record)
    assert found is not None
    assert set(found.parameters) != set(FOUND.parameters)
