"""Server and workers as Ray actors: started, watched, brought back, ended.

What is computed comes as a `Job`; what is kept, and why nothing counts twice, is in
`jkmeans.asynchronous.server`.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jkmeans import ray_session
from jkmeans.asynchronous.journal import History, read_history
from jkmeans.asynchronous.rules import Rule, Tree
from jkmeans.asynchronous.server import JOURNAL_FILE, ParameterServer, Reply, Status
from jkmeans.asynchronous.work import Work
from jkmeans.asynchronous.worker import Read, work_on
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption
from jkmeans.telling import remark

_JOB_FILE = "job.pickle"
_TICK_SECONDS = 0.2
_SILENT_SECONDS = 30.0


class Job(Protocol):
    """What server and workers do; it is pickled, and each process builds its part from it."""

    @property
    def n_workers(self) -> int:
        """M."""
        ...

    @property
    def tau(self) -> int:
        """τ, samples between two looks of a worker for the answer."""
        ...

    @property
    def budget(self) -> int:
        """Samples of all workers, after which the run ends."""
        ...

    @property
    def synchronous(self) -> bool:
        """Whether workers wait for each other."""
        ...

    def first_version(self) -> Tree:
        """The shared version at the start; the same in every process."""
        ...

    def rule(self) -> Rule:
        """What the server does with what workers send."""
        ...

    def work(self, worker: int) -> tuple[Work, Read]:
        """What a worker computes, and its samples, which it reads itself."""
        ...


class Outcome(NamedTuple):
    """How a run went.

    Attributes:
      shared: the last version, NumPy arrays.
      status: of the server, at the end.
      history: all displacements in that version.
      lives: of each worker, the processes that it had since the command was started.
      missing: workers that did not answer at the end: they hang, or are dead for good.
      seconds: of this part of the run, from its first displacement to its end.
    """

    shared: Tree
    status: Status
    history: History
    lives: list[int]
    missing: list[int]
    seconds: float


def run(
    job: Job,
    folder: Path,
    options: Config,
    *,
    evaluate: Callable[[Tree, Status, float], bool],
    watch: Callable[[Status], object] = lambda status: None,
) -> Outcome:
    """Runs a job to its end, or goes on where it stopped.

    Args:
      job: what is computed.
      folder: of the journal and the checkpoints, on this machine.
      options: the group ``ray`` of a config; see `jkmeans.ray_session.ray_fields`.
      evaluate: called with the shared version, the status and the seconds since the first
        displacement, every ``evaluate_seconds`` and at the end; whether to go on.
      watch: called with the status several times a second.

    Returns:
      Outcome.

    Raises:
      UserError: Ray is not installed, there is no cluster, or a process died too often.
      Interrupted: Ctrl-C or SIGTERM came; everything applied is saved.
    """
    with ray_session.session(options.address, job.n_workers) as ray, Interruption() as interruption:
        # Entered after Ray has begun, which has a handler of its own.
        run_ = _Run(ray, job, Path(folder).absolute(), options, interruption)
        try:
            outcome = run_.supervise(evaluate, watch)
        finally:
            run_.end()
    if interruption.requested:
        interruption.leave()
    return outcome


class ServerActor:
    """`ParameterServer` as an actor: every life builds it anew, from its checkpoint.

    What the user must know is said in the answer: Ray does not pass on why an actor cannot begin.
    The job comes from a file, because Ray may lose large arguments before an actor comes back.
    """

    def __init__(self, folder: Path, interval: int):
        self._refusal: UserError | None = None
        job: Job = pickle.loads((folder / _JOB_FILE).read_bytes())
        try:
            self._server = ParameterServer(
                job.first_version(),
                job.rule(),
                folder,
                n_workers=job.n_workers,
                budget=job.budget,
                interval=interval,
                synchronous=job.synchronous,
            )
        except UserError as error:
            self._refusal = error

    def _there(self) -> ParameterServer:
        if self._refusal is not None:
            raise self._refusal
        return self._server

    def enter(self, *arguments) -> Reply:
        """See `ParameterServer`."""
        return self._there().enter(*arguments)

    def exchange(self, *arguments) -> Reply:
        """See `ParameterServer`."""
        return self._there().exchange(*arguments)

    def snapshot(self) -> tuple[Tree, Status]:
        """See `ParameterServer`."""
        return self._there().snapshot()

    def status(self) -> Status:
        """See `ParameterServer`."""
        return self._there().status()

    def stop(self) -> None:
        """See `ParameterServer`."""
        self._there().stop()

    def close(self) -> None:
        """See `ParameterServer`."""
        self._there().close()


class WorkerActor:
    """A worker as an actor: `run` is called again in every life."""

    def run(self, number: int, job: Job, server: Any, ahead: int) -> None:
        """Works until the run ends."""
        work, read = job.work(number)
        work_on(number, _Port(server), work, read, tau=job.tau, ahead=ahead)


class _Port:
    """A worker's way to the server's actor."""

    def __init__(self, server: Any):
        self._server = server

    def enter(self, worker: int, life: int, process: int) -> Reply:
        import ray

        return ray.get(self._server.enter.remote(worker, life, process))

    def exchange(
        self, worker: int, life: int, sequence: int, sent: Tree, seen: int, position: int
    ) -> _Pending:
        return _Pending(self._server.exchange.remote(worker, life, sequence, sent, seen, position))


class _Pending:
    def __init__(self, reference: Any):
        self._reference = reference

    def done(self) -> bool:
        import ray

        return bool(ray.wait([self._reference], timeout=0)[0])

    def result(self) -> Reply:
        import ray

        return ray.get(self._reference)


class _Run:
    """The actors of a run, and who watches them."""

    def __init__(self, ray: Any, job: Job, folder: Path, options: Config, interruption):
        self._ray, self._folder, self._options = ray, folder, options
        self._interruption = interruption
        accepted = "other config.ray.gpus_per_worker, or another config.ray.address"
        ray_session.refuse_no_room(ray, options.gpus_per_worker, accepted)
        (folder / _JOB_FILE).write_bytes(ray.cloudpickle.dumps(job))
        self._job = ray.put(job)
        lives = {"max_restarts": options.max_restarts, "max_task_retries": -1}
        self._server = (
            ray.remote(ServerActor)
            .options(
                **lives,
                **ray_session.options_of_keeper(ray),
                # In a synchronous round every worker waits inside a call.
                max_concurrency=job.n_workers + 2,
            )
            .remote(folder, options.checkpoint_exchanges)
        )
        worker = ray.remote(WorkerActor).options(
            **lives, **ray_session.options_of_worker(options.gpus_per_worker)
        )
        self._workers = [worker.remote() for _ in range(job.n_workers)]
        self._running: dict[Any, int] = {}
        for number in range(job.n_workers):
            self._set_to_work(number)
        self._dead: list[int] = []
        # So many deaths for good end the run: no round is complete without all workers.
        self._fatal = 1 if job.synchronous else job.n_workers
        self._processes: list[set[int]] = [set() for _ in self._workers]
        self._server_life: int | None = None
        self._silent: set[int] = set()

    def supervise(
        self,
        evaluate: Callable[[Tree, Status, float], bool],
        watch: Callable[[Status], object],
    ) -> Outcome:
        """Until the server says that the run has ended, and the workers have heard it."""
        begun: tuple[int, float] | None = None
        evaluated_at = float("-inf")
        ended_at: float | None = None
        stopping = False
        while True:
            due = time.monotonic() - evaluated_at >= self._options.evaluate_seconds
            shared, status = self._ask("snapshot") if due else (None, self._ask("status"))
            now = time.monotonic()
            if begun is None or status.clock == begun[0]:
                begun = status.clock, now  # Processes begin; time does not count yet.
            if due:
                stopping |= not evaluate(shared, status, now - begun[1])
                evaluated_at = now
            self._tell_of_lives(status)
            self._tell_of_silence(status)
            watch(status)
            if (self._interruption.requested or stopping) and not status.ended:
                self._ask("stop")
                stopping = True
            self._collect(again=not status.ended and not stopping)
            if len(self._dead) >= self._fatal and not status.ended:
                self._ask("stop")  # Which saves.
                raise UserError(
                    f"{len(self._dead)} of {len(self._workers)} workers died more than "
                    f"config.ray.max_restarts = {self._options.max_restarts} times; what "
                    "was applied is saved, and the same command goes on from there"
                )
            if status.ended:
                ended_at = ended_at or now
                late = now - ended_at > self._options.patience_seconds
                if not self._running or late:
                    break
            time.sleep(_TICK_SECONDS)
        shared, status = self._ask("snapshot")
        seconds = ended_at - begun[1]
        evaluate(shared, status, seconds)
        self._ask("close")
        history = read_history(self._folder / JOURNAL_FILE)
        history.check_counted_once(status.sequences)
        missing = sorted({*self._dead, *self._running.values()})
        for number in missing:
            share = status.positions[number] / max(1, status.samples)
            remark(
                f"worker {number} was not there at the end; it computed {share:.0%} of the samples"
            )
        return Outcome(
            shared=shared,
            status=status,
            history=history,
            lives=[max(1, len(seen)) for seen in self._processes],
            missing=missing,
            seconds=seconds,
        )

    def _set_to_work(self, number: int) -> None:
        call = self._workers[number].run
        self._running[call.remote(number, self._job, self._server, self._options.ahead)] = number

    def end(self) -> None:
        """No actor is left, also where the cluster goes on."""
        for actor in (*self._workers, self._server):
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def _tell_of_lives(self, status: Status) -> None:
        for number, (seen, process) in enumerate(
            zip(self._processes, status.processes, strict=True)
        ):
            if process and process not in seen:
                if seen:
                    remark(f"worker {number} has come back")
                seen.add(process)
        if self._server_life not in (None, status.life):
            history = read_history(self._folder / JOURNAL_FILE)
            remark(
                f"the server has come back from its checkpoint; {history.rolled_back[-1]:,} "
                "displacements are computed anew"
            )
        self._server_life = status.life

    def _tell_of_silence(self, status: Status) -> None:
        """Of workers that hang, or for which the cluster has no room."""
        for number, seconds in enumerate(status.silent):
            if seconds < _SILENT_SECONDS:
                self._silent.discard(number)
            elif number in self._running.values() and number not in self._silent:
                self._silent.add(number)
                share = status.positions[number] / max(1, status.samples)
                remark(
                    f"worker {number} has not been heard for {_SILENT_SECONDS:.0f} s; its share of "
                    f"the samples is {share:.0%}"
                )

    def _ask(self, method: str) -> Any:
        """An answer of the server, which may be coming back from its checkpoint."""
        reference = getattr(self._server, method).remote()
        asked_to_stop = None
        while not self._ray.wait([reference], timeout=_TICK_SECONDS)[0]:
            if self._interruption.requested:
                asked_to_stop = asked_to_stop or time.monotonic()
                if time.monotonic() - asked_to_stop > self._options.patience_seconds:
                    # What it has applied since its checkpoint is computed anew.
                    self._interruption.leave()
        return self._get(reference)

    def _collect(self, again: bool) -> None:
        """Looks which workers have returned, and which are dead.

        One that returned too early, because the server died after it had told the end, works on.
        """
        if not self._running:
            return
        returned, _ = self._ray.wait([*self._running], num_returns=len(self._running), timeout=0)
        for reference in returned:
            number = self._running.pop(reference)
            try:
                self._get(reference)
            except _DeadError:
                self._dead.append(number)
                remark(f"worker {number} is dead for good")
                continue
            if again:
                self._set_to_work(number)

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.RayTaskError, errors.RayActorError) as error:
            # What went wrong in a task; for a worker that may be the death of the server.
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, UserError):
                raise cause from None
            if not isinstance(cause, errors.RayActorError):
                raise
            raise _DeadError(
                f"a process of the run died more than config.ray.max_restarts = "
                f"{self._options.max_restarts} times; its checkpoint is whole, and the same "
                "command goes on from there"
            ) from error


class _DeadError(UserError):
    """An actor does not come back."""
