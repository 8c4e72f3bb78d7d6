"""What a config may say: every file in configs/, every field, every kind of bad value."""

import importlib
import json
import math
import pathlib

import pytest
from ml_collections import ConfigDict

from jkmeans import configuration
from jkmeans.configuration import (
    FIELDS,
    check_data,
    differences,
    fields_of,
    from_json,
    to_json,
    validate,
)
from jkmeans.errors import UserError
from jkmeans.methods import METHODS, with_method
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
# Those of experiments.train; other experiments have configs, and tests, of their own.
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if "experiments.train" in p.read_text()
)


# The common fields, and those of joint deep k-means, whose the tiny config is.
ALL = fields_of(tiny.config())


def changed(name, value, config=None):
    """The tiny config, or another, with one field replaced, of whatever type."""
    config = tiny.config() if config is None else config
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
        node = node[group]
    del node[leaf]  # ml_collections would convert to the type that was there.
    node[leaf] = value
    return config


def get(config, name):
    for part in name.split("."):
        config = config[part]
    return config


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


# Every file in configs/.


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_keeps_the_contract(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    if config.data.name == "npy":
        config.data.path = "/examples.npy"
    assert sorted(leaves(config.to_dict())) == sorted(fields_of(config))
    valid = validate(config)
    # Nothing was converted: what the file says is what runs.
    assert valid == config
    assert all(type(get(valid, f)) is type(get(config, f)) for f in fields_of(config))
    assert from_json(json.loads(json.dumps(to_json(valid)))) == valid
    command = f"python -m experiments.train --config configs/{name}.py --workdir runs/"
    assert command in module.__doc__


def test_there_are_configs():
    assert {"digits", "mnist", "fashion_mnist", "npy"} <= set(CONFIGS)


def test_json_keeps_types():
    valid = validate(tiny.config(network__widths=(3, 5)))
    again = from_json(json.loads(json.dumps(to_json(valid))))
    assert again.network.widths == (3, 5)
    assert isinstance(again.network.widths, tuple)
    assert isinstance(again.objective.centroid_weight, float)


def test_validation_leaves_the_config_alone():
    config = tiny.config()
    before = config.to_json()
    validate(config)
    assert config.to_json() == before


def test_validation_is_idempotent():
    valid = validate(tiny.config())
    assert validate(valid) == valid


def test_an_integer_is_a_number():
    value = validate(changed("objective.warmup_epochs", 3)).objective.warmup_epochs
    assert value == 3.0
    assert isinstance(value, float)


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny.config(data__path="a.npy", data__labels_path="~/b.npy")
    valid = validate(config)
    assert valid.data.path == str(tmp_path / "a.npy")
    assert valid.data.labels_path == str(pathlib.Path.home() / "b.npy")
    assert validate(tiny.config(data__labels_path="")).data.labels_path == ""


# Bad values.


def kind(field) -> str:
    accepted = field.accepted
    for start, found in {
        "an integer": "integer",
        "a number": "number",
        "True": "boolean",
        "a tuple": "integers",
        "text": "text",
    }.items():
        if accepted.startswith(start):
            return found
    return "choice"


WRONG_TYPES = {
    "integer": [1.0, "1", None, True, (1,)],
    "number": ["1", None, True, (1.0,), 1j],
    "boolean": [1, "True", None],
    "integers": [3, "3", None, (1.0,), (True,), ("3",)],
    "text": [3, None, True, ("a",)],
    "choice": [3, None, True, ("digits",)],
}
BAD_VALUES = {
    "integer": [-1, 2**31],
    "number": [-1, -1e-9, math.nan, math.inf, -math.inf, 10**400],
    "boolean": [],
    "integers": [(0,), (8, -1)],
    "text": [],
    "choice": ["", "no-such-thing"],
}


def check_refusals(name, field, config=None):
    for value in WRONG_TYPES[kind(field)] + BAD_VALUES[kind(field)]:
        message = refusal(changed(name, value, config))
        shown = repr(value)
        assert message.startswith(f"config.{name} is {shown[:100]}")
        accepted = field.accepted
        if value == 2**31:  # A bound that is named where it is broken.
            accepted = accepted.replace("of at least", "from")
            accepted += f" to {2**31 - 1}" * (accepted != field.accepted)
        assert message.endswith(f"; accepted: {accepted}")


@pytest.mark.parametrize("name", ALL)
def test_bad_values_are_refused(name):
    check_refusals(name, ALL[name])


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("seed", 0),
        ("n_devices", 0),
        ("n_clusters", 1),
        ("data.n_shards", 1),
        ("network.embedding_dim", 1),
        ("training.batch_size", 1),
        ("centroids.n_init", 1),
        ("centroids.every", 1),
        ("checkpoint.every", 1),
        ("checkpoint.keep", 1),
    ],
)
def test_least_values(name, least):
    assert get(validate(changed(name, least)), name) == least
    message = refusal(changed(name, least - 1))
    assert f"config.{name} is {least - 1}" in message


