"""Master and workers as Ray actors: started, watched, replaced, ended.

Why each row is written once is told in `jkmeans.dispatch.master`. The master is an actor that Ray
brings back; it then begins from its journal. A worker that dies is not brought back: its shard goes
to the others at once, and another worker takes its place. As the cluster gets larger or smaller, so
does the number of workers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jkmeans import ray_session
from jkmeans.dispatch.inputs import InputFile, Reader
from jkmeans.dispatch.master import Answer, Lease, Master, Part, Process, Shard, Status
from jkmeans.dispatch.models import load_predictor
from jkmeans.dispatch.output import PartStore
from jkmeans.dispatch.worker import work_on
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption

ADDRESS_OPTION = "--address"

_TICK_SECONDS = 0.2
_COUNT_SECONDS = 2.0
_SILENT_SECONDS = 30.0
_PATIENCE_SECONDS = 10.0
# A worker that is silent for so many leases is killed; it may be computing a very long block.
_HANGING_LEASES = 3
# So many workers in a row that die before any has done a shard: something is wrong with all.
_MOST_STILLBORN = 5


class Options(NamedTuple):
    """How workers are run.

    Attributes:
      address: ``local`` for a cluster that begins and ends with the run; ``auto`` or host:port for
        one that is there.
      workers: how many; 0 for as many as the cluster has CPUs, or GPUs, at any time.
      gpus_per_worker: below 1 they are shared; 0 for the CPU; negative for one where there are any.
      lease_seconds: after which a worker that says nothing loses its shard.
    """

    address: str = "local"
    workers: int = 0
    gpus_per_worker: float = -1.0
    lease_seconds: float = 60.0


class Job(NamedTuple):
    """What is to be done; each process builds its part from it.

    Attributes:
      workdir: of the model.
      checkpoint: of the model, by its number.
      digest: that it must have.
      embeddings: whether they are wanted.
      files: of the input.
      shards: of the files.
      unreadable: reason by file.
      folder: of the output.
      lease_seconds: see `Options`.
    """

    workdir: str
    checkpoint: str
    digest: str
    embeddings: bool
    files: Sequence[InputFile]
    shards: Sequence[Shard]
    unreadable: dict[str, str]
    folder: Path
    lease_seconds: float


def make_master(job: Job) -> tuple[Master, PartStore]:
    """A master, from the journal in the folder; and its store, to be closed at the end."""
    store = PartStore(job.folder, {file.name: file for file in job.files})
    master = Master(
        job.shards,
        store,
        now=time.monotonic,
        process=Process(socket.gethostname(), os.getpid()),
        lease_seconds=job.lease_seconds,
        unreadable=job.unreadable,
    )
    return master, store


def run(
    job: Job,
    options: Options,
    *,
    say: Callable[[str], object],
    watch: Callable[[Status], object] = lambda status: None,
) -> Status:
    """Runs a job to its end, or goes on where it stopped.

    Args:
      job: what is to be done.
      options: how.
      say: tells the user a sentence.
      watch: called with the status several times a second.

    Returns:
      The status at the end.

    Raises:
      UserError: Ray is not installed, there is no cluster or no room in it, or workers cannot work.
      Interrupted: Ctrl-C or SIGTERM came; what is done is in the journal.
    """
    n_local = options.workers or os.cpu_count() or 1
    with (
        ray_session.session(options.address, n_local, ADDRESS_OPTION) as ray,
        Interruption() as interruption,
    ):
        # Entered after Ray has begun, which has a handler of its own.
        crew = _Crew(ray, job, options, interruption, say)
        try:
            status = crew.supervise(watch)
        finally:
            crew.end()
    if interruption.requested:
        interruption.leave()
    return status


class MasterActor:
    """`Master` as an actor: every life builds it anew, from its journal.

    What the user must know is said in the answer: Ray does not pass on why an actor cannot begin.
    """

    def __init__(self, job: Job):
        self._refusal: UserError | None = None
        try:
            self._master, self._store = make_master(job)
        except UserError as error:
            self._refusal = error

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the master."""
        if self._refusal is not None:
            raise self._refusal
        try:
            return getattr(self._master, method)(*arguments)
        except UserError as error:
            # The disk is full, or not shared: nothing more can be kept.
            self._refusal = error
            raise

    def close(self) -> None:
        """Ends the journal."""
        if self._refusal is None:
            self._store.close()


class WorkerActor:
    """A worker as an actor, for one life."""

    def run(self, name: str, job: Job, master: Any) -> None:
        """Works until the run ends."""
        import ray

        port = _Port(master)
        ray.get(port.call("enter", name, port.process))
        predictor = load_predictor(
            job.workdir, job.checkpoint, embeddings=job.embeddings, n_devices=1
        )
        if predictor.digest != job.digest:
            raise UserError(
                f"worker {name} on {socket.gethostname()} finds another model in {job.workdir}; "
                "accepted: a --workdir that is shared by all hosts"
            )
        reader = Reader(list(job.files), predictor.example_shape, predictor.input_columns)
        renew_seconds = job.lease_seconds / 4
        work_on(name, port, predictor, reader, job.folder, renew_seconds=renew_seconds)


