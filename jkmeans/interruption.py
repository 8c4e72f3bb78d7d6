"""Ctrl-C and SIGTERM: a wish to stop that the loop hears at its next safe place."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from jkmeans import processes
from jkmeans.processes import heartbeat


class Interrupted(Exception):
    """A run stopped because it was asked to; everything is saved.

    Attributes:
      exit_status: 128 and the number of the signal, as shells have it.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Interruption:
    """Hears SIGINT and SIGTERM while it is entered; the second one ends the process at once.

    With several processes a signal to one of them is a wish of all, which they agree on with
    `agreed` where each has done the same work.

    Attributes:
      requested: whether a signal came to this process, or they agreed that one came to another.
    """

    def __init__(self):
        self.requested = False
        self._number = 0
        self._announced = True
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_IGN, None):
                continue  # Ignored by whoever started us (nohup), or handled outside Python.
            try:
                self._before[number] = signal.signal(number, self._hear)
            except ValueError:  # Not the main thread: signals are somebody else's business.
                break
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _hear(self, number: int, frame) -> None:
        del frame
        if self.requested:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # The cursor, which a progress bar hides.
            # Checkpoints appear under their names only when complete, so nothing breaks.
            os._exit(128 + number)
        self.requested = True
        self._number = number
        self._announced = False

    def agreed(self) -> bool:
        """Whether a signal came to any of the processes; all of them ask at the same place.

        Whoever has come to a place where it could stop is at work, and a supervisor is told so.
        """
        heartbeat.at_work()
        numbers = processes.gather(self._number)
        if any(numbers) and not self.requested:
            self.requested, self._number = True, next(n for n in numbers if n)
        return self.requested

    def announced(self) -> bool:
        """True once after a signal, for whoever tells the user."""
        news = not self._announced
        self._announced = True
        return news

    def leave(self) -> None:
        """Raises `Interrupted`."""
        raise Interrupted(self._number)


def listen_until_ready(
    leaves: Iterable[Any],
    interruption: Interruption,
    on_signal: Callable[[], object],
    while_long: Callable[[], object] = lambda: None,
) -> None:
    """Waits for arrays with an open ear for signals, which a blocking call has not.

    Args:
      leaves: JAX arrays.
      interruption: entered.
      on_signal: called once a signal has come; the second one ends the process.
      while_long: called every now and then, at most twenty times a second.
    """
    leaves = list(leaves)
    started = told = time.monotonic()
    while not all(leaf.is_ready() for leaf in leaves):
        now = time.monotonic()
        # Waiting takes 2 % longer at most, or half a millisecond.
        time.sleep(min(max((now - started) / 50, 0.0005), 0.05))
        if now - told >= 0.05:
            told = now
            while_long()
        if interruption.announced():
            on_signal()
