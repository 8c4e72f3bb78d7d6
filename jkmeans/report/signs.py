"""Signs of failure in words: collapse, empty, duplicate and dominant clusters, labels, the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jkmeans.report.clusters import ClusteredExamples, counted
from jkmeans.report.formatting import short_number
from jkmeans.report.records import finite, phase_name

COLLAPSED = 0.05  # of the variance when clustering began
DUPLICATE = 0.05  # of the distance at which centroids are to be expected
DOMINANT = 0.5  # of the examples
RAN_AWAY = 1e20  # of a loss, whatever the units of the examples
STILL_CHANGING = 0.02  # of the labels, in the last epoch


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
        if (value := finite(record.get("embedding_variance"))) is not None
    ]
    if len(variances) < 2:
        return Sign(name, "unknown", "Not known: no variance of the embeddings was recorded.")
    # Pretraining shapes the scale of the embeddings: what counts is what clustering began with.
    phases = [phase for phase, _ in variances]
    start = max(phases.index("cluster") - 1, 0) if "cluster" in phases else 0
    first, last = variances[start][1], variances[-1][1]
    when = "when clustering began" if start else "at first"
    numbers = (
        f"the variance of the embeddings is {short_number(last)} at the end, and was "
        f"{short_number(first)} {when}"
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
        f"{pair[0]} and {pair[1]} lie {short_number(nearest[one])} apart, where about "
        f"{short_number(expected)} is to be expected"
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
        if (value := finite(record.get("label_change"))) is not None
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
        bad = [r["epoch"] for r in metrics if key in r and finite(r[key]) is None]
        if bad:
            return Sign(
                name,
                "found",
                f"{key} was not finite in {counted(len(bad), 'epoch')} of {len(metrics):,}, "
                f"first in epoch {bad[0]:,}.",
            )
    highest = max((r["loss"] for r in metrics if "loss" in r), default=0.0)
    if highest > RAN_AWAY:
        return Sign(name, "found", f"The loss ran away: it reached {short_number(highest)}.")
    falls, rises = [], []
    for phase in dict.fromkeys(record.get("phase") for record in metrics):
        values = [r["loss"] for r in metrics if r.get("phase") == phase and "loss" in r]
        if len(values) < 2:
            continue
        some = max(1, len(values) // 10)
        first, last = float(np.mean(values[:some])), float(np.mean(values[-some:]))
        text = f"from {short_number(first)} to {short_number(last)} in {phase_name(phase)}"
        (falls if last < first else rises).append(text)
    if rises:
        return Sign(name, "found", f"The loss did not fall: it went {' and '.join(rises)}.")
    if falls:
        return Sign(name, "none", f"No sign of trouble: the loss fell {' and '.join(falls)}.")
    return Sign(name, "unknown", "Not known: fewer than two epochs recorded a loss.")
