"""The pictures of a k-means job: sizes, inertia, silhouettes, a map, and the sweep over K."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# The look of all pictures of the house.
from jkmeans.drawing import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    head_figure,
    new_figure,
    palette,
    panel_title,
    save_all,
    soften,
)
from jkmeans.report.clusters import SHOWN_CLUSTERS, counted
from jkmeans.report.maps import EmbeddingMap, draw_map, principal_plane
from jkmeans.report.sizes import draw_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("sizes", "inertia", "silhouette", "map", "sweep", "centroids")

_MOST_IMAGES = 100


def write_report(
    folder: str | os.PathLike[str],
    *,
    rows: np.ndarray,
    labels: np.ndarray,
    silhouettes: np.ndarray,
    centroids: np.ndarray,
    sizes: np.ndarray,
    history: Sequence[tuple[int, int, float]],
    sweep: Mapping[str, Any] | None,
    image_shape: Sequence[int] | None,
    title: str,
) -> list[Path]:
    """Writes the pictures of a job as PNG files; those of an earlier report are replaced.

    Args:
      folder: where they go; made if missing.
      rows: [m, d], the sample that the map and the silhouettes show.
      labels: [m] int, their clusters.
      silhouettes: [m] float, NaN where there is one cluster only.
      centroids: [k, d].
      sizes: [k] int, of all rows.
      history: (restart, iteration, inertia); without any there is no such picture.
      sweep: of ``sweep.json``; None without one.
      image_shape: of a row that is an image, [h, w]; None otherwise.
      title: heads the pictures.

    Returns:
      The files written.
    """
    n = int(sizes.sum())
    figures: dict[str, Callable[[], Figure]] = {
        "sizes": lambda: _sizes(sizes, title),
    }
    if history:
        figures["inertia"] = lambda: _inertia(history, title)
    if np.isfinite(silhouettes).all():
        figures["silhouette"] = lambda: _silhouette(labels, silhouettes, len(sizes), n, title)
    figures["map"] = lambda: _map(rows, labels, centroids, sizes, title)
    if sweep is not None:
        figures["sweep"] = lambda: _sweep(sweep, title)
    if image_shape is not None and len(image_shape) == 2:
        figures["centroids"] = lambda: _centroids(centroids, sizes, image_shape, title)
    return save_all(folder, figures, PICTURES)


def _sizes(sizes: np.ndarray, title: str) -> Figure:
    figure = new_figure(8, 3.6)
    draw_sizes(figure.subplots(), sizes, palette(len(sizes)), "N", "rows")
    empty = int((sizes == 0).sum())
    head_figure(
        figure, title, f"Sizes: smallest {sizes.min():,}, largest {sizes.max():,}, {empty:,} empty"
    )
    return figure


def _inertia(history: Sequence[tuple[int, int, float]], title: str) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 3.6)
    ax = figure.subplots()
    restarts = sorted({restart for restart, _, _ in history})
    lowest = [min(v for r, _, v in history if r == restart) for restart in restarts]
    best = restarts[int(np.argmin(lowest))]
    for restart in [r for r in restarts if r != best] + [best]:
        points = np.asarray([(i, v) for r, i, v in history if r == restart])
        line = {"marker": "o", "markersize": 2, "linewidth": 1, "color": FAINT, "alpha": 0.6}
        if restart == best:
            line = {"marker": "o", "markersize": 3.5, "color": BLUE, "zorder": 3}
        ax.plot(points[:, 0], points[:, 1], **line)  # pyright: ignore[reportArgumentType]
    last = [(i, v) for r, i, v in history if r == best][-1]
    ax.annotate(
        f"{last[1]:,.0f}" if last[1] >= 1000 else f"{last[1]:.6g}",
        last,
        xytext=(0, 7),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=INK,
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("iteration", fontsize=9, color=INK)
    ax.set_ylabel("inertia", fontsize=9, color=INK)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    ax.margins(y=0.12)
    soften(ax, 8.5)
    words = "Inertia by iteration"
    if len(restarts) > 1:
        words += f", {len(restarts)} restarts, the best in blue"
    head_figure(figure, title, words)
    return figure


def _silhouette(labels: np.ndarray, silhouettes: np.ndarray, k: int, n: int, title: str) -> Figure:
    mean = float(silhouettes.mean())
    figure = new_figure(8, 4.4)
    ax = figure.subplots()
    few = k <= SHOWN_CLUSTERS
    if few:
        colours = palette(k)
        gap = max(1, len(labels) // 100)
        bottom = 0
        for cluster in range(k):
            values = np.sort(silhouettes[labels == cluster])
            if len(values) == 0:
                continue
            places = bottom + np.arange(len(values))
            ax.fill_betweenx(places, 0, values, color=colours[cluster], linewidth=0, step="mid")
            ax.annotate(
                str(cluster),
                (0, places.mean()),
                xycoords=ax.get_yaxis_transform(),
                xytext=(-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8.5,
                color=INK,
                annotation_clip=False,
            )
            bottom = int(places[-1]) + 1 + gap
        ax.set_ylim(bottom, -gap)
        ax.set_yticks([])
        ax.set_ylabel("cluster", fontsize=9, color=INK, labelpad=18)
        ax.set_xlabel("silhouette of a row", fontsize=9, color=INK)
    else:
        means = [silhouettes[labels == c].mean() for c in range(k) if (labels == c).any()]
        ax.hist(means, bins=40, color=BLUE)
        ax.set_ylabel("clusters", fontsize=9, color=INK)
        ax.set_xlabel("mean silhouette of a cluster", fontsize=9, color=INK)
    ax.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    soften(ax, 8.5)
    if few:
        ax.grid(axis="y", visible=False)
    sample = f"{len(labels):,} of {n:,} rows" if len(labels) < n else f"{n:,} rows"
    head_figure(figure, title, f"Silhouettes of {sample}, mean {mean:.3f} (dashed)")
    return figure


def _map(
    rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray, sizes: np.ndarray, title: str
) -> Figure:
    k = len(sizes)
    both = np.concatenate([rows, centroids[sizes > 0]]).astype(np.float64)
    method = ""
    if both.shape[1] == 1:
        # The height means nothing: it only keeps the points apart.
        height = np.random.default_rng(0).uniform(-1, 1, len(both))
        height[len(rows) :] = 0
        both = np.column_stack([both[:, 0], height])
    elif both.shape[1] > 2:
        # Centroids are to be seen in the plane, not to choose it.
        both, method = principal_plane(rows, both), "PCA of "
    plane = EmbeddingMap(np.arange(len(rows)), both[: len(rows)], both[len(rows) :], method)
    figure = new_figure(6.5, 6.6)
    ax = figure.subplots()
    names = [str(i) for i in range(k)] if k <= SHOWN_CLUSTERS else None
    few = len(plane.centroids) <= SHOWN_CLUSTERS
    draw_map(ax, plane, labels, palette(k), names, centroids=few)
    if not few:
        places = plane.centroids.T
        ax.scatter(*places, s=12, c=INK, edgecolors="white", linewidths=0.6, zorder=3)
    mark = "×" if few else "●"
    panel_title(ax, f"{counted(k, 'cluster')} ({mark} centroids)")
    n = int(sizes.sum())
    sample = f"{len(rows):,} of {n:,} rows" if len(rows) < n else f"{n:,} rows"
    head_figure(figure, title, f"{method}{sample}")
    return figure


def _sweep(sweep: Mapping[str, Any], title: str) -> Figure:
    from jkmeans.selection import STABLE

    ks = np.asarray(sweep["n_clusters"])
    figure = new_figure(11, 3.6)
    axes = figure.subplots(1, 3)
    panels = (
        ("inertia", "Inertia: the elbow", BLUE),
        ("silhouette", "Silhouette: higher is better", ORANGE),
        # Within the panel a curve or the dashed line might run through these words.
        ("stability", f"Stability: ARI of refits, stable from {STABLE:g} on", GREEN),
    )
    for ax, (name, heading, colour) in zip(axes, panels, strict=True):
        ax.plot(ks, sweep[name], marker="o", markersize=3.5, color=colour)
        ax.axvline(sweep["suggestion"], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xlabel("K", fontsize=9, color=INK)
        if ks.max() >= 10 * ks.min():
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        soften(ax, 8.5)
        panel_title(ax, heading)
    axes[2].set_ylim(min(0.0, min(sweep["stability"])), 1.05)
    axes[2].axhline(STABLE, color=FAINT, linewidth=1, linestyle=":")
    head_figure(
        figure, title, f"{sweep['n_rows']:,} rows; dashed: K = {sweep['suggestion']}, suggested"
    )
    return figure


def _centroids(
    centroids: np.ndarray, sizes: np.ndarray, shape: Sequence[int], title: str
) -> Figure:
    k = len(sizes)
    order = np.argsort(-sizes, kind="stable")[:_MOST_IMAGES]
    columns = min(10, len(order))
    lines = -(-len(order) // columns)
    figure = new_figure(max(0.85 * columns, 5), 0.98 * lines + 0.7)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, cluster in zip(axes, order, strict=False):
        ax.imshow(centroids[cluster].reshape(shape), cmap="gray_r", interpolation="nearest")
        ax.set_title(f"{cluster}: {sizes[cluster]:,}", fontsize=7, color=INK, pad=2)
    some = f"largest {len(order)} of " if len(order) < k else ""
    head_figure(figure, title, f"Centroids of the {some}{counted(k, 'cluster')}, with their sizes")
    return figure
