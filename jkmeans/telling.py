"""Lines for the user, of which a program that calls the house can collect the warnings instead."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator

from jkmeans import processes

# Of the thread, not of the process as sys.stdout is: others may be printing.
_collected = contextvars.ContextVar[list[str] | None]("collected", default=None)


def tell(text: str) -> None:
    """Prints a line, once for all processes; nothing inside `warnings_collected`."""
    if _collected.get() is None and processes.is_first():
        print(text, flush=True)


def remark(text: object) -> None:
    """A line on stderr, at once: of how far the work is, or of what happened on the way."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str, *, of_this_process: bool = False) -> None:
    """Prints a warning, or collects it inside `warnings_collected`.

    Args:
      text: of one line.
      of_this_process: whether others may have nothing to warn of. Otherwise all of them call, and
        it is printed once.
    """
    collected = _collected.get()
    if collected is not None:
        collected.append(text)
    elif of_this_process or processes.is_first():
        print(f"warning: {text}", flush=True)


@contextlib.contextmanager
def warnings_collected() -> Iterator[list[str]]:
    """What this thread is told inside is not printed; the list gets its warnings."""
    collected: list[str] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
