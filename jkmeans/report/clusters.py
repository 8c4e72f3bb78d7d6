"""The clustered examples of a report: checked, named, counted and coloured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jkmeans.drawing import palette, whole_characters

SHOWN_CLUSTERS = 20  # more are too many to name and colour one by one


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
    class_colours: np.ndarray  # [≥ n_classes, 3]

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

    @property
    def usable(self) -> np.ndarray:
        """[k] bool: which clusters have members and a centroid of finite numbers."""
        return (self.sizes > 0) & np.isfinite(self.centroids).all(axis=1)

    def shown(self, limit: int) -> np.ndarray:
        """The clusters that fit into a picture: all of them, or the largest."""
        if self.k <= limit:
            return np.arange(self.k)
        return np.argsort(-self.sizes, kind="stable")[:limit]

    def members(self, cluster: int) -> np.ndarray:
        """The examples of a cluster, nearest first."""
        rows = np.flatnonzero(self.labels == cluster)
        return rows[np.argsort(self.distances[rows], kind="stable")]

    @functools.cached_property
    def class_counts(self) -> np.ndarray | None:
        """[k, n_classes]: examples of each class in each cluster; None without true classes."""
        if self.truth is None:
            return None
        counts = np.zeros((self.k, len(self.class_names)), np.int64)
        np.add.at(counts, (self.labels, self.truth), 1)
        return counts

    def leader(self, cluster: int) -> int | None:
        """The most frequent class of a cluster; None where it is empty, or without classes."""
        if self.class_counts is None or self.sizes[cluster] == 0:
            return None
        return int(self.class_counts[cluster].argmax())

    def describe(self, cluster: int) -> str:
        """Size and, with true classes, the most frequent class: `187 · 92% Sneaker`."""
        size = self.sizes[cluster]
        if size == 0:
            return "empty"
        leader = self.leader(cluster)
        if self.class_counts is None or leader is None:
            return counted(size, "example")
        share = self.class_counts[cluster, leader] / size
        return f"{size:,} · {100 * share:.0f}% {class_text(self.class_names[leader])}"


def class_text(name: str) -> str:
    """A class as a sentence names it: a name that is a number would be taken for a count."""
    return f"class {name}" if name.isdigit() else name


def counted(n: int, noun: str) -> str:
    """A number with its noun: `1 class`, `1,200 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{n:,} {noun if n == 1 else plural}"


def _class_name(value: Any, class_names: Sequence[str] | None) -> str:
    if class_names is not None and isinstance(value, int) and 0 <= value < len(class_names):
        value = class_names[value]
    return whole_characters(str(value))


def _matched_colours(
    truth: np.ndarray, labels: np.ndarray, k: int, palette: np.ndarray
) -> np.ndarray:
    """Gives each cluster the colour of the class that it is matched with."""
    from jkmeans.metrics import match

    colour_of = match(truth, labels)
    spare = iter(sorted(set(range(len(palette))) - set(colour_of.values())))
    return palette[[colour_of[i] if i in colour_of else next(spare) for i in range(k)]]
