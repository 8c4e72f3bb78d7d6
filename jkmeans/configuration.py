"""What a config may say: checked once, at the door, into errors that name field and value.

A config is a complete ``ml_collections.ConfigDict``: every field of `FIELDS` is present, nothing
else is, and no code anywhere falls back to a hidden default.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jkmeans.errors import UserError
from jkmeans.kmeans import INITIALIZATIONS
from jkmeans.networks import NETWORKS

Config = Any
"""An ``ml_collections.ConfigDict``: its fields have no types that a checker could know."""


class Field(NamedTuple):
    """One field of a config.

    Attributes:
      convert: the value as its proper type; raises TypeError or ValueError for anything else.
      accepted: what is accepted, in words, for the error.
      meaning: one line for the reader.
    """

    convert: Callable[[Any], Any]
    accepted: str
    meaning: str


def integer(least: int, meaning: str, most: int = 2**31 - 1) -> Field:
    """A field that holds an integer from ``least`` to ``most``."""

    def convert(value):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if not least <= value <= most:
            raise ValueError
        return value

    bound = f"of at least {least}" if most == 2**31 - 1 else f"from {least} to {most}"
    return Field(convert, f"an integer {bound}", meaning)


def number(meaning: str, *, positive: bool = False) -> Field:
    """A field that holds a number of at least 0, or above 0."""

    def convert(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError
        return float(value)

    return Field(convert, f"a number {'above' if positive else 'of at least'} 0", meaning)


def boolean(meaning: str) -> Field:
    """A field that holds True or False."""

    def convert(value):
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Field(convert, "True or False", meaning)


def choice(choices, meaning: str, *, or_function: bool = False) -> Field:
    """A field that holds one of some words, or the user's ``module:function``."""

    def convert(value):
        if not isinstance(value, str):
            raise TypeError
        if value not in choices and not (or_function and ":" in value):
            raise ValueError
        return value

    accepted = ", ".join(map(repr, choices)) + (" or 'module:function'" if or_function else "")
    return Field(convert, accepted, meaning)


def text(meaning: str) -> Field:
    """A field that holds text."""

    def convert(value):
        if not isinstance(value, str):
            raise TypeError
        return value

    return Field(convert, "text", meaning)


def integers(meaning: str) -> Field:
    """A field that holds a tuple of integers of at least 1."""

    def convert(value):
        if not isinstance(value, list | tuple):
            raise TypeError
        if any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise TypeError
        if any(v < 1 for v in value):
            raise ValueError
        return tuple(value)

    return Field(convert, "a tuple of integers of at least 1", meaning)


FIELDS: dict[str, Field] = {
    "seed": integer(0, "the root of all random keys"),
    "n_devices": integer(0, "devices of the mesh; 0 for all"),
    "n_clusters": integer(1, "K"),
    "data.name": choice(("digits", "mnist", "fashion-mnist", "npy"), "the data set"),
    "data.split": choice(("all", "train", "test"), "which part of it"),
    "data.path": text("the .npy file of examples, where name is 'npy'"),
    "data.labels_path": text("the .npy file of their labels, or '' for none"),
    "data.n_examples": integer(0, "only the first so many; 0 for all"),
    "data.n_shards": integer(1, "most devices that share the work", most=65536),
    "data.placement": choice(("auto", "device", "host"), "where examples live while training"),
    "data.chunk_mebibytes": integer(1, "size of what the host feeds at once"),
    "augmentation.shift": number("pixels, each direction within ±shift"),
    "augmentation.rotation": number("degrees, within ±rotation"),
    "augmentation.zoom": number("scale within 1 ± zoom"),
    "network.name": choice(tuple(NETWORKS), "the network", or_function=True),
    "network.embedding_dim": integer(1, "p, numbers of an embedding"),
    "network.widths": integers("widths of hidden layers, or channels of convolutions"),
    "network.decoder": boolean("whether there is a reconstruction"),
    "network.normalize": boolean("whether embeddings have length one"),
    "objective.name": choice(("joint",), "the objective", or_function=True),
    "objective.assignment": choice(("nearest", "stored"), "of an example in a step"),
    "objective.reconstruction_weight": number("ρ, while clustering"),
    "objective.centroid_weight": number("λ"),
    "objective.warmup_epochs": number("T, epochs over which λ rises"),
    "objective.balance_weight": number("β"),
    "objective.temperature": number("τ of the balance term", positive=True),
    "centroids.init": choice(tuple(INITIALIZATIONS), "how the first centroids are chosen"),
    "centroids.n_init": integer(1, "restarts, of which the one of least inertia is kept"),
    "centroids.init_max_iter": integer(0, "Lloyd iterations of each restart, at most"),
    "centroids.n_iterations": integer(0, "Lloyd iterations of a re-computation, at most"),
    "centroids.every": integer(1, "epochs from one re-computation to the next"),
    "centroids.bank": choice(("stored", "refreshed"), "embeddings of the pass, or of its end"),
    "centroids.empty": choice(("keep", "farthest"), "what becomes of an empty cluster"),
    "centroids.final_max_iter": integer(0, "Lloyd iterations after the last epoch, at most"),
    "training.batch_size": integer(1, "B, over all devices"),
    "training.n_pretrain_epochs": integer(0, "epochs of the autoencoder alone"),
    "training.n_epochs": integer(0, "epochs of clustering"),
    "training.optimizer": choice(("adam", "adamw", "sgd"), "sgd has momentum .9"),
    "training.learning_rate": number("of pretraining", positive=True),
    "training.clustering_learning_rate": number("of clustering", positive=True),
    "training.schedule": choice(("constant", "cosine"), "of the rate, in each phase"),
    "training.weight_decay": number("of adamw"),
    "training.collapse_ratio": number(
        "a run stops where the variance falls to this part of the first, or rises to its inverse"
    ),
    "checkpoint.every": integer(1, "epochs from one checkpoint to the next"),
    "checkpoint.keep": integer(1, "newest checkpoints that are kept, besides the best"),
    "report.pictures": boolean("whether to draw them at the end"),
}

