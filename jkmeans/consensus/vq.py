"""Decentralised vector quantization: every node quantizes its own samples, neighbours mix.

The schemes A and B of `jkmeans.vq.schemes` without anybody who hears all: after τ samples a node
has moved its prototypes by Δ^i, and then some rounds of gossip mix w^i − Δ^i (averaging, a mean of
M moves is as long as one), or w^i − N Δ^i (displacements: the mean over nodes then moves by their
sum). On a complete graph a round is exact, and these are the schemes themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.consensus.averaging import Averaging, deviation, run_rounds
from jkmeans.consensus.links import Links
from jkmeans.kmeans.assignment import assign
from jkmeans.kmeans.statistics import inertia_of
from jkmeans.vq.sequential import displacement, quantize
from jkmeans.vq.simulation import Shares
from jkmeans.vq.steps import Steps

GAINS: dict[str, Callable[[int], float]] = {
    "averaging": lambda n_nodes: 1.0,
    "displacements": float,
}
"""What displacements are multiplied by before they are mixed, from the number of nodes."""


class Trace(NamedTuple):
    """After each evaluation, as a bystander sees it who sees all nodes.

    Attributes:
      distortion: the mean over all samples of the squared distance to the nearest of the prototypes
        of their own node.
      spread: √(mean over nodes of ‖w^i − mean‖²) / √k, in units of the samples.
    """

    distortion: jax.Array
    spread: jax.Array


def quantize_together(
    links: Links,
    averaging: Averaging,
    shares: Shares,
    prototypes: jax.Array,
    steps: Steps,
    *,
    gain: float,
    tau: int,
    n_rounds: int,
    n_exchanges: int,
    n_evaluations: int,
) -> tuple[jax.Array, Trace]:
    """Vector quantization on all nodes at once.

    Args:
      links: of the nodes.
      averaging: `symmetric`, or `push_sum`, whose state is carried through.
      shares: of the nodes that are here; node i sees its samples in their order, again and again.
      prototypes: w(0), [m, k, d], the same at all nodes.
      steps: see `jkmeans.vq.steps`.
      gain: see `GAINS`.
      tau: τ, samples between two exchanges.
      n_rounds: of gossip in each exchange.
      n_exchanges: from one evaluation to the next.
      n_evaluations: E.

    Returns:
      Each node's prototypes [m, k, d], and a `Trace` with [E+1] numbers each, the same on all
      devices.
    """

    def exchange(number: jax.Array, average):
        t = number * tau
        before = averaging.read(average)
        rows = (t + jnp.arange(tau))[None, :] % shares.counts[:, None]
        samples = jax.vmap(lambda own, rows: own[rows])(shares.samples, rows)
        after = jax.vmap(quantize, in_axes=(0, 0, None, None))(before, samples, t, steps)
        move = -gain * jax.vmap(displacement)(before, after)
        return run_rounds(
            averaging.round, averaging.add(average, move), n_rounds, first=number * n_rounds
        )[0]

    def seen(average) -> Trace:
        prototypes = averaging.read(average)

        def of_node(node):
            samples, count, own = node
            counted = jnp.arange(samples.shape[0]) < count
            distances = assign(samples, own).distances
            return inertia_of(distances, counted.astype(distances.dtype))

        sums = lax.map(of_node, (shares.samples, shares.counts, prototypes))
        counts = shares.counts.astype(sums.dtype)
        return Trace(
            links.mean_of_all(sums) / links.mean_of_all(counts),
            deviation(links, prototypes, links.mean_of_all(prototypes))
            / prototypes.shape[1] ** 0.5,
        )

    def evaluate(average, first: jax.Array):
        average = lax.fori_loop(first, first + n_exchanges, exchange, average)
        return average, seen(average)

    average = averaging.start(prototypes)
    before = seen(average)
    average, after = lax.scan(evaluate, average, n_exchanges * jnp.arange(n_evaluations))
    trace = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), before, after)
    return averaging.read(average), trace
