"""What a pass may ask of the rows: what each chunk adds, and which rows of it are picked first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans import kmeans
from jkmeans.kmeans.initialization import draw_priorities
from jkmeans.streaming.pipeline import BLOCK_ROWS


class Rows(NamedTuple):
    """The rows of a chunk that one device has.

    Attributes:
      x: [n, d].
      weights: [n] or None for ones; 0 for padding.
      valid: [n] bool, False for padding and for rows of weight 0.
      index: [n] uint32, global row numbers.
    """

    x: jax.Array
    weights: jax.Array | None
    valid: jax.Array
    index: jax.Array


class Contribution(NamedTuple):
    """What a device's rows of a chunk add to a pass.

    Attributes:
      numbers: [p] float, to be added up.
      priority: [n] float: the rows of highest priority are picked. None to pick none.
      labels: [n] int32, known of the rows picked. None for none.
    """

    numbers: jax.Array
    priority: jax.Array | None = None
    labels: jax.Array | None = None


Program = Callable[..., Contribution]
"""From Rows and parameters (replicated arrays) to a Contribution."""


def statistics(rows: Rows, centroids: jax.Array, shift: jax.Array) -> Contribution:
    """Sums [k, d] of x − shift, counts [k] and inertia of the clusters; farthest rows first."""
    k = centroids.shape[0]
    nearest = kmeans.nearest(rows.x, centroids)
    distances = jnp.where(rows.valid, _distances(rows.x, centroids, nearest), 0)
    # Out of range: padding is left out of sums and counts.
    labels = jnp.where(rows.valid, nearest, k)
    added = kmeans.cluster_statistics(
        rows.x, labels, k, weights=rows.weights, distances=distances, shift=shift
    )
    numbers = jnp.concatenate([added.sums.reshape(-1), added.counts, added.inertia[None]])
    return Contribution(numbers, jnp.where(rows.valid, distances, -jnp.inf), nearest)


def counts(rows: Rows, candidates: jax.Array) -> Contribution:
    """The weight [k] of the rows nearest to each candidate."""
    k = candidates.shape[0]
    labels = jnp.where(rows.valid, kmeans.nearest(rows.x, candidates), k)
    # Only the counts are wanted, so rows without features are summed.
    added = kmeans.cluster_statistics(rows.x[:, :0], labels, k, weights=rows.weights)
    return Contribution(added.counts)


def moments(rows: Rows, shift: jax.Array, key: jax.Array) -> Contribution:
    """Row count, Σ(x − shift) and Σ(x − shift)² of each feature; rows drawn by weight."""
    x = jnp.where(rows.valid[:, None], rows.x.astype(shift.dtype) - shift[None, :], 0)
    n = jnp.sum(rows.valid).astype(shift.dtype)
    numbers = jnp.concatenate([n[None], jnp.sum(x, axis=0), jnp.sum(x**2, axis=0)])
    weights = _weights(rows, shift.dtype)
    return Contribution(numbers, draw_priorities(key, weights, weights, rows.index))


def moments_and_sample(rows: Rows, shift: jax.Array, key: jax.Array) -> Contribution:
    """As `moments`, but rows are drawn uniformly."""
    weights = _weights(rows, shift.dtype)
    drawn = draw_priorities(key, jnp.ones_like(weights), weights, rows.index)
    return moments(rows, shift, key)._replace(priority=drawn)


def draw(rows: Rows, candidates: jax.Array, key: jax.Array) -> Contribution:
    """The potential Σ w D²; rows drawn by w D², D² the squared distance to the candidates."""
    closest = _closest(rows.x, candidates)
    weights = _weights(rows, closest.dtype)
    scores = jnp.where(rows.valid, weights * closest, 0)
    return Contribution(jnp.sum(scores)[None], draw_priorities(key, scores, weights, rows.index))


def potentials(rows: Rows, candidates: jax.Array, trials: jax.Array) -> Contribution:
    """The potential [t] that each trial would leave if it joined the candidates."""
    closest = _closest(rows.x, candidates)
    weights = _weights(rows, closest.dtype)

    def potential(trial: jax.Array) -> jax.Array:
        distances = jnp.sum((rows.x.astype(trial.dtype) - trial[None, :]) ** 2, axis=1)
        left = jnp.minimum(closest, distances)
        return jnp.sum(jnp.where(rows.valid, weights * left, 0))

    return Contribution(lax.map(potential, trials))


def _distances(x: jax.Array, centroids: jax.Array, labels: jax.Array) -> jax.Array:
    """`kmeans.squared_distances`, [n]; on a CPU three times as fast.

    There a block of rows stays in the cache, and XLA's sum along a row is scalar code, where a
    product with ones is vectorised.
    """
    n, d = x.shape
    if n % BLOCK_ROWS or jax.default_backend() != "cpu":
        return kmeans.squared_distances(x, centroids, labels)
    ones = jnp.ones((d, 1), centroids.dtype)

    def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        squares = (block[0].astype(centroids.dtype) - centroids[block[1]]) ** 2
        return jnp.matmul(squares, ones, precision=lax.Precision.HIGHEST)[:, 0]

    blocks = (x.reshape(-1, BLOCK_ROWS, d), labels.reshape(-1, BLOCK_ROWS))
    return lax.map(of_block, blocks).reshape(-1)


def _closest(x: jax.Array, candidates: jax.Array) -> jax.Array:
    return _distances(x, candidates, kmeans.nearest(x, candidates))


def _weights(rows: Rows, dtype: Any) -> jax.Array:
    return rows.valid.astype(dtype) if rows.weights is None else rows.weights.astype(dtype)
