"""Processes on one machine, started together and started again when one dies.

A generation is one set of processes that compute as one. When one of them dies or falls silent, the
others cannot go on: they are ended, and the next generation goes on from the last checkpoint, with
the processes that are left or as many as are asked for. What a generation saved is whole, so ending
it costs the work since then and nothing else. On a cluster the engine does this, not this module.

Nothing here imports JAX: the supervisor takes the memory of a small Python program.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jkmeans.errors import LostError, UserError
from jkmeans.processes import heartbeat, joining, spare

EVENTS_FILE = "events.jsonl"
WANTED_FILE = "wanted"
"""In the folder of the logs: whoever writes a number there asks for so many processes."""

_TICK_SECONDS = 0.1
_SETTLE_SECONDS = 1.0
"""How long the others are listened to after a death: one of them may say why."""
_LAST_WORDS_SECONDS = 2.0
_YOUNG_SECONDS = 5.0
_QUICK_DEATHS = 3
"""So many generations in a row that died young are started without a pause."""
_LONGEST_PAUSE_SECONDS = 30.0
_LONGEST_START_SECONDS = 60.0
"""How long spares wait until a generation says that it is at work."""
# A process that ends so would end so again.
FINAL_STATUSES = (2, 3)
_ASKED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_NOISE = b"[Gloo] Rank "


class Options(NamedTuple):
    """What to start, and how to watch it.

    Attributes:
      command: of one process; all are started with the same.
      n_processes: to begin with, and the most there are.
      min_processes: a generation has at least so many, even after deaths.
      max_restarts: after failures; restarts that were asked for do not count.
      hang_seconds: a process that is silent for so long is ended.
      grace_seconds: how long processes that are asked to leave may take to save.
      gpus_per_process: of this machine's GPUs, dealt in order; 0 leaves them to the command.
      spares: processes kept ready, with everything imported, for the next generation.
      logs: folder of the logs and of the control file; None for none.
    """

    command: Sequence[str]
    n_processes: int
    min_processes: int = 1
    max_restarts: int = 10
    hang_seconds: float = 30.0
    grace_seconds: float = 300.0
    gpus_per_process: int = 0
    spares: int = 0
    logs: Path | None = None


class _Process:
    """A process of a generation, its output and its signs of life."""

    def __init__(self, popen: subprocess.Popen):
        self.popen = popen
        self.number = -1
        self.buffer = b""
        self.log: Any = None
        self.life = heartbeat.Listener("")
        self.status: int | None = None
        self.silent = False
        self.ended = False
        self.open = True

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0)

    @property
    def primary(self) -> bool:
        """Whether it failed by itself, and not for want of another."""
        by_itself = self.failed and self.status != LostError.exit_status and not self.ended
        return self.silent or by_itself

    def described(self) -> str:
        """How it ended, in words."""
        status = self.status or 0
        if self.silent:
            return f"process {self.number} gave no sign of life"
        if status < 0:
            return f"process {self.number} was killed by {_name_of_signal(-status)}"
        if status in _ASKED:
            return f"process {self.number} was asked to leave by somebody else, and saved"
        return f"process {self.number} ended with status {status}"


def _name_of_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Of those for real time only the first and the last have names.
        return f"signal {number}"


class Supervisor:
    """Runs generations of processes to the end; see `Options`.

    Args:
      options: what to start.
      say: called with a line for the user.
      show: called with the number of a process and a line that it has written.
    """

    def __init__(
        self,
        options: Options,
        say: Callable[[str], None] | None = None,
        show: Callable[[int, str], None] | None = None,
    ):
        self.options = options
        self._say = say or (lambda line: _print(f"launch: {line}", sys.stderr))
        self._show = show or (lambda number, line: _print(f"{number}| {line}", sys.stdout))
        self._wanted = options.n_processes
        self._regroup = False
        self._stop = 0
        self._selector = selectors.DefaultSelector()
        self._processes: list[_Process] = []
        self._spares: list[_Process] = []
        self._generation = 0
        self._events: Any = None

    def run(self) -> int:
        """Runs until the work is done, fails for good, or a signal says to stop.

        Returns:
          The exit status: 0; 2 or 3 of a process that cannot succeed; 75 where restarts are used
          up; 128 + signal.
        """
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jkmeans-")))
            if self.options.logs is not None:
                self._open_logs(stack, self.options.logs)
            stack.enter_context(self._signals())
            stack.callback(self._end_all)
            return self._run_generations()

    def _run_generations(self) -> int:
        n = self.options.n_processes
        n_restarts, n_quick = 0, 0
        while True:
            started = time.monotonic()
            processes = self._start(n)
            self._watch(processes)
            status, lost, reason = self._end(processes)
            self._processes = []
            if status is not None:
                self._event("end", status=status, reason=reason)
                return status
            if self._regroup:
                self._regroup = False
                n = self._wanted
                if not reason:
                    self._say(f"starting {n} {_processes(n)}, as asked")
                    continue
            n_restarts += 1
            if n_restarts > self.options.max_restarts:
                self._say(
                    f"{reason}; {self.options.max_restarts} restarts are used up; what was saved "
                    "is whole, and the same command goes on"
                )
                self._event("end", status=LostError.exit_status, reason=reason)
                return LostError.exit_status
            n = max(self.options.min_processes, n - lost)
            n_quick = n_quick + 1 if time.monotonic() - started < _YOUNG_SECONDS else 0
            self._say(
                f"{reason}; going on from the last checkpoint with {n} {_processes(n)} (restart "
                f"{n_restarts} of {self.options.max_restarts})"
            )
            if n_quick > _QUICK_DEATHS:
                pause = min(2.0 ** (n_quick - _QUICK_DEATHS), _LONGEST_PAUSE_SECONDS)
                self._attend([], until=time.monotonic() + pause)
            if self._stop:
                return 128 + self._stop

    # One generation

    def _start(self, n: int) -> list[_Process]:
        self._generation += 1
        port = _free_port()
        processes = self._processes
        for number in range(n):
            environment = {
                heartbeat.PARENT: str(os.getpid()),
                joining.COUNT: str(n),
                joining.NUMBER: str(number),
                joining.COORDINATOR: f"127.0.0.1:{port}",
                heartbeat.VARIABLE: str(self._folder / f"beat-{self._generation}-{number}"),
            }
            if per := self.options.gpus_per_process:
                gpus = range(number * per, (number + 1) * per)
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
            process = self._awaken(environment) or self._spawn(environment)
            process.number = number
            process.life = heartbeat.Listener(environment[heartbeat.VARIABLE])
            processes.append(process)
            if self.options.logs is not None:
                with contextlib.suppress(OSError):
                    path = self.options.logs / f"process-{number}.log"
                    process.log = open(path, "ab")  # noqa: SIM115, closed when it has ended
        self._event("start", n=n, pids=[process.popen.pid for process in processes])
        return processes

    def _keep_spares(self, processes: list[_Process], started: float) -> None:
        """Starts what is lacking of them, once the generation no longer needs all cores itself."""
        if len(self._spares) == self.options.spares:
            return
        at_work = all(process.life.is_at_work() for process in processes)
        if at_work or time.monotonic() - started > _LONGEST_START_SECONDS:
            while len(self._spares) < self.options.spares:
                self._spares.append(self._spawn({spare.VARIABLE: "1"}))

    def _spawn(self, environment: dict[str, str]) -> _Process:
        try:
            popen = subprocess.Popen(
                self.options.command,
                stdin=subprocess.PIPE if spare.VARIABLE in environment else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
                # Ctrl-C comes to the supervisor only, which passes it on.
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"cannot start {self.options.command[0]!r}: {error.strerror}; accepted: a command "
                "after --, such as python -m experiments.train …"
            ) from error
        process = _Process(popen)
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        self._selector.register(popen.stdout, selectors.EVENT_READ, process)
        return process

    def _awaken(self, environment: dict[str, str]) -> _Process | None:
        """A process that was kept ready, with its place; None where there is none."""
        while self._spares:
            process = self._spares.pop(0)
            if process.popen.poll() is None and spare.give_place(process.popen.stdin, environment):
                return process
            self._kill([process])
        return None

    def _watch(self, processes: list[_Process]) -> None:
        """Returns when all are done, one failed, or all are to leave."""
        started = time.monotonic()
        while True:
            self._attend(processes)
            if self._stop or self._regroup or any(process.failed for process in processes):
                return
            if all(process.status == 0 for process in processes):
                return
            self._keep_spares(processes, started)
            for process in processes:
                if process.status is None and process.life.silence() > self.options.hang_seconds:
                    process.silent = True
                    self._event("silent", number=process.number, pid=process.popen.pid)
                    self._signal([process], signal.SIGKILL)
                    return

    def _end(self, processes: list[_Process]) -> tuple[int | None, int, str]:
        """Ends what is left of a generation.

        Args:
          processes: of the generation.

        Returns:
          The final status or None to go on, how many processes are lost, and why it ended.
        """
        if not self._stop and not self._regroup:
            if all(process.status == 0 for process in processes):
                self._drain(processes)
                return 0, 0, ""
            self._settle(processes)
        if self._stop or self._regroup or _all_asked(processes):
            self._ask_to_leave(processes)
        self._kill(processes)
        final = [p for p in processes if p.status in FINAL_STATUSES]
        if final:
            number, status = final[0].number, final[0].status
            self._say(f"process {number} ended with status {status}, and would again")
            return status, 0, final[0].described()
        if self._stop:
            done = all(process.status == 0 for process in processes)
            return 0 if done else 128 + self._stop, 0, ""
        # By the signal itself: one that had only just begun.
        left = (0, *_ASKED, -signal.SIGTERM, LostError.exit_status)
        primary = [process for process in processes if process.primary]
        if self._regroup:  # Those that left as they were asked are not lost.
            primary = [process for process in primary if process.status not in left]
        if self._regroup and all(p.status in left or p.ended for p in processes):
            if all(process.status == 0 for process in processes):
                return 0, 0, ""
            return None, 0, ""
        first = primary or [process for process in processes if process.failed]
        reason = "; ".join(process.described() for process in first) or "processes had to be ended"
        if len(primary) == len(processes) and _all_asked(processes):
            return None, 1, reason
        return None, len(primary), reason

    def _settle(self, processes: list[_Process]) -> None:
        """Listens for a moment: a process that lost another may be heard before that one."""
        failed = [process for process in processes if process.failed]
        for process in failed:
            self._event("dead", number=process.number, status=process.status)
        known = any(p.primary and p.status not in FINAL_STATUSES for p in processes)
        if known and not _all_asked(processes):
            return
        until = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < until and any(process.status is None for process in processes):
            self._attend(processes)

    def _ask_to_leave(self, processes: list[_Process]) -> None:
        """Passes a wish to stop on, and waits until all have saved and left."""
        number = self._stop or signal.SIGTERM
        self._event("leave", signal=int(number))
        self._signal(processes, number)
        until = time.monotonic() + self.options.grace_seconds
        n_signals = self._n_signals
        while time.monotonic() < until and any(process.status is None for process in processes):
            self._attend(processes)
            if self._n_signals > n_signals and self._n_signals > 1:
                break  # Once more: at once.

    def _kill(self, processes: list[_Process]) -> None:
        """Ends what still runs, and hears what was said last."""
        for process in processes:
            process.status = process.popen.poll()
            process.ended = process.status is None
        self._signal(processes, signal.SIGKILL)
        for process in processes:
            process.status = process.popen.wait()
            if process.popen.stdin is not None:
                with contextlib.suppress(OSError):
                    process.popen.stdin.close()
        self._drain(processes)

    def _signal(self, processes: list[_Process], number: int) -> None:
        for process in processes:
            if process.status is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process.popen.pid, number)  # And what it has started.
                else:
                    process.popen.send_signal(number)

    # Listening

    def _attend(self, processes: list[_Process], until: float = 0.0) -> None:
        """Waits a moment, or until a time, for output, deaths and signals."""
        while True:
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.data is None:
                    with contextlib.suppress(OSError):
                        os.read(key.fd, 4096)
                else:
                    self._read(key.data)
            for process in processes:
                if process.status is None:
                    process.status = process.popen.poll()
            self._look_for_wishes()
            if time.monotonic() >= until or self._stop:
                return

    def _read(self, process: _Process) -> None:
        assert process.popen.stdout is not None
        try:
            data = os.read(process.popen.stdout.fileno(), 2**16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            process.open = False
            self._selector.unregister(process.popen.stdout)
            process.popen.stdout.close()
            data = b"\n" if process.buffer else b""
        *lines, process.buffer = (process.buffer + data).split(b"\n")
        for line in lines:
            if line.startswith(_NOISE):
                continue
            if process.log is not None:
                with contextlib.suppress(OSError):  # A full disk is no reason to stop.
                    process.log.write(line + b"\n")
                    process.log.flush()
            if process.number >= 0:
                self._show(process.number, line.decode(errors="replace"))
            elif line == spare.READY.encode():
                self._event("spare", pid=process.popen.pid)

    def _drain(self, processes: list[_Process]) -> None:
        """Reads what is left of the output of processes that have ended."""
        until = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < until and any(process.open for process in processes):
            self._attend(processes)
        for process in processes:
            if process.open:  # Something it has started holds the pipe.
                assert process.popen.stdout is not None
                self._selector.unregister(process.popen.stdout)
                process.popen.stdout.close()
                process.open = False
            if process.log is not None:
                with contextlib.suppress(OSError):
                    process.log.close()
            if process.number >= 0:  # Spares do not beat.
                process.life.end()

    def _look_for_wishes(self) -> None:
        """A number in the control file asks for so many processes."""
        if self.options.logs is None:
            return
        path = self.options.logs / WANTED_FILE
        try:
            text = path.read_text().strip()
            if not text:  # Made, and not written yet.
                return
            path.unlink()
        except (OSError, UnicodeDecodeError):
            return
        least, most = self.options.min_processes, self.options.n_processes
        if not text.isdecimal() or not least <= int(text) <= most:
            self._say(f"{path} asks for {text!r}; accepted: {least} to {most} processes")
            return
        self._wanted, self._regroup = int(text), True

    @contextlib.contextmanager
    def _signals(self):
        self._n_signals = 0
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        writing.setblocking(False)
        before: dict[int, Any] = {}

        def hear(number: int, frame) -> None:
            del frame
            if number == signal.SIGUSR1:
                self._wanted, self._regroup = self.options.n_processes, True
            elif number != signal.SIGCHLD:
                self._stop = number
                self._n_signals += 1

        with reading, writing:
            self._selector.register(reading, selectors.EVENT_READ, None)
            wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
            try:
                for number in numbers:
                    before[number] = signal.signal(number, hear)
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(wakeup)
                self._selector.unregister(reading)

    # Records

    def _open_logs(self, stack: contextlib.ExitStack, logs: Path) -> None:
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self._events = stack.enter_context((logs / EVENTS_FILE).open("a"))
            (logs / WANTED_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to --logs {logs}: {error.strerror}; accepted: a folder"
            ) from error
        self._event("supervisor", pid=os.getpid(), command=list(self.options.command))

    def _event(self, kind: str, **values: Any) -> None:
        if self._events is None:
            return
        record = {"time": time.time(), "event": kind, "generation": self._generation, **values}
        with contextlib.suppress(OSError):
            self._events.write(json.dumps(record) + "\n")
            self._events.flush()

    def _end_all(self) -> None:
        """Leaves none behind, whatever ended the supervisor."""
        self._kill([*self._processes, *self._spares])


def _all_asked(processes: list[_Process]) -> bool:
    """Whether all that ended were asked to leave, or lost one that was."""
    ended = [process for process in processes if process.status is not None]
    return any(p.status in _ASKED for p in ended) and all(
        p.status in (0, LostError.exit_status, *_ASKED) for p in ended
    )


def _print(line: str, stream: TextIO) -> None:
    """Prints a line as long as somebody reads: who closes the pipe does not end the work."""
    try:
        print(line, file=stream, flush=True)
    except OSError:  # Or a terminal that is gone, or a full disk.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _processes(n: int) -> str:
    return "process" if n == 1 else "processes"
