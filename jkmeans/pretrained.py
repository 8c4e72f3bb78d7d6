"""Pretrained networks that runs share: what pretraining gives, kept under all that it depends on.

Methods that differ only in their clustering begin with the same network. Where a config names
``training.pretrained_folder``, the first run with some seed, data, network and pretraining leaves
the network there, and the next one takes it up where its own pretraining would have ended: with the
same bits, because everything that these depend on is part of the name: of a user's own code, the
source of its module (what that imports is not looked at). The exception is the number of devices:
as with a run that is resumed on others, and of seeds side by side, sums then differ in rounding.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jkmeans import telling
from jkmeans.augmentation import VIEWS
from jkmeans.methods import METHODS, method_spec
from jkmeans.naming import is_users, source_digest
from jkmeans.networks import PRETRAINED_AS, Blueprint
from jkmeans.whole_files import UNREADABLE, read_arrays, write_arrays

_TRAINING = (
    "batch_size",
    "n_pretrain_epochs",
    "optimizer",
    "learning_rate",
    "schedule",
    "weight_decay",
)
_SECONDS, _VARIANCE = "#seconds", "#variance"


class Pretrained(NamedTuple):
    """What pretraining gives.

    Attributes:
      parameters: of the network, by path.
      reference_variance: of the embeddings after the first epoch.
      seconds: that it took.
    """

    parameters: Mapping[str, Any]
    reference_variance: float
    seconds: float

    def of(self, blueprint: Blueprint) -> "Pretrained | None":
        """With the parameters that pretraining has reached, as a network has them.

        None, after a warning, where these are not there, or of other shapes: a network of the
        user's own can have changed under its name.
        """
        reached = {
            name: leaf.shape
            for name, leaf in blueprint.parameters.items()
            if not name.startswith(blueprint.unpretrained_layers)
        }
        found = {name: value.shape for name, value in self.parameters.items() if name in reached}
        if found != reached:
            telling.warn(
                "the pretrained network of another run has other layers than this one; "
                "pretraining anew",
                of_this_process=True,
            )
            return None
        return self._replace(parameters={name: self.parameters[name] for name in reached})


def description(config, data_record: dict[str, Any]) -> dict[str, Any]:
    """All that pretraining depends on, as plain JSON types."""
    name = config.objective.name
    views = [config.augmentation[view] for view in VIEWS]
    if not config.augmentation.pretraining:
        views = [0.0] * len(views)  # What no views at all give.
    network = config.network.to_dict() | {"precision": config.training.pretrain_precision}
    network["name"] = PRETRAINED_AS.get(network["name"], network["name"])
    if network["precision"] == "float32":
        del network["precision"]  # Networks of before there was a choice are found again.
    found = {
        "data": data_record,
        "n_shards": config.data.n_shards,
        "seed": config.seed,
        "network": network,
        "views": views,
        "training": {field: config.training[field] for field in _TRAINING},
        "objective": method_spec(name).pretraining(config.objective) if name in METHODS else name,
    }
    sources = [source_digest(name) for name in (network["name"], name) if is_users(name)]
    return found | ({"sources": sources} if sources else {})


def load(config, data_record: dict[str, Any]) -> Pretrained | None:
    """The network that some other run has pretrained as this one would; None if there is none.

    A file that cannot be read counts as none; it is written over.
    """
    return _read(_path(config, data_record))


def _read(path: Path | None, quiet: bool = False) -> Pretrained | None:
    if path is None or not path.exists():
        return None
    try:
        values: dict[str, Any] = read_arrays(path)
        seconds, variance = float(values.pop(_SECONDS)), float(values.pop(_VARIANCE))
    except UNREADABLE as error:
        if not quiet:
            telling.warn(f"{path} cannot be read ({error}); pretraining anew", of_this_process=True)
        return None
    return Pretrained(values, variance, seconds)


def save(config, data_record: dict[str, Any], found: Pretrained) -> None:
    """Leaves a network for other runs; nothing where it is, or the config names no folder.

    A folder that cannot be written is worth a warning, but not the run that has just pretrained.
    """
    path = _path(config, data_record)
    if path is None:
        return
    there = _read(path, quiet=True)
    if there is not None and _shapes(there) == _shapes(found):
        return  # Seeds side by side pretrain all where one is missing, to other rounding.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {_SECONDS: found.seconds, _VARIANCE: found.reference_variance}
        write_arrays(path, {**found.parameters, **about})
    except OSError as error:
        telling.warn(f"the pretrained network is not kept for other runs ({error})")


def _shapes(found: Pretrained) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in found.parameters.items()}


def _path(config, data_record: dict[str, Any]) -> Path | None:
    if not config.training.pretrained_folder or not config.training.n_pretrain_epochs:
        return None
    text = json.dumps(description(config, data_record), sort_keys=True)
    return (
        Path(config.training.pretrained_folder) / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"
    )