_RUNTIME = (
    "n_devices",
    "data.path",  # The data itself is compared with what a checkpoint remembers of it.
    "data.labels_path",
    "data.placement",
    "data.chunk_mebibytes",
    "checkpoint.",
    "report.",
)
"""Fields that may differ when a run is resumed: the same run, on another machine."""


def validate(config: Config) -> Config:
    """The config with every value in its proper type, paths absolute, and nothing contradictory.

    Raises:
      UserError: a field is unknown, missing, of a wrong type or value, or contradicts another.
    """
    values = convert_fields(config, FIELDS)
    _refuse_contradictions(values)
    for name in ("data.path", "data.labels_path"):
        if values[name]:
            values[name] = str(Path(values[name]).expanduser().absolute())
    return nest(values)


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
                    f"config.{name} is {_shown(given[name])}; accepted: a group of the fields "
                    f"{', '.join(members)}"
                )
            known = _similar(name, fields)
            raise UserError(f"config has a field {name!r} that is not known{known}")
    for name, field in fields.items():
        if name not in given:
            raise UserError(f"config lacks the field {name!r} ({field.meaning}): {field.accepted}")
    values = {}
    for name, field in fields.items():
        try:
            values[name] = field.convert(given[name])
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"config.{name} is {_shown(given[name])}; accepted: {field.accepted}"
            ) from None
    return values


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
    if values["network.decoder"] or values["objective.name"] != "joint":
        return
    if not values["network.normalize"] or values["objective.balance_weight"] == 0:
        raise UserError(
            "config.network.decoder is False, so nothing keeps the embeddings apart; accepted: "
            "network.normalize = True together with objective.balance_weight above 0"
        )
    if values["training.n_pretrain_epochs"] > 0:
        raise UserError(
            f"config.training.n_pretrain_epochs is {values['training.n_pretrain_epochs']}, but "
            "without a decoder there is nothing to pretrain; accepted: 0"
        )


def check_data(config: Config, n_examples: int, example_shape: tuple[int, ...]) -> None:
    """Refuses what only shows once the data is there.

    Raises:
      UserError: more clusters than examples; views of what is not an image.
    """
    if any(config.augmentation.values()) and len(example_shape) not in (2, 3):
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


def from_json(values: dict[str, Any]) -> Config:
    """The inverse of `to_json`, validated.

    Raises:
      UserError: as `validate`; or these are not the values of a config at all.
    """
    if not isinstance(values, dict):
        raise UserError(f"a config is an object of fields, not {values!r}")
    try:
        config = ConfigDict(values)
    except ValueError as error:
        raise UserError(f"these are not the fields of a config: {error}") from error
    return validate(config)


def differences(
    ours: Config,
    theirs: Config,
    fields: Mapping[str, Field] = FIELDS,
    runtime: tuple[str, ...] = _RUNTIME,
) -> list[str]:
    """Fields in which two validated configs describe different runs, as ``name: a, not b``.

    Args:
      ours: a config.
      theirs: another of the same kind.
      fields: what configs of this kind consist of.
      runtime: starts of the names of fields that may differ.
    """
    a, b = _flatten(ours, fields), _flatten(theirs, fields)
    return [
        f"{name} is {a[name]!r} here and {b[name]!r} there"
        for name in fields
        if a[name] != b[name] and not name.startswith(runtime)
    ]


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


def _shown(value) -> str:
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
