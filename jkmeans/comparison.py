"""Methods beside each other: every method from several seeds, and one table of all of them."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jkmeans import configuration, training
from jkmeans.configuration import Config
from jkmeans.errors import CollapseError, UserError
from jkmeans.fields import integer
from jkmeans.interruption import Interruption
from jkmeans.published import Published, published_result
from jkmeans.recorder import results_table
from jkmeans.whole_files import write_json, write_whole
from jkmeans.workdir import CONFIG_FILE, RESULTS_FILE

TABLE_NAMES = ("table.md", "table.tex", "table.csv", "runs.csv", "table.json", "table.png")
PRETRAINED_FOLDER = "pretrained"
COLLAPSE_FILE = "collapsed.json"
SCORES = ("acc", "nmi", "ari")

_N_SEEDS = integer(1, "seeds of every method, from 0 on")
_LONGEST_NAME = 100  # Letters may take four bytes each, and names of files 255.


class Row(NamedTuple):
    """One method over its seeds.

    Attributes:
      name: of the row.
      runs: results of the seeds that finished, with their ``seed``.
      failures: seed and sentence of the others.
      published: what was published of it on these data, or None.
    """

    name: str
    runs: list[dict[str, Any]]
    failures: list[tuple[int, str]]
    published: Published | None


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
    runs = _runs_of(configs, n_seeds, workdir)
    chosen = [run for run in runs if not only or run.name in only]
    for run in chosen:
        run.check_folder()
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
        {name: _headline(found) for name, found in summary.items()},
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
        """Refuses a folder with another config now, not after hours of other runs."""
        if (self.folder / CONFIG_FILE).exists():
            training.claim_workdir(self.folder, self.config)

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
    except (TypeError, ValueError):
        raise UserError(
            f"config.n_seeds is {config.n_seeds!r}; accepted: {_N_SEEDS.accepted}"
        ) from None
    if not isinstance(config.runs, ConfigDict) or not config.runs:
        raise UserError(f"config.runs is {_shown(config.runs)}; accepted: configs by names of rows")
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
                f"config.runs has a row {_shown(name)}; accepted: 1 to {_LONGEST_NAME} printable "
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


def _shown(value: Any) -> str:
    shown = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def write_tables(workdir: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Writes the table in every form, and returns its numbers; see `compare`."""
    rows = [row for row in rows if row.runs or row.failures]
    workdir.mkdir(parents=True, exist_ok=True)
    summary = {row.name: summarize(row) for row in rows}
    forms = {
        "table.json": json.dumps(summary, indent=2) + "\n",
        "table.md": markdown(rows, summary),
        "table.tex": latex(rows, summary),
        "table.csv": comma_separated(rows, summary),
        "runs.csv": every_run(rows),
    }
    for name, text in forms.items():
        write_whole(workdir / name, text.encode())
    if _has_scores(summary):
        write_whole(workdir / "table.png", picture(rows))
    return summary


def summarize(row: Row) -> dict[str, Any]:
    """Mean, sample standard deviation and values of every numeric result over the seeds."""
    summary: dict[str, Any] = {}
    for name in row.runs[0] if row.runs else ():
        values = [run[name] for run in row.runs if isinstance(run.get(name), int | float)]
        if len(values) == len(row.runs) and name != "seed":
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary[name] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    summary["failures"] = [list(failure) for failure in row.failures]
    return summary


def _has_scores(summary: Mapping[str, Mapping[str, Any]]) -> bool:
    return any("acc" in found for found in summary.values())


def _headline(found: Mapping[str, Any]) -> str:
    """What a row comes to, for the terminal."""
    if "acc" in found:
        return f"ACC {_percent(found['acc'])}"
    return f"inertia {_plain(found['inertia'])}" if "inertia" in found else "collapsed"


def _percent(found: Mapping[str, Any] | None) -> str:
    return _cell(found, lambda value: f"{100 * value:.1f}")


def _seconds(found: Mapping[str, Any] | None) -> str:
    return _cell(found, lambda value: f"{value:.1f}")


def _plain(found: Mapping[str, Any] | None) -> str:
    return _cell(found, lambda value: f"{value:.4g}")


def _cell(found: Mapping[str, Any] | None, written: Callable[[float], str]) -> str:
    if found is None:
        return "–"
    mean, sd = written(found["mean"]), written(found["sd"])
    return f"{mean} ± {sd}" if len(found["values"]) > 1 else mean


def _published_cell(published: Published | None) -> str:
    if published is None:
        return "–"
    acc = f"{published.acc:.1f}" + (f" ± {published.sd:.1f}" if published.sd is not None else "")
    others = ["–" if v is None else f"{v:.1f}" for v in (published.nmi, published.ari)]
    return " / ".join([acc, *others])


class _Column(NamedTuple):
    head: str
    is_text: bool
    cell: Callable[[Row, Mapping[str, Any]], str]


def _columns(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]]) -> list[_Column]:
    """The columns that these rows have something for."""

    def seeds(row: Row, found: Mapping[str, Any]) -> str:
        collapsed = f" ({len(row.failures)} collapsed)" if row.failures else ""
        return f"{len(row.runs)}{collapsed}"

    columns = [_Column("method", True, lambda row, _: row.name), _Column("seeds", False, seeds)]
    if _has_scores(summary):
        columns += [
            _Column(
                f"{name.upper()} %", False, lambda _, found, name=name: _percent(found.get(name))
            )
            for name in SCORES
        ]
    else:
        columns.append(_Column("inertia", False, lambda _, found: _plain(found.get("inertia"))))
    columns.append(_Column("seconds", False, lambda _, found: _seconds(found.get("train_seconds"))))
    if any(row.published for row in rows):
        columns += [
            _Column(
                "published ACC / NMI / ARI %", False, lambda row, _: _published_cell(row.published)
            ),
            _Column("source", True, lambda row, _: row.published.source if row.published else "–"),
        ]
    return columns


