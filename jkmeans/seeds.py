"""Several seeds of one config: one run after the other, or side by side in one program.

Side by side, every array of the state has an axis of seeds in front, and every program of an epoch
is a ``vmap`` over it. What is kept on disk is the same either way: each seed has the folder of a
run, with its config, checkpoints, metrics and results, which `jkmeans.evaluation` reads as any
other.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
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
from jkmeans.whole_files import write_json
from jkmeans.workdir import CHECKPOINT_FOLDER, device_room, only_process_in

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
      workdir: as for `train_seeds`; an interrupted run goes on. Seeds that have ended are only
        reported, so that a larger ``n_seeds`` trains the new ones.

    Returns:
      As `train_seeds`.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      CollapseError: of any of the seeds.
      Interrupted: everything up to the last epoch is saved.
    """
    return _Seeds(config, dataset, Path(workdir).absolute()).execute()


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


class _Member:
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
        """Takes the newest whole checkpoint, see `Run.restore`; whether there is one."""
        self.state, self.record = self.run.restore(self.checkpoints, among) or (None, None)
        return self.state is not None

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.run.config.seed

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return 0 if self.state is None else int(self.state.epoch)


class _Seeds:
    """The runs of all seeds, each in a folder of its own: what has ended is only reported."""

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

    def execute(self) -> dict[str, Any]:
        """Trains what is left to train, and reports."""
        with contextlib.ExitStack() as stack:
            left, results = [], {}
            for run in self.runs:
                claim_workdir(run.workdir, run.config)
                stack.enter_context(only_process_in(run.workdir))
                folder, keep = run.workdir / CHECKPOINT_FOLDER, run.config.checkpoint.keep
                left.append(_Member(run, stack.enter_context(Checkpoints(folder, keep=keep))))
            for member in [*left]:
                member.go_back()
                if member.record and member.record["results"]:
                    with silence():
                        found = member.run.report_again(member.state, member.record["results"])
                    results[member.seed] = found
                    left.remove(member)
            if not left:
                print(f"{self.workdir} holds finished runs of this config; nothing to train")
            elif results:
                print(f"{self.workdir} holds the finished runs of seeds {_listed(results)}")
            for group in _groups(left):
                results |= self._train(group)
            return summarize([results[run.config.seed] for run in self.runs], self.workdir)

    def _train(self, group: Sequence[_Member]) -> dict[int, dict[str, Any]]:
        """Trains seeds that stand at the same place; the results of each."""
        seeds = [member.seed for member in group]
        if len(seeds) == len(self.runs):
            results = _SideBySide(self.config, self.dataset, self.workdir, group).execute()
        else:
            print(f"training seeds {_listed(seeds)} from epoch {group[0].epoch} on")
            if len(seeds) == 1:
                results = [group[0].run.execute(group[0].checkpoints)]
            else:
                config = self.config.copy_and_resolve_references()
                config.n_seeds = len(seeds)
                # The means of all seeds, which the workdir may hold, are not those of some.
                folder = self.workdir / f"seeds_{'_'.join(map(str, seeds))}"[:100]
                results = _SideBySide(config, self.dataset, folder, group).execute()
        return dict(zip(seeds, results, strict=True))


def _groups(members: Sequence[_Member]) -> list[list[_Member]]:
    """Seeds that train together: those that have begun, from where they last stood together.

    Where that costs more than what lies between two saves, as when a run that keeps one checkpoint
    of each was killed between the saves of two seeds, each place makes a group; and so do those
    that have not begun.
    """
    begun = [member for member in members if member.state is not None]
    while len({member.epoch for member in begun}) > 1:
        common = set.intersection(*(set(one.checkpoints.positions()) for one in begun))
        last, every = max(member.epoch for member in begun), begun[0].run.config.checkpoint.every
        if not common or last - max(common) // begun[0].run.n_steps > every:
            break
        if not all(member.go_back({max(common)}) for member in begun):
            # It was damaged, and is out of the way now.
            for member in begun:
                member.go_back()
    groups: dict[int, list[_Member]] = {}
    for member in members:
        groups.setdefault(member.epoch if member in begun else -1, []).append(member)
    return [groups[place] for place in sorted(groups, reverse=True)]


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


class _SideBySide:
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
        members: Sequence[_Member],
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
        begun = [run.create_pretrained() for run in self.runs]
        if len({int(state.epoch) for state, _ in begun}) > 1:
            return [run.create() for run in self.runs], 0.0, False
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
                self._save(ones, seconds, named, [None] * len(ones))
                if pretrained:
                    for run, one in zip(self.runs, ones, strict=True):
                        run.keep_pretrained(one, seconds / len(ones))
            if interruption.requested:
                recorder.say(f"saved; the same command goes on from epoch {epoch}")
                interruption.leave()
        results, ones = self._finish(state, seconds)
        self._save(ones, seconds, [None] * len(ones), results)
        for run, one, found in zip(self.runs, ones, results, strict=True):
            with silence():
                run.report(one, found)
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
            ends.append(run.conclude(one, found, seconds))
        return [results for _, results in ends], [one for one, _ in ends]

    def _check_pretrained(self, values) -> None:
        hosts = {name: to_host(value) for name, value in values.items()}
        for i, run in enumerate(self.runs):
            run.check_pretrained(scalars({name: value[i] for name, value in hosts.items()}))

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

    def _save(self, states, seconds, values, results) -> None:
        each = zip(self.members, states, values, results, strict=True)
        for member, state, named, found in each:
            # Its share: others may train beside it when it goes on.
            share = seconds / len(self.members)
            member.run.save(member.checkpoints, state, share, named, found)
        for member in self.members:
            member.checkpoints.wait()

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
