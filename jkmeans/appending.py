"""A file that records are appended to: one writer, each record whole, kept through a kill."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from jkmeans.errors import UserError

_PATIENCE_SECONDS = 10


class Appender:
    """Appends to a file; what is appended is handed to the operating system at once.

    So it survives the SIGKILL of the process, and with `flush` a power failure.

    Args:
      path: of the file; made if missing.
      whole: of the bytes there, how many are whole records; the rest, which a kill has cut, is
        removed.

    Raises:
      UserError: it cannot be written; or another process still writes it after ten seconds.
    """

    def __init__(self, path: Path, whole: Callable[[bytes], int]):
        self.path = Path(path)
        with _disk(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for a life
            _lock(self._file, self.path)
            content = self.path.read_bytes()
            n = whole(content)
            if n < len(content):
                self._file.truncate(n)

    def append(self, content: bytes) -> None:
        """Appends all of it, or nothing.

        Raises:
          UserError: the disk is full, or fails.
        """
        with _disk(self.path):
            written = self._file.write(content)
            if written != len(content):  # The disk is full: nothing of it is there.
                self._file.truncate(os.path.getsize(self.path) - (written or 0))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, and with that lets another process write it."""
        self._file.close()


def _lock(file: IO[bytes], path: Path) -> None:
    """Two never write together: one that was given up may take a moment to die."""
    import fcntl

    for _ in range(int(_PATIENCE_SECONDS / 0.1)):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)
    raise UserError(f"another process writes {path}; accepted: another folder, or wait")


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the journal {path}: {error.strerror}; accepted: a folder with room "
            "that can be written to"
        ) from error
