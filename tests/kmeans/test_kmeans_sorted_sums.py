import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jkmeans.kmeans import cluster_statistics, statistics
from jkmeans.kmeans.sorted_sums import _plan, sorted_sums

sums_of = jax.jit(sorted_sums, static_argnums=(2, 5))


def expected(x, labels, k, weights=None, shift=0):
    kept = (labels >= 0) & (labels < k)
    weights = np.ones(len(x)) if weights is None else weights.astype(np.float64)
    kept &= weights > 0
    rows = (np.asarray(x, np.float64) - shift)[kept] * weights[kept, None]
    sums, counts = np.zeros((k, x.shape[1])), np.zeros(k)
    np.add.at(sums, labels[kept], rows)
    np.add.at(counts, labels[kept], weights[kept])
    return sums, counts


def labels_of(kind, n, k, rng):
    """Labels from -1 to k: even, all in the last cluster, or ever fewer in each."""
    if kind == "one":
        return np.full(n, k - 1, np.int32)
    if kind == "even":
        return rng.integers(-1, k + 1, n).astype(np.int32)
    return np.minimum(rng.exponential(k / 8, n), k).astype(np.int32) - (rng.random(n) < 0.01)


@pytest.mark.parametrize("kind", ["even", "one", "skewed"])
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 1), (5, 3, 9), (3000, 4, 300), (30000, 2, 1), (2000, 1, 66000)]
)
def test_agrees_with_numpy(n, d, k, kind):
    rng = np.random.default_rng(n)
    labels = labels_of(kind, n, k, rng).astype(np.int32)
    x = rng.normal(size=(n, d)).astype(np.float32)
    weights = (rng.uniform(size=n) * rng.integers(0, 2, n)).astype(np.float32)
    x_nan = np.where(weights[:, None] > 0, x, np.nan)
    shift = rng.normal(size=d).astype(np.float32)
    sums, counts = sums_of(x, labels, k, None, None, jnp.float32)
    right = expected(x, labels, k)
    np.testing.assert_allclose(sums, right[0], rtol=1e-5, atol=1e-6 * max(n, 10) ** 0.5)
    np.testing.assert_array_equal(counts, right[1])
    sums, counts = sums_of(x_nan, labels, k, weights, shift, jnp.float32)
    right = expected(x, labels, k, weights, shift)
    np.testing.assert_allclose(sums, right[0], rtol=1e-5, atol=1e-6 * max(n, 10) ** 0.5)
    np.testing.assert_allclose(counts, right[1], rtol=1e-6)


@pytest.mark.parametrize("place", [-1, 2])
def test_a_row_that_is_left_out_may_hold_nan(place):
    x = np.array([[1.0], [np.nan], [4.0]], np.float32)
    sums, counts = sums_of(x, np.array([1, place, 1]), 2, None, None, jnp.float32)
    np.testing.assert_array_equal(sums, [[0.0], [5.0]])
    np.testing.assert_array_equal(counts, [0.0, 2.0])


def test_no_rows_and_no_features():
    sums, counts = sums_of(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32), 4, None, None, jnp.float32)
    np.testing.assert_array_equal(sums, np.zeros((4, 3)))
    np.testing.assert_array_equal(counts, np.zeros(4))
    labels = jnp.array([2, 2, 0])
    sums, counts = sums_of(jnp.zeros((3, 0)), labels, 4, None, None, jnp.float32)
    assert sums.shape == (4, 0)
    np.testing.assert_array_equal(counts, [1, 0, 2, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_narrow_rows_are_summed_in_float32(dtype):
    x = np.full((3000, 2), 255)
    sums, _ = sums_of(jnp.asarray(x, dtype), jnp.zeros(3000, jnp.uint8), 1, None, None, jnp.float32)
    assert sums.dtype == jnp.float32
    expected = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64).sum(0)
    np.testing.assert_array_equal(sums[0], expected)


def test_two_runs_have_equal_bits():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 4)).astype(np.float32)
    labels = labels_of("skewed", 3000, 300, rng).astype(np.int32)
    first = sums_of(x, labels, 300, None, None, jnp.float32)
    for a, b in zip(first, sums_of(x, labels, 300, None, None, jnp.float32), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_under_vmap():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 500, 2)).astype(np.float32)
    labels = rng.integers(-1, 6, (3, 500)).astype(np.int32)

    def f(x, labels):
        return sorted_sums(x, labels, 5, None, None, jnp.float32)

    # One set of rows for all labels, and one for each.
    for axis, rows in ((None, x[0]), (0, x)):
        sums, counts = jax.jit(jax.vmap(f, (axis, 0)))(rows, labels)
        for i in range(3):
            right = expected(x[0] if axis is None else x[i], labels[i], 5)
            np.testing.assert_allclose(sums[i], right[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(counts[i], right[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_on_eight_devices(on_eight_devices, monkeypatch, weighted):
    monkeypatch.setattr(statistics, "_scattered", statistics._sorted)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3)).astype(np.float32)
    labels = labels_of("skewed", 4000, 7, rng).astype(np.int32)
    weights = (rng.uniform(size=4000) * rng.integers(0, 2, 4000)).astype(np.float32)

    def f(x, labels, *weights):
        return cluster_statistics(
            x, labels, 7, weights=weights[0] if weights else None, axis_name="data"
        )

    given = (x, labels, weights) if weighted else (x, labels)
    got = on_eight_devices(f, PartitionSpec())(*given)
    right = expected(x, labels, 7, weights if weighted else None)
    np.testing.assert_allclose(got.sums, right[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.counts, right[1], rtol=1e-5)


@pytest.mark.parametrize(("d", "k"), [(1, 1), (64, 1000), (64, 10**6)])
def test_the_levels_suffice_for_any_skew(d, k):
    # One cluster has all rows from some row on, which decides where its blocks are cut.
    for n in (1, 64, 65, 4097, 10**7, 2**31 - 1):
        sizes, most = _plan(n, d, k)
        assert most <= 64
        for begin in {0, min(sizes[0] - 1, n - 1), min(63 * sizes[0], n - 1)}:
            first, last = begin, n - 1
            for size in sizes:
                first, last = first // size, last // size
            assert last - first < most


def test_many_clusters_of_many_features(monkeypatch):
    # Levels of small blocks, which sums of few numbers don't have.
    monkeypatch.setattr("jkmeans.kmeans.sorted_sums._MANY_NUMBERS", 0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9001, 3)).astype(np.float32)
    assert len(_plan(9001, 3, 40)[0]) == 3

    @jax.jit
    def few_rows(x, labels):
        return sorted_sums(x, labels, 40, None, None, jnp.float32)

    for kind in ("even", "one", "skewed"):
        labels = labels_of(kind, 9001, 40, rng).astype(np.int32)
        sums, counts = few_rows(x, labels)
        right = expected(x, labels, 40)
        np.testing.assert_allclose(sums, right[0], rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(counts, right[1])
