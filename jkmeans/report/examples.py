"""The examples nearest to each centroid: images as a mosaic, vectors as lines over features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jkmeans.drawing import FAINT, GRID, INK, head_figure, new_figure
from jkmeans.report.clusters import SHOWN_CLUSTERS, ClusteredExamples, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAREST = 10  # examples of a cluster


def are_images(examples: np.ndarray) -> bool:
    """Whether examples [n, *shape] are images: (h, w) or (h, w, 1 | 3 | 4)."""
    shape = examples.shape[1:]
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3, 4))


def as_pictures(images: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Images as they are shown.

    Args:
        images: [m, h, w] or [m, h, w, 1 | 3 | 4].
        dtype: of the examples that the images come from: bytes of a colour span 0 to 255.

    Returns:
        [m, h, w, 1 | 3], values from 0 to 1; NaN is black; a fourth channel is opacity, over white.
    """
    images = images if images.ndim == 4 else images[..., None]
    channels = images.shape[-1]
    # Grey images are stretched: not every set of bytes uses all 256 (digits have 17).
    if dtype == np.uint8 and channels > 1:
        low, high = 0.0, 255.0
    else:
        values = images[np.isfinite(images)]
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        if channels > 1 and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    images = np.nan_to_num((images - low) / (high - low if high > low else 1.0))
    images = np.clip(images, 0, 1)
    if channels == 4:
        alpha = images[..., 3:]
        images = images[..., :3] * alpha + 1 - alpha
    return images


def nearest_figure(clusters: ClusteredExamples, title: str) -> Figure:
    """The nearest examples of each cluster, of the largest if there are many."""
    shown = clusters.shown(SHOWN_CLUSTERS)
    which = "" if clusters.k <= SHOWN_CLUSTERS else f" (the largest {len(shown)} of {clusters.k:,})"
    if are_images(clusters.examples):
        h, w = clusters.examples.shape[1:3]
        tile = 0.62
        margin = 0.55 + 0.08 * max(len(clusters.describe(int(i))) for i in shown)
        figure = new_figure(
            NEAREST * tile * min(w / h, 3) + margin, max(len(shown) * tile + 0.9, 2)
        )
        ax = figure.subplots()
        draw_images(ax, clusters, shown, NEAREST, size=10, details=True)
        head_figure(figure, title, f"Examples nearest to each centroid{which}")
        return figure
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(max(2.5 * columns, 6), 1.6 * rows + 1.1)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    features = draw_vectors(axes, clusters, shown, size=8, details=True)
    subtitle = f"Examples nearest to each centroid{which}, bold: mean of the cluster; {features}"
    head_figure(figure, title, subtitle)
    return figure


def draw_images(
    ax: Axes,
    clusters: ClusteredExamples,
    shown: np.ndarray,
    columns: int,
    *,
    size: float,
    details: bool,
) -> None:
    """Draws each cluster's nearest examples as a row of images, with its number before it.

    Args:
        ax: where.
        clusters: whose examples are images.
        shown: [m] clusters, a row each.
        columns: examples of a row.
        size: of the text, in points.
        details: whether it also says what is in the cluster.
    """
    mosaic = _mosaic(clusters, shown, columns)
    ax.imshow(mosaic, interpolation="nearest" if mosaic.shape[0] < 600 else "antialiased")
    ax.set_axis_off()
    pitch = mosaic.shape[0] / len(shown)
    for row, cluster in enumerate(shown):
        middle = (row + 0.5) * pitch
        gap = 0.25 * pitch
        colour = clusters.colours[cluster] * 0.8
        ax.text(
            -gap,
            middle - (0.17 * pitch if details else 0),
            f"cluster {cluster}" if details else str(cluster),
            color=colour,
            fontsize=size,
            fontweight="bold",
            ha="right",
            va="center",
        )
        if details:
            ax.text(
                -gap,
                middle + 0.2 * pitch,
                clusters.describe(int(cluster)),
                color=INK,
                fontsize=0.8 * size,
                ha="right",
                va="center",
                parse_math=False,
            )


