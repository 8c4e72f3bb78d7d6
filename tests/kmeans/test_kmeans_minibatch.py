import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster
from jax.sharding import PartitionSpec

from jkmeans.kmeans.minibatch import (
    MiniBatchResult,
    MiniBatchState,
    _drawer,
    initial_state,
    minibatch,
    minibatch_step,
)

KEY = jax.random.key(0)
SAME = PartitionSpec()
STATE_SPECS = MiniBatchState(SAME, SAME, SAME)
RESULT_SPECS = MiniBatchResult(STATE_SPECS, SAME, SAME)

step = jax.jit(minibatch_step)


def test_a_centroid_is_the_mean_of_all_it_was_given():
    # By hand: rows 0 and 2 go to the first centroid, then 4 (weight 2): (0 + 2 + 2·4) / 4.
    state = initial_state(jnp.array([[1.0], [10.0]]))
    state, inertia = step(KEY, state, jnp.array([[0.0], [2.0], [11.0]]), reassignment_ratio=0.0)
    np.testing.assert_allclose(state.centroids, [[1], [11]])
    np.testing.assert_allclose(state.counts, [2, 1])
    assert inertia == 3
    weights = jnp.array([2.0, 1.0, 0.0])
    x = jnp.array([[4.0], [13.0], [999.0]])
    state, inertia = step(KEY, state, x, weights=weights, reassignment_ratio=0.0)
    np.testing.assert_allclose(state.centroids, [[2.5], [12]])
    np.testing.assert_allclose(state.counts, [4, 2])
    assert inertia == 2 * 9 + 4


def test_steps_agree_with_scikit_learn(blobs):
    theirs = sklearn.cluster.MiniBatchKMeans(6, init=blobs[:6], n_init=1, reassignment_ratio=0)
    state = initial_state(jnp.asarray(blobs[:6]))
    rng = np.random.default_rng(0)
    for _ in range(5):
        batch = blobs[rng.choice(len(blobs), 64)]
        weights = rng.uniform(0, 2, 64).astype(np.float32)
        theirs.partial_fit(batch, sample_weight=weights)
        state, _ = step(KEY, state, batch, weights=weights, reassignment_ratio=0.0)
    np.testing.assert_allclose(state.centroids, theirs.cluster_centers_, rtol=1e-4)
    np.testing.assert_allclose(state.counts, theirs._counts, rtol=1e-5)


def test_centroids_of_low_count_move_to_rows_of_the_batch():
    x = jnp.arange(12.0).reshape(12, 1)
    start = initial_state(jnp.array([[5.0], [900.0], [-900.0]]))
    state, _ = step(KEY, start, x, weights=jnp.ones(12).at[6:].set(0))
    moved = np.asarray(state.centroids)[1:, 0]
    assert set(moved) <= set(range(6))
    assert moved[0] != moved[1]
    np.testing.assert_allclose(state.centroids[0], 2.5)
    # They take the lowest count of those that stay, so as not to be moved again at once.
    np.testing.assert_allclose(state.counts, [6, 6, 6])
    assert state.since_reassignment == 0
    # At most half a batch moves: of two rows, one.
    state, _ = step(KEY, start, x[:2])
    assert np.sum(np.abs(np.asarray(state.centroids)) == 900) == 1


def test_no_centroid_moves_before_it_is_due():
    counts = jnp.array([1000.0, 1.0])
    x = jnp.zeros((4, 1))
    start = MiniBatchState(jnp.array([[0.0], [9.0]]), counts, jnp.int32(0))
    state, _ = step(KEY, start, x, reassignment_ratio=0.5)
    np.testing.assert_allclose(state.centroids, start.centroids)
    assert state.since_reassignment == 4
    state, _ = step(KEY, start._replace(since_reassignment=16), x, reassignment_ratio=0.5)
    np.testing.assert_allclose(state.centroids, [[0], [0]])
    assert state.since_reassignment == 0


def test_reaches_nearly_the_inertia_of_lloyd(blobs):
    full = sklearn.cluster.KMeans(6, n_init=10, random_state=0).fit(blobs)
    result = jax.jit(lambda key: minibatch(key, blobs, 6, batch_size=64, n_init=3))(KEY)
    squared = ((blobs[:, None] - np.asarray(result.state.centroids)[None]) ** 2).sum(axis=2)
    assert squared.min(axis=1).sum() < 1.1 * full.inertia_
    assert 10 < result.n_steps < 1000  # stopped because nothing improved
    np.testing.assert_allclose(result.ewa_inertia * len(blobs), full.inertia_, rtol=0.3)


@pytest.mark.parametrize(
    ("options", "n_steps"),
    [
        ({"max_no_improvement": None}, 40),
        ({"max_no_improvement": 0}, 2),
        pytest.param({"max_no_improvement": None, "tol": 1e6}, 2, marks=pytest.mark.slow),
    ],
)
def test_when_it_stops(blobs, options, n_steps):
    # The first step is never the last: its inertia is that of the initialisation.
    result = minibatch(KEY, blobs, 6, init=blobs[:6], batch_size=16, n_steps=40, **options)
    assert result.n_steps == n_steps


def test_rows_are_drawn_by_weight():
    weights = np.zeros(50, np.float32)
    weights[[3, 20, 49]] = 1, 2, 5
    rows = _drawer(jnp.asarray(weights), 50, None)(KEY, 8000)
    counts = np.bincount(rows, minlength=50)
    assert counts[weights == 0].sum() == 0
    np.testing.assert_allclose(counts[[3, 20, 49]] / 8000, [1 / 8, 2 / 8, 5 / 8], atol=0.02)
    rows = np.asarray(_drawer(None, 7, None)(KEY, 7000))
    np.testing.assert_allclose(np.bincount(rows) / 7000, np.full(7, 1 / 7), atol=0.02)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_eight_devices_draw_the_same_batches(on_eight_devices, blobs, weighted):
    # 320 rows, 3 of them padding; a batch of 60 is not divided by eight devices either.
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.5, 2, 320).astype(np.float32)
    x = blobs.copy()
    x[317:], weights[317:] = 1e6, 0

    def f(x, weights, axis_name=None):
        return minibatch(
            KEY,
            x,
            6,
            batch_size=60,
            n_steps=12,
            init_size=100,
            weights=weights if weighted else None,
            n_rows=317,
            axis_name=axis_name,
        )

    program = on_eight_devices(lambda x, weights: f(x, weights, "data"), RESULT_SPECS)
    eight, one = program(x, weights), jax.jit(f)(x[:317], weights[:317])
    np.testing.assert_allclose(eight.state.centroids, one.state.centroids, rtol=1e-4)
    np.testing.assert_allclose(eight.state.counts, one.state.counts, rtol=1e-5)
    assert eight.n_steps == one.n_steps


def test_unknown_initialisation(blobs):
    with pytest.raises(ValueError, match="init='best': expected an array or one of"):
        minibatch(KEY, blobs, 6, init="best")
