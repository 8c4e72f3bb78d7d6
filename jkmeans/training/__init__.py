"""A run: a network and its centroids trained together, checkpointed, resumed, reported.

`train_and_evaluate` is the one way in. `Run` holds the loop over epochs and nothing of what happens
inside one: the epoch is a compiled program (`jkmeans.epoch`), the objective is a method
(`jkmeans.methods`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans import configuration, datasets, processes
from jkmeans.checkpoints import Checkpoints
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.methods import method_spec
from jkmeans.sharding import Layout, make_mesh
from jkmeans.training.folder import claim_workdir
from jkmeans.training.run import Run
from jkmeans.workdir import CHECKPOINT_FOLDER, CONFIG_FILE, only_process_in


def train_and_evaluate(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains a network and its centroids together, or goes on where a run stopped.

    Args:
      config: complete, as the files in ``configs/``; see `jkmeans.configuration.FIELDS`.
      workdir: folder of the run. It receives ``config.json``, ``checkpoints/``,
        ``metrics.jsonl``, ``tensorboard/``, ``results.json`` and, with
        ``config.report.pictures``, ``report/`` and ``report.html``. Where it holds an unfinished
        run of the same config, that run goes on; a finished one is reported again, with scores by
        the labels that the data has now.

    Returns:
      The results that are in ``results.json``: ``n_examples``, ``n_clusters``, ``inertia``,
      ``embedding_variance``, ``empty_clusters``, ``n_epochs``, ``train_seconds``,
      ``peak_host_mebibytes`` and, where labels exist, ``acc``, ``nmi``, ``ari`` and ``purity``.
      With ``n_seeds`` above 1, see `jkmeans.training.seeds.train_side_by_side`.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      CollapseError: the embeddings shrank to a point or ran away, or the loss is not finite.
      Interrupted: SIGTERM or Ctrl-C came; everything up to the last step is saved.
    """
    config = configuration.validate(config)
    processes.agree("the config", configuration.flat(config))
    return train(config, load_data(config), workdir)


def load_data(config: Config) -> datasets.Dataset:
    """The data that a validated config names.

    Raises:
      UserError: they cannot be used.
    """
    return processes.together(
        lambda: datasets.load(
            config.data.name,
            split=config.data.split,
            path=config.data.path,
            labels_path=config.data.labels_path,
            n_examples=config.data.n_examples,
            part=(processes.number(), processes.count()),
        )
    )


def check_data(config: Config, dataset: datasets.Dataset) -> None:
    """Refuses data that a validated config, or its method, cannot be of.

    Raises:
      UserError: they are such.
    """
    configuration.check_data(config, dataset.n_examples, dataset.example_shape)
    _check_for_method(config, dataset)


def _check_for_method(config: Config, dataset: datasets.Dataset) -> None:
    part = processes.number(), processes.count()
    check = method_spec(config.objective.name).check_data
    processes.together(lambda: check(config, dataset, part))


def train(config: Config, dataset: datasets.Dataset, workdir: str | os.PathLike) -> dict[str, Any]:
    """`train_and_evaluate` on data that is there already.

    Args:
      config: complete; what it says of ``data`` by name and path is not looked at.
      dataset: the examples, and labels if there are any; with several processes, the same on each,
        which reads only the rows of its own devices.
      workdir: folder of the run.
    """
    config = configuration.validate(config)
    workdir = Path(workdir).absolute()
    configuration.check_data(config, dataset.n_examples, dataset.example_shape)
    if not processes.on_first((workdir / CONFIG_FILE).exists):  # A run there has been checked.
        _check_for_method(config, dataset)
    if config.n_seeds > 1:
        from jkmeans.training.seeds import train_side_by_side

        return train_side_by_side(config, dataset, workdir)
    mesh = make_mesh(config.n_devices)
    run = Run(config, workdir, dataset, mesh)
    _refuse_idle_processes(run.layout, mesh)
    processes.agree("the data", run.data_record)
    processes.on_first(lambda: claim_workdir(workdir, config))
    processes.same_folder(workdir)
    with (
        only_process_in(workdir),
        Checkpoints(workdir / CHECKPOINT_FOLDER, keep=config.checkpoint.keep) as checkpoints,
    ):
        return run.execute(checkpoints)


def _refuse_idle_processes(layout: Layout, mesh) -> None:
    """Refuses more processes than the shards of the data give work to.

    Raises:
      UserError: a process has no example.
    """
    busy = set()
    for i, device in enumerate(mesh.devices.flat):
        first = i * layout.shards_per_device
        shards = range(first, min(first + layout.shards_per_device, layout.n_shards))
        if any(np.diff(layout.shard_bounds(shard))[0] for shard in shards):
            busy.add(device.process_index)
    idle = sorted(set(range(processes.count())) - busy)
    if idle and processes.count() > 1:
        raise UserError(
            f"there are {processes.count()} processes for {layout.n_examples:,} examples in "
            f"data.n_shards = {layout.n_shards} shards, and process {idle[0]} would have none; "
            f"accepted: up to {len(busy)} processes, or a larger data.n_shards"
        )
