"""The page of a run: one HTML file that needs nothing else, beside the pictures of report.py.

Python writes all that can be read without a script: numbers, signs of failure, the confusion
matrix. `page_assets/page.js` draws the rest from the JSON in the page. Nothing in the page comes
from or goes to the network, and its Content-Security-Policy lets no script run but that one: data
set, classes and config may be called anything.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

import numpy as np

from jkmeans.report import (
    MAX_CLASSES,
    NEAREST,
    PHASE_NAMES,
    ClusteredExamples,
    EmbeddingMap,
    agreement_names,
    are_images,
    as_pictures,
    counted,
    loss_names,
    map_embeddings,
    readable_confusion,
)

FARTHEST = 5
SHOWN_CLUSTERS = 40
SHOWN_SIZES = 10
READ_OUT_FEATURES = 8
LINE_FEATURES = 50
MAP_TILE, GALLERY_TILE = 32, 48
SPRITE_BYTES = 2_500_000  # of a sheet of images before compression

COLLAPSED = 0.05  # of the variance when clustering began
DUPLICATE = 0.05  # of the distance at which centroids are to be expected
DOMINANT = 0.5  # of the examples
STILL_CHANGING = 0.02  # of the labels, in the last epoch

_UNKNOWN_PANELS = 12  # metrics of a method that this page knows nothing about
_LONGEST_VALUE = 400  # letters of a config value
_NOT_METRICS = ("epoch", "phase", "time", "seconds", "cluster_sizes")


def write_page(
    path: str | os.PathLike[str],
    *,
    metrics: Sequence[Mapping[str, Any]],
    embeddings: np.ndarray,
    labels: np.ndarray,
    distances: np.ndarray,
    centroids: np.ndarray,
    examples: np.ndarray,
    truth: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    results: Mapping[str, Any] | None = None,
    config: Any = None,
    seed: int = 0,
    title: str = "",
    embedding_map: EmbeddingMap | None = None,
) -> Path:
    """Writes the page of a run: one HTML file to look through with a browser, without a network.

    It has the results and the config; signs of failure in words; curves of the metrics; a map of
    the embeddings in which each point shows its example; the nearest and the farthest examples of
    each cluster; the matched confusion matrix (with true classes, at most 30); sizes of clusters.
    An older page is replaced once the new one is complete.

    Args:
        path: the file, its folder made if missing.
        metrics: the records of the epochs, as `jkmeans.recorder.read_metrics` returns them; where
            they have `cluster_sizes` ([k] integers), sizes are shown over the epochs.
        embeddings: embeddings of the examples, [n, p].
        labels: cluster of each example, integers from 0 to k - 1, [n].
        distances: distance of each embedding to its centroid, [n]; of NaN the example comes last.
        centroids: [k, p].
        examples: the data as the user knows them, [n, *example_shape]: images if the shape is
            (h, w) or (h, w, 1 | 3 | 4), otherwise vectors. May be a memory map: only the rows
            that are shown are read.
        truth: true class of each example, [n].
        class_names: names of the classes 0, 1, …
        results: what the run reached, by name. Agreement with `truth` and the inertia are
            computed where they are missing.
        config: of the run: a mapping, nested or not, or anything with `to_dict`.
        seed: picks the examples in the map.
        title: heads the page: data set, method.
        embedding_map: where `map_embeddings` has placed these embeddings, if it has: t-SNE takes
            seconds.

    Returns:
        The file written.

    Raises:
        ValueError: the arrays do not belong together.
    """
    path = Path(path)
    clusters = ClusteredExamples.of(
        embeddings, labels, distances, centroids, examples, truth, class_names
    )
    results = complete_results(results, clusters, metrics)
    data = {
        "curves": _curves(metrics),
        "map": _map(clusters, embedding_map or map_embeddings(clusters, seed)),
        "clusters": _legend_of_clusters(clusters),
        "classes": _legend_of_classes(clusters),
        "gallery": _gallery(clusters),
        "sizes": {
            "final": clusters.sizes.tolist(),
            "panel": _sizes_over_time(metrics, clusters),
        },
    }
    style, script = _asset("page.css"), _asset("page.js")
    text = Template(_asset("page.html")).substitute(
        style=style,
        style_hash=_content_hash(style),
        script=script,
        script_hash=_content_hash(script),
        title=_escape(title or "A run of jkmeans"),
        data=embeddable_json(data),
        cards=_cards(results),
        results=_definitions(results, _shown),
        config=_definitions(flatten_config(config), _as_written),
        signs=_signs(failure_signs(clusters, metrics)),
        confusion=_confusion(clusters),
    )
    _write_whole(path, text)
    return path


# --- signs of failure ------------------------------------------------------------------------


class Sign(NamedTuple):
    """What is known about one way to fail.

    Attributes:
        name: of the failure.
        status: whether the run shows it; unknown where nothing was recorded.
        sentence: says so with the numbers.
    """

    name: str
    status: Literal["found", "none", "unknown"]
    sentence: str


def failure_signs(clusters: ClusteredExamples, metrics: Sequence[Mapping[str, Any]]) -> list[Sign]:
    """Looks for the ways in which deep clustering is known to fail, one sign for each.

    They are hints for the reader and stop nothing: a run may show one and be right (true classes
    can be as unequal as one cluster that holds most).

    Args:
        clusters: the arrays of the run.
        metrics: the records of the epochs, as `jkmeans.recorder.read_metrics` returns them.
    """
    return [
        _collapse(clusters, metrics),
        _empty_clusters(clusters),
        _duplicate_centroids(clusters),
        _dominant_cluster(clusters),
        _changing_labels(metrics),
        _loss(metrics),
    ]


def _collapse(clusters: ClusteredExamples, metrics: Sequence[Mapping[str, Any]]) -> Sign:
    name = "Collapse of the embeddings"
    some = clusters.embeddings[: min(clusters.n, 10_000)]
    some = np.asarray(some, dtype=np.float64)
    if not np.isfinite(some).all():
        bad = int((~np.isfinite(some.reshape(len(some), -1)).all(axis=1)).sum())
        return Sign(name, "found", f"{bad:,} of {len(some):,} embeddings looked at are not finite.")
    if len(some) > 1 and np.ptp(some, axis=0).max(initial=0) == 0:
        return Sign(name, "found", "All embeddings are one and the same point.")
    variances = [
        (record.get("phase"), value)
        for record in metrics
        if (value := _finite(record.get("embedding_variance"))) is not None
    ]
    if len(variances) < 2:
        return Sign(name, "unknown", "Not known: no variance of the embeddings was recorded.")
    # Pretraining shapes the scale of the embeddings: what counts is what clustering began with.
    phases = [phase for phase, _ in variances]
    start = max(phases.index("cluster") - 1, 0) if "cluster" in phases else 0
    first, last = variances[start][1], variances[-1][1]
    when = "when clustering began" if start else "at first"
    numbers = (
        f"the variance of the embeddings is {_number(last)} at the end, and was "
        f"{_number(first)} {when}"
    )
    if last <= COLLAPSED * first:
        return Sign(name, "found", f"They collapsed: {numbers}.")
    return Sign(name, "none", f"No sign of collapse: {numbers}.")


def _empty_clusters(clusters: ClusteredExamples) -> Sign:
    name = "Empty clusters"
    empty = np.flatnonzero(clusters.sizes == 0)
    if not len(empty):
        return Sign(
            name, "none", f"No sign of empty clusters: the smallest has {clusters.sizes.min():,}."
        )
    listed = ", ".join(str(i) for i in empty[:10]) + (", …" if len(empty) > 10 else "")
    are = "is" if len(empty) == 1 else "are"
    return Sign(
        name,
        "found",
        f"{len(empty):,} of {counted(clusters.k, 'cluster')} {are} empty at the end: {listed}.",
    )


def _duplicate_centroids(clusters: ClusteredExamples) -> Sign:
    from sklearn.neighbors import NearestNeighbors

    name = "Duplicate centroids"
    centroids = clusters.centroids.reshape(clusters.k, -1)
    numbers = np.flatnonzero(np.isfinite(centroids).all(axis=1))
    centroids = centroids[numbers]
    if len(numbers) < 2:
        return Sign(name, "unknown", "Not known: fewer than two centroids are finite.")
    distances, neighbours = NearestNeighbors(n_neighbors=2).fit(centroids).kneighbors(centroids)
    # Of exact duplicates, each may be listed before or after its copy.
    other = np.where(
        neighbours[:, 0] == np.arange(len(numbers)), neighbours[:, 1], neighbours[:, 0]
    )
    nearest = distances[:, 1]
    expected = _expected_spacing(clusters, centroids)
    close = np.flatnonzero(nearest <= DUPLICATE * expected)
    one = int(nearest.argmin())
    pair = sorted((int(numbers[one]), int(numbers[other[one]])))
    text = (
        f"{pair[0]} and {pair[1]} lie {_number(nearest[one])} apart, where about "
        f"{_number(expected)} is to be expected"
    )
    if len(close):
        return Sign(
            name,
            "found",
            f"{len(close):,} of {clusters.k:,} centroids nearly coincide with another: {text}.",
        )
    return Sign(
        name,
        "none",
        f"No sign of duplicate centroids: the closest two, {text.replace(' lie', ',')}.",
    )


def _expected_spacing(clusters: ClusteredExamples, centroids: np.ndarray) -> float:
    """The distance from a centroid to the next if k of them fill the space evenly."""
    from scipy.spatial.distance import pdist

    if len(centroids) == 2:
        some = np.asarray(clusters.embeddings[: min(clusters.n, 10_000)], dtype=np.float64)
        some = some.reshape(len(some), -1)
        some = some[np.isfinite(some).all(axis=1)]
        if not len(some):
            return 0.0
        return float(np.sqrt(np.square(some - some.mean(axis=0)).sum(axis=1).mean()))
    step = -(-len(centroids) // 1000)
    typical = float(np.median(pdist(centroids[::step])))
    return typical * len(centroids) ** (-1 / max(centroids.shape[1], 1))


def _dominant_cluster(clusters: ClusteredExamples) -> Sign:
    name = "One cluster that holds most"
    if clusters.k == 1:
        return Sign(name, "unknown", "Does not apply: there is one cluster.")
    largest = int(clusters.sizes.argmax())
    share = clusters.sizes[largest] / clusters.n
    numbers = (
        f"cluster {largest}, the largest, has {clusters.sizes[largest]:,} of "
        f"{clusters.n:,} examples ({100 * share:.1f}%)"
    )
    # Of two clusters one always holds half.
    if share > (0.9 if clusters.k == 2 else DOMINANT):
        return Sign(name, "found", f"One cluster holds most: {numbers}.")
    return Sign(name, "none", f"No sign of it: {numbers}.")


def _changing_labels(metrics: Sequence[Mapping[str, Any]]) -> Sign:
    name = "Labels still changing"
    changes = [
        (record["epoch"], value)
        for record in metrics
        if (value := _finite(record.get("label_change"))) is not None
    ]
    if not changes:
        return Sign(name, "unknown", "Not known: no change of labels was recorded.")
    epoch, last = changes[-1]
    numbers = f"{100 * last:.2g}% of them changed in epoch {epoch:,}"
    if last > STILL_CHANGING:
        return Sign(name, "found", f"The labels were still changing: {numbers}.")
    return Sign(name, "none", f"No sign that labels still change: {numbers}.")


def _loss(metrics: Sequence[Mapping[str, Any]]) -> Sign:
    name = "Loss"
    losses = dict.fromkeys(
        key for record in metrics for key in record if key == "loss" or key.startswith("loss/")
    )
    for key in losses:
        bad = [r["epoch"] for r in metrics if key in r and _finite(r[key]) is None]
        if bad:
            return Sign(
                name,
                "found",
                f"{key} was not finite in {counted(len(bad), 'epoch')} of {len(metrics):,}, "
                f"first in epoch {bad[0]:,}.",
            )
    falls, rises = [], []
    for phase in dict.fromkeys(record.get("phase") for record in metrics):
        values = [r["loss"] for r in metrics if r.get("phase") == phase and "loss" in r]
        if len(values) < 2:
            continue
        some = max(1, len(values) // 10)
        first, last = float(np.mean(values[:some])), float(np.mean(values[-some:]))
        text = f"from {_number(first)} to {_number(last)} in {_phase_name(phase)}"
        (falls if last < first else rises).append(text)
    if rises:
        return Sign(name, "found", f"The loss did not fall: it went {' and '.join(rises)}.")
    if falls:
        return Sign(name, "none", f"No sign of trouble: the loss fell {' and '.join(falls)}.")
    return Sign(name, "unknown", "Not known: fewer than two epochs recorded a loss.")


# --- what the script draws -------------------------------------------------------------------


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
        "phases": [_phase_name(record.get("phase")) for record in metrics],
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
        values = [_finite(record.get(name)) for record in metrics]
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
    usable = (clusters.sizes > 0) & np.isfinite(clusters.centroids).all(axis=1)
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
        data["sprite"] = _sprite(clusters.examples, rows, MAP_TILE)
    else:
        first = [_vector(clusters.examples, row)[:READ_OUT_FEATURES] for row in rows]
        data["features"] = {
            "values": [_significant(vector) for vector in first],
            "n": int(np.prod(clusters.examples.shape[1:])),
        }
    return data


def _gallery(clusters: ClusteredExamples) -> dict[str, Any]:
    """The nearest and the farthest examples of each cluster, as many clusters as a page holds."""
    shown = clusters.shown(SHOWN_CLUSTERS)
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
        data["sprite"] = _sprite(clusters.examples, numbers, GALLERY_TILE)
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
            "values": [_finite(sizes[i]) for _, sizes in recorded],
            "colour": _colour(clusters.colours[i]),
            "beneath": False,
        }
        for i in clusters.shown(SHOWN_SIZES).tolist()
    ]
    return {
        "epochs": [record["epoch"] for record, _ in recorded],
        "phases": [_phase_name(record.get("phase")) for record, _ in recorded],
        "panels": [{"title": "Sizes over the epochs", "scale": "count", "lines": lines}],
    }


def _legend_of_clusters(clusters: ClusteredExamples) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    leaders, shares = _leaders(clusters)
    for cluster in range(clusters.k):
        size = int(clusters.sizes[cluster])
        text = f"{size:,}" if size else "empty"
        if size and leaders is not None:
            name = _class_text(clusters.class_names[leaders[cluster]])
            text += f" · {100 * shares[cluster]:.0f}% {name}"
        entries.append(
            {
                "name": f"cluster {cluster}",
                "about": text,
                "size": size,
                "colour": _colour(clusters.colours[cluster]),
                "leader": int(leaders[cluster]) if size and leaders is not None else None,
            }
        )
    return entries


def _leaders(clusters: ClusteredExamples) -> tuple[np.ndarray | None, np.ndarray]:
    """The most frequent class of each cluster, [k], and its share."""
    if clusters.truth is None:
        return None, np.zeros(clusters.k)
    n_classes = len(clusters.class_names)
    pairs = clusters.labels.astype(np.int64) * n_classes + clusters.truth
    counts = np.bincount(pairs, minlength=clusters.k * n_classes).reshape(clusters.k, n_classes)
    return counts.argmax(axis=1), counts.max(axis=1) / np.maximum(clusters.sizes, 1)


def _legend_of_classes(clusters: ClusteredExamples) -> list[dict[str, Any]] | None:
    if clusters.truth is None:
        return None
    sizes = np.bincount(clusters.truth, minlength=len(clusters.class_names))
    # There may be more colours, for clusters.
    colours = clusters.class_colours[: len(sizes)]
    return [
        {
            "name": _class_text(name),
            "about": f"{size:,}",
            "size": int(size),
            "colour": _colour(colour),
        }
        for name, size, colour in zip(clusters.class_names, sizes, colours, strict=True)
    ]


def _class_text(name: str) -> str:
    return f"class {name}" if name.isdigit() else name


# --- images ----------------------------------------------------------------------------------


def _sprite(examples: np.ndarray, rows: np.ndarray, side: int) -> dict[str, Any] | None:
    """Examples as one sheet of small images, and how to find the i-th in it."""
    if not len(rows):
        return None
    channels = 1 if len(examples.shape) == 3 or examples.shape[-1] == 1 else 3
    side = min(side, max(8, int(math.sqrt(SPRITE_BYTES / (len(rows) * channels)))))
    # Examples may hold infinities: their pictures need not be good, but must not stop the page.
    with np.errstate(all="ignore"):
        images = np.stack(
            [_reduced(np.asarray(examples[row], dtype=np.float32), side) for row in rows]
        )
        images = as_pictures(images, examples.dtype)
    m, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(m))
    n_rows = -(-m // columns)
    sheet = np.zeros((n_rows * columns, height, width, channels), dtype=np.uint8)
    sheet[:m] = np.rint(images * 255)
    sheet = sheet.reshape(n_rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(n_rows * height, columns * width, channels)
    return {"url": _png(sheet), "columns": columns, "width": width, "height": height}


def _reduced(image: np.ndarray, side: int) -> np.ndarray:
    """The image with neither side longer than `side`: means of squares of pixels, [h, w, c]."""
    image = image if image.ndim == 3 else image[..., None]
    height, width, channels = image.shape
    # Of a very large image every few pixels are enough.
    step = max(1, max(height, width) // (8 * side))
    image = image[::step, ::step]
    factor = -(-max(image.shape[:2]) // side)
    if factor == 1:
        return image
    height, width = (-(-length // factor) for length in image.shape[:2])
    missing = (height * factor - image.shape[0], width * factor - image.shape[1])
    image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    return image.reshape(height, factor, width, factor, channels).mean(axis=(1, 3))


def _png(pixels: np.ndarray) -> str:
    """Bytes [h, w, 1 | 3] as the data URL of a PNG file."""
    from PIL import Image  # matplotlib needs it too

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        file, format="png", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _vector(examples: np.ndarray, row: Any) -> np.ndarray:
    return np.asarray(examples[row], dtype=np.float64).reshape(-1)


# --- what is read without a script -----------------------------------------------------------


def complete_results(
    results: Mapping[str, Any] | None,
    clusters: ClusteredExamples,
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The results of a run, with those that its arrays and records tell where they are missing."""
    from jkmeans.metrics import summarize

    found: dict[str, Callable[[], Any]] = {
        "n_examples": lambda: clusters.n,
        "n_clusters": lambda: clusters.k,
        "n_epochs": lambda: metrics[-1]["epoch"] if metrics else 0,
        "inertia": lambda: _inertia(clusters),
        "empty_clusters": lambda: int((clusters.sizes == 0).sum()),
    }
    results = dict(results or {})
    for name, compute in found.items():
        if name not in results:
            results[name] = compute()
    if clusters.truth is not None and not {"acc", "nmi", "ari"} <= results.keys():
        results = summarize(clusters.truth, clusters.labels) | results
    seconds = [value for r in metrics if (value := _finite(r.get("seconds"))) is not None]
    if seconds and "train_seconds" not in results:
        results["train_seconds"] = round(sum(seconds), 1)
    return results


