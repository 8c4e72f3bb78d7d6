"""The sizes of the clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jkmeans.drawing import BLUE, INK, head_figure, new_figure, soften
from jkmeans.report.clusters import SHOWN_CLUSTERS, ClusteredExamples, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_sizes(ax: Axes, sizes: np.ndarray, colours: np.ndarray, total: str, unit: str) -> None:
    """Draws sizes [k], largest first, in colours [k, 3] if few, and a line at their mean.

    Args:
        ax: an empty panel.
        sizes: members of each cluster.
        colours: of the clusters.
        total: what all members together are called: `n`, with which the line is named.
        unit: what the members are, for the axis.
    """
    from matplotlib.ticker import MaxNLocator

    k = len(sizes)
    order = np.argsort(-sizes, kind="stable")
    if k <= SHOWN_CLUSTERS:
        ax.bar(range(k), sizes[order], color=colours[order], width=0.8)
        ax.set_xticks(range(k), [str(i) for i in order])
        ax.set_xlabel("cluster", fontsize=9, color=INK)
    else:
        ax.stairs(sizes[order], np.arange(k + 1), fill=True, color=BLUE)
        ax.set_xlabel("clusters, largest first", fontsize=9, color=INK)
        ax.set_xlim(0, k)
    uniform = int(sizes.sum()) / k
    ax.axhline(uniform, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        f"{total} / K = {uniform:,.0f}" if uniform >= 10 else f"{total} / K = {uniform:.1f}",
        (1, uniform),
        xycoords=ax.get_yaxis_transform(),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=INK,
    )
    ax.set_ylabel(unit, fontsize=9, color=INK)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    soften(ax, 8.5)
    ax.grid(axis="x", visible=False)


def sizes_figure(clusters: ClusteredExamples, title: str) -> Figure:
    """The sizes, largest first, beside the n / K of clusters of one size."""
    figure = new_figure(8, 3.6)
    draw_sizes(figure.subplots(), clusters.sizes, clusters.colours, "n", "examples")
    empty = int((clusters.sizes == 0).sum())
    head_figure(figure, title, f"Sizes of {counted(clusters.k, 'cluster')}, {empty:,} empty")
    return figure
