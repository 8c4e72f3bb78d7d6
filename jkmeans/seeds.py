"""Several seeds of one config: one run after the other, or side by side in one program.

Side by side, every array of the state has an axis of seeds in front, and every program of an epoch
is a ``vmap`` over it. What is kept on disk is the same either way: each seed has the folder of a
run, with its config, checkpoints, metrics and results, which `jkmeans.evaluation` reads as any
other.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans import configuration, datasets, processes
from jkmeans.checkpoints import Checkpoints
from jkmeans.configuration import Config
from jkmeans.epoch import CLUSTER_SIZES, Rows, TrainState, axis_of, make_programs
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption
from jkmeans.methods import make_method
from jkmeans.networks import blueprint
from jkmeans.recorder import Recorder, results_table, silence
from jkmeans.sharding import (
    REPLICATED,
    SHARDED,
    Layout,
    make_mesh,
    place,
    place_rows,
    relayout,
    to_host,
)
from jkmeans.training import (
    Run,
    claim_workdir,
    scalars,
    train_and_evaluate,
)
from jkmeans.workdir import CHECKPOINT_FOLDER, device_room, only_process_in, write_json

SEEDS_FILE = "seeds.json"


def train_seeds(config: Config, workdir: str | os.PathLike, n_seeds: int) -> dict[str, Any]:
    """Trains the same config from ``n_seeds`` seeds, one run after the other.

    Args:
      config: as for `train_and_evaluate`; its seed is the first, the others follow.
      workdir: receives a folder ``seed_<i>`` for each run and ``seeds.json``. Runs that are there
        already are gone on with, or reported again.
      n_seeds: at least 1.

    Returns:
      ``{metric: {"mean", "sd", "values"}}`` of every numeric result; sd is the sample standard
      deviation, 0 for a single seed.

    Raises:
      UserError, CollapseError, Interrupted: as `train_and_evaluate`.
    """
    workdir = Path(workdir)
    config = configuration.validate(config)
    if config.n_seeds != 1:
        raise UserError(
            f"config.n_seeds is {config.n_seeds}, and seeds side by side are trained by "
            "experiments.train; accepted: 1, with --n_seeds"
        )
    ones = [_of_seed(config, config.seed + i) for i in range(n_seeds)]
    results = [train_and_evaluate(one, workdir / f"seed_{one.seed}") for one in ones]
    return summarize(results, workdir)


def train_side_by_side(
    config: Config, dataset: datasets.Dataset, workdir: str | os.PathLike
) -> dict[str, Any]:
    """Trains ``config.n_seeds`` seeds, from ``config.seed`` on, in one program.

    Where the seeds can be dealt evenly to several devices, every device has all examples and some
    of the seeds, and no step communicates; otherwise examples are sharded and every device has all
    seeds. Batches, views and results of a seed are those of a run of its own, to rounding.

    Args:
      config: validated; ``n_seeds`` at least 2.
      dataset: the examples, which must have room on the devices.
      workdir: as for `train_seeds`; an interrupted run goes on.

    Returns:
      As `train_seeds`.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      CollapseError: of any of the seeds.
      Interrupted: everything up to the last epoch is saved.
    """
    return _SideBySide(config, dataset, Path(workdir).absolute()).execute()


def summarize(results: Sequence[dict[str, Any]], workdir: Path) -> dict[str, Any]:
    """Writes and prints mean and deviation of every numeric result; see `train_seeds`."""
    summary = {}
    for name, first in results[0].items():
        if isinstance(first, int | float):
            values = [one[name] for one in results]
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary[name] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    if processes.is_first():
        write_json(workdir / SEEDS_FILE, summary)
    rows = {name: _mean_and_sd(found) for name, found in summary.items()}
    results_table(rows, f"{len(results)} seeds in {workdir}")
    return summary


def _mean_and_sd(found: dict[str, Any]) -> str:
    if len(found["values"]) == 1 or not found["sd"]:
        return f"{found['mean']:.4g}"
    return f"{found['mean']:.4g} ± {found['sd']:.2g}"


def _of_seed(config: Config, seed: int) -> Config:
    one = config.copy_and_resolve_references()
    one.seed, one.n_seeds = seed, 1
    return one


class _SideBySide:
    """Runs of several seeds as one: their states stacked, their folders their own."""

    def __init__(self, config: Config, dataset: datasets.Dataset, workdir: Path):
        if processes.count() > 1:
            raise UserError(
                f"config.n_seeds is {config.n_seeds}, but there are {processes.count()} processes; "
                "accepted: 1, or experiments.seeds, which trains one seed after the other"
            )
        self.config = config
        self.workdir = workdir
        self.dataset = dataset
        self.mesh = make_mesh(config.n_devices)
        self.runs: list[Run] = []
        for seed in range(config.seed, config.seed + config.n_seeds):
            like = self.runs[0] if self.runs else None
            folder = workdir / f"seed_{seed}"
            self.runs.append(Run(_of_seed(config, seed), folder, dataset, self.mesh, like))
        if self.runs[0].on_host:
            raise UserError(
                f"config.n_seeds is {config.n_seeds}, but the examples are fed from the host; "
                "accepted: 1, or data.placement = 'device' and room for all examples"
            )
        one_layout = self.runs[0].layout
        self.layout = one_layout
        if self._deal_seeds():
            self.layout = Layout(
                one_layout.n_examples, config.training.batch_size, config.data.n_shards, 1
            )
        axis = axis_of(self.layout, self.mesh)
        self.programs = make_programs(
            config,
            blueprint(config.network, dataset.example_shape, config.training.pretrain_precision),
            make_method(config, axis),
            self.layout,
            self.mesh,
            dataset.example_shape,
            dataset.scale,
        )
        index = self.layout.row_index()
        spec = SHARDED if axis else REPLICATED
        self.rows = Rows(
            examples=place_rows(dataset.examples, self.layout, self.mesh, spec),
            weights=place((index >= 0).astype(np.float32), self.mesh, spec),
            index=place(index, self.mesh, spec),
        )
        self._compiled: dict[tuple, Callable] = {}
        self._compiling = 0.0

    def _deal_seeds(self) -> bool:
        """Whether devices are to share the seeds and not the examples."""
        n_devices = self.mesh.size
        n_bytes = self.dataset.examples.nbytes
        room = device_room(self.mesh)
        return n_devices > 1 and self.config.n_seeds % n_devices == 0 and n_bytes <= room

    def execute(self) -> dict[str, Any]:
        """Trains what is left to train, and reports."""
        with contextlib.ExitStack() as stack:
            for run in self.runs:
                claim_workdir(run.workdir, run.config)
                stack.enter_context(only_process_in(run.workdir))
            checkpoints = [
                stack.enter_context(
                    Checkpoints(run.workdir / CHECKPOINT_FOLDER, keep=run.config.checkpoint.keep)
                )
                for run in self.runs
            ]
            states, records = self._begin(checkpoints)
            finished = [record["results"] for record in records if record and record["results"]]
            if len(finished) == len(self.runs):
                print(f"{self.workdir} holds finished runs of this config; nothing to train")
                with silence():
                    finished = [
                        run.report_again(state, results)
                        for run, state, results in zip(self.runs, states, finished, strict=True)
                    ]
                return summarize(finished, self.workdir)
            return self._train(stack, checkpoints, states, records)

    def _begin(self, checkpoints: Sequence[Checkpoints]):
        """The states of all seeds at the same place of training, with their records."""
        common = set.intersection(*(set(one.positions()) for one in checkpoints))
        restored = [
            run.restore(one, common) if common else None
            for run, one in zip(self.runs, checkpoints, strict=True)
        ]
        found = [one for one in restored if one is not None]
        places = {(int(state.epoch), bool(record["results"])) for state, record in found}
        if len(found) == len(self.runs) and len(places) == 1:
            return [state for state, _ in found], [record for _, record in found]
        if common:
            raise UserError(
                f"the seeds in {self.workdir} have no checkpoint in common that can be read; "
                "accepted: another --workdir, or the seeds one by one"
            )
        begun = [run.create_pretrained() for run in self.runs]
        if len({int(state.epoch) for state, _ in begun}) > 1:
            return [run.create() for run in self.runs], [None] * len(self.runs)
        seconds = sum(one for _, one in begun)
        return [state for state, _ in begun], [{"seconds": seconds, "results": None}] * len(begun)

    def _train(self, stack, checkpoints, states, records) -> dict[str, Any]:
        config, n_epochs = self.config, self.runs[0].n_epochs
        seconds = records[0]["seconds"] if records[0] else 0.0
        epoch = int(states[0].epoch)
        resumed = records[0] is not None and "epoch" in records[0]
        state = self._stack(states)
        del states
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
            started, self._compiling = time.perf_counter(), 0.0
            state, values = self._epoch(state, epoch)
            self._await(values)
            duration = time.perf_counter() - started
            seconds += duration
            epoch += 1
            named = self._named(state, values)
            phase = "cluster" if epoch > config.training.n_pretrain_epochs else "pretrain"
            n_examples = self.dataset.n_examples
            sizes = (
                to_host(values[CLUSTER_SIZES]) if CLUSTER_SIZES in values else [None] * len(named)
            )
            for one, found, of_one in zip(recorders, named, sizes, strict=True):
                one.epoch(phase, epoch, found, n_examples, duration - self._compiling, of_one)
            means = {name: float(np.mean([found[name] for found in named])) for name in named[0]}
            recorder.epoch(phase, epoch, means, n_examples * len(named), duration - self._compiling)
            references = to_host(state.reference_variance)
            for run, found, reference in zip(self.runs, named, references, strict=True):
                run.check_collapse(found, float(reference), epoch)
            pretrained = epoch == config.training.n_pretrain_epochs
            due = epoch % config.checkpoint.every == 0 or epoch == n_epochs
            if due or pretrained or interruption.requested:
                ones = self._unstack(state)
                self._save(checkpoints, ones, seconds, named, [None] * len(ones))
                if pretrained:
                    for run, one in zip(self.runs, ones, strict=True):
                        run.keep_pretrained(one, seconds / len(ones))
            if interruption.requested:
                recorder.say(f"saved; the same command goes on from epoch {epoch}")
                interruption.leave()
        results, ones = self._finish(state, seconds)
        self._save(checkpoints, ones, seconds, [None] * len(ones), results)
        for run, one, found in zip(self.runs, ones, results, strict=True):
            with silence():
                run.report(one, found)
        return summarize(results, self.workdir)

    # One epoch, one end

    def _epoch(self, state: TrainState, epoch: int):
        n_done = epoch - self.config.training.n_pretrain_epochs
        if n_done == 0:
            state, _ = self._call("initialize", self._call("refresh", state, self.rows), self.rows)
        elif n_done > 0 and self.config.reset.every and n_done % self.config.reset.every == 0:
            state = self._call("refresh", self._call("reset", state), self.rows)
            state, _ = self._call("restart", state, self.rows)
        return self._call("epoch", state, self.rows, clustering=n_done >= 0)

    def _finish(self, state: TrainState, seconds: float):
        started = time.perf_counter()
        state = self._call("refresh", state, self.rows)
        if self.config.training.n_epochs == 0:
            state, _ = self._call("initialize", state, self.rows)
        n_iterations = np.int32(self.config.centroids.final_max_iter)
        state, values = self._call("assign", state, self.rows, n_iterations)
        self._await(values)
        seconds = (seconds + time.perf_counter() - started) / len(self.runs)
        ends = []
        for i, (run, one) in enumerate(zip(self.runs, self._unstack(state), strict=True)):
            found = scalars({name: to_host(value)[i] for name, value in values.items()})
            ends.append(run.conclude(one, found, seconds))
        return [results for _, results in ends], [one for one, _ in ends]

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
                found |= run.scores_of(one)
        return named

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

    def _save(self, checkpoints, states, seconds, values, results) -> None:
        each = zip(self.runs, checkpoints, states, values, results, strict=True)
        for run, one, state, named, found in each:
            run.save(one, state, seconds, named, found)
        for one in checkpoints:
            one.wait()

    # Programs

    def _call(self, name: str, *arguments, **static):
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        key = (name, shapes, tuple(static.items()))
        if key not in self._compiled:
            started = time.perf_counter()
            lowered = getattr(self.programs, name).lower(*arguments, **static)
            self._compiled[key] = lowered.compile()
            self._compiling += time.perf_counter() - started
        result = self._compiled[key](*arguments)
        # One program at a time: see docs/architecture.md, "Fake devices".
        self._await(result)
        return result

    def _await(self, values) -> None:
        self.runs[0].await_devices(values, None)
