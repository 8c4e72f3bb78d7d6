"""The results of a run, completed from its arrays, and its config, field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jkmeans.report.clusters import ClusteredExamples
from jkmeans.report.records import finite


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
    seconds = [value for r in metrics if (value := finite(r.get("seconds"))) is not None]
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
