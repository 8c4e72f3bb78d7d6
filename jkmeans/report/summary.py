"""The summary of a run, one wide picture for a first glance: map, nearest examples, a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jkmeans.drawing import INK, panel_title, whole_characters
from jkmeans.report.clusters import SHOWN_CLUSTERS, ClusteredExamples, counted
from jkmeans.report.curves import draw_curves
from jkmeans.report.examples import NEAREST, are_images, draw_images, draw_vectors
from jkmeans.report.maps import EmbeddingMap, draw_class_map, draw_cluster_map
from jkmeans.report.records import agreement_names, loss_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY_CLUSTERS = 10


def summary_figure(
    clusters: ClusteredExamples,
    embedding_map: EmbeddingMap,
    metrics: Sequence[Mapping[str, Any]],
    title: str,
) -> Figure:
    """A map, the nearest examples, and agreement or loss over the epochs, from left to right."""
    from matplotlib.figure import Figure

    agreement = agreement_names(metrics)
    losses = loss_names(metrics)
    curves = agreement or losses
    figure = Figure(figsize=(12, 4.7), facecolor="white")
    top = 0.86 if title else 0.91
    if title:
        figure.text(
            0.012, 0.975, whole_characters(title), fontsize=14, fontweight="bold", color=INK,
            va="top", parse_math=False,
        )  # fmt: skip
    width = 0.365 if curves else 0.46
    ax = figure.add_axes((0.012, 0.03, width, top - 0.03))
    heading = f"{embedding_map.method}the embeddings, {counted(clusters.k, 'cluster')}"
    if clusters.k > SHOWN_CLUSTERS and 0 < len(clusters.class_names) <= SHOWN_CLUSTERS:
        # So many clusters are confetti; a few classes can be read.
        draw_class_map(ax, clusters, embedding_map, size=10)
        heading += ", by true class"
    else:
        draw_cluster_map(ax, clusters, embedding_map, centroids=False, size=13)
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
        draw_images(
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
        draw_vectors(axes, clusters, shown, size=10, details=False)
        figure.text(left + 0.01, top + 0.0177, heading, fontsize=11, color=INK)
    if curves:
        ax = figure.add_axes((0.755, 0.12, 0.23, top - 0.12))
        draw_curves(ax, metrics, curves, size=10)
        panel_title(ax, "Agreement with the true classes" if agreement else "Loss", 11)
        ax.set_xlabel("epoch", fontsize=10, color=INK)
    return figure
