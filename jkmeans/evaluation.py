"""What a trained run is good for: embed, predict, evaluate, from its folder alone."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from jkmeans import configuration, datasets, metrics, processes
from jkmeans.blocks import blocks
from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.methods import make_method
from jkmeans.networks import blueprint, merge, network_input
from jkmeans.recorder import results_table
from jkmeans.sharding import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    data_parallel,
    make_mesh,
    read_to_devices,
    to_host,
)
from jkmeans.whole_files import write_arrays, write_json
from jkmeans.workdir import CENTROIDS_FILE, CHECKPOINT_FOLDER, folders_of_seeds

EVALUATION_FILE = "evaluation.json"
_FAR = 10.0  # Times the mean squared distance in training: other units, or other things.


class Prediction(NamedTuple):
    """Clusters of examples.

    Attributes:
      labels: [n] int32, the nearest centroid.
      distances: [n] float32, squared Euclidean distance to it.
      embeddings: [n, p] float32.
    """

    labels: np.ndarray
    distances: np.ndarray
    embeddings: np.ndarray


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
      checkpoint: ``latest``, ``best`` (least unsupervised objective) or a position.
      n_devices: of the mesh, which need not be the one it was trained on; 0 for all.

    Raises:
      UserError: there is no such checkpoint, or none that can be read.
    """
    folder = Path(workdir).absolute() / CHECKPOINT_FOLDER
    mesh = make_mesh(n_devices)
    with Checkpoints(folder) as checkpoints:
        for position in _candidates(checkpoints, checkpoint):
            try:
                return _restore(checkpoints, position, mesh)
            except DamagedError as error:
                if checkpoint != "latest":
                    raise UserError(f"{error}; accepted: another --checkpoint") from error
                processes.tell(f"warning: {error}; going back to the one before")
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
                f"--checkpoint is 'best', but no checkpoint in {checkpoints.folder} has been "
                "measured; accepted: 'latest'"
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
    plan = blueprint(config.network, shape, config.network.precision)  # Nothing is pretrained.
    sharding = NamedSharding(mesh, REPLICATED)
    k, p = config.n_clusters, config.network.embedding_dim
    method = make_method(config, DATA_AXIS)
    here = {
        "parameters": plan.parameters,
        "clusters": method.blank(k, p, record["data"]["n_examples"]),
    }
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), here
    )
    model = checkpoints.load(position, {"model": abstract}).trees["model"]

    def predict_local(model, examples):
        network = merge(plan.graphdef, model["parameters"])
        embeddings = network.encode(network_input(examples, scale))
        found = method.predict(model["clusters"], embeddings)
        return found.labels, found.distances, embeddings

    program = jax.jit(data_parallel(predict_local, mesh, (REPLICATED, SHARDED), SHARDED))

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


def predict(
    model: TrainedModel,
    examples: np.ndarray,
    progress: Callable[[int], object] = lambda n_done: None,
) -> Prediction:
    """Embeds examples and assigns each to its nearest centroid.

    Args:
      model: from `load_model`.
      examples: [n, *example_shape], in the units of the training data (scaling is the model's);
        read in blocks, so it may be a memory map. Each process reads the rows of its own devices;
        what they come to is gathered on all.
      progress: called with the number of examples done.

    Raises:
      UserError: wrong shape or type, no examples, NaN or infinity.
    """
    part = (processes.number(), processes.count())
    examples = processes.together(
        lambda: datasets.check_examples(examples, expected_shape=model.example_shape, part=part)
    )
    return Prediction(*compute_in_blocks(model.predict_rows, examples, model.n_devices, progress))


def compute_in_blocks(
    compute: Callable[[Callable[[int, int], np.ndarray], int], tuple],
    examples: np.ndarray,
    n_devices: int,
    progress: Callable[[int], object],
    dtype: np.dtype | None = None,
) -> list[np.ndarray]:
    """Columns [n, ...] of what is computed of examples [n, ...], block by block.

    Args:
      compute: ``(read, r) -> arrays [r, ...]`` on the devices; see ``predict_rows`` of
        `TrainedModel`.
      examples: see `jkmeans.blocks.blocks`.
      n_devices: of the mesh.
      progress: called with the number of examples done.
      dtype: see `jkmeans.blocks.blocks`.
    """
    parts = []
    n_done = 0
    for block in blocks(examples, n_devices, dtype):
        found = compute(block.read, block.n_rows)
        parts.append([to_host(array)[: block.n_examples] for array in found])
        n_done += block.n_examples
        progress(n_done)
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def embed(model: TrainedModel, examples: np.ndarray) -> np.ndarray:
    """Embeddings [n, p] float32 of examples [n, *example_shape]."""
    return predict(model, examples).embeddings