@pytest.mark.parametrize(
    "name",
    ["objective.temperature", "training.learning_rate", "training.clustering_learning_rate"],
)
def test_zero_is_refused_where_one_divides_or_steps_by_it(name):
    assert f"config.{name} is 0.0; accepted: a number above 0" in refusal(changed(name, 0.0))


def test_most_shards():
    assert "from 1 to 65536" in refusal(changed("data.n_shards", 65537))


@pytest.mark.parametrize("name", ["network.name", "objective.name"])
def test_these_may_name_a_function(name):
    assert get(validate(changed(name, "mine:f")), name) == "mine:f"


@pytest.mark.parametrize("name", ["network.name", "objective.name"])
def test_only_these_may_name_a_function(name):
    assert "'module:function'" in refusal(changed(name, "mine"))
    assert "'module:function'" not in refusal(changed("training.optimizer", "mine:f"))


# Fields that should not be there, or should.


def test_an_unknown_field_suggests_the_near_one():
    config = tiny.config()
    config.training.bach_size = 3
    message = refusal(config)
    assert message == (
        "config has a field 'training.bach_size' that is not known; "
        "did you mean 'training.batch_size'?"
    )


def test_an_unknown_field_that_is_near_to_nothing_lists_all():
    config = tiny.config()
    config.zzzzzz = 3
    message = refusal(config)
    assert "'zzzzzz'" in message
    assert all(name in message for name in ALL)


def test_the_config_of_a_table_is_none_of_a_run():
    table = importlib.import_module("configs.table_digits").get_config()
    with pytest.raises(UserError, match=r"has runs, .* trained by experiments.table"):
        configuration.validate(table)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_field_is_named(name):
    config = tiny.config()
    *groups, leaf = name.split(".")
    node = get(config, ".".join(groups)) if groups else config
    del node[leaf]
    message = refusal(config)
    if len(node) == 0:  # A group of one field.
        assert message.startswith(f"config.{groups[0]} is {{}}; accepted: a group")
        assert name in message
    else:
        assert message.startswith(f"config lacks the field {name!r}")
        assert message.endswith(ALL[name].accepted)


@pytest.mark.parametrize("value", [3, "x", None, ConfigDict()])
def test_a_group_replaced_by_a_value(value):
    message = refusal(changed("network", value))
    shown = {} if isinstance(value, ConfigDict) else value
    assert message.startswith(f"config.network is {shown!r}; accepted: a group of the fields")
    assert "network.embedding_dim" in message


@pytest.mark.parametrize("value", [ConfigDict({"a": 1, "b": 2}), ConfigDict()])
@pytest.mark.parametrize("name", ["seed", "network.widths", "objective.temperature"])
def test_a_value_replaced_by_a_group(name, value):
    message = refusal(changed(name, value))
    assert message.startswith(f"config.{name} is {value.to_dict()!r}; accepted: ")


@pytest.mark.parametrize(
    "values", [None, [], 3, "x", {"data.name": "digits"}, {"data": 3}, {"a": {"b": [{"c": 1}]}}]
)
def test_json_that_is_no_config(values):
    with pytest.raises(UserError):
        from_json(values)


