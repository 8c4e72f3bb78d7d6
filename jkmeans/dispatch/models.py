"""What predicts, from the folder of a run: a network with its centroids, or centroids alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jkmeans import evaluation, kmeans, sharded
from jkmeans.clustering import SUMMARY_FILE
from jkmeans.errors import UserError
from jkmeans.sharding import REPLICATED, SHARDED, data_parallel, make_mesh, read_to_devices
from jkmeans.workdir import CENTROIDS_FILE, CONFIG_FILE


class Predictor(NamedTuple):
    """A model that is ready to predict.

    Attributes:
      described: in words.
      digest: of everything that predictions depend on.
      example_shape: of what it takes.
      columns: what it gives of each row, by name.
      centroids: [k, p].
      checkpoint: as `load_predictor` takes it, to load the same one again.
      input_columns: which columns of a Parquet file its examples are; None for all.
      compute: (examples [n, *example_shape] as `jkmeans.blocks.blocks` wants them, function that
        is told the rows done) -> columns [n, ...] by name.
    """

    described: str
    digest: str
    example_shape: tuple[int, ...]
    columns: tuple[str, ...]
    centroids: np.ndarray
    checkpoint: str
    input_columns: tuple[str, ...] | None
    compute: Callable[[np.ndarray, Callable[[int], object]], dict[str, np.ndarray]]


def load_predictor(
    workdir: str | os.PathLike[str],
    checkpoint: str = "latest",
    *,
    embeddings: bool = False,
    n_devices: int = 0,
) -> Predictor:
    """Loads what a run has found.

    Args:
      workdir: of experiments.train, or of experiments.cluster.
      checkpoint: see `jkmeans.evaluation.load_model`; k-means has only the latest.
      embeddings: whether they are wanted too; k-means has none.
      n_devices: of the mesh; 0 for all.

    Raises:
      UserError: there is no model, or not the one wanted.
    """
    folder = Path(workdir)
    if (folder / SUMMARY_FILE).exists() and (folder / CENTROIDS_FILE).exists():
        if embeddings:
            raise UserError(
                f"--embeddings was given, but {workdir} is a folder of experiments.cluster, which "
                "has no network; accepted: without it"
            )
        if checkpoint != "latest":
            raise UserError(
                f"--checkpoint is {checkpoint!r}, but {workdir} is a folder of "
                "experiments.cluster; accepted: 'latest'"
            )
        return _centroids(folder, n_devices)
    model = evaluation.load_model(workdir, checkpoint, n_devices)
    columns = ("labels", "distances") + ("embeddings",) * embeddings

    def compute(examples: np.ndarray, tell: Callable[[int], object]) -> dict[str, np.ndarray]:
        found = evaluation.compute_in_blocks(model.predict_rows, examples, model.n_devices, tell)
        return dict(zip(columns, found, strict=False))

    return Predictor(
        described=f"checkpoint {model.position} of {folder.absolute().name}",
        digest=model.digest,
        example_shape=model.example_shape,
        columns=columns,
        centroids=model.centroids,
        checkpoint=str(model.position),
        input_columns=None,
        compute=compute,
    )


def _centroids(folder: Path, n_devices: int) -> Predictor:
    """The nearest of some centroids."""
    path = folder / CENTROIDS_FILE
    try:
        centroids = np.load(path, allow_pickle=False)
        if centroids.ndim != 2 or centroids.dtype not in (np.float32, np.float64):
            raise ValueError(f"shape {centroids.shape}, {centroids.dtype}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be used ({error}); accepted: what experiments.cluster wrote"
        ) from error
    mesh = make_mesh(n_devices)

    def nearest(centroids, examples):
        found = kmeans.assign(examples, centroids)
        return found.labels, found.distances

    program = jax.jit(data_parallel(nearest, mesh, (REPLICATED, SHARDED), SHARDED))

    # Where the rows were float64, so are centroids, and what is computed.
    dtype = np.dtype(np.float64) if centroids.dtype == np.float64 else None

    def predict_rows(read: Callable[[int, int], np.ndarray], n_rows: int) -> tuple:
        with sharded.precision(centroids):
            rows = read_to_devices(read, (n_rows, centroids.shape[1]), mesh)
            return program(centroids, rows)

    def compute(examples: np.ndarray, tell: Callable[[int], object]) -> dict[str, np.ndarray]:
        found = evaluation.compute_in_blocks(predict_rows, examples, mesh.size, tell, dtype)
        return dict(zip(("labels", "distances"), found, strict=True))

    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"centroids {centroids.dtype} {centroids.shape}".encode())
    digest.update(np.ascontiguousarray(centroids).tobytes())
    return Predictor(
        described=f"{len(centroids):,} centroids of {folder.absolute().name}",
        digest=digest.hexdigest(),
        example_shape=(centroids.shape[1],),
        columns=("labels", "distances"),
        centroids=centroids,
        checkpoint="latest",
        input_columns=_columns_of(folder),
        compute=compute,
    )


def _columns_of(folder: Path) -> tuple[str, ...] | None:
    """The columns that a job of experiments.cluster was asked to take, if it was."""
    try:
        columns = json.loads((folder / CONFIG_FILE).read_text())["columns"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # Centroids alone predict, too.
    return tuple(columns) or None
