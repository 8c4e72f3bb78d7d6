"""Whose a workdir is: the config and the data of its run, written once and compared ever after."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans import configuration, datasets
from jkmeans.configuration import Config
from jkmeans.fingerprints import fingerprint_of_rows
from jkmeans.workdir import claim

_ALL_ROWS = "checksum_of_all"


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes the config into a new workdir, or checks that the one there is the same.

    Raises:
      UserError: the folder holds a run with another config or something else, or cannot be
        written.
    """
    claim(
        workdir,
        configuration.to_json(config),
        lambda there: configuration.differences(config, configuration.from_json(there)),
        kind="run",
    )


def describe_data(dataset: datasets.Dataset) -> dict[str, Any]:
    """What a checkpoint remembers of its data; all processes of a run call, each reads its part."""
    rows = np.unique(np.linspace(0, dataset.n_examples - 1, 256).astype(np.int64))
    sample = np.ascontiguousarray(dataset.examples[rows])
    return {
        "name": dataset.name,
        "n_examples": dataset.n_examples,
        "example_shape": list(dataset.example_shape),
        "dtype": str(dataset.examples.dtype),
        "scale": dataset.scale,
        # Of 256 rows spread over it, as all versions have it.
        "checksum": zlib.crc32(sample.tobytes()),
        _ALL_ROWS: fingerprint_of_rows(dataset.examples),
    }


def is_same_data(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same data; older ones say nothing of most rows."""
    return {_ALL_ROWS: here[_ALL_ROWS], **there} == here
