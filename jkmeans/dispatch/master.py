"""The master: it hands shards of files to workers, and every shard is written once.

A plain class without threads or a clock of its own, so that a test can let anything happen in any
order. `jkmeans.dispatch.engine` puts it into a Ray actor. How each row comes to be written exactly
once:

- A worker gets a shard on a lease. It renews the lease while it computes; one that it does not
  renew lapses, and the shard goes to whoever asks next. The lease of a worker that is known to be
  dead is taken back at once.
- A worker writes its result under a name that no other uses, and reports it. The first report of a
  shard is kept: its file is renamed to the name of the shard, and a line goes to the journal. Any
  later one is refused, and its worker removes its file.
- A master that comes back reads in the journal what is done. It knows nothing of leases, and learns
  of those that are alive when they are renewed. A shard whose file was renamed but not yet in the
  journal is simply done again.

Results are the same bits whoever computes them (`jkmeans.blocks`), so it does not matter whose are
kept; the master compares checksums all the same, and counts where they differ.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

MOST_DEATHS = 10
"""Workers that may die on one shard, before it is given up as the cause."""

_WAIT_SECONDS = 0.25
# A second worker gets a shard that is under way for longer than so many times the usual.
_SLOW = 1.5
_SLOW_SECONDS = 1.0
_DURATIONS = 200


class Shard(NamedTuple):
    """Some rows of a file.

    Attributes:
      file: its name within the input.
      start: the first row.
      stop: the row after the last.
    """

    file: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"rows {self.start:,} to {self.stop - 1:,} of {self.file}"


class Part(NamedTuple):
    """The result of a shard, in a file.

    Attributes:
      attempt: the name that its worker wrote it under; no other attempt has it.
      rows: in it.
      bytes: of the file.
      sha256: of its content.
      worker: who wrote it.
    """

    attempt: str
    rows: int
    bytes: int
    sha256: str
    worker: str


class Lease(NamedTuple):
    """A shard that was given to a worker.

    Attributes:
      number: no other lease has it, of whichever life of the master.
      shard: what is to be computed.
    """

    number: int
    shard: Shard


class Answer(NamedTuple):
    """What a worker hears when it asks for work.

    Attributes:
      lease: what to compute; None for nothing now.
      wait: seconds until it may ask again.
      ended: whether there will be nothing more.
    """

    lease: Lease | None
    wait: float
    ended: bool


class Process(NamedTuple):
    """Where a worker runs.

    Attributes:
      host: its name.
      pid: of the process.
    """

    host: str
    pid: int


class Status(NamedTuple):
    """Where the work stands.

    Attributes:
      life: of the master, from 1.
      process: of the master.
      ended: whether nothing is left to do, or no more is given out.
      shards: how many there are, those of failed files included.
      shards_done: kept.
      rows: of all shards.
      rows_done: kept.
      failed: reason by file.
      workers: those that have come and not left, with their processes.
      running: workers with a lease.
      silent: of each worker that this life of the master has heard, the seconds since.
      lapsed: leases that were not renewed in time.
      copies: shards that a second worker was given because the first was slow.
      twice: results refused because the shard was done.
      different: of these, how many had other bits.
    """

    life: int
    process: Process
    ended: bool
    shards: int
    shards_done: int
    rows: int
    rows_done: int
    failed: dict[str, str]
    workers: dict[str, Process]
    running: list[str]
    silent: dict[str, float]
    lapsed: int
    copies: int
    twice: int
    different: int


class Store(Protocol):
    """Where parts are kept, and what survives the master."""

    def begin(self) -> int:
        """A life of the master begins; its number, from 1."""
        ...

    def kept(self, shards: Iterable[Shard]) -> dict[Shard, Part]:
        """Which of the shards are done."""
        ...

    def keep(self, shard: Shard, part: Part) -> bool:
        """Gives a part the name of its shard and notes it; False where the part is not there."""
        ...


class _Held(NamedTuple):
    lease: Lease
    worker: str
    since: float
    deadline: float


class Master:
    """Hands out shards until all are done.

    Args:
      shards: in the order in which they are handed out.
      store: of the parts.
      now: the clock, in seconds.
      process: where the master runs.
      lease_seconds: after which a lease that was not renewed lapses.
      unreadable: reason by file, of files that could not even be opened.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        store: Store,
        *,
        now: Callable[[], float],
        process: Process,
        lease_seconds: float,
        unreadable: Mapping[str, str] | None = None,
    ):
        self._shards = list(dict.fromkeys(shards))
        self._store, self._now, self._process = store, now, process
        self._lease_seconds = lease_seconds
        self._life = store.begin()
        self._done = store.kept(self._shards)
        self._failed = dict(unreadable or {})
        self._queue = deque(s for s in self._shards if s not in self._done)
        self._known = set(self._shards)
        self._held: dict[int, _Held] = {}
        self._given = 0
        self._workers: dict[str, Process] = {}
        self._gone: set[str] = set()
        self._heard: dict[str, float] = {}
        self._deaths: Counter[Shard] = Counter()
        self._seconds_per_row: deque[float] = deque(maxlen=_DURATIONS)
        self._stopped = False
        self._lapsed = self._copies = self._twice = self._different = 0
        self._rows = sum(map(_rows, self._shards))
        self._rows_done = sum(map(_rows, self._done))

    # What workers say

    def enter(self, worker: str, process: Process) -> None:
        """A worker is there."""
        self._workers[worker] = process

    def ask(self, worker: str, process: Process | None = None) -> Answer:
        """A worker wants a shard, and says where it runs.

        One that asks again, because it heard no answer, hears the same. When all shards are given
        out, the one that is under way for longest goes to a second worker, if it takes longer than
        is usual.
        """
        self._lapse()
        self._hear(worker)
        if process is not None and worker not in self._gone:
            self._workers[worker] = process  # A master that has come back does not know.
        if self._over() or worker in self._gone:
            return Answer(None, 0.0, True)
        for held in self._held.values():
            if held.worker == worker:
                return Answer(held.lease, 0.0, False)
        shard = self._next()
        if shard is None:
            shard = self._slowest()
            self._copies += shard is not None
        if shard is None:
            return Answer(None, _WAIT_SECONDS, False)
        self._given += 1
        lease = Lease(self._life * 2**32 + self._given, shard)
        self._hold(lease, worker)
        return Answer(lease, 0.0, False)

    def renew(self, worker: str, lease: Lease) -> bool:
        """A worker is still at it; whether it should go on.

        A lease that has lapsed, or that a former life of the master gave, is taken up again unless
        two others have its shard by now.
        """
        self._lapse()
        self._hear(worker)
        if self._over() or not self._open(lease.shard):
            self._held.pop(lease.number, None)
            return False
        held = self._held.get(lease.number)
        if held is None and len(self._holders(lease.shard)) >= 2:
            return False
        self._hold(lease, worker, since=None if held is None else held.since)
        return True

    def done(self, worker: str, lease: Lease, part: Part) -> bool:
        """A worker has written a part; whether it was kept. If not, the worker removes it."""
        self._hear(worker)
        shard = lease.shard
        held = self._held.pop(lease.number, None)
        there = self._done.get(shard)
        if there is not None:
            if there.attempt == part.attempt:
                return True  # Said before, to a master that died before it could answer.
            self._twice += 1
            self._different += there.sha256 != part.sha256
            return False
        if not self._open(shard) or not self._store.keep(shard, part):
            self._requeue(shard)
            return False
        self._done[shard] = part
        self._rows_done += _rows(shard)
        if held is not None:
            self._seconds_per_row.append((self._now() - held.since) / _rows(shard))
        for number in self._holders(shard):
            del self._held[number]
        return True

    def failed(self, worker: str, lease: Lease, reason: str) -> None:
        """A worker cannot read a file, or cannot use what is in it: its other rows are not done."""
        self._hear(worker)
        if self._open(lease.shard):
            self._give_up(lease.shard.file, reason)
        self._held.pop(lease.number, None)

    def leave(self, worker: str, dead: bool) -> None:
        """A worker is gone; what it had goes to the next one."""
        self._workers.pop(worker, None)
        self._heard.pop(worker, None)
        self._gone.add(worker)  # What it still says on its way out is not to be waited for.
        for number, held in [*self._held.items()]:
            if held.worker != worker:
                continue
            shard = held.lease.shard
            del self._held[number]
            self._deaths[shard] += dead
            if self._deaths[shard] >= MOST_DEATHS:
                self._give_up(shard.file, f"{MOST_DEATHS} workers died while they computed {shard}")
            self._requeue(shard)

    # What the one who watches asks

    def stop(self) -> None:
        """Nothing more is given out."""
        self._stopped = True

    def status(self) -> Status:
        """Where the work stands."""
        self._lapse()
        now = self._now()
        return Status(
            life=self._life,
            process=self._process,
            ended=self._over(),
            shards=len(self._shards),
            shards_done=len(self._done),
            rows=self._rows,
            rows_done=self._rows_done,
            failed=dict(self._failed),
            workers=dict(self._workers),
            running=sorted({held.worker for held in self._held.values()}),
            silent={worker: now - heard for worker, heard in self._heard.items()},
            lapsed=self._lapsed,
            copies=self._copies,
            twice=self._twice,
            different=self._different,
        )

    def _hear(self, worker: str) -> None:
        if worker not in self._gone:
            self._heard[worker] = self._now()

    def _over(self) -> bool:
        if self._stopped or self._held:
            return self._stopped
        while self._queue and not self._open(self._queue[0]):
            self._queue.popleft()
        return not self._queue

    def _open(self, shard: Shard) -> bool:
        """Whether it is still to be done."""
        known = shard in self._known and shard not in self._done
        return known and shard.file not in self._failed

    def _next(self) -> Shard | None:
        """The next shard that nobody has; it is no longer in the queue."""
        while self._queue:
            shard = self._queue.popleft()
            if self._open(shard) and not self._holders(shard):
                return shard
        return None

    def _slowest(self) -> Shard | None:
        """The shard that one worker has for longest, if that is longer than is usual."""
        if not self._seconds_per_row:
            return None
        usual = statistics.median(self._seconds_per_row)
        now = self._now()
        slow = [
            held
            for held in self._held.values()
            if now - held.since > max(_SLOW_SECONDS, _SLOW * usual * _rows(held.lease.shard))
            and len(self._holders(held.lease.shard)) == 1
        ]
        return min(slow, key=lambda held: held.since).lease.shard if slow else None

    def _holders(self, shard: Shard) -> list[int]:
        """Numbers of the leases of a shard; few are held at a time."""
        return [number for number, held in self._held.items() if held.lease.shard == shard]

    def _hold(self, lease: Lease, worker: str, since: float | None = None) -> None:
        now = self._now()
        deadline = now + self._lease_seconds
        self._held[lease.number] = _Held(lease, worker, now if since is None else since, deadline)

    def _lapse(self) -> None:
        now = self._now()
        for number in [n for n, held in self._held.items() if held.deadline < now]:
            held = self._held.pop(number)
            self._lapsed += 1
            self._requeue(held.lease.shard)

    def _requeue(self, shard: Shard) -> None:
        """To the front, unless it is done or somebody else has it."""
        if self._open(shard) and not self._holders(shard):
            self._queue.appendleft(shard)

    def _give_up(self, file: str, reason: str) -> None:
        self._failed[file] = reason
        for number in [n for n, held in self._held.items() if held.lease.shard.file == file]:
            del self._held[number]


def _rows(shard: Shard) -> int:
    return shard.stop - shard.start
