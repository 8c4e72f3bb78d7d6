"""Pictures of a finished run: curves, a map of the embeddings, nearest examples, confusion.

What is read off the arrays of a run here serves its page (page.py) too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jkmeans.drawing import (
    BLUE,
    FAINT,
    GRID,
    INK,
    LINES,
    head_figure,
    new_figure,
    palette,
    panel_title,
    save,
    say_instead,
    soften,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP_EXAMPLES = 2000  # t-SNE of this many takes seconds on a laptop
SHOWN_CLUSTERS = 20
SUMMARY_CLUSTERS = 10
NEAREST = 10
MAX_CLASSES = 30

PICTURES = ("curves", "map", "nearest", "confusion", "sizes", "summary")

PHASE_NAMES = {"pretrain": "pretraining", "cluster": "clustering"}


def write_report(
    folder: str | os.PathLike[str],
    *,
    metrics: Sequence[Mapping[str, Any]],
    embeddings: np.ndarray,
    labels: np.ndarray,
    distances: np.ndarray,
    centroids: np.ndarray,
    examples: np.ndarray,
    truth: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    title: str = "",
    embedding_map: EmbeddingMap | None = None,
) -> list[Path]:
    """Writes the pictures of a run as PNG files.

    `curves.png` (if epochs were recorded), `map.png`, `nearest.png`, `confusion.png` (with true
    classes, at most 30), `sizes.png` and `summary.png`, a wide picture for a first glance. A
    picture from an earlier report is replaced once the new one is complete, and removed if this
    report has no such picture.

    Args:
        folder: where the pictures go, made if missing.
        metrics: the records of the epochs, as `jkmeans.recorder.read_metrics` returns them.
        embeddings: embeddings of the examples, [n, p].
        labels: cluster of each example, integers from 0 to k - 1, [n].
        distances: distance of each embedding to its centroid, [n]; of NaN the example comes last.
        centroids: [k, p].
        examples: the data as the user knows them, [n, *example_shape]: images if the shape is
            (h, w) or (h, w, 1 | 3 | 4), otherwise vectors. May be a memory map: only the rows
            that are shown are read.
        truth: true class of each example, [n].
        class_names: names of the classes 0, 1, …
        seed: picks the examples in the map.
        title: heads the pictures: data set, method.
        embedding_map: where `map_embeddings` has placed these embeddings, if it has: t-SNE takes
            seconds.

    Returns:
        The files written.

    Raises:
        ValueError: the arrays do not belong together.
    """
    folder = Path(folder)
    clusters = ClusteredExamples.of(
        embeddings, labels, distances, centroids, examples, truth, class_names
    )
    folder.mkdir(parents=True, exist_ok=True)
    placed = embedding_map or map_embeddings(clusters, seed)

    figures: dict[str, Callable[[], Figure]] = {}
    if metrics:
        figures["curves"] = lambda: _curves(metrics, title)
    figures["map"] = lambda: _map(clusters, placed, title)
    figures["nearest"] = lambda: _nearest(clusters, title)
    if clusters.truth is not None and 1 <= len(clusters.class_names) <= MAX_CLASSES:
        figures["confusion"] = lambda: _confusion(clusters, title)
    figures["sizes"] = lambda: _sizes(clusters, title)
    figures["summary"] = lambda: _summary(clusters, placed, metrics, title)

    written = []
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        save(draw(), path)
        written.append(path)
    for name in PICTURES:
        if name not in figures:
            (folder / f"{name}.png").unlink(missing_ok=True)
    return written


# --- the run as the pictures need it ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClusteredExamples:
    """The arrays of a report, checked, with what several pictures share."""

    embeddings: np.ndarray  # [n, p]
    labels: np.ndarray  # [n]
    distances: np.ndarray  # [n]
    centroids: np.ndarray  # [k, p]
    examples: np.ndarray  # [n, ...]
    truth: np.ndarray | None  # [n], index into class_names
    class_names: list[str]
    sizes: np.ndarray  # [k]
    colours: np.ndarray  # [k, 3]
    class_colours: np.ndarray  # [n_classes, 3]

    @staticmethod
    def of(
        embeddings, labels, distances, centroids, examples, truth, class_names
    ) -> ClusteredExamples:
        """Checks that the arrays belong together, see `write_report`; truth becomes an index.

        Raises:
            ValueError: they do not.
        """
        labels = np.asarray(labels)
        n, k = len(labels), len(centroids)
        for name, array in (
            ("embeddings", embeddings),
            ("distances", distances),
            ("examples", examples),
            ("truth", truth),
        ):
            if array is not None and len(array) != n:
                raise ValueError(f"{name} has {len(array)} rows, but there are {n} labels")
        if n == 0:
            raise ValueError("labels is empty: there is nothing to report")
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= k:
            raise ValueError(f"labels must be integers from 0 to {k - 1}, one per centroid")

        names: list[str] = []
        if truth is not None:
            values, truth = np.unique(np.asarray(truth), return_inverse=True)
            truth = truth.reshape(-1)
            names = [_class_name(value, class_names) for value in values.tolist()]
        colours, class_colours = palette(k), palette(len(names))
        if truth is not None and max(k, len(names)) <= SHOWN_CLUSTERS:
            shared = palette(max(k, len(names)))
            colours, class_colours = _matched_colours(truth, labels, k, shared), shared
        return ClusteredExamples(
            embeddings=embeddings,
            labels=labels,
            distances=np.asarray(distances, dtype=np.float64),
            centroids=np.asarray(centroids, dtype=np.float64),
            examples=examples,
            truth=truth,
            class_names=names,
            sizes=np.bincount(labels, minlength=k),
            colours=colours,
            class_colours=class_colours,
        )

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids)

    def shown(self, limit: int) -> np.ndarray:
        """The clusters that fit into a picture: all of them, or the largest."""
        if self.k <= limit:
            return np.arange(self.k)
        return np.argsort(-self.sizes, kind="stable")[:limit]

    def members(self, cluster: int) -> np.ndarray:
        """The examples of a cluster, nearest first."""
        rows = np.flatnonzero(self.labels == cluster)
        return rows[np.argsort(self.distances[rows], kind="stable")]

    def describe(self, cluster: int) -> str:
        """Size and, with true classes, the most frequent class: `187 · 92% Sneaker`."""
        size = self.sizes[cluster]
        if size == 0:
            return "empty"
        if self.truth is None:
            return counted(size, "example")
        counts = np.bincount(self.truth[self.labels == cluster], minlength=len(self.class_names))
        best = int(counts.argmax())
        name = self.class_names[best]
        name = f"class {name}" if name.isdigit() else name
        return f"{size:,} · {100 * counts[best] / size:.0f}% {name}"


def _class_name(value: Any, class_names: Sequence[str] | None) -> str:
    if class_names is not None and isinstance(value, int) and 0 <= value < len(class_names):
        return str(class_names[value])
    return str(value)


def _matched_colours(
    truth: np.ndarray, labels: np.ndarray, k: int, palette: np.ndarray
) -> np.ndarray:
    """Gives each cluster the colour of the class that it is matched with."""
    from jkmeans.metrics import match

    colour_of = match(truth, labels)
    spare = iter(sorted(set(range(len(palette))) - set(colour_of.values())))
    return palette[[colour_of[i] if i in colour_of else next(spare) for i in range(k)]]


# --- the map ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """Embeddings and centroids in the plane."""

    rows: np.ndarray  # [m] examples in the map
    points: np.ndarray  # [m, 2]
    centroids: np.ndarray  # [c, 2], the centroids of clusters that are not empty
    method: str


def map_embeddings(clusters: ClusteredExamples, seed: int) -> EmbeddingMap:
    """Places a sample of at most `MAP_EXAMPLES` embeddings, and the centroids, in the plane."""
    rows = np.arange(clusters.n)
    if clusters.n > MAP_EXAMPLES:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAP_EXAMPLES, replace=False))
    x = np.asarray(clusters.embeddings[rows], dtype=np.float64).reshape(len(rows), -1)
    finite = np.isfinite(x).all(axis=1)
    rows, x = rows[finite], x[finite]
    usable = (clusters.sizes > 0) & np.isfinite(clusters.centroids).all(axis=1)
    c = clusters.centroids[usable].reshape(int(usable.sum()), -1)

    both = np.concatenate([x, c])
    if len(x) == 0:
        plane, method = np.zeros((len(both), 2)), "no finite value in "
    elif x.shape[1] == 1:
        # The height means nothing: it only keeps the points apart.
        height = np.random.default_rng(seed).uniform(-1, 1, len(both))
        height[len(x) :] = 0
        plane, method = np.column_stack([both[:, 0], height]), ""
    elif x.shape[1] == 2:
        plane, method = both, ""
    else:
        plane = _principal_plane(both)
        method = "PCA of "
        # t-SNE has nothing to unfold in a handful of points, a line or a single point.
        spread = plane.std(axis=0)
        if len(x) > 30 and spread[1] > 1e-6 * spread[0]:
            plane, method = _tsne(both, plane, seed), "t-SNE of "
    centroids = plane[len(x) :] if len(x) else plane[:0]
    return EmbeddingMap(rows, plane[: len(x)], centroids, method)


def _principal_plane(x: np.ndarray) -> np.ndarray:
    """The first two principal components of the rows, [n, 2]."""
    x = x - x.mean(axis=0)
    scale = np.abs(x).max()
    if not scale > 0:
        return np.zeros((len(x), 2))
    u, s, _ = np.linalg.svd(x / scale, full_matrices=False)
    plane = np.zeros((len(x), 2))
    rank = min(2, len(s))
    plane[:, :rank] = u[:, :rank] * s[:rank]
    return plane


def _tsne(x: np.ndarray, plane: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start = plane / plane[:, 0].std() * 1e-4
    x = x - x.mean(axis=0)
    x = x / np.sqrt(np.square(x).sum(axis=1).mean())
    tsne = TSNE(
        perplexity=min(30.0, (len(x) - 1) / 3),
        init=start.astype(np.float32),
        learning_rate="auto",
        random_state=seed,
    )
    # One thread: for so few points more gain little, lose much on a busy machine, and make the
    # map depend on their number.
    with threadpool_limits(1):
        return tsne.fit_transform(x.astype(np.float32))


def draw_map(
    ax: Axes,
    embedding_map: EmbeddingMap,
    groups: np.ndarray,
    colours: np.ndarray,
    names: Sequence[str] | None,
    *,
    centroids: bool,
    size: float = 9,
) -> None:
    """Draws the points in the colours of their groups, each group named at its median."""
    from matplotlib.patheffects import withStroke

    points = embedding_map.points
    # In a fixed random order, so that no group lies on top of the others.
    order = np.random.default_rng(0).permutation(len(points))
    ax.scatter(
        points[order, 0],
        points[order, 1],
        c=colours[groups[order]],
        s=float(np.clip(15000 / max(len(points), 1), 4, 30)),
        linewidths=0,
        alpha=0.8,
        rasterized=True,
    )
    if centroids and len(embedding_map.centroids):
        few = len(embedding_map.centroids) <= SHOWN_CLUSTERS
        ax.scatter(
            embedding_map.centroids[:, 0],
            embedding_map.centroids[:, 1],
            marker="X" if few else "o",
            s=45 if few else 5,
            c=INK,
            edgecolors="white",
            linewidths=0.8 if few else 0.3,
            zorder=3,
        )
    ax.margins(0.03)
    if names is not None:
        present = np.unique(groups)
        texts = [names[int(group)] for group in present]
        medians = np.asarray([np.median(points[groups == group], axis=0) for group in present])
        # Beside the middle of a cluster, where its centroid lies.
        raised = 0.9 * size if centroids else 0.0
        for group, text, median, offset in zip(
            present, texts, medians, _label_offsets(ax, medians, texts, size), strict=True
        ):
            ax.annotate(
                text,
                (median[0], median[1]),
                xytext=(0, raised + offset),
                textcoords="offset points",
                color=colours[group] * 0.6,
                fontsize=size,
                fontweight="bold",
                ha="center",
                va="center",
                zorder=4,
                parse_math=False,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(GRID)
    if len(points) == 0:
        say_instead(ax, "no finite embeddings")


def _label_offsets(ax: Axes, places: np.ndarray, texts: Sequence[str], size: float) -> np.ndarray:
    """How far up, in points, each label must go so that no two of them overlap, [len(texts)]."""
    if len(texts) == 0:
        return np.zeros(0)
    ax.autoscale_view()
    figure = ax.get_figure(root=True)
    assert figure is not None
    x, y = (ax.transData.transform(places) * 72 / figure.dpi).T
    half_widths = np.asarray([0.35 * size * len(text) + 2 for text in texts])
    height = 1.15 * size
    moved = y.copy()
    for _ in range(50):
        near = np.abs(x[:, None] - x) < half_widths[:, None] + half_widths
        gaps = moved[:, None] - moved
        overlap = np.where(near, np.maximum(height - np.abs(gaps), 0), 0)
        np.fill_diagonal(overlap, 0)
        if overlap.max() < 0.5:
            break
        # Of two labels at the same height the first goes up.
        above = np.where(
            gaps != 0, np.sign(gaps), np.sign(np.arange(len(x)) - np.arange(len(x))[:, None])
        )
        moved = moved + np.clip(0.5 * (overlap * above).sum(axis=1), -height, height)
    return moved - y


def _draw_cluster_map(
    ax: Axes,
    clusters: ClusteredExamples,
    embedding_map: EmbeddingMap,
    *,
    centroids: bool,
    size: float,
) -> None:
    names = [str(i) for i in range(clusters.k)] if clusters.k <= SHOWN_CLUSTERS else None
    groups = clusters.labels[embedding_map.rows]
    draw_map(ax, embedding_map, groups, clusters.colours, names, centroids=centroids, size=size)


def _draw_class_map(
    ax: Axes, clusters: ClusteredExamples, embedding_map: EmbeddingMap, *, size: float
) -> None:
    assert clusters.truth is not None
    names = clusters.class_names if len(clusters.class_names) <= SHOWN_CLUSTERS else None
    groups = clusters.truth[embedding_map.rows]
    draw_map(ax, embedding_map, groups, clusters.class_colours, names, centroids=False, size=size)


def _map(clusters: ClusteredExamples, embedding_map: EmbeddingMap, title: str) -> Figure:
    panels = 1 if clusters.truth is None else 2
    figure = new_figure(6.2 * panels + 0.3, 6.6)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    m = min(MAP_EXAMPLES, clusters.n)
    some = f"{m:,} of {clusters.n:,}" if m < clusters.n else f"{clusters.n:,}"
    head_figure(
        figure, title, f"{embedding_map.method}{some} embedding{'s' if clusters.n > 1 else ''}"
    )

    _draw_cluster_map(axes[0], clusters, embedding_map, centroids=True, size=10)
    mark = "×" if len(embedding_map.centroids) <= SHOWN_CLUSTERS else "●"
    panel_title(axes[0], f"{counted(clusters.k, 'cluster')} ({mark} centroids)")
    if clusters.truth is not None:
        _draw_class_map(axes[1], clusters, embedding_map, size=9)
        n_classes = len(clusters.class_names)
        panel_title(axes[1], counted(n_classes, "true class"))
    return figure


# --- nearest examples ------------------------------------------------------------------------


def are_images(examples: np.ndarray) -> bool:
    """Whether examples [n, *shape] are images: (h, w) or (h, w, 1 | 3 | 4)."""
    shape = examples.shape[1:]
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3, 4))


def _tile(image: np.ndarray) -> np.ndarray:
    """An example as an image of moderate size, [h, w] or [h, w, 3], floats."""
    step = max(1, max(image.shape[:2]) // 96)
    image = np.asarray(image[::step, ::step], dtype=np.float64)
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image


def as_pictures(images: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Images as they are shown.

    Args:
        images: [m, h, w] or [m, h, w, 1 | 3 | 4].
        dtype: of the examples that the images come from: bytes of a colour span 0 to 255.

    Returns:
        [m, h, w, 1 | 3], values from 0 to 1; NaN is black, what is transparent white.
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


def _draw_images(
    ax: Axes,
    clusters: ClusteredExamples,
    shown: np.ndarray,
    columns: int,
    *,
    size: float,
    details: bool,
) -> None:
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


def _features(clusters: ClusteredExamples, means: np.ndarray) -> np.ndarray:
    """The features in which the clusters differ most, in order: all, if a line can show them."""
    if means.shape[1] <= 100:
        return np.arange(means.shape[1])
    return np.sort(np.argsort(-np.nan_to_num(means).var(axis=0), kind="stable")[:50])


def _vectors(examples: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.asarray(examples[rows], dtype=np.float64).reshape(len(rows), -1)


def _mean(examples: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean of the rows, [d], read in blocks."""
    rows = np.sort(rows)
    blocks = [rows[i : i + 8192] for i in range(0, len(rows), 8192)]
    sums = [_vectors(examples, block).sum(axis=0) for block in blocks]
    return np.sum(sums, axis=0) / len(rows)


