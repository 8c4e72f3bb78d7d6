"""Runs of several seeds as one program, every array of the state with an axis of seeds in front."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans import datasets
from jkmeans.checkpoints import Checkpoints
from jkmeans.configuration import Config
from jkmeans.device_memory import device_room
from jkmeans.epoch import CLUSTER_SIZES, Rows, TrainState, axis_of
from jkmeans.interruption import Interruption
from jkmeans.recorder import Recorder, silence
from jkmeans.sharding import REPLICATED, SHARDED, Layout, place, place_rows, relayout, to_host
from jkmeans.training import checkpointing, collapse, conclusion
from jkmeans.training.programs import Compiled, await_devices, prepare, scalars
from jkmeans.training.run import Run


class Member:
    """The run of a seed among those of others, and where it stands.

    Attributes:
      run: of the seed.
      checkpoints: of its folder.
      state: where it goes on; None where it begins.
      record: of that checkpoint.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints):
        self.run = run
        self.checkpoints = checkpoints
        self.state: TrainState | None = None
        self.record: dict[str, Any] | None = None

    def go_back(self, among: Collection[int] | None = None) -> bool:
        """Takes the newest whole checkpoint, see `checkpointing.restore`; whether there is one."""
        found = checkpointing.restore(self.run, self.checkpoints, among)
        self.state, self.record = found or (None, None)
        return self.state is not None

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.run.config.seed

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return 0 if self.state is None else int(self.state.epoch)

    @property
    def within_epoch(self) -> bool:
        """Whether it stopped within an epoch, as a run of its own whose examples are fed can."""
        return self.state is not None and int(self.state.step) > 0


