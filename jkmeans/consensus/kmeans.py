"""Decentralised k-means: nodes keep their points, and agree on sums and counts by gossip.

Every node has centroids of its own, assigns its own points to them, and adds the change of its
cluster statistics to a running average (see `averaging`), which some rounds of gossip then mix.
What it holds afterwards is the mean statistics of all nodes up to a disagreement that fades from
iteration to iteration, for it starts from where the last iteration ended; its next centroids are
sums over counts. With enough rounds this is Lloyd's algorithm on the points of all nodes.

Source of the idea: Datta, Giannella and Kargupta, Approximate distributed k-means clustering over a
peer-to-peer network, IEEE TKDE 21 (2009); the tracking of sums is dynamic average consensus.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.consensus.averaging import Averaging, deviation, run_rounds
from jkmeans.consensus.links import Links
from jkmeans.kmeans.assignment import accumulation_dtype, assign
from jkmeans.kmeans.collectives import vary_like
from jkmeans.kmeans.statistics import ClusterStatistics, centroids_from, cluster_statistics


class Shares(NamedTuple):
    """The points of the nodes, each its own.

    Attributes:
      x: [m, r, d], any real dtype; padding after a node's points.
      counted: [m, r] float, 1 for a point and 0 for padding.
    """

    x: Any
    counted: Any


class State(NamedTuple):
    """Where the nodes are after an iteration.

    Attributes:
      centroids: each node's own, [m, k, d].
      average: the state of the `Averaging` of the statistics.
      local: each node's own statistics, `ClusterStatistics` of [m, ...].
      number: [] int32, iterations done.
      bound: [] float, on the disagreement; see `Trace`.
    """

    centroids: jax.Array
    average: Any
    local: ClusterStatistics
    number: jax.Array
    bound: jax.Array


class Trace(NamedTuple):
    """An iteration as a bystander sees it who sees all nodes.

    Attributes:
      inertia: Σ over all nodes of the inertia of its points with its centroids, before they move.
      disagreement: √(mean over nodes of ‖their average − the mean‖²) of sums and counts, after.
      bound: an upper bound on it, from the spectral gap; see `iterate`.
      spread: ‖a node's centroids − the mean over nodes‖ / √k, after, in units of x: [m].
    """

    inertia: jax.Array
    disagreement: jax.Array
    bound: jax.Array
    spread: jax.Array


def begin(averaging: Averaging, shares: Shares, centroids: jax.Array) -> State:
    """The state before the first iteration.

    Args:
      averaging: of the statistics.
      shares: of the nodes that are here.
      centroids: each node's first ones, [m, k, d].
    """
    dtype = accumulation_dtype(shares.x, centroids)
    m, k, d = centroids.shape
    zeros = ClusterStatistics(
        jnp.zeros((m, k, d), dtype), jnp.zeros((m, k), dtype), jnp.zeros(m, dtype)
    )
    zeros = jax.tree.map(lambda leaf: vary_like(leaf, shares.x, centroids), zeros)
    first = vary_like(centroids.astype(dtype), shares.x)
    return State(first, averaging.start(zeros), zeros, jnp.zeros((), jnp.int32), jnp.zeros(()))


def iterate(
    links: Links,
    averaging: Averaging,
    shares: Shares,
    state: State,
    n_iter: int,
    n_rounds: int,
    rate: float,
) -> tuple[State, Trace]:
    """Some iterations of decentralised k-means, as one loop.

    A cluster that is empty at all nodes keeps its centroid: the mean count is a multiple of 1/N, so
    a node takes less than half of that for none.

    The bound: a round shrinks the disagreement D of the averages to λ D at most, λ the ``rate`` of
    the mixing, and an iteration first adds that of the changes, so that
    D_{t+1} ≤ λ^R (D_t + ‖Δ_i − mean Δ‖). Links that fail void λ; with λ = 1 it still holds for
    symmetric gossip. Rounding comes on top: some units in the last place of the statistics.

    Args:
      links: of the nodes.
      averaging: of the statistics; the same as in `begin`.
      shares: of the nodes that are here.
      state: before.
      n_iter: iterations.
      n_rounds: R, rounds of gossip in each.
      rate: λ; for push-sum there is no such bound: NaN.

    Returns:
      The state, and a `Trace` of arrays [n_iter, ...], the same on all devices but for ``spread``.
    """
    n_nodes = links.n_nodes

    def of_node(x: jax.Array, counted: jax.Array, centroids: jax.Array) -> ClusterStatistics:
        found = assign(x, centroids)
        return cluster_statistics(
            x, found.labels, centroids.shape[0], weights=counted, distances=found.distances
        )

    def step(state: State, _: None) -> tuple[State, Trace]:
        # Node by node: a scatter of several nodes at once is slower, and their points are many.
        local = lax.map(lambda node: of_node(*node), (shares.x, shares.counted, state.centroids))
        change = jax.tree.map(jnp.subtract, local, state.local)
        average = averaging.add(state.average, change)
        first = state.number * n_rounds
        average, _ = run_rounds(averaging.round, average, n_rounds, first=first)
        found = averaging.read(average)
        counts = jnp.where(found.counts * n_nodes < 0.5, 0, found.counts)
        centroids = jax.vmap(centroids_from)(found._replace(counts=counts), state.centroids)

        def disagreement(statistics: ClusterStatistics) -> jax.Array:
            seen = (statistics.sums, statistics.counts)
            return deviation(links, seen, links.mean_of_all(seen))

        bound = rate**n_rounds * (state.bound + disagreement(change))
        away = centroids - links.mean_of_all(centroids)[None]
        trace = Trace(
            inertia=n_nodes * links.mean_of_all(local.inertia),
            disagreement=disagreement(found),
            bound=bound,
            spread=jnp.sqrt(jnp.sum(away**2, axis=(1, 2)) / centroids.shape[1]),
        )
        return State(centroids, average, local, state.number + 1, bound), trace

    return lax.scan(step, state, None, length=n_iter)


def agreed_centroids(
    averaging: Averaging,
    key: jax.Array,
    shares: Shares,
    n_clusters: int,
    n_rounds: int,
) -> jax.Array:
    """First centroids that no point is one of: normal, with the mean and variances of all points.

    The nodes agree on counts, sums and squares of each feature by gossip, and draw from the same
    key. They differ by what the rounds leave of disagreement.

    Args:
      averaging: of the moments; a fresh one.
      key: the same at all nodes.
      shares: of the nodes that are here.
      n_clusters: k.
      n_rounds: of gossip.

    Returns:
      [m, k, d].
    """
    dtype = accumulation_dtype(shares.x)
    x = jnp.where(shares.counted[:, :, None] > 0, shares.x, 0).astype(dtype)
    count = jnp.sum(shares.counted.astype(dtype), axis=1)
    moments = (count, jnp.sum(x, axis=1), jnp.sum(x**2, axis=1))
    state, _ = run_rounds(averaging.round, averaging.start(moments), n_rounds)
    count, sums, squares = averaging.read(state)
    mean = sums / count[:, None]
    deviations = jnp.sqrt(jnp.maximum(squares / count[:, None] - mean**2, 0))
    noise = jax.random.normal(key, (1, n_clusters, x.shape[-1]), dtype)
    return mean[:, None, :] + deviations[:, None, :] * noise