def _mosaic(clusters: ClusteredExamples, shown: np.ndarray, columns: int) -> np.ndarray:
    """The examples nearest to the centroids of the clusters shown, one cluster per row.

    Returns: [rows * pitch, columns * pitch, 3], values from 0 to 1, white where nothing is.
    """
    rows = [clusters.members(cluster)[:columns] for cluster in shown]
    tiles = [[_tile(clusters.examples[i]) for i in row] for row in rows]
    flat = [tile for row in tiles for tile in row]
    height, width = flat[0].shape[:2]
    pictures = iter(as_pictures(np.stack(flat), clusters.examples.dtype))
    # Small images are enlarged so that the gap between them can be a fraction of their pixels.
    zoom = max(1, round(64 / max(height, width)))
    gap = max(1, round(0.06 * zoom * max(height, width)))
    pitch_y, pitch_x = zoom * height + gap, zoom * width + gap
    mosaic = np.ones((len(shown) * pitch_y - gap, columns * pitch_x - gap, 3))
    for y, row in enumerate(tiles):
        for x in range(len(row)):
            tile = next(pictures)
            tile = tile.repeat(zoom, axis=0).repeat(zoom, axis=1)
            top, left = y * pitch_y, x * pitch_x
            mosaic[top : top + zoom * height, left : left + zoom * width] = tile
    return mosaic


def _tile(image: np.ndarray) -> np.ndarray:
    """An example as an image of moderate size, [h, w] or [h, w, 3], floats."""
    step = max(1, max(image.shape[:2]) // 96)
    image = np.asarray(image[::step, ::step], dtype=np.float64)
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image


def draw_vectors(
    axes: np.ndarray, clusters: ClusteredExamples, shown: np.ndarray, *, size: float, details: bool
) -> str:
    """Draws each cluster's nearest examples as lines over the features, with their mean.

    Args:
        axes: [≥ m] panels, of which those left over are hidden.
        clusters: whose examples are of any shape.
        shown: [m] clusters, a panel each.
        size: of the text, in points.
        details: whether it also says what is in the cluster.

    Returns:
        Which features they are, in words.
    """
    d = int(np.prod(clusters.examples.shape[1:]))
    members = [clusters.members(cluster) for cluster in shown]
    means = np.stack(
        [_mean(clusters.examples, rows) if len(rows) else np.full(d, np.nan) for rows in members]
    )
    features = _features(means[~np.isnan(means).all(axis=1)])
    for ax, cluster, rows, mean in zip(axes, shown, members, means, strict=False):
        # Over a single feature a line is a point.
        marker = "o" if len(features) == 1 else None
        colour = clusters.colours[cluster]
        for line in _vectors(clusters.examples, rows[:NEAREST])[:, features]:
            ax.plot(line, color=colour, linewidth=0.7, alpha=0.5, marker=marker, markersize=3)
        if len(rows):
            ax.plot(mean[features], color=colour * 0.6, linewidth=2, marker=marker, markersize=6)
        text = f"cluster {cluster}: {clusters.describe(int(cluster))}" if details else str(cluster)
        ax.set_title(
            text,
            fontsize=size,
            fontweight="normal" if details else "bold",
            color=clusters.colours[cluster] * 0.6,
            loc="left",
            pad=3,
            parse_math=False,
        )
    for ax in axes:
        ax.set_xticks([])
        ax.tick_params(labelsize=7, colors=FAINT, length=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    if len(features) < d:
        return f"the {len(features)} of {d:,} features in which the clusters differ most"
    return counted(d, "feature")


def _features(means: np.ndarray) -> np.ndarray:
    """The features in which the clusters differ most, in order: all, if a line can show them."""
    if means.shape[1] <= 100:
        return np.arange(means.shape[1])
    return np.sort(np.argsort(-np.nan_to_num(means).var(axis=0), kind="stable")[:50])


def _vectors(examples: np.ndarray, rows: np.ndarray) -> np.ndarray:
    d = int(np.prod(examples.shape[1:]))  # Of no rows NumPy does not find it.
    return np.asarray(examples[rows], dtype=np.float64).reshape(len(rows), d)


def _mean(examples: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean of the rows, [d], read in blocks."""
    rows = np.sort(rows)
    blocks = [rows[i : i + 8192] for i in range(0, len(rows), 8192)]
    sums = [_vectors(examples, block).sum(axis=0) for block in blocks]
    return np.sum(sums, axis=0) / len(rows)
