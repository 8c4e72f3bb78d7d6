"""Curves of the metrics over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jkmeans.drawing import (
    FAINT,
    INK,
    LINES,
    head_figure,
    new_figure,
    panel_title,
    say_instead,
    soften,
)
from jkmeans.report.records import (
    agreement_names,
    loss_names,
    phase_name,
    recorded_names,
    series_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(
    ax: Axes, metrics: Sequence[Mapping[str, Any]], names: Mapping[str, str], *, size: float = 8
) -> None:
    """Draws metrics over the epochs in one panel.

    Args:
        ax: the panel.
        metrics: the records of the epochs.
        names: each metric, and what the legend calls it.
        size: of the text, in points.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    everything = []
    colours = iter(LINES * (1 + len(names) // len(LINES)))
    for index, (name, label) in enumerate(names.items()):
        series = series_of(metrics, name)
        if not series:
            continue
        # The first of several may coincide with another (a total with its only term, the empty
        # clusters with the relocated ones): it lies beneath, wide and pale.
        beneath = index == 0 and name in ("loss", "empty_clusters") and len(names) > 1
        colour = INK if beneath else next(colours)
        for part, (epochs, values) in enumerate(series):
            ax.plot(
                epochs,
                values,
                color=colour,
                linewidth=4 if beneath else 1.6,
                alpha=0.3 if beneath else 1.0,
                # A single epoch is a point: a line would not show it.
                marker="o" if len(epochs) < 3 else None,
                markersize=3,
                label=label if part == 0 else None,
            )
            everything.append(values)
    epochs = [record["epoch"] for record in metrics]
    start = min(epochs) - 0.5
    pretrained = [r["epoch"] for r in metrics if r.get("phase") == "pretrain"]
    if 0 < len(pretrained) < len(metrics):
        ax.axvspan(start, max(pretrained) + 0.5, color="#f1f1f1", zorder=0, linewidth=0)
    ax.set_xlim(start, max(epochs) + 0.5)
    values = np.concatenate(everything) if everything else np.zeros(0)
    # Within a small range a logarithmic axis has no tick to show.
    if len(values) and values.min() > 0 and values.max() > 8 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    if len(names) > 1:
        ax.legend(fontsize=size, frameon=False, labelcolor=INK, handlelength=1.2)
    soften(ax, size)


def curves_figure(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A panel for each kind of metric that was recorded."""
    panels: list[tuple[str, dict[str, str]]] = [("Loss", loss_names(metrics))]
    panels.append(("Agreement with the true classes", agreement_names(metrics)))
    for heading, names in (
        ("Labels that changed", {"label_change": "changed"}),
        ("Empty clusters", {"empty_clusters": "empty", "relocated_clusters": "relocated"}),
        ("Variance of the embeddings", {"embedding_variance": "variance"}),
        ("Inertia", {"inertia": "inertia"}),
    ):
        panels.append((heading, recorded_names(metrics, names)))
    panels = [(heading, names) for heading, names in panels if names]
    if not panels:
        figure = new_figure(8, 3)
        say_instead(figure.subplots(), "no metric was recorded")
        head_figure(figure, title, "Metrics by epoch")
        return figure

    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(4.2 * columns, 2.8 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (heading, names) in zip(axes, panels, strict=False):
        draw_curves(ax, metrics, names)
        _phase_names(ax, metrics, 7.5)
        panel_title(ax, heading, pad=18)
        if "label_change" in names:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        if "empty_clusters" in names:
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            # A count of zero is drawn just above the axis, not under it.
            top = max(1.0, ax.get_ylim()[1])
            ax.set_ylim(-0.03 * top, top)
        ax.set_xlabel("epoch", fontsize=8, color=INK)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    head_figure(figure, title, "Metrics by epoch")
    return figure


def _phase_names(ax: Axes, metrics: Sequence[Mapping[str, Any]], size: float) -> None:
    """Writes the name of each phase above its part of the axis."""
    phases = list(dict.fromkeys(r.get("phase") for r in metrics))
    total = max(r["epoch"] for r in metrics) - min(r["epoch"] for r in metrics) + 1
    for phase in phases:
        epochs = [r["epoch"] for r in metrics if r.get("phase") == phase]
        if len(phases) > 1 and len(epochs) > 0.15 * total:
            ax.text(
                (min(epochs) + max(epochs)) / 2,
                1.01,
                phase_name(phase),
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=size,
                color=FAINT,
            )
