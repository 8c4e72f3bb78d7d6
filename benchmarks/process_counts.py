"""Whether the number of processes moves a result by more than the seed does.

    python -m benchmarks.process_counts --seeds 3 --workdir runs/process_counts

Trains on the digits of scikit-learn from each seed: in 1, 2 and 4 processes; in 3 of which one is
killed at a sixth of the epochs and the other two go on; and in 3 of which one is killed there and
replaced at half of the epochs.
Sums are taken in another order each time, so bits differ, and training makes something of that. The
table has mean and standard deviation over seeds for each way, and how far runs of one seed lie
from the run of the same seed in one process. Runs that are done are not run again.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support.flags import Parser, at_least
from jkmeans.errors import UserError
from jkmeans.processes.supervisor import EVENTS_FILE, WANTED_FILE
from jkmeans.recorder import read_metrics

METRICS = ("acc", "nmi", "inertia")
PATIENCE_SECONDS = 600.0


class Way(NamedTuple):
    """How a run is spread.

    Attributes:
      name: for the table.
      flags: of experiments.launch.
      kills: whether one is killed at a sixth of the epochs.
      asks: for so many processes at half of the epochs; 0 for no wish.
      numbers: processes of one start after the other.
    """

    name: str
    flags: tuple[str, ...]
    kills: bool
    asks: int
    numbers: tuple[int, ...]


WAYS = (
    Way("1", ("--processes=1",), False, 0, (1,)),
    Way("2", ("--processes=2",), False, 0, (2,)),
    Way("4", ("--processes=4",), False, 0, (4,)),
    Way("3, then 2", ("--processes=3", "--min_processes=2"), True, 0, (3, 2)),
    Way("3, then 2, then 3", ("--processes=3", "--min_processes=2"), True, 3, (3, 2, 3)),
)


def train(way: Way, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The results of one run, which may have been run before.

    Raises:
      RuntimeError: it failed, or went on with another number of processes than it should have.
    """
    found = folder / "found.json"
    if found.exists():
        return json.loads(found.read_text())
    run = folder / "run"
    command = [
        *(sys.executable, "-m", "experiments.launch", *way.flags, "--"),
        *(sys.executable, "-m", "experiments.train", "--config=configs/digits.py"),
        *(f"--workdir={run}", f"--config.seed={seed}", "--config.report.pictures=False"),
        f"--config.network.widths=({options.width},)",
        f"--config.training.n_pretrain_epochs={options.epochs // 2}",
        f"--config.training.n_epochs={options.epochs - options.epochs // 2}",
        "--config.checkpoint.every=5",
    ]
    shutil.rmtree(run, ignore_errors=True)  # Of an attempt that was cut.
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            if way.kills:
                _await_epoch(run, options.epochs // 6, process)
                os.kill(_starts(run)[-1]["pids"][-1], signal.SIGKILL)
            if way.asks:
                _await_epoch(run, options.epochs // 2, process)
                (run / "processes" / WANTED_FILE).write_text(str(way.asks))
            status = process.wait(PATIENCE_SECONDS)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
    if status != 0:
        raise RuntimeError(f"exit status {status}; see {folder / 'log'}")
    numbers = tuple(event["n"] for event in _starts(run))
    if numbers != way.numbers:
        raise RuntimeError(f"processes were {numbers}, not {way.numbers}; see {folder / 'log'}")
    results = json.loads((run / "results.json").read_text())
    found.write_text(json.dumps({name: results[name] for name in METRICS}))
    return json.loads(found.read_text())


def _await_epoch(run: Path, epoch: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError, UserError):  # Not there yet.
            if max((record["epoch"] for record in read_metrics(run)), default=0) >= epoch:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{run} did not get to epoch {epoch}")


def _starts(run: Path) -> list[dict[str, Any]]:
    lines = (run / "processes" / EVENTS_FILE).read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "start"]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """In Markdown, a line for each way: ``found`` has the results of each seed by its name."""
    alone = found[WAYS[0].name]
    lines = ["| processes | seeds | ACC | NMI | inertia | ACC of the same seed, off by at most |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, results in found.items():
        cells = [name, str(len(results))]
        for metric, scale, form in (
            ("acc", 100, ".1f"),
            ("nmi", 100, ".1f"),
            ("inertia", 1, ".2f"),
        ):
            values = [scale * result[metric] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):{form}} ± {spread:{form}}")
        off = max(abs(a["acc"] - b["acc"]) for a, b in zip(results, alone, strict=False))
        cells.append(f"{100 * off:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = Parser("process_counts", __doc__)
    parser.add_argument("--seeds", type=at_least(1), default=3, help="of each way")
    parser.add_argument(
        "--epochs", type=at_least(6), default=60, help="half of them of pretraining"
    )
    parser.add_argument("--width", type=at_least(1), default=128, help="of the hidden layer")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
    for seed in range(options.seeds):
        for number, way in enumerate(WAYS):
            folder = options.workdir / f"{number}-{seed}-{options.epochs}-{options.width}"
            found[way.name].append(train(way, seed, options, folder))
            print(f"seed {seed}, processes: {way.name}: {found[way.name][-1]}", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