def test_values_that_are_older_than_a_field():
    young = tiny.config(training__optimizer="sgd", training__schedule="cosine")
    old = to_json(with_method(young, "vade"))
    for group, field in (
        ("network", "initializer"), ("network", "precision"), ("training", "clustering_optimizer"),
        ("training", "clustering_schedule"), ("training", "pretrain_precision"),
        ("objective", "likelihood"),
        ("objective", "pixel_variance"), ("augmentation", "pretraining"),
        ("objective", "responsibilities"), ("objective", "mixture_rate_factor"),
    ):  # fmt: skip
        del old[group][field]
    found = from_json(old)
    assert (found.network.initializer, found.network.precision) == ("glorot_uniform", "float32")
    assert found.training.clustering_optimizer == "sgd"
    assert found.training.clustering_schedule == "cosine"
    assert found.augmentation.pretraining
    assert found.objective.responsibilities == "sample"
    assert found.objective.mixture_rate_factor == 1.0
    assert (found.objective.likelihood, found.objective.pixel_variance) == ("bernoulli", 0.1)
    both = to_json(tiny.config(network__precision="bfloat16"))
    del both["training"]["pretrain_precision"]
    assert from_json(both).training.pretrain_precision == "bfloat16"
    dcn = to_json(with_method(tiny.config(), "dcn"))
    del dcn["objective"]["assignment"]
    assert from_json(dcn).objective.assignment == "nearest"
    joint = from_json(to_json(tiny.config()))
    assert "likelihood" not in joint.objective
    del old["network"]["widths"]
    with pytest.raises(UserError, match=r"lacks the field 'network\.widths'"):
        from_json(old)


# Contradictions.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network__decoder": False, "objective__balance_weight": 1.0}, "network.normalize = True"),
        ({"network__decoder": False, "network__normalize": True}, "balance_weight above 0"),
        (
            {
                "network__decoder": False,
                "network__normalize": True,
                "objective__balance_weight": 1.0,
            },
            "config.training.n_pretrain_epochs is 2, but without a decoder",
        ),
        ({"data__path": ""}, "config.data.path is '', but data.name is 'npy'"),
        (
            {"training__n_pretrain_epochs": 0, "training__n_epochs": 0},
            "accepted: at least one epoch",
        ),
        ({"network__widths": ()}, "config.network.widths is ()"),
    ],
)
def test_contradictions(changes, said):
    message = refusal(tiny.config(**changes))
    assert said in message
    assert "accepted" in message


@pytest.mark.parametrize(
    "changes",
    [
        {
            "network__decoder": False,
            "network__normalize": True,
            "objective__balance_weight": 1.0,
            "training__n_pretrain_epochs": 0,
        },
        {"data__name": "digits", "data__path": ""},
        {"training__n_pretrain_epochs": 0},
        {"training__n_epochs": 0},
        {"network__widths": (), "network__name": "mine:f"},
        {"network__decoder": False, "objective__name": "mine:f"},
    ],
)
def test_what_is_near_to_a_contradiction_but_none(changes):
    validate(tiny.config(**changes))


# Comparing configs, and with the data.

RUNTIME = {
    "data.path": "/elsewhere.npy",
    "data.labels_path": "/labels.npy",
    "n_devices": 4,
    "data.placement": "host",
    "data.chunk_mebibytes": 1,
    "training.pretrained_folder": "/pretrained",
    "checkpoint.every": 7,
    "checkpoint.keep": 7,
    "report.pictures": True,
}


@pytest.mark.parametrize("name", RUNTIME)
def test_differences_of_the_machine_do_not_count(name):
    other = validate(changed(name, RUNTIME[name]))
    assert get(other, name) != get(validate(tiny.config()), name)
    assert differences(validate(tiny.config()), other) == []


