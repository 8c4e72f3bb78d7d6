"""The choice of K: each judgement against scikit-learn or by hand, and K found on blobs."""

import itertools

import jax
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples as reference_silhouettes

from jkmeans import selection
from jkmeans.selection import STABLE, Sweep, silhouette_samples, suggest, sweep

D = 3


def grid_of_blobs(k: int, n: int = 600, std: float = 0.4, seed: int = 0) -> np.ndarray:
    """Blobs on the corners of a cube and on its middle, far apart."""
    corners = np.asarray([*itertools.product((-4.0, 4.0), repeat=D), (0.0,) * D])[:k]
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % k
    return (corners[labels] + std * generator.normal(size=(n, D))).astype(np.float32)


# Silhouettes


@pytest.mark.parametrize(
    ("n", "offset"),
    [
        (7, 0.0),
        (500, 100.0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((7, 100.0), (500, 0.0))),
    ],
)
def test_silhouettes_are_those_of_scikit_learn(n, offset):
    generator = np.random.default_rng(n)
    x = (generator.normal(size=(n, D)) + offset).astype(np.float32)
    labels = generator.integers(0, 3, n)
    labels[:3] = (0, 1, 2)
    # More clusters than have rows: those are passed over.
    found = silhouette_samples(x, labels, 5)
    expected = reference_silhouettes(x.astype(np.float64), labels)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_silhouettes_in_blocks(monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK_DISTANCES", 13 * 101)
    x = np.random.default_rng(0).normal(size=(101, D)).astype(np.float32)
    labels = np.arange(101) % 4
    found = silhouette_samples(x, labels, 4)
    np.testing.assert_allclose(found, reference_silhouettes(x, labels), atol=2e-5)


def test_silhouettes_by_hand():
    x = np.asarray([[0.0], [1.0], [10.0], [14.0], [50.0]], np.float32)
    labels = np.asarray([0, 0, 1, 1, 2])
    a = np.asarray([1, 1, 4, 4])
    b = np.asarray([12, 11, 9.5, 13.5])
    expected = [*((b - a) / np.maximum(a, b)), 0.0]  # One row alone has 0.
    np.testing.assert_allclose(silhouette_samples(x, labels, 3), expected, rtol=1e-6)


def test_silhouettes_of_equal_rows_and_of_one_cluster():
    x = np.ones((6, D), np.float32)
    labels = np.asarray([0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(silhouette_samples(x, labels, 2), 0)
    assert np.isnan(silhouette_samples(x, np.zeros(6, np.int32), 2)).all()


# The sweep


@pytest.fixture(scope="module")
def swept():
    x = grid_of_blobs(5)
    return x, sweep(jax.random.key(0), x, (2, 3, 4, 5, 6, 9), n_init=3, n_refits=4)


def test_it_finds_the_blobs(swept):
    _, result = swept
    assert result.suggestion == 5
    assert "K = 5 has the highest silhouette" in result.reason
    np.testing.assert_array_equal(result.n_clusters, [2, 3, 4, 5, 6, 9])
    at = {int(k): i for i, k in enumerate(result.n_clusters)}
    assert result.stability[at[5]] == 1.0
    assert result.stability[at[9]] < STABLE
    assert int(np.argmax(result.silhouette)) == at[5]
    assert (np.diff(result.inertia) < 0).all()
    assert [c.shape for c in result.centroids] == [(k, D) for k in result.n_clusters]


@pytest.mark.slow
def test_other_numbers_of_blobs_in_the_same_programs():
    for k in (3, 4):
        assert sweep(
            jax.random.key(k), grid_of_blobs(k), (2, 3, 4, 5, 6, 9), n_init=3, n_refits=4
        ).suggestion == k  # fmt: skip


@pytest.mark.parametrize("k", [2, 5, 9])
def test_fits_are_k_means(swept, k):
    """A fit with surplus centroids ends where scikit-learn's stays."""
    x, result = swept
    i = list(result.n_clusters).index(k)
    there = KMeans(k, init=result.centroids[i], n_init=1, tol=0, max_iter=1).fit(x)
    np.testing.assert_allclose(there.inertia_, result.inertia[i], rtol=2e-3)
    if k == 5:
        best = KMeans(k, n_init=10, random_state=0).fit(x)
        np.testing.assert_allclose(result.inertia[i], best.inertia_, rtol=1e-4)
        order = np.lexsort(result.centroids[i].T)
        other = np.lexsort(best.cluster_centers_.T)
        np.testing.assert_allclose(
            result.centroids[i][order], best.cluster_centers_[other], atol=1e-3
        )


def test_lloyd_with_surplus_centroids_is_scikit_learns():
    """The same start, the same labels and inertia, for a K below the width of the program."""
    x = np.random.default_rng(5).normal(size=(400, D)).astype(np.float32)
    start = x[:8]
    for k in (2, 5, 8):
        found = selection._fits(x, np.ones((1, 400), np.float32), start[None, None], k, 300, 0.0)
        expected = KMeans(k, init=start[:k], n_init=1, tol=0, max_iter=300).fit(x)
        np.testing.assert_array_equal(found.labels[0], expected.labels_)
        np.testing.assert_allclose(found.inertia[0], expected.inertia_, rtol=1e-5)
        np.testing.assert_allclose(
            found.centroids[0][:k], expected.cluster_centers_, rtol=1e-4, atol=1e-5
        )


def test_steps_are_the_sweep(swept):
    x, result = swept
    steps = Sweep(
        jax.random.key(0), selection.sample(jax.random.key(0), x, 10_000), (2, 3, 4, 5, 6, 9),
        n_init=3, n_refits=4,
    )  # fmt: skip
    one = steps.judge(4)  # Alone, and not after the others.
    i = list(result.n_clusters).index(4)
    assert one.inertia == result.inertia[i]
    assert one.silhouette == result.silhouette[i]
    assert one.stability == result.stability[i]


def test_the_same_key_gives_the_same_sweep_and_another_a_different_one(swept):
    x, result = swept
    again = sweep(jax.random.key(0), x, (2, 3, 4, 5, 6, 9), n_init=3, n_refits=4)
    np.testing.assert_array_equal(again.stability, result.stability)
    other = sweep(jax.random.key(1), x, (2, 3, 4, 5, 6, 9), n_init=3, n_refits=4)
    assert (other.stability != result.stability).any()


@pytest.mark.slow
def test_float64_far_from_the_origin(swept):
    x, result = swept
    far = x.astype(np.float64) + 1e7
    found = sweep(jax.random.key(0), far, (2, 3, 4, 5, 6, 9), n_init=3, n_refits=4)
    assert found.suggestion == 5
    np.testing.assert_allclose(found.inertia[3], result.inertia[3], rtol=1e-4)
    np.testing.assert_allclose(found.silhouette[3], result.silhouette[3], atol=1e-4)
    order, other = (np.lexsort(np.round(c[3]).T) for c in (found.centroids, result.centroids))
    np.testing.assert_allclose(
        found.centroids[3][order] - 1e7, result.centroids[3][other], atol=1e-4
    )


@pytest.mark.parametrize("scale", [2.0**400, 2.0**-400])
def test_float64_that_float32_cannot_square(scale):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) + 9 * rng.normal(size=(3, 3))[rng.integers(3, size=300)]
    one, other = (sweep(jax.random.key(0), x * s, [2, 3, 4], n_refits=2) for s in (1.0, scale))
    assert (one.suggestion, other.suggestion) == (3, 3)
    np.testing.assert_allclose(other.inertia, one.inertia * scale**2, rtol=1e-3)
    np.testing.assert_allclose(other.silhouette, one.silhouette, rtol=1e-3)
    np.testing.assert_allclose(other.centroids[1], one.centroids[1] * scale, rtol=1e-3)


def test_a_silhouette_that_is_not_known_is_not_the_highest():
    k, reason = suggest(np.array([2, 3]), np.array([np.nan, 0.5]), np.array([1.0, 1.0]))
    assert k == 3
    assert "nan" not in reason
    k, reason = suggest(np.array([2, 3, 4]), np.array([0.6, 0.5, np.nan]), np.array([0.2, 0.1, 1]))
    assert k == 2
    assert "no K is stable" in reason


def test_rows_that_do_not_differ_leave_no_choice():
    k, reason = suggest(np.array([2, 3]), np.full(2, np.nan), np.ones(2))
    assert k == 2
    assert "all rows are in one cluster whatever K is: they do not differ" in reason
    assert "nan" not in reason


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_are_not_finite_are_refused(dtype):
    x = np.ones((20, D), dtype)
    x[3, 1], x[7] = np.inf, np.nan
    with pytest.raises(ValueError, match="the sample has NaN or infinity in 2 of its 20 rows"):
        sweep(jax.random.key(0), x, (2, 3))


def test_float32_far_from_the_origin():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, 3)) + 20 * rng.normal(size=(4, 3))[rng.integers(4, size=8000)]
    near, far = (
        sweep(jax.random.key(0), rows.astype(np.float32), [2, 4], n_refits=2)
        for rows in (x, x + np.array([1e6, 0, -3e5]))
    )
    np.testing.assert_allclose(far.inertia, near.inertia, rtol=2e-3)
    np.testing.assert_allclose(far.silhouette, near.silhouette, atol=2e-3)


