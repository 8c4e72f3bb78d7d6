"""The pictures of a run: which there are, each drawn and written as a PNG file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jkmeans.drawing import save_all
from jkmeans.report.clusters import ClusteredExamples
from jkmeans.report.confusion import MAX_CLASSES, confusion_figure
from jkmeans.report.curves import curves_figure
from jkmeans.report.examples import nearest_figure
from jkmeans.report.maps import EmbeddingMap, map_embeddings, map_figure
from jkmeans.report.sizes import sizes_figure
from jkmeans.report.summary import summary_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("curves", "map", "nearest", "confusion", "sizes", "summary")


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
            (h, w) or (h, w, 1 | 3 | 4), otherwise vectors. May be a memory map: only the images
            that are shown are read, and of vectors, for their means, the clusters that are.
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
    clusters = ClusteredExamples.of(
        embeddings, labels, distances, centroids, examples, truth, class_names
    )
    placed = embedding_map or map_embeddings(clusters, seed)

    figures: dict[str, Callable[[], Figure]] = {}
    if metrics:
        figures["curves"] = lambda: curves_figure(metrics, title)
    figures["map"] = lambda: map_figure(clusters, placed, title)
    figures["nearest"] = lambda: nearest_figure(clusters, title)
    if clusters.truth is not None and 1 <= len(clusters.class_names) <= MAX_CLASSES:
        figures["confusion"] = lambda: confusion_figure(clusters, title)
    figures["sizes"] = lambda: sizes_figure(clusters, title)
    figures["summary"] = lambda: summary_figure(clusters, placed, metrics, title)

    return save_all(folder, figures, PICTURES)
