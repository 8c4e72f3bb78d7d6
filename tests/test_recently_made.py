"""Programs that a process keeps: the same answers, and only where they are the same programs."""

import threading

import jax
import numpy as np
import pytest

from jkmeans import datasets, evaluation, training
from jkmeans.configuration import validate
from jkmeans.evaluation import model
from jkmeans.recently_made import RecentlyMade, kind_of_programs
from jkmeans.sharding import make_mesh
from jkmeans.training import programs
from jkmeans.training.run import Run
from tests import tiny
from tests.test_training import assert_same_bits

CLEARED = (programs.recently_prepared, model.recently_prepared)


@pytest.fixture
def compiled():
    """The names of the functions that were compiled, as they come."""
    names = []

    def listen(event, seconds, **more):
        del seconds
        if event.endswith("backend_compile_duration"):
            names.append(more["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def forget():
    for kept in CLEARED:
        kept.forget()


def test_the_last_few_are_kept():
    made = []
    kept = RecentlyMade(2)

    def get(key):
        return kept.get(key, lambda: made.append(key) or key)

    assert [get(key) for key in "abacab"] == list("abacab")
    assert made == ["a", "b", "c", "b"]
    kept.forget()
    get("b")
    assert made == ["a", "b", "c", "b", "b"]


def test_threads_have_one_and_the_same():
    kept, both, found = RecentlyMade(2), threading.Barrier(2), []

    def get():
        found.append(kept.get("a", lambda: (both.wait() and None) or object()))

    threads = [threading.Thread(target=get) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]


def test_what_programs_do_not_depend_on():
    kind = kind_of_programs(validate(tiny.config()))
    changes = {
        "seed": 7,
        "data.path": "other.npy",
        "data.placement": "host",
        "checkpoint.every": 9,
        "report.pictures": True,
        "training.pretrained_folder": "networks",
    }
    assert kind is not None
    assert kind == kind_of_programs(validate(tiny.config(**changes)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_seeds", 2),
        ("n_clusters", 4),
        ("network.widths", (15,)),
        ("network.precision", "bfloat16"),
        ("objective.centroid_weight", 0.5),
        ("centroids.every", 2),
        ("training.n_epochs", 3),
        ("training.learning_rate", 2e-3),
        ("training.pretrain_precision", "bfloat16"),
        ("reset.every", 1),
        ("augmentation.pretraining", False),
    ],
)
def test_what_programs_depend_on(name, value):
    kind = kind_of_programs(validate(tiny.config()))
    assert kind != kind_of_programs(validate(tiny.config(**{name: value})))


def test_programs_depend_on_what_jax_is_told():
    config = validate(tiny.config())
    kind = kind_of_programs(config)
    with jax.default_matmul_precision("bfloat16"):
        assert kind_of_programs(config) != kind
    with jax.enable_x64(True):
        assert kind_of_programs(config) != kind
    assert kind_of_programs(config) == kind


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.name": "tests.user_code:objective"},
        {"network.name": "tests.user_code:Small"},
    ],
)
def test_what_a_user_wrote_is_not_kept(changes):
    assert kind_of_programs(tiny.config(**changes)) is None


def test_a_second_run_compiles_nothing_and_has_the_same_bits(tmp_path, compiled):
    dataset = tiny.dataset()

    def run(name, seed, **changes):
        training.train(tiny.config(seed=seed, **changes), dataset, tmp_path / name)
        evaluation.predict(evaluation.load_model(tmp_path / name), dataset.examples)

    forget()
    run("first", 1)
    assert {"jit(call)", "jit(predict_local)"} <= set(compiled)
    compiled.clear()
    run("second", 2)
    assert compiled == []
    forget()
    compiled.clear()
    run("anew", 2)
    assert "jit(call)" in compiled
    assert_same_bits(tmp_path / "second", tmp_path / "anew")


def test_examples_of_another_type_have_programs_of_their_own():
    x = np.random.default_rng(0).integers(0, 9, (tiny.N_EXAMPLES, 6)).astype(np.uint8)
    config, mesh, banks = validate(tiny.config()), make_mesh(), []
    for kind in ("uint8", "float32"):
        dataset = datasets.from_arrays(x.astype(kind), name="x", scale=1.0)
        run = Run(config, None, dataset, mesh)
        banks.append(np.asarray(run.refresh(run.create()).bank))
    np.testing.assert_array_equal(*banks)
    assert len(run.prepared.compiled) == 2
