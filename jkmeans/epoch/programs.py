"""Epochs and what surrounds them, each compiled as one program over the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jkmeans.epoch import bank, reclustering
from jkmeans.epoch.optimizers import Optimizers
from jkmeans.epoch.recipe import Recipe, axis_of
from jkmeans.epoch.reclustering import Metrics
from jkmeans.epoch.state import COUNT, Rows, TrainState
from jkmeans.epoch.steps import order_of, run_steps
from jkmeans.errors import UserError
from jkmeans.methods import Method
from jkmeans.networks import NETWORKS, Blueprint
from jkmeans.sharding import BY_STEP, REPLICATED, SHARDED, Layout, data_parallel


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions of one run on one mesh; ``clustering`` is static everywhere.

    Attributes:
      create: ``(seed: [] uint32) -> state``, the state before the first epoch.
      epoch: ``(state, rows, clustering) -> (state, metrics)``; resident feeding. Donates state.
      order: ``(state) -> [n_steps, n_rows / n_steps] int32``, sharded along its second axis:
        the rows of each step, counted from the first row of their device.
      steps: ``(state, rows, order, examples, clustering) -> state``; host feeding of a chunk of
        steps: order [c, r] and examples [c, r, *example_shape]. Donates state.
      finish: ``(state, rows, clustering) -> (state, metrics)``, the end of an epoch whose steps
        were fed by the host. Donates state.
      refresh: ``(state, rows) -> state`` with the bank embedded anew from resident rows.
        Donates state.
      fill: ``(state, order, examples) -> state``, the same for a chunk that the host feeds.
        Donates state.
      initialize: ``(state, rows) -> (state, metrics)``, the first clusters from the bank, and a
        fresh optimizer where the method has one. Donates state.
      reset: ``(state) -> state``, hidden layers mixed with fresh ones (BRB). Donates state.
      restart: ``(state, rows) -> (state, metrics)``, new clusters from the bank, which the
        optimizer meets without memory of the old ones (BRB). Donates state.
      assign: ``(state, rows, n_iterations) -> (state, metrics)``, Lloyd iterations on the bank.
        Donates state.
      shardings: how each field of the state lies on the mesh.
    """

    create: Callable
    epoch: Callable
    order: Callable
    steps: Callable
    finish: Callable
    refresh: Callable
    fill: Callable
    initialize: Callable
    reset: Callable
    restart: Callable
    assign: Callable
    shardings: TrainState


def make_programs(
    config, blueprint: Blueprint, method: Method, layout: Layout, mesh: Mesh, example_shape, scale
) -> Programs:
    """Builds the programs of a run, or of ``config.n_seeds`` runs side by side.

    With several seeds the state and the metrics have an axis of seeds in front, over which every
    program is a ``vmap``; rows have none. Examples must then be on the devices. Where ``layout`` is
    of one device and the mesh has several, it is the seeds that are sharded, and every device has
    all rows.

    Args:
      config: validated; see `jkmeans.epoch.recipe.Recipe` for what is read.
      blueprint: of the network.
      method: the clustering method.
      layout: how the examples lie on the mesh.
      mesh: of the data axis.
      example_shape: shape of one example.
      scale: examples are multiplied by it after their conversion to float32.

    Raises:
      UserError: soft resets of a network that does not say what its hidden layers are.
    """
    if 0 < config.reset.every < config.training.n_epochs and not blueprint.hidden_layers:
        raise UserError(
            f"config.reset.every is {config.reset.every}, but the network {config.network.name!r} "
            "has no hidden_layers for soft resets to mix; accepted: 0, or a network that has (see "
            "jkmeans/networks.py)"
        )
    recipe = Recipe(
        config=config,
        blueprint=blueprint,
        method=method,
        layout=layout,
        axis=axis_of(layout, mesh),
        example_shape=tuple(example_shape),
        scale=scale,
        optimizers=Optimizers(config.training),
    )
    if recipe.axis:
        by_row, metrics = SHARDED, REPLICATED
        states = TrainState.specs(stacked=config.n_seeds > 1)
        fields = states
    else:
        by_row, metrics, states = REPLICATED, SHARDED, SHARDED
        fields = TrainState.everywhere(SHARDED)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        fields,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )

    def parallel(function, in_specs, out_specs, *, donate: bool = True):
        """Compiles over the mesh; ``clustering``, where there is one, is static."""
        axes = [0 if specs is states else None for specs in in_specs]

        def call(*arguments, **static):
            local = partial(function, recipe, **static)
            over_seeds = jax.vmap(local, axes) if config.n_seeds > 1 else local
            # Seeds that devices share have no collectives, and nothing replicated to prove.
            check = recipe.axis is not None
            return data_parallel(over_seeds, mesh, in_specs, out_specs, check=check)(*arguments)

        return jax.jit(call, donate_argnums=(0,) if donate else (), static_argnames=("clustering",))

    create = partial(_create, recipe)
    # Runs once, on little, and is compiled in a third of the time; to the same bits where weights
    # are uniform, as those of all networks here.
    plain = mesh.devices.flat[0].platform == "cpu" and config.network.name in NETWORKS
    quickly = {"xla_backend_optimization_level": 0} if plain else None
    return Programs(
        create=jax.jit(
            jax.vmap(create) if config.n_seeds > 1 else create,
            out_shardings=shardings,
            compiler_options=quickly,
        ),
        epoch=parallel(_epoch, (states, by_row), (states, metrics)),
        order=parallel(order_of, (states,), BY_STEP, donate=False),
        steps=parallel(run_steps, (states, by_row, BY_STEP, BY_STEP), states),
        finish=parallel(_finish, (states, by_row), (states, metrics)),
        refresh=parallel(bank.refresh, (states, by_row), states),
        fill=parallel(bank.fill, (states, BY_STEP, BY_STEP), states),
        initialize=parallel(reclustering.initialize, (states, by_row), (states, metrics)),
        reset=parallel(reclustering.reset, (states,), states),
        restart=parallel(reclustering.restart, (states, by_row), (states, metrics)),
        assign=parallel(reclustering.assign, (states, by_row, REPLICATED), (states, metrics)),
        shardings=shardings,
    )


