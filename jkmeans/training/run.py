"""The loop over the epochs of a run, and what stays the same in all of them."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans import datasets, processes, telling
from jkmeans.checkpoints import Checkpoints
from jkmeans.configuration import Config
from jkmeans.device_memory import device_memory, device_room
from jkmeans.epoch import CLUSTER_SIZES, Rows, TrainState
from jkmeans.errors import UserError
from jkmeans.feeding import HostFeeder
from jkmeans.interruption import Interruption
from jkmeans.networks import Blueprint
from jkmeans.recorder import NoRecorder, Recorder
from jkmeans.sharding import (
    BY_STEP,
    SHARDED,
    Layout,
    device_dtype,
    place,
    place_rows,
    to_host,
)
from jkmeans.training import checkpointing, collapse, conclusion
from jkmeans.training.folder import describe_data
from jkmeans.training.programs import Compiled, await_devices, prepare, scalars


class Run:
    """One run, of one process or several: what stays the same from its first epoch to its last."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        dataset: datasets.Dataset,
        mesh,
        like: Run | None = None,
    ):
        """Nothing is computed yet, on any device.

        Args:
          config: validated, of one seed.
          workdir: folder of the run.
          dataset: the examples.
          mesh: of the data axis.
          like: a run that differs in its seed and workdir only; it shares its programs.
        """
        self.config = config
        self.workdir = workdir
        self.dataset = dataset
        self.mesh = mesh
        self.layout = Layout(
            n_examples=dataset.n_examples,
            batch_size=config.training.batch_size,
            n_shards=config.data.n_shards,
            n_devices=mesh.size,
        )
        self.n_epochs = config.training.n_pretrain_epochs + config.training.n_epochs
        self.n_steps = self.layout.n_steps
        if like is not None:
            self.prepared = like.prepared
        else:
            self.prepared = prepare(config, dataset, self.layout, mesh)
        _refuse_too_large(self.prepared.blueprint, mesh)
        self.method, self.blueprint = self.prepared.method, self.prepared.blueprint
        self.programs = self.prepared.programs
        self.compiled = Compiled(self.prepared)
        self.data_record = describe_data(dataset) if like is None else like.data_record
        # Of whoever executes it: this run, or all seeds side by side.
        self.recorder: Recorder = NoRecorder()
        self.interruption = Interruption()

    # What is where

    @functools.cached_property
    def is_fed(self) -> bool:
        """Whether examples stay on the host and are fed."""
        placement = self.config.data.placement
        if placement != "auto":
            return placement == "host"
        value_bytes = device_dtype(self.dataset.examples.dtype).itemsize
        n_bytes = self.layout.n_rows * int(np.prod(self.dataset.example_shape)) * value_bytes
        return n_bytes / self.mesh.size > device_room(self.mesh)

    @functools.cached_property
    def rows(self) -> Rows:
        """The examples on the devices, or only their weights and numbers where they are fed."""
        index = self.layout.row_index()
        examples = None
        if not self.is_fed:
            examples = place_rows(self.dataset.examples, self.layout, self.mesh)
        return Rows(
            examples=examples,
            weights=place((index >= 0).astype(np.float32), self.mesh, SHARDED),
            index=place(index, self.mesh, SHARDED),
        )

    def forget_rows(self) -> None:
        """Gives the room of the examples on the devices back."""
        vars(self).pop("rows", None)

    @functools.cached_property
    def feeder(self) -> HostFeeder:
        """Feeds examples that stay on the host."""
        chunk_bytes = self.config.data.chunk_mebibytes * 2**20
        return HostFeeder(self.dataset.examples, self.layout, self.mesh, chunk_bytes)

    def create(self) -> TrainState:
        """The state before the first epoch."""
        return self.programs.create(np.uint32(self.config.seed % 2**32))

    # The run

    def execute(self, checkpoints: Checkpoints) -> dict[str, Any]:
        """Trains what is left to train, and reports."""
        restored, record = checkpointing.restore(self, checkpoints), None
        if restored is None:
            state, seconds = checkpointing.create_pretrained(
                self, checkpointing.find_pretrained(self)
            )
        else:
            state, record = restored
            seconds = record["seconds"]
        epoch = int(state.epoch)
        if record and record["results"]:
            telling.tell(f"{self.workdir} holds a finished run of this config; nothing to train")
            return conclusion.report_again(self, state, record["results"])
        with Interruption() as interruption, self._make_recorder(epoch, record) as recorder:
            self.recorder, self.interruption = recorder, interruption
            self._announce(epoch, record is not None)
            while epoch < self.n_epochs:
                started = time.perf_counter()
                state, values = self.run_epoch(state, epoch)
                seconds += time.perf_counter() - started
                if values is not None:
                    epoch += 1
                    reference = float(state.reference_variance)
                    collapse.check_epoch(self.config, self.workdir, values, reference, epoch)
                    if epoch == self.config.training.n_pretrain_epochs:
                        checkpointing.keep_pretrained(self, state, seconds)
                due = epoch % self.config.checkpoint.every == 0 or epoch == self.n_epochs
                # Asked once, at the end of the epoch: a signal that comes now is for the next one.
                stopping = interruption.agreed()
                if due or stopping:
                    checkpointing.save(self, checkpoints, state, seconds, values, results=None)
                if stopping:
                    checkpoints.wait()
                    recorder.say(f"saved; the same command goes on from epoch {epoch}")
                    interruption.leave()
            state, results = self.finish(state, seconds)
            checkpointing.save(self, checkpoints, state, seconds, None, results=results)
            checkpoints.wait()
            if interruption.agreed():
                recorder.say("trained and saved; the same command reports it")
                interruption.leave()
        return conclusion.report(self, state, results)

    def _make_recorder(self, epoch: int, record: dict[str, Any] | None) -> Recorder:
        """The recorder from ``epoch`` on; one that records nothing where that is process 0's."""
        if not processes.is_first():
            return NoRecorder()
        return Recorder(
            self.workdir, n_epochs=self.n_epochs, position=epoch, resumed=record is not None
        )

    def _announce(self, epoch: int, resumed: bool) -> None:
        """Says once what is about to run, and on what."""
        devices = f"{self.mesh.size} × {self.mesh.devices.flat[0].platform}"
        if processes.count() > 1:
            devices += f" of {processes.count()} processes"
        feeding = "fed from the host" if self.is_fed else "on the devices"
        self.recorder.say(
            f"{self.dataset.name}: {self.dataset.n_examples:,} examples {feeding} ({devices}), "
            f"{self.n_steps} steps of {self.layout.effective_batch_size} an epoch"
        )
        if resumed:
            self.recorder.say(f"going on after epoch {epoch} of {self.n_epochs}")

    def run_epoch(
        self, state: TrainState, epoch: int
    ) -> tuple[TrainState, dict[str, float] | None]:
        """One epoch, from wherever the state stands in it.

        Returns:
          The state and the metrics of the epoch; None for these where the examples are fed and an
          interruption was asked for before its end.
        """
        n_pretrain = self.config.training.n_pretrain_epochs
        clustering = epoch >= n_pretrain
        if int(state.step) == 0:
            state = self.begin_epoch(state, epoch - n_pretrain)
        started, self.compiled.seconds = time.perf_counter(), 0.0
        first_step = int(state.step)
        if self.is_fed:
            state, values = self._fed_epoch(state, clustering)
            if values is None:
                return state, None
        elif first_step:
            state, values = self._rest_of_epoch(state, clustering)
        else:
            state, values = self.compiled("epoch", state, self.rows, clustering=clustering)
        self._await(values)
        seconds = time.perf_counter() - started - self.compiled.seconds
        named = scalars(values)
        if clustering:
            named |= conclusion.scores(self, state)
        self.recorder.epoch(
            "cluster" if clustering else "pretrain",
            epoch + 1,
            named,
            round(self.dataset.n_examples * (1 - first_step / self.n_steps)),
            seconds,
            to_host(values[CLUSTER_SIZES]) if CLUSTER_SIZES in values else None,
        )
        return state, named

    def _fed_epoch(self, state: TrainState, clustering: bool):
        order = to_host(self.compiled("order", state))
        done = first = int(state.step)
        for rows, examples in self.feeder.chunks(order, first):
            state = self.compiled("steps", state, self.rows, rows, examples, clustering=clustering)
            # One chunk at a time: see docs/architecture.md, "Fake devices".
            done += len(rows)
            self._await(state.step, done / self.n_steps)
            self.recorder.waiting(done / self.n_steps)
            if done < self.n_steps and self.interruption.agreed():
                return state, None
        return self._finish_epoch(state, clustering)

    def _rest_of_epoch(self, state: TrainState, clustering: bool):
        """What is left of an epoch that stopped while its examples were fed from the host."""
        order = to_host(self.compiled("order", state))[int(state.step) :]
        order = place(order, self.mesh, BY_STEP)
        state = self.compiled("steps", state, self.rows, order, None, clustering=clustering)
        self._await(state.step)  # One program at a time: see docs/architecture.md, "Fake devices".
        return self._finish_epoch(state, clustering)

    def _finish_epoch(self, state: TrainState, clustering: bool):
        if clustering and self.config.centroids.bank == "refreshed":
            state = self.refresh(state)
        return self.compiled("finish", state, self.rows, clustering=clustering)

    def refresh(self, state: TrainState) -> TrainState:
        """Embeds every example with the weights as they are now."""
        if not self.is_fed:
            return self.compiled("refresh", state, self.rows)
        for rows, examples in self.feeder.chunks(self.feeder.in_row_order()):
            state = self.compiled("fill", state, rows, examples)
            self._await(state.step, 0.0)
        return state

    def begin_epoch(self, state: TrainState, n_done: int) -> TrainState:
        """What happens between two epochs, ``n_done`` of them done since clustering began."""
        if n_done == 0:
            return self.initialize(state)
        every = self.config.reset.every
        if not every or n_done < 0 or n_done % every:
            return state
        state = self.compiled("reset", state)
        state, values = self.compiled("restart", self.refresh(state), self.rows)
        self._await(values, 0.0)
        self.recorder.say(f"soft reset, new clusters: inertia {float(values['inertia']):.4g}")
        return state

    def initialize(self, state: TrainState) -> TrainState:
        """The first centroids, from the embeddings of all examples."""
        state = self.refresh(state)
        state, values = self.compiled("initialize", state, self.rows)
        self._await(values, 0.0)
        found = scalars(values)
        collapse.check_pretrained(self.config, self.workdir, found)
        text = (
            f"first centroids ({self.config.centroids.init}): inertia {found['inertia']:.4g}, "
            f"variance of the embeddings {found['embedding_variance']:.4g}, "
            f"{found['empty_clusters']:.0f} empty"
        )
        if scores := conclusion.scores(self, state):
            text += f", acc {scores['acc']:.3f}, nmi {scores['nmi']:.3f}"
        self.recorder.say(text)
        return state

    def finish(self, state: TrainState, seconds: float) -> tuple[TrainState, dict[str, Any]]:
        """Final centroids and labels: k-means on the embeddings by the final weights."""
        started = time.perf_counter()
        if self.config.training.n_epochs == 0:
            state = self.initialize(state)
        else:
            state = self.refresh(state)
        n_iterations = np.int32(self.config.centroids.final_max_iter)
        state, values = self.compiled("assign", state, self.rows, n_iterations)
        self._await(values, 1.0)
        found = scalars(values)
        seconds += time.perf_counter() - started
        return conclusion.conclude(self, state, found, seconds)

    def _await(self, values: Any, fraction: float | None = None) -> None:
        await_devices(values, self.recorder, self.interruption, fraction)


def _refuse_too_large(plan: Blueprint, mesh) -> None:
    """Refuses a network whose parameters and gradients alone are more than a device holds.

    Raises:
      UserError: it is one.
    """
    n_parameters = sum(math.prod(leaf.shape) for leaf in plan.parameters.values())
    n_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plan.parameters.values())
    memory = device_memory(mesh)
    if 2 * n_bytes > memory:
        raise UserError(
            f"the network has {n_parameters:,} parameters, which with their gradients take "
            f"{2 * n_bytes / 2**30:,.1f} GiB; accepted: what fits the {memory / 2**30:,.1f} GiB of "
            "a device (config.network.widths and embedding_dim say how wide its layers are)"
        )
