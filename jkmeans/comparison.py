"""Methods beside each other: every method from several seeds, and one table of all of them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jkmeans import configuration, training
from jkmeans.comparison_tables import Row, headline, write_tables
from jkmeans.configuration import Config, shown
from jkmeans.datasets import Dataset
from jkmeans.errors import CollapseError, UserError
from jkmeans.fields import accepted_of, integer
from jkmeans.interruption import Interruption
from jkmeans.published import published_result
from jkmeans.recorder import results_table
from jkmeans.training.folder import claim_workdir
from jkmeans.whole_files import write_json
from jkmeans.workdir import CONFIG_FILE, RESULTS_FILE, TABLE_FILE, refuse_other_kinds

PRETRAINED_FOLDER = "pretrained"
COLLAPSE_FILE = "collapsed.json"

_N_SEEDS = integer(1, "seeds of every method, from 0 on")
_LONGEST_NAME = 100  # Letters may take four bytes each, and names of files 255.


def compare(
    config: Config, workdir: str | os.PathLike, only: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Trains every method of a table from every seed, and writes the table.

    Networks are pretrained once for each seed and kind of network, and shared. A run that has ended
    is only read; one that was interrupted goes on. A run that collapses is counted as such and the
    others go on; since it would collapse again, it is not trained again until its folder is
    deleted. The table is written anew after every run.

    Args:
      config: ``n_seeds``, and ``runs``: by the name of its row, the complete config of each. The
        seeds are 0 to n_seeds − 1, and these say 0. Rows have the order of ``runs``: that of the
        author in a ``ConfigDict(sort_keys=False)``, that of the alphabet in any other.
      workdir: receives a folder ``<row>/seed_<i>`` for each run, ``pretrained/``, ``table.md``,
        ``table.tex``, ``table.csv``, ``runs.csv`` (every run), ``table.json`` and, where data have
        labels, ``table.png``.
      only: names of the rows to train; all if empty. The others are in the table as far as they
        have been trained before.

    Returns:
      What is in ``table.json``: by row and metric, ``mean``, ``sd`` (sample standard deviation,
      0 for one seed) and ``values``; and ``failures``, a seed and a sentence each.

    Raises:
      UserError: a config cannot be used or is not the one of the run that is there, or there is no
        such row.
      Interrupted: Ctrl-C or SIGTERM came; everything is saved.
    """
    n_seeds, configs = _validated(config, only)
    workdir = Path(workdir).absolute()
    refuse_other_kinds(workdir, TABLE_FILE)
    runs = _runs_of(configs, n_seeds, workdir)
    chosen = [run for run in runs if not only or run.name in only]
    # Now, and not after hours of other runs.
    for run in chosen:
        run.check_folder()
    _check_data(chosen)
    for number, run in enumerate(chosen, start=1):
        if run.has_ended():
            continue
        print(f"— run {number} of {len(chosen)}: {run.name}, seed {run.seed}", flush=True)
        run.train()
        with Interruption() as interruption:  # Only here: a run hears signals for itself.
            write_tables(workdir, _rows(runs))
            if interruption.requested:
                interruption.leave()
    summary = write_tables(workdir, _rows(runs))
    results_table(
        {name: headline(found) for name, found in summary.items()},
        f"{n_seeds} seed{'s' if n_seeds > 1 else ''} in {workdir}",
    )
    return summary


