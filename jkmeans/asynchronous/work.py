"""What a worker computes between two exchanges: two kinds of work, pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jkmeans.asynchronous.rules import Tree
from jkmeans.vq import Steps, displacement, quantize


class Work(NamedTuple):
    """The local side of a rule.

    Attributes:
      start: shared -> local.
      advance: (local, samples, t) -> local, with t the samples of this worker before these.
      take: local -> (sent, local), what is to be sent, and the local state from then on.
      receive: (local, shared) -> local, at the end of the exchange.
      carries_over: whether what was computed during the exchange is based on the version received
        from then on; where not, its staleness counts from the version before.
    """

    start: Callable[[Tree], Any]
    advance: Callable[[Any, Any, Any], Any]
    take: Callable[[Any], tuple[Tree, Any]]
    receive: Callable[[Any, Tree], Any]
    carries_over: bool


class _Versions(NamedTuple):
    own: jax.Array  # [k, d]
    sent: jax.Array  # [k, d], the own version when it was last sent from or received to


def quantization_work(steps: Steps) -> Work:
    """Stochastic vector quantization, scheme C.

    The worker goes on with its own version while an exchange is under way. At its end, own ← shared
    − Δ, with Δ what the own version has lost since the upload began.

    Args:
      steps: see `jkmeans.vq.steps`.

    Source: Durut, Patra and Rossi 2012, section 5.
    """

    def start(shared: jax.Array) -> _Versions:
        return _Versions(shared, shared)

    def advance(local: _Versions, samples: jax.Array, t: jax.Array) -> _Versions:
        return local._replace(own=quantize(local.own, samples, t, steps))

    def take(local: _Versions) -> tuple[jax.Array, _Versions]:
        return displacement(local.sent, local.own), _Versions(local.own, local.own)

    def receive(local: _Versions, shared: jax.Array) -> _Versions:
        return _Versions(shared - displacement(local.sent, local.own), shared)

    return _compiled(Work(start, advance, take, receive, carries_over=True))


class _Gradients(NamedTuple):
    parameters: Tree
    total: Tree
    batches: jax.Array  # [] float32


def gradient_work(loss: Callable[[Tree, Any], jax.Array]) -> Work:
    """The mean gradient of the batches since the last one was sent, at the parameters received.

    Args:
      loss: (parameters, batch) -> [], the mean over the batch.
    """

    def start(shared: Tree) -> _Gradients:
        return _Gradients(shared, jax.tree.map(jnp.zeros_like, shared), jnp.zeros(()))

    def advance(local: _Gradients, batch: Any, t: jax.Array) -> _Gradients:
        del t
        gradient = jax.grad(loss)(local.parameters, batch)
        total = jax.tree.map(jnp.add, local.total, gradient)
        return _Gradients(local.parameters, total, local.batches + 1)

    def take(local: _Gradients) -> tuple[Tree, _Gradients]:
        return jax.tree.map(lambda sum_: sum_ / local.batches, local.total), start(local.parameters)

    def receive(local: _Gradients, shared: Tree) -> _Gradients:
        return local._replace(parameters=shared)

    return _compiled(Work(start, advance, take, receive, carries_over=False))


def _compiled(work: Work) -> Work:
    return work._replace(
        advance=jax.jit(work.advance), take=jax.jit(work.take), receive=jax.jit(work.receive)
    )
