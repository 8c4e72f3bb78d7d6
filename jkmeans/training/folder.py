"""Whose a workdir is: the config and the data of its run, written once and compared ever after."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans import configuration, datasets
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.workdir import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    TABLE_FILE,
    claim,
    folders_of_seeds,
    usable,
)


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes the config into a new workdir, or checks that the one there is the same.

    Raises:
      UserError: the folder holds a run with another config or something else, or cannot be
        written.
    """
    with usable(workdir):
        new = not (workdir / CONFIG_FILE).exists()
        lost = new and (workdir / CHECKPOINT_FOLDER).exists()
    if new:
        refuse_other_kinds(workdir, "run")
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


def refuse_other_kinds(workdir: Path, own: str) -> None:
    """Refuses a folder of something else, whose files would stand among ours.

    Args:
      workdir: new, or of the same kind.
      own: what it is to hold: "run", "seeds" or "table".

    Raises:
      UserError: it holds another of these, or another run or job, or cannot be read.
    """
    with usable(workdir):
        there = {
            "run": (workdir / CONFIG_FILE).exists() or (workdir / CHECKPOINT_FOLDER).exists(),
            "seeds": bool(folders_of_seeds(workdir)),
            "table": (workdir / TABLE_FILE).exists(),
        }
    words = {
        "run": "a run or a job",
        "seeds": "the runs of several seeds, each in a folder of its own",
        "table": "a table of many runs",
    }
    for kind, is_there in there.items():
        if is_there and kind != own:
            raise UserError(f"{workdir} holds {words[kind]}; accepted: another --workdir")


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
