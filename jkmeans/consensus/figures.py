"""Pictures of decentralised work: errors by rounds and bytes, networks with what nodes hold."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jkmeans.consensus.graphs import Graph
from jkmeans.drawing import (
    FAINT,
    INK,
    LINES,
    head_figure,
    new_figure,
    panel_title,
    save,
    soften,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NETWORKS = 3
"""Topologies that the picture of networks shows."""

WORDS = {
    "gradient_descent": "gradient descent",
    "decentralised_descent": "decentralised descent",
    "gradient_tracking": "gradient tracking",
    "extra": "EXTRA",
}

_SHOTS = 4
_TEXT_NODES = 20
_MOST_POINTS = 2000
_FLOOR = 1e-17


class GossipCurve(NamedTuple):
    """Gossip on one topology.

    Attributes:
      name: of the topology.
      errors: from the slowest mode, [T+1].
      random: from a random start, [T+1].
      rate: predicted, of a round.
      bytes_a_round: of all nodes.
    """

    name: str
    errors: np.ndarray
    random: np.ndarray
    rate: float
    bytes_a_round: int


class Curve(NamedTuple):
    """An error by rounds.

    Attributes:
      name: in the legend.
      errors: [T+1].
      bytes_a_round: of all nodes.
      style: of the line.
    """

    name: str
    errors: np.ndarray
    bytes_a_round: int
    style: str = "-"


class NetworkRow(NamedTuple):
    """A network at some moments.

    Attributes:
      graph: with positions.
      titles: of the moments, [t].
      values: of the nodes, above or at 0, [t, N]; drawn by their logarithm.
      estimates: of the nodes, [t, N, n], written beside few nodes where n is 2; None for none.
    """

    graph: Graph
    titles: Sequence[str]
    values: np.ndarray
    estimates: np.ndarray | None


def draw_gossip(path: Path, curves: Sequence[GossipCurve], tolerance: float) -> None:
    """Errors of gossip against rounds and against bytes, the predicted ones dashed."""
    figure = new_figure(9.6, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    last = 1
    start = _start_of_bytes(curves)
    for i, (curve, colour) in enumerate(zip(curves, _colours(curves), strict=True)):
        rounds = np.arange(len(curve.errors))
        # The first are broad, for a 4×4 torus is a hypercube and would be hidden below it.
        width = max(1.6, 3.6 - 0.6 * i)
        # A round that ends all at once is drawn to the bottom of the picture.
        shown = np.maximum(curve.errors, _FLOOR)
        left.plot(rounds, shown, color=colour, lw=width, label=curve.name)
        sent = np.maximum(rounds * curve.bytes_a_round, start)
        right.plot(sent, shown, color=colour, lw=width)
        left.plot(rounds, np.maximum(curve.random, _FLOOR), color=colour, lw=1, alpha=0.45)
        if curve.rate > 1e-12:
            predicted = curve.rate ** rounds.astype(float)
            for ax, x in ((left, rounds), (right, sent)):
                ax.plot(x, predicted, color=INK, lw=0.9, ls=(0, (4, 4)))
        below = np.flatnonzero(curve.errors <= tolerance)
        last = max(last, int(below[0]) if below.size else len(rounds))
    left.plot([], [], color=INK, lw=0.9, ls=(0, (4, 4)), label="spectral gap")
    left.plot([], [], color=FAINT, lw=1, alpha=0.6, label="random start")
    left.set_xlim(0, 1.1 * last)
    left.set_ylim(tolerance / 3, 2)
    _scale_bytes(right, start)
    _frame(left, right, "distance to the mean, relative to the first")
    left.legend(fontsize=8, frameon=False, loc="upper right")
    panel_title(left, "Against rounds")
    panel_title(right, "Against bytes that all nodes send")
    head_figure(
        figure, "Gossip averages from the slowest start", "dashed: what the spectral gap predicts"
    )
    save(figure, path)


def draw_estimation(path: Path, curves: Mapping[str, Sequence[Curve]], tolerance: float) -> None:
    """Errors of each method against rounds and bytes, one row of panels a method."""
    central = curves.get("gradient_descent", ())
    methods = [name for name in curves if name != "gradient_descent"] or list(curves)
    figure = new_figure(9.6, 0.9 + 2.9 * len(methods))
    grid = figure.subplots(len(methods), 2, squeeze=False, sharey=True)
    for (left, right), method in zip(grid, methods, strict=True):
        ours = curves[method] if method != "gradient_descent" else ()
        start = _start_of_bytes([*ours, *central])
        colours = [*_colours(ours), *[INK] * len(central)]
        for curve, colour in zip([*ours, *central], colours, strict=True):
            rounds, errors = _thinned(curve.errors)
            style = "--" if colour == INK else "-"
            left.plot(np.maximum(rounds, 0.9), errors, color=colour, ls=style, label=curve.name)
            sent = np.maximum(rounds * curve.bytes_a_round, start)
            right.plot(sent, errors, color=colour, ls=style)
        left.set_xscale("log")
        _scale_bytes(right, start)
        for ax in (left, right):
            ax.axhline(tolerance, color=FAINT, lw=0.8, ls=":")
        everything = [curve.errors for curve in (*ours, *central)]
        left.set_ylim(max(tolerance / 30, 0.5 * min(e.min() for e in everything)), 3)
        _frame(left, right, "distance to the closed form")
        panel_title(left, f"{WORDS[method]}: against rounds")
        panel_title(right, "against bytes that all nodes send")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, fontsize=8, frameon=False, loc="outside lower center", ncols=len(names)
    )
    head_figure(
        figure,
        "Least squares by nodes that talk to their neighbours",
        f"relative to the length of the closed form; dotted: {tolerance:g}",
    )
    save(figure, path)


def draw_curves(
    path: Path,
    panels: Mapping[str, Sequence[Curve]],
    *,
    title: str,
    subtitle: str,
    value: str,
    per: str = "rounds",
    logarithmic: bool = True,
    rounds_a_point: Mapping[str, int] | None = None,
    a_point: int = 1,
) -> None:
    """Curves against rounds and bytes, one row of panels for each group.

    Args:
      path: of the PNG.
      panels: curves by the title of their row; the same names have the same colours.
      title: of the picture.
      subtitle: below it.
      value: what the curves are of.
      per: what a point of a curve is.
      logarithmic: whether values are drawn by their logarithm.
      rounds_a_point: rounds of which ``bytes_a_round`` are, between two points of a curve, by its
        name; None where a point has one.
      a_point: what a point of any curve counts on the first axis, where a round is none.
    """
    figure = new_figure(9.6, 1.1 + 2.9 * len(panels))
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    bases = list(dict.fromkeys(name.partition(",")[0] for name in names))
    colour_of = dict(zip(bases, _colours(bases), strict=True))
    handles = {}
    for (left, right), (row, curves) in zip(grid, panels.items(), strict=True):
        start = _start_of_bytes(curves)
        for curve in curves:
            points = np.arange(len(curve.errors))
            by = (rounds_a_point or {}).get(curve.name, 1)
            is_central = not curve.bytes_a_round
            colour = INK if is_central else colour_of[curve.name.partition(",")[0]]
            shown = curve.errors
            if logarithmic:
                shown = np.where(shown > 0, shown, np.nan)
            (handles[curve.name],) = left.plot(
                points * by * a_point,
                shown,
                color=colour,
                ls=curve.style,
                lw=1.5,
                label=curve.name,
            )
            if not is_central:
                sent = np.maximum(points * by * curve.bytes_a_round, start)
                right.plot(sent, shown, color=colour, ls=curve.style, lw=1.5)
        _frame(left, right, value, per, logarithmic)
        _scale_bytes(right, start)
        panel_title(left, f"{row}: against {per}")
        panel_title(right, "against bytes that all nodes send")
    figure.legend(
        list(handles.values()),
        list(handles),
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=min(4, len(handles)),
    )
    head_figure(figure, title, subtitle)
    save(figure, path)


def draw_disagreement(
    path: Path, measured: Mapping[str, np.ndarray], bounds: Mapping[str, np.ndarray], title: str
) -> None:
    """The disagreement of the nodes by iterations, and the bound on it, dotted.

    Nodes that agree to the last bit have no place on a logarithmic axis: the legend says so.
    """
    figure = new_figure(7.2, 4.2)
    ax = figure.subplots()
    for (name, values), colour in zip(measured.items(), _colours(list(measured)), strict=True):
        agree = not np.any(values > 0)
        label = f"{name} (no difference)" if agree else name
        shown = np.where(values > 0, values, np.nan)
        ax.plot(np.arange(1, len(values) + 1), shown, color=colour, lw=1.5, label=label)
        if name in bounds and not agree:
            ax.plot(np.arange(1, len(values) + 1), bounds[name], color=colour, lw=1, ls=":")
    ax.plot([], [], color=INK, lw=1, ls=":", label="bound, in the colour of its network")
    ax.set_yscale("log")
    positive = [values[values > 0].min() for values in measured.values() if np.any(values > 0)]
    if positive:  # The bound knows no rounding, and may lie far below.
        ax.set_ylim(bottom=0.3 * min(positive))
    ax.set_xlabel("iterations", fontsize=9, color=INK)
    ax.set_ylabel("distance of the nodes' statistics to their mean", fontsize=9, color=INK)
    soften(ax, 8.5)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    head_figure(figure, title, "")
    save(figure, path)


def draw_networks(
    path: Path, rows: Sequence[NetworkRow], title: str, subtitle: str, value: str
) -> None:
    """Networks at some moments, nodes coloured by a number, and their estimates beside few."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=2, foreground="white")  # Edges end where a text begins.
    n_columns = max(len(row.titles) for row in rows)
    side = 2.8
    figure = new_figure(side * n_columns + 0.8, 0.9 + (side + 0.05) * len(rows))
    grid = figure.subplots(len(rows), n_columns, squeeze=False)
    positive = np.concatenate([row.values[row.values > 0] for row in rows])
    top = float(positive.max()) if positive.size else 1.0
    low = max(float(positive.min()) if positive.size else 1e-6, 1e-8 * top)
    norm = LogNorm(low, top) if low < top else LogNorm(top / 10, top)
    for axes, row in zip(grid, rows, strict=True):
        places = row.graph.positions
        few = row.graph.n_nodes <= _TEXT_NODES
        for i, ax in enumerate(axes):
            ax.set_axis_off()
            if i >= len(row.titles):
                continue
            ax.add_collection(
                LineCollection(
                    list(places[row.graph.edges]),
                    colors="#c9c9c9",
                    linewidths=0.9 if few else 0.25,
                )
            )
            ax.scatter(
                *places.T,
                c=np.clip(row.values[i], low, None),
                norm=norm,
                cmap="viridis_r",
                s=90 if few else 6,
                edgecolors="white",
                linewidths=0.8 if few else 0.0,
                zorder=3,
            )
            if few and row.estimates is not None and row.estimates.shape[2] == 2:
                for node, (place, estimate) in enumerate(
                    zip(places, row.estimates[i], strict=True)
                ):
                    away = _away(row.graph, node)
                    ax.annotate(
                        f"{estimate[0]:.2f}, {estimate[1]:.2f}",
                        place,
                        xytext=(22 * away[0], 11 * away[1]),
                        textcoords="offset points",
                        ha="center",
                        va="center",
                        fontsize=5.5,
                        color=INK,
                        path_effects=[halo],
                        zorder=4,
                    )
            ax.set_aspect("equal")
            ax.margins(0.16 if few else 0.03)
            panel_title(ax, f"{row.graph.name}, {row.titles[i]}", size=8.5)
    bar = figure.colorbar(
        ScalarMappable(norm, "viridis_r"), ax=grid, shrink=0.8, aspect=12 * len(rows), pad=0.01
    )
    # Wrapped, for a single row of networks is no higher than half the words.
    bar.set_label(textwrap.fill(value, 20 + 20 * len(rows)), fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=8, which="both")
    bar.outline.set_visible(False)  # pyright: ignore
    head_figure(figure, title, subtitle)
    save(figure, path)


