"""What a run says while it runs: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jkmeans import processes
from jkmeans.errors import UserError
from jkmeans.whole_files import whole_file

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

MOST_SIZES = 200  # More clusters than that are not recorded one by one.
# The remaining time follows the last few epochs: long enough to average over epochs that also
# re-cluster, short enough to follow a machine that has become slower.
RECENT_EPOCHS = 10

_RESERVED = ("epoch", "phase", "time", "seconds", "examples_per_second", "cluster_sizes")

_silent = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Recorders made inside, and `results_table`, print nothing; what is written stays the same."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


class Recorder:
    """Tells the user how a run goes, and writes it down.

    On a terminal there is a progress bar on stderr; elsewhere (CI, nohup) one plain line per
    epoch. Either way each epoch is appended to `workdir/metrics.jsonl` and to TensorBoard events
    in `workdir/tensorboard`, with the tag `phase/metric` and the epoch on the x axis.

    Epochs are numbered from 1 to `n_epochs` over the whole run, pretraining included. With
    `resumed`, the records of epochs after `position` are dropped, since these epochs run again;
    without it the records start anew. Of several processes, process 0 records; the others have a
    `NoRecorder`.

    Args:
        workdir: folder of the run, made if missing.
        n_epochs: epochs of the whole run, pretraining and clustering.
        position: epochs already finished.
        resumed: whether the records of the first `position` epochs are kept.

    Raises:
        UserError: the records in `workdir` cannot be read.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        n_epochs: int,
        position: int,
        resumed: bool = False,
    ):
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        kept = position if resumed else 0
        _rewrite_metrics(workdir, kept)

        self._n_epochs = n_epochs
        self._durations: dict[str, deque[float]] = {}
        self._epochs_left = n_epochs - position
        self._seconds_left: float | None = None
        self._epoch_ended = time.monotonic()
        self._position = position
        self._silent = _silent.get()

        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(open(workdir / METRICS_FILE, "a", encoding="utf-8"))
            folder = workdir / TENSORBOARD_FOLDER
            # TensorBoard then ignores what an earlier, longer life of this run had written.
            purge_step = kept + 1 if folder.exists() else None
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)
            stack.callback(self._writer.close)
            has_bar = _is_terminal(sys.stderr) and not self._silent
            self._bar = self._start_bar() if has_bar else None
            if self._bar is not None:
                stack.callback(self._bar.stop)
            self._stack = stack.pop_all()

    def epoch(
        self,
        phase: str,
        epoch: int,
        metrics: Mapping[str, Any],
        n_examples: int,
        seconds: float,
        sizes: np.ndarray | None = None,
    ) -> None:
        """Records a finished epoch.

        Args:
            phase: `pretrain`, `cluster`, …
            epoch: number of the epoch in the whole run, the first is 1.
            metrics: scalars by name; NaN and infinity are written as null.
            n_examples: examples seen in the epoch.
            seconds: duration of the epoch, compilation left out.
            sizes: examples of each cluster, [k]; written as ``cluster_sizes`` where there are at
                most MOST_SIZES.

        Raises:
            ValueError: a metric has the name of a field that the recorder writes itself.
        """
        reserved = sorted(set(metrics).intersection(_RESERVED))
        if reserved:
            raise ValueError(
                f"metrics cannot be named {reserved}: the recorder writes these itself"
            )
        values = {name: _number(value) for name, value in metrics.items()}
        rate = n_examples / seconds if seconds > 0 else None

        self._durations.setdefault(phase, deque(maxlen=RECENT_EPOCHS)).append(seconds)
        self._epochs_left = max(self._n_epochs - epoch, 0)
        self._seconds_left = remaining_seconds(self._durations[phase], self._epochs_left)
        self._epoch_ended = time.monotonic()
        self._position = epoch

        record = {
            "epoch": epoch,
            "phase": phase,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "seconds": _number(seconds),
            "examples_per_second": None if rate is None else round(rate, 1),
            **values,
        }
        if sizes is not None and len(sizes) <= MOST_SIZES:
            record["cluster_sizes"] = [round(float(size)) for size in sizes]
        # One write per line: a run that is killed leaves at most one torn line, the last.
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()

        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{phase}/{name}", value, epoch)
        if rate is not None:
            self._writer.add_scalar(f"{phase}/examples_per_second", rate, epoch)
        self._writer.flush()

        shown = "  ".join(_headline(values))
        speed = f"{rate:,.0f} examples/s" if rate is not None else ""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=epoch,
                phase=phase,
                epoch=f"{epoch}/{self._n_epochs}",
                speed=speed,
                metrics=shown,
            )
        else:
            width = len(str(self._n_epochs))
            parts = [f"{phase:<8}  {epoch:>{width}}/{self._n_epochs}", shown, speed]
            parts.append(f"{format_duration(self._seconds_left)} left")
            self._print("  ".join(part for part in parts if part))

    def waiting(self, fraction: float | None) -> None:
        """Moves the bar while an epoch runs.

        Args:
            fraction: how much of the running epoch is done, from 0 to 1; None if unknown.
        """
        if self._bar is None:
            return
        done = self._position + min(max(fraction or 0.0, 0.0), 1.0)
        self._bar.update(self._task, completed=min(done, self._n_epochs), refresh=True)

    def say(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            self._print(text)

    def close(self) -> None:
        """Takes the bar down and closes the files; a second call does nothing.

        An interrupt while one of them closes does not keep the others open.
        """
        self._stack.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _print(self, text: str) -> None:
        if not self._silent:
            print(text, file=sys.stderr, flush=True)

    def _start_bar(self) -> Progress:
        recorder = self

        class Remaining(ProgressColumn):
            def render(self, task: Task) -> Text:
                left = recorder._seconds_left
                if left is not None:
                    # Counts down between epochs.
                    left = max(left - (time.monotonic() - recorder._epoch_ended), 0.0)
                return Text(f"{format_duration(left)} left" if left is not None else "")

        class TwoLines(Progress):
            # The metrics have a line of their own: 80 columns do not hold everything.
            def get_renderables(self) -> Iterable[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks:
                    if task.fields["metrics"]:
                        yield Text(task.fields["metrics"], no_wrap=True, overflow="ellipsis")

        bar = TwoLines(
            TextColumn("[bold]{task.fields[phase]}"),
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=16),
            TimeElapsedColumn(),
            Remaining(),
            TextColumn("{task.fields[speed]}"),
            console=Console(file=sys.stderr, force_terminal=True),
            # Lines of libraries go above the bar, but a stdout that is a file or a pipe stays one.
            redirect_stdout=_is_terminal(sys.stdout),
            refresh_per_second=4,
        )
        self._task = bar.add_task(
            "",
            total=self._n_epochs,
            completed=self._position,
            phase="starting",
            epoch=f"{self._position}/{self._n_epochs}",
            speed="",
            metrics="",
        )
        bar.start()
        return bar


class NoRecorder(Recorder):
    """The recorder of a process that leaves recording to process 0."""

    def __init__(self):
        pass

    def epoch(self, *arguments: Any, **named: Any) -> None:
        """Does nothing."""

    def waiting(self, fraction: float | None) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the epochs that a run has recorded in `metrics.jsonl`, in order.

    A last line that was cut off when the run was killed is left out. A value that was not finite
    is None.

    Args:
        workdir: folder of the run.

    Returns:
        One dictionary per epoch: `epoch`, `phase`, `time`, `seconds`, and the metrics; empty if
        the run has recorded nothing.

    Raises:
        UserError: a line other than the last is not a record.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    # Bytes: a line can be cut in the middle of a character.
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
                raise ValueError
        except ValueError:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {path} is {line[:60]!r}, where a JSON object with an integer "
                f"'epoch' is expected; delete the line to go on"
            ) from None
        records.append(record)
    return records


