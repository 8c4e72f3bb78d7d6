"""Averages by gossip: every node ends with the mean of all, and hears its neighbours only.

An `Averaging` is a few pure functions that work on the nodes of one device. Changes may be added
while it runs (dynamic average consensus: Zhu and Martínez, Automatica 46 (2010)), so that nodes
follow a mean that moves, from where they are.

* `symmetric`: x_i ← x_i + Σ_j w_ij (x_j − x_i). A link that fails in a round fails both ways and
  its term is missing at both ends: the weight goes back to both, W stays doubly stochastic and the
  mean stays.
* `push_sum`: each message may be lost on its own, and nobody is told. Nodes push shares of a mass,
  which is a value and a weight, and the ratio of the two is the estimate. A node sends how much it
  has pushed to a neighbour since the beginning, and the neighbour takes what is new to it: the next
  message that arrives brings what the lost ones carried, and no mass is lost.

Sources: Xiao and Boyd 2004 (see `mixing`); Kempe, Dobra and Gehrke, FOCS 2003 (push-sum);
Hadjicostis, Vaidya and Domínguez-García, IEEE Trans. Automatic Control 61 (2016) (running sums).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans.consensus.graphs import Graph
from jkmeans.consensus.links import Links, Tree, along, where_each
from jkmeans.consensus.mixing import Mixing
from jkmeans.errors import UserError
from jkmeans.kmeans.collectives import vary_like


class Averaging(NamedTuple):
    """A way to average.

    Attributes:
      start: values [m, ...] -> state.
      add: (state, change [m, ...]) -> state; the mean moves by the mean of the changes.
      round: (state, number of the round) -> state; one exchange with the neighbours.
      read: state -> each node's estimate of the mean, [m, ...].
    """

    start: Callable[[Tree], Any]
    add: Callable[[Any, Tree], Any]
    round: Callable[[Any, jax.Array], Any]
    read: Callable[[Any], Tree]


def mix(links: Links, mixing: Mixing, values: Tree, arrived: jax.Array | None = None) -> Tree:
    """W x, one round of symmetric gossip, as x_i + Σ_j w_ij (x_j − x_i).

    In this form the two ends of an edge add the same number with opposite signs, and nodes that
    agree stay as they are to the bit.

    Args:
      links: of the nodes.
      mixing: the weights.
      values: x, [m, ...].
      arrived: [E] bool, the links that work; None for all.
    """
    weights = jnp.asarray(mixing.weights)
    if arrived is not None:
        weights = jnp.where(arrived, weights, 0)

    def arrive(here: Tree, there: Tree, number: jax.Array, slot: Tree) -> tuple[Tree, Tree]:
        w = weights[number // 2]
        return jax.tree.map(lambda a, b: along(w, a) * (b - a), here, there), slot

    total, _ = links.exchange(values, arrive)
    return jax.tree.map(jnp.add, values, total)


def working_links(key: jax.Array, number: jax.Array, n: int, loss: float) -> jax.Array | None:
    """Which of n links, or messages, get through in a round: [n] bool; None if none is ever lost.

    Args:
      key: a JAX random key, the same for all nodes.
      number: [] int, of the round.
      n: how many.
      loss: the probability that one is lost, each on its own.
    """
    if not loss:
        return None
    return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - loss, (n,))


def symmetric(
    links: Links, mixing: Mixing, key: jax.Array | None = None, loss: float = 0.0
) -> Averaging:
    """Gossip by symmetric weights.

    Args:
      links: of the nodes.
      mixing: the weights.
      key: of the failures; None if there are none.
      loss: the probability that a link fails in a round, in both directions.
    """
    n = mixing.graph.n_edges

    def round_(values: Tree, number: jax.Array) -> Tree:
        arrived = None if key is None else working_links(key, number, n, loss)
        return mix(links, mixing, values, arrived)

    return Averaging(lambda values: values, _plus, round_, lambda values: values)


class Masses(NamedTuple):
    """The state of `push_sum`.

    Attributes:
      mass: what each node holds: values [m, ...] and their weight [m].
      sent: σ, what it has pushed to each of its neighbours since the beginning, of the same shapes.
      heard: ρ, what it has taken from each neighbour since the beginning: slots of the links.
    """

    mass: Tree
    sent: Tree
    heard: Tree


def push_sum(links: Links, key: jax.Array | None = None, loss: float = 0.0) -> Averaging:
    """Gossip by running sums of mass, which loses none whatever messages are lost.

    In each round a node keeps 1 / (1 + degree) of its mass, and pushes as much to each neighbour.

    Args:
      links: of the nodes.
      key: of the losses; None if there are none.
      loss: the probability that a message is lost, each direction of an edge on its own.
    """
    graph = links.graph
    degrees = np.asarray(graph.degrees)

    def start(values: Tree) -> Masses:
        first = jax.tree.leaves(values)[0]
        weight = vary_like(jnp.ones(first.shape[0], first.dtype), first)
        return resume(links, (values, weight))

    def add(state: Masses, change: Tree) -> Masses:
        values, weight = state.mass
        return state._replace(mass=(_plus(values, change), weight))

    def round_(state: Masses, number: jax.Array) -> Masses:
        arrived = None
        if key is not None:
            arrived = working_links(key, number, 2 * graph.n_edges, loss)
        degree = links.of_nodes(degrees)

        def push(mass: jax.Array, sent: jax.Array) -> jax.Array:
            return sent + mass / (along(degree, mass) + 1)

        def keep(mass: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
            # What a running sum really grew by, its rounding included, is what leaves the node: so
            # long sums cost resolution, but no mass.
            return mass - along(degree, mass) * (after - before)

        sent = jax.tree.map(push, state.mass, state.sent)
        kept = jax.tree.map(keep, state.mass, state.sent, sent)

        def arrive(here: Tree, there: Tree, edge: jax.Array, heard: Tree) -> tuple[Tree, Tree]:
            del here
            if arrived is not None:
                there = where_each(arrived[edge], there, heard)
            return jax.tree.map(jnp.subtract, there, heard), there

        taken, heard = links.exchange(sent, arrive, state.heard)
        return Masses(_plus(kept, taken), sent, heard)

    def read(state: Masses) -> Tree:
        values, weight = state.mass
        return jax.tree.map(lambda leaf: leaf / along(weight, leaf), values)

    return Averaging(start, add, round_, read)


def run_rounds(
    step: Callable[[Any, jax.Array], Any],
    state: Any,
    n_rounds: int,
    *,
    first: jax.Array | int = 0,
    record: Callable[[Any], Tree] | None = None,
) -> tuple[Any, Tree]:
    """Some rounds as one loop of the program.

    Args:
      step: (state, number of the round) -> state.
      state: before.
      n_rounds: T.
      first: the number of the first round.
      record: what to keep of each state; None for nothing.

    Returns:
      The state after T rounds, and the records: before the first round and after each, [T+1, ...];
      () without them.
    """
    if record is None:
        return lax.fori_loop(first, first + n_rounds, lambda t, s: step(s, t), state), ()

    def recorded(state: Any, number: jax.Array) -> tuple[Any, Tree]:
        state = step(state, number)
        return state, record(state)

    before = record(state)
    state, after = lax.scan(recorded, state, first + jnp.arange(n_rounds))
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), before, after)


def deviation(links: Links, values: Tree, reference: Tree) -> jax.Array:
    """√(mean over nodes of ‖x_i − reference‖²): [] float, for curves, not for the nodes.

    Args:
      links: of the nodes.
      values: x, [m, ...].
      reference: [...], the same for all nodes.
    """

    def squares(value: jax.Array, target: jax.Array) -> jax.Array:
        differences = (value - target[None]).reshape(value.shape[0], -1)
        return jnp.sum(differences**2, axis=1)

    per_node = sum(jax.tree.leaves(jax.tree.map(squares, values, reference)))
    return jnp.sqrt(links.mean_of_all(per_node))


def leave(
    graph: Graph, masses: Tree, node: int, *, own: Tree | None = None
) -> tuple[Graph, Tree, np.ndarray]:
    """A node leaves: it hands its mass to its neighbours in equal parts, and the graph closes.

    The others go on as `push_sum` from the masses that are returned (`resume`). Only masses can be
    handed over: a value without its weight would count for two.

    Args:
      graph: before.
      masses: (values [N, ...], weights [N]) of all nodes, as in `Masses`, with nothing under way.
      node: who leaves.
      own: its own contribution to the mean, [...] for each value, which it takes along: the others
        then find the mean of those who remain. None: its contribution stays in the mean.

    Returns:
      The graph without the node, the masses of the others, and their old numbers, [N − 1].

    Raises:
      UserError: without the node the graph is not connected; nothing has happened then.
    """
    smaller, kept = graph.without([node])
    heirs = graph.neighbours(node)
    values, weights = jax.tree.map(np.array, masses)
    handed = jax.tree.map(lambda leaf: leaf[node], (values, weights))
    if own is not None:
        gone = (jax.tree.map(np.asarray, own), np.ones_like(weights[node]))
        handed = jax.tree.map(np.subtract, handed, gone)

    def hand_over(leaf: np.ndarray, part: np.ndarray) -> np.ndarray:
        leaf[heirs] += part / len(heirs)
        return leaf[kept]

    return smaller, jax.tree.map(hand_over, (values, weights), handed), kept


def resume(links: Links, masses: Tree) -> Masses:
    """The state of `push_sum` from (values [m, ...], weights [m]), with nothing under way."""
    return Masses(masses, jax.tree.map(jnp.zeros_like, masses), links.slots(masses))


def settle(links: Links, state: Masses) -> Tree:
    """The masses once everything under way has arrived, as after one round without losses.

    Before somebody leaves: a message that was lost would never be made up for.
    """

    def arrive(here: Tree, there: Tree, edge: jax.Array, heard: Tree) -> tuple[Tree, Tree]:
        del here, edge
        return jax.tree.map(jnp.subtract, there, heard), there

    return _plus(state.mass, links.exchange(state.sent, arrive, state.heard)[0])


def check_loss(name: str, loss: float) -> None:
    """Refuses a probability of loss with which nothing ever arrives.

    Raises:
      UserError: it is not in 0 ≤ p < 1.
    """
    if not 0 <= loss < 1:
        raise UserError(f"{name} is {loss}; accepted: a probability of at least 0 and below 1")


def _plus(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)
