from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sklearn.datasets import make_blobs

from jkmeans.kmeans import INITIALIZATIONS, kmeans_parallel, kmeans_plus_plus, sample

N, D, K = 64, 3, 7


@pytest.fixture(params=INITIALIZATIONS, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def initialize(name):
    """The initialisation under test, compiled once: (key, x, weights, index) -> [K, d]."""
    program = jax.jit(
        lambda key, x, weights, index: INITIALIZATIONS[name](
            key, x, K, weights=weights, index=index, axis_name=None
        )
    )

    def call(key, x, weights=None, index=None):
        weights = np.ones(N, np.float32) if weights is None else weights
        return program(key, x, weights, np.arange(N, dtype=np.int32) if index is None else index)

    return call


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    # Half the rows do not count.
    return np.random.default_rng(1).uniform(0.5, 2, N).astype(np.float32) * (np.arange(N) % 2)


def row_numbers(centroids, x):
    """Which row of x each centroid is: exactly one."""
    same = (np.asarray(centroids)[:, None] == np.asarray(x)[None]).all(axis=2)
    np.testing.assert_array_equal(same.sum(axis=1), 1)
    return same.argmax(axis=1)


def inertia(x, centroids):
    return ((x[:, None] - np.asarray(centroids)[None]) ** 2).sum(axis=2).min(axis=1).sum()


def test_different_rows_that_count(initialize, x, weights):
    for seed in range(10):
        rows = row_numbers(initialize(jax.random.key(seed), x, weights), x)
        assert len(set(rows)) == K
        assert (weights[rows] > 0).all()


def test_rows_of_weight_zero_change_nothing(initialize, x, weights):
    key = jax.random.key(0)
    wild = np.where(weights[:, None] > 0, x, np.nan).astype(np.float32)
    np.testing.assert_array_equal(initialize(key, wild, weights), initialize(key, x, weights))


def test_the_key_decides(initialize, x, weights):
    first, again, other = (initialize(jax.random.key(seed), x, weights) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_eight_devices_choose_the_same_rows(name, initialize, on_eight_devices, x, weights):
    def sharded(x, weights, key):
        return INITIALIZATIONS[name](key, x, K, weights=weights, axis_name="data")

    program = on_eight_devices(sharded, PartitionSpec(), replicated=(2,))
    for seed in range(3):
        key = jax.random.key(seed)
        np.testing.assert_array_equal(program(x, weights, key), initialize(key, x, weights))


def test_rows_keep_their_noise_wherever_they_are(name, initialize, x, weights):
    if name == "k-means++":
        pytest.skip("k-means++ draws rows by their place")
    order = np.random.default_rng(2).permutation(N).astype(np.int32)
    key = jax.random.key(0)
    moved = initialize(key, x[order], weights[order], order)
    np.testing.assert_array_equal(moved, initialize(key, x, weights))


@pytest.mark.slow
def test_eight_devices_choose_the_same_rows_of_many_features(on_eight_devices, weights):
    """Distances as matrix products."""
    x = np.random.default_rng(5).normal(size=(N, 20)).astype(np.float32) + 50
    x[N // 2 :] = x[: N // 2]  # Every row twice: a copy of a chosen row is at 0.

    def sharded(x, weights, key):
        return kmeans_plus_plus(key, x, K, weights=weights, axis_name="data")

    program = on_eight_devices(sharded, PartitionSpec(), replicated=(2,))
    for seed in range(3):
        key = jax.random.key(seed)
        chosen = kmeans_plus_plus(key, x, K, weights=weights)
        np.testing.assert_array_equal(program(x, weights, key), chosen)
        assert len(set(row_numbers(chosen, x[: N // 2]))) == K


def test_different_rows_of_tight_heaps():
    """Differences of rows far below what is left of products by rounding."""
    rng = np.random.default_rng(0)
    heaps = np.where(rng.integers(0, 2, (60, 1)), 1.0, -1.0) + 1e-3 * rng.normal(size=(60, 16))
    x = heaps.astype(np.float32)
    x[0] = 1e7  # An outlier, and the mean is far from all.
    program = jax.jit(lambda key: kmeans_plus_plus(key, x, 20))
    for seed in range(3):
        chosen = program(jax.random.key(seed))
        assert len(set(row_numbers(chosen, x))) == 20


def test_fewer_rows_that_count_than_clusters(initialize, x):
    weights = np.zeros(N, np.float32)
    weights[[5, 40, 63]] = 1
    rows = row_numbers(initialize(jax.random.key(0), x, weights), x)
    assert set(rows) == {5, 40, 63}


def test_fewer_different_rows_than_clusters(name, initialize, x):
    repeated = x[np.arange(N) % 4]
    centroids = initialize(jax.random.key(0), repeated)
    found = set(row_numbers(centroids, x[:4]))
    assert name == "sample" or found == set(range(4))


def test_as_many_different_rows_as_clusters(name, initialize, x):
    # Most rows are the same; far from the origin, where expanded squares would be all rounding.
    repeated = 1000 + x[np.maximum(np.arange(N) - (N - K), 0)]
    centroids = initialize(jax.random.key(0), repeated)
    found = row_numbers(centroids, 1000 + x[:K])
    assert name == "sample" or len(set(found)) == K


def test_too_few_rows(name, x):
    with pytest.raises(ValueError, match=r"9 rows are wanted, but x has only 8"):
        INITIALIZATIONS[name](jax.random.key(0), x[:8], 9)


def test_one_cluster_of_bytes(name):
    x = np.random.default_rng(0).integers(0, 256, (40, 4)).astype(np.uint8)
    centroids = jax.jit(lambda key, x: INITIALIZATIONS[name](key, x, 1))(jax.random.key(0), x)
    assert centroids.dtype == jnp.float32
    row_numbers(centroids, x)


def frequencies(initialize, x, k, weights=None, n_keys=6000):
    """How often each ordered choice of rows comes up: [n] * k."""
    keys = jax.random.split(jax.random.key(0), n_keys)
    choose = jax.jit(jax.vmap(lambda key: initialize(key, x, k, weights=weights)))
    # Rows are told apart by their first feature.
    rows = np.asarray(choose(keys))[:, :, 0, None] == np.asarray(x)[:, 0]
    counts = np.zeros([len(x)] * k)
    np.add.at(counts, tuple(rows.argmax(axis=2).T), 1)
    return counts / n_keys


def check_frequencies(got, expected, n_keys=6000):
    np.testing.assert_allclose(got.sum(), 1)
    error = np.sqrt(expected * (1 - expected) / n_keys)
    assert (np.abs(got - expected) <= 4.5 * error + 1e-12).all(), (got, expected)


def test_sample_is_uniform_whatever_the_weights():
    x = np.array([[0.0], [1.0], [2.0], [5.0]], np.float32)
    got = frequencies(sample, x, 2, weights=np.array([1.0, 7.0, 0.0, 0.1], np.float32))
    expected = np.full((4, 4), 1 / 6) * (1 - np.eye(4))
    expected[2], expected[:, 2] = 0, 0
    check_frequencies(got, expected)


@pytest.mark.parametrize(
    "weights",
    [pytest.param([1.0, 1.0, 1.0, 1.0], marks=pytest.mark.slow), [1.0, 2.0, 0.0, 0.5]],
)
def test_plain_kmeans_plus_plus_draws_by_squared_distance(weights):
    x = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
    weights = np.array(weights, np.float32)
    got = frequencies(partial(kmeans_plus_plus, n_local_trials=1), x, 2, weights=weights)
    squared = weights[None] * (x - x.T) ** 2
    expected = (weights / weights.sum())[:, None] * squared / squared.sum(axis=1, keepdims=True)
    check_frequencies(got, expected)


def test_greedy_kmeans_plus_plus_keeps_the_best_trial(x):
    # With so many trials every row is drawn, and the one that lowers the potential most is kept.
    greedy = jax.jit(lambda key: kmeans_plus_plus(key, x, 4, n_local_trials=100 * N, block_size=20))
    rows = row_numbers(greedy(jax.random.key(0)), x)
    for i in range(1, 4):
        best = min(range(N), key=lambda row: inertia(x, x[[*rows[:i], row]]))
        assert rows[i] == best


_ten_times = {
    f: jax.jit(jax.vmap(lambda key, x, f=f: f(key, x, 8), in_axes=(0, None)))
    for f in INITIALIZATIONS.values()
}


@pytest.mark.slow
@pytest.mark.parametrize("initialize", [kmeans_plus_plus, kmeans_parallel])
def test_better_than_a_sample(initialize):
    x, _ = make_blobs(128, 8, centers=8, cluster_std=1.0, random_state=0)
    x = x.astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 10)
    good, plain = (
        np.mean([inertia(x, centroids) for centroids in _ten_times[f](keys, x)])
        for f in (initialize, sample)
    )
    assert good < 0.3 * plain


@pytest.mark.parametrize("initialize", [kmeans_plus_plus, kmeans_parallel])
def test_finds_every_far_blob(initialize):
    rng = np.random.default_rng(0)
    blob = np.arange(128) % 8
    x = (1000 * np.eye(8)[blob] + rng.normal(size=(128, 8))).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 10)
    for centroids in _ten_times[initialize](keys, x):
        assert len(set(blob[row_numbers(centroids, x)])) == 8


def test_candidates_of_kmeans_parallel_are_weighted_by_their_rows():
    # Every row is a candidate: weighted k-means++ draws by w(x) D(x)², as k-means++ itself does,
    # and the heavy row must be the first centroid nearly always.
    x = np.arange(8, dtype=np.float32)[:, None]
    weights = np.ones(8, np.float32)
    weights[5] = 10_000
    keys = jax.random.split(jax.random.key(0), 200)
    choose = jax.vmap(lambda key: kmeans_parallel(key, x, 2, weights=weights, n_rounds=3))
    assert (np.asarray(jax.jit(choose)(keys))[:, 0, 0] == 5).mean() > 0.98


def test_too_few_candidates(x):
    with pytest.raises(ValueError, match="give 8 candidates for 20 clusters"):
        kmeans_parallel(jax.random.key(0), x, 20, oversampling_factor=0.07, n_rounds=7)
