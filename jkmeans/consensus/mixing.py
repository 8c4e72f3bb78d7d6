"""Mixing weights: how much of its neighbours' values a node takes in each round, and how fast.

With W the symmetric matrix of weights (w_ii = 1 − Σ_j w_ij) a round of gossip is x ← W x. W is
doubly stochastic, so that the mean of x stays; how fast the rest fades is the spectral gap.

Source: Xiao and Boyd, Fast linear iterations for distributed averaging, Systems & Control Letters
53 (2004); Metropolis weights: Xiao, Boyd and Lall, IPSN 2005.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array, csc_array, csr_array
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from jkmeans.consensus.graphs import Graph
from jkmeans.errors import UserError

_DENSE_NODES = 500
_ZERO = 1e-12
_BESIDE = 1e-10
_RESTARTS = 100


class Mixing(NamedTuple):
    """Symmetric weights on the edges of a graph.

    Attributes:
      graph: of N nodes and E edges.
      weights: w_ij of each edge, [E] float64, above 0; at each node they add up to 1 at most.
    """

    graph: Graph
    weights: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """w_ii, what a node keeps of its own value: [N] float64."""
        kept = np.ones(self.graph.n_nodes)
        np.subtract.at(kept, self.graph.edges.ravel(), np.repeat(self.weights, 2))
        return kept

    def matrix(self) -> csr_array:
        """W, [N, N] sparse: for checks and spectra, not for mixing."""
        n, (i, j) = self.graph.n_nodes, self.graph.edges.T
        node = np.arange(n)
        values = np.concatenate([self.weights, self.weights, self.own])
        rows, columns = np.concatenate([i, j, node]), np.concatenate([j, i, node])
        return csr_array(coo_array((values, (rows, columns)), shape=(n, n)))


class Spectrum(NamedTuple):
    """What the eigenvalues 1 = λ₁ > λ₂ ≥ … ≥ λ_N > −1 of W say about gossip.

    Attributes:
      second: λ₂.
      last: λ_N.
      slowest: [N] float64, a mode of eigenvalue ±``rate``, of length one: the worst start.
    """

    second: float
    last: float
    slowest: np.ndarray

    @property
    def rate(self) -> float:
        """max(λ₂, −λ_N), what is left of the distance to the mean after a round, at most."""
        return max(self.second, -self.last, 0.0)

    @property
    def gap(self) -> float:
        """1 − ``rate``."""
        return 1 - self.rate

    def rounds(self, relative: float) -> int:
        """Rounds after which the distance to the mean is so many times the first one, at most."""
        if self.rate < _ZERO:
            return 1
        return max(1, math.ceil(math.log(relative) / math.log(self.rate)))


def metropolis(graph: Graph) -> Mixing:
    """w_ij = 1 / (1 + max(degree of i, degree of j)): a node asks its neighbours' degrees only."""
    return Mixing(graph, 1 / (1 + graph.degrees[graph.edges].max(axis=1)))


def maximum_degree(graph: Graph) -> Mixing:
    """w_ij = 1 / (1 + Δ), with the largest degree Δ of all nodes, which all must know."""
    return Mixing(graph, np.full(graph.n_edges, 1 / (1 + graph.degrees.max())))


def given(graph: Graph) -> Mixing:
    """The weights that came with the edges.

    Raises:
      UserError: there are none, or those of a node add up to more than 1, or W has an eigenvalue
        of −1 or a second one of 1, so that gossip never ends.
    """
    if graph.weights is None:
        raise UserError(
            f"the graph {graph.name!r} has no weights, which mixing 'given' needs; accepted: "
            "edges with weights, or 'metropolis' or 'maximum_degree'"
        )
    mixing = Mixing(graph, graph.weights)
    node = int(np.argmin(mixing.own))
    if mixing.own[node] < -_ZERO:
        raise UserError(
            f"the weights of the graph {graph.name!r} add up to {1 - mixing.own[node]:g} at node "
            f"{node}; accepted: at most 1, for what is left is the weight of its own value"
        )
    found = spectrum(mixing)
    if found.second > 1 - _ZERO:
        raise UserError(
            f"the weights of the graph {graph.name!r} have a second eigenvalue of 1 − "
            f"{1 - found.second:.1g}, with which nodes never agree; accepted: larger weights (the "
            f"smallest is {mixing.weights.min():g})"
        )
    if found.last < -1 + _ZERO:
        raise UserError(
            f"the weights of the graph {graph.name!r} have an eigenvalue of {found.last:g}, with "
            "which gossip swings for ever; accepted: smaller weights"
        )
    return mixing


MIXINGS: dict[str, Callable[[Graph], Mixing]] = {
    "metropolis": metropolis,
    "maximum_degree": maximum_degree,
    "given": given,
}
"""Makers of mixing weights by name."""


def make_mixing(name: str, graph: Graph) -> Mixing:
    """The mixing weights of a name in `MIXINGS`.

    Raises:
      UserError: an unknown name; or see `given`.
    """
    if name not in MIXINGS:
        raise UserError(f"mixing weights are {name!r}; accepted: {', '.join(map(repr, MIXINGS))}")
    return MIXINGS[name](graph)


def spectrum(mixing: Mixing) -> Spectrum:
    """λ₂, λ_N and the slowest mode; by a dense solver up to 500 nodes, by Lanczos beyond.

    Where gossip is slow the end of the spectrum is crowded, and Lanczos finds it in the inverse:
    such a graph has bottlenecks, so that its matrix takes little room when it is factorized.
    """
    return _spectrum(mixing.graph, mixing.weights.tobytes())


@functools.lru_cache(maxsize=64)
def _spectrum(graph: Graph, weights: bytes) -> Spectrum:
    matrix = Mixing(graph, np.frombuffer(weights)).matrix()
    if graph.n_nodes <= _DENSE_NODES:
        values, modes = np.linalg.eigh(matrix.toarray())
        upper, lower = (values[-2], modes[:, -2]), (values[0], modes[:, 0])
    else:
        start = np.random.default_rng(0).standard_normal(graph.n_nodes)
        # No eigenvalue is above 1, nor below the least of 2 w_ii − 1 (Gershgorin).
        top, top_modes = _end_of_spectrum(matrix, start, 2, "LA", 1 + _BESIDE)
        floor = 2 * float(matrix.diagonal().min()) - 1
        low, low_modes = _end_of_spectrum(matrix, start, 1, "SA", floor - _BESIDE)
        least = int(np.argmin(top))
        upper, lower = (top[least], top_modes[:, least]), (low[0], low_modes[:, 0])
    slowest = upper[1] if upper[0] >= -lower[0] else lower[1]
    return Spectrum(float(upper[0]), float(lower[0]), slowest)


def _end_of_spectrum(
    matrix: csr_array, start: np.ndarray, k: int, which: str, beside: float
) -> Any:
    """The k largest ("LA") or smallest ("SA") eigenvalues [k], and their modes [N, k].

    Args:
      matrix: W.
      start: of the search, [N].
      k: how many.
      which: of which end.
      beside: a number just beyond that end.
    """
    try:
        return eigsh(matrix, k=k, which=which, v0=start, maxiter=_RESTARTS)
    except ArpackNoConvergence:
        return eigsh(csc_array(matrix), k=k, sigma=beside, v0=start)
