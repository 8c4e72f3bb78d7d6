"""The bank: the embedding of every row, as the steps have made it or made anew."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jkmeans.epoch.recipe import Recipe
from jkmeans.epoch.state import Rows, TrainState
from jkmeans.kmeans.collectives import all_sum


def write(bank: jax.Array, order: jax.Array, embeddings: jax.Array) -> jax.Array:
    """The bank [n, p] with embeddings [c, r, p] of the rows of ``order`` [c, r]."""
    embeddings = embeddings.reshape(-1, embeddings.shape[-1])
    return bank.at[order.reshape(-1)].set(embeddings, unique_indices=True)


def refresh(recipe: Recipe, state: TrainState, rows: Rows) -> TrainState:
    """All rows embedded anew, a step's worth at a time."""
    blocks = rows.examples.reshape(recipe.layout.n_steps, -1, *rows.examples.shape[1:])
    embeddings = jax.lax.map(lambda block: recipe.embed(state.parameters, block), blocks)
    return state._replace(bank=embeddings.reshape(state.bank.shape))


def fill(recipe: Recipe, state: TrainState, order: jax.Array, examples: jax.Array) -> TrainState:
    """The same of the rows of ``order`` [c, r], which the host feeds: [c, r, *example_shape]."""
    embeddings = jax.lax.map(lambda block: recipe.embed(state.parameters, block), examples)
    return state._replace(bank=write(state.bank, order, embeddings))


def measure(
    recipe: Recipe, state: TrainState, rows: Rows, changed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Variance of the bank and the share of examples that changed; two all-reduces."""
    weights = rows.weights[:, None]
    n_changed = jnp.sum(rows.weights * changed)
    summed = (jnp.sum(weights * state.bank, axis=0), jnp.sum(rows.weights), n_changed)
    sums, count, n_changed = all_sum(summed, recipe.axis)
    centred = state.bank - (sums / count)[None, :]
    squared = all_sum(jnp.sum(weights * centred * centred), recipe.axis)
    return squared / count, n_changed / count