@pytest.mark.parametrize("name", [f for f in ALL if f not in RUNTIME])
def test_all_other_differences_count(name):
    old = get(tiny.config(), name)
    chosen = {
        "data.name": "digits",
        "data.split": "train",
        "augmentation.zoom": 0.5,
        "network.name": "convolutional",
        "network.initializer": "fan_in_uniform",
        "network.precision": "bfloat16",
        "network.widths": (3,),
        "objective.name": "mine:f",
        "objective.assignment": "stored",
        "centroids.init": "sample",
        "centroids.bank": "refreshed",
        "centroids.empty": "keep",
        "training.pretrain_precision": "bfloat16",
        "training.optimizer": "sgd",
        "training.clustering_optimizer": "sgd",
        "training.schedule": "cosine",
        "training.clustering_schedule": "cosine",
        "training.collapse_ratio": 0.5,
        "reset.kept": 0.5,
    }
    if name in chosen:
        new = chosen[name]
    elif isinstance(old, bool):
        new = not old
    else:
        new = "/other.npy" if isinstance(old, str) else old + 3
    if name == "network.decoder":
        config = tiny.config(
            network__decoder=True, network__normalize=True, objective__balance_weight=1.0
        )
        config.training.n_pretrain_epochs = 0
        ours = validate(config)
        config.network.decoder = False
        theirs = validate(config)
    else:
        ours, theirs = validate(tiny.config()), validate(changed(name, new))
    a, b = get(ours, name), get(theirs, name)
    assert differences(ours, theirs) == [f"{name} is {a!r} here and {b!r} there"]


def test_clusters_and_examples():
    config = validate(tiny.config(n_clusters=5))
    check_data(config, 5, (12,))
    with pytest.raises(UserError, match=r"config.n_clusters is 5, but there are 4 .*: 1 to 4"):
        check_data(config, 4, (12,))


@pytest.mark.parametrize("name", ["shift", "rotation", "zoom"])
def test_only_images_have_views(name):
    config = validate(changed(f"augmentation.{name}", 0.5))
    check_data(config, 9, (8, 8))
    check_data(config, 9, (8, 8, 3))
    for shape in ((12,), (), (2, 2, 2, 2)):
        with pytest.raises(UserError, match=r"config.augmentation asks .* accepted: \[height"):
            check_data(config, 9, shape)


def test_a_zoom_of_one_would_be_a_point():
    message = refusal(changed("augmentation.zoom", 1.0))
    assert message == "config.augmentation.zoom is 1.0; accepted: 0 to below 1"


def test_a_reset_keeps_no_more_than_all():
    message = refusal(changed("reset.kept", 1.5))
    assert message == "config.reset.kept is 1.5; accepted: 0 to 1"


def test_every_field_has_a_meaning():
    own = [field for spec in METHODS.values() for field in spec.fields.values()]
    assert all(field.meaning and field.accepted for field in [*FIELDS.values(), *own])
    assert set(configuration._RUNTIME) <= {*FIELDS, "checkpoint.", "report."}


# Methods have fields of their own.

OWN = [(name, field) for name, spec in METHODS.items() for field in spec.fields]


def config_of(name, **changes):
    """The tiny config as a method wants it."""
    if name == "n2d":
        tiny.skip_without_umap()
    return with_method(tiny.config(data__path="/blobs.npy"), name, **changes)


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_a_method_make_a_valid_config(name):
    config = config_of(name)
    assert sorted(leaves(config.to_dict())) == sorted(fields_of(config))
    assert set(fields_of(config)) == {*FIELDS, *(f"objective.{f}" for f in METHODS[name].fields)}
    valid = validate(config)
    assert valid == config
    for field, value in METHODS[name].settings.items():
        assert get(valid, field) == value
        assert type(get(valid, field)) is type(value)
    # All of its own fields are among its settings: none is left to chance.
    assert {f"objective.{f}" for f in METHODS[name].fields} <= set(METHODS[name].settings)
    assert from_json(json.loads(json.dumps(to_json(valid)))) == valid


def test_another_method_leaves_the_config_alone():
    config = tiny.config()
    before = config.to_json()
    other = config_of("vade", training__n_epochs=7)
    assert (other.training.n_epochs, other.network.widths) == (7, config.network.widths)
    assert config.to_json() == before


@pytest.mark.parametrize(("name", "field"), OWN)
def test_bad_values_of_a_methods_own_fields_are_refused(name, field):
    full = f"objective.{field}"
    check_refusals(full, METHODS[name].fields[field], config_of(name))


@pytest.mark.parametrize(("name", "field"), OWN)
def test_a_missing_field_of_a_method_is_named(name, field):
    config = config_of(name)
    del config.objective[field]
    accepted = METHODS[name].fields[field].accepted
    message = refusal(config)
    assert message.startswith(f"config lacks the field 'objective.{field}'")
    assert message.endswith(accepted)


