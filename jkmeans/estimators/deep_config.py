"""Parameters of a deep estimator as the config of a run, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jkmeans import configuration
from jkmeans.configuration import Config
from jkmeans.methods import METHODS, with_method

BASE: dict[str, Any] = {
    "seed": 0,  # Root of all random keys: from random_state.
    "n_seeds": 1,  # An estimator is one model.
    "n_devices": 0,  # All.
    "n_clusters": 10,  # K.
    # Examples come from `fit`; name and path are there because a config is complete.
    "data.name": "npy",
    "data.split": "all",
    "data.path": "/the array that was given to DeepClustering.fit",
    "data.labels_path": "",  # Labels are never looked at.
    "data.n_examples": 0,  # All.
    "data.n_shards": 8,  # Most devices that share the work; part of what makes the bits.
    "data.placement": "auto",  # On the devices, if they have the room.
    "data.chunk_mebibytes": 64,  # What the host feeds at once, if they have not.
    # Random views of images; all 0 for none.
    "augmentation.shift": 0.0,  # Pixels.
    "augmentation.rotation": 0.0,  # Degrees.
    "augmentation.zoom": 0.0,  # Part of the size.
    "augmentation.pretraining": True,  # Whether pretraining sees views, too.
    "augmentation.invariance": False,  # Clustering sees examples and views, or views only.
    "network.name": "fully_connected",  # A key of jkmeans.networks.NETWORKS.
    "network.embedding_dim": 10,  # p.
    "network.widths": (500, 500, 2000),  # Of hidden layers; mirrored in the decoder.
    "network.decoder": True,  # Whether there is a reconstruction.
    "network.normalize": False,  # Whether embeddings have length one.
    "network.initializer": "glorot_uniform",
    "network.precision": "float32",  # Or "bfloat16": products in layers, after pretraining.
    # The first centroids: k-means on the pretrained embeddings.
    "centroids.init": "k-means++",
    "centroids.n_init": 20,  # Restarts, of which the best is kept.
    "centroids.init_max_iter": 100,  # Lloyd iterations of each.
    # Their re-computation while clustering.
    "centroids.n_iterations": 10,  # Lloyd iterations each time.
    "centroids.every": 1,  # Epochs from one to the next.
    "centroids.bank": "stored",  # Embeddings of the pass, not of its final weights.
    "centroids.empty": "farthest",  # An empty cluster takes a far example.
    "centroids.final_max_iter": 300,  # Lloyd iterations after the last epoch.
    "training.batch_size": 256,
    "training.n_pretrain_epochs": 50,  # Of the autoencoder alone.
    "training.pretrained_folder": "",  # Where runs share pretrained networks; '' for nowhere.
    "training.n_epochs": 50,  # Of clustering.
    "training.pretrain_precision": "float32",  # The same while pretraining.
    "training.optimizer": "adam",  # Of pretraining.
    "training.clustering_optimizer": "adam",
    "training.learning_rate": 1e-3,  # Of pretraining.
    "training.clustering_learning_rate": 1e-3,  # Of clustering.
    "training.schedule": "constant",  # Of the rate of pretraining.
    "training.clustering_schedule": "constant",
    "training.weight_decay": 0.0,  # Of adamw.
    "training.collapse_ratio": 1e-4,  # Of the first variance; a run stops below it.
    "reset.every": 0,  # Epochs from one soft reset to the next; 0 for none.
    "reset.kept": 0.8,  # Part of each weight that a soft reset keeps.
    "checkpoint.every": 5,  # Epochs from one checkpoint to the next.
    "checkpoint.keep": 2,  # Newest ones that are kept, besides the best.
    "report.pictures": False,  # Whether there are any, and a page, in the folder of the run.
}
"""The config of an estimator by full names, but for the fields of its method."""

_FIELDS = {
    "n_clusters": "n_clusters",
    "embedding_dim": "network.embedding_dim",
    "widths": "network.widths",
    "network": "network.name",
    "n_pretrain_epochs": "training.n_pretrain_epochs",
    "n_epochs": "training.n_epochs",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "clustering_learning_rate": "training.clustering_learning_rate",
    "n_devices": "n_devices",
}
_OF_THE_DATA = ("data.name", "data.split", "data.path", "data.labels_path", "data.n_examples")
_GROUPS = {"objective", *(name.split(".")[0] for name in BASE if "." in name)}
_AUGMENTATION = ("shift", "rotation", "zoom", "pretraining", "invariance")
_NO_VIEWS = {name: BASE[f"augmentation.{name}"] for name in _AUGMENTATION}


def values_of(estimator: Any, seed: int) -> dict[str, Any]:
    """The config of a fit by full names: base, method, parameters, options, each over the last.

    Args:
      estimator: with the parameters of `DeepClustering`.
      seed: of the run.

    Raises:
      ValueError: ``augmentation`` or ``options`` has a key that cannot be given.
    """
    values = _flat(with_method(configuration.nest(BASE), estimator.method))
    given = {field: _plain(getattr(estimator, name)) for name, field in _FIELDS.items()}
    settings = METHODS[estimator.method].settings
    for field, value in given.items():
        if field not in settings or value != BASE[field]:
            values[field] = value
    for name, value in (estimator.augmentation or {}).items():
        if name not in _AUGMENTATION:
            raise ValueError(
                f"augmentation has a key {name!r}; accepted: {', '.join(_AUGMENTATION)}"
            )
        values[f"augmentation.{name}"] = _plain(value)
    values["seed"] = seed
    options = {str(name): _plain(value) for name, value in (estimator.options or {}).items()}
    for name in options:
        # Groups are known; a field that is not is refused with all others.
        group, dot, _ = name.partition(".")
        if name not in values and not (dot and group in _GROUPS):
            raise ValueError(
                f"options has a key {name!r}; accepted: full names of fields, such as "
                "'objective.cluster_weight'"
            )
    for name in _OF_THE_DATA:
        if name in options:
            raise ValueError(
                f"options has a key {name!r}; accepted: other fields, for the data are what is "
                "given to fit"
            )
    if options.get("n_seeds", 1) != 1:
        raise ValueError(
            f"options has n_seeds = {options['n_seeds']!r}; accepted: 1, and other estimators "
            "for other seeds"
        )
    return values | options


def parameters_of(cls: type, config: Config, scale: float) -> dict[str, Any]:
    """Parameters of an estimator whose config is this one, but for where its data was.

    Args:
      cls: `DeepClustering`, or a class with its parameters.
      config: whole.
      scale: what examples are multiplied by.
    """
    values = _flat(config)
    name = values["objective.name"]
    views = {name: values[f"augmentation.{name}"] for name in _AUGMENTATION}
    parameters: dict[str, Any] = {
        # A user's own objective is one of joint k-means.
        "method": name if name in METHODS else "joint",
        **{name: values[field] for name, field in _FIELDS.items()},
        "augmentation": None if views == _NO_VIEWS else views,
        "scale": scale,
        "random_state": values["seed"],
    }
    start = values_of(cls(**parameters), values["seed"])
    options = {
        field: value
        for field, value in values.items()
        if start.get(field) != value and field not in _OF_THE_DATA
    }
    return parameters | {"options": options or None}


def _flat(config: Config) -> dict[str, Any]:
    """The values of a config by their full names."""
    flat = {}
    for name, value in config.to_dict().items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{leaf}": inner for leaf, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _plain(value: Any) -> Any:
    """Python's own type of what may be NumPy's: fields of configs accept these only."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(_plain(one) for one in value) if isinstance(value, list | tuple) else value
