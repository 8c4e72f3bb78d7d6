"""Pictures of a run with a server: how stale displacements were, and the criterion over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jkmeans.drawing import (
    BLUE,
    INK,
    LINES,
    head_figure,
    new_figure,
    panel_title,
    plain_numbers,
    save,
    soften,
)

STALENESS_PICTURE = "staleness.png"
_MOST_BINS, _BIN_SIZE = 200, 50


def draw_staleness(path: Path, staleness: np.ndarray, title: str) -> None:
    """Writes a picture of the staleness: its histogram, and its course over the displacements.

    Args:
      path: of the PNG.
      staleness: [clock] int, in the order of application.
      title: of the picture.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    values, counts = np.unique(staleness, return_counts=True)
    left.bar(values, counts / len(staleness), width=1.0, color=BLUE, edgecolor="white")
    left.set_yscale("log")
    plain_numbers(left.yaxis)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("staleness", fontsize=9, color=INK)
    left.set_ylabel("share of displacements", fontsize=9, color=INK)
    panel_title(left, "How often")

    bins = np.array_split(staleness, min(_MOST_BINS, len(staleness) // _BIN_SIZE + 1))
    ends = np.cumsum([len(part) for part in bins])
    low, high = (np.array([np.percentile(part, q) for part in bins]) for q in (5, 95))
    right.fill_between(ends, low, high, color=BLUE, alpha=0.2, linewidth=0, label="5 to 95 %")
    right.plot(ends, [part.mean() for part in bins], color=BLUE, linewidth=1.4, label="mean")
    right.set_xlabel("displacements applied", fontsize=9, color=INK)
    right.set_ylabel("staleness", fontsize=9, color=INK)
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    panel_title(right, "When")
    for ax in (left, right):
        soften(ax, 8.5)
    head_figure(figure, title, "Displacements of others applied between download and application")
    save(figure, path)


def draw_curves(
    path: Path,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    value: str,
    count: str,
    title: str,
) -> None:
    """Writes a picture of curves: the criterion over seconds, and over what was computed.

    Args:
      path: of the PNG.
      curves: points by name, as of `jkmeans.asynchronous.curve.Curve`.
      value: what the criterion is called.
      count: what "samples" are called.
      title: of the picture.
    """
    figure = new_figure(9, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, field, label in zip(axes, ("seconds", "samples"), ("seconds", count), strict=True):
        for (name, points), colour in zip(curves.items(), LINES, strict=False):
            x, y = ([point[key] for point in points] for key in (field, "value"))
            ax.plot(x, y, color=colour, linewidth=1.5, marker=".", markersize=4, label=name)
        ax.set_xlabel(label, fontsize=9, color=INK)
        ax.set_yscale("log")
        plain_numbers(ax.yaxis)
        ax.set_xlim(left=0)
        soften(ax, 8.5)
    axes[0].set_ylabel(value, fontsize=9, color=INK)
    if len(curves) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    head_figure(figure, title, "")
    save(figure, path)