class SideBySide:
    """Runs of several seeds as one: their states stacked, their folders their own.

    Args:
      config: of all, with their number.
      dataset: the examples.
      workdir: for the means of their metrics.
      members: the seeds, which stand at the same place.
    """

    def __init__(
        self,
        config: Config,
        dataset: datasets.Dataset,
        workdir: Path,
        members: Sequence[Member],
    ):
        self.config = config
        self.workdir = workdir
        self.dataset = dataset
        self.members = members
        self.runs = [member.run for member in members]
        self.mesh = self.runs[0].mesh
        one_layout = self.runs[0].layout
        self.layout = one_layout
        if self._deal_seeds():
            self.layout = Layout(
                one_layout.n_examples, config.training.batch_size, config.data.n_shards, 1
            )
        prepared = prepare(config, dataset, self.layout, self.mesh)
        self.programs = prepared.programs
        index = self.layout.row_index()
        spec = SHARDED if axis_of(self.layout, self.mesh) else REPLICATED
        self.rows = Rows(
            examples=place_rows(dataset.examples, self.layout, self.mesh, spec),
            weights=place((index >= 0).astype(np.float32), self.mesh, spec),
            index=place(index, self.mesh, spec),
        )
        self.compiled = Compiled(prepared)

    def _deal_seeds(self) -> bool:
        """Whether devices are to share the seeds and not the examples."""
        n_devices = self.mesh.size
        n_bytes = self.dataset.examples.nbytes
        room = device_room(self.mesh)
        return n_devices > 1 and self.config.n_seeds % n_devices == 0 and n_bytes <= room

    def execute(self) -> list[dict[str, Any]]:
        """Trains what is left to train, and reports each seed; their results."""
        with contextlib.ExitStack() as stack:
            return self._train(stack)

    def _begin(self) -> tuple[list[TrainState], float, bool]:
        """The states of all seeds, the seconds they stand for, and whether records go on."""
        states = [member.state for member in self.members if member.state is not None]
        if states:
            seconds = [member.record["seconds"] for member in self.members if member.record]
            return states, sum(seconds), True
        found = [checkpointing.find_pretrained(run) for run in self.runs]
        if any(network is None for network in found):  # All are pretrained where one is to be.
            found = [None] * len(found)
        pairs = zip(self.runs, found, strict=True)
        begun = [checkpointing.create_pretrained(run, network) for run, network in pairs]
        return [state for state, _ in begun], sum(seconds for _, seconds in begun), False

    def _train(self, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
        config, n_epochs = self.config, self.runs[0].n_epochs
        states, seconds, resumed = self._begin()
        epoch = int(states[0].epoch)
        state = self._stack(states)
        del states
        for member in self.members:
            member.state = None  # They take room on the devices.
        interruption = stack.enter_context(Interruption())
        position: dict[str, Any] = {"n_epochs": n_epochs, "position": epoch, "resumed": resumed}
        recorder = stack.enter_context(Recorder(self.workdir, **position))
        with silence():
            recorders = [stack.enter_context(Recorder(r.workdir, **position)) for r in self.runs]
        for run in self.runs:
            run.recorder, run.interruption = recorder, interruption
        dealt = "dealt to" if self.layout.n_devices < self.mesh.size else "together on"
        recorder.say(
            f"{self.dataset.name}: {self.dataset.n_examples:,} examples, {config.n_seeds} seeds "
            f"{dealt} {self.mesh.size} × {self.mesh.devices.flat[0].platform}"
        )
        while epoch < n_epochs:
            started, self.compiled.seconds = time.perf_counter(), 0.0
            state, values = self._epoch(state, epoch)
            self._await(values)
            duration = time.perf_counter() - started
            seconds += duration
            epoch += 1
            named = self._named(state, values)
            sizes = to_host(values[CLUSTER_SIZES]) if CLUSTER_SIZES in values else None
            computing = duration - self.compiled.seconds
            self._record(recorder, recorders, epoch, named, sizes, computing)
            references = to_host(state.reference_variance)
            for run, found, reference in zip(self.runs, named, references, strict=True):
                collapse.check_epoch(run.config, run.workdir, found, float(reference), epoch)
            pretrained = epoch == config.training.n_pretrain_epochs
            due = epoch % config.checkpoint.every == 0 or epoch == n_epochs
            if due or pretrained or interruption.requested:
                ones = self._unstack(state)
                self._save(ones, seconds, named, [None] * len(ones))
                if pretrained:
                    for run, one in zip(self.runs, ones, strict=True):
                        checkpointing.keep_pretrained(run, one, seconds / len(ones))
            if interruption.requested:
                recorder.say(f"saved; the same command goes on from epoch {epoch}")
                interruption.leave()
        results, ones = self._finish(state, seconds)
        self._save(ones, seconds, [None] * len(ones), results)
        if interruption.requested:
            recorder.say("trained and saved; the same command reports it")
            interruption.leave()
        for run, one, found in zip(self.runs, ones, results, strict=True):
            with silence():
                conclusion.report(run, one, found)
        return results

    # One epoch, one end

    def _epoch(self, state: TrainState, epoch: int):
        n_done = epoch - self.config.training.n_pretrain_epochs
        if n_done == 0:
            state = self._call("refresh", state, self.rows)
            state, values = self._call("initialize", state, self.rows)
            self._check_pretrained(values)
        elif n_done > 0 and self.config.reset.every and n_done % self.config.reset.every == 0:
            state = self._call("refresh", self._call("reset", state), self.rows)
            state, _ = self._call("restart", state, self.rows)
        return self._call("epoch", state, self.rows, clustering=n_done >= 0)

    def _finish(self, state: TrainState, seconds: float):
        started = time.perf_counter()
        state = self._call("refresh", state, self.rows)
        if self.config.training.n_epochs == 0:
            state, found = self._call("initialize", state, self.rows)
            self._check_pretrained(found)
        n_iterations = np.int32(self.config.centroids.final_max_iter)
        state, values = self._call("assign", state, self.rows, n_iterations)
        self._await(values)
        seconds = (seconds + time.perf_counter() - started) / len(self.runs)
        ends = []
        for i, (run, one) in enumerate(zip(self.runs, self._unstack(state), strict=True)):
            found = scalars({name: to_host(value)[i] for name, value in values.items()})
            ends.append(conclusion.conclude(run, one, found, seconds))
        return [results for _, results in ends], [one for one, _ in ends]

    def _check_pretrained(self, values) -> None:
        hosts = {name: to_host(value) for name, value in values.items()}
        for i, run in enumerate(self.runs):
            found = scalars({name: value[i] for name, value in hosts.items()})
            collapse.check_pretrained(run.config, run.workdir, found)

    def _named(self, state: TrainState, values) -> list[dict[str, float]]:
        """The metrics of an epoch, of each seed."""
        hosts = {name: to_host(value) for name, value in values.items()}
        named = [
            scalars({name: value[i] for name, value in hosts.items()})
            for i in range(len(self.runs))
        ]
        if "inertia" in hosts:
            labels = to_host(state.labels)[:, self.layout.row_index() >= 0]
            for run, found, one in zip(self.runs, named, labels, strict=True):
                found |= conclusion.scores_of(run, one)
        return named

    def _record(self, recorder, recorders, epoch: int, named, sizes, seconds: float) -> None:
        """Records an epoch of each seed, and the means of all."""
        phase = "cluster" if epoch > self.config.training.n_pretrain_epochs else "pretrain"
        n_examples = self.dataset.n_examples
        sizes = [None] * len(named) if sizes is None else sizes
        for one, found, of_one in zip(recorders, named, sizes, strict=True):
            one.epoch(phase, epoch, found, n_examples, seconds, of_one)
        means = {name: float(np.mean([found[name] for found in named])) for name in named[0]}
        recorder.epoch(phase, epoch, means, n_examples * len(named), seconds)

    # States, together and apart

    def _stack(self, states: Sequence[TrainState]) -> TrainState:
        def rows(leaf):
            return relayout(leaf, self.layout, self.mesh, REPLICATED)

        ones = [s._replace(bank=rows(s.bank), labels=rows(s.labels)) for s in states]
        hosts = [jax.tree.map(to_host, one) for one in ones]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *hosts)
        prefix = self.programs.shardings
        return TrainState(
            *[
                jax.tree.map(lambda leaf, s=sharding: jax.device_put(leaf, s), value)
                for value, sharding in zip(stacked, prefix, strict=True)
            ]
        )

    def _unstack(self, state: TrainState) -> list[TrainState]:
        host = jax.tree.map(to_host, state)
        ones = []
        for i, run in enumerate(self.runs):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], host)
            shardings = run.programs.shardings
            placed = TrainState(
                *[
                    value
                    if name in ("bank", "labels")
                    else jax.tree.map(lambda leaf, s=sharding: jax.device_put(leaf, s), value)
                    for name, value, sharding in zip(
                        TrainState._fields, one, shardings, strict=True
                    )
                ]
            )
            ones.append(
                placed._replace(
                    bank=relayout(one.bank, run.layout, self.mesh),
                    labels=relayout(one.labels, run.layout, self.mesh),
                )
            )
        return ones

    def _save(self, states, seconds, values, results) -> None:
        each = zip(self.members, states, values, results, strict=True)
        for member, state, named, found in each:
            # Its share: others may train beside it when it goes on.
            share = seconds / len(self.members)
            checkpointing.save(member.run, member.checkpoints, state, share, named, found)
        for member in self.members:
            member.checkpoints.wait()

    # Programs

    def _call(self, name: str, *arguments, **static):
        result = self.compiled(name, *arguments, **static)
        # One program at a time: see docs/architecture.md, "Fake devices".
        self._await(result)
        return result

    def _await(self, values) -> None:
        run = self.runs[0]
        await_devices(values, run.recorder, run.interruption)
