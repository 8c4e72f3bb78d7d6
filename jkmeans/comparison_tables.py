"""The table of a comparison: Markdown, LaTeX, CSV, numbers for programs, and a picture."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jkmeans import metrics
from jkmeans.drawing import BLUE, DPI, FAINT, GRID, RED, new_figure
from jkmeans.published import Published
from jkmeans.whole_files import write_whole
from jkmeans.workdir import TABLE_FILE

SCORES = ("acc", "nmi", "ari")


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


def write_tables(workdir: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Writes the table in every form, and returns its numbers; see `compare`."""
    rows = [row for row in rows if row.runs or row.failures]
    workdir.mkdir(parents=True, exist_ok=True)
    summary = {row.name: summarize(row) for row in rows}
    forms = {
        TABLE_FILE: json.dumps(summary, indent=2) + "\n",
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
            summary[name] = metrics.spread(values)
    summary["failures"] = [list(failure) for failure in row.failures]
    return summary


def _has_scores(summary: Mapping[str, Mapping[str, Any]]) -> bool:
    return any("acc" in found for found in summary.values())


def headline(found: Mapping[str, Any]) -> str:
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


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy of every run, the means, and what was published.

    Args:
      rows: of which at least one has ``acc``.
    """
    accuracies = [[100 * run["acc"] for run in row.runs if "acc" in run] for row in rows]
    published = [row.published.acc if row.published else None for row in rows]
    shown = [value for values in accuracies for value in values]
    shown += [value for value in published if value is not None]
    margin = max(1.0, 0.06 * (max(shown) - min(shown)))
    figure = new_figure(7, 1.3 + 0.36 * len(rows))
    axes = figure.subplots()
    axes.set_xlim(max(0.0, min(shown) - margin), min(100.0, max(shown) + margin))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    seed: dict[str, Any] = {
        "marker": "o",
        "color": BLUE,
        "alpha": 0.5,
        "ms": 6,
        "mew": 0,
        "ls": "",
    }
    mean: dict[str, Any] = {"marker": "|", "color": BLUE, "ms": 16, "mew": 2.5, "ls": ""}
    other: dict[str, Any] = {"marker": "D", "mfc": "none", "mec": RED, "ms": 6, "ls": ""}
    # Not clipped: marks at 0 and 100 % are whole.
    for place, (values, theirs) in enumerate(zip(accuracies, published, strict=True)):
        axes.plot(values, [place] * len(values), **seed, clip_on=False)
        if values:
            axes.plot([np.mean(values)], [place], **mean, clip_on=False)
        elif rows[place].failures:
            axes.annotate(
                "collapsed", (0.5, place), xycoords=axes.get_yaxis_transform(),
                ha="center", va="center", color=FAINT, fontsize=9, backgroundcolor="white",
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
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, dpi=DPI, format="png")
    return out.getvalue()
