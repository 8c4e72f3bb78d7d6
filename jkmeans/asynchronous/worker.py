"""The loop of a worker: it computes while what it has sent is under way."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from jkmeans.asynchronous.rules import Tree
from jkmeans.asynchronous.server import Reply
from jkmeans.asynchronous.work import Work

Read = Callable[[int, int], Any]
"""(position, n) -> the samples position … position + n - 1 of a worker's share, a pytree."""


class Pending(Protocol):
    """An exchange under way."""

    def done(self) -> bool:
        """Whether the answer is there."""
        ...

    def result(self) -> Reply:
        """The answer, which is waited for."""
        ...


class Port(Protocol):
    """A worker's way to the server."""

    def enter(self, worker: int, life: int, process: int) -> Reply:
        """See `ParameterServer.enter`."""
        ...

    def exchange(
        self, worker: int, life: int, sequence: int, sent: Tree, seen: int, position: int
    ) -> Pending:
        """Begins what `ParameterServer.exchange` does."""
        ...


def work_on(worker: int, port: Port, work: Work, read: Read, *, tau: int, ahead: int) -> None:
    """Works until the server says that the run has ended.

    Every τ samples the worker looks whether its exchange has ended; if so it takes the shared
    version in, and sends what it has done since that upload began. At most one exchange is under
    way.

    Args:
      worker: its number, from 0.
      port: to the server.
      work: what it computes.
      read: its samples.
      tau: τ, samples between two looks.
      ahead: how many times τ samples it computes while an exchange is under way, at most; then it
        waits. 0: nothing is computed meanwhile.
    """
    life, process = secrets.randbits(62), os.getpid()
    pending: Pending | None = None
    entry = port.enter(worker, life, process)
    ended = entry.ended
    local, sequence, position, clock = _stand(work, entry)
    seen, unsent = clock, 0
    while not ended:
        if pending is not None and (unsent >= ahead or pending.done()):
            reply = pending.result()
            pending, ended = None, reply.ended
            if reply.accepted:
                local, clock = work.receive(local, reply.shared), reply.clock
                if work.carries_over or not unsent:
                    seen = clock
            elif not ended:
                # The server has come back from its checkpoint, or another life of this worker was
                # there: what is not in the shared version is computed anew.
                entry = port.enter(worker, life, process)
                ended = entry.ended
                local, sequence, position, clock = _stand(work, entry)
                seen, unsent = clock, 0
        elif pending is None and unsent > 0:
            sent, local = work.take(local)
            sequence += 1
            sent = jax.tree.map(np.asarray, sent)
            pending = port.exchange(worker, life, sequence, sent, seen, position)
            seen, unsent = clock, 0
        else:
            local = work.advance(local, read(position, tau), np.int32(position))
            jax.block_until_ready(local)
            position += tau
            unsent += 1


def _stand(work: Work, entry: Reply) -> tuple[Any, int, int, int]:
    return work.start(entry.shared), entry.sequence, entry.position, entry.clock
