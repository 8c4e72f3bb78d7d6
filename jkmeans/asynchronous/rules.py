"""What a server does with what a worker sends: two rules, pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

Tree = Any
"""A pytree of arrays."""


class Rule(NamedTuple):
    """How a shared version changes.

    Attributes:
      init: shared -> state.
      apply: (shared, state, sent) -> (shared, state), where ``sent`` has the structure of shared.
    """

    init: Callable[[Tree], Tree]
    apply: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def displacement_rule() -> Rule:
    """Subtracts: w ← w − Δ, with Δ what a worker's own version has lost since it last sent.

    Source: Durut, Patra and Rossi, A discussion on parallelization schemes for stochastic vector
    quantization algorithms, ESANN 2012 (arXiv 1205.2282), section 5.
    """

    def apply(shared: Tree, state: Tree, sent: Tree) -> tuple[Tree, Tree]:
        return jax.tree.map(lambda version, delta: version - delta, shared, sent), state

    return Rule(lambda shared: (), apply)


def gradient_rule(optimizer: optax.GradientTransformation) -> Rule:
    """One step of an optimizer with the gradient that was sent."""

    def apply(shared: Tree, state: Tree, sent: Tree) -> tuple[Tree, Tree]:
        updates, state = optimizer.update(sent, state, shared)
        return optax.apply_updates(shared, updates), state

    return Rule(optimizer.init, apply)
