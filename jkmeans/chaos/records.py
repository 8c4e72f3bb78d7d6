"""What came of each fault: a line of a file, a line of a table."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import NamedTuple

from jkmeans.chaos.settings import KINDS
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.whole_files import write_whole

_TRUTH = ("True", "False")


class Fault(NamedTuple):
    """One fault and what came of it.

    Attributes:
      number: in all.
      round: the run that it came to.
      kind: of `KINDS`.
      epoch: finished when it came.
      noticed: seconds until the supervisor knew; None where there was nothing to notice.
      recovered: seconds until the state was restored on all processes and training could go on:
        all but reading, tracing and compiling programs; None where nothing restarted.
      next_epoch: seconds until the next epoch was done.
      lost_epochs: that had to be computed again.
      lost_seconds: that these had taken.
      survived: whether the run went on, and came to its end.
      equal: whether the result of the round is that of an undisturbed run, bit for bit.
    """

    number: int
    round: int
    kind: str
    epoch: int
    noticed: float | None
    recovered: float | None
    next_epoch: float | None
    lost_epochs: int
    lost_seconds: float
    survived: bool
    equal: bool


def write_faults(path: Path, faults: list[Fault]) -> None:
    """Writes a line for each fault."""
    lines = [Fault._fields, *(tuple("" if v is None else v for v in fault) for fault in faults)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_whole(path, text.getvalue().encode())


def read_faults(path: Path) -> list[Fault]:
    """The faults of a file; none where there is no file."""
    if not path.exists():
        return []

    def seconds(value: str) -> float | None:
        return float(value) if value else None

    def whole(row: dict[str, str]) -> dict[str, str]:
        if row["survived"] not in _TRUTH or row["equal"] not in _TRUTH:
            raise ValueError(f"the line of fault {row['number']} is no whole one")
        return row

    try:
        with open(path, newline="") as file:
            return [
                Fault(
                    int(row["number"]), int(row["round"]), row["kind"], int(row["epoch"]),
                    seconds(row["noticed"]), seconds(row["recovered"]), seconds(row["next_epoch"]),
                    int(row["lost_epochs"]), float(row["lost_seconds"]),
                    row["survived"] == "True", row["equal"] == "True",
                )
                for row in map(whole, csv.DictReader(file))
            ]  # fmt: skip
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to begin anew") from error


def line(fault: Fault) -> str:
    """A fault and what came of it, in words."""
    parts = [f"{fault.kind} after epoch {fault.epoch}"]
    if fault.noticed is not None:
        parts.append(f"noticed in {fault.noticed:.2f} s")
    if fault.recovered is not None:
        parts.append(f"going on after {fault.recovered:.1f} s")
        parts.append(f"{fault.lost_epochs} epochs lost")
    parts.append("survived" if fault.survived else "LOST")
    return ", ".join(parts)


def table(faults: list[Fault], config: Config) -> str:
    """What came of the faults, by kind, as a table in Markdown."""
    lines = [
        "| fault | survived | noticed, s (median, most) | going on, s (median, most) | "
        "next epoch, s (median) | epochs lost (median, most) | equal result |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def spread(values: list, form: str) -> str:
        if not values:
            return "–"
        return f"{statistics.median(values):{form}}, {max(values):{form}}"

    rows = [*((kind, KINDS[kind]) for kind in config.kinds), ("", "all")]
    for kind, words in rows:
        of_kind = [fault for fault in faults if not kind or fault.kind == kind]
        if not of_kind:
            continue
        waits = [fault.next_epoch for fault in of_kind if fault.next_epoch is not None]
        cells = [
            words,
            f"{sum(fault.survived for fault in of_kind)} of {len(of_kind)}",
            spread([f.noticed for f in of_kind if f.noticed is not None], ".2f"),
            spread([f.recovered for f in of_kind if f.recovered is not None], ".1f"),
            f"{statistics.median(waits):.1f}" if waits else "–",
            spread([f.lost_epochs for f in of_kind if f.recovered is not None], ".0f"),
            f"{sum(fault.equal for fault in of_kind)} of {len(of_kind)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
