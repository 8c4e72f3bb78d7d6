"""Estimates that minimise the mean of all nodes' functions, f(x) = 1/N Σ_i f_i(x), with neighbours.

Every method is a start and a round over arrays [m, n] of the nodes of one device, and takes any
gradient. With ∇_i = ∇f_i(x_i), W the mixing matrix and η the step:

| method | round | limit |
| --- | --- | --- |
| `gradient_descent` | x ← x − η mean of ∇_i, by an all-reduce | the optimum |
| `decentralised_descent` | x ← W x − η ∇ | near it: the bias is of order η |
| `gradient_tracking` | x ← V (x − η g), g ← V (g + ∇(new x) − ∇(x)), V = (I + W)/2 | the optimum |
| `extra` | x⁺ ← (I + W) x − V x⁻ − η (∇(x) − ∇(x⁻)) | the optimum |

The mean, not the sum: a step is as long for a thousand nodes as for ten.

Sources: Nedić and Ozdaglar, IEEE TAC 54 (2009) (decentralised descent); Yuan, Ling and Yin, SIAM J.
Optim. 26 (2016) (its step and bias); Xu, Zhu, Soh and Xie, CDC 2015, and Di Lorenzo and Scutari,
IEEE TSIPN 2 (2016) (gradient tracking); Xu, Tian, Sun and Scutari, IEEE TSP 69 (2021) (its step, of
any network, for V); Shi, Ling, Wu and Yin, SIAM J. Optim. 25 (2015) (EXTRA).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans.consensus.averaging import mix, working_links
from jkmeans.consensus.graphs import Graph
from jkmeans.consensus.links import Links
from jkmeans.consensus.mixing import Mixing, spectrum
from jkmeans.errors import UserError

Gradient = Callable[[jax.Array], jax.Array]
"""From x [m, n], each node's own point, to ∇f_i(x_i) [m, n], of each node's own function."""

Mix = Callable[[jax.Array, jax.Array], jax.Array]
"""(values [m, n], number of the round) -> W values."""


class LeastSquares(NamedTuple):
    """Noisy linear measurements y_i = A_i x + v_i, the same number at each node.

    f_i(x) = ½ ‖A_i x − y_i‖².

    Attributes:
      matrix: A, [N, r, n].
      measured: y, [N, r].
    """

    matrix: Any
    measured: Any

    def gradient(self, x: jax.Array) -> jax.Array:
        """∇f_i(x_i) = A_iᵀ (A_i x_i − y_i) of the nodes that are here: [m, n] -> [m, n]."""
        residual = jnp.einsum("mrn,mn->mr", self.matrix, x, precision=_EXACT) - self.measured
        return jnp.einsum("mrn,mr->mn", self.matrix, residual, precision=_EXACT)


_EXACT = lax.Precision.HIGHEST


class Curvature(NamedTuple):
    """Largest eigenvalues of second derivatives, on which the bounds of steps depend.

    Attributes:
      mean: L of f, the mean of all f_i.
      least: the smallest eigenvalue of f's second derivative: 0 where measurements leave x open.
      node: the largest L_i of all f_i.
    """

    mean: float
    least: float
    node: float


class Method(NamedTuple):
    """A method.

    Attributes:
      start: x [m, n] -> state, with a field ``x``.
      round: (state, number of the round) -> state.
    """

    start: Callable[[jax.Array], Any]
    round: Callable[[Any, jax.Array], Any]


class _Point(NamedTuple):
    x: jax.Array


class _Tracked(NamedTuple):
    x: jax.Array
    direction: jax.Array
    gradient: jax.Array


class _Extra(NamedTuple):
    x: jax.Array
    before: jax.Array
    gradient_before: jax.Array
    mixed_before: jax.Array


def gradient_descent(links: Links, mix: Mix, gradient: Gradient, step: float) -> Method:
    """X ← x − η 1/N Σ_i ∇f_i(x), the same x at all nodes: what an all-reduce affords."""
    del mix

    def round_(state: _Point, number: jax.Array) -> _Point:
        del number
        mean = links.mean_of_all(gradient(state.x))
        return _Point(state.x - step * mean[None])

    return Method(_Point, round_)


def decentralised_descent(links: Links, mix: Mix, gradient: Gradient, step: float) -> Method:
    """X ← W x − η ∇: one exchange a round; its fixed point is off by the order of η."""
    del links

    def round_(state: _Point, number: jax.Array) -> _Point:
        return _Point(mix(state.x, number) - step * gradient(state.x))

    return Method(_Point, round_)


def gradient_tracking(links: Links, mix: Mix, gradient: Gradient, step: float) -> Method:
    """Each node follows the mean gradient by dynamic averaging: two exchanges a round.

    x ← V (x − η g), g ← V (g + ∇(new x) − ∇(x)), V = (I + W)/2; the mean of g is that of the
    gradients after every round, whichever links fail.
    """
    del links

    def lazily(values: jax.Array, number: jax.Array) -> jax.Array:
        return (values + mix(values, number)) / 2

    def start(x: jax.Array) -> _Tracked:
        first = gradient(x)
        return _Tracked(x, first, first)

    def round_(state: _Tracked, number: jax.Array) -> _Tracked:
        x = lazily(state.x - step * state.direction, number)
        new = gradient(x)
        return _Tracked(x, lazily(state.direction + new - state.gradient, number), new)

    return Method(start, round_)


def extra(links: Links, mix: Mix, gradient: Gradient, step: float) -> Method:
    """EXTRA: two steps back correct the bias, with one exchange a round. For links that hold.

    x¹ = W x⁰ − η ∇(x⁰); x⁺ = (I + W) x − V x⁻ − η (∇(x) − ∇(x⁻)).
    """
    del links

    def start(x: jax.Array) -> _Extra:
        zeros = jnp.zeros_like(x)
        return _Extra(x, x, zeros, x)

    def round_(state: _Extra, number: jax.Array) -> _Extra:
        slope, mixed = gradient(state.x), mix(state.x, number)
        # W x⁻ was heard a round ago and is kept; before round 0 there is none.
        correction = state.x - (state.before + state.mixed_before) / 2
        correction = jnp.where(number == 0, 0, correction)
        x = mixed + correction - step * (slope - state.gradient_before)
        return _Extra(x, state.x, slope, mixed)

    return Method(start, round_)


METHODS: dict[str, Callable[[Links, Mix, Gradient, float], Method]] = {
    "gradient_descent": gradient_descent,
    "decentralised_descent": decentralised_descent,
    "gradient_tracking": gradient_tracking,
    "extra": extra,
}
"""Makers of methods by name."""

EXCHANGES = {
    "gradient_descent": 0,
    "decentralised_descent": 1,
    "gradient_tracking": 2,
    "extra": 1,
}
"""Exchanges of n numbers with the neighbours in a round; gradient descent all-reduces instead."""


def make_method(
    name: str,
    links: Links,
    mixing: Mixing,
    gradient: Gradient,
    step: float,
    *,
    key: jax.Array | None = None,
    loss: float = 0.0,
) -> Method:
    """The method of a name, on links of which some may fail.

    Args:
      name: a key of `METHODS`.
      links: of the nodes.
      mixing: the weights.
      gradient: see `Gradient`.
      step: η; see `largest_step`.
      key: of the failures; None if there are none.
      loss: the probability that a link fails in a round, in both directions.

    Raises:
      UserError: an unknown name, or "extra" with links that fail.
    """
    if name not in METHODS:
        raise UserError(f"the method is {name!r}; accepted: {', '.join(map(repr, METHODS))}")
    if name == "extra" and loss:
        raise UserError(
            f"links fail with probability {loss:g}, which EXTRA does not stand (it needs the same "
            "W in every round); accepted: 'gradient_tracking', or no failures"
        )

    def mix_in_round(values: jax.Array, number: jax.Array) -> jax.Array:
        arrived = None
        if key is not None:
            arrived = working_links(key, number, mixing.graph.n_edges, loss)
        return mix(links, mixing, values, arrived)

    return METHODS[name](links, mix_in_round, gradient, step)


def largest_step(name: str, curvature: Curvature, mixing: Mixing) -> float:
    """The bound on η below which a method is stable, for any f_i with these curvatures.

    2/L for gradient descent; (1 + λ_N(W)) / max L_i for decentralised descent (Yuan, Ling and Yin
    2016) and EXTRA (Shi et al. 2015, theorem 3.3); 2 / max L_i for gradient tracking, whatever the
    network, because V has no negative eigenvalue (Xu et al. 2021).
    """
    if name == "gradient_descent":
        return 2 / curvature.mean
    if name == "gradient_tracking":
        return 2 / curvature.node
    return (1 + spectrum(mixing).last) / curvature.node


def suggested_step(name: str, curvature: Curvature, mixing: Mixing) -> float:
    """A step that is stable and not slow.

    2 / (L + μ) for gradient descent, which is the best; half the bound for decentralised descent
    and EXTRA. For gradient tracking the part max(0.03, gap of V) of its bound, and half at most:
    with a longer step nodes are slow to agree, with a shorter one slow to descend; found by trying,
    on graphs of 16 and of 1,000 nodes.
    """
    bound = largest_step(name, curvature, mixing)
    if name == "gradient_descent":
        return 2 / (curvature.mean + curvature.least)
    if name == "gradient_tracking":
        return bound * min(0.5, max(0.03, (1 - spectrum(mixing).second) / 2))
    return bound / 2


def check_step(name: str, step: float, curvature: Curvature, mixing: Mixing) -> None:
    """Refuses a step at or beyond the bound of `largest_step`.

    Raises:
      UserError: with the bound.
    """
    bound = largest_step(name, curvature, mixing)
    if not 0 < step < bound:
        raise UserError(
            f"the step of {name!r} on the graph {mixing.graph.name!r} is {step:g}; accepted: above "
            f"0 and below its stability bound, {bound:.4g}"
        )


def curvature(problem: LeastSquares) -> Curvature:
    """Of least squares: eigenvalues of 1/N Σ A_iᵀA_i and of each A_iᵀA_i, in float64."""
    a = np.asarray(problem.matrix, np.float64)
    values = np.linalg.eigvalsh(np.einsum("irn,irk->nk", a, a) / len(a))
    largest = np.linalg.svd(a, compute_uv=False)[:, 0].max() ** 2
    return Curvature(float(values[-1]), float(max(values[0], 0)), float(largest))


def closed_form(problem: LeastSquares) -> np.ndarray:
    """The optimum (Σ A_iᵀA_i)⁻¹ Σ A_iᵀy_i, what central computation gives: [n] float64.

    Raises:
      UserError: all measurements together leave x open.
    """
    a = np.asarray(problem.matrix, np.float64)
    rows = a.reshape(-1, a.shape[-1])
    x, _, rank, _ = np.linalg.lstsq(rows, np.asarray(problem.measured, np.float64).ravel())
    if rank < a.shape[-1]:
        raise UserError(
            f"the measurements of all {len(a)} nodes determine {rank} of {a.shape[-1]} unknowns; "
            "accepted: more nodes or measurements"
        )
    return x


def biased_limit(problem: LeastSquares, mixing: Mixing, step: float) -> np.ndarray:
    """Where decentralised descent with a constant step ends: (I − W) x + η ∇ = 0, [N, n] float64.

    A linear system of N n equations: for small networks, and to know the bias.
    """
    a, y = np.asarray(problem.matrix, np.float64), np.asarray(problem.measured, np.float64)
    n_nodes, _, n = a.shape
    system = np.kron(np.eye(n_nodes) - mixing.matrix().toarray(), np.eye(n))
    for i in range(n_nodes):
        own = slice(i * n, (i + 1) * n)
        system[own, own] += step * a[i].T @ a[i]
    right = step * np.einsum("irn,ir->in", a, y).ravel()
    return np.linalg.solve(system, right).reshape(n_nodes, n)


def exercise(graph: Graph, matrix: np.ndarray, x: np.ndarray, noise: float, seed: int):
    """Measurements of a known x, row i mod r of a matrix at node i: y_i = a_iᵀ x + v_i.

    Args:
      graph: of N nodes.
      matrix: [r, n].
      x: [n].
      noise: σ, the standard deviation of v.
      seed: of v.

    Returns:
      `LeastSquares` with one row a node, in float64.
    """
    rows = np.asarray(matrix, np.float64)[np.arange(graph.n_nodes) % len(matrix)]
    v = noise * np.random.default_rng(seed).standard_normal(graph.n_nodes)
    return LeastSquares(rows[:, None, :], (rows @ np.asarray(x, np.float64) + v)[:, None])


def sensors(graph: Graph, n_unknowns: int, noise: float, seed: int):
    """Sensors with one random measurement each: a_i and x of independent standard normals.

    Args:
      graph: of N nodes.
      n_unknowns: n.
      noise: σ.
      seed: of a, x and v.

    Returns:
      `LeastSquares` in float64, and the true x, [n].

    Source: the numerical example of Joshi and Boyd, Sensor selection via convex optimization, IEEE
    Trans. Signal Processing 57 (2009), without the selection.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n_unknowns)
    rows = rng.standard_normal((graph.n_nodes, n_unknowns))
    measured = rows @ x + noise * rng.standard_normal(graph.n_nodes)
    return LeastSquares(rows[:, None, :], measured[:, None]), x
