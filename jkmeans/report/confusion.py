"""The confusion matrix of clusters matched with true classes, small enough to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jkmeans.drawing import INK, head_figure, new_figure
from jkmeans.report.clusters import ClusteredExamples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CLASSES = 30  # of a matrix that can be read


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


def confusion_figure(clusters: ClusteredExamples, title: str) -> Figure:
    """The matched matrix, shaded by the share of each class; with counts where they fit."""
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
