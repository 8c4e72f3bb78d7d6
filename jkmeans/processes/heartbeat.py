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
PARENT = "JKMEANS_SUPERVISOR"
"""Environment variable with the number of the process that listens."""
PERIOD_SECONDS = 0.5
ORPHAN_SECONDS = 5.0
"""How long an orphan that has nothing to save yet may take to leave."""
_AT_WORK = b"at work\n"


_path: Path | None = None
"""Where this process beats; None where nobody listens."""
_at_work_said = False


def start() -> None:
    """Begins to beat, where somebody listens; a parent that dies ends this process, too."""
    global _path
    # Not for the processes that this one starts.
    path, supervisor = os.environ.pop(VARIABLE, ""), os.environ.pop(PARENT, "")
    if path:
        _path = Path(path)
        parent = os.getppid()
        # It may have died before this process could look.
        orphaned = supervisor.isdecimal() and not _lives(int(supervisor))
        threading.Thread(target=_beat, args=(_path, parent, orphaned), daemon=True).start()


def at_work() -> None:
    """Tells whoever listens that the start is over: everything is compiled, and work is done."""
    global _at_work_said
    if _path is not None and not _at_work_said:
        _at_work_said = True
        with contextlib.suppress(OSError):  # A full disk is no reason to stop.
            _path.write_bytes(_AT_WORK)


def _beat(path: Path, parent: int, orphaned: bool) -> None:
    while not (orphaned or os.getppid() != parent):
        with contextlib.suppress(OSError):  # A full disk is no reason to stop.
            path.touch()
        time.sleep(PERIOD_SECONDS)
    # Nobody is left to start the others again: save and leave, as on any SIGTERM.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    # The start may be deaf to it, for minutes, in a compilation or a wait for the others.
    if not _at_work_said:
        os._exit(128 + signal.SIGTERM)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end() -> None:
    """Ends this process with status 0, where somebody listens: its last work is no silence."""
    if _path is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Listener:
    """Hears the signs of life of a process.

    Silence is what the listener's own clock says: one that stands still with the machine, and that
    nobody sets.

    Args:
      path: of the file that it beats on.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._last: int | None = None
        self._heard_at = 0.0

    def silence(self) -> float:
        """Seconds since the last sign of life; 0 before the first."""
        with contextlib.suppress(OSError):
            last = self._path.stat().st_mtime_ns
            if last != self._last:
                self._last, self._heard_at = last, time.monotonic()
        return 0.0 if self._last is None else time.monotonic() - self._heard_at

    def is_at_work(self) -> bool:
        """Whether the process has said so."""
        with contextlib.suppress(OSError):
            return self._path.stat().st_size > 0
        return False

    def end(self) -> None:
        """Removes what is left of it."""
        self._path.unlink(missing_ok=True)
