"""Faults on purpose: what a run survives, how fast, and whether its result is the same.

Processes are killed, stopped and slowed, the disk is filled, the newest checkpoint damaged.

A round is one run under the supervisor with several faults in it, one after the other, each once
the run has got over the one before. At its end the checksums of every array of the last checkpoint
are compared with those of a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jkmeans import configuration
from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.configuration import Config, Field, convert_fields, integer, nest, number, text
from jkmeans.errors import UserError
from jkmeans.fields import texts
from jkmeans.interruption import Interruption
from jkmeans.processes.supervisor import EVENTS_FILE
from jkmeans.recorder import METRICS_FILE, read_metrics
from jkmeans.whole_files import write_json, write_whole
from jkmeans.workdir import only_process_in

FAULTS_FILE, TABLE_FILE, REFERENCE_FILE = "faults.csv", "chaos.md", "reference.json"
_DISK_BYTES = 2**27
_POLL_SECONDS = 0.02
_CUT_POLL_SECONDS = 0.0005
_ANNOUNCED = "steps of"

KINDS = {
    "worker": "SIGKILL of a worker",
    "coordinator": "SIGKILL of the coordinator",
    "two": "SIGKILL of two at once",
    "save": "SIGKILL in the middle of a save",
    "notice": "SIGTERM to a worker, as before a preemption",
    "stop": "SIGSTOP of a worker",
    "slow": "a slow worker",
    "damage": "SIGKILL, and the newest checkpoint damaged",
    "disk": "the disk full",
}
"""What is done to a run."""


def _convert_kinds(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    if any(kind not in KINDS for kind in value):
        raise ValueError
    return tuple(value)


FIELDS: dict[str, Field] = {
    "seed": integer(0, "of which fault comes when, and to whom"),
    "n_faults": integer(1, "faults in all"),
    "faults_per_round": integer(1, "faults that one run goes through"),
    "kinds": Field(_convert_kinds, f"a tuple of {', '.join(KINDS)}", "what is done, in turn"),
    "n_processes": integer(2, "of a run; a dead one is replaced, so the result must be equal"),
    "spares": integer(0, "processes that the supervisor keeps ready"),
    "hang_seconds": number("a process silent for so long is ended", positive=True),
    "slow_seconds": number("how long a slow worker is slow", positive=True),
    "patience_seconds": number("a run that makes no progress for so long is lost", positive=True),
    "train_config": text("the config of experiments.train"),
    "train_flags": texts("more flags of experiments.train"),
}


class Fault(NamedTuple):
    """One fault and what came of it.

    Attributes:
      number: in all.
      round: the run that it came to.
      kind: of `KINDS`.
      epoch: finished when it came.
      noticed: seconds until the supervisor knew; None where there was nothing to notice.
      recovered: seconds until the state was restored on all processes and training could go on:
        all but reading, tracing and compiling programs; None where nothing restarted.
      next_epoch: seconds until the next epoch was done.
      lost_epochs: that had to be computed again.
      lost_seconds: that these had taken.
      survived: whether the run went on, and came to its end.
      equal: whether the result of the round is that of an undisturbed run, bit for bit.
    """

    number: int
    round: int
    kind: str
    epoch: int
    noticed: float | None
    recovered: float | None
    next_epoch: float | None
    lost_epochs: int
    lost_seconds: float
    survived: bool
    equal: bool


def validate(config: Config) -> Config:
    """The config with every value in its proper type.

    Raises:
      UserError: a field is unknown, missing, or of a wrong type or value.
    """
    values = convert_fields(config, FIELDS)
    if values["hang_seconds"] < 2:
        raise UserError(
            f"config.hang_seconds is {values['hang_seconds']}; accepted: at least 2, because a "
            "sign of life comes twice a second"
        )
    if "two" in values["kinds"] and values["n_processes"] < 3:
        raise UserError(
            f"config.n_processes is {values['n_processes']}, but kinds holds 'two'; accepted: at "
            "least 3, or other kinds"
        )
    return nest(values)


def run_chaos(config: Config, workdir: str | os.PathLike[str]) -> list[Fault]:
    """Disturbs runs, and reports what survived; goes on after the rounds that are done.

    Args:
      config: complete, as ``configs/chaos.py``; see `FIELDS`.
      workdir: receives ``faults.csv`` (a line for each fault, see `Fault`), ``chaos.md`` (a table
        by kind) and the folders of the runs.

    Returns:
      All faults.

    Raises:
      UserError: the config or the workdir cannot be used, or the undisturbed run failed.
      Interrupted: Ctrl-C or SIGTERM came; finished rounds are kept.
    """
    config = validate(config)
    workdir = Path(workdir).absolute()
    _claim(workdir, config)
    with only_process_in(workdir), Interruption() as interruption:
        chaos = _Chaos(config, workdir, interruption)
        faults = chaos.execute()
    return faults


def _claim(workdir: Path, config: Config) -> None:
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            there = nest(convert_fields(json.loads(path.read_text()), FIELDS))
            different = configuration.differences(config, there, FIELDS, ("n_faults",))
            if different:
                raise UserError(
                    f"{workdir} holds faults of another config: {different[0]}; accepted: the same "
                    "config, or another --workdir"
                )
        write_json(path, configuration.to_json(config))
    except (ValueError, OSError) as error:
        raise UserError(f"cannot use --workdir {workdir}: {error}") from error


class _Chaos:
    def __init__(self, config: Config, workdir: Path, interruption: Interruption):
        self.config = config
        self.workdir = workdir
        self.interruption = interruption
        self.kinds = list(config.kinds)
        if "disk" in self.kinds and not _can_mount(workdir / "try"):
            print("no disk can be filled here: that takes the right to mount a tmpfs (root)")
            self.kinds.remove("disk")
            if not self.kinds:
                raise UserError("config.kinds is ('disk',), which is not possible on this machine")

    def execute(self) -> list[Fault]:
        """The undisturbed run, then rounds until there were enough faults."""
        reference = self._reference()
        faults = _read(self.workdir / FAULTS_FILE)
        while len(faults) < self.config.n_faults:
            self._stop_if_asked()
            number = faults[-1].round + 1 if faults else 0
            found = self._round(number, len(faults), reference)
            faults += found
            _write(self.workdir / FAULTS_FILE, faults)
            good = sum(fault.survived and fault.equal for fault in found)
            print(
                f"round {number}: {len(found)} faults, {good} survived with an equal result; "
                f"{len(faults)} of {self.config.n_faults}",
                flush=True,
            )
        text = table(faults, self.config)
        write_whole(self.workdir / TABLE_FILE, text.encode())
        print(text)
        return faults

    def _reference(self) -> dict[str, Any]:
        path = self.workdir / REFERENCE_FILE
        if path.exists():
            return json.loads(path.read_text())
        print("the undisturbed run", flush=True)
        folder = self.workdir / "undisturbed"
        run = _SupervisedRun(self.config, folder)
        with run:
            status = self._await(lambda: run.status() is not None, run.status, run)
        if status != 0:
            raise UserError(f"the undisturbed run failed: {run.last_words()}")
        result = fingerprints(folder)
        write_json(path, result)
        return json.loads(path.read_text())

    def _await(self, condition: Callable[[], Any], value: Callable[[], Any], run) -> Any:
        """Waits for a condition as long as the run makes progress; None where it does not."""
        until = time.monotonic() + self.config.patience_seconds
        seen = None
        while not condition():
            self._stop_if_asked()
            if time.monotonic() > until:
                return None
            if (progress := run.last_epoch()) != seen:
                seen = progress
                until = time.monotonic() + self.config.patience_seconds
            time.sleep(_POLL_SECONDS)
        return value()

    def _stop_if_asked(self) -> None:
        if self.interruption.requested:
            self.interruption.leave()

    def _round(self, number: int, n_before: int, reference: dict[str, Any]) -> list[Fault]:
        config = self.config
        n = min(config.faults_per_round, config.n_faults - n_before)
        kinds = [self.kinds[(n_before + i) % len(self.kinds)] for i in range(n)]
        choice = random.Random(f"{config.seed} {number}")
        folder = self.workdir / f"round-{number}"
        _remove(folder)
        faults: list[Fault] = []
        with _small_disk(folder, "disk" in kinds):
            run = _SupervisedRun(config, folder / "run")
            with run:
                for i, kind in enumerate(kinds):
                    # Room for the faults that follow.
                    first, last = run.last_epoch() + 1, run.n_epochs() - 2 * (len(kinds) - i)
                    target = choice.randint(first, max(first, min(first + 6, last)))
                    # With spares ready: as after days of work, and not amid the start before.
                    self._await(
                        lambda t=target: (
                            (run.last_epoch() >= t and run.n_spares() >= config.spares)
                            or run.status() is not None
                        ),
                        lambda: True,
                        run,
                    )
                    if run.status() is not None:
                        break
                    fault = self._disturb(run, kind, choice)
                    faults.append(fault._replace(number=n_before + i, round=number))
                    print(f"  {_line(faults[-1])}", flush=True)
                    if not fault.survived:
                        break
                status = self._await(lambda: run.status() is not None, run.status, run)
            equal = status == 0 and json.loads(json.dumps(fingerprints(run.folder))) == reference
            if status != 0:
                print(f"  round {number} was lost: {run.last_words()}", flush=True)
            else:
                self._keep_logs(run, number)
        if status == 0 and not faults:
            raise UserError(
                "the run was over before the first fault; accepted: more epochs in train_flags"
            )
        if status == 0:
            _remove(folder)
        return [f._replace(survived=f.survived and status == 0, equal=equal) for f in faults]

    def _keep_logs(self, run: _SupervisedRun, number: int) -> None:
        logs = self.workdir / "logs" / f"round-{number}"
        shutil.copytree(run.logs, logs, dirs_exist_ok=True)

    def _disturb(self, run: _SupervisedRun, kind: str, choice: random.Random) -> Fault:
        pids = run.pids()
        worker = choice.randrange(1, len(pids))
        epoch, records = run.last_epoch(), run.records()
        at = time.time()
        noticed: float | None = None
        with contextlib.suppress(ProcessLookupError):
            if kind == "worker":
                os.kill(pids[worker], signal.SIGKILL)
            elif kind == "coordinator":
                os.kill(pids[0], signal.SIGKILL)
            elif kind == "two":
                for i in choice.sample(range(len(pids)), 2):
                    os.kill(pids[i], signal.SIGKILL)
            elif kind == "save":
                run.await_save(self.config.patience_seconds)
                epoch, records, at = run.last_epoch(), run.records(), time.time()
                os.kill(pids[choice.randrange(len(pids))], signal.SIGKILL)
            elif kind == "notice":
                os.kill(pids[worker], signal.SIGTERM)
            elif kind == "stop":
                os.kill(pids[worker], signal.SIGSTOP)
            elif kind == "slow":
                _slow_down(pids[worker], self.config.slow_seconds)
            elif kind == "damage":
                at = self._damage(run, pids[worker])
            elif kind == "disk":
                at, noticed = self._fill_disk(run)
        if kind == "slow":
            going = self._await(lambda: run.records_after(at), lambda: True, run)
            return Fault(0, 0, kind, epoch, None, None, None, 0, 0.0, bool(going), False)
        announced = self._await(
            lambda: run.announced(at) or run.status() is not None, lambda: run.announced(at), run
        )
        after = None
        if announced:
            after = self._await(
                lambda: run.records_after(announced) or run.status() is not None,
                lambda: run.records_after(announced),
                run,
            )
        if noticed is None:
            noticed = run.noticed(at)
        if not announced or (not after and run.status() != 0):
            return Fault(0, 0, kind, epoch, noticed, None, None, 0, 0.0, False, False)
        # What was done when it came, less what the run goes on from.
        resumed = after[0]["epoch"] - 1 if after else run.n_epochs()
        known = {r["epoch"]: r["seconds"] for r in [*records, *run.seen_before(announced)]}
        lost = [seconds for number, seconds in known.items() if number > resumed]
        finished = _seconds(after[0]) - at if after else None
        return Fault(
            0, 0, kind, epoch, noticed, announced - at, finished, len(lost), sum(lost), True, False
        )

    def _damage(self, run: _SupervisedRun, pid: int) -> float:
        """Kills, and flips a byte of the newest checkpoint before anything can start again."""
        os.kill(run.supervisor.pid, signal.SIGSTOP)
        try:
            for one in run.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            at = time.time()
            positions = Checkpoints(run.folder / "checkpoints").positions()
            if len(positions) > 1:  # Without one before it, damage is the end of any run.
                damage(run.folder / "checkpoints" / str(positions[-1]))
        finally:
            os.kill(run.supervisor.pid, signal.SIGCONT)
        return at

    def _fill_disk(self, run: _SupervisedRun) -> tuple[float, float | None]:
        """Fills the disk until the run gives up; then makes room, and starts the command again."""
        at = time.time()
        balloon = run.folder.parent / "balloon"
        with contextlib.suppress(OSError), open(balloon, "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))
        status = self._await(lambda: run.status() is not None, run.status, run)
        noticed = time.time() - at
        balloon.unlink()
        if status is None:
            return at, None
        restarted = time.time()
        run.start()
        return restarted, noticed


class _SupervisedRun:
    """One run of experiments.train under experiments.launch; a context manager."""

    def __init__(self, config: Config, folder: Path):
        self.folder = folder
        self.logs = folder / "processes"
        self._lines: list[tuple[float, str]] = []
        self._records: list[dict[str, Any]] = []
        self._version: tuple[int, int] | None = None
        self._started = False
        train = ["-m", "experiments.train", f"--config={config.train_config}", *config.train_flags]
        self._command = [
            sys.executable, "-m", "experiments.launch",
            f"--processes={config.n_processes}", f"--min_processes={config.n_processes}",
            "--max_restarts=1000", f"--hang_seconds={config.hang_seconds}",
            f"--spares={config.spares}", "--",
            sys.executable, *train, f"--workdir={folder}",
        ]  # fmt: skip

    def __enter__(self) -> _SupervisedRun:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.supervisor.poll() is None:
            for _ in range(2):
                self.supervisor.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.supervisor.wait(10)
            self.supervisor.kill()
        self.supervisor.wait()
        self._close()

    def _close(self) -> None:
        """Hears a supervisor that has ended to its end."""
        self._reader.join(5)
        if not self._reader.is_alive():  # Closing would wait for it.
            assert self.supervisor.stdout is not None
            self.supervisor.stdout.close()

    def start(self) -> None:
        """Starts the command, for the first time or, where it has ended, once more."""
        if self._started:
            self._close()
        self._started = True
        # As the supervisor has it where nobody else has said anything.
        environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.supervisor = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self.supervisor,), daemon=True)
        self._reader.start()

    def _read(self, supervisor: subprocess.Popen) -> None:
        assert supervisor.stdout is not None
        for line in supervisor.stdout:
            self._lines.append((time.time(), line.rstrip()))

    def status(self) -> int | None:
        return self.supervisor.poll()

    def last_words(self) -> str:
        return " / ".join(line for _, line in self._lines[-3:])

    def records(self) -> list[dict[str, Any]]:
        """The metrics so far; read again only where there are more of them."""
        with contextlib.suppress(UserError, OSError):
            status = (self.folder / METRICS_FILE).stat()
            now = (status.st_size, status.st_mtime_ns)
            if now != self._version:
                self._records, self._version = read_metrics(self.folder), now
            return self._records
        return []

    def records_after(self, at: float) -> list[dict[str, Any]]:
        return [record for record in self.records() if _seconds(record) > at]

    def seen_before(self, at: float) -> list[dict[str, Any]]:
        return [record for record in self.records() if _seconds(record) <= at]

    def last_epoch(self) -> int:
        return max((record["epoch"] for record in self.records()), default=0)

    def n_epochs(self) -> int:
        path = self.folder / "config.json"
        if not path.exists():
            return 1
        training = json.loads(path.read_text())["training"]
        return training["n_pretrain_epochs"] + training["n_epochs"]

    def events(self) -> list[dict[str, Any]]:
        path = self.logs / EVENTS_FILE
        events = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # Cut by a full disk.
                events.append(json.loads(line))
        return events

    def pids(self) -> list[int]:
        return [event["pids"] for event in self.events() if event["event"] == "start"][-1]

    def n_spares(self) -> int:
        """Processes that are ready for the next generation."""
        events = self.events()
        ready = {event["pid"] for event in events if event["event"] == "spare"}
        started = [pid for e in events if e["event"] == "start" for pid in e["pids"]]
        return len(ready.difference(started))

    def announced(self, at: float) -> float | None:
        """When the state was restored, after a time."""
        return next((t for t, line in self._lines if t > at and _ANNOUNCED in line), None)

    def noticed(self, at: float) -> float | None:
        """Seconds until the supervisor knew of what happened."""
        kinds = ("dead", "silent", "leave")
        times = [e["time"] for e in self.events() if e["event"] in kinds and e["time"] > at]
        return min(times) - at if times else None

    def await_save(self, patience: float) -> None:
        """Returns while a checkpoint is being written."""
        until = time.monotonic() + patience
        folder = self.folder / "checkpoints"
        while time.monotonic() < until and self.status() is None:
            if any("tmp" in path.name for path in folder.iterdir()):
                return
            time.sleep(_CUT_POLL_SECONDS)


def fingerprints(folder: Path) -> dict[str, Any]:
    """The checksums of all arrays of the last checkpoint of a run, which its results stand for.

    Raises:
      UserError: there is none that can be read.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        record = checkpoints.record(checkpoints.positions()[-1])
    except (IndexError, DamagedError) as error:
        raise UserError(f"{folder} has no checkpoint that can be read: {error}") from error
    results = {
        name: value
        for name, value in record["results"].items()
        if name not in ("train_seconds", "peak_host_mebibytes")
    }
    return {"arrays": record["fingerprints"], "results": results}


