"""The arithmetic of layers: float32, or bfloat16 products whose sums are float32.

Mixed precision as tensor cores, and CPUs with AVX512-BF16 or AMX, compute it: the operands of a
product are rounded to bfloat16 (8 bits of mantissa, the range of float32), products are summed in
float32, and the result is float32, as are parameters, biases, activations, losses, gradients of
parameters and the optimizer. Of the backward pass the same holds: the cotangent is rounded before
it is multiplied. The results of convolutions are rounded once more, to bfloat16. No scaling of the
loss is needed, because the range is that of float32 (Kalamkar et al. 2019, "A study of BFLOAT16 for
deep learning training").

A network of one's own takes part where it has ``nnx.Linear(…, dot_general=dot_general_of(
options.precision))`` and ``nnx.Conv(…, promote_dtype=promote_dtype_of(options.precision))``.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes
from jax import lax

PRECISIONS = ("float32", "bfloat16")
"""What ``config.network.precision`` may be."""


def dot_general_of(precision: str) -> Callable[..., jax.Array]:
    """What ``nnx.Linear`` is to multiply with, one of `PRECISIONS`."""
    return {"float32": lax.dot_general, "bfloat16": rounded_dot_general}[precision]


def promote_dtype_of(precision: str) -> Callable[..., tuple]:
    """What ``nnx.Conv`` and ``nnx.ConvTranspose`` are to make of their operands and the bias."""
    return {"float32": dtypes.promote_dtype, "bfloat16": _rounded_operands}[precision]


def _rounded_operands(arrays, **_: Any) -> tuple:
    x, kernel, bias = arrays
    return x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), bias


def rounded_dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, **_: Any
) -> jax.Array:
    """``lax.dot_general`` as ``nnx.Linear`` calls it, of operands rounded to bfloat16.

    Args:
      x: [..., i] float32.
      kernel: [i, o] float32.
      dimension_numbers: the last axis of x and the first of kernel.
      precision: not looked at.

    Returns:
      [..., o] float32. Its derivatives are such products, too; inside ``shard_map`` a replicated
      kernel must be marked as varying before they are taken (`jkmeans.sharding.to_varying`).

    Raises:
      ValueError: other dimension numbers.
    """
    del precision
    wanted = (((x.ndim - 1,), (0,)), ((), ()))
    if jax.tree.map(int, dimension_numbers) != wanted or kernel.ndim != 2:
        raise ValueError(f"dimension_numbers is {dimension_numbers}; accepted: {wanted}")
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array):
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return _sum_products(x, kernel, (x.ndim - 1,), (0,)), (x, kernel)


def _backward(rounded: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    x, kernel = rounded
    cotangent = cotangent.astype(jnp.bfloat16)
    of_x = _sum_products(cotangent, kernel, (x.ndim - 1,), (1,))
    n_rows = math.prod(x.shape[:-1])
    x, cotangent = x.reshape(n_rows, x.shape[-1]), cotangent.reshape(n_rows, cotangent.shape[-1])
    return of_x, lax.platform_dependent(x, cotangent, cpu=_of_kernel_on_cpu, default=_of_kernel)


def _of_kernel(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    return _sum_products(x, cotangent, (0,), (0,))


def _of_kernel_on_cpu(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    # XLA's CPU library takes no bfloat16 product over first axes: operands would be widened to
    # float32, and the product take two to three times as long. Both tricks are needed: without the
    # barrier XLA folds the transpose into such a product, without the reshapes it widens anyway.
    n_rows, i = x.shape
    transposed = lax.optimization_barrier(x.T.reshape(n_rows * i)).reshape(i, n_rows)
    return _sum_products(transposed, cotangent, (1,), (0,))


def _sum_products(a: jax.Array, b: jax.Array, of_a, of_b) -> jax.Array:
    return lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=jnp.float32)


_product.defvjp(_forward, _backward)
