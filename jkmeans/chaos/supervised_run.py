"""A run under the supervisor, seen from outside: its processes, its metrics, its checkpoints."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.processes.supervisor import EVENTS_FILE
from jkmeans.recorder import METRICS_FILE, read_metrics
from jkmeans.workdir import CHECKPOINT_FOLDER, CONFIG_FILE

_CUT_POLL_SECONDS = 0.0005
_ANNOUNCED = "steps of"


class SupervisedRun:
    """One run of experiments.train under experiments.launch; a context manager."""

    def __init__(self, config: Config, folder: Path):
        self.folder = folder
        self.logs = folder / "processes"
        self._lines: list[tuple[float, str]] = []
        self._records: list[dict[str, Any]] = []
        self._version: tuple[int, int] | None = None
        self._reader: threading.Thread | None = None
        train = ["-m", "experiments.train", f"--config={config.train_config}", *config.train_flags]
        self._command = [
            sys.executable, "-m", "experiments.launch",
            f"--processes={config.n_processes}", f"--min_processes={config.n_processes}",
            "--max_restarts=1000", f"--hang_seconds={config.hang_seconds}",
            f"--spares={config.spares}", "--",
            sys.executable, *train, f"--workdir={folder}",
        ]  # fmt: skip

    def __enter__(self) -> SupervisedRun:
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
        assert self._reader is not None
        self._reader.join(5)
        if not self._reader.is_alive():  # Closing would wait for it.
            assert self.supervisor.stdout is not None
            self.supervisor.stdout.close()

    def start(self) -> None:
        """Starts the command, for the first time or, where it has ended, once more."""
        if self._reader is not None:
            self._close()
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
        """How the supervisor ended; None while it runs."""
        return self.supervisor.poll()

    def last_words(self) -> str:
        """The last lines of what was said."""
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
        """The metrics of epochs that ended after a time."""
        return [record for record in self.records() if seconds_of(record) > at]

    def seen_before(self, at: float) -> list[dict[str, Any]]:
        """The metrics of epochs that ended up to a time."""
        return [record for record in self.records() if seconds_of(record) <= at]

    def last_epoch(self) -> int:
        """The last epoch that has ended; 0 before the first."""
        return max((record["epoch"] for record in self.records()), default=0)

    def n_epochs(self) -> int:
        """Of the whole run; 1 as long as its config is not written."""
        path = self.folder / CONFIG_FILE
        if not path.exists():
            return 1
        training = json.loads(path.read_text())["training"]
        return training["n_pretrain_epochs"] + training["n_epochs"]

    def events(self) -> list[dict[str, Any]]:
        """What the supervisor has noted."""
        path = self.logs / EVENTS_FILE
        events = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # Cut by a full disk.
                events.append(json.loads(line))
        return events

    def pids(self) -> list[int]:
        """The processes that were started last."""
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

    def kill_and_damage(self) -> float:
        """Kills all processes, and damages the newest checkpoint before anything starts again.

        Returns:
          When the processes were killed.
        """
        os.kill(self.supervisor.pid, signal.SIGSTOP)
        try:
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            at = time.time()
            positions = Checkpoints(self.folder / CHECKPOINT_FOLDER).positions()
            if len(positions) > 1:  # Without one before it, damage is the end of any run.
                damage(self.folder / CHECKPOINT_FOLDER / str(positions[-1]))
        finally:
            os.kill(self.supervisor.pid, signal.SIGCONT)
        return at

    def await_save(self, patience: float) -> None:
        """Returns while a checkpoint is being written."""
        until = time.monotonic() + patience
        folder = self.folder / CHECKPOINT_FOLDER
        while time.monotonic() < until and self.status() is None:
            if any("tmp" in path.name for path in folder.iterdir()):
                return
            time.sleep(_CUT_POLL_SECONDS)


def seconds_of(record: dict[str, Any]) -> float:
    """When a record of the metrics was written, in seconds since the epoch."""
    return datetime.datetime.fromisoformat(record["time"]).timestamp()


def fingerprints(folder: Path) -> dict[str, Any]:
    """The checksums of all arrays of the last checkpoint of a run, which its results stand for.

    Raises:
      UserError: there is none that can be read.
    """
    checkpoints = Checkpoints(folder / CHECKPOINT_FOLDER)
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