def damage(checkpoint: Path) -> None:
    """Flips the bits of one byte in the middle of the largest file of a checkpoint."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.parent.name == "d"]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)


def _slow_down(pid: int, seconds: float) -> None:
    """Stops a process for nine tenths of the time, for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.09)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)


def _seconds(record: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(record["time"]).timestamp()


# Disks


@contextlib.contextmanager
def _small_disk(folder: Path, small: bool) -> Iterator[None]:
    """A folder on a disk of its own, small enough to be filled, where one is wanted."""
    folder.mkdir(parents=True)
    if small:
        _mount(folder)
    try:
        yield
    finally:
        if small:
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def _mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    return False


def _can_mount(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    possible = _mount(folder)
    if possible:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
    folder.rmdir()
    return possible


def _remove(folder: Path) -> None:
    if folder.exists():
        # Of a round that was cut; nothing happens where it is no mount.
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
        shutil.rmtree(folder)


# Records


def _write(path: Path, faults: list[Fault]) -> None:
    lines = [Fault._fields, *(tuple("" if v is None else v for v in fault) for fault in faults)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_whole(path, text.getvalue().encode())


def _read(path: Path) -> list[Fault]:
    if not path.exists():
        return []

    def seconds(value: str) -> float | None:
        return float(value) if value else None

    try:
        with open(path, newline="") as file:
            return [
                Fault(
                    int(row["number"]), int(row["round"]), row["kind"], int(row["epoch"]),
                    seconds(row["noticed"]), seconds(row["recovered"]), seconds(row["next_epoch"]),
                    int(row["lost_epochs"]), float(row["lost_seconds"]),
                    row["survived"] == "True", row["equal"] == "True",
                )
                for row in csv.DictReader(file)
            ]  # fmt: skip
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to begin anew") from error


def _line(fault: Fault) -> str:
    parts = [f"{fault.kind} after epoch {fault.epoch}"]
    if fault.noticed is not None:
        parts.append(f"noticed in {fault.noticed:.2f} s")
    if fault.recovered is not None:
        parts.append(f"going on after {fault.recovered:.1f} s")
        parts.append(f"{fault.lost_epochs} epochs lost")
    parts.append("survived" if fault.survived else "LOST")
    return ", ".join(parts)


def table(faults: list[Fault], config: Config) -> str:
    """What came of the faults, by kind, as a table in Markdown."""
    lines = [
        "| fault | survived | noticed, s (median, most) | going on, s (median, most) | "
        "next epoch, s (median) | epochs lost (median, most) | equal result |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def spread(values: list, form: str) -> str:
        if not values:
            return "–"
        return f"{statistics.median(values):{form}}, {max(values):{form}}"

    rows = [*((kind, KINDS[kind]) for kind in config.kinds), ("", "all")]
    for kind, words in rows:
        of_kind = [fault for fault in faults if not kind or fault.kind == kind]
        if not of_kind:
            continue
        waits = [fault.next_epoch for fault in of_kind if fault.next_epoch is not None]
        cells = [
            words,
            f"{sum(fault.survived for fault in of_kind)} of {len(of_kind)}",
            spread([f.noticed for f in of_kind if f.noticed is not None], ".2f"),
            spread([f.recovered for f in of_kind if f.recovered is not None], ".1f"),
            f"{statistics.median(waits):.1f}" if waits else "–",
            spread([f.lost_epochs for f in of_kind if f.recovered is not None], ".0f"),
            f"{sum(fault.equal for fault in of_kind)} of {len(of_kind)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
