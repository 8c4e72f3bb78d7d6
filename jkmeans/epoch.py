"""The compiled programs of a run: an epoch with its re-clustering is one XLA program.

`make_programs` builds them for a mesh. Data, bank and labels are sharded along the mesh axis,
parameters and clusters are replicated. A step has one all-reduce (of all gradients, all loss terms
and the number of examples at once; `Batch.mean` adds one or two for a method that uses it), a Lloyd
iteration one (of K·(p+1)+1 numbers), and the diagnostics of an epoch two.

Two ways of feeding share the same step. *Resident*: all examples are on the devices and
``Programs.epoch`` is one program. *Host-fed*: ``Programs.order`` says which rows each step takes,
``Programs.steps`` takes chunks of them from the host, ``Programs.finish`` ends the epoch. Both
give the same batches in the same order.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jkmeans.augmentation import VIEWS, affine_views
from jkmeans.errors import UserError
from jkmeans.kmeans.collectives import all_sum, axis_index
from jkmeans.methods import Assigned, Batch, Method, example_keys
from jkmeans.networks import Blueprint, Parameters, merge, network_input
from jkmeans.sharding import (
    BY_STEP,
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    Layout,
    data_parallel,
    to_varying,
)

CLUSTER_SIZES = "cluster_sizes"
"""The one metric that is not a scalar: [k], examples of each cluster."""
_COUNT = "#examples"  # Among the totals, which otherwise go by the names of loss terms.


def axis_of(layout: Layout, mesh: Mesh) -> str | None:
    """The mesh axis of the examples; None where every device has all of them."""
    return DATA_AXIS if layout.n_devices == mesh.size else None


class Rows(NamedTuple):
    """The examples as they lie on the devices, sharded; see `jkmeans.sharding.Layout`.

    Attributes:
      examples: [n_rows, *example_shape], native dtype; None when the host feeds them.
      weights: [n_rows] float32, 1 for an example and 0 for padding.
      index: [n_rows] int32, the number of the example; −1 for padding.
    """

    examples: Any
    weights: jax.Array
    index: jax.Array


class TrainState(NamedTuple):
    """Everything that a run needs to go on; data only.

    Attributes:
      parameters: of the network, by path; replicated.
      optimizer: optax state, of the parameters and of what a method learns of its clusters;
        replicated.
      clusters: of the method, with ``centroids`` [k, p]; replicated.
      bank: [n_rows, p] float32, the embedding of each row; sharded.
      labels: [n_rows] int32, the cluster of each row; sharded.
      totals: sums of each loss term and of the weights over the steps of the epoch in progress.
      reference_variance: [] float32, variance of the embeddings when training, then clustering,
        began; what a collapse is measured against.
      epoch: [] int32, finished epochs, pretraining included.
      step: [] int32, finished steps of the epoch in progress; 0 between epochs.
      key: [2] uint32, the root of all keys: every key is folded from it and a position.
    """

    parameters: Parameters
    optimizer: Any
    clusters: Any
    bank: jax.Array
    labels: jax.Array
    totals: dict[str, jax.Array]
    reference_variance: jax.Array
    epoch: jax.Array
    step: jax.Array
    key: jax.Array

    @classmethod
    def specs(cls, stacked: bool = False) -> "TrainState":
        """How each field lies on the mesh, as a prefix of the state.

        Args:
          stacked: whether there is an axis of seeds in front.
        """
        everywhere = dict.fromkeys(cls._fields, REPLICATED)
        by_row = BY_STEP if stacked else SHARDED
        return cls(**everywhere | {"bank": by_row, "labels": by_row})  # type: ignore[arg-type]


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


OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": lambda options: optax.scale_by_adam(),
    "adamw": lambda options: optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(options.weight_decay)
    ),
    "sgd": lambda options: optax.trace(decay=0.9),
}


class _Optimizers:
    """The optimizers of both phases, as one.

    Where they are the same, so is their state, and clustering may go on with the moments of
    pretraining. Where they differ, the state is a pair, of which a phase changes its own.
    """

    def __init__(self, options):
        """Of ``config.training``."""
        names = (options.optimizer, options.clustering_optimizer)
        self._of_phase = [OPTIMIZERS[name](options) for name in names]
        self._same = names[0] == names[1]

    def init(self, variables):
        """The state before the first step of a phase."""
        if self._same:
            return self._of_phase[0].init(variables)
        return tuple(optimizer.init(variables) for optimizer in self._of_phase)

    def update(self, gradients, state, variables, *, clustering: bool) -> tuple[Any, Any]:
        """What a rate of 1 would subtract from the variables, and the next state."""
        phase = int(clustering)
        if self._same:
            return self._of_phase[0].update(gradients, state, variables)
        updates, changed = self._of_phase[phase].update(gradients, state[phase], variables)
        return updates, (changed, state[1]) if phase == 0 else (state[0], changed)


def learning_rate(options, clustering: bool, epoch, step, n_steps: int) -> jax.Array:
    """The rate of a step: constant, or a half cosine to zero over each phase.

    Args:
      options: ``config.training``.
      clustering: the phase.
      epoch: [] int32, epochs finished in this phase.
      step: [] int32, steps finished in this epoch.
      n_steps: steps of an epoch.
    """
    base = options.clustering_learning_rate if clustering else options.learning_rate
    schedule = options.clustering_schedule if clustering else options.schedule
    if schedule == "constant":
        return jnp.float32(base)
    n_epochs = options.n_epochs if clustering else options.n_pretrain_epochs
    done = (epoch + step / n_steps) / max(n_epochs, 1)
    return base * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(done, 1.0)))


def make_programs(
    config, blueprint: Blueprint, method: Method, layout: Layout, mesh: Mesh, example_shape, scale
) -> Programs:
    """Builds the programs of a run, or of ``config.n_seeds`` runs side by side.

    With several seeds the state and the metrics have an axis of seeds in front, over which every
    program is a ``vmap``; rows have none. Examples must then be on the devices. Where ``layout`` is
    of one device and the mesh has several, it is the seeds that are sharded, and every device has
    all rows.

    Args:
      config: a validated config; ``training``, ``centroids`` and ``network`` are read.
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
    options = config.training
    graphdef = blueprint.graphdef
    optimizers = _Optimizers(options)
    n_seeds = config.n_seeds
    axis = axis_of(layout, mesh)

    augmentation = config.augmentation
    augmenting = any(augmentation[view] for view in VIEWS)

    def view_of(x: jax.Array, key: jax.Array, index: jax.Array, clustering: bool) -> jax.Array:
        if not (augmenting and (clustering or augmentation.pretraining)):
            return x
        return affine_views(
            example_keys(key, index),
            x,
            shift=augmentation.shift,
            rotation=augmentation.rotation,
            zoom=augmentation.zoom,
        )

    def objective(parameters, clusters, batch):
        of_phase = graphdef if batch.clustering else blueprint.pretraining
        return method.objective(merge(of_phase, parameters), clusters, batch)

    def trained(parameters: Parameters, clusters) -> dict[str, Any]:
        """What the optimizer changes."""
        learned = {name: getattr(clusters, name) for name in method.learned}
        return {"network": parameters, "clusters": learned}

    def resting(parameters: Parameters, clustering: bool) -> Parameters:
        """The parameters that have no part in a phase: their gradients and moments stay 0."""
        if clustering:
            starts = () if method.decodes else blueprint.decoder_layers
        else:
            # A method that does not begin anew with clustering pretrains its network its own way.
            starts = blueprint.unpretrained_layers if method.fresh_optimizer else ()
        return {k: v for k, v in parameters.items() if k.startswith(starts)}

    def loss(variables, rest, clusters, batch):
        """Sum, not mean, of the local losses: sums add up over devices."""
        clusters = clusters._replace(**variables["clusters"])
        embeddings, terms = objective(variables["network"] | rest, clusters, batch)
        sums = {name: jnp.sum(batch.weights * values) for name, values in terms.items()}
        return sum(sums.values(), jnp.float32(0)), (embeddings, sums)

    def train_step(state: TrainState, examples, weights, labels, stored, index, *, clustering):
        """One step on the local examples of a batch; returns embeddings [b, p] too."""
        epoch = state.epoch - options.n_pretrain_epochs if clustering else state.epoch
        step_key = jax.random.fold_in(_epoch_key(state, _Purpose.VIEWS), state.step)
        other_key = jax.random.fold_in(_epoch_key(state, _Purpose.OTHER_VIEWS), state.step)
        x = network_input(examples, scale)
        batch = Batch(
            x=x,
            view=view_of(x, step_key, index, clustering),
            other_view=view_of(x, other_key, index, clustering),
            stored=stored,
            weights=weights,
            labels=labels,
            index=index,
            key=jax.random.fold_in(_epoch_key(state, _Purpose.BATCH), state.step),
            progress=(epoch + state.step / layout.n_steps).astype(jnp.float32),
            clustering=clustering,
            invariance=augmentation.invariance,
            axis_name=axis,
        )
        rest = resting(state.parameters, clustering)
        active = {k: v for k, v in state.parameters.items() if k not in rest}
        local = to_varying(trained(active, state.clusters), axis)
        (_, (embeddings, sums)), gradients = jax.value_and_grad(loss, has_aux=True)(
            local, rest, state.clusters, batch
        )
        # Everything that devices must agree on in a step crosses the mesh here, at once.
        sums = to_varying(sums | {_COUNT: jnp.sum(weights)}, axis)
        gradients, sums = all_sum((gradients, sums), axis)
        n_batch = jnp.maximum(sums[_COUNT], 1.0)
        gradients = jax.tree.map(lambda g: g / n_batch, gradients)
        before = trained(state.parameters, state.clusters)
        gradients["network"] |= jax.tree.map(jnp.zeros_like, rest)
        updates, optimizer_state = optimizers.update(
            gradients, state.optimizer, before, clustering=clustering
        )
        # What rests is not computed at all.
        optimizer_state = _with_leaves_of(state.optimizer, optimizer_state, rest)
        rate = learning_rate(options, clustering, epoch, state.step, layout.n_steps)
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

    def run_steps(state: TrainState, rows: Rows, order, examples, *, clustering: bool):
        """Scans over steps; examples are gathered from the rows where the host feeds none."""
        # The bank is written once, after the scan, and must not be copied through it.
        bank, labels = state.bank, state.labels

        def body(carry, inputs):
            chosen, fed = inputs
            batch = rows.examples[chosen] if fed is None else fed
            carry, embeddings = train_step(
                carry._replace(bank=bank, labels=labels),
                batch,
                rows.weights[chosen],
                labels[chosen],
                bank[chosen],
                rows.index[chosen],
                clustering=clustering,
            )
            return carry._replace(bank=None, labels=None), embeddings

        carry = state._replace(bank=None, labels=None)
        carry, embeddings = jax.lax.scan(body, carry, (order, examples))
        return carry._replace(bank=write(bank, order, embeddings), labels=labels)

    def write(bank, order, embeddings):
        embeddings = embeddings.reshape(-1, embeddings.shape[-1])
        return bank.at[order.reshape(-1)].set(embeddings, unique_indices=True)

    def order_of(state: TrainState):
        """Rows of each step: [n_steps, shards_per_device · rows_per_step] int32, local."""
        first = axis_index(axis) * layout.shards_per_device
        shards = jnp.arange(layout.shards_per_device)
        epoch_key = _epoch_key(state, _Purpose.ORDER)

        def shuffle(shard):
            # One sort of 32 random bits a row: jax.random.permutation sorts twice, and takes twice
            # as long to compile, to rule out ties, which here only favour the earlier row.
            bits = jax.random.bits(
                jax.random.fold_in(epoch_key, first + shard), (layout.rows_per_shard,)
            )
            return (jnp.argsort(bits) + shard * layout.rows_per_shard).astype(jnp.int32)

        rows = jax.vmap(shuffle)(shards)
        rows = rows.reshape(layout.shards_per_device, layout.n_steps, layout.rows_per_step)
        return rows.transpose(1, 0, 2).reshape(layout.n_steps, -1)

    def embed_local(parameters, examples):
        return merge(graphdef, parameters).encode(network_input(examples, scale))

    def refresh(state: TrainState, rows: Rows):
        blocks = rows.examples.reshape(layout.n_steps, -1, *rows.examples.shape[1:])
        embeddings = jax.lax.map(lambda block: embed_local(state.parameters, block), blocks)
        return state._replace(bank=embeddings.reshape(state.bank.shape))

    def fill(state: TrainState, order, examples):
        embeddings = jax.lax.map(lambda block: embed_local(state.parameters, block), examples)
        return state._replace(bank=write(state.bank, order, embeddings))

    def measure(state: TrainState, rows: Rows, changed):
        """Variance of the bank and the examples whose label changed; two all-reduces."""
        weights = rows.weights[:, None]
        n_changed = jnp.sum(rows.weights * changed)
        summed = (jnp.sum(weights * state.bank, axis=0), jnp.sum(rows.weights), n_changed)
        sums, count, n_changed = all_sum(summed, axis)
        centred = state.bank - (sums / count)[None, :]
        squared = all_sum(jnp.sum(weights * centred * centred), axis)
        return squared / count, n_changed / count

    def adopt(state: TrainState, rows: Rows, clusters, assigned: Assigned):
        """Takes new clusters into the state and says what changed."""
        clusters = state.clusters._replace(**clusters._asdict())
        variance, change = measure(state, rows, assigned.labels != state.labels)
        metrics = {
            "embedding_variance": variance,
            "label_change": change,
            "inertia": assigned.inertia,
            "empty_clusters": jnp.sum(assigned.counts == 0).astype(jnp.int32),
            "relocated_clusters": assigned.n_relocated,
            CLUSTER_SIZES: assigned.counts,
        }
        return state._replace(clusters=clusters, labels=assigned.labels), metrics

    def initialize(state: TrainState, rows: Rows):
        key = _epoch_key(state, _Purpose.CLUSTERS)
        clusters, assigned = method.initialize(key, state.bank, rows.weights, rows.index)
        state, metrics = adopt(state, rows, clusters, assigned)
        if method.fresh_optimizer:
            state = state._replace(optimizer=optimizers.init(trained(state.parameters, clusters)))
        return state._replace(reference_variance=metrics["embedding_variance"]), metrics

    def reset(state: TrainState):
        # Of the hidden layers only: θ ← α θ + (1 − α) φ.
        key = _epoch_key(state, _Purpose.FRESH_LAYERS)
        fresh = blueprint.fresh_hidden_layers(key)
        kept = config.reset.kept
        mixed = {k: kept * state.parameters[k] + (1.0 - kept) * v for k, v in fresh.items()}
        return state._replace(parameters=state.parameters | mixed)

    def restart(state: TrainState, rows: Rows):
        key = _epoch_key(state, _Purpose.CLUSTERS_AFTER_RESET)
        clusters, assigned = method.initialize(key, state.bank, rows.weights, rows.index)
        state, metrics = adopt(state, rows, clusters, assigned)
        return state._replace(optimizer=_forget_clusters(state.optimizer)), metrics

    def assign(state: TrainState, rows: Rows, n_iterations):
        clusters, assigned = method.update(
            _epoch_key(state, _Purpose.RECLUSTERING),
            state.clusters,
            state.bank,
            rows.weights,
            rows.index,
            n_iterations,
        )
        return adopt(state, rows, clusters, assigned)

    def finish(state: TrainState, rows: Rows, *, clustering: bool):
        """Re-clusters the bank, counts the epoch, turns totals into means."""
        weight = jnp.maximum(state.totals[_COUNT], 1.0)
        names = _term_names(objective, state.parameters, state.clusters, example_shape, clustering)
        terms = {name: state.totals[name] / weight for name in sorted(names)}
        means = {f"loss/{name}": value for name, value in terms.items()}
        means["loss"] = sum(terms.values(), jnp.float32(0))
        if clustering:
            done = state.epoch - options.n_pretrain_epochs + 1
            due = done % config.centroids.every == 0
            n_iterations = jnp.where(due, config.centroids.n_iterations, 0)
            state, metrics = assign(state, rows, n_iterations)
        else:
            variance, _ = measure(state, rows, jnp.zeros_like(rows.weights))
            metrics = {"embedding_variance": variance}
            reference = jnp.where(state.epoch == 0, variance, state.reference_variance)
            state = state._replace(reference_variance=reference)
        state = state._replace(
            totals=jax.tree.map(jnp.zeros_like, state.totals),
            epoch=state.epoch + 1,
            step=jnp.zeros_like(state.step),
        )
        return state, means | metrics

    def epoch(state: TrainState, rows: Rows, *, clustering: bool):
        state = run_steps(state, rows, order_of(state), None, clustering=clustering)
        if clustering and config.centroids.bank == "refreshed":
            state = refresh(state, rows)
        return finish(state, rows, clustering=clustering)

    def create(seed: jax.Array) -> TrainState:
        root = jax.random.key(seed)
        parameters = blueprint.draw(jax.random.fold_in(root, 0))
        k, p = config.n_clusters, config.network.embedding_dim
        clusters = method.blank(k, p, layout.n_examples)
        names: set[str] = set()
        for clustering in (False, True):
            names |= _term_names(objective, parameters, clusters, example_shape, clustering)
        zero = jnp.zeros((), jnp.float32)
        return TrainState(
            parameters=parameters,
            optimizer=optimizers.init(trained(parameters, clusters)),
            clusters=clusters,
            bank=jnp.zeros((layout.n_rows, p), jnp.float32),
            labels=jnp.full((layout.n_rows,), -1, jnp.int32),
            totals=dict.fromkeys(sorted(names | {_COUNT}), zero),
            reference_variance=zero,
            epoch=jnp.zeros((), jnp.int32),
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.fold_in(root, 1)),
        )

    by_row = SHARDED if axis else REPLICATED
    metrics = REPLICATED if axis else SHARDED
    states = TrainState.specs(stacked=n_seeds > 1) if axis else SHARDED
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        states if axis else TrainState(**dict.fromkeys(TrainState._fields, SHARDED)),  # type: ignore[arg-type]
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )

    def parallel(function, in_specs, out_specs, *, donate: bool = True):
        """Compiles over the mesh; ``clustering``, where there is one, is static."""
        axes = [0 if specs is states else None for specs in in_specs]

        def call(*arguments, **static):
            def local(*local):
                return function(*local, **static)

            over_seeds = jax.vmap(local, axes) if n_seeds > 1 else local
            # Seeds that devices share have no collectives, and nothing replicated to prove.
            return data_parallel(over_seeds, mesh, in_specs, out_specs, check=axis is not None)(
                *arguments
            )

        return jax.jit(call, donate_argnums=(0,) if donate else (), static_argnames=("clustering",))

    return Programs(
        create=jax.jit(jax.vmap(create) if n_seeds > 1 else create, out_shardings=shardings),
        epoch=parallel(epoch, (states, by_row), (states, metrics)),
        order=parallel(order_of, (states,), BY_STEP, donate=False),
        steps=parallel(run_steps, (states, by_row, BY_STEP, BY_STEP), states),
        finish=parallel(finish, (states, by_row), (states, metrics)),
        refresh=parallel(refresh, (states, by_row), states),
        fill=parallel(fill, (states, BY_STEP, BY_STEP), states),
        initialize=parallel(initialize, (states, by_row), (states, metrics)),
        reset=parallel(reset, (states,), states),
        restart=parallel(restart, (states, by_row), (states, metrics)),
        assign=parallel(assign, (states, by_row, REPLICATED), (states, metrics)),
        shardings=shardings,
    )


