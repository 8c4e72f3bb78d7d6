"""What a pass over a source says while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jkmeans import processes
from jkmeans.recorder import format_duration
from jkmeans.telling import remark

# Between two plain lines: a log of a day stays readable.
_LINE_SECONDS = 10.0


class StreamProgress(NamedTuple):
    """How far a pass has come.

    Attributes:
      stage: what the pass is for, in words: "iteration 3".
      rows: done in this pass.
      n_rows: of a pass.
      rows_per_second: of this pass so far; 0 before the first chunk.
      bytes_per_second: likewise, of the rows as they are read.
      seconds_left: of this pass; None before the first chunk.
    """

    stage: str
    rows: int
    n_rows: int
    rows_per_second: float
    bytes_per_second: float
    seconds_left: float | None

    def __str__(self) -> str:
        text = (
            f"{self.stage}: {self.rows:,} of {self.n_rows:,} rows, "
            f"{self.rows_per_second:,.0f} rows/s, {self.bytes_per_second / 1e6:,.0f} MB/s"
        )
        if self.seconds_left:
            text += f", {format_duration(self.seconds_left)} left"
        return text


class Reporter:
    """Measures passes and tells the user; a context manager.

    Args:
      progress: True for a bar (plain lines where stderr is no terminal), False for silence, or a
        function that is called with a `StreamProgress` after every chunk.
      n_rows: of a pass.
      row_bytes: read for a row.
    """

    def __init__(
        self, progress: bool | Callable[[StreamProgress], object], n_rows: int, row_bytes: int
    ):
        if not processes.is_first() and not callable(progress):
            progress = False
        self._tell = progress if callable(progress) else None
        self._n_rows = n_rows
        self._row_bytes = row_bytes
        self._stage = ""
        self._first_row = 0
        self._started = self._line_at = time.monotonic()
        self._bar: Progress | None = None
        self._lines = False
        if progress is True:
            console = Console(stderr=True)
            self._lines = not console.is_terminal
            if not self._lines:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=20),
                    TextColumn("{task.percentage:>3.0f}%"),
                    TextColumn("{task.fields[speed]}"),
                )
                self._bar = Progress(*columns, console=console, transient=True)
                self._task = self._bar.add_task("", total=n_rows, speed="")

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, stage: str, first_row: int = 0) -> None:
        """A pass begins, or goes on at ``first_row``."""
        self._stage, self._first_row = stage, first_row
        self._started = time.monotonic()

    def advance(self, rows: int) -> None:
        """``rows`` of the pass are done."""
        if self._tell is None and self._bar is None and not self._lines:
            return
        now = time.monotonic()
        speed = (rows - self._first_row) / max(now - self._started, 1e-9)
        left = (self._n_rows - rows) / speed if speed > 0 else None
        state = StreamProgress(
            self._stage, rows, self._n_rows, speed, speed * self._row_bytes, left
        )
        if self._tell is not None:
            self._tell(state)
        if self._bar is not None:
            text = f"{speed:,.0f} rows/s  {state.bytes_per_second / 1e6:,.0f} MB/s"
            if left:
                text += f"  {format_duration(left)} left"
            self._bar.update(self._task, description=self._stage, completed=rows, speed=text)
        if self._lines and (now - self._line_at >= _LINE_SECONDS or rows == self._n_rows):
            self._line_at = now
            remark(state)