def _draw_vectors(
    axes: np.ndarray, clusters: ClusteredExamples, shown: np.ndarray, *, size: float, details: bool
) -> str:
    """Draws each cluster's nearest examples as lines over the features; says which features."""
    d = int(np.prod(clusters.examples.shape[1:]))
    members = [clusters.members(cluster) for cluster in shown]
    means = np.stack(
        [_mean(clusters.examples, rows) if len(rows) else np.full(d, np.nan) for rows in members]
    )
    features = _features(clusters, means[~np.isnan(means).all(axis=1)])
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


def _nearest(clusters: ClusteredExamples, title: str) -> Figure:
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
        _draw_images(ax, clusters, shown, NEAREST, size=10, details=True)
        head_figure(figure, title, f"Examples nearest to each centroid{which}")
        return figure
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(max(2.5 * columns, 6), 1.6 * rows + 1.1)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    features = _draw_vectors(axes, clusters, shown, size=8, details=True)
    subtitle = f"Examples nearest to each centroid{which}, bold: mean of the cluster; {features}"
    head_figure(figure, title, subtitle)
    return figure


# --- curves ----------------------------------------------------------------------------------


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """A metric over the epochs, one (epochs, values) per phase, without what is not finite."""
    phases: list[tuple[list[float], list[float]]] = []
    previous = None
    for record in metrics:
        if record.get("phase") != previous or not phases:
            previous = record.get("phase")
            phases.append(([], []))
        value = record.get(name)
        if value is not None and np.isfinite(value):
            phases[-1][0].append(record["epoch"])
            phases[-1][1].append(value)
    return [(np.asarray(epochs), np.asarray(values)) for epochs, values in phases if epochs]