def _with_leaves_of(old, new, names):
    """A state of the optimizer with the old moments of the parameters ``names``."""

    def choose(path, before, after):
        rests = any(getattr(key, "key", None) in names for key in path)
        return before if rests else after

    return jax.tree_util.tree_map_with_path(choose, old, new) if names else new


def _forget_clusters(optimizer_state):
    """The state of the optimizer with zeros for the moments of what clusters learn."""

    def forget(path, leaf):
        of_clusters = any(getattr(key, "key", None) == "clusters" for key in path)
        return jnp.zeros_like(leaf) if of_clusters else leaf

    return jax.tree_util.tree_map_with_path(forget, optimizer_state)


class _Purpose(enum.IntEnum):
    """What a key of an epoch is for; the numbers decide what is drawn."""

    ORDER = 0
    VIEWS = 1
    CLUSTERS = 2
    RECLUSTERING = 3
    BATCH = 4
    OTHER_VIEWS = 5
    FRESH_LAYERS = 6
    CLUSTERS_AFTER_RESET = 7


def _epoch_key(state: TrainState, purpose: _Purpose) -> jax.Array:
    root = jax.random.wrap_key_data(state.key)
    return jax.random.fold_in(jax.random.fold_in(root, purpose), state.epoch)


def _term_names(objective, parameters, clusters, example_shape, clustering: bool) -> set[str]:
    """The loss terms that the objective returns in a phase, found by abstract evaluation.

    Raises:
      UserError: what it returns is not what `jkmeans.methods.base` asks for.
    """
    rows = 3
    x = jnp.zeros((rows, *example_shape), jnp.float32)
    batch = Batch(
        x=x,
        view=x,
        other_view=x,
        stored=jnp.zeros((rows, clusters.centroids.shape[1]), jnp.float32),
        weights=jnp.ones((rows,), jnp.float32),
        labels=jnp.zeros((rows,), jnp.int32),
        index=jnp.arange(rows, dtype=jnp.int32),
        key=jax.random.key(0),
        progress=jnp.float32(0),
        clustering=clustering,
    )
    returned = jax.eval_shape(objective, parameters, clusters, batch)
    where = f"objective.name: the objective, given {rows} examples, returns"
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise UserError(
            f"{where} {type(returned).__name__}; accepted: a pair of embeddings and a dict of terms"
        )
    embeddings, terms = returned
    wanted = (rows, clusters.centroids.shape[1])
    if getattr(embeddings, "shape", None) != wanted:
        raise UserError(
            f"{where} embeddings of shape {list(getattr(embeddings, 'shape', ()))}; accepted: "
            f"{list(wanted)}"
        )
    for name, values in terms.items():
        if not isinstance(name, str) or name == _COUNT:
            raise UserError(f"{where} a term named {name!r}; accepted: any other text")
        if getattr(values, "shape", None) != (rows,):
            raise UserError(
                f"{where} the term {name!r} of shape {list(getattr(values, 'shape', ()))}; "
                f"accepted: [{rows}], one value for each example"
            )
    return set(terms)
