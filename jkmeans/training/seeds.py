"""Several seeds of one config: one run after the other, or side by side in one program.

Side by side, every array of the state has an axis of seeds in front, and every program of an epoch
is a ``vmap`` over it. What is kept on disk is the same either way: each seed has the folder of a
run, with its config, checkpoints, metrics and results, which `jkmeans.evaluation` reads as any
other.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jkmeans import configuration, datasets, metrics, processes, telling
from jkmeans.checkpoints import Checkpoints
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.recorder import results_table, silence
from jkmeans.sharding import make_mesh
from jkmeans.training import conclusion, train_and_evaluate
from jkmeans.training.folder import claim_workdir
from jkmeans.training.run import Run
from jkmeans.training.side_by_side import Member, SideBySide
from jkmeans.whole_files import write_json
from jkmeans.workdir import CHECKPOINT_FOLDER, SEEDS, only_process_in, refuse_other_kinds

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
    processes.on_first(lambda: refuse_other_kinds(workdir, SEEDS))
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
            summary[name] = metrics.spread([one[name] for one in results])
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
    return configuration.validate(one)  # The last of many may be too large.


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
        if self.runs[0].is_fed:
            raise UserError(
                f"config.n_seeds is {config.n_seeds}, but the examples are fed from the host; "
                "accepted: 1, or data.placement = 'device' and room for all examples"
            )

    def execute(self) -> dict[str, Any]:
        """Trains what is left to train, and reports."""
        with contextlib.ExitStack() as stack:
            left, results = [], {}
            refuse_other_kinds(self.workdir, SEEDS)
            for run in self.runs:
                claim_workdir(run.workdir, run.config)
                stack.enter_context(only_process_in(run.workdir))
                folder, keep = run.workdir / CHECKPOINT_FOLDER, run.config.checkpoint.keep
                left.append(Member(run, stack.enter_context(Checkpoints(folder, keep=keep))))
            for member in [*left]:
                member.go_back()
                if member.record and member.record["results"]:
                    with silence():
                        found = conclusion.report_again(
                            member.run, member.state, member.record["results"]
                        )
                    results[member.seed] = found
                    left.remove(member)
            if not left:
                telling.tell(f"{self.workdir} holds finished runs of this config; nothing to train")
            elif results:
                telling.tell(f"{self.workdir} holds the finished runs of seeds {_listed(results)}")
            for group in _groups(left):
                results |= self._train(group)
            return summarize([results[run.config.seed] for run in self.runs], self.workdir)

    def _train(self, group: Sequence[Member]) -> dict[int, dict[str, Any]]:
        """Trains seeds that stand at the same place; the results of each."""
        seeds = [member.seed for member in group]
        if len(seeds) == len(self.runs):
            results = SideBySide(self.config, self.dataset, self.workdir, group).execute()
        else:
            telling.tell(f"training seeds {_listed(seeds)} from epoch {group[0].epoch} on")
            if len(seeds) == 1:
                (member,) = group
                member.state = None  # It is restored again, and takes room on the devices.
                results = [member.run.execute(member.checkpoints)]
                member.run.forget_rows()
            else:
                config = self.config.copy_and_resolve_references()
                config.n_seeds = len(seeds)
                # The means of all seeds, which the workdir may hold, are not those of some.
                folder = self.workdir / f"seeds_{'_'.join(map(str, seeds))}"[:100]
                results = SideBySide(config, self.dataset, folder, group).execute()
        return dict(zip(seeds, results, strict=True))


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Seeds that train together: those that have begun, from where they last stood together.

    Where that costs more than what lies between two saves, as when a run that keeps one checkpoint
    of each was killed between the saves of two seeds, each place makes a group; and so do those
    that have not begun. Side by side there are whole epochs only, so that a seed which stopped
    within one, in a run of its own, goes on alone.
    """
    begun = [m for m in members if m.state is not None and not m.within_epoch]
    while len({member.epoch for member in begun}) > 1:
        n_steps = begun[0].run.n_steps
        whole = ({p for p in m.checkpoints.positions() if p % n_steps == 0} for m in begun)
        common = set.intersection(*whole)
        last, every = max(member.epoch for member in begun), begun[0].run.config.checkpoint.every
        if not common or last - max(common) // n_steps > every:
            break
        if not all(member.go_back({max(common)}) for member in begun):
            # It was damaged, and is out of the way now.
            for member in begun:
                member.go_back()
    groups: dict[tuple[int, int], list[Member]] = {}
    for member in members:
        place = member.epoch, member.seed if member.within_epoch else -1
        groups.setdefault(place, []).append(member)
    return [groups[place] for place in sorted(groups, reverse=True)]


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))