def _draw_curves(
    ax: Axes, metrics: Sequence[Mapping[str, Any]], names: Mapping[str, str], *, size: float = 8
) -> None:
    """Draws metrics over the epochs; `names` maps each metric to what the legend calls it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    everything = []
    colours = iter(LINES * (1 + len(names) // len(LINES)))
    for index, (name, label) in enumerate(names.items()):
        series = _series(metrics, name)
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
                PHASE_NAMES.get(str(phase), str(phase)),
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=size,
                color=FAINT,
            )


def _present(metrics: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, str]:
    return {name: label for name, label in names.items() if _series(metrics, name)}


def agreement_names(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The metrics of agreement that were recorded, with what a legend calls them."""
    return _present(metrics, {"acc": "ACC", "nmi": "NMI", "ari": "ARI"})


def loss_names(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The loss and its terms that were recorded, with what a legend calls them."""
    terms = dict.fromkeys(name for r in metrics for name in r if name.startswith("loss/"))
    terms = _present(metrics, {name: name.removeprefix("loss/") for name in terms})
    # With a single term the total is that term.
    total = {} if len(terms) == 1 else _present(metrics, {"loss": "total"})
    return {**total, **terms}


def _curves(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    panels: list[tuple[str, dict[str, str]]] = [("Loss", loss_names(metrics))]
    panels.append(("Agreement with the true classes", agreement_names(metrics)))
    for heading, names in (
        ("Labels that changed", {"label_change": "changed"}),
        ("Empty clusters", {"empty_clusters": "empty", "relocated_clusters": "relocated"}),
        ("Variance of the embeddings", {"embedding_variance": "variance"}),
        ("Inertia", {"inertia": "inertia"}),
    ):
        panels.append((heading, _present(metrics, names)))
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
        _draw_curves(ax, metrics, names)
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


# --- confusion and sizes ---------------------------------------------------------------------


class ReadableConfusion(NamedTuple):
    """A matched confusion matrix of no more than `MAX_CLASSES` columns.

    Attributes:
        matrix: [n_rows, n_columns] counts, matched pairs on the diagonal.
        rows: names of the classes.
        columns: the cluster of each, or the class that leads its clusters, with their number.
        explanation: what the columns are, and the share of examples on the diagonal.
    """

    matrix: np.ndarray
    rows: list[str]
    columns: list[str]
    explanation: str


def readable_confusion(clusters: ClusteredExamples) -> ReadableConfusion:
    """Counts examples by class and cluster; of many clusters those of a class become one."""
    from jkmeans.metrics import matched_confusion

    assert clusters.truth is not None
    matrix, classes, columns = matched_confusion(clusters.truth, clusters.labels)
    matrix = np.asarray(matrix)
    names = [clusters.class_names[int(c)] for c in classes]
    if matrix.shape[1] > MAX_CLASSES:
        # Too many columns to read: the clusters in which the same class leads become one.
        leader = matrix.argmax(axis=0)
        matrix = np.stack([matrix[:, leader == c].sum(axis=1) for c in range(len(names))], axis=1)
        heads = [f"{name} ({(leader == c).sum()})" for c, name in enumerate(names)]
        right = np.trace(matrix) / clusters.n
        below = f"clusters, those led by the same class together; purity {100 * right:.1f}%"
    else:
        heads = [str(int(c)) for c in columns]
        right = np.trace(matrix) / clusters.n
        below = f"clusters, in the order of the matched classes; accuracy {100 * right:.1f}%"
    return ReadableConfusion(matrix, names, heads, below)


def _confusion(clusters: ClusteredExamples, title: str) -> Figure:
    matrix, names, heads, below = readable_confusion(clusters)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    n_rows, n_columns = matrix.shape
    cell = 0.5 if n_columns <= 20 else 0.36
    figure = new_figure(max(cell * n_columns + 2.2, 5.0), max(cell * n_rows + 1.7, 3.2))
    ax = figure.subplots()
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if n_columns <= 20:
        for y in range(n_rows):
            for x in range(n_columns):
                if matrix[y, x]:
                    ax.text(
                        x,
                        y,
                        str(matrix[y, x]),
                        ha="center",
                        va="center",
                        fontsize=7 if matrix[y, x] < 10_000 else 6,
                        color="white" if share[y, x] > 0.55 else INK,
                    )
    tilt = max(map(len, heads)) > 3
    ax.set_xticks(range(n_columns), heads, fontsize=8, rotation=45 if tilt else 0)
    if tilt:
        for text in ax.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")
    ax.set_yticks(range(n_rows), names, fontsize=8)
    for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        text.set_parse_math(False)
        text.set_color(INK)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(below, fontsize=8.5, color=INK)
    ax.set_ylabel("true class", fontsize=8.5, color=INK)
    head_figure(figure, title, "Matched confusion matrix")
    return figure


def _sizes(clusters: ClusteredExamples, title: str) -> Figure:
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


# --- summary ---------------------------------------------------------------------------------


def _summary(
    clusters: ClusteredExamples,
    embedding_map: EmbeddingMap,
    metrics: Sequence[Mapping[str, Any]],
    title: str,
) -> Figure:
    from matplotlib.figure import Figure

    agreement = agreement_names(metrics)
    losses = loss_names(metrics)
    curves = agreement or losses
    figure = Figure(figsize=(12, 4.7), facecolor="white")
    top = 0.86 if title else 0.91
    if title:
        figure.text(
            0.012, 0.975, title, fontsize=14, fontweight="bold", color=INK, va="top",
            parse_math=False,
        )  # fmt: skip
    width = 0.365 if curves else 0.46
    ax = figure.add_axes((0.012, 0.03, width, top - 0.03))
    heading = f"{embedding_map.method}the embeddings, {counted(clusters.k, 'cluster')}"
    if clusters.k > SHOWN_CLUSTERS and 0 < len(clusters.class_names) <= SHOWN_CLUSTERS:
        # So many clusters are confetti; a few classes can be read.
        _draw_class_map(ax, clusters, embedding_map, size=10)
        heading += ", by true class"
    else:
        _draw_cluster_map(ax, clusters, embedding_map, centroids=False, size=13)
    panel_title(ax, "The" + heading[3:] if heading.startswith("the") else heading, 11)

    shown = clusters.shown(SUMMARY_CLUSTERS)
    left = 0.012 + width + 0.035
    room = (0.70 if curves else 0.985) - left
    heading = "Nearest to the centroids"
    if clusters.k > len(shown):
        heading += f" (largest {len(shown)})"
    if are_images(clusters.examples):
        ax = figure.add_axes((left, 0.03, room, top - 0.03))
        h, w = clusters.examples.shape[1:3]
        # As many examples as fill the room that the rows leave.
        fit = (12 * room) / (4.7 * (top - 0.03) / len(shown) * w / h)
        _draw_images(
            ax, clusters, shown, int(np.clip(round(fit), 3, NEAREST)), size=11, details=False
        )
        ax.set_anchor("NW")
        panel_title(ax, heading, 11)
    else:
        n_columns = 1 if len(shown) <= 4 else 2
        grid = figure.add_gridspec(
            -(-len(shown) // n_columns), n_columns,
            left=left + 0.01, right=left + room, bottom=0.05, top=top - 0.06, hspace=0.6,
        )  # fmt: skip
        axes = grid.subplots(squeeze=False, sharex=True, sharey=True).ravel()
        _draw_vectors(axes, clusters, shown, size=10, details=False)
        figure.text(left + 0.01, top + 0.0177, heading, fontsize=11, color=INK)
    if curves:
        ax = figure.add_axes((0.755, 0.12, 0.23, top - 0.12))
        _draw_curves(ax, metrics, curves, size=10)
        panel_title(ax, "Agreement with the true classes" if agreement else "Loss", 11)
        ax.set_xlabel("epoch", fontsize=10, color=INK)
    return figure


# --- common ----------------------------------------------------------------------------------


def counted(n: int, noun: str) -> str:
    """A number with its noun: `1 class`, `1,200 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{n:,} {noun if n == 1 else plural}"
