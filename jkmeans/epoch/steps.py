"""One step, many steps, and which rows each of them takes; all on local rows, in `shard_map`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jkmeans.epoch.bank import write
from jkmeans.epoch.optimizers import learning_rate, with_leaves_of
from jkmeans.epoch.recipe import Recipe
from jkmeans.epoch.state import COUNT, Purpose, Rows, TrainState, epoch_key
from jkmeans.kmeans.collectives import all_sum, axis_index
from jkmeans.methods import Batch
from jkmeans.networks import Parameters
from jkmeans.sharding import to_varying


def order_of(recipe: Recipe, state: TrainState) -> jax.Array:
    """Rows of each step: [n_steps, shards_per_device · rows_per_step] int32, local."""
    layout = recipe.layout
    first = axis_index(recipe.axis) * layout.shards_per_device
    shards = jnp.arange(layout.shards_per_device)
    key = epoch_key(state, Purpose.ORDER)

    def shuffle(shard):
        # One sort of 32 random bits a row: jax.random.permutation sorts twice, and takes twice
        # as long to compile, to rule out ties, which here only favour the earlier row.
        bits = jax.random.bits(jax.random.fold_in(key, first + shard), (layout.rows_per_shard,))
        return (jnp.argsort(bits) + shard * layout.rows_per_shard).astype(jnp.int32)

    rows = jax.vmap(shuffle)(shards)
    rows = rows.reshape(layout.shards_per_device, layout.n_steps, layout.rows_per_step)
    return rows.transpose(1, 0, 2).reshape(layout.n_steps, -1)


def run_steps(
    recipe: Recipe,
    state: TrainState,
    rows: Rows,
    order: jax.Array,
    examples: jax.Array | None,
    *,
    clustering: bool,
) -> TrainState:
    """Scans over steps.

    Args:
      recipe: of the run.
      state: before them.
      rows: on the devices.
      order: [c, r] int32, the rows of each step.
      examples: [c, r, *example_shape], fed by the host; None to gather them from ``rows``.
      clustering: the phase.
    """
    # The bank is written once, after the scan, and must not be copied through it.
    bank, labels = state.bank, state.labels

    def body(carry, inputs):
        chosen, fed = inputs
        carry = carry._replace(bank=bank, labels=labels)
        batch = _batch(recipe, carry, rows, chosen, fed, clustering)
        carry, embeddings = _train_step(recipe, carry, batch)
        return carry._replace(bank=None, labels=None), embeddings

    carry = state._replace(bank=None, labels=None)
    carry, embeddings = jax.lax.scan(body, carry, (order, examples))
    return carry._replace(bank=write(bank, order, embeddings), labels=labels)


def _epochs_of_phase(recipe: Recipe, state: TrainState, clustering: bool) -> jax.Array:
    """Epochs finished in a phase: [] int32."""
    return state.epoch - recipe.config.training.n_pretrain_epochs if clustering else state.epoch


def _batch(recipe: Recipe, state: TrainState, rows: Rows, chosen, fed, clustering: bool) -> Batch:
    """The local examples of a step: rows [r] of the devices, or what the host feeds of them."""
    examples = rows.examples[chosen] if fed is None else fed
    index = rows.index[chosen]

    def key(purpose: Purpose) -> jax.Array:
        return jax.random.fold_in(epoch_key(state, purpose), state.step)

    x = recipe.input_of(examples)
    epochs = _epochs_of_phase(recipe, state, clustering)
    return Batch(
        x=x,
        view=recipe.view_of(x, key(Purpose.VIEWS), index, clustering),
        other_view=recipe.view_of(x, key(Purpose.OTHER_VIEWS), index, clustering),
        stored=state.bank[chosen],
        weights=rows.weights[chosen],
        labels=state.labels[chosen],
        index=index,
        key=key(Purpose.BATCH),
        progress=(epochs + state.step / recipe.layout.n_steps).astype(jnp.float32),
        clustering=clustering,
        invariance=recipe.config.augmentation.invariance,
        axis_name=recipe.axis,
    )


def _train_step(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
    """One step; returns the embeddings [b, p] of the batch, too."""
    method, clustering = recipe.method, batch.clustering
    rest = recipe.resting(state.parameters, clustering)
    gradients, embeddings, sums = _mean_gradients(recipe, state, batch, rest)
    before = recipe.learned(state.parameters, state.clusters)
    gradients["network"] |= jax.tree.map(jnp.zeros_like, rest)
    updates, optimizer_state = recipe.optimizers.update(
        gradients, state.optimizer, before, clustering=clustering
    )
    # What rests is not computed at all.
    optimizer_state = with_leaves_of(state.optimizer, optimizer_state, rest)
    epochs = _epochs_of_phase(recipe, state, clustering)
    options, n_steps = recipe.config.training, recipe.layout.n_steps
    rate = learning_rate(options, clustering, epochs, state.step, n_steps)
    rates = {"network": rate, "clusters": rate * method.learned_rate_factor}
    after = {
        part: jax.tree.map(lambda p, u, by=rates[part]: p - by * u, before[part], updates[part])
        for part in before
    }
    after["network"] |= rest
    clusters = state.clusters
    if clustering:
        clusters = clusters._replace(**after["clusters"])
        if method.after_step is not None:
            clusters = method.after_step(clusters, embeddings, batch)
    state = state._replace(
        parameters=after["network"],
        clusters=clusters,
        optimizer=optimizer_state,
        totals={k: v + sums[k] if k in sums else v for k, v in state.totals.items()},
        step=state.step + 1,
    )
    return state, embeddings


def _mean_gradients(
    recipe: Recipe, state: TrainState, batch: Batch, rest: Parameters
) -> tuple[dict[str, Any], jax.Array, dict[str, jax.Array]]:
    """Of the mean loss over the whole batch; with local embeddings and sums over the devices.

    Args:
      recipe: of the run.
      state: before the step.
      batch: local examples.
      rest: parameters that no gradient is wanted of.
    """

    def loss(learned, rest, clusters):
        """Sum, not mean, of the local losses: sums add up over devices."""
        clusters = clusters._replace(**learned["clusters"])
        embeddings, terms = recipe.objective(learned["network"] | rest, clusters, batch)
        sums = {name: jnp.sum(batch.weights * values) for name, values in terms.items()}
        return sum(sums.values(), jnp.float32(0)), (embeddings, sums)

    active = {k: v for k, v in state.parameters.items() if k not in rest}
    local = to_varying(recipe.learned(active, state.clusters), recipe.axis)
    (_, (embeddings, sums)), gradients = jax.value_and_grad(loss, has_aux=True)(
        local, rest, state.clusters
    )
    # Everything that devices must agree on in a step crosses the mesh here, at once.
    sums = to_varying(sums | {COUNT: jnp.sum(batch.weights)}, recipe.axis)
    gradients, sums = all_sum((gradients, sums), recipe.axis)
    n_batch = jnp.maximum(sums[COUNT], 1.0)
    return jax.tree.map(lambda g: g / n_batch, gradients), embeddings, sums
