"""What the script of the page draws, as values for its JSON: curves, map, examples, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jkmeans.report.clusters import ClusteredExamples, class_text
from jkmeans.report.examples import NEAREST, are_images
from jkmeans.report.maps import EmbeddingMap
from jkmeans.report.records import agreement_names, finite, loss_names, phase_name
from jkmeans.report.sprites import sprite_sheet

FARTHEST = 5  # examples of a cluster, beside the nearest
GALLERY_CLUSTERS = 40
LINE_FEATURES = 50
SHOWN_SIZES = 10
READ_OUT_FEATURES = 8
MAP_TILE, GALLERY_TILE = 32, 48  # pixels
_UNKNOWN_PANELS = 12  # metrics of a method that the page knows nothing about
_NOT_METRICS = ("epoch", "phase", "time", "seconds", "cluster_sizes")


def data_for_script(
    clusters: ClusteredExamples,
    metrics: Sequence[Mapping[str, Any]],
    embedding_map: EmbeddingMap,
) -> dict[str, Any]:
    """All that `assets/page.js` draws, as it names it; a part is None where there is nothing.

    Args:
        clusters: the arrays of the run.
        metrics: the records of the epochs; `cluster_sizes` ([k] integers) are shown over them.
        embedding_map: of the same embeddings.
    """
    return {
        "curves": _curves(metrics),
        "map": _map(clusters, embedding_map),
        "clusters": _legend_of_clusters(clusters),
        "classes": _legend_of_classes(clusters),
        "gallery": _gallery(clusters),
        "sizes": {
            "final": clusters.sizes.tolist(),
            "panel": _sizes_over_time(metrics, clusters),
        },
    }


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Panels of lines over the epochs; None where nothing was recorded."""
    panels = [
        _panel("Loss", metrics, loss_names(metrics), beneath="loss"),
        _panel(
            "Agreement with the true classes",
            metrics,
            {**agreement_names(metrics), "purity": "purity"},
            scale="share",
        ),
        _panel("Variance of the embeddings", metrics, {"embedding_variance": "variance"}),
        _panel("Labels that changed", metrics, {"label_change": "changed"}, scale="share"),
        _panel(
            "Empty clusters",
            metrics,
            {"empty_clusters": "empty", "relocated_clusters": "relocated"},
            scale="count",
            beneath="empty_clusters",
        ),
        _panel("Inertia", metrics, {"inertia": "inertia"}),
    ]
    shown = {line["name"] for panel in panels for line in panel["lines"]} | {"loss"}
    others = dict.fromkeys(
        name for r in metrics for name in r if name not in shown and name not in _NOT_METRICS
    )
    readable = {name: name.replace("_", " ") for name in others}
    extra = [
        _panel(text[:1].upper() + text[1:], metrics, {name: text})
        for name, text in readable.items()
    ]
    panels = [panel for panel in panels if panel["lines"]]
    panels += [panel for panel in extra if panel["lines"]][:_UNKNOWN_PANELS]
    if not panels:
        return None
    return {
        "epochs": [record["epoch"] for record in metrics],
        "phases": [phase_name(record.get("phase")) for record in metrics],
        "panels": panels,
    }


def _panel(
    title: str,
    metrics: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    scale: Literal["number", "share", "count"] = "number",
    beneath: str = "",
) -> dict[str, Any]:
    """A panel: `beneath` is the line that others may cover, drawn wide and pale."""
    lines = []
    for name, label in names.items():
        values = [finite(record.get(name)) for record in metrics]
        if any(value is not None for value in values):
            lines.append({"name": name, "label": label, "values": values})
    for line in lines:
        line["beneath"] = len(lines) > 1 and line["name"] == beneath
    return {"title": title, "scale": scale, "lines": lines}


def _map(clusters: ClusteredExamples, placed: EmbeddingMap) -> dict[str, Any]:
    rows = placed.rows
    everything = np.concatenate([placed.points, placed.centroids])
    low = everything.min(axis=0) if len(everything) else np.zeros(2)
    extent = float(np.ptp(everything, axis=0).max()) if len(everything) else 0.0
    extent = extent if extent > 0 else 1.0
    # In the unit square, each axis in its middle.
    shift = (1 - (np.ptp(everything, axis=0) if len(everything) else np.zeros(2)) / extent) / 2
    points = (placed.points - low) / extent + shift
    centroids = (placed.centroids - low) / extent + shift
    usable = clusters.usable
    data: dict[str, Any] = {
        "about": f"{placed.method}{len(rows):,} of {clusters.n:,} embeddings",
        "x": _rounded(points[:, 0]),
        "y": _rounded(points[:, 1]),
        "rows": rows.tolist(),
        "cluster": clusters.labels[rows].tolist(),
        "class": None if clusters.truth is None else clusters.truth[rows].tolist(),
        "distance": _significant(clusters.distances[rows]),
        "centroids": {
            "x": _rounded(centroids[:, 0]),
            "y": _rounded(centroids[:, 1]),
            "cluster": np.flatnonzero(usable)[: len(centroids)].tolist(),
        },
        "sprite": None,
        "features": None,
    }
    if are_images(clusters.examples):
        data["sprite"] = sprite_sheet(clusters.examples, rows, MAP_TILE)
    else:
        first = [_vector(clusters.examples, row)[:READ_OUT_FEATURES] for row in rows]
        data["features"] = {
            "values": [_significant(vector) for vector in first],
            "n": int(np.prod(clusters.examples.shape[1:])),
        }
    return data