def _create(recipe: Recipe, seed: jax.Array) -> TrainState:
    """The state before the first epoch."""
    config = recipe.config
    root = jax.random.key(seed)
    parameters = recipe.blueprint.draw(jax.random.fold_in(root, 0))
    k, p = config.n_clusters, config.network.embedding_dim
    n_rows = recipe.layout.n_rows
    clusters = recipe.method.blank(k, p, recipe.layout.n_examples)
    names: set[str] = set()
    for clustering in (False, True):
        names |= recipe.term_names(parameters, clusters, clustering)
    zero = jnp.zeros((), jnp.float32)
    return TrainState(
        parameters=parameters,
        optimizer=recipe.optimizers.init(recipe.learned(parameters, clusters)),
        clusters=clusters,
        bank=jnp.zeros((n_rows, p), jnp.float32),
        labels=jnp.full((n_rows,), -1, jnp.int32),
        totals=dict.fromkeys(sorted(names | {COUNT}), zero),
        reference_variance=zero,
        epoch=jnp.zeros((), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(root, 1)),
    )


def _epoch(
    recipe: Recipe, state: TrainState, rows: Rows, *, clustering: bool
) -> tuple[TrainState, Metrics]:
    """All steps, and the end of the epoch."""
    state = run_steps(recipe, state, rows, order_of(recipe, state), None, clustering=clustering)
    if clustering and recipe.config.centroids.bank == "refreshed":
        state = bank.refresh(recipe, state, rows)
    return _finish(recipe, state, rows, clustering=clustering)


def _finish(
    recipe: Recipe, state: TrainState, rows: Rows, *, clustering: bool
) -> tuple[TrainState, Metrics]:
    """Re-clusters the bank, counts the epoch, turns totals into means."""
    options = recipe.config
    weight = jnp.maximum(state.totals[COUNT], 1.0)
    names = recipe.term_names(state.parameters, state.clusters, clustering)
    terms = {name: state.totals[name] / weight for name in sorted(names)}
    means = {f"loss/{name}": value for name, value in terms.items()}
    means["loss"] = sum(terms.values(), jnp.float32(0))
    if clustering:
        done = state.epoch - options.training.n_pretrain_epochs + 1
        due = done % options.centroids.every == 0
        n_iterations = jnp.where(due, options.centroids.n_iterations, 0)
        state, metrics = reclustering.assign(recipe, state, rows, n_iterations)
    else:
        variance, _ = bank.measure(recipe, state, rows, jnp.zeros_like(rows.weights))
        metrics = {"embedding_variance": variance}
        reference = jnp.where(state.epoch == 0, variance, state.reference_variance)
        state = state._replace(reference_variance=reference)
    state = state._replace(
        totals=jax.tree.map(jnp.zeros_like, state.totals),
        epoch=state.epoch + 1,
        step=jnp.zeros_like(state.step),
    )
    return state, means | metrics