class _Port:
    """A worker's way to the master's actor."""

    def __init__(self, master: Any):
        self._master = master
        self._renewal: Any = None
        self.process = Process(socket.gethostname(), os.getpid())

    def call(self, method: str, *arguments: Any) -> Any:
        return self._master.call.remote(method, *arguments)

    def ask(self, worker: str) -> Answer:
        import ray

        self._renewal = None
        return ray.get(self.call("ask", worker, self.process))

    def renew(self, worker: str, lease: Lease) -> bool:
        """The answer to the renewal before: nobody waits for this one."""
        import ray

        before, self._renewal = self._renewal, self.call("renew", worker, lease)
        if before is None:
            return True
        return ray.get(before) if ray.wait([before], timeout=0)[0] else True

    def done(self, worker: str, lease: Lease, part: Part) -> bool:
        import ray

        return ray.get(self.call("done", worker, lease, part))

    def failed(self, worker: str, lease: Lease, reason: str) -> None:
        import ray

        ray.get(self.call("failed", worker, lease, reason))


class _Crew:
    """The actors of a run, and who watches them."""

    def __init__(self, ray: Any, job: Job, options: Options, interruption: Interruption, say):
        self._ray, self._options, self._interruption, self._say = ray, options, interruption, say
        gpus = options.gpus_per_worker
        if gpus < 0:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        self._gpus = gpus
        accepted = "other --gpus_per_worker, or another --address"
        ray_session.refuse_no_room(ray, self._gpus, accepted)
        self._job = ray.put(job)
        self._master = (
            ray.remote(MasterActor)
            .options(max_restarts=-1, max_task_retries=-1, **ray_session.options_of_keeper(ray))
            .remote(job)
        )
        self._kind = ray.remote(WorkerActor).options(**ray_session.options_of_worker(self._gpus))
        self._actors: dict[Any, tuple[str, Any]] = {}  # by the reference of the call that runs
        self._started = 0
        self._counted_at = float("-inf")
        self._wanted = 0
        self._stillborn = 0
        self._ended: set[str] = set()
        self._done_then = 0
        self._status: Status | None = None

    def supervise(self, watch: Callable[[Status], object]) -> Status:
        """Until the master says that all is done, or the user that it is enough."""
        heard_at = time.monotonic()
        while True:
            status = self._ask("status")
            self._tell(status)
            watch(status)
            if status.ended:
                break
            if self._interruption.requested:
                self._say("stopping; what is done is kept, and the same command goes on")
                self._ask("stop")
                break
            self._end_silent(status)
            self._collect(status)
            self._hire()
            if status.workers:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > _SILENT_SECONDS:
                heard_at = time.monotonic()
                self._say("no worker has begun yet: the cluster has no room, or they take long")
            time.sleep(_TICK_SECONDS)
        status = self._ask("status")
        self._get(self._master.close.remote())
        return status

    def end(self) -> None:
        """No actor is left, also where the cluster goes on."""
        for actor in (*(actor for _, actor in self._actors.values()), self._master):
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def _hire(self) -> None:
        """As many workers as are wanted; those that the cluster has no room for yet begin later."""
        now = time.monotonic()
        if now - self._counted_at > _COUNT_SECONDS:
            self._counted_at = now
            room = ray_session.room_for_workers(self._ray, self._gpus)
            self._wanted = self._options.workers or max(1, room)
        while len(self._actors) < self._wanted:
            self._started += 1
            name, actor = f"{self._started}", self._kind.remote()
            self._actors[actor.run.remote(name, self._job, self._master)] = name, actor

    def _end_silent(self, status: Status) -> None:
        """Kills workers that hang: another takes the place."""
        for name, seconds in status.silent.items():
            if seconds > _HANGING_LEASES * self._options.lease_seconds:
                for its_name, actor in self._actors.values():
                    if its_name == name and name not in self._ended:
                        self._ended.add(name)
                        self._say(f"worker {name} has not been heard for {seconds:.0f} s; ended")
                        self._ray.kill(actor)

    def _collect(self, status: Status) -> None:
        """Lets those go that have returned or died."""
        if not self._actors:
            return
        running = [*self._actors]
        for reference in self._ray.wait(running, num_returns=len(running), timeout=0)[0]:
            name, _ = self._actors.pop(reference)
            errors = self._ray.exceptions
            try:
                self._ray.get(reference)
                self._ask("leave", name, False)
            except (errors.RayTaskError, errors.RayActorError) as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, UserError):
                    raise cause from None
                if not isinstance(cause, errors.RayActorError):
                    raise
                self._ask("leave", name, True)
                self._say(f"worker {name} died; its shard goes to the others")
                self._stillborn += 1
        if status.shards_done > self._done_then:
            self._done_then, self._stillborn = status.shards_done, 0
        if self._stillborn >= _MOST_STILLBORN:
            raise UserError(
                f"{self._stillborn} workers died before any had done a shard (is there enough "
                "memory?); accepted: fewer --workers, or smaller --shard_rows in another --output"
            )

    def _tell(self, status: Status) -> None:
        before, self._status = self._status, status
        if before is None:
            return
        if status.life != before.life:
            self._say("the master died and has come back from its journal")
        elif status.lapsed > before.lapsed:
            self._say(
                f"{status.lapsed - before.lapsed} shards were not heard of for "
                f"{self._options.lease_seconds:g} s, and go to others"
            )
        for file in sorted(set(status.failed) - set(before.failed)):
            self._say(f"{file} cannot be used: {status.failed[file]}")

    def _ask(self, method: str, *arguments: Any) -> Any:
        """An answer of the master, which may be coming back from its journal."""
        reference = self._master.call.remote(method, *arguments)
        asked_to_stop = None
        while not self._ray.wait([reference], timeout=_TICK_SECONDS)[0]:
            if self._interruption.requested:
                asked_to_stop = asked_to_stop or time.monotonic()
                if time.monotonic() - asked_to_stop > _PATIENCE_SECONDS:
                    self._interruption.leave()
        return self._get(reference)

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.RayTaskError, errors.RayActorError) as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, UserError):
                raise cause from None
            raise
