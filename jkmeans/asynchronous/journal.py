"""The server's journal: one record for each displacement, written before it is applied.

It survives the SIGKILL of the server, which its memory does not. So it knows exactly what a server
that comes back from its checkpoint has lost, what the staleness was, and whether each displacement
of the version that is left was counted once.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jkmeans.appending import Appender
from jkmeans.errors import UserError

RECORD = np.dtype(
    [
        ("worker", "<i4"),  # -1: a life of the server begins, at ``clock``
        ("life", "<u4"),  # of the server, from 1
        ("sequence", "<i8"),  # number of the displacement among those of its worker, from 1
        ("clock", "<i8"),  # displacements applied, this one included
        ("seen", "<i8"),  # the clock of the version that the worker had last received
        ("samples", "<i8"),  # of this displacement
        ("time", "<f8"),  # seconds since the epoch
    ]
)
_SIZE = RECORD.itemsize
_BEGINS = -1


class History(NamedTuple):
    """What a journal says.

    Attributes:
      applied: [clock] of RECORD, the displacements in the version that is left, in order.
      rolled_back: for each life of the server, how many displacements that had been applied its
        checkpoint did not have: 0 for the first.
    """

    applied: np.ndarray
    rolled_back: list[int]

    @property
    def staleness(self) -> np.ndarray:
        """[clock] int, displacements applied between the version seen and the application."""
        return self.applied["clock"] - 1 - self.applied["seen"]

    def miscount(self, sequences: list[int]) -> str:
        """What keeps the first displacements from being 1, 2, … of every worker, each once.

        Args:
          sequences: of each worker, how many of its displacements are among them.

        Returns:
          What is wrong, in words; nothing where nothing is.
        """
        n = sum(sequences)
        first = self.applied[:n]
        if not np.array_equal(first["clock"], np.arange(1, n + 1)):
            return f"it does not count {n:,} displacements from 1 on"
        for worker, last in enumerate(sequences):
            own = first["sequence"][first["worker"] == worker]
            if not np.array_equal(own, np.arange(1, last + 1)):
                return f"of worker {worker} displacements 1 to {last:,} are not there once"
        return ""

    def check_counted_once(self, sequences: list[int]) -> None:
        """Asserts that the version left has displacements 1, 2, … of every worker, each once.

        Args:
          sequences: of each worker, how many the server says it has applied.

        Raises:
          RuntimeError: it has not, which is a defect of the program.
        """
        wrong = self.miscount(sequences)
        if not wrong and len(self.applied) > sum(sequences):
            wrong = f"it counts {len(self.applied):,} displacements, not {sum(sequences):,}"
        if wrong:
            raise RuntimeError(f"the journal is wrong: {wrong}")


class Journal:
    """Appends records to a file; each is handed to the operating system at once.

    Args:
      path: of the file; made if missing.

    Raises:
      UserError: it cannot be written; or another server still writes it after ten seconds.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._file = Appender(self.path, lambda content: len(content) - len(content) % _SIZE)
        self.life = 0

    def begin(self, sequences: list[int]) -> None:
        """A life of the server begins with so many displacements of each worker applied.

        Raises:
          UserError: they are not all in the journal, which was damaged.
        """
        history = read_history(self.path)
        if wrong := history.miscount(sequences):
            raise UserError(
                f"{self.path} is damaged: {wrong}, as the checkpoint does; accepted: the file as "
                "it was written, or another folder"
            )
        clock = sum(sequences)
        self.life = len(history.rolled_back) + 1
        self._append([(_BEGINS, self.life, 0, clock, clock, 0, time.time())])

    def applied(self, displacements: list[tuple[int, int, int, int, int]]) -> None:
        """Displacements are applied, together: each its worker, sequence, clock, seen, samples."""
        self._append(
            [
                (worker, self.life, sequence, clock, seen, samples, time.time())
                for worker, sequence, clock, seen, samples in displacements
            ]
        )

    def flush(self) -> None:
        """Waits until all records are on the disk: they survive a power failure too."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, records: list[tuple]) -> None:
        self._file.append(np.array(records, RECORD).tobytes())


def read_history(path: Path) -> History:
    """What a journal says; one that is missing says nothing."""
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    records = np.frombuffer(content[: len(content) // _SIZE * _SIZE], RECORD)
    starts = np.flatnonzero(records["worker"] == _BEGINS)
    left = records[:0]
    rolled_back = []
    for start, end in itertools.pairwise([*starts, len(records)]):
        kept = left[left["clock"] <= records[start]["clock"]]
        rolled_back.append(len(left) - len(kept))
        left = np.concatenate([kept, records[start + 1 : end]])
    return History(left, rolled_back)
