"""What a config may say: checked once, at the door, into errors that name field and value.

A config is a complete ``ml_collections.ConfigDict``: every field of `FIELDS` is present, nothing
else is, and no code anywhere falls back to a hidden default.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jkmeans import datasets
from jkmeans.augmentation import VIEWS
from jkmeans.errors import UserError
from jkmeans.fields import Field, accepted_of, boolean, choice, integer, integers, number, text
from jkmeans.kmeans import EMPTY_POLICIES, INITIALIZATIONS
from jkmeans.methods import METHODS, method_spec
from jkmeans.networks import INITIALIZERS, NETWORKS
from jkmeans.precision import PRECISIONS

Config = Any
"""An ``ml_collections.ConfigDict``: its fields have no types that a checker could know."""


_OPTIMIZERS = ("adam", "adamw", "sgd")
_SCHEDULES = ("constant", "cosine")

FIELDS: dict[str, Field] = {
    "seed": integer(0, "the root of all random keys"),
    "n_seeds": integer(1, "runs from seed on, side by side in one program"),
    "n_devices": integer(0, "devices of the mesh; 0 for all"),
    "n_clusters": integer(1, "K"),
    "data.name": choice(datasets.NAMES, "the data set"),
    "data.split": choice(datasets.SPLITS, "which part of it"),
    "data.path": text("the .npy file of examples, where name is 'npy'"),
    "data.labels_path": text("the .npy file of their labels, or '' for none"),
    "data.n_examples": integer(0, "only the first so many; 0 for all"),
    "data.n_shards": integer(1, "most devices that share the work", most=65536),
    "data.placement": choice(("auto", "device", "host"), "where examples live while training"),
    "data.chunk_mebibytes": integer(1, "size of what the host feeds at once"),
    "augmentation.shift": number("pixels, each direction within ±shift"),
    "augmentation.rotation": number("degrees, within ±rotation"),
    "augmentation.zoom": number("scale within 1 ± zoom"),
    "augmentation.pretraining": boolean("whether the network sees views while pretraining, too"),
    "augmentation.invariance": boolean("whether clustering sees examples and views, or views only"),
    "network.name": choice(tuple(NETWORKS), "the network", or_function=True),
    "network.embedding_dim": integer(1, "p, numbers of an embedding"),
    "network.widths": integers("widths of hidden layers, or channels of convolutions"),
    "network.decoder": boolean("whether there is a reconstruction"),
    "network.normalize": boolean("whether embeddings have length one"),
    "network.initializer": choice(tuple(INITIALIZERS), "how kernels begin"),
    "network.precision": choice(PRECISIONS, "of the products in its layers, after pretraining"),
    "objective.name": choice(tuple(METHODS), "the method", or_function=True),
    "centroids.init": choice(tuple(INITIALIZATIONS), "how the first centroids are chosen"),
    "centroids.n_init": integer(1, "restarts, of which the one of least inertia is kept"),
    "centroids.init_max_iter": integer(0, "Lloyd iterations of each restart, at most"),
    "centroids.n_iterations": integer(0, "Lloyd iterations of a re-computation, at most"),
    "centroids.every": integer(1, "epochs from one re-computation to the next"),
    "centroids.bank": choice(("stored", "refreshed"), "embeddings of the pass, or of its end"),
    "centroids.empty": choice(EMPTY_POLICIES, "what becomes of an empty cluster"),
    "centroids.final_max_iter": integer(0, "Lloyd iterations after the last epoch, at most"),
    "training.batch_size": integer(1, "B, over all devices"),
    "training.n_pretrain_epochs": integer(0, "epochs of the autoencoder alone"),
    "training.pretrained_folder": text("where pretrained networks are kept and found, or ''"),
    "training.n_epochs": integer(0, "epochs of clustering"),
    "training.pretrain_precision": choice(
        PRECISIONS, "of the products in layers while pretraining"
    ),
    "training.optimizer": choice(_OPTIMIZERS, "of pretraining; sgd has momentum .9"),
    "training.clustering_optimizer": choice(_OPTIMIZERS, "of clustering"),
    "training.learning_rate": number("of pretraining", positive=True),
    "training.clustering_learning_rate": number("of clustering", positive=True),
    "training.schedule": choice(_SCHEDULES, "of the rate of pretraining; cosine falls to 0"),
    "training.clustering_schedule": choice(_SCHEDULES, "of the rate of clustering"),
    "training.weight_decay": number("of adamw"),
    "training.collapse_ratio": number(
        "a run stops where the variance falls to this part of the first, or rises to its inverse"
    ),
    "reset.every": integer(0, "epochs from one soft reset to the next (BRB); 0 for none"),
    "reset.kept": number("α, part of each weight that a soft reset keeps"),
    "checkpoint.every": integer(1, "epochs from one checkpoint to the next"),
    "checkpoint.keep": integer(1, "newest checkpoints that are kept, besides the best"),
    "report.pictures": boolean("whether a run ends with report/*.png and report.html"),
}
"""The fields of every config; `fields_of` adds those of its method."""

_RUNTIME = (
    "n_devices",
    "data.path",  # The data itself is compared with what a checkpoint remembers of it.
    "data.labels_path",
    "data.placement",
    "data.chunk_mebibytes",
    "training.pretrained_folder",  # What it holds is what pretraining would give.
    "checkpoint.",
    "report.",
)
"""Fields that may differ when a run is resumed: the same run, on another machine."""


_METHOD = "objective.name"


def validate(config: Config) -> Config:
    """The config with every value in its proper type, paths absolute, and nothing contradictory.

    Raises:
      UserError: a field is unknown, missing, of a wrong type or value, or contradicts another.
    """
    if isinstance(config.get("runs"), ConfigDict | dict):
        raise UserError(
            "config has runs, which is what a table has; accepted: the config of one run (a table "
            "is trained by experiments.table)"
        )
    objective = config.get("objective")
    if isinstance(objective, ConfigDict | dict):
        # First: without a method the fields of none are known.
        method = FIELDS[_METHOD]
        if "name" not in objective:
            raise _lacking(_METHOD, method)
        convert_fields(ConfigDict({"objective": {"name": objective["name"]}}), {_METHOD: method})
    values = convert_fields(config, fields_of(config))
    _refuse_contradictions(values)
    for name in ("data.path", "data.labels_path", "training.pretrained_folder"):
        if values[name]:
            values[name] = str(Path(values[name]).expanduser().absolute())
    return nest(values)


def fields_of(config: Config) -> dict[str, Field]:
    """All fields of a config: `FIELDS` and, after its name, those of its method."""
    objective = config.get("objective")
    name = objective.get("name") if isinstance(objective, ConfigDict | dict) else None
    known = isinstance(name, str) and (name in METHODS or ":" in name)
    fields = {}
    for field, meaning in FIELDS.items():
        fields[field] = meaning
        if field == _METHOD and known:
            own = method_spec(str(name)).fields
            fields |= {f"objective.{key}": value for key, value in own.items()}
    return fields


def convert_fields(config: Config, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The values of a config by their full names, each in its proper type.

    Args:
      config: complete: every one of ``fields``, and nothing else.
      fields: what a config of this kind consists of.

    Raises:
      UserError: a field is unknown, missing, or of a wrong type or value.
    """
    given = _flatten(config, fields)
    for name in given:
        if name not in fields:
            members = [field for field in fields if field.startswith(f"{name}.")]
            if members:
                raise UserError(
                    f"config.{name} is {shown(given[name])}; accepted: a group of the fields "
                    f"{', '.join(members)}"
                )
            known = _similar(name, fields)
            raise UserError(f"config has a field {name!r} that is not known{known}")
    for name, field in fields.items():
        if name not in given:
            raise _lacking(name, field)
    values = {}
    for name, field in fields.items():
        try:
            values[name] = field.convert(given[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"config.{name} is {shown(given[name])}; accepted: {accepted_of(field, error)}"
            ) from None
    return values


def _lacking(name: str, field: Field) -> UserError:
    return UserError(f"config lacks the field {name!r} ({field.meaning}): {field.accepted}")


def _refuse_contradictions(values: dict[str, Any]) -> None:
    if values["network.name"] in NETWORKS and not values["network.widths"]:
        raise UserError("config.network.widths is (); accepted: at least one integer")
    if values["training.n_pretrain_epochs"] + values["training.n_epochs"] == 0:
        raise UserError(
            "config.training.n_pretrain_epochs and n_epochs are both 0; "
            "accepted: at least one epoch in all"
        )
    if values["data.name"] == "npy" and not values["data.path"]:
        raise UserError("config.data.path is '', but data.name is 'npy'; accepted: an .npy file")
    if values["training.collapse_ratio"] >= 1:
        raise UserError(
            f"config.training.collapse_ratio is {values['training.collapse_ratio']}; accepted: "
            "0 to below 1"
        )
    if values["augmentation.zoom"] >= 1:
        raise UserError(
            f"config.augmentation.zoom is {values['augmentation.zoom']}; accepted: 0 to below 1"
        )
    if values["reset.kept"] > 1:
        raise UserError(f"config.reset.kept is {values['reset.kept']}; accepted: 0 to 1")
    method_spec(values["objective.name"]).check(values)


def check_data(config: Config, n_examples: int, example_shape: tuple[int, ...]) -> None:
    """Refuses what only shows once the data is there.

    Raises:
      UserError: more clusters than examples; views of what is not an image.
    """
    if any(config.augmentation[view] for view in VIEWS) and len(example_shape) not in (2, 3):
        raise UserError(
            f"config.augmentation asks for views, but the examples have shape "
            f"{list(example_shape)}; accepted: [height, width] or [height, width, channels], or 0 "
            "for shift, rotation and zoom"
        )
    if config.n_clusters > n_examples:
        raise UserError(
            f"config.n_clusters is {config.n_clusters}, but there are {n_examples:,} examples; "
            f"accepted: 1 to {n_examples:,}"
        )


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON types."""
    return json.loads(json.dumps(config.to_dict()))


_BEFORE: dict[str, Callable[[Config], Any]] = {
    "augmentation.pretraining": lambda config: True,
    "network.initializer": lambda config: "glorot_uniform",
    "network.precision": lambda config: "float32",
    "objective.assignment": lambda config: "nearest",
    "objective.likelihood": lambda config: "bernoulli",
    "objective.pixel_variance": lambda config: 0.1,
    "objective.responsibilities": lambda config: "sample",
    "objective.mixture_rate_factor": lambda config: 1.0,
    # There was one optimizer, one schedule and one precision for both phases.
    "training.clustering_optimizer": lambda config: config.training.optimizer,
    "training.clustering_schedule": lambda config: config.training.schedule,
    "training.pretrain_precision": lambda config: config.network.precision,
}
"""What runs did before they had these fields, all younger than 2026-11-24."""


def from_json(values: dict[str, Any]) -> Config:
    """The inverse of `to_json`, validated; where they are missing, those of `_BEFORE` are added.

    Raises:
      UserError: as `validate`; or these are not the values of a config at all.
    """
    if not isinstance(values, dict):
        raise UserError(f"a config is an object of fields, not {values!r}")
    try:
        config = ConfigDict(values)
    except ValueError as error:
        raise UserError(f"these are not the fields of a config: {error}") from error
    known = fields_of(config)
    for name, before in _BEFORE.items():
        group, field = name.split(".")
        beside = config.get(group)
        if name in known and isinstance(beside, ConfigDict) and field not in beside:
            with contextlib.suppress(AttributeError):  # `validate` says what is missing.
                beside[field] = before(config)
    return validate(config)


def differences(
    ours: Config,
    theirs: Config,
    fields: Mapping[str, Field] | None = None,
    runtime: tuple[str, ...] = _RUNTIME,
) -> list[str]:
    """Fields in which two validated configs describe different runs, as ``name: a, not b``.

    Args:
      ours: a config.
      theirs: another of the same kind.
      fields: what configs of this kind consist of; None for those of a run.
      runtime: starts of the names of fields that may differ.
    """
    if fields is None:
        # Methods have fields of their own: the name, which comes first, says what differs.
        fields = fields_of(ours) | fields_of(theirs)
    a, b = _flatten(ours, fields), _flatten(theirs, fields)
    return [
        f"{name} is {a[name]!r} here and {b[name]!r} there"
        for name in fields
        if name in a and name in b and a[name] != b[name] and not name.startswith(runtime)
    ]


def flat(config: Config) -> dict[str, Any]:
    """The values of a validated config by their full names."""
    return _flatten(config, fields_of(config))


def _flatten(config, fields: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        # A mapping where a value is expected is reported as that value.
        inside = isinstance(value, ConfigDict | dict) and prefix + name not in fields
        if inside and value:
            flat |= _flatten(value, fields, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def shown(value) -> str:
    """A value on one line."""
    shown = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def nest(values: Mapping[str, Any]) -> Config:
    """The config that has these values under their full names."""
    config: Config = ConfigDict()
    for name, value in values.items():
        *groups, leaf = name.split(".")
        node: Config = config
        for group in groups:
            if group not in node:
                node[group] = ConfigDict()
            node = node[group]
        node[leaf] = value
    return config


def _similar(name: str, fields: Mapping[str, Field]) -> str:
    import difflib

    close = difflib.get_close_matches(name, fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; accepted: {', '.join(fields)}"
