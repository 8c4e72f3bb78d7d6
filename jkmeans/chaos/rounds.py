"""Rounds of faults: a run is disturbed several times, and what became of it is written down."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jkmeans.chaos.disks import can_mount, remove, small_disk
from jkmeans.chaos.records import Fault, line, read_faults, table, write_faults
from jkmeans.chaos.supervised_run import (
    SupervisedRun,
    fingerprints,
    seconds_of,
)
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption
from jkmeans.whole_files import write_json, write_whole

FAULTS_FILE, TABLE_FILE, REFERENCE_FILE = "faults.csv", "chaos.md", "reference.json"
_POLL_SECONDS = 0.02


class Chaos:
    """The rounds of one experiment; a config as `settings.validate` gives it."""

    def __init__(self, config: Config, workdir: Path, interruption: Interruption):
        self.config = config
        self.workdir = workdir
        self.interruption = interruption
        self.kinds = list(config.kinds)
        if "disk" in self.kinds and not can_mount(workdir / "try"):
            print("no disk can be filled here: that takes the right to mount a tmpfs (root)")
            self.kinds.remove("disk")
            if not self.kinds:
                raise UserError("config.kinds is ('disk',), which is not possible on this machine")

    def execute(self) -> list[Fault]:
        """The undisturbed run, then rounds until there were enough faults."""
        reference = self._reference()
        faults = read_faults(self.workdir / FAULTS_FILE)
        while len(faults) < self.config.n_faults:
            self._stop_if_asked()
            number = faults[-1].round + 1 if faults else 0
            found = self._round(number, len(faults), reference)
            faults += found
            write_faults(self.workdir / FAULTS_FILE, faults)
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
        with contextlib.suppress(FileNotFoundError, ValueError):  # Made again where it is damaged.
            there = json.loads(path.read_bytes())
            if isinstance(there, dict) and {"arrays", "results"} <= set(there):
                return there
        print("the undisturbed run", flush=True)
        folder = self.workdir / "undisturbed"
        run = SupervisedRun(self.config, folder)
        with run:
            status = self._await(lambda: run.status() is not None, run.status, run)
        if status != 0:
            raise UserError(f"the undisturbed run failed: {run.last_words()}")
        return write_json(path, fingerprints(folder))

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
        remove(folder)
        faults: list[Fault] = []
        with small_disk(folder, "disk" in kinds):
            run = SupervisedRun(config, folder / "run")
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
                    print(f"  {line(faults[-1])}", flush=True)
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
            remove(folder)
        return [f._replace(survived=f.survived and status == 0, equal=equal) for f in faults]

    def _keep_logs(self, run: SupervisedRun, number: int) -> None:
        logs = self.workdir / "logs" / f"round-{number}"
        shutil.copytree(run.logs, logs, dirs_exist_ok=True)

    def _disturb(self, run: SupervisedRun, kind: str, choice: random.Random) -> Fault:
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
                at = run.kill_and_damage()
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
        finished = seconds_of(after[0]) - at if after else None
        return Fault(
            0, 0, kind, epoch, noticed, announced - at, finished, len(lost), sum(lost), True, False
        )

    def _fill_disk(self, run: SupervisedRun) -> tuple[float, float | None]:
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


def _slow_down(pid: int, seconds: float) -> None:
    """Stops a process for nine tenths of the time, for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.09)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
