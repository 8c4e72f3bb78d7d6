"""Hierarchies of clusters: bisecting k-means, and k-means of k-means for data curation.

Which rows are clustered next depends on what was found, so the loop over clusters or levels runs on
the host; each k-means in it is a program of its own, which the caller supplies as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans.kmeans.assignment import squared_distances

BISECTING_STRATEGIES = ("biggest_inertia", "largest_cluster")


class Tree(NamedTuple):
    """A binary tree of m = 2k − 1 nodes whose leaves are clusters; node 0 is the root.

    Attributes:
      centroids: [m, d].
      children: [m, 2] int32, left and right; −1 for leaves.
      labels: [m] int32, the cluster of a leaf, numbered from left to right; −1 for other nodes.
    """

    centroids: np.ndarray
    children: np.ndarray
    labels: np.ndarray


class Split(NamedTuple):
    """How a set of rows fell into two clusters.

    Attributes:
      labels: [r], 0 or 1.
      centroids: [2, d].
      inertias: [2], the weighted sum of squared distances of each.
    """

    labels: np.ndarray
    centroids: np.ndarray
    inertias: np.ndarray


class Level(NamedTuple):
    """One level of a hierarchy: clusters of the points below, which are rows or centroids.

    Attributes:
      centroids: [k, d].
      labels: [p], the cluster of each point below.
      inertia: the weighted sum of squared distances of the points below.
      n_iter: iterations of the last k-means.
    """

    centroids: np.ndarray
    labels: np.ndarray
    inertia: float
    n_iter: int


def bisect(
    split: Callable[[np.ndarray, int], Split],
    n_rows: int,
    n_clusters: int,
    center: np.ndarray,
    *,
    strategy: str = "biggest_inertia",
) -> tuple[Tree, np.ndarray, float]:
    """Bisecting k-means: splits a cluster in two until there are k.

    Args:
      split: ``split(rows, number)`` clusters the rows [r] int64 (r ≥ 2) in two; ``number`` counts
        the splits.
      n_rows: n.
      n_clusters: k, at most n.
      center: [d], the centroid of all rows.
      strategy: the cluster to split is that of "biggest_inertia", or the "largest_cluster" by its
        number of rows; the leftmost among equals, and always one of two rows at least.

    Returns:
      The tree, the cluster of each row [n] int32, and the inertia (NaN for k = 1).

    Raises:
      ValueError: an unknown strategy.

    Source: Steinbach, Karypis and Kumar, A comparison of document clustering techniques, KDD
    workshop on text mining 2000.
    """
    if strategy not in BISECTING_STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: expected {' or '.join(BISECTING_STRATEGIES)}")
    n_nodes = 2 * n_clusters - 1
    centroids = np.zeros((n_nodes, len(center)), center.dtype)
    centroids[0] = center
    children = np.full((n_nodes, 2), -1, np.int32)
    inertias = np.full(n_nodes, np.nan)
    # Leaves from left to right, each with its rows.
    leaves = [(0, np.arange(n_rows))]

    def score(leaf: tuple[int, np.ndarray]) -> float:
        node, rows = leaf
        if len(rows) < 2:
            return -np.inf
        return inertias[node] if strategy == "biggest_inertia" else len(rows)

    for number in range(n_clusters - 1):
        place = max(range(len(leaves)), key=lambda i: score(leaves[i])) if number else 0
        node, rows = leaves[place]
        found = split(rows, number)
        pair = np.array([2 * number + 1, 2 * number + 2])
        children[node], centroids[pair], inertias[pair] = pair, found.centroids, found.inertias
        leaves[place : place + 1] = [
            (int(child), rows[found.labels == side]) for side, child in enumerate(pair)
        ]
    node_labels = np.full(n_nodes, -1, np.int32)
    row_labels = np.empty(n_rows, np.int32)
    for label, (node, rows) in enumerate(leaves):
        node_labels[node] = label
        row_labels[rows] = label
    inertia = float(sum(inertias[node] for node, _ in leaves))
    return Tree(centroids, children, node_labels), row_labels, inertia


def descend(x: jax.Array, tree: Tree) -> jax.Array:
    """The leaf of each row, going down from the root to the nearer of two children.

    Args:
      x: [n, d], any real dtype.
      tree: from ``bisect``, as arrays of any kind.

    Returns:
      [n] int32, clusters. Not always the nearest of all: a row stays in the half it fell into.
    """
    centroids, children = jnp.asarray(tree.centroids), jnp.asarray(tree.children)

    def inner(nodes):
        return children[nodes, 0] >= 0

    def step(nodes):
        left, right = children[nodes, 0], children[nodes, 1]
        to_left = squared_distances(x, centroids, left)
        to_right = squared_distances(x, centroids, right)
        return jnp.where(inner(nodes), jnp.where(to_right < to_left, right, left), nodes)

    # Local to the device: no collective waits for the deepest row of another one.
    nodes = jnp.zeros_like(x[:, 0], dtype=jnp.int32)
    nodes = lax.while_loop(lambda nodes: jnp.any(inner(nodes)), step, nodes)
    return jnp.asarray(tree.labels)[nodes]


def hierarchy(
    cluster: Callable[..., tuple[np.ndarray, int]],
    assign: Callable[..., tuple[np.ndarray, np.ndarray, float]],
    x: np.ndarray | jax.Array,
    sizes: Sequence[int],
    *,
    weights: np.ndarray | None = None,
    n_resampling: int = 10,
    resample_size: int | None = None,
) -> list[Level]:
    """k-means of the centroids of k-means, each level resampled towards a uniform coverage.

    The first level clusters the rows, each further one the centroids of the level below. k-means
    puts many centroids where rows are dense; so within a level the r points nearest to each
    centroid are taken, k-means is run on those alone, and all points are assigned to its centroids;
    this is repeated. Centroids then spread evenly over the support of the data, and a sample
    balanced over the hierarchy (``balanced_sample``) covers rare concepts as well as common ones.

    Args:
      cluster: ``cluster(points, k, level, step, n_padded, chosen) -> (centroids, n_iter)``. Step 0
        sees all points of the level (chosen is None); later steps the points whose numbers are
        ``chosen``, to be padded to ``n_padded`` rows.
      assign: ``assign(points, centroids, level) -> (labels, squared distances, inertia)``.
      x: [n, d].
      sizes: k of each level, the finest first.
      weights: [n] float, at least 0, of the rows; None for ones. Rows of weight 0 are labelled, but
        no step resamples them.
      n_resampling: how often each level is resampled; 0 is plain hierarchical k-means.
      resample_size: r; by default half of the mean size of the level's clusters, at least 1. Points
        of weight 0 do not count.

    Returns:
      The levels, the finest first.

    Source: Vo et al., Automatic data curation for self-supervised learning: a clustering-based
    approach, TMLR 2024, sections 3.2 and 3.3.
    """
    levels: list[Level] = []
    points = x
    counted = None if weights is None else np.flatnonzero(weights > 0)
    for level, k in enumerate(sizes):
        n_points = points.shape[0]
        centroids, n_iter = cluster(points, k, level, 0, n_points, None)
        labels, distances, inertia = assign(points, centroids, level)
        n_counted = n_points if counted is None else len(counted)
        size = max(1, n_counted // (2 * k)) if resample_size is None else resample_size
        n_padded = min(k * size, n_counted)
        for step in range(1, n_resampling + 1):
            chosen = closest_rows(labels, distances, size, counted)
            # Fewer points than clusters are left where clusters are empty.
            if len(chosen) < k:
                break
            centroids, n_iter = cluster(points[chosen], k, level, step, n_padded, chosen)
            labels, distances, inertia = assign(points, centroids, level)
        levels.append(Level(centroids, labels, inertia, n_iter))
        points, counted = centroids, None
    return levels


def closest_rows(
    labels: np.ndarray, distances: np.ndarray, size: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """The ``size`` rows nearest to the centroid of each cluster, or all of a smaller one.

    Args:
      labels: [n] int, at least 0.
      distances: [n], to the own centroid.
      size: at least 1.
      rows: [r] int, ascending, the rows to choose from; None for all.

    Returns:
      Row numbers, ascending.
    """
    if rows is not None:
        return rows[closest_rows(labels[rows], distances[rows], size)]
    order = np.lexsort((distances, labels))
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered, side="left")
    return np.sort(order[np.arange(len(order)) - first < size])


def balanced_sample(
    level_labels: Sequence[np.ndarray], n_samples: int, random: np.random.RandomState
) -> np.ndarray:
    """Rows spread as evenly as possible over the clusters of each level, from the top down.

    Every cluster gets the same number of rows, except that one with fewer gives all it has and
    leaves the rest to the others; then the same holds inside it, for the clusters below.

    Args:
      level_labels: [n] int for each level, the finest first: the cluster of each row.
      n_samples: at most n.
      random: decides the remainders, and which rows of a finest cluster are taken.

    Returns:
      [n_samples] different row numbers, ascending.

    Raises:
      ValueError: more rows are wanted than there are.

    Source: Vo et al. 2024, section 3.4.
    """
    n_rows = len(level_labels[0])
    if n_samples > n_rows:
        raise ValueError(f"n_samples={n_samples}: expected at most the {n_rows} rows of the fit")

    def choose(rows: np.ndarray, wanted: int, level: int) -> list[np.ndarray]:
        if wanted == len(rows):
            return [rows]
        if level < 0:
            return [random.choice(rows, wanted, replace=False)]
        labels = level_labels[level][rows]
        order = np.argsort(labels, kind="stable")
        parts = np.split(rows[order], np.flatnonzero(np.diff(labels[order])) + 1)
        shares = spread_evenly(wanted, np.array([len(part) for part in parts]), random)
        found = []
        for part, share in zip(parts, shares, strict=True):
            if share:
                found += choose(part, int(share), level - 1)
        return found

    if n_samples == 0:
        return np.empty(0, np.int64)
    return np.sort(np.concatenate(choose(np.arange(n_rows), n_samples, len(level_labels) - 1)))


def spread_evenly(total: int, capacities: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Shares that add up to ``total``, as equal as the capacities allow.

    Args:
      total: at most the sum of the capacities.
      capacities: [m] int.
      random: decides who gets one more where it does not come out even.

    Returns:
      [m] int.
    """
    low, high = 0, int(capacities.max(initial=0))
    while low < high:  # the largest common share that is not too much
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if np.minimum(capacities, middle).sum() <= total else (low, middle - 1)
        )
    shares = np.minimum(capacities, low)
    more = np.flatnonzero(capacities > low)
    shares[random.choice(more, total - int(shares.sum()), replace=False)] += 1
    return shares