def test_samples():
    x = np.arange(2000.0).reshape(1000, 2)
    rows = selection.sample(jax.random.key(0), x, 100)
    assert rows.dtype == np.float64
    assert rows.shape == (100, 2)
    assert (np.diff(rows[:, 0]) > 0).all()  # Different rows in their order.
    assert 30 < (rows[:, 0] < 1000).sum() < 70
    assert selection.sample(jax.random.key(0), x.astype(np.int16), 0).dtype == np.float32
    assert len(selection.sample(jax.random.key(0), x, 5000)) == 1000


def test_bootstrap_samples():
    counts = np.asarray(selection.bootstrap_counts(jax.random.key(0), 3, 4000))
    np.testing.assert_array_equal(counts.sum(axis=1), 4000)
    # A row is left out with probability 1/e.
    np.testing.assert_allclose((counts == 0).mean(axis=1), np.exp(-1), atol=0.03)
    assert (counts[0] != counts[1]).any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n_clusters": ()}, "n_clusters is ()"),
        ({"n_clusters": (1, 2)}, "accepted: numbers from 2 to below the 20 rows"),
        ({"n_clusters": (2, 20)}, "to below the 20 rows"),
        ({"n_init": 0}, "n_init is 0"),
        ({"n_refits": 1}, "n_refits is 1; accepted: at least 2"),
    ],
)
def test_bad_arguments(arguments, sentence):
    import re

    good = {"n_clusters": (2, 3)}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sweep(jax.random.key(0), np.zeros((20, 2), np.float32), **(good | arguments))