def _gallery(clusters: ClusteredExamples) -> dict[str, Any]:
    """The nearest and the farthest examples of each cluster, as many clusters as a page holds."""
    shown = clusters.shown(GALLERY_CLUSTERS)
    rows: list[int] = []
    entries = []
    for cluster in shown.tolist():
        members = clusters.members(cluster)
        near = members[:NEAREST]
        measured = members[np.isfinite(clusters.distances[members])]
        # A small cluster shows each example once.
        far = measured[max(NEAREST, len(measured) - FARTHEST) :][::-1]
        entries.append(
            {
                "cluster": cluster,
                "nearest": list(range(len(rows), len(rows) + len(near))),
                "farthest": list(range(len(rows) + len(near), len(rows) + len(near) + len(far))),
            }
        )
        rows += [*near.tolist(), *far.tolist()]
    numbers = np.asarray(rows, dtype=np.int64)
    data: dict[str, Any] = {
        "n_clusters": clusters.k,
        "entries": entries,
        "rows": rows,
        "distance": _significant(clusters.distances[numbers]),
        "class": None if clusters.truth is None else clusters.truth[numbers].tolist(),
        "sprite": None,
        "lines": None,
    }
    if are_images(clusters.examples):
        data["sprite"] = sprite_sheet(clusters.examples, numbers, GALLERY_TILE)
    else:
        data["lines"] = _lines(clusters, numbers)
    return data


def _lines(clusters: ClusteredExamples, rows: np.ndarray) -> dict[str, Any]:
    """The examples as lines over their features; of many, those in which clusters differ most."""
    vectors = np.stack([_vector(clusters.examples, row) for row in rows])
    features = np.arange(vectors.shape[1])
    if len(features) > 2 * LINE_FEATURES:
        labels = clusters.labels[rows]
        with np.errstate(all="ignore"):
            means = np.stack([vectors[labels == i].mean(axis=0) for i in np.unique(labels)])
            order = np.argsort(-np.nan_to_num(means).var(axis=0), kind="stable")
        features = np.sort(order[:LINE_FEATURES])
    values = [_significant(vector) for vector in vectors[:, features]]
    return {"values": values, "features": features.tolist(), "n": vectors.shape[1]}


def _vector(examples: np.ndarray, row: Any) -> np.ndarray:
    return np.asarray(examples[row], dtype=np.float64).reshape(-1)


def _sizes_over_time(
    metrics: Sequence[Mapping[str, Any]], clusters: ClusteredExamples
) -> dict[str, Any] | None:
    """Sizes of the largest clusters over the epochs; None where they were not recorded."""
    recorded = [
        (record, sizes)
        for record in metrics
        if isinstance(sizes := record.get("cluster_sizes"), Sequence | np.ndarray)
        and len(sizes) == clusters.k
    ]
    if not recorded:
        return None
    lines = [
        {
            "name": str(i),
            "label": f"cluster {i}",
            "values": [finite(sizes[i]) for _, sizes in recorded],
            "colour": _colour(clusters.colours[i]),
            "beneath": False,
        }
        for i in clusters.shown(SHOWN_SIZES).tolist()
    ]
    return {
        "epochs": [record["epoch"] for record, _ in recorded],
        "phases": [phase_name(record.get("phase")) for record, _ in recorded],
        "panels": [{"title": "Sizes over the epochs", "scale": "count", "lines": lines}],
    }


def _legend_of_clusters(clusters: ClusteredExamples) -> list[dict[str, Any]]:
    return [
        {
            "name": f"cluster {cluster}",
            "about": clusters.describe(cluster),
            "size": int(clusters.sizes[cluster]),
            "colour": _colour(clusters.colours[cluster]),
            "leader": clusters.leader(cluster),
        }
        for cluster in range(clusters.k)
    ]


def _legend_of_classes(clusters: ClusteredExamples) -> list[dict[str, Any]] | None:
    if clusters.truth is None:
        return None
    sizes = np.bincount(clusters.truth, minlength=len(clusters.class_names))
    # There may be more colours, for clusters.
    colours = clusters.class_colours[: len(sizes)]
    return [
        {
            "name": class_text(name),
            "about": f"{size:,}",
            "size": int(size),
            "colour": _colour(colour),
        }
        for name, size, colour in zip(clusters.class_names, sizes, colours, strict=True)
    ]


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values, 4).tolist()


def _significant(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values.tolist()]


def _colour(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb)
