"""What makes a label certain: bounds on what rounding does to a score, and levels of certainty.

The proof of the bounds is in ``certified.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# How a label was found, see `Certified`.
CERTIFIED, COMPARED, RECOMPUTED, REFINED, SETTLED = 0, 1, 2, 3, 4
UNIT = 2.0**-24
# What underflow may cost, for each feature.
UNDERFLOW = 2.0**-122


class Radii(NamedTuple):
    """What the bound on a pair needs of a row or a centroid.

    Attributes:
      size: at least ‖v‖ + ‖δv‖, for the shifted v.
      change: at least ‖δv‖, for what rounding to the format does to v.
    """

    size: jax.Array
    change: jax.Array


def rounded(values: jax.Array, bits: int) -> jax.Array:
    """The nearest numbers with 8 bits of exponent and ``bits`` stored bits of significand."""
    return lax.reduce_precision(values, exponent_bits=8, mantissa_bits=bits)


def radii(values: jax.Array, low: jax.Array, kind: Any = jnp.float32) -> Radii:
    """The norms of vectors [m, d] and of what rounding does to them: [m].

    ``kind`` is the dtype that scores are computed in, which says what underflows.
    """
    floor = 2 * (values.shape[1] * float(jnp.finfo(kind).tiny)) ** 0.5
    change = jnp.sqrt(jnp.sum((low - values) ** 2, axis=1)) + floor
    return Radii(jnp.sqrt(jnp.sum(values**2, axis=1)) + change, change)


def share_of_sums(d: int) -> float:
    """4 (d + 16) u: what the rounding of all sums of d terms is bounded by, relative to them."""
    return 4 * (d + 16) * UNIT


def error_of(of_centroids: Radii, of_rows: Radii, d: int) -> jax.Array:
    """E of the module's docstring for scores in low precision, in float32."""
    c, dc = (radius.astype(jnp.float32) for radius in of_centroids)
    x, dx = (radius.astype(jnp.float32) for radius in of_rows)
    sums = share_of_sums(d)
    # Grouped so that what depends on the row or the centroid alone is computed once.
    return (1 + sums) * (c * (dx + sums * x) + dc * x + (0.5 * sums * c**2 + d * UNDERFLOW))


def full_error_of(of_centroids: Radii, of_rows: Radii, d: int) -> jax.Array:
    """E for scores in full precision."""
    c, x = of_centroids.size, of_rows.size
    kind = jnp.finfo(c.dtype)
    sums = 2 * (d + 16) * (kind.eps / 2)
    return (1 + 2 * sums) * (sums * (0.5 * c**2 + x * c) + 16 * d * float(kind.tiny))