def remaining_seconds(durations: Sequence[float], epochs_left: int) -> float:
    """Estimates how long the epochs that are left will take: the mean of `durations` for each."""
    return sum(durations) / len(durations) * epochs_left


def format_duration(seconds: float) -> str:
    """Writes a duration with its two largest units: `45s`, `1m 20s`, `2h 05m`, `3d 04h`."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = minutes // 60
    return f"{hours // 24}d {hours % 24:02d}h"


def results_table(rows: Mapping[str, str | float | int], title: str) -> None:
    """Prints the results of a run on stdout: a table on a terminal, aligned text elsewhere.

    Args:
        rows: values by name, in the order in which they are printed.
        title: the heading.
    """
    if _silent.get() or not processes.is_first():
        return
    cells = {name: _cell(name, value) for name, value in rows.items()}
    if _is_terminal(sys.stdout):
        table = Table(title=Text(title), show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        for name, cell in cells.items():
            table.add_row(Text(name), Text(cell))
        Console(file=sys.stdout, force_terminal=True).print(table)
    else:
        width = max((len(name) for name in cells), default=0)
        print("\n".join([title, *(f"  {name:<{width}}  {cell}" for name, cell in cells.items())]))
    sys.stdout.flush()


def _rewrite_metrics(workdir: Path, kept: int) -> None:
    """Leaves in metrics.jsonl the records of the epochs up to `kept`, whole lines only."""
    path = workdir / METRICS_FILE
    records = [r for r in read_metrics(workdir) if r["epoch"] <= kept] if kept else []
    # Through a second file: whoever kills the run here loses no record.
    with whole_file(path) as file:
        file.writelines((json.dumps(r, allow_nan=False) + "\n").encode() for r in records)
        file.flush()
        os.fsync(file.fileno())


def _number(value: Any) -> int | float | None:
    """Turns a Python, NumPy or JAX scalar into what JSON can hold: None if it is not finite."""
    value = np.asarray(value).item()
    if isinstance(value, bool | int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _headline(values: Mapping[str, int | float | None]) -> list[str]:
    """The few metrics that fit into a line."""
    parts = []
    for name, label in (
        ("loss", "loss"),
        ("label_change", "changed"),
        ("empty_clusters", "empty"),
        ("acc", "acc"),
        ("nmi", "nmi"),
    ):
        if name not in values:
            continue
        value = values[name]
        if value is None:
            parts.append(f"{label} nan")
        elif name == "label_change":
            parts.append(f"{label} {100 * value:.1f}%")
        elif name == "empty_clusters":
            parts.append(f"{label} {int(value)}")
        elif name in ("acc", "nmi"):
            parts.append(f"{label} {value:.3f}")
        else:
            parts.append(f"{label} {value:#.3g}")
    return parts


def _cell(name: str, value: str | float | int) -> str:
    if isinstance(value, str):
        return value
    number = np.asarray(value).item()
    if isinstance(number, bool):
        return "yes" if number else "no"
    if isinstance(number, int):
        return f"{number:,}"
    if name.endswith("seconds"):
        return f"{number:,.1f}" if number >= 1 else f"{number:.3g}"
    return f"{number:.4f}" if 1e-3 <= abs(number) < 1e4 or number == 0 else f"{number:.4g}"


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
