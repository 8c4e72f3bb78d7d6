"""The sizes of the clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jkmeans.drawing import BLUE, INK, head_figure, new_figure, soften
from jkmeans.report.clusters import SHOWN_CLUSTERS, ClusteredExamples, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sizes_figure(clusters: ClusteredExamples, title: str) -> Figure:
    """The sizes, largest first, beside the n / K of clusters of one size."""
    from matplotlib.ticker import MaxNLocator

    order = np.argsort(-clusters.sizes, kind="stable")
    sizes = clusters.sizes[order]
    figure = new_figure(8, 3.6)
    ax = figure.subplots()
    if clusters.k <= SHOWN_CLUSTERS:
        ax.bar(range(clusters.k), sizes, color=clusters.colours[order], width=0.8)
        ax.set_xticks(range(clusters.k), [str(i) for i in order])
        ax.set_xlabel("cluster", fontsize=9, color=INK)
    else:
        ax.stairs(sizes, np.arange(clusters.k + 1), fill=True, color=BLUE)
        ax.set_xlabel("clusters, largest first", fontsize=9, color=INK)
        ax.set_xlim(0, clusters.k)
    uniform = clusters.n / clusters.k
    ax.axhline(uniform, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        f"n / K = {uniform:,.0f}" if uniform >= 10 else f"n / K = {uniform:.1f}",
        (1, uniform),
        xycoords=ax.get_yaxis_transform(),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=INK,
    )
    ax.set_ylabel("examples", fontsize=9, color=INK)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    soften(ax, 8.5)
    ax.grid(axis="x", visible=False)
    empty = int((sizes == 0).sum())
    head_figure(figure, title, f"Sizes of {counted(clusters.k, 'cluster')}, {empty:,} empty")
    return figure