def _inertia(clusters: ClusteredExamples) -> float:
    total = 0.0
    for start in range(0, clusters.n, 8192):
        block = np.asarray(clusters.embeddings[start : start + 8192], dtype=np.float64)
        centroids = clusters.centroids[clusters.labels[start : start + 8192]]
        with np.errstate(all="ignore"):
            total += float(np.square(block - centroids).sum())
    return total


_CARDS = {
    "acc": "ACC",
    "nmi": "NMI",
    "ari": "ARI",
    "purity": "purity",
    "inertia": "inertia",
    "n_clusters": "clusters",
    "empty_clusters": "empty",
    "n_examples": "examples",
    "n_epochs": "epochs",
    "train_seconds": "seconds",
}


def _cards(results: Mapping[str, Any]) -> str:
    return "\n".join(
        f"<div><dt>{label}</dt><dd>{_escape(_shown(results[name]))}</dd></div>"
        for name, label in _CARDS.items()
        if results.get(name) is not None
    )


def _definitions(values: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    if not values:
        return '<p class="quiet">Nothing was handed over.</p>'
    rows = "\n".join(
        f'<tr><th scope="row">{_escape(str(name))}</th><td>{_escape(show(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<table class="definitions">\n{rows}\n</table>'


def _signs(signs: Sequence[Sign]) -> str:
    marks = {"found": "!", "none": "✓", "unknown": "?"}
    return "\n".join(
        f'<li class="{sign.status}"><span class="mark" aria-hidden="true">{marks[sign.status]}'
        f"</span><div><strong>{_escape(sign.name)}</strong> {_escape(sign.sentence)}</div></li>"
        for sign in sorted(signs, key=lambda sign: ("found", "none", "unknown").index(sign.status))
    )


def _confusion(clusters: ClusteredExamples) -> str:
    if clusters.truth is None or not 1 <= len(clusters.class_names) <= MAX_CLASSES:
        return ""
    matrix, names, heads, below = readable_confusion(clusters)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    head = "".join(_heading("col", text) for text in heads)
    body = "\n".join(
        f"<tr>{_heading('row', name)}"
        + "".join(
            # The style sheet has eleven shades: the policy of the page allows no inline style.
            f'<td class="s{round(10 * s)}">{f"{count:,}" if count else ""}</td>'
            for count, s in zip(counts.tolist(), shares.tolist(), strict=True)
        )
        + "</tr>"
        for name, counts, shares in zip(names, matrix, share, strict=True)
    )
    return (
        '<section aria-labelledby="confusion-title">\n'
        '<h2 id="confusion-title">Matched confusion matrix</h2>\n'
        f'<p class="quiet">Rows: true classes. Columns: {_escape(below)}.</p>\n'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="confusion-title">\n'
        f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>\n</div>\n</section>"
    )


def _heading(scope: str, text: str) -> str:
    # The style sheet cuts long names.
    text = _escape(text)
    return f'<th scope="{scope}" title="{text}">{text}</th>'


# --- text ------------------------------------------------------------------------------------


def embeddable_json(value: Any) -> str:
    """JSON that may stand in a script element: pure ASCII, without `<`, `>` and `&`.

    NaN and infinity are null: a browser reads no JSON that has them.
    """
    text = json.dumps(_encodable(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def flatten_config(config: Any) -> dict[str, Any]:
    """The fields of a nested config by their dotted names: {"training.n_epochs": 10}."""
    if config is None:
        return {}
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        return {"config": config}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{name}.{inner}": v for inner, v in flatten_config(value).items()}
        else:
            flat[str(name)] = value
    return flat


def _encodable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_whole_characters(str(name)): _encodable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(inner) for inner in value]
    if isinstance(value, str):
        return _whole_characters(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _escape(text: str) -> str:
    # A browser drops control characters or takes them for errors.
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text)
    return html.escape(_whole_characters(text), quote=True)


def _whole_characters(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which no file and no window can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _number(value, 4)
    return _as_written(value)


def _as_written(value: Any) -> str:
    """The value as a config file has it: no digit is lost, the empty string can be seen."""
    text = str(value) or "''"
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " …"


def _number(value: float, digits: int = 3) -> str:
    """A number with a few digits, and no exponent where one can do without."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _phase_name(phase: Any) -> str:
    return PHASE_NAMES.get(str(phase), str(phase)) if phase is not None else "training"


def _finite(value: Any) -> float | None:
    """The value as a number, or None where it is none or not finite."""
    if not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return None
    return float(value)


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values, 4).tolist()


def _significant(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values.tolist()]


def _colour(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb)


def _asset(name: str) -> str:
    return (resources.files("jkmeans") / "page_assets" / name).read_text(encoding="utf-8")


def _content_hash(text: str) -> str:
    """The hash by which a Content-Security-Policy knows a script or a style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