def evaluate(
    workdir: str | os.PathLike,
    *,
    checkpoint: str = "latest",
    input_path: str = "",
    labels_path: str = "",
    split: str = "",
    n_devices: int = 0,
) -> dict[str, Any]:
    """Measures a run from its folder alone.

    Args:
      workdir: of the run; the config comes from the checkpoint.
      checkpoint: ``latest``, ``best`` or a position.
      input_path: an .npy file of other examples; the run's own data if empty.
      labels_path: an .npy file with their classes, or empty.
      split: another part of the run's data set (``train``, ``test``, ``all``), or empty.
      n_devices: of the mesh; 0 for all.

    Returns:
      What is written to ``evaluation.json``: ``inertia`` (sum of squared distances of embeddings
      to their centroids), ``empty_clusters`` and, where labels exist, ``acc``, ``nmi``, ``ari`` and
      ``purity``.

    Raises:
      UserError: the checkpoint or the data cannot be used.
    """
    model = load_model(workdir, checkpoint, n_devices)
    data = model.config.data
    part = (processes.number(), processes.count())
    if labels_path and not input_path and data.name != "npy":
        raise UserError(
            f"--labels is {labels_path!r}, but {data.name} has classes of its own; accepted: "
            "--labels with --input, or of a run on an .npy file"
        )
    if split and split not in datasets.SPLITS:
        raise UserError(f"--split is {split!r}; accepted: {', '.join(map(repr, datasets.SPLITS))}")

    def load() -> datasets.Dataset:
        if input_path:
            return datasets.load("npy", path=input_path, labels_path=labels_path, part=part)
        return datasets.load(
            data.name,
            split=split or data.split,
            path=data.path,
            labels_path=labels_path or data.labels_path,
            n_examples=0 if split else data.n_examples,
            part=part,
        )

    dataset = processes.together(load)
    found = predict(model, dataset.examples)
    sizes = np.bincount(found.labels, minlength=model.config.n_clusters)
    results: dict[str, Any] = {
        "data": input_path or dataset.name,
        "checkpoint": model.position,
        "epoch": model.epoch,
        "n_examples": dataset.n_examples,
        "n_clusters": model.config.n_clusters,
        "inertia": float(np.sum(found.distances, dtype=np.float64)),
        "empty_clusters": int(np.sum(sizes == 0)),
    }
    if dataset.labels is not None:
        results |= metrics.summarize(dataset.labels, found.labels)
    results_table(results, f"Evaluation of {workdir}")
    try:
        if processes.is_first():
            write_json(Path(workdir) / EVALUATION_FILE, results)
    except OSError as error:
        # The folder may be somebody else's; the numbers are on the screen.
        print(f"warning: {EVALUATION_FILE} was not written: {error.strerror}")
    return results


def predict_file(
    workdir: str | os.PathLike,
    input_path: str,
    output_path: str,
    *,
    checkpoint: str = "latest",
    embeddings: bool = False,
    n_devices: int = 0,
) -> None:
    """Assigns the examples of an .npy file to the clusters of a run and writes an .npz file.

    Warns where they are many times as far from the centroids as those of training, as examples in
    other units are; not where embeddings have length one, whose distances are at most 4.

    Args:
      workdir: of the run.
      input_path: [n, *example_shape], in the units of the training data.
      output_path: receives ``labels`` [n] int32, ``distances`` [n] float32 (squared, in the
        embedding), ``centroids`` [k, p] and, if asked for, ``embeddings`` [n, p] float32. It
        appears under its name only when complete.
      checkpoint: ``latest``, ``best`` or a position.
      embeddings: whether to write them.
      n_devices: of the mesh; 0 for all.

    Raises:
      UserError: the checkpoint or the input cannot be used, or the output not be written.
    """
    output = Path(output_path)
    if output.suffix != ".npz":
        raise UserError(f"--output is {output_path!r}; accepted: a name that ends in .npz")

    def check_folder() -> None:
        if not output.absolute().parent.is_dir():
            raise UserError(
                f"--output is {output_path!r}, but there is no folder {output.absolute().parent}"
            )

    processes.on_first(check_folder)
    model = load_model(workdir, checkpoint, n_devices)
    part = (processes.number(), processes.count())
    examples = processes.together(lambda: datasets.load("npy", path=input_path, part=part).examples)
    with progress_bar("predict", len(examples)) as advance:
        found = predict(model, examples, advance)
    arrays = {"labels": found.labels, "distances": found.distances, "centroids": model.centroids}
    if embeddings:
        arrays["embeddings"] = found.embeddings

    def write() -> None:
        try:
            write_arrays(output, arrays)
        except OSError as error:
            raise UserError(f"cannot write --output {output_path}: {error.strerror}") from error

    processes.on_first(write)
    sizes = np.bincount(found.labels, minlength=model.config.n_clusters)
    summary = {
        "examples": len(examples),
        "clusters in use": int(np.sum(sizes > 0)),
        "largest cluster": int(sizes.max()),
        "mean squared distance": float(found.distances.mean()),
        "checkpoint": model.position,
    }
    results_table(summary, f"Written to {output_path}")
    far = model.mean_distance and summary["mean squared distance"] / model.mean_distance
    if far and far > _FAR:
        processes.tell(
            f"warning: these examples are {far:,.0f} times as far from the centroids (squared) as "
            "those of training; are they in the same units, not scaled?"
        )


@contextlib.contextmanager
def progress_bar(name: str, n_examples: int) -> Iterator[Callable[[int], object]]:
    """A bar with rate and remaining time on a terminal; silent elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("examples"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal or not processes.is_first()
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=n_examples)
        yield lambda n_done: bar.update(task, completed=n_done)
