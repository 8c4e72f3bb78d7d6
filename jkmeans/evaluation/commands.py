"""What the launchers call: files and data sets in, files and tables out."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from jkmeans import datasets, metrics, processes, telling
from jkmeans.errors import UserError
from jkmeans.evaluation.model import load_model
from jkmeans.evaluation.prediction import predict
from jkmeans.recorder import results_table
from jkmeans.whole_files import write_arrays, write_json

_FAR = 10.0  # Times the mean squared distance in training: other units, or other things.


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
      What is written into the folder, as ``evaluation.json``, of another part of the data set as
      ``evaluation-<split>.json``, of other examples as ``evaluation-<name of their file>.json``:
      ``inertia`` (sum of squared distances of embeddings to their centroids), ``empty_clusters``
      and, where labels exist, ``acc``, ``nmi``, ``ari`` and ``purity``.

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
    # Those of the run's own data are not lost for those of others.
    of_what = Path(input_path).stem if input_path else split
    path = Path(workdir) / f"evaluation{f'-{of_what}' if of_what else ''}.json"
    try:
        if processes.is_first():
            write_json(path, results)
    except OSError as error:
        # The folder may be somebody else's; the numbers are on the screen.
        telling.warn(f"{path.name} was not written: {error.strerror}")
    else:
        telling.tell(f"written to {path}")
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
    with _progress_bar("predict", len(examples)) as advance:
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
        telling.warn(
            f"these examples are {far:,.0f} times as far from the centroids (squared) as "
            "those of training; are they in the same units, not scaled?"
        )


@contextlib.contextmanager
def _progress_bar(name: str, n_examples: int) -> Iterator[Callable[[int], object]]:
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
