import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jkmeans.kmeans import ClusterStatistics, add, centroids_from, cluster_statistics, statistics

# Two full blocks of rows and a shorter one.
N, D, K = 2500, 3, 4


@pytest.fixture(params=["scatter", "one-pass", "one-hot", "sorted"])
def path(request, monkeypatch):
    """Every way of summing, whichever the platform and the shapes would choose."""
    if request.param == "one-hot":
        monkeypatch.setattr(statistics, "_scattered", statistics._one_hot)
        monkeypatch.setattr(statistics, "_ONE_HOT_ENTRIES", 1000 * K)
    if request.param == "sorted":
        monkeypatch.setattr(statistics, "_scattered", statistics._sorted)
    if request.param == "one-pass":
        for name, value in {"_MANY_ROWS": 2, "_LANES": 2, "_STEPS": 1}.items():
            monkeypatch.setattr(statistics, name, value)
    return request.param


def expected_statistics(x, labels, weights, distances):
    sums, counts = np.zeros((K, x.shape[1])), np.zeros(K)
    np.add.at(sums, labels, np.asarray(x, np.float64) * weights[:, None])
    np.add.at(counts, labels, weights.astype(np.float64))
    return sums, counts, (weights.astype(np.float64) * distances).sum()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(N, D)).astype(np.float32),
        rng.integers(0, K, N).astype(np.int32),
        rng.uniform(size=N).astype(np.float32) * rng.integers(0, 2, N).astype(np.float32),
        rng.uniform(size=N).astype(np.float32),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_numpy(path, data, weighted):
    x, labels, weights, distances = data
    got = cluster_statistics(
        x, jnp.asarray(labels), K, weights=weights if weighted else None, distances=distances
    )
    ones = np.ones(N, np.float32)
    sums, counts, inertia = expected_statistics(x, labels, weights if weighted else ones, distances)
    np.testing.assert_allclose(got.sums, sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.counts, counts, rtol=1e-5)
    np.testing.assert_allclose(got.inertia, inertia, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_far_from_the_origin_around_a_shift(path, data, weighted):
    x, labels, weights, _ = data
    x = x + np.float32(1e5)
    shift = x[7]
    given = weights if weighted else None
    got = cluster_statistics(x, jnp.asarray(labels), K, weights=given, shift=shift)
    ones = weights if weighted else np.ones(N, np.float32)
    sums, counts, _ = expected_statistics(x.astype(np.float64) - shift, labels, ones, ones)
    np.testing.assert_allclose(got.sums, sums, rtol=1e-4, atol=1e-3)
    # To the last bit of what float32 holds there.
    means = centroids_from(got, jnp.zeros((K, D)), shift)
    np.testing.assert_allclose(means, shift + sums / counts[:, None], atol=0.004)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_derivatives_of_the_sums(path, data, weighted):
    # d/dx Σ_k ‖s_k‖² = 2 w_i s_label(i), and forward along x itself: 2 Σ_k ‖s_k‖².
    x, labels, weights, _ = data
    labels = labels.copy()
    labels[:7] = -1

    def squared_sums(x):
        sums = cluster_statistics(
            x, jnp.asarray(labels), K, weights=weights if weighted else None
        ).sums
        return jnp.sum(sums**2)

    ones = weights if weighted else np.ones(N, np.float32)
    kept = labels >= 0
    sums, _, _ = expected_statistics(x[kept], labels[kept], ones[kept], 0 * ones[kept])
    expected = np.where(kept[:, None], 2 * ones[:, None] * sums[labels], 0)
    np.testing.assert_allclose(jax.grad(squared_sums)(x), expected, rtol=1e-4, atol=1e-3)
    _, along = jax.jvp(squared_sums, (jnp.asarray(x),), (jnp.asarray(x),))
    np.testing.assert_allclose(along, 2 * np.sum(sums**2), rtol=1e-4)


def test_rows_of_weight_zero_never_count_even_nan(path):
    x = np.array([[1.0], [np.nan], [3.0]], np.float32)
    got = cluster_statistics(
        x,
        jnp.array([0, 0, 1]),
        2,
        weights=jnp.array([2.0, 0.0, 1.0]),
        distances=jnp.array([1.0, np.nan, 4.0]),
    )
    np.testing.assert_array_equal(got.sums, [[2.0], [3.0]])
    np.testing.assert_array_equal(got.counts, [2.0, 1.0])
    assert got.inertia == 6.0


def test_labels_out_of_range_are_left_out(path):
    x = np.array([[1.0], [2.0], [4.0]], np.float32)
    got = cluster_statistics(x, jnp.array([-1, 0, 2]), 2)
    np.testing.assert_array_equal(got.sums, [[2.0], [0.0]])
    np.testing.assert_array_equal(got.counts, [1.0, 0.0])


def test_bytes_are_summed_in_float32(path):
    x = np.full((2000, 1), 255, np.uint8)
    got = cluster_statistics(jnp.asarray(x), jnp.zeros(2000, jnp.int32), 1)
    assert got.sums.dtype == jnp.float32
    assert got.sums[0, 0] == 510_000


def test_statistics_of_two_sets_add_up(data):
    x, labels, weights, distances = data

    @jax.jit
    def in_two_sets(*arrays):
        first, second = zip(*((array[:700], array[700:]) for array in arrays), strict=True)
        return add(
            *(
                cluster_statistics(x, labels, K, weights=weights, distances=distances)
                for x, labels, weights, distances in (first, second)
            )
        )

    both = in_two_sets(x, labels, weights, distances)
    for got, expected in zip(both, expected_statistics(*data), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_counts_beyond_two_to_the_24th(monkeypatch):
    # Adding ones to a float32 stops at 16,777,216: parts of the rows are counted apart.
    monkeypatch.setattr(statistics, "_SCATTER_ROWS", 64)
    monkeypatch.setattr(statistics, "_PART_ROWS", 64)
    weights = np.ones(64 * 11, np.float32)
    weights[:64] = 2**18
    got = cluster_statistics(
        jnp.zeros((len(weights), 1)), jnp.zeros(len(weights), jnp.int32), 1, weights=weights
    )
    assert got.counts[0] == 2**24 + 640


def test_one_all_reduce_of_all_numbers(on_eight_devices, data):
    x, labels, weights, distances = (array[:2496] for array in data)

    def f(x, labels, weights, distances):
        return cluster_statistics(
            x, labels, K, weights=weights, distances=distances, axis_name="data"
        )

    program = on_eight_devices(f, PartitionSpec())
    compiled = program.lower(x, labels, weights, distances).compile()
    reduced = re.findall(r"= (\S+?)(?:\{0\})? all-reduce(?:-start)?\(", compiled.as_text())
    assert reduced == [f"f32[{K * (D + 1) + 1}]"]
    for got, expected in zip(
        compiled(x, labels, weights, distances),
        expected_statistics(x, labels, weights, distances),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_centroids_are_means_and_empty_clusters_stay():
    found = ClusterStatistics(
        sums=jnp.array([[2.0, 4.0], [0.0, 0.0], [1.0, 1.0]]),
        counts=jnp.array([4.0, 0.0, 0.5]),
        inertia=jnp.array(0.0),
    )
    previous = jnp.array([[9.0, 9.0], [7.0, -7.0], [9.0, 9.0]])
    expected = [[0.5, 1.0], [7.0, -7.0], [2.0, 2.0]]
    np.testing.assert_array_equal(centroids_from(found, previous), expected)


def test_gradient_of_a_mean_with_an_empty_cluster_is_finite():
    def norm(x):
        found = cluster_statistics(x, jnp.array([0, 0, 2]), 3)
        return jnp.sum(centroids_from(found, jnp.ones((3, 2))))

    got = jax.grad(norm)(jnp.ones((3, 2)))
    np.testing.assert_allclose(got, [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]])
