"""The parameter server: a shared version, and each displacement in it exactly once.

A plain class: threads of one process can share it (as the tests do), and `jkmeans.asynchronous.
engine` puts it into a Ray actor. How it keeps count:

- A worker numbers what it sends, 1, 2, …; the server remembers the last number it has applied of
  each worker. A number that comes again is answered and not applied again.
- A life of a worker, or of the server, begins with `enter`: the worker learns the shared version
  and where it stands according to the server, and goes on from there. What a former life sent and
  what was not applied before the server died is refused, and computed anew.
- A server that comes back has the version, the numbers and the positions of its checkpoint, which
  belong together: what was applied later is lost as a whole, and its samples are read again.

So clock = Σ of the workers' numbers, always.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jkmeans.asynchronous.journal import Journal
from jkmeans.asynchronous.rules import Rule, Tree
from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.errors import UserError
from jkmeans.workdir import CHECKPOINT_FOLDER

JOURNAL_FILE = "journal.bin"

FINISHED, STOPPED, DIVERGED = "finished", "stopped", "diverged"


class Reply(NamedTuple):
    """What a worker hears.

    Attributes:
      accepted: whether what it sent is in the shared version; where not, it enters again.
      ended: whether there is nothing more to do.
      shared: the shared version, NumPy arrays.
      clock: displacements applied to it.
      sequence: the worker's last number that is applied.
      position: samples of the worker's share that are in the shared version.
    """

    accepted: bool
    ended: bool
    shared: Tree
    clock: int
    sequence: int
    position: int


class Status(NamedTuple):
    """Where the server stands.

    Attributes:
      clock: displacements applied.
      samples: in the shared version, of all workers.
      ended: "" while it goes on; else FINISHED, STOPPED or DIVERGED.
      sequences: of each worker, its last number that is applied.
      positions: of each worker, its samples in the shared version.
      silent: of each worker, seconds since it was heard, or since the server began.
      life: of the server, from 1.
      process: id of the server's process.
      processes: ids of the workers' processes; 0 for one that has not entered in this life.
    """

    clock: int
    samples: int
    ended: str
    sequences: list[int]
    positions: list[int]
    silent: list[float]
    life: int
    process: int
    processes: list[int]


class ParameterServer:
    """A shared version that workers change.

    Args:
      shared: the first version, a pytree of arrays; a checkpoint in the folder takes precedence.
      rule: what is done with what workers send.
      folder: of the journal and the checkpoints; one server at a time.
      n_workers: M.
      budget: samples; the run ends when the shared version has them.
      interval: displacements that a kill may cost, at most; at least 2, or 2 M if synchronous.
      synchronous: whether workers wait for each other, and the mean of what they sent is applied.

    Raises:
      UserError: the folder cannot be used.
    """

    def __init__(
        self,
        shared: Tree,
        rule: Rule,
        folder: Path,
        *,
        n_workers: int,
        budget: int,
        interval: int,
        synchronous: bool = False,
    ):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._shared = jax.tree.map(jnp.asarray, shared)
        self._state = rule.init(self._shared)
        self._apply = jax.jit(_checked(rule))
        self._mean = jax.jit(_mean)
        self._budget = budget
        # At most so many displacements come between two checkpoints; a round is applied whole.
        self._half_interval = max(1, interval // 2)
        self._step = n_workers if synchronous else 1
        self._synchronous = synchronous
        self.sequences = [0] * n_workers
        self.positions = [0] * n_workers
        self._heard_at = [time.monotonic()] * n_workers
        self._lives: list[int | None] = [None] * n_workers
        self._processes = [0] * n_workers
        self._round: dict[int, tuple[int, Tree, int, int]] = {}
        self._ended = ""
        # Two: should the newest be damaged, the one before it is used.
        self._checkpoints = Checkpoints(folder / CHECKPOINT_FOLDER, keep=2)
        self._saved_clock = -1
        self._changed = threading.Condition()
        self._journal = Journal(folder / JOURNAL_FILE)  # First: it keeps a second server out.
        try:
            self._restore()
            self._journal.begin(self.sequences)
        except UserError:
            self._journal.close()
            raise
        if self._saved_clock < 0:
            self._save()
        with self._changed:
            self._end_if_spent()

    @property
    def clock(self) -> int:
        """Displacements applied to the shared version."""
        return sum(self.sequences)

    def enter(self, worker: int, life: int, process: int) -> Reply:
        """A life of a worker begins; what former lives still send is refused.

        Args:
          worker: its number, from 0.
          life: a number that no other life of this worker has.
          process: the id of its process, for people.
        """
        with self._changed:
            self._lives[worker] = life
            self._processes[worker] = process
            self._round.pop(worker, None)
            self._changed.notify_all()
            return self._reply(worker, accepted=True)

    def exchange(
        self, worker: int, life: int, sequence: int, sent: Tree, seen: int, position: int
    ) -> Reply:
        """Applies what a worker sends, once, and answers with the shared version.

        In the synchronous mode the answer waits for the other workers.

        Args:
          worker: its number.
          life: as it said to `enter`.
          sequence: the number of what it sends, one more than the last accepted.
          sent: a pytree like the shared version.
          seen: the clock of the version that the worker last received.
          position: samples of the worker's share that are in the shared version once this is
            applied.
        """
        with self._changed:
            self._heard_at[worker] = time.monotonic()
            if self._lives[worker] != life:
                return self._reply(worker, accepted=False)
            if sequence == self.sequences[worker] + 1 and not self._ended:
                if self._synchronous:
                    self._join_round(worker, life, sequence, sent, seen, position)
                else:
                    self._apply_all({worker: (sequence, sent, seen, position)})
            return self._reply(worker, accepted=self.sequences[worker] >= sequence)

    def snapshot(self) -> tuple[Tree, Status]:
        """The shared version, NumPy arrays, and where it stands."""
        with self._changed:
            return self._host_shared(), self.status()

    def status(self) -> Status:
        """Where the server stands."""
        now = time.monotonic()
        with self._changed:
            return Status(
                clock=self.clock,
                samples=sum(self.positions),
                ended=self._ended,
                sequences=list(self.sequences),
                positions=list(self.positions),
                silent=[now - heard for heard in self._heard_at],
                life=self._journal.life,
                process=os.getpid(),
                processes=list(self._processes),
            )

    def stop(self) -> None:
        """Ends the run before its budget is spent; everything applied is saved."""
        with self._changed:
            self._end(self._ended or STOPPED)

    def close(self) -> None:
        """Ends background writes and closes files."""
        with self._changed:
            self._checkpoints.__exit__(None, None, None)
            self._journal.close()

    def _join_round(self, worker: int, life: int, sequence: int, sent, seen, position) -> None:
        self._round[worker] = (sequence, sent, seen, position)
        if len(self._round) == len(self.sequences):
            self._apply_all(self._round)
            self._round = {}
            self._changed.notify_all()
            return
        # Woken when the round is complete, the run ends, or another life of the worker takes over.
        self._changed.wait_for(
            lambda: self.sequences[worker] >= sequence or self._ended or self._lives[worker] != life
        )

    def _apply_all(self, given: dict[int, tuple[int, Tree, int, int]]) -> None:
        """Applies what one worker sent; or the mean of what all did, in the order of workers."""
        before = self.clock
        trees = [given[worker][1] for worker in sorted(given)]
        sent = trees[0] if len(trees) == 1 else self._mean(trees)
        shared, state, finite = self._apply(self._shared, self._state, sent)
        if not finite:
            self._end(DIVERGED)
            return
        records = []
        for n, worker in enumerate(sorted(given), 1):
            sequence, _, seen, position = given[worker]
            # Those of a round see the same version, and are applied at once.
            seen = seen if len(given) == 1 else before + n - 1
            records.append((worker, sequence, before + n, seen, position - self.positions[worker]))
        self._journal.applied(records)
        self._shared, self._state = shared, state
        for worker, (sequence, _, _, position) in given.items():
            self.sequences[worker], self.positions[worker] = sequence, position
        if self.clock + self._step - self._saved_clock > self._half_interval:
            self._save()
        self._end_if_spent()

    def _end_if_spent(self) -> None:
        if not self._ended and sum(self.positions) >= self._budget:
            self._end(FINISHED)

    def _end(self, reason: str) -> None:
        """What a worker is told about the end is on the disk before."""
        self._save()
        self._checkpoints.wait()
        self._ended = reason
        self._changed.notify_all()

    def _reply(self, worker: int, accepted: bool) -> Reply:
        self._heard_at[worker] = time.monotonic()
        return Reply(
            accepted=accepted,
            ended=bool(self._ended),
            shared=self._host_shared(),
            clock=self.clock,
            sequence=self.sequences[worker],
            position=self.positions[worker],
        )

    def _host_shared(self) -> Tree:
        return jax.tree.map(np.asarray, self._shared)

    def _save(self) -> None:
        """Starts to write a checkpoint, once the one before is complete.

        As one begins every half interval, the newest complete one is never older than an interval.
        """
        if self.clock == self._saved_clock:
            return
        record = {"sequences": self.sequences, "positions": self.positions}
        trees = {"model": self._shared}
        if jax.tree.leaves(self._state):
            trees["training"] = self._state
        if self._saved_clock >= 0:
            self._journal.flush()
        self._checkpoints.save(self.clock, trees, record, None)
        self._saved_clock = self.clock

    def _restore(self) -> None:
        """Takes the newest whole checkpoint, if there is one."""
        trees: dict[str, Any] = {"model": self._shared}
        if jax.tree.leaves(self._state):
            trees["training"] = self._state
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), trees
        )
        for position in reversed(self._checkpoints.positions()):
            try:
                restored = self._checkpoints.load(position, abstract)
            except DamagedError as error:
                aside = self._checkpoints.set_aside(position)
                print(f"{error}; it is now {aside.name}", flush=True)
                continue
            if len(restored.record["sequences"]) != len(self.sequences):
                raise UserError(
                    f"checkpoint {self._checkpoints.folder / str(position)} is of "
                    f"{len(restored.record['sequences'])} workers, not {len(self.sequences)}; "
                    "accepted: as many as before, or another folder"
                )
            self._shared = restored.trees["model"]
            self._state = restored.trees.get("training", self._state)
            self.sequences = list(restored.record["sequences"])
            self.positions = list(restored.record["positions"])
            self._saved_clock = self.clock
            return


def _checked(rule: Rule):
    """The rule, and whether the version that it makes is finite."""

    def apply(shared: Tree, state: Tree, sent: Tree):
        shared, state = rule.apply(shared, state, sent)
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(shared)])
        return shared, state, jnp.all(finite)

    return apply


def _mean(trees: list[Tree]) -> Tree:
    total = trees[0]
    for tree in trees[1:]:
        total = jax.tree.map(jnp.add, total, tree)
    return jax.tree.map(lambda leaf: leaf / len(trees), total)
