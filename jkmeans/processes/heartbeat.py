"""Signs of life: a process touches a file, and whoever started it looks at the file's time.

A thread does it, so that a long computation is no silence. A process that is stopped (SIGSTOP, a
frozen container) or that the machine no longer runs falls silent. Nothing here imports JAX.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

VARIABLE = "JKMEANS_HEARTBEAT"
"""Environment variable that names the file."""
PERIOD_SECONDS = 0.5
_AT_WORK = b"at work\n"


_path: Path | None = None
"""Where this process beats; None where nobody listens."""


def start() -> None:
    """Begins to beat, where somebody listens; a parent that dies ends this process, too."""
    global _path
    path = os.environ.pop(VARIABLE, "")  # Not for the processes that this one starts.
    if path:
        _path = Path(path)
        parent = os.getppid()
        threading.Thread(target=_beat, args=(_path, parent), daemon=True).start()


def at_work() -> None:
    """Tells whoever listens that the start is over: everything is compiled, and work is done."""
    if _path is not None and not is_at_work(_path):
        with contextlib.suppress(OSError):  # A full disk is no reason to stop.
            _path.write_bytes(_AT_WORK)


def _beat(path: Path, parent: int) -> None:
    path.touch()
    orphaned = False
    while True:
        with contextlib.suppress(OSError):
            os.utime(path)
        if os.getppid() != parent and not orphaned:
            # Nobody is left to start the others again: save and leave, as on any SIGTERM.
            orphaned = True
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PERIOD_SECONDS)


def end() -> None:
    """Ends this process with status 0, where somebody listens: its last work is no silence."""
    if _path is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def silence(path: Path) -> float | None:
    """Seconds since the last sign of life; None before the first."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def is_at_work(path: Path) -> bool:
    """Whether a process has said so."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
