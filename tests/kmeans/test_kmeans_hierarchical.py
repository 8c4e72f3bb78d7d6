import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkmeans.kmeans.hierarchical import (
    Split,
    Tree,
    balanced_sample,
    bisect,
    closest_rows,
    descend,
    hierarchy,
    spread_evenly,
)

LINE = np.array([0.0, 1, 2, 3, 10, 11, 30, 31, 32, 33])


def split_at_largest_gap(rows, number):
    """Rows of LINE, cut where neighbours are farthest apart."""
    values = LINE[rows]
    cut = np.argmax(np.diff(values)) + 1
    parts = values[:cut], values[cut:]
    return Split(
        (np.arange(len(rows)) >= cut).astype(int),
        np.array([[part.mean()] for part in parts]),
        np.array([((part - part.mean()) ** 2).sum() for part in parts]),
    )


def test_bisecting_by_hand():
    # 30 … 33 are split off first; of 0 … 11 and 30 … 33, the former has more inertia and rows.
    for strategy in ("biggest_inertia", "largest_cluster"):
        tree, labels, inertia = bisect(
            split_at_largest_gap, 10, 3, np.array([LINE.mean()]), strategy=strategy
        )
        np.testing.assert_array_equal(labels, [0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
        np.testing.assert_array_equal(tree.labels, [-1, -1, 2, 0, 1])
        np.testing.assert_array_equal(tree.children, [[1, 2], [3, 4], *[[-1, -1]] * 3])
        np.testing.assert_allclose(tree.centroids[:, 0], [15.3, 4.5, 31.5, 1.5, 10.5])
        assert inertia == 5 + 0.5 + 5


def test_bisecting_to_single_rows_and_not_at_all(monkeypatch):
    line = np.array([0.0, 1, 2, 4, 8, 16])
    monkeypatch.setitem(globals(), "LINE", line)
    tree, labels, inertia = bisect(split_at_largest_gap, 6, 6, np.array([0.0]))
    np.testing.assert_array_equal(labels, np.arange(6))
    assert inertia == 0
    np.testing.assert_array_equal(descend(jnp.asarray(line)[:, None], tree), labels)
    tree, labels, _ = bisect(split_at_largest_gap, 6, 1, np.array([7.0]))
    np.testing.assert_array_equal(labels, 0)
    np.testing.assert_array_equal(descend(jnp.asarray(line)[:, None], tree), 0)


def test_a_row_stays_in_the_half_it_fell_into():
    # 5.9 is nearer to the centroid 6 of the right half, but left of the first cut, at 6.
    tree = Tree(
        np.array([[0.0], [2.0], [10.0], [1.0], [3.0], [6.0], [14.0]]),
        np.array([[1, 2], [3, 4], [5, 6], *[[-1, -1]] * 4]),
        np.array([-1, -1, -1, 0, 1, 2, 3]),
    )
    x = jnp.array([[0.0], [5.9], [6.1], [99.0]])
    np.testing.assert_array_equal(descend(x, tree), [0, 1, 2, 3])


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy='deepest': expected biggest_inertia or largest"):
        bisect(split_at_largest_gap, 10, 2, np.array([0.0]), strategy="deepest")


def test_closest_rows():
    labels = np.array([0, 1, 0, 1, 0, 2])
    distances = np.array([3.0, 1, 1, 2, 2, 9])
    np.testing.assert_array_equal(closest_rows(labels, distances, 2), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(closest_rows(labels, distances, 1), [1, 2, 5])
    rows = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(closest_rows(labels, distances, 1, rows), [1, 4])


def assign_on_the_line(points, centroids, level):
    squared = (points - centroids.T) ** 2
    return squared.argmin(axis=1), squared.min(axis=1), float(squared.min(axis=1).sum())


def ends(points, k):
    return np.array([points[:, 0].min(), points[:, 0].max()])[:k, None]


def test_hierarchy_resamples_what_is_closest():
    x = np.array([[0.0], [1], [2], [9], [10], [11], [12]])
    seen = []

    def cluster(points, k, level, step, n_padded, chosen):
        seen.append((level, step, points[:, 0].tolist(), n_padded))
        return ends(points, k), step + 1

    levels = hierarchy(cluster, assign_on_the_line, x, [2, 1], n_resampling=1, resample_size=2)
    assert seen == [
        (0, 0, [0, 1, 2, 9, 10, 11, 12], 7),
        (0, 1, [0, 1, 11, 12], 4),
        (1, 0, [0, 12], 2),
        (1, 1, [0, 12], 2),
    ]
    np.testing.assert_array_equal(levels[0].labels, [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(levels[1].labels, [0, 0])
    assert levels[0].inertia == 0 + 1 + 4 + 9 + 4 + 1 + 0
    assert levels[0].n_iter == 2


def test_hierarchy_resamples_no_row_of_weight_0():
    x = np.array([[0.0], [1], [2], [3], [9], [10], [11], [12]])
    weights = np.array([0, 0, 1, 2, 1, 0, 3, 0])
    seen = []

    def cluster(points, k, level, step, n_padded, chosen):
        seen.append((level, step, points[:, 0].tolist(), n_padded))
        return ends(points, k), 0

    hierarchy(cluster, assign_on_the_line, x, [2, 2], weights=weights, n_resampling=1)
    assert seen == [
        (0, 0, x[:, 0].tolist(), 8),
        (0, 1, [2, 11], 2),  # Of four rows that count, half of the mean size is one.
        (1, 0, [2, 11], 2),
        (1, 1, [2, 11], 2),  # Centroids all count.
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_shares_are_as_even_as_they_can_be(capacities, data):
    total = data.draw(st.integers(0, sum(capacities)))
    shares = spread_evenly(total, np.array(capacities), np.random.RandomState(0))
    assert shares.sum() == total
    assert (shares <= capacities).all()
    # Whoever could take more has at most one less than anyone.
    open_shares = shares[shares < capacities]
    if len(open_shares):
        assert open_shares.min() >= shares.max() - 1


def test_balanced_sample():
    # 90 rows of a common concept (two fine clusters), 10 of a rare one.
    top = np.repeat([0, 1], [90, 10])
    fine = np.repeat([0, 1, 2], [80, 10, 10])
    rows = balanced_sample([fine, top], 16, np.random.RandomState(0))
    assert len(set(rows)) == 16
    np.testing.assert_array_equal(np.bincount(fine[rows]), [4, 4, 8])
    # The rare concept gives all it has, the common one the rest.
    rows = balanced_sample([fine, top], 40, np.random.RandomState(0))
    np.testing.assert_array_equal(np.bincount(fine[rows]), [20, 10, 10])
    assert len(balanced_sample([fine, top], 0, np.random.RandomState(0))) == 0
    with pytest.raises(ValueError, match="n_samples=101: expected at most the 100 rows"):
        balanced_sample([fine, top], 101, np.random.RandomState(0))