def chosen(shots: np.ndarray, rounds: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The first, the last and some shots between: [t, ...] and when they were taken."""
    picked = np.unique(np.linspace(0, len(shots) - 1, _SHOTS).round().astype(int))
    return shots[picked], [int(t) for t in rounds[picked]]


def chosen_early(values: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Values after the first, the last and some iterations between, most of them early."""
    picked = np.unique(np.geomspace(1, len(values), _SHOTS).round().astype(int))
    return values[picked - 1], [int(t) for t in picked]


def short_vector(values: np.ndarray) -> str:
    """A few numbers of a vector."""
    shown = ", ".join(f"{value:.4g}" for value in values[:4])
    return f"({shown}{', …' if len(values) > 4 else ''})"


def _away(graph: Graph, node: int) -> np.ndarray:
    """A direction of length one from a node away from its neighbours; down where there is none."""
    offsets = graph.positions[graph.neighbours(node)] - graph.positions[node]
    offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
    away = -offsets.mean(axis=0)
    length = np.linalg.norm(away)
    return away / length if length > 0.1 else np.array([0.0, -1.0])


def _colours(items: Sequence) -> list[str]:
    return [LINES[i % len(LINES)] for i in range(len(items))]


def _start_of_bytes(curves: Sequence[Curve] | Sequence[GossipCurve]) -> float:
    """Where curves begin on a logarithmic axis of bytes, which has no 0."""
    return 0.5 * min((c.bytes_a_round for c in curves if c.bytes_a_round), default=1)


def _scale_bytes(ax: Axes, start: float) -> None:
    """A logarithmic axis from ``start`` on, its numbers only those that have room."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.set_xlim(left=start)
    if ax.get_xlim()[1] > 10 * start:
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.xaxis.set_minor_formatter(NullFormatter())


def _thinned(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of a curve with many of them, evenly on a logarithmic axis."""
    if len(errors) <= _MOST_POINTS:
        return np.arange(len(errors)), errors
    rounds = np.unique(np.geomspace(1, len(errors), _MOST_POINTS).astype(int)) - 1
    return rounds, errors[rounds]


def _frame(
    left: Axes, right: Axes, value: str, per: str = "rounds", logarithmic: bool = True
) -> None:
    for ax in (left, right):
        if logarithmic:
            ax.set_yscale("log")
        soften(ax, 8.5)
    left.set_xlabel(per, fontsize=9, color=INK)
    right.set_xlabel("bytes", fontsize=9, color=INK)
    left.set_ylabel(value, fontsize=9, color=INK)
