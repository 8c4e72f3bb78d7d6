import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkmeans.kmeans import bounds, statistics
from jkmeans.kmeans.assignment import middle_centroid

N, D, K = 300, 4, 12


@pytest.fixture(autouse=True, scope="module")
def small():
    """Several groups and several blocks on small data; no dense passes after the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "GROUP_SIZE", 2)
        patch.setattr(bounds, "_BLOCK_ENTRIES", 400)
        patch.setattr(bounds, "_WORTH_ALL", 0.99)
        yield


@jax.jit
def _reassign(x, centroids, previous, middle, known):
    return bounds.reassign(x, centroids, previous, middle, known)


def brute_force(x, centroids):
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return ((x[:, None] - centroids[None]) ** 2).sum(axis=2)


def check(x, centroids, known):
    """Labels are nearest, and no bound claims more than is true."""
    squared = brute_force(x, centroids)
    labels = np.asarray(known.bounds.labels)
    rows = np.arange(len(x))
    scale = 1e-6 * (1 + squared.max())
    assert (squared[rows, labels] <= squared.min(axis=1) + scale).all()
    distances = np.sqrt(squared)
    assert (known.bounds.upper >= distances[rows, labels] * (1 - 1e-6)).all()
    others = distances.copy()
    others[rows, labels] = np.inf
    for group, members in enumerate(np.asarray(known.order)):
        members = members[members < len(centroids)]
        if not len(members):
            continue
        nearest = others[:, members].min(axis=1)
        assert (np.asarray(known.bounds.lower)[group] <= nearest * (1 + 1e-6)).all()


@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.0, 1e3]))
@settings(max_examples=25, deadline=None)
def test_bounds_hold_whatever_way_the_centroids_go(seed, step, offset):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(N, D)) + offset).astype(np.float32)
    centroids = jnp.asarray(x[rng.permutation(N)[:K]])
    middle = middle_centroid(centroids)
    known = bounds.nothing_known(jnp.asarray(x), centroids)
    previous = centroids
    for _ in range(4):
        known = _reassign(x, centroids, previous, middle, known)
        check(x, centroids, known)
        moves = step * rng.normal(size=(K, D)) * (rng.uniform(size=(K, 1)) < 0.5)
        previous, centroids = centroids, jnp.asarray(centroids + moves.astype(np.float32))


def test_ties_go_to_the_lowest_index_as_without_bounds():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (N, D)).astype(np.float32)
    centroids = rng.integers(-3, 4, (K, D)).astype(np.float32)
    centroids[5] = centroids[2]
    middle = middle_centroid(jnp.asarray(centroids))
    known = bounds.nothing_known(jnp.asarray(x), jnp.asarray(centroids))
    previous = centroids
    for _ in range(6):
        known = _reassign(x, jnp.asarray(centroids), jnp.asarray(previous), middle, known)
        # Integers: every arithmetic is exact.
        np.testing.assert_array_equal(known.bounds.labels, brute_force(x, centroids).argmin(axis=1))
        previous, centroids = centroids, centroids.copy()
        moved = rng.integers(K)
        centroids[moved] = centroids[rng.integers(K)]


@pytest.mark.parametrize(
    "k", [1, 2, 13, *(pytest.param(k, marks=pytest.mark.slow) for k in (3, 12, 40))]
)
def test_groups_hold_every_centroid_once(k):
    centroids = np.random.default_rng(0).normal(size=(k, 3)).astype(np.float32)
    order = np.asarray(bounds.group_centroids(jnp.asarray(centroids)))
    assert sorted(order[order < k]) == list(range(k))
    assert (np.sort(order, axis=1) == order).all()


def test_groups_are_near():
    """Two far heaps never share a group."""
    centroids = np.zeros((16, 2), np.float32)
    centroids[::2, 0] = 100
    order = np.asarray(bounds.group_centroids(jnp.asarray(centroids)))
    assert all(len({number % 2 for number in group}) == 1 for group in order)


_select = jax.jit(bounds.select)


@given(st.lists(st.booleans(), min_size=43, max_size=43), st.integers(0, 43))
@settings(max_examples=30, deadline=None)
def test_select(wanted, count):
    rows = np.random.default_rng(0).permutation(43).astype(np.int32)
    chosen = _select(jnp.asarray(wanted), bounds.Rows(rows, jnp.int32(count)))
    expected = [row for row in rows[:count] if wanted[row]]
    assert np.asarray(chosen.rows)[: int(chosen.count)].tolist() == expected
    chosen = _select(jnp.asarray(wanted))
    expected = np.flatnonzero(wanted).tolist()
    assert np.asarray(chosen.rows)[: int(chosen.count)].tolist() == expected


@pytest.mark.parametrize("n_wanted", [0, 1, 20, 43])
def test_select_elsewhere_than_on_a_cpu(n_wanted):
    wanted = jnp.arange(43) < n_wanted
    every = bounds.Rows(jnp.arange(43, dtype=jnp.int32), jnp.int32(43))
    chosen = bounds._select_at_once(every, wanted)
    assert np.asarray(chosen.rows)[: int(chosen.count)].tolist() == list(range(n_wanted))


@pytest.mark.parametrize("n", [1, 5, 4096, 4097, 100_000])
def test_sums_are_exact(n):
    values = np.random.default_rng(n).uniform(size=n).astype(np.float32)
    values[0] = 1e6
    got = float(jax.jit(statistics.exact_sum)(values))
    assert got == np.float32(values.astype(np.float64).sum())
