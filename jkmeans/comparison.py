"""Methods beside each other: every method from several seeds, and one table of all of them."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jkmeans import configuration
from jkmeans.configuration import Config
from jkmeans.errors import CollapseError, UserError
from jkmeans.fields import integer
from jkmeans.published import PUBLISHED, Published
from jkmeans.recorder import results_table
from jkmeans.workdir import write_json

TABLE_NAMES = ("table.md", "table.tex", "table.csv", "runs.csv", "table.png")
PRETRAINED_FOLDER = "pretrained"
SCORES = ("acc", "nmi", "ari")

_N_SEEDS = integer(1, "seeds of every method, from 0 on")


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

    Networks are pretrained once for each seed and kind of network, and shared. Runs that are
    finished are only read; one that was interrupted goes on. A run that collapses is counted as
    such and the others go on. The table is written anew after every run.

    Args:
      config: ``n_seeds``, and ``runs``: by the name of its row, the complete config of each.
      workdir: receives a folder ``<row>/seed_<i>`` for each run, ``pretrained/``, ``table.md``,
        ``table.tex``, ``table.csv``, ``runs.csv`` (every run), ``table.png`` and ``table.json``.
      only: names of the rows to train; all if empty. The table has every row that was run.

    Returns:
      What is in ``table.json``: by row and metric, ``mean``, ``sd`` (sample standard deviation,
      0 for one seed) and ``values``.

    Raises:
      UserError: a config cannot be used, or there is no such row.
      Interrupted: Ctrl-C or SIGTERM came; everything is saved.
    """
    from jkmeans.training import train_and_evaluate

    n_seeds, runs = _validated(config, only)
    workdir = Path(workdir).absolute()
    rows = {name: Row(name, [], [], _published(name, one)) for name, one in runs.items()}
    chosen = [name for name in runs if not only or name in only]
    # Seed by seed, so that an unfinished table has something of every method.
    for seed in range(n_seeds):
        for name in chosen:
            one = runs[name].copy_and_resolve_references()
            one.seed = seed
            if not one.training.pretrained_folder:
                one.training.pretrained_folder = str(workdir / PRETRAINED_FOLDER)
            folder = run_folder(workdir, name, seed)
            print(f"— {name}, seed {seed} of {n_seeds}: {folder}", flush=True)
            try:
                results = _finished(folder, one) or train_and_evaluate(one, folder)
                rows[name].runs.append({"seed": seed, **results})
            except CollapseError as error:
                rows[name].failures.append((seed, str(error)))
                print(f"{name}, seed {seed}: {error}", flush=True)
            summary = write_tables(workdir, list(rows.values()))
    results_table(
        {name: _cell(found.get("acc") or found["inertia"]) for name, found in summary.items()},
        f"{n_seeds} seeds in {workdir}",
    )
    return summary


def run_folder(workdir: Path, name: str, seed: int) -> Path:
    """The folder of one run of a table."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    return workdir / plain / f"seed_{seed}"


def _validated(config: Config, only: Sequence[str]) -> tuple[int, dict[str, Config]]:
    unknown = sorted(set(config.keys()) - {"n_seeds", "runs"})
    missing = sorted({"n_seeds", "runs"} - set(config.keys()))
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
        raise UserError(f"config.runs is {config.runs!r}; accepted: configs by the name of a row")
    runs = {}
    for name, one in config.runs.items():
        try:
            runs[name] = configuration.validate(one)
        except UserError as error:
            raise UserError(f"config.runs[{name!r}]: {error}") from None
    folders = {run_folder(Path(), name, 0) for name in runs}
    if len(folders) < len(runs):
        raise UserError(
            f"config.runs has rows {', '.join(map(repr, runs))}, of which two share a folder; "
            "accepted: names that differ in letters and digits"
        )
    strange = [name for name in only if name not in runs]
    if strange:
        raise UserError(f"--methods names {strange[0]!r}; accepted: {', '.join(map(repr, runs))}")
    return n_seeds, runs


def _published(name: str, config: Config) -> Published | None:
    if config.data.split != "all" or config.data.n_examples:
        return None
    return PUBLISHED.get(config.data.name, {}).get(name)


def _finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The results of a run that is finished, without loading its data again."""
    try:
        there = configuration.from_json(json.loads((folder / "config.json").read_text()))
        results = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError, UserError):
        return None
    return None if configuration.differences(config, there) else results