@pytest.mark.parametrize(
    ("name", "field"),
    [("dec", "cluster_weight"), ("autoencoder", "centroid_weight"), ("vade", "alpha")],
)
def test_a_field_of_another_method_is_refused(name, field):
    config = config_of(name)
    config.objective[field] = 0.1
    message = refusal(config)
    assert message.startswith(f"config has a field 'objective.{field}' that is not known; ")


def test_no_method_of_this_name():
    with pytest.raises(UserError, match=r"the method is 'dek'; accepted: 'joint', .*'dec', "):
        with_method(tiny.config(), "dek")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        *(
            (name, {"network__decoder": False}, f"config.network.decoder is False, but {name} has")
            for name in ("autoencoder", "dec", "idec", "dcn", "dkm", "vade", "n2d")
        ),
        *(
            (name, changes, said)
            for name in ("dec", "idec")
            for changes, said in (
                (
                    {"centroids__bank": "stored", "augmentation__shift": 1.0},
                    "config.centroids.bank is 'stored'",
                ),
                ({"centroids__every": 2}, "config.centroids.every is 2"),
                ({"centroids__n_iterations": 0}, "config.centroids.n_iterations is 0"),
            )
        ),
        *(
            (name, changes, said)
            for name in ("deepcluster_v2", "swav")
            for changes, said in (
                ({"network__normalize": False}, f"but {name} compares directions; accepted: True"),
                ({"network__decoder": False}, "config.training.n_pretrain_epochs is 2, but"),
            )
        ),
        (
            "swav",
            {"augmentation__shift": 0.0, "augmentation__rotation": 0.0},
            "config.augmentation.shift, rotation and zoom are all 0",
        ),
        (
            "swav",
            {"augmentation__invariance": True},
            "config.augmentation.invariance is True, but swav compares two views",
        ),
        ("vade", {"network__name": "fully_connected"}, "is 'fully_connected', but vade needs"),
        ("vade", {"network__normalize": True}, "config.network.normalize is True, but"),
        (
            "vade",
            {
                "objective__responsibilities": "stored",
                "centroids__bank": "stored",
                "augmentation__shift": 1.0,
            },
            "config.centroids.bank is 'stored', but the responsibilities of vade are of the",
        ),
        ("n2d", {"training__n_epochs": 1}, "config.training.n_epochs is 1, but"),
        ("n2d", {"objective__min_dist": 1.5}, "config.objective.min_dist is 1.5; accepted: 0 to 1"),
    ],
)
def test_contradictions_of_a_method(name, changes, said):
    message = refusal(config_of(name, **changes))
    assert said in message
    assert "accepted" in message


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swav", {"augmentation__shift": 0.0}),
        ("swav", {"network__decoder": False, "training__n_pretrain_epochs": 0}),
        ("deepcluster_v2", {"network__decoder": False, "training__n_pretrain_epochs": 0}),
        ("deepcluster_v2", {"centroids__bank": "stored"}),
        ("dcn", {"centroids__bank": "stored", "centroids__n_iterations": 0}),
        ("idec", {"centroids__bank": "stored"}),
        ("idec", {"augmentation__shift": 1.0}),
        ("vade", {"network__name": "mine:f"}),
        ("n2d", {"objective__min_dist": 1.0}),
    ],
)
def test_what_is_near_to_a_contradiction_of_a_method_but_none(name, changes):
    validate(config_of(name, **changes))


def test_differences_between_methods():
    dec, idec = validate(config_of("dec")), validate(config_of("idec"))
    # What only one of them has is no difference of its own.
    assert differences(dec, idec) == ["objective.name is 'dec' here and 'idec' there"]
    assert differences(idec, dec) == ["objective.name is 'idec' here and 'dec' there"]
    vade = validate(config_of("vade"))
    assert set(differences(dec, vade)) == {
        "network.name is 'fully_connected' here and 'variational' there",
        "objective.name is 'dec' here and 'vade' there",
        "centroids.bank is 'refreshed' here and 'stored' there",
        "centroids.n_iterations is 1 here and 10 there",
    }
    other = validate(config_of("idec", objective__cluster_weight=0.5))
    assert differences(idec, other) == ["objective.cluster_weight is 0.1 here and 0.5 there"]