# The suggestion


def suggested(silhouette, stability, ks=(2, 3, 4)):
    return suggest(np.asarray(ks), np.asarray(silhouette), np.asarray(stability))


def test_the_highest_silhouette_of_the_stable_ones():
    k, reason = suggested([0.5, 0.8, 0.9], [1.0, 0.95, 0.5])
    assert k == 3
    assert "(2 of 3 are)" in reason
    assert "K = 4 has 0.90, but its refits agree by 0.50 only" in reason


def test_no_k_is_stable():
    k, reason = suggested([0.5, 0.8, 0.9], [0.2, 0.6, 0.5])
    assert k == 3
    assert "no K is stable" in reason


def test_weak_clusters_and_the_edge():
    assert "hardly separated" in suggested([0.1, 0.2, 0.1], [1.0, 1.0, 1.0])[1]
    k, reason = suggested([0.3, 0.4, 0.5], [1.0, 1.0, 1.0])
    assert k == 4
    assert "edge of the sweep" in reason
    assert "edge" not in suggested([0.6, 0.4, 0.5], [1.0, 1.0, 1.0])[1]


def test_values_left_out():
    assert "left some K out" not in suggested([0.3, 0.5, 0.4], [1.0, 1.0, 1.0])[1]
    reason = suggested([0.3, 0.5, 0.4], [1.0, 1.0, 1.0], ks=(4, 5, 8))[1]
    assert "between 4 and 8 the sweep left some K out" in reason
