"""Derivatives of a fit against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jkmeans.kmeans import fit, lloyd

K = 3


@pytest.fixture(scope="module")
def problem():
    """Clusters far enough apart for no label to change: x [40, 2], weights [40], start [3, 2]."""
    rng = np.random.default_rng(0)
    centers = np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    x = centers[rng.integers(0, K, 40)] + rng.normal(size=(40, 2))
    return x, rng.uniform(0.5, 2, 40), centers


def loss(x, weights, start, algorithm="lloyd"):
    """A number that depends on every differentiable field of the result."""
    result = lloyd(x, start, weights=weights, algorithm=algorithm)
    far = jnp.sum(jnp.sin(jnp.arange(6.0).reshape(K, 2) * result.centroids))
    return far + 0.1 * result.inertia + jnp.sum(jnp.cos(result.distances)) + result.counts[0] ** 2


@pytest.mark.parametrize(
    ("mode", "algorithm"),
    [
        ("forward", "lloyd"),
        ("backward", "bounds"),
        pytest.param("forward", "bounds", marks=pytest.mark.slow),
        pytest.param("backward", "lloyd", marks=pytest.mark.slow),
    ],
)
def test_agrees_with_finite_differences(problem, mode, algorithm):
    with jax.enable_x64(True):
        x, weights, start = (jnp.asarray(array, jnp.float64) for array in problem)
        f = jax.jit(lambda x, weights: loss(x, weights, start, algorithm))
        derivative = jax.jacfwd if mode == "forward" else jax.grad
        for_x, for_weights = derivative(f, argnums=(0, 1))(x, weights)
        step = 1e-5
        for i, j in ((0, 0), (7, 1), (39, 0)):
            move = np.zeros(x.shape)
            move[i, j] = step
            expected = (f(x + move, weights) - f(x - move, weights)) / (2 * step)
            np.testing.assert_allclose(for_x[i, j], expected, rtol=1e-6, atol=1e-8)
        for i in (0, 7, 39):
            move = np.zeros(len(x))
            move[i] = step
            expected = (f(x, weights + move) - f(x, weights - move)) / (2 * step)
            np.testing.assert_allclose(for_weights[i], expected, rtol=1e-6, atol=1e-8)


def test_a_fit_from_a_key_is_differentiable(problem):
    x = jnp.asarray(problem[0], jnp.float32)

    def inertia(x):
        return fit(jax.random.key(0), x, K).inertia

    result = fit(jax.random.key(0), x, K)
    # The gradient of the inertia, in which the centroids are at their optimum.
    expected = 2 * (x - result.centroids[result.labels])
    np.testing.assert_allclose(jax.jit(jax.grad(inertia))(x), expected, rtol=1e-4, atol=1e-4)


def test_bytes_have_no_derivative_but_their_weights_do(problem):
    x = np.random.default_rng(0).integers(0, 255, (40, 2)).astype(np.uint8)
    start = x[:K].astype(np.float32)
    gradient = jax.grad(lambda w: lloyd(x, start, weights=w).inertia)(jnp.ones(40))
    result = lloyd(x, start, weights=jnp.ones(40))
    np.testing.assert_allclose(gradient, result.distances, rtol=1e-5)


def test_eight_devices_have_the_same_gradient(problem, on_eight_devices):
    x, weights, start = (np.asarray(array, np.float32) for array in problem)

    def local(x, weights, start):
        def f(x):
            result = lloyd(x, start, weights=weights, axis_name="data")
            return jnp.sum(jnp.sin(result.centroids)) + 0.1 * result.inertia

        return jax.grad(f)(x)

    sharded = on_eight_devices(local, PartitionSpec("data"), replicated=(2,))(x, weights, start)

    def f(x):
        result = lloyd(x, start, weights=weights)
        return jnp.sum(jnp.sin(result.centroids)) + 0.1 * result.inertia

    np.testing.assert_allclose(sharded, jax.grad(f)(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_batches_of_problems_have_gradients(problem):
    x = jnp.asarray(problem[0], jnp.float32)
    start = jnp.asarray(problem[2], jnp.float32)
    several = jnp.stack([x, 2 * x])
    starts = jnp.stack([start, 2 * start])
    gradient = jax.grad(lambda x: jax.vmap(lloyd)(x, starts).inertia.sum())(several)
    alone = jax.grad(lambda x: lloyd(x, start).inertia)(x)
    np.testing.assert_allclose(gradient[0], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient[1], 2 * alone, rtol=1e-4, atol=1e-5)
