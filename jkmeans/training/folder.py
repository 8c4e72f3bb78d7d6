"""Whose a workdir is: the config and the data of its run, written once and compared ever after."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans import configuration, datasets
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.workdir import CHECKPOINT_FOLDER, CONFIG_FILE, claim, folders_of_seeds, usable


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes the config into a new workdir, or checks that the one there is the same.

    Raises:
      UserError: the folder holds a run with another config or the runs of several seeds, or cannot
        be written.
    """
    with usable(workdir):
        new = not (workdir / CONFIG_FILE).exists()
        lost = new and (workdir / CHECKPOINT_FOLDER).exists()
        several = new and bool(folders_of_seeds(workdir))
    if several:
        raise UserError(
            f"{workdir} holds the runs of several seeds, each in a folder of its own; accepted: "
            "one of these folders, or another --workdir"
        )
    if lost:
        raise UserError(
            f"{workdir} holds checkpoints but no {CONFIG_FILE}, so they are not of a run of "
            "jkmeans; accepted: a new folder or that of a run"
        )
    claim(
        workdir,
        configuration.to_json(config),
        lambda there: configuration.differences(config, configuration.from_json(there)),
        kind="run",
    )


def refuse_one_run(workdir: Path) -> None:
    """Refuses the folder of a run for several seeds, whose means would stand in its records.

    Raises:
      UserError: it is one, or cannot be read.
    """
    with usable(workdir):
        one = (workdir / CONFIG_FILE).exists() or (workdir / CHECKPOINT_FOLDER).exists()
    if one:
        raise UserError(
            f"{workdir} holds a run of one seed; accepted: config.n_seeds = 1, or another --workdir"
        )


def describe_data(dataset: datasets.Dataset) -> dict[str, Any]:
    """What a checkpoint remembers of its data; the checksum is of 256 rows spread over it."""
    rows = np.unique(np.linspace(0, dataset.n_examples - 1, 256).astype(np.int64))
    sample = np.ascontiguousarray(dataset.examples[rows])
    return {
        "name": dataset.name,
        "n_examples": dataset.n_examples,
        "example_shape": list(dataset.example_shape),
        "dtype": str(dataset.examples.dtype),
        "scale": dataset.scale,
        "checksum": zlib.crc32(sample.tobytes()),
    }
