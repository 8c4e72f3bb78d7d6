"""A run that is followed: its curve on the disk, progress, an end where it diverges."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jkmeans.asynchronous import engine
from jkmeans.asynchronous.rules import Tree
from jkmeans.asynchronous.server import DIVERGED, Status
from jkmeans.configuration import Config
from jkmeans.errors import CollapseError, UserError
from jkmeans.recorder import format_duration
from jkmeans.telling import remark
from jkmeans.vq.simulation import EXPLODED
from jkmeans.whole_files import write_arrays, write_whole

CURVE_FILE = "curve.jsonl"
LAST_GOOD_FILE = "last_good.npz"
SHOWN = ("value", "seconds", "exchanges", "exchanges_per_second", "staleness_mean")
"""What of the results is shown at the end."""
_POINT = ("seconds", "clock", "samples", "value")
_LINE_SECONDS = 5.0


class Followed(NamedTuple):
    """A run that has ended.

    Attributes:
      outcome: see `engine.Outcome`; ``outcome.shared`` is finite.
      points: of the curve, over all parts of the run; see `Curve`.
    """

    outcome: engine.Outcome
    points: list[dict[str, float]]


class Curve:
    """The criterion of the shared version over time, one line of JSON a point.

    A point has ``seconds`` (from the first displacement on; pauses between the parts of a run are
    left out), ``clock`` (displacements applied), ``samples`` and ``value``. Where the server came
    back from a checkpoint, clock and samples go back.

    Args:
      path: of the file; the points that are there are kept. Lines that are none, as a kill or a
        damage leaves them, are not.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_bytes().splitlines() if path.exists() else []
        self.points = [point for line in lines if (point := _point(line)) is not None]
        write_whole(path, "".join(json.dumps(point) + "\n" for point in self.points).encode())
        self._before = self.points[-1]["seconds"] if self.points else 0.0

    def add(self, seconds: float, status: Status, value: float) -> None:
        """Adds a point; ``seconds`` count from the start of this part of the run."""
        point = {
            "seconds": round(self._before + seconds, 4),
            "clock": status.clock,
            "samples": status.samples,
            "value": value,
        }
        self.points.append(point)
        with open(self.path, "a") as file:
            file.write(json.dumps(point) + "\n")


def _point(line: bytes) -> dict[str, float] | None:
    """The point of a line; None where it is none."""
    try:
        point = json.loads(line)
        whole = all(isinstance(point[name], int | float) for name in _POINT)
    except (ValueError, TypeError, KeyError):
        return None
    return point if whole else None


def follow(
    job: engine.Job,
    folder: Path,
    options: Config,
    criterion: Callable[[Tree], float],
    *,
    name: str,
    watch: Callable[[Status], object] = lambda status: None,
) -> Followed:
    """Runs a job to its end and records the criterion of the shared version.

    Args:
      job: what is computed.
      folder: receives the curve, the journal and the checkpoints; a run that is there goes on.
      options: the group ``ray`` of a config.
      criterion: shared -> the number that is drawn, less is better.
      name: of the criterion, for the user.
      watch: see `engine.run`.

    Raises:
      CollapseError: the shared version diverged: it is not finite, or the criterion is
        `EXPLODED` times that of the first version. The last good one is in ``last_good.npz``.
      UserError: the criterion of the first version is not finite; or see `engine.run`.
      Interrupted: see `engine.run`.
    """
    curve = Curve(folder / CURVE_FILE)
    progress = _Progress(job.budget, name)
    diverged = False

    def evaluate(shared: Tree, status: Status, seconds: float) -> bool:
        nonlocal diverged
        if curve.points and curve.points[-1]["clock"] == status.clock:
            return not diverged  # Nothing was applied since.
        value = float(criterion(shared))
        if not status.clock and not math.isfinite(value):
            raise UserError(
                f"the {name} of the first version is {value}; accepted: data and a first version "
                "of which it is finite"
            )
        first = curve.points[0]["value"] if curve.points else value
        diverged |= not (math.isfinite(value) and value <= EXPLODED * first)
        if not diverged:
            curve.add(seconds, status, value)
            _keep(folder, shared)
        progress.tell(status, value)
        return not diverged

    outcome = engine.run(job, folder, options, evaluate=evaluate, watch=watch)
    if diverged or outcome.status.ended == DIVERGED:
        raise CollapseError(
            f"the {name} diverged after {outcome.status.clock:,} exchanges; the last good version "
            f"is in {folder / LAST_GOOD_FILE}; accepted: smaller steps, or fewer workers"
        )
    return Followed(outcome, curve.points)


def _keep(folder: Path, shared: Tree) -> None:
    import jax

    leaves: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "shared": np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shared)
    }
    write_arrays(folder / LAST_GOOD_FILE, leaves)


class _Progress:
    """One line at most every few seconds: how far, how fast, how long still."""

    def __init__(self, budget: int, name: str):
        self._budget, self._name = budget, name
        self._begun: tuple[float, int] | None = None
        self._samples = 0
        self._told_at = float("-inf")

    def tell(self, status: Status, value: float) -> None:
        now = time.monotonic()
        # Anew where a server that died has taken some back.
        if status.samples > 0 and (self._begun is None or status.samples < self._samples):
            self._begun = now, status.samples
        self._samples = status.samples
        due = now - self._told_at >= _LINE_SECONDS or bool(status.ended)
        if not due:
            return
        self._told_at = now
        line = f"{status.samples:,} of {self._budget:,} samples, {self._name} {value:.5g}"
        if self._begun is not None and now > self._begun[0]:
            rate = (status.samples - self._begun[1]) / (now - self._begun[0])
            line += f", {rate:,.0f} samples/s"
            if rate > 0 and not status.ended:
                line += f", {format_duration((self._budget - status.samples) / rate)} left"
        remark(line)


def results_of(followed: Followed) -> dict[str, Any]:
    """What ``results.json`` says of a run, besides what was computed."""
    outcome = followed.outcome
    staleness = outcome.history.staleness
    times = outcome.history.applied["time"]
    busy = _busy_seconds(times)
    samples = max(1, outcome.status.samples)
    return {
        "value": followed.points[-1]["value"],
        "exchanges": outcome.status.clock,
        "samples": outcome.status.samples,
        "seconds": followed.points[-1]["seconds"],
        "exchanges_per_second": len(times) / busy if busy else None,
        "samples_per_second": outcome.status.samples / busy if busy else None,
        "staleness_mean": float(staleness.mean()) if len(staleness) else None,
        "staleness_95_percent": float(np.percentile(staleness, 95)) if len(staleness) else None,
        "staleness_most": int(staleness.max()) if len(staleness) else None,
        "shares": [position / samples for position in outcome.status.positions],
        "processes": outcome.lives,
        "server_lives": len(outcome.history.rolled_back),
        "rolled_back": sum(outcome.history.rolled_back),
        "missing_workers": outcome.missing,
    }


def read_results(path: Path) -> dict[str, Any] | None:
    """What `results_of` made of a run that has ended; None where nothing that can be read is there.

    A run computes it again from its checkpoint, journal and curve.
    """
    try:
        results = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return results if isinstance(results, dict) and set(SHOWN) <= set(results) else None


def _busy_seconds(times: np.ndarray) -> float:
    """Seconds in which displacements arrived: pauses of more than a second do not count."""
    gaps = np.diff(times)
    return float(gaps[(gaps >= 0) & (gaps < 1.0)].sum())
