"""Decentralised training of a network: every node has parameters of its own, neighbours mix them.

Of any model and loss that are a `Problem`. In a step every node draws a batch of its own examples
and takes a step of its own optimizer; then one round of gossip mixes the parameters (Lian et al.,
Can decentralized algorithms outperform centralized algorithms?, NeurIPS 2017). Beside it: the same
with the mean gradient of all nodes (an all-reduce), and with no communication at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jkmeans.consensus.averaging import mix, working_links
from jkmeans.consensus.links import Links, Tree
from jkmeans.consensus.mixing import Mixing
from jkmeans.errors import UserError
from jkmeans.problems import Problem

MODES = ("all_reduce", "gossip", "alone")
DEALS = ("shuffled", "sorted")


class Shares(NamedTuple):
    """The examples of the nodes.

    Attributes:
      examples: a pytree of [m, r, ...]; rows after a node's own are padding.
      counts: [m] int32, how many each node has.
    """

    examples: Any
    counts: Any


class State(NamedTuple):
    """Where the nodes are.

    Attributes:
      parameters: each node's own, a pytree of [m, ...].
      optimizer: each node's own state of the optimizer, likewise.
      number: [] int32, steps done.
    """

    parameters: Tree
    optimizer: Any
    number: jax.Array


def deal_examples(problem: Problem, n_nodes: int, deal: str, seed: int) -> Shares:
    """Deals the examples of a problem to nodes.

    Args:
      problem: of n examples.
      n_nodes: N, at most n.
      deal: "shuffled"; or "sorted" by the last array of the examples, which must be their classes:
        then a node has seen few of them, the hard case.
      seed: of the order.

    Raises:
      UserError: fewer examples than nodes, or nothing to sort by.
    """
    leaves = jax.tree.leaves(problem.examples)
    n = len(leaves[0])
    if n < n_nodes:
        raise UserError(
            f"there are {n} examples for {n_nodes} nodes; accepted: at least one for each"
        )
    order = np.random.default_rng(seed).permutation(n)
    if deal == "sorted":
        classes = np.asarray(leaves[-1])
        if classes.ndim != 1:
            raise UserError(
                f"the last array of the examples has shape {list(classes.shape)}, by which they "
                "cannot be sorted; accepted: one number for each, or deal 'shuffled'"
            )
        order = order[np.argsort(classes[order], kind="stable")]
    parts = np.array_split(order, n_nodes)
    counts = np.array([len(part) for part in parts], np.int32)
    # Padding repeats a node's first example; no step draws it.
    rows = np.stack([np.pad(part, (0, counts[0] - len(part)), "wrap") for part in parts])
    return Shares(jax.tree.map(lambda leaf: np.asarray(leaf)[rows], problem.examples), counts)


def begin(
    problem: Problem, optimizer: optax.GradientTransformation, links: Links, key: jax.Array
) -> State:
    """All nodes begin with the same parameters, drawn from the same key."""
    parameters = problem.init(key)
    numbers = links.of_nodes(np.arange(links.n_nodes))

    def one_each(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        # Added to something of the nodes, so that on a mesh each device has its own.
        own = 0 * numbers.reshape(-1, *(1,) * leaf.ndim)
        return jnp.expand_dims(leaf, 0) + own.astype(leaf.dtype)

    parameters = jax.tree.map(one_each, parameters)
    return State(parameters, jax.vmap(optimizer.init)(parameters), jnp.zeros((), jnp.int32))


def train(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    links: Links,
    mixing: Mixing,
    shares: Shares,
    state: State,
    key: jax.Array,
    *,
    mode: str,
    batch_size: int,
    n_steps: int,
    loss_of_links: float = 0.0,
) -> tuple[State, jax.Array]:
    """Some steps of all nodes, as one loop.

    Args:
      problem: its ``loss`` is used.
      optimizer: each node's.
      links: of the nodes.
      mixing: the weights of "gossip".
      shares: of the nodes that are here.
      state: before.
      key: the same on all devices: of batches and failing links.
      mode: one of MODES.
      batch_size: B, examples of a node's batch, drawn with replacement.
      n_steps: T.
      loss_of_links: the probability that a link fails in a round of gossip.

    Returns:
      The state, and the mean loss over nodes and steps, [] float.

    Raises:
      UserError: the mode is unknown.
    """
    if mode not in MODES:
        raise UserError(f"the mode is {mode!r}; accepted: {', '.join(map(repr, MODES))}")
    numbers = links.of_nodes(np.arange(links.n_nodes))
    batches, failures = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def of_node(parameters: Tree, examples: Any, count: jax.Array, key: jax.Array):
        rows = jax.random.randint(key, (batch_size,), 0, count)
        batch = jax.tree.map(lambda leaf: leaf[rows], examples)
        return jax.value_and_grad(problem.loss)(parameters, batch)

    def step(state: State, _: None) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(batches, state.number)
        keys = jax.vmap(lambda node: jax.random.fold_in(key, node))(numbers)
        losses, gradients = jax.vmap(of_node)(
            state.parameters, shares.examples, shares.counts, keys
        )
        if mode == "all_reduce":
            mean = links.mean_of_all(gradients)
            gradients = jax.tree.map(lambda one, own: one[None] + 0 * own, mean, gradients)
        updates, optimizer_state = jax.vmap(optimizer.update)(
            gradients, state.optimizer, state.parameters
        )
        parameters = optax.apply_updates(state.parameters, updates)
        if mode == "gossip":
            arrived = working_links(failures, state.number, mixing.graph.n_edges, loss_of_links)
            parameters = mix(links, mixing, parameters, arrived)
        state = State(parameters, optimizer_state, state.number + 1)
        return state, links.mean_of_all(losses)

    state, losses = lax.scan(step, state, None, length=n_steps)
    return state, jnp.mean(losses)
