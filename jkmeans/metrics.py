"""How well clusters agree with ground truth: accuracy after matching, NMI, ARI, purity.

Labels are [n] integers of any values, of clusters and of classes alike; only which examples share
one counts. Everything runs on the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from jkmeans.errors import UserError


def clustering_accuracy(truth: Any, labels: Any) -> float:
    """Return the share of examples that are right under the best one-to-one matching.

    ACC = max over one-to-one maps m from clusters to classes of (1/n) Σ_i 1[truth_i = m(labels_i)],
    found by the Hungarian method (Kuhn 1955, "The Hungarian method for the assignment problem"), as
    in Yang et al. 2010, "Image clustering using local discriminant models and global integration".
    With more clusters than classes, the examples of unmatched clusters count as wrong.

    Args:
      truth: [n] integers, the classes.
      labels: [n] integers, the clusters.

    Returns:
      The accuracy, from 0 to 1.

    Raises:
      UserError: the two are empty, not [n] of one n, or not integers.
    """
    counts, _, _ = _contingency(truth, labels)
    return float(counts[_assign(counts)].sum() / counts.sum())


def normalized_mutual_information(truth: Any, labels: Any) -> float:
    """Return NMI = 2 I(truth; labels) / (H(truth) + H(labels)).

    The normalization is the arithmetic mean of the two entropies, scikit-learn's default; older
    papers use the geometric mean, which gives somewhat larger numbers.

    Args:
      truth: [n] integers, the classes.
      labels: [n] integers, the clusters.

    Returns:
      From 0 (independent) to 1 (equal up to names).

    Raises:
      UserError: the two are empty, not [n] of one n, or not integers.
    """
    from sklearn.metrics import normalized_mutual_info_score

    truth, labels = _check_pair(truth, labels)
    return float(normalized_mutual_info_score(truth, labels, average_method="arithmetic"))


def adjusted_rand_index(truth: Any, labels: Any) -> float:
    """Return the Rand index adjusted for chance (Hubert and Arabie 1985).

    Args:
      truth: [n] integers, the classes.
      labels: [n] integers, the clusters.

    Returns:
      1 for equal partitions, about 0 for random ones, -0.5 at the least.

    Raises:
      UserError: the two are empty, not [n] of one n, or not integers.
    """
    from sklearn.metrics import adjusted_rand_score

    truth, labels = _check_pair(truth, labels)
    return float(adjusted_rand_score(truth, labels))


def purity(truth: Any, labels: Any) -> float:
    """Return the share of examples that belong to the most frequent class of their cluster.

    Unlike `clustering_accuracy` it lets many clusters share a class, so it says more when there are
    many more clusters than classes; it grows with their number and is 1 when each example is alone.

    Args:
      truth: [n] integers, the classes.
      labels: [n] integers, the clusters.

    Returns:
      The purity, from above 0 to 1.

    Raises:
      UserError: the two are empty, not [n] of one n, or not integers.
    """
    counts, _, _ = _contingency(truth, labels)
    return float(counts.max(axis=0).sum() / counts.sum())


def match(truth: Any, labels: Any) -> dict[int, int]:
    """Match clusters to classes one to one, so that most examples agree.

    Args:
      truth: [n] integers, the classes.
      labels: [n] integers, the clusters.

    Returns:
      cluster -> class, for as many pairs as there are clusters or classes, whichever are fewer,
      in the order of the classes. A pair may have no example in common when nothing better is left.

    Raises:
      UserError: the two are empty, not [n] of one n, or not integers.
    """
    counts, classes, clusters = _contingency(truth, labels)
    rows, columns = _assign(counts)
    return {int(clusters[j]): int(classes[i]) for i, j in zip(rows, columns, strict=True)}


def matched_confusion(truth: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count examples by class and cluster, matched pairs on the diagonal.

    Args:
      truth: [n] integers, the classes.
      labels: [n] integers, the clusters.

    Returns:
      matrix: [n_classes, n_clusters] int64 counts.
      classes: [n_classes], the class of each row: in order, except that with fewer clusters than
        classes those without a cluster come last.
      clusters: [n_clusters], the cluster of each column: that of row 0, of row 1, and so on; then
        those without a class, the largest first.

    Raises:
      UserError: the two are empty, not [n] of one n, or not integers.
    """
    counts, classes, clusters = _contingency(truth, labels)
    rows, columns = _assign(counts)
    other_rows = np.setdiff1d(np.arange(len(classes)), rows)
    other_columns = np.setdiff1d(np.arange(len(clusters)), columns)
    sizes = counts.sum(axis=0)[other_columns]
    other_columns = other_columns[np.argsort(-sizes, kind="stable")]
    rows = np.concatenate([rows, other_rows])
    columns = np.concatenate([columns, other_columns])
    return counts[np.ix_(rows, columns)], classes[rows], clusters[columns]


_SUMMARY: dict[str, Callable[[Any, Any], float]] = {
    "acc": clustering_accuracy,
    "nmi": normalized_mutual_information,
    "ari": adjusted_rand_index,
    "purity": purity,
}
SUMMARY = tuple(_SUMMARY)
"""The names in what `summarize` returns."""


def summarize(truth: Any, labels: Any) -> dict[str, float]:
    """Return every metric of this module by its short name.

    Args:
      truth: [n] integers, the classes.
      labels: [n] integers, the clusters.

    Returns:
      "acc", "nmi", "ari" and "purity".

    Raises:
      UserError: the two are empty, not [n] of one n, or not integers.
    """
    return {name: measure(truth, labels) for name, measure in _SUMMARY.items()}


def _check_pair(truth: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, labels = np.asarray(truth), np.asarray(labels)
    for name, array in (("truth", truth), ("labels", labels)):
        if array.ndim != 1:
            raise UserError(f"{name} has {array.ndim} dimensions; accepted: [n].")
        if array.size == 0:
            raise UserError(f"{name} is empty; accepted: at least one entry.")
        if array.dtype.kind not in "iu":
            raise UserError(f"{name} is of dtype {array.dtype}; accepted: integers.")
    if len(truth) != len(labels):
        raise UserError(
            f"truth has {len(truth):,} entries and labels {len(labels):,}; "
            "accepted: the same number."
        )
    return truth, labels


def _contingency(truth: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts [n_classes, n_clusters], and the classes and clusters in order."""
    truth, labels = _check_pair(truth, labels)
    classes, rows = np.unique(truth, return_inverse=True)
    clusters, columns = np.unique(labels, return_inverse=True)
    shape = (len(classes), len(clusters))
    counts = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1])
    return counts.reshape(shape), classes, clusters


def _assign(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matched rows, in order, and the column of each."""
    return linear_sum_assignment(counts, maximize=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation of a number over seeds; that of equal numbers is 0.

    Args:
      values: of each seed; at least one.

    Returns:
      ``mean``, ``sd`` and the ``values``.
    """
    if len(values) == 1 or min(values) == max(values):  # NumPy's mean of equals may be rounded.
        return {"mean": float(values[0]), "sd": 0.0, "values": list(values)}
    sd = float(np.std(values, ddof=1))
    return {"mean": float(np.mean(values)), "sd": sd, "values": list(values)}
