"""Between the steps: first clusters, new ones of the bank, and soft resets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jkmeans.epoch.bank import measure
from jkmeans.epoch.optimizers import forget_clusters
from jkmeans.epoch.recipe import Recipe
from jkmeans.epoch.state import CLUSTER_SIZES, Purpose, Rows, TrainState, epoch_key
from jkmeans.methods import Assigned

Metrics = dict[str, jax.Array]


def initialize(recipe: Recipe, state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
    """The first clusters, and a fresh optimizer where the method has one."""
    state, metrics = _clusters_of_bank(recipe, state, rows, Purpose.CLUSTERS)
    if recipe.method.fresh_optimizer:
        learned = recipe.learned(state.parameters, state.clusters)
        state = state._replace(optimizer=recipe.optimizers.init(learned))
    return state._replace(reference_variance=metrics["embedding_variance"]), metrics


def reset(recipe: Recipe, state: TrainState) -> TrainState:
    """Hidden layers mixed with fresh ones: θ ← α θ + (1 − α) φ."""
    fresh = recipe.blueprint.fresh_hidden_layers(epoch_key(state, Purpose.FRESH_LAYERS))
    kept = recipe.config.reset.kept
    mixed = {k: kept * state.parameters[k] + (1.0 - kept) * v for k, v in fresh.items()}
    return state._replace(parameters=state.parameters | mixed)


def restart(recipe: Recipe, state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
    """New clusters after a soft reset; the optimizer forgets the old ones."""
    state, metrics = _clusters_of_bank(recipe, state, rows, Purpose.CLUSTERS_AFTER_RESET)
    return state._replace(optimizer=forget_clusters(state.optimizer)), metrics


def assign(
    recipe: Recipe, state: TrainState, rows: Rows, n_iterations: jax.Array
) -> tuple[TrainState, Metrics]:
    """So many Lloyd iterations on the bank."""
    clusters, assigned = recipe.method.update(
        epoch_key(state, Purpose.RECLUSTERING),
        state.clusters,
        state.bank,
        rows.weights,
        rows.index,
        n_iterations,
    )
    return _adopt(recipe, state, rows, clusters, assigned)


def _clusters_of_bank(
    recipe: Recipe, state: TrainState, rows: Rows, purpose: Purpose
) -> tuple[TrainState, Metrics]:
    key = epoch_key(state, purpose)
    clusters, assigned = recipe.method.initialize(key, state.bank, rows.weights, rows.index)
    return _adopt(recipe, state, rows, clusters, assigned)


def _adopt(
    recipe: Recipe, state: TrainState, rows: Rows, clusters: Any, assigned: Assigned
) -> tuple[TrainState, Metrics]:
    """Takes new clusters into the state and says what changed."""
    clusters = state.clusters._replace(**clusters._asdict())
    variance, change = measure(recipe, state, rows, assigned.labels != state.labels)
    metrics = {
        "embedding_variance": variance,
        "label_change": change,
        "inertia": assigned.inertia,
        "empty_clusters": jnp.sum(assigned.counts == 0).astype(jnp.int32),
        "relocated_clusters": assigned.n_relocated,
        CLUSTER_SIZES: assigned.counts,
    }
    return state._replace(clusters=clusters, labels=assigned.labels), metrics