def run_folder(workdir: Path, name: str, seed: int) -> Path:
    """The folder of one run of a table."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    return workdir / plain / f"seed_{seed}"


class _Run(NamedTuple):
    """One seed of one row. What became of it is read from its folder, never remembered."""

    name: str
    seed: int
    config: Config
    folder: Path

    def check_folder(self) -> None:
        """Refuses a folder with another config."""
        if (self.folder / CONFIG_FILE).exists():
            claim_workdir(self.folder, self.config)

    def train(self) -> None:
        try:
            training.train_and_evaluate(self.config, self.folder)
        except CollapseError as error:
            write_json(self.folder / COLLAPSE_FILE, {"error": str(error)})
            print(f"{self.name}, seed {self.seed}: {error}", flush=True)
        except UserError as error:
            raise UserError(f"config.runs[{self.name!r}], seed {self.seed}: {error}") from error

    def has_ended(self) -> bool:
        """Whether there is nothing to train; where its data may have changed, it sees to that."""
        results, collapse = self.outcome()
        ended = RESULTS_FILE if results else COLLAPSE_FILE
        return bool(results or collapse) and not self._data_may_differ(self.folder / ended)

    def outcome(self) -> tuple[dict[str, Any] | None, str | None]:
        """The results, or else the sentence of the collapse, where there is one of this config."""
        there = self._config_there()
        if there is None or configuration.differences(self.config, there):
            return None, None
        results = _read_object(self.folder / RESULTS_FILE)
        if results:
            return results, None
        collapse = _read_object(self.folder / COLLAPSE_FILE)
        return None, collapse.get("error")

    def _config_there(self) -> Config | None:
        try:
            return configuration.from_json(_read_object(self.folder / CONFIG_FILE))
        except UserError:
            return None

    def _data_may_differ(self, ended: Path) -> bool:
        there = self._config_there()
        ours = (self.config.data.path, self.config.data.labels_path)
        if there is None or ours != (there.data.path, there.data.labels_path):
            return True
        files = [Path(name) for name in ours if name]
        return any(f.exists() and f.stat().st_mtime > ended.stat().st_mtime for f in files)


def _runs_of(configs: Mapping[str, Config], n_seeds: int, workdir: Path) -> list[_Run]:
    """Seed by seed, so that an unfinished table has something of every method."""
    runs = []
    for seed in range(n_seeds):
        for name, config in configs.items():
            one = config.copy_and_resolve_references()
            one.seed = seed
            if not one.training.pretrained_folder:
                one.training.pretrained_folder = str(workdir / PRETRAINED_FOLDER)
            runs.append(_Run(name, seed, one, run_folder(workdir, name, seed)))
    return runs


def _check_data(runs: Sequence[_Run]) -> None:
    """Refuses data that a row cannot be of, of the rows that are not done."""
    left = {run.name: run.config for run in runs if not run.has_ended()}
    loaded: dict[str, Dataset] = {}
    for name, config in left.items():
        data = str(config.data)
        try:
            if data not in loaded:
                loaded[data] = training.load_data(config)
            training.check_data(config, loaded[data])
        except UserError as error:
            raise UserError(f"config.runs[{name!r}]: {error}") from error


def _rows(runs: Sequence[_Run]) -> list[Row]:
    """The rows as they are on disk, where other processes may have trained some of them."""
    rows: dict[str, Row] = {}
    for run in runs:
        row = rows.setdefault(run.name, Row(run.name, [], [], published_result(run.config)))
        results, collapse = run.outcome()
        if results:
            row.runs.append({"seed": run.seed, **results})
        elif collapse:
            row.failures.append((run.seed, collapse))
    return list(rows.values())


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _validated(config: Config, only: Sequence[str]) -> tuple[int, dict[str, Config]]:
    fields = {"n_seeds", "runs"}
    if not isinstance(config, ConfigDict):
        raise UserError(f"the config of a table is {config!r}; accepted: n_seeds and runs")
    unknown = sorted(map(str, set(config.keys()) - fields))
    missing = sorted(fields - set(config.keys()))
    if unknown or missing:
        what = f"has a field {unknown[0]!r}" if unknown else f"lacks the field {missing[0]!r}"
        raise UserError(f"the config of a table {what}; accepted: n_seeds and runs")
    try:
        n_seeds = _N_SEEDS.convert(config.n_seeds)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"config.n_seeds is {config.n_seeds!r}; accepted: {accepted_of(_N_SEEDS, error)}"
        ) from None
    if not isinstance(config.runs, ConfigDict) or not config.runs:
        raise UserError(f"config.runs is {shown(config.runs)}; accepted: configs by names of rows")
    _refuse_names(list(config.runs))
    runs = {name: _validated_run(name, one) for name, one in config.runs.items()}
    strange = [name for name in only if name not in runs]
    if strange:
        raise UserError(f"--methods names {strange[0]!r}; accepted: {', '.join(map(repr, runs))}")
    return n_seeds, runs


def _validated_run(name: str, config: Config) -> Config:
    if not isinstance(config, ConfigDict):
        raise UserError(f"config.runs[{name!r}] is {config!r}; accepted: a complete config")
    try:
        config = configuration.validate(config)
    except UserError as error:
        raise UserError(f"config.runs[{name!r}]: {error}") from None
    if config.n_seeds != 1:
        raise UserError(
            f"config.runs[{name!r}].n_seeds is {config.n_seeds}; accepted: 1, since n_seeds of the "
            "table says how many"
        )
    if config.seed != 0:
        raise UserError(
            f"config.runs[{name!r}].seed is {config.seed}; accepted: 0, since a table is of the "
            "seeds from 0 on"
        )
    return config


def _refuse_names(names: Sequence[Any]) -> None:
    folders: dict[str, str] = {PRETRAINED_FOLDER: "the folder of pretrained networks"}
    for name in names:
        # Printable text has no line breaks, which would cut a row of a table in two.
        text = isinstance(name, str) and name.isprintable() and name.strip() == name
        if not text or not 0 < len(name) <= _LONGEST_NAME:
            raise UserError(
                f"config.runs has a row {shown(name)}; accepted: 1 to {_LONGEST_NAME} printable "
                "characters, with no space before or after them"
            )
        # Some file systems take small and capital letters for the same.
        folder = run_folder(Path(), name, 0).parent.name.casefold()
        if folder in folders:
            raise UserError(
                f"config.runs has a row {name!r}, which would share a folder with "
                f"{folders[folder]}; accepted: names that differ in letters and digits"
            )
        folders[folder] = f"the row {name!r}"
