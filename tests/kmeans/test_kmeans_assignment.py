import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jkmeans.kmeans import assign, certified_nearest, lloyd, nearest, squared_distances


def brute_force(x, centroids):
    """All squared distances in float64: [n, k]."""
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return ((x[:, None, :] - centroids[None, :, :]) ** 2).sum(axis=2)


@pytest.mark.parametrize(
    ("n", "d", "k", "block_size"),
    [
        (1, 1, 1, 256),
        (7, 3, 2, 4),
        (600, 5, 7, 256),
        (16, 4, 16, 5),
        pytest.param(257, 1, 3, 256, marks=pytest.mark.slow),
        pytest.param(512, 2, 4, 256, marks=pytest.mark.slow),
        pytest.param(23, 2, 10, 1, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_brute_force(n, d, k, block_size):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)).astype(np.float32)
    centroids = x[rng.permutation(n)[:k]]
    labels, distances = assign(x, centroids, block_size=block_size)
    expected = brute_force(x, centroids)
    assert labels.shape == (n,)
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, expected.argmin(axis=1))
    np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-5, atol=1e-12)


_assign_lattice = jax.jit(lambda x, centroids: assign(x, centroids, block_size=4))


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.int32, (13, 2), elements=st.integers(-3, 3)),
    hnp.arrays(np.int32, (5, 2), elements=st.integers(-3, 3)),
)
def test_ties_go_to_the_lowest_index(x, centroids):
    # On a lattice all arithmetic is exact and ties, also between different centroids, abound.
    labels, distances = _assign_lattice(x, centroids)
    expected = brute_force(x, centroids)
    np.testing.assert_array_equal(labels, expected.argmin(axis=1))
    np.testing.assert_array_equal(distances, expected.min(axis=1))


def test_nan_rows_get_a_valid_label_and_spoil_no_other():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    x[4] = np.nan
    x[17, 1] = np.nan
    centroids = x[:3]
    labels, distances = assign(x, centroids, block_size=8)
    good = ~np.isnan(x).any(axis=1)
    expected = brute_force(x[good], centroids)
    np.testing.assert_array_equal(np.asarray(labels)[good], expected.argmin(axis=1))
    assert ((labels >= 0) & (labels < 3)).all()
    np.testing.assert_array_equal(np.isnan(distances), ~good)


def test_accurate_far_from_the_origin():
    # The products x·c are near 3e10 here, their float32 spacing is 2048; the distances are near 1.
    rng = np.random.default_rng(0)
    x = (1e5 + rng.normal(size=(300, 3))).astype(np.float32)
    labels, distances = assign(x, x[:10])
    expected = brute_force(x, x[:10])
    np.testing.assert_array_equal(labels, expected.argmin(axis=1))
    np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, jnp.bfloat16, np.float16])
def test_low_precision_and_integer_rows_are_computed_in_float32(dtype):
    x = np.random.default_rng(1).integers(0, 120, size=(30, 4)).astype(dtype)
    labels, distances = assign(jnp.asarray(x), jnp.asarray(x[:5]), block_size=16)
    expected = brute_force(x, x[:5])
    assert distances.dtype == jnp.float32
    np.testing.assert_array_equal(labels, expected.argmin(axis=1))
    np.testing.assert_array_equal(distances, expected.min(axis=1))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(2).normal(size=(30, 4))
        _, distances = assign(jnp.asarray(x), jnp.asarray(x[:5]))
        assert distances.dtype == jnp.float64
        np.testing.assert_allclose(distances, brute_force(x, x[:5]).min(axis=1), rtol=1e-13)


def test_the_score_matrix_is_never_in_memory():
    n, k = 8192, 512
    x, centroids = jnp.zeros((n, 2)), jnp.zeros((k, 2))
    memory = jax.jit(assign).lower(x, centroids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * k * 4 / 4


def test_gradients_of_the_weighted_inertia():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 3)).astype(np.float32)
    centroids = rng.normal(size=(4, 3)).astype(np.float32)
    weights = rng.uniform(size=20).astype(np.float32)

    def inertia(x, centroids):
        return jnp.sum(weights * assign(x, centroids, block_size=8).distances)

    by_x, by_centroids = jax.grad(inertia, argnums=(0, 1))(x, centroids)
    labels = brute_force(x, centroids).argmin(axis=1)
    residuals = 2 * weights[:, None] * (x - centroids[labels])
    expected = np.zeros_like(centroids)
    np.add.at(expected, labels, -residuals)
    np.testing.assert_allclose(by_x, residuals, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_centroids, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
@pytest.mark.parametrize(
    ("rows", "centroids"),
    [((2, 3), (2, 2)), ((2, 3), (0, 3)), ((3,), (2, 3)), ((2, 3), (3,)), ((600, 90), (64, 91))],
)
def test_other_shapes_are_named(jit, rows, centroids):
    message = re.escape(f"x has shape {rows} and centroids have {centroids}: expected [n, d] and")
    labels = np.zeros(rows[:1], np.int32)
    for function in (
        nearest,
        partial(nearest, precision="exact"),
        certified_nearest,
        assign,
        lambda x, c: squared_distances(x, c, labels),
        lloyd,
    ):
        with pytest.raises(ValueError, match=message):
            jit(function)(jnp.zeros(rows), jnp.zeros(centroids))


def test_vmap_over_sets_of_centroids():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(20, 3)).astype(np.float32)
    centroids = rng.normal(size=(6, 4, 3)).astype(np.float32)
    labels, distances = jax.vmap(lambda c: assign(x, c, block_size=8))(centroids)
    for i in range(6):
        expected = brute_force(x, centroids[i])
        np.testing.assert_array_equal(labels[i], expected.argmin(axis=1))
        np.testing.assert_allclose(distances[i], expected.min(axis=1), rtol=1e-5)