def _table(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]], escaped: Callable):
    """The columns, and the lines of escaped cells: the head first."""
    columns = _columns(rows, summary)
    lines = [[escaped(column.head) for column in columns]]
    lines += [[escaped(column.cell(row, summary[row.name])) for column in columns] for row in rows]
    return columns, lines


_MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]<>&|~$#"})


def markdown(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown: mean ± sample standard deviation over seeds, scores in percent.

    Without labels there is the inertia instead of scores: every method's in its own embedding, so
    that it compares seeds of a method and not methods.
    """
    columns, lines = _table(rows, summary, lambda cell: cell.translate(_MARKDOWN))
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    rule = [
        "-" * width if column.is_text else "-" * (width - 1) + ":"
        for column, width in zip(columns, widths, strict=True)
    ]

    def padded(line: Sequence[str]) -> str:
        cells = [
            f"{cell:<{width}}" if column.is_text else f"{cell:>{width}}"
            for cell, column, width in zip(line, columns, widths, strict=True)
        ]
        return f"| {' | '.join(cells)} |\n"

    return "".join(padded(line) for line in (lines[0], rule, *lines[1:]))


_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    # A line that begins with one of the first two would be an argument of the \\ before it.
    | {"[": "{[}", "*": "{*}", "]": "{]}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
    | {"±": "$\\pm$", "–": "--"}
)


def latex(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as a LaTeX ``tabular`` with rules of the package booktabs."""
    columns, lines = _table(rows, summary, lambda cell: cell.translate(_LATEX))
    head, *body = [f"{' & '.join(line)} \\\\\n" for line in lines]
    places = "".join("l" if column.is_text else "r" for column in columns)
    return (
        f"\\begin{{tabular}}{{{places}}}\n\\toprule\n{head}\\midrule\n"
        f"{''.join(body)}\\bottomrule\n\\end{{tabular}}\n"
    )


def comma_separated(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table with every number in a column of its own, fractions, not percent."""
    parts = [
        (name, part) for name in (*SCORES, "inertia", "train_seconds") for part in ("mean", "sd")
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    published_names = [f"published_{name}" for name in SCORES]
    numbers = [f"{name}_{part}" for name, part in parts]
    writer.writerow(["method", "seeds", "collapsed", *numbers, *published_names, "source"])
    for row in rows:
        found = summary[row.name]
        values = [found[name][part] if name in found else "" for name, part in parts]
        published = [getattr(row.published, name, None) for name in SCORES]
        writer.writerow(
            [
                row.name,
                len(row.runs),
                len(row.failures),
                *values,
                # Rounded, for 94.46 / 100 is not 0.9446.
                *("" if value is None else round(value / 100, 6) for value in published),
                row.published.source if row.published else "",
            ]
        )
    return out.getvalue()


def every_run(rows: Sequence[Row]) -> str:
    """One line for each run, with all its results."""
    names = list(dict.fromkeys(name for row in rows for run in row.runs for name in run))
    out = io.StringIO()
    writer = csv.DictWriter(out, ["method", *names], restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for run in row.runs:
            writer.writerow({"method": row.name, **run})
    return out.getvalue()


_BLUE, _RED, _GRAY = "#1f77b4", "#d62728", "#767676"


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy of every run, the means, and what was published.

    Args:
      rows: of which at least one has ``acc``.
    """
    from matplotlib.figure import Figure

    accuracies = [[100 * run["acc"] for run in row.runs if "acc" in run] for row in rows]
    published = [row.published.acc if row.published else None for row in rows]
    shown = [value for values in accuracies for value in values]
    shown += [value for value in published if value is not None]
    margin = max(1.0, 0.06 * (max(shown) - min(shown)))
    figure = Figure(figsize=(7, 1.3 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(max(0.0, min(shown) - margin), min(100.0, max(shown) + margin))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    seed: dict[str, Any] = {
        "marker": "o",
        "color": _BLUE,
        "alpha": 0.5,
        "ms": 6,
        "mew": 0,
        "ls": "",
    }
    mean: dict[str, Any] = {"marker": "|", "color": _BLUE, "ms": 16, "mew": 2.5, "ls": ""}
    other: dict[str, Any] = {"marker": "D", "mfc": "none", "mec": _RED, "ms": 6, "ls": ""}
    # Not clipped: marks at 0 and 100 % are whole.
    for place, (values, theirs) in enumerate(zip(accuracies, published, strict=True)):
        axes.plot(values, [place] * len(values), **seed, clip_on=False)
        if values:
            axes.plot([np.mean(values)], [place], **mean, clip_on=False)
        elif rows[place].failures:
            axes.annotate(
                "collapsed", (0.5, place), xycoords=axes.get_yaxis_transform(),
                ha="center", va="center", color=_GRAY, fontsize=9, backgroundcolor="white",
            )  # fmt: skip
        if theirs is not None:
            axes.plot([theirs], [place], **other, clip_on=False)
    handles = [
        axes.plot([], [], **seed, label="one seed")[0],
        axes.plot([], [], **{**mean, "ms": 12}, label="mean")[0],
    ]
    if any(value is not None for value in published):
        handles.append(axes.plot([], [], **other, label="published")[0])
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # A dollar sign in a name is a dollar sign.
    axes.set_xlabel("accuracy after matching, %")
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, dpi=150, format="png")
    return out.getvalue()
