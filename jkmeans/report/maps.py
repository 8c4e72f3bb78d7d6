"""Maps: embeddings and centroids laid out in a plane, drawn in the colours of their groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jkmeans.drawing import GRID, INK, head_figure, new_figure, panel_title, say_instead
from jkmeans.report.clusters import SHOWN_CLUSTERS, ClusteredExamples, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP_EXAMPLES = 2000  # t-SNE of this many takes seconds on a laptop


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """Embeddings and centroids in the plane."""

    rows: np.ndarray  # [m] examples in the map
    points: np.ndarray  # [m, 2]
    centroids: np.ndarray  # [c, 2], the finite ones of clusters that are not empty
    method: str


def map_embeddings(clusters: ClusteredExamples, seed: int) -> EmbeddingMap:
    """Places a sample of at most `MAP_EXAMPLES` embeddings, and the centroids, in the plane."""
    rows = np.arange(clusters.n)
    if clusters.n > MAP_EXAMPLES:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAP_EXAMPLES, replace=False))
    x = np.asarray(clusters.embeddings[rows], dtype=np.float64).reshape(len(rows), -1)
    finite = np.isfinite(x).all(axis=1)
    rows, x = rows[finite], x[finite]
    usable = clusters.usable
    c = clusters.centroids[usable]

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
        plane = principal_plane(both, both)
        method = "PCA of "
        # t-SNE has nothing to unfold in a handful of points, a line or a single point.
        spread = plane.std(axis=0)
        if len(x) > 30 and spread[1] > 1e-6 * spread[0]:
            plane, method = _tsne(both, plane, seed), "t-SNE of "
    centroids = plane[len(x) :] if len(x) else plane[:0]
    return EmbeddingMap(rows, plane[: len(x)], centroids, method)


def principal_plane(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points in the plane of the first two principal components of x, on a scale of its own.

    Args:
        x: [n, d], finite.
        points: [m, d].

    Returns:
        [m, 2]; a component that x does not have is 0.
    """
    center = x.mean(axis=0, dtype=np.float64)
    x = x - center
    plane = np.zeros((len(points), 2))
    scale = np.abs(x).max()
    if scale > 0:
        _, _, axes = np.linalg.svd(x / scale, full_matrices=False)
        plane[:, : min(2, len(axes))] = ((points - center) / scale) @ axes[:2].T
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
        marks = embedding_map.centroids if centroids else np.zeros((0, 2))
        offsets = _label_offsets(ax, medians, texts, size, marks)
        for group, text, median, offset in zip(present, texts, medians, offsets, strict=True):
            ax.annotate(
                text,
                (median[0], median[1]),
                xytext=(0, offset),
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


def _label_offsets(
    ax: Axes, places: np.ndarray, texts: Sequence[str], size: float, marks: np.ndarray
) -> np.ndarray:
    """How far up, in points, each label must go to cover no other and no mark, [len(texts)].

    Args:
        ax: with everything else in it.
        places: [len(texts), 2] the middles of the labels, in the coordinates of the data.
        texts: the labels.
        size: of the text, in points.
        marks: [c, 2] what stays where it is: centroids.
    """
    m = len(texts)
    if m == 0:
        return np.zeros(0)
    ax.autoscale_view()
    figure = ax.get_figure(root=True)
    assert figure is not None
    x, y = (ax.transData.transform(np.concatenate([places, marks])) * 72 / figure.dpi).T
    half_widths = np.asarray([0.35 * size * len(text) + 2 for text in texts] + [4] * len(marks))
    half_heights = np.asarray([0.575 * size] * m + [4.0] * len(marks))
    near = np.abs(x[:, None] - x)[:m] < half_widths[:m, None] + half_widths
    apart = half_heights[:m, None] + half_heights
    # Of two labels each goes half the way; a mark stays.
    share = np.where(np.arange(len(x)) < m, 0.5, 1.0)
    moved = y.copy()
    # Beside the middle of a cluster, where its centroid lies.
    moved[:m] += 0.9 * size if len(marks) else 0.0
    for _ in range(100):
        gaps = moved[:m, None] - moved
        overlap = np.where(near, np.maximum(apart - np.abs(gaps), 0), 0)
        np.fill_diagonal(overlap, 0)
        if overlap.max() < 0.5:
            break
        # Of two at the same height the first goes up.
        first = np.sign(np.arange(len(x)) - np.arange(m)[:, None])
        above = np.where(gaps != 0, np.sign(gaps), first)
        moved[:m] += np.clip((share * overlap * above).sum(axis=1), -1.15 * size, 1.15 * size)
    return (moved - y)[:m]


def draw_cluster_map(
    ax: Axes,
    clusters: ClusteredExamples,
    embedding_map: EmbeddingMap,
    *,
    centroids: bool,
    size: float,
) -> None:
    """Draws the points by cluster, numbered if few; labels have `size` points."""
    names = [str(i) for i in range(clusters.k)] if clusters.k <= SHOWN_CLUSTERS else None
    groups = clusters.labels[embedding_map.rows]
    draw_map(ax, embedding_map, groups, clusters.colours, names, centroids=centroids, size=size)


def draw_class_map(
    ax: Axes, clusters: ClusteredExamples, embedding_map: EmbeddingMap, *, size: float
) -> None:
    """Draws the points by true class, named if few; labels have `size` points."""
    assert clusters.truth is not None
    names = clusters.class_names if len(clusters.class_names) <= SHOWN_CLUSTERS else None
    groups = clusters.truth[embedding_map.rows]
    draw_map(ax, embedding_map, groups, clusters.class_colours, names, centroids=False, size=size)


def map_figure(clusters: ClusteredExamples, embedding_map: EmbeddingMap, title: str) -> Figure:
    """The map by cluster and, with true classes, the same by class beside it."""
    panels = 1 if clusters.truth is None else 2
    figure = new_figure(6.2 * panels + 0.3, 6.6)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    m = len(embedding_map.rows)
    some = f"{m:,} of {clusters.n:,}" if m < clusters.n else f"{clusters.n:,}"
    head_figure(
        figure, title, f"{embedding_map.method}{some} embedding{'s' if clusters.n > 1 else ''}"
    )

    draw_cluster_map(axes[0], clusters, embedding_map, centroids=True, size=10)
    mark = "×" if len(embedding_map.centroids) <= SHOWN_CLUSTERS else "●"
    panel_title(axes[0], f"{counted(clusters.k, 'cluster')} ({mark} centroids)")
    if clusters.truth is not None:
        draw_class_map(axes[1], clusters, embedding_map, size=9)
        n_classes = len(clusters.class_names)
        panel_title(axes[1], counted(n_classes, "true class"))
    return figure
