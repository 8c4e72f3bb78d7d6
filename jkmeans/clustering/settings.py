"""The fields of a job's config, and what their values may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jkmeans import datasets, kmeans
from jkmeans.configuration import (
    Config,
    Field,
    boolean,
    choice,
    convert_fields,
    integer,
    integers,
    nest,
    number,
    text,
)
from jkmeans.errors import UserError
from jkmeans.fields import TooLargeError, texts

AUTO = "auto"


def _convert_n_clusters(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    if value == AUTO:
        return AUTO
    if int(value) >= 2**31:
        raise TooLargeError(f"an integer from 1 to {2**31 - 1}, or auto")
    if int(value) < 1:
        raise ValueError
    return str(int(value))


FIELDS: dict[str, Field] = {
    "seed": integer(0, "the root of all random keys"),
    "n_devices": integer(0, "devices of the mesh; 0 for all"),
    "input": text(
        f"{', '.join(datasets.NAMED)}, or a .npy file, a folder of them, .zarr or Parquet"
    ),
    "columns": texts("columns of Parquet; () for all but the index of a data frame", "names"),
    "memory_mebibytes": integer(0, "data above this is streamed; 0 for half of what is free"),
    "n_clusters": Field(
        _convert_n_clusters, "an integer of at least 1, or auto", "K, or auto for a sweep"
    ),
    "init": choice(tuple(kmeans.INITIALIZATIONS), "how the first centroids are chosen"),
    "n_init": integer(1, "restarts, of which the one of least inertia is kept"),
    "max_iter": integer(1, "Lloyd iterations of a restart, at most"),
    "tol": number("a restart ends at this squared shift, in mean variances of the features"),
    "empty": choice(kmeans.EMPTY_POLICIES, "what becomes of an empty cluster"),
    "deterministic": boolean("whether 1, 2, 4 and 8 devices give the same bits, at some cost"),
    "iterations_per_program": integer(1, "iterations between two reports, at most"),
    "sweep.n_clusters": integers("values of K that auto tries"),
    "sweep.n_init": integer(1, "restarts of every fit of the sweep"),
    "sweep.n_refits": integer(2, "fits to bootstrap samples, for the stability"),
    "sweep.sample_size": integer(0, "rows that the sweep looks at; 0 for all"),
    "report.pictures": boolean("whether a job ends with report/*.png"),
    "report.sample_size": integer(2, "rows for silhouettes and the map", most=20_000),
}

RUNTIME = (
    "n_devices",
    "input",  # The data itself is compared with what the workdir remembers of it.
    "memory_mebibytes",
    "report.",
)
"""Fields that may differ when a job goes on."""


def validate(config: Config) -> Config:
    """The config with every value in its proper type and the path absolute.

    Raises:
      UserError: a field is unknown, missing, of a wrong type or value, or contradicts another.
    """
    values = convert_fields(config, FIELDS)
    if not values["input"]:
        raise UserError(f"config.input is ''; accepted: {FIELDS['input'].meaning}")
    if values["n_clusters"] == AUTO:
        ks = values["sweep.n_clusters"]
        if not ks or min(ks) < 2:
            raise UserError(
                f"config.sweep.n_clusters is {ks}; accepted: at least one integer, of at least 2"
            )
    if values["columns"] and values["input"] in datasets.NAMED:
        raise UserError(
            f"config.columns is {values['columns']}, but input is {values['input']!r}; accepted: "
            "() for all but Parquet"
        )
    if values["input"] not in datasets.NAMED:
        values["input"] = str(Path(values["input"]).expanduser().absolute())
    return nest(values)
