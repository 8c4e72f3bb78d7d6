"""Step sizes ε_t of stochastic vector quantization, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jkmeans.errors import UserError

Steps = Callable[[jax.Array], jax.Array]
"""From t = 1, 2, … ([] int or float), the number of a sample, to its step ε_t ([] float32)."""


def constant(a: float, b: float) -> Steps:
    """ε_t = a."""
    del b
    return lambda t: jnp.full(jnp.shape(t), a, jnp.float32)


def inverse(a: float, b: float) -> Steps:
    """ε_t = a / t."""
    del b
    return lambda t: a / jnp.asarray(t, jnp.float32)


def rational(a: float, b: float) -> Steps:
    """ε_t = a / (1 + b t)."""
    return lambda t: a / (1 + b * jnp.asarray(t, jnp.float32))


def inverse_sqrt(a: float, b: float) -> Steps:
    """ε_t = a / √t."""
    del b
    return lambda t: a / jnp.sqrt(jnp.asarray(t, jnp.float32))


STEPS: dict[str, Callable[[float, float], Steps]] = {
    "constant": constant,
    "inverse": inverse,
    "rational": rational,
    "inverse_sqrt": inverse_sqrt,
}
"""Makers of steps by name: (a, b) -> Steps."""


def make_steps(name: str, a: float, b: float = 0.0) -> Steps:
    """The steps of a name.

    Args:
      name: a key of STEPS.
      a: the size of the steps, above 0. Where ε_t > 1 a prototype overshoots its sample, and from
        ε_t = 2 on it ends farther away than it began.
      b: how fast "rational" decays, at least 0 per sample; the others have no use for it.

    Raises:
      UserError: an unknown name, or a number that is not accepted.
    """
    if name not in STEPS:
        raise UserError(f"steps are {name!r}; accepted: {', '.join(map(repr, STEPS))}")
    if not (math.isfinite(a) and a > 0):
        raise UserError(f"a of the steps is {a!r}; accepted: a finite number above 0")
    if not (math.isfinite(b) and b >= 0):
        raise UserError(f"b of the steps is {b!r}; accepted: a finite number of at least 0")
    return STEPS[name](float(a), float(b))
