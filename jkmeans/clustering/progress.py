"""What a job says while it runs."""

from __future__ import annotations

import time

from jkmeans import processes

_LINE_SECONDS = 10.0


class Progress:
    """What the job does, on stderr: a line that is rewritten on a terminal, lines elsewhere."""

    def __init__(self):
        from rich.console import Console

        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self._line_at = -_LINE_SECONDS
        self._status = None
        self._console.quiet = not processes.is_first()
        if self._console.is_terminal and processes.is_first():
            self._status = self._console.status("")

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self._console.print(sentence)

    def update(self, sentence: str, often: bool = False) -> None:
        """Where the job is now; of what comes ``often``, a log gets a line now and then."""
        if self._status is None:
            now = time.monotonic()
            if not often or now - self._line_at >= _LINE_SECONDS:
                self._line_at = now
                self._console.print(sentence)
        else:
            from rich.text import Text

            self._status.update(Text(sentence))