def write_tables(workdir: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Writes the table in every form, and returns its numbers; see `compare`."""
    rows = [row for row in rows if row.runs or row.failures]
    workdir.mkdir(parents=True, exist_ok=True)
    summary = {row.name: summarize(row) for row in rows}
    write_json(workdir / "table.json", summary)
    forms = {
        "table.md": markdown(rows, summary),
        "table.tex": latex(rows, summary),
        "table.csv": comma_separated(rows, summary),
        "runs.csv": every_run(rows),
    }
    for name, text in forms.items():
        temporary = workdir / f".{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, workdir / name)
    if any("acc" in found for found in summary.values()):
        _draw(workdir / "table.png", rows)
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


def _cell(found: Mapping[str, Any] | None, percent: bool = True) -> str:
    if found is None:
        return "–"
    factor = 100 if percent else 1
    text = f"{factor * found['mean']:.1f}"
    return f"{text} ± {factor * found['sd']:.1f}" if len(found["values"]) > 1 else text


def _published_cell(published: Published | None) -> str:
    if published is None:
        return "–"
    acc = f"{published.acc:.1f}" + (f" ± {published.sd:.1f}" if published.sd is not None else "")
    others = ["–" if v is None else f"{v:.1f}" for v in (published.nmi, published.ari)]
    return " / ".join([acc, *others])


_HEAD = ("method", "seeds", "ACC", "NMI", "ARI", "seconds", "published ACC / NMI / ARI", "source")


def _cells(row: Row, found: Mapping[str, Any]) -> list[str]:
    seeds = str(len(row.runs)) + (f" ({len(row.failures)} collapsed)" if row.failures else "")
    scores = [_cell(found.get(name)) for name in SCORES]
    seconds = _cell(found.get("train_seconds"), percent=False)
    source = row.published.source if row.published else "–"
    return [row.name, seeds, *scores, seconds, _published_cell(row.published), source]


def markdown(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown: percent, mean ± sample standard deviation over seeds."""
    lines = [_HEAD, ["---"] * len(_HEAD)]
    lines += [[c.replace("|", "\\|") for c in _cells(row, summary[row.name])] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as a LaTeX ``tabular`` with rules of the package booktabs."""

    def escaped(cell: str) -> str:
        # The backslash first: the others bring new ones.
        cell = cell.replace("\\", "\\textbackslash ")
        for letter in "&%$#_{}":
            cell = cell.replace(letter, f"\\{letter}")
        return cell.replace("±", "$\\pm$").replace("–", "--")

    body = [" & ".join(map(escaped, _cells(row, summary[row.name]))) for row in rows]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(_HEAD) - 2)}l}}",
        "\\toprule",
        " & ".join(_HEAD) + " \\\\",
        "\\midrule",
        *(f"{line} \\\\" for line in body),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table with every number in a column of its own, fractions, not percent."""
    names = [f"{name}_{part}" for name in (*SCORES, "train_seconds") for part in ("mean", "sd")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "seeds", "collapsed", *names, "published_acc", "source"])
    for row in rows:
        found = summary[row.name]
        values = [
            found[name][part] if name in found else ""
            for name in (*SCORES, "train_seconds")
            for part in ("mean", "sd")
        ]
        published = row.published
        writer.writerow(
            [
                row.name,
                len(row.runs),
                len(row.failures),
                *values,
                "" if published is None else published.acc / 100,
                "" if published is None else published.source,
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


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """Accuracy of every run, the means, and what was published."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.runs and "acc" in row.runs[0]]
    figure = Figure(figsize=(7, 1.3 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = [100 * run["acc"] for run in row.runs]
        axes.plot(values, [place] * len(values), "o", color="#1f77b4", alpha=0.5, ms=5, mew=0)
        axes.plot(np.mean(values), place, "|", color="#1f77b4", ms=16, mew=2.5)
        if row.published is not None:
            axes.plot(row.published.acc, place, "D", mfc="none", mec="#d62728", ms=6)
    handles = [
        axes.plot([], [], "o", color="#1f77b4", alpha=0.5, ms=5, mew=0, label="a seed")[0],
        axes.plot([], [], "|", color="#1f77b4", ms=12, mew=2.5, ls="", label="mean")[0],
        axes.plot([], [], "D", mfc="none", mec="#d62728", ms=6, ls="", label="published")[0],
    ]
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("accuracy after matching, %")
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)
