"""Products in bfloat16: rounded operands, sums and results in float32, forwards and backwards."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans.precision import PRECISIONS, dot_general_of, rounded_dot_general

DIMENSIONS = (((1,), (0,)), ((), ()))


def operands(b=7, i=300, o=5):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(b, i)), rng.normal(size=(i, o))
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).astype(np.float64)


def product(x, kernel):
    return rounded_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def test_operands_are_rounded_and_sums_are_not():
    x, kernel = operands()
    found = jax.jit(product)(x, kernel)
    assert found.dtype == jnp.float32
    # Float32 sums of 300 exact products: some 1e-6 of Σ|a b|; bfloat16 sums would be off by 1e-2.
    scale = np.abs(rounded(x)) @ np.abs(rounded(kernel))
    assert np.max(np.abs(found - rounded(x) @ rounded(kernel)) / scale) < 2e-6
    exact = np.float64(x) @ np.float64(kernel)
    assert np.max(np.abs(found - exact) / scale) > 1e-4  # What rounding takes.


def test_derivatives_are_rounded_products_too():
    x, kernel = operands()
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(7, 5)), jnp.float32)
    of_x, of_kernel = jax.jit(lambda *a: jax.vjp(product, *a)[1](cotangent))(x, kernel)
    assert of_x.dtype == of_kernel.dtype == jnp.float32
    g = rounded(cotangent)
    np.testing.assert_allclose(of_x, g @ rounded(kernel).T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(of_kernel, rounded(x).T @ g, rtol=0, atol=1e-5)


def test_batches_of_any_rank_and_vmap():
    x, kernel = operands(b=6)
    whole = product(x, kernel)
    np.testing.assert_allclose(product(x.reshape(2, 3, -1), kernel).reshape(6, -1), whole, 1e-5)
    np.testing.assert_allclose(product(x[0], kernel), whole[0], 1e-5)
    twice = jax.vmap(product)(jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel]))
    np.testing.assert_allclose(twice, jnp.stack([whole, 2 * whole]), 1e-5)

    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(jnp.sin(product(x, kernel))))(kernel)

    def by_numpy(x, kernel):
        return rounded(x).T @ rounded(np.cos(product(x, kernel)))

    np.testing.assert_allclose(gradient(x, kernel), by_numpy(x, kernel), rtol=0, atol=2e-2)
    deep = gradient(x.reshape(2, 3, -1), kernel)
    np.testing.assert_allclose(deep, gradient(x, kernel), rtol=0, atol=2e-2)
    # As seeds side by side are trained.
    xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel[::-1]])
    both = jax.jit(jax.vmap(gradient))(xs, kernels)
    alone = [by_numpy(x, kernel) for x, kernel in zip(xs, kernels, strict=True)]
    np.testing.assert_allclose(both, alone, rtol=0, atol=2e-2)  # A cosine may round the other way.


def test_empty_axes():
    for b, i, o in ((0, 3, 2), (4, 0, 2), (4, 3, 0)):
        x, kernel = jnp.ones((b, i)), jnp.ones((i, o))
        of_x, of_kernel = jax.grad(lambda *a: jnp.sum(product(*a)), (0, 1))(x, kernel)
        assert (of_x.shape, of_kernel.shape) == (x.shape, kernel.shape)


def multiplies_bfloat16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
def test_xla_widens_no_operand_of_a_gradient():
    """It does if it sees a product over first axes, which takes two to three times as long."""
    x, kernel = jnp.ones((256, 500)), jnp.ones((500, 2000))
    program = jax.jit(jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel))), 1))
    text = program.lower(x, kernel).compile().as_text()
    types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", text))
    operands = re.findall(r" dot\(%([\w.-]+), %([\w.-]+)\)", text)
    assert len(operands) == 2
    assert {types[name] for pair in operands for name in pair} == {"bf16"}


def test_other_dimensions_are_refused():
    x, kernel = operands()
    with pytest.raises(ValueError, match="accepted"):
        rounded_dot_general(x, kernel.T, (((1,), (1,)), ((), ())))


def test_float32_is_the_product_of_jax():
    x, kernel = operands()
    assert PRECISIONS[0] == "float32"
    found = dot_general_of("float32")(x, kernel, DIMENSIONS)
    np.testing.assert_array_equal(found, x @ kernel)
