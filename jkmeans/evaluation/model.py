"""A network and its clusters, restored from the folder of a run."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jkmeans import configuration, telling
from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.methods import Method, make_method
from jkmeans.networks import Blueprint, blueprint, merge, network_input
from jkmeans.recently_made import RecentlyMade, kind_of_programs
from jkmeans.sharding import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    data_parallel,
    make_mesh,
    read_to_devices,
    to_host,
)
from jkmeans.workdir import CENTROIDS_FILE, CHECKPOINT_FOLDER, folders_of_seeds


class TrainedModel(NamedTuple):
    """A network and its centroids, as a checkpoint holds them.

    Attributes:
      config: of the run.
      centroids: [k, p] float32.
      example_shape: what an example must look like.
      scale: examples are multiplied by it.
      digest: of everything that predictions depend on, in hexadecimal digits.
      position: the checkpoint, in steps.
      epoch: epochs it was trained for.
      predict_rows: ``(read, r) -> (labels, distances, embeddings)`` on the devices, of r rows, a
        multiple of their number; ``read(first, last)`` gives rows [last - first, *example_shape],
        and is asked for those of this process's devices.
      n_devices: of the mesh.
      mean_distance: squared, of the training data to their centroids at the end of the run; None
        before it.
    """

    config: Config
    centroids: np.ndarray
    example_shape: tuple[int, ...]
    scale: float
    digest: str
    position: int
    epoch: int
    predict_rows: Callable
    n_devices: int
    mean_distance: float | None


# Of the checkpoints of a run that saves and removes them meanwhile.
_MOST_LISTINGS = 10


def _accepted(workdir: Path) -> str:
    """What to give in place of a folder that is not that of one run."""
    seeds = folders_of_seeds(workdir)
    if seeds:
        return f"one of the folders of its seeds, such as {seeds[0]}"
    if (workdir / CENTROIDS_FILE).exists():
        return (
            "a --workdir of experiments.train; this one is of experiments.cluster, with which "
            "experiments.predict writes into a folder"
        )
    return "a --workdir of experiments.train"


def load_model(
    workdir: str | os.PathLike, checkpoint: str = "latest", n_devices: int = 0
) -> TrainedModel:
    """Restores network and centroids from the folder of a run.

    Args:
      workdir: of the run.
      checkpoint: ``latest``; ``best``, the one of the least objective, which is known of those that
        were saved between epochs of clustering and after ``objective.warmup_epochs`` of them; or a
        position, the number of steps before it.
      n_devices: of the mesh, which need not be the one it was trained on; 0 for all.

    Raises:
      UserError: there is no such checkpoint, or none that can be read.
    """
    folder = Path(workdir).absolute() / CHECKPOINT_FOLDER
    mesh = make_mesh(n_devices)
    with Checkpoints(folder) as checkpoints:
        for _ in range(_MOST_LISTINGS):
            listed = checkpoints.positions()
            for position in _candidates(checkpoints, checkpoint):
                try:
                    return _restore(checkpoints, position, mesh)
                except DamagedError as error:
                    if checkpoints.positions() != listed:
                        break  # A run that goes on has removed it, and left newer ones.
                    if checkpoint != "latest":
                        raise UserError(f"{error}; accepted: another --checkpoint") from error
                    telling.warn(f"{error}; going back to the one before")
            else:
                break
    raise UserError(
        f"no checkpoint in {folder} can be read; accepted: a folder of experiments.train"
    )


def _candidates(checkpoints: Checkpoints, wanted: str) -> list[int]:
    positions = checkpoints.positions()
    if not positions:
        raise UserError(
            f"{checkpoints.folder.parent} holds no checkpoint of a network; accepted: "
            f"{_accepted(checkpoints.folder.parent)}"
        )
    if wanted == "latest":
        return positions[::-1]
    if wanted == "best":
        best = checkpoints.best()
        if best is None:
            raise UserError(
                f"--checkpoint is 'best', but of no checkpoint in {checkpoints.folder} is the "
                "objective known, as it is of those saved after an epoch of clustering and its "
                "warm-up; accepted: 'latest'"
            )
        return [best]
    if not wanted.isdecimal() or int(wanted) not in positions:
        raise UserError(
            f"--checkpoint is {wanted!r}; accepted: 'latest', 'best' or one of "
            f"{', '.join(map(str, positions))}"
        )
    return [int(wanted)]


def _restore(checkpoints: Checkpoints, position: int, mesh) -> TrainedModel:
    record = checkpoints.record(position)
    if not {"config", "data", "results"} <= record.keys():
        raise UserError(
            f"{checkpoints.folder.parent} holds checkpoints, but not of a network; accepted: "
            f"{_accepted(checkpoints.folder.parent)}"
        )
    config = configuration.from_json(record["config"])
    n_pretrain = config.training.n_pretrain_epochs
    results = record["results"]
    begun = record["epoch"] > n_pretrain or (record["epoch"] == n_pretrain and record["step"] > 0)
    if not begun and not results:
        raise UserError(
            f"checkpoint {position} was saved in epoch {record['epoch']} of {n_pretrain} of "
            "pretraining and has no centroids yet; accepted: a later one (the command that trains "
            "goes on where it stopped)"
        )
    shape, scale = tuple(record["data"]["example_shape"]), record["data"]["scale"]
    plan, method, program = recently_prepared.get(
        kind_of_programs(config, shape, scale, mesh), lambda: _prepare(config, shape, scale, mesh)
    )
    sharding = NamedSharding(mesh, REPLICATED)
    k, p = config.n_clusters, config.network.embedding_dim
    here = {
        "parameters": plan.parameters,
        "clusters": method.blank(k, p, record["data"]["n_examples"]),
    }
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), here
    )
    model = checkpoints.load(position, {"model": abstract}).trees["model"]

    def predict_rows(read: Callable[[int, int], np.ndarray], n_rows: int):
        return program(model, read_to_devices(read, (n_rows, *shape), mesh))

    return TrainedModel(
        config=config,
        centroids=to_host(model["clusters"].centroids),
        example_shape=shape,
        scale=scale,
        digest=_digest(model, record),
        position=position,
        epoch=record["epoch"],
        predict_rows=predict_rows,
        n_devices=mesh.size,
        mean_distance=results["inertia"] / record["data"]["n_examples"] if results else None,
    )


class _Prepared(NamedTuple):
    """What models of one kind have in common: network, method and the program of predictions."""

    blueprint: Blueprint
    method: Method
    program: Callable


recently_prepared: RecentlyMade[_Prepared] = RecentlyMade(8)


def _prepare(config: Config, example_shape: tuple[int, ...], scale: float, mesh) -> _Prepared:
    own = config.copy_and_resolve_references()
    plan = blueprint(own.network, example_shape, own.network.precision)  # Not to pretrain.
    method = make_method(own, DATA_AXIS)

    def predict_local(model, examples):
        network = merge(plan.graphdef, model["parameters"])
        embeddings = network.encode(network_input(examples, scale))
        found = method.predict(model["clusters"], embeddings)
        return found.labels, found.distances, embeddings

    program = jax.jit(data_parallel(predict_local, mesh, (REPLICATED, SHARDED), SHARDED))
    return _Prepared(plan, method, program)


def _digest(model: dict[str, Any], record: dict[str, Any]) -> str:
    """Of network, clusters, and what is done with them; not of the place that they lie in."""
    config = record["config"]
    said = {name: config[name] for name in ("n_clusters", "network", "objective")}
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([said, record["data"]["scale"]], sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        array = to_host(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
