"""The workdir of a job: what lies in it, whole and of the same config and data, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans import configuration, datasets, processes
from jkmeans.clustering.settings import FIELDS, RUNTIME
from jkmeans.configuration import Config, convert_fields, nest
from jkmeans.errors import UserError
from jkmeans.whole_files import UNREADABLE, read_arrays, write_array, write_arrays
from jkmeans.workdir import CENTROIDS_FILE, CONFIG_FILE, claim

SUMMARY_FILE = "summary.json"
SWEEP_FILE = "sweep.json"
STATE_FILE = "state.npz"
LABELS_FILE, DISTANCES_FILE, SIZES_FILE = "labels.npy", "distances.npy", "sizes.npy"
_OUTPUTS = (CENTROIDS_FILE, LABELS_FILE, DISTANCES_FILE, SIZES_FILE)


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes the config into a new workdir, or checks that the one there is the same.

    Raises:
      UserError: the folder holds a job with another config, or files that the job would write over,
        or is what the job reads, or cannot be written.
    """
    is_named = config.input in datasets.NAMED
    if not is_named and Path(config.input).resolve() == workdir.resolve():
        raise UserError(
            f"--workdir is {workdir}, which is config.input itself; accepted: another folder"
        )
    if not (workdir / CONFIG_FILE).exists():
        names = (*_OUTPUTS, SUMMARY_FILE, SWEEP_FILE, STATE_FILE)
        found = [name for name in names if (workdir / name).exists()]
        if found:
            raise UserError(
                f"{workdir} holds {found[0]}, which is of no job and would be written over; "
                "accepted: another --workdir"
            )

    def differences(there: Any) -> list[str]:
        there = nest(convert_fields(there, FIELDS))
        return configuration.differences(config, there, FIELDS, RUNTIME)

    claim(workdir, configuration.to_json(config), differences, kind="job")


class State:
    """What a job has found so far, and needs to go on: arrays in one file.

    Attributes:
      restart: restarts that are finished.
      n_iter: iterations of the one that runs.
      centroids: [k, d] of the one that runs; None before its initialisation.
      best: [k, d] of the finished restart of least inertia; None before the first.
      best_inertia: its inertia.
      best_n_iter: its iterations.
      best_converged: whether it came to rest.
      history: (restart, iteration, inertia), in the order of time.
      seconds: spent by all processes that ran this job.
    """

    def __init__(self):
        self.restart = 0
        self.n_iter = 0
        self.centroids: np.ndarray | None = None
        self.best: np.ndarray | None = None
        self.best_inertia = float("inf")
        self.best_n_iter = 0
        self.best_converged = False
        self.history: list[tuple[int, int, float]] = []
        self.seconds = 0.0

    def end_restart(self, inertia: float, converged: bool) -> None:
        """Keeps the restart that runs if it is the best so far, and makes room for the next."""
        if inertia < self.best_inertia or self.best is None:
            self.best, self.best_inertia = self.centroids, inertia
            self.best_n_iter, self.best_converged = self.n_iter, converged
        self.restart, self.n_iter, self.centroids = self.restart + 1, 0, None

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes the state, whole."""
        scalars = (
            self.restart, self.n_iter, self.best_inertia, self.best_n_iter, self.best_converged,
            self.seconds,
        )  # fmt: skip
        arrays = {
            "scalars": np.asarray(scalars, np.float64),
            "history": np.asarray(self.history, np.float64).reshape(-1, 3),
            "fingerprint": np.asarray(fingerprint),
        }
        arrays |= {
            name: array
            for name in ("centroids", "best")
            if (array := getattr(self, name)) is not None
        }
        write_arrays(path, arrays)

    @staticmethod
    def load(path: Path, fingerprint: str) -> State:
        """The state in a file; a new one where there is no file.

        Raises:
          UserError: the file is damaged, or of other data.
        """
        state = State()
        if not path.exists():
            return state
        try:
            found = read_arrays(path)
            restart, n_iter, inertia, best_n_iter, converged, seconds = found["scalars"].tolist()
            history = [(int(r), int(i), float(v)) for r, i, v in found["history"]]
            other_data = str(found["fingerprint"]) != fingerprint
        except UNREADABLE as error:
            raise UserError(
                f"{path} is damaged ({error}); accepted: the state that the job wrote; delete it "
                "to start anew"
            ) from error
        if other_data:
            raise _other_data(path.parent)
        state.restart, state.n_iter, state.best_n_iter = int(restart), int(n_iter), int(best_n_iter)
        state.best_inertia, state.best_converged = inertia, bool(converged)
        state.seconds, state.history = seconds, history
        state.centroids, state.best = found.get("centroids"), found.get("best")
        return state


def read_summary(workdir: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a finished job wrote; None where one is not, or lost an output.

    Raises:
      UserError: the file is damaged, or of other data.
    """
    path = workdir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        other_data = summary["fingerprint"] != fingerprint
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to do the job anew") from error
    if other_data:
        raise _other_data(workdir)
    missing = [name for name in _OUTPUTS if not (workdir / name).exists()]
    return None if missing else summary


def read_sweep(path: Path, fingerprint: str) -> dict[int, tuple]:
    """Inertia, silhouette and stability of every K that an earlier process judged."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        if record["fingerprint"] != fingerprint:
            raise _other_data(path.parent)
        columns = (
            [math.nan if value is None else value for value in record[name]]
            for name in ("inertia", "silhouette", "stability")
        )
        return dict(zip(record["n_clusters"], zip(*columns, strict=True), strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to sweep anew") from error


def _other_data(workdir: Path) -> UserError:
    return UserError(
        f"{workdir} holds a job on other data; accepted: the same data, or another --workdir"
    )


def write_npy(path: Path, array: np.ndarray) -> None:
    """Writes an array, whole; process 0 does, for all."""
    if processes.is_first():
        write_array(path, array)
