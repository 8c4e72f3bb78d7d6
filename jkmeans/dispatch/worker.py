"""The loop of a worker: ask for a shard, compute it, write it, say so."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from jkmeans.dispatch.inputs import Reader
from jkmeans.dispatch.master import Answer, Lease, Part
from jkmeans.dispatch.models import Predictor
from jkmeans.dispatch.output import discard_part, write_part
from jkmeans.errors import UserError


class Port(Protocol):
    """A worker's way to the master; see `jkmeans.dispatch.master.Master`."""

    def ask(self, worker: str) -> Answer:
        """Wants a shard."""
        ...

    def renew(self, worker: str, lease: Lease) -> bool:
        """Says that it is still at it; whether it should go on, as far as is known."""
        ...

    def done(self, worker: str, lease: Lease, part: Part) -> bool:
        """Reports a part; whether it was kept."""
        ...

    def failed(self, worker: str, lease: Lease, reason: str) -> None:
        """Reports a file that cannot be used."""
        ...


class _UnwantedError(Exception):
    """Somebody else was quicker, or the run ends."""


def work_on(
    worker: str,
    port: Port,
    predictor: Predictor,
    reader: Reader,
    folder: Path,
    *,
    renew_seconds: float,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Works until the master says that there is nothing more.

    Args:
      worker: its name.
      port: to the master.
      predictor: computes.
      reader: of the files.
      folder: of the output.
      renew_seconds: between two renewals of a lease.
      between: called between blocks of rows, and after each shard.

    Raises:
      UserError: the output cannot be written.
    """
    while True:
        answer = port.ask(worker)
        if answer.ended:
            return
        if answer.lease is None:
            time.sleep(answer.wait)
            continue
        lease = answer.lease
        try:
            columns = _compute(worker, port, predictor, reader, lease, renew_seconds, between)
        except _UnwantedError:
            continue
        except UserError as error:
            port.failed(worker, lease, str(error))
            continue
        part = write_part(folder, lease.shard, columns, worker)
        if not port.done(worker, lease, part):
            discard_part(folder, part.attempt)
        between()


def _compute(
    worker: str,
    port: Port,
    predictor: Predictor,
    reader: Reader,
    lease: Lease,
    renew_seconds: float,
    between: Callable[[], object],
) -> dict[str, np.ndarray]:
    renewed = time.monotonic()

    def tell(n_done: int) -> None:
        nonlocal renewed
        del n_done
        between()
        if time.monotonic() - renewed > renew_seconds:
            renewed = time.monotonic()
            if not port.renew(worker, lease):
                raise _UnwantedError

    rows = reader.read(lease.shard)
    tell(0)
    return predictor.compute(rows, tell)
