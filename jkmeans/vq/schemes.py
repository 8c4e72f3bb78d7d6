"""Schemes that run stochastic vector quantization on M workers: what they exchange, and when.

A round is τ samples of every worker, then an exchange. Schemes see the workers of one device, all
or some, as the first axis of their arrays. Sums over workers are taken in the order of the
workers, so that they have the same bits on one device and on several.

Source: Durut, Patra and Rossi, A discussion on parallelization schemes for stochastic vector
quantization algorithms, ESANN 2012 (arXiv 1205.2282).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.errors import UserError
from jkmeans.kmeans.collectives import AxisName, axis_index, n_devices, stack_devices, vary_like
from jkmeans.vq.sequential import displacement, quantize
from jkmeans.vq.steps import Steps


class Round(NamedTuple):
    """What the workers of a device are given in one round.

    Attributes:
      samples: z^i, [m, tau, d].
      t: [] int32, the samples that each worker has seen before.
      steps: from the number of a sample to ε.
      key: a JAX random key of this round, the same on all devices.
      axis_name: the mesh axis that workers are sharded over, or None.
    """

    samples: jax.Array
    t: jax.Array
    steps: Steps
    key: jax.Array
    axis_name: AxisName


class Scheme(NamedTuple):
    """A scheme, as pure functions.

    Attributes:
      initialize: (w(0) [k, d], first `Round`'s samples [m, tau, d]) -> state, a NamedTuple with a
        field ``shared``: the shared version w^srd, [k, d], the same on all devices.
      advance: (state, `Round`) -> state.
    """

    initialize: Callable[[jax.Array, jax.Array], Any]
    advance: Callable[[Any, Round], Any]


class Synchronous(NamedTuple):
    """Between two rounds of schemes A and B every worker has the shared version, [k, d]."""

    shared: jax.Array


class Asynchronous(NamedTuple):
    """What scheme C has under way.

    Attributes:
      shared: w^srd, [k, d].
      local: w^i, [m, k, d].
      start: w^i when the exchange that is under way began, [m, k, d].
      pending: Δ^i that is being uploaded, [m, k, d].
      base: the version that is being downloaded, less ``pending``, [m, k, d].
    """

    shared: jax.Array
    local: jax.Array
    start: jax.Array
    pending: jax.Array
    base: jax.Array


def averaging() -> Scheme:
    """Scheme A: after τ samples all versions become their mean, w^srd = 1/M Σ_i w^i.

    It follows the sequential algorithm at its own pace: a mean of M displacements is as long as
    one of them.
    """

    def advance(state: Synchronous, work: Round) -> Synchronous:
        versions = _quantize_from_shared(state.shared, work)
        n_workers = versions.shape[0] * n_devices(work.axis_name)
        return Synchronous(sum_over_workers(versions, work.axis_name) / n_workers)

    return Scheme(_agreed, advance)


def displacements() -> Scheme:
    """Scheme B: after τ samples w^srd ← w^srd − Σ_i Δ^i, which all versions become.

    Δ^i = Σ ε H(z^i, w^i) is the displacement of worker i in these τ samples.
    """

    def advance(state: Synchronous, work: Round) -> Synchronous:
        versions = _quantize_from_shared(state.shared, work)
        moves = jax.vmap(displacement, in_axes=(None, 0))(state.shared, versions)
        return Synchronous(state.shared - sum_over_workers(moves, work.axis_name))

    return Scheme(_agreed, advance)


def asynchronous(delay: float) -> Scheme:
    """Scheme C: no barrier; every worker has an exchange under way, and works on meanwhile.

    An exchange of worker i that begins at s and ends at t uploads Δ^i, the displacement of the
    exchange before, and downloads w^srd(s). At t, w^srd ← w^srd − Δ^i, and the worker takes
    w^i ← w^srd(s) − Δ^i − Δ^i_{s→t}: the version of the others at s, and all of its own work. The
    next exchange begins at once.

    Deviation from the paper: its workers, who also download w^srd(s), leave the Δ^i that is under
    way out of their version until it has gone round; here a worker never loses sight of its own.

    Args:
      delay: the mean of the duration of an exchange, in samples, at least 1. Durations are
        geometric; whether an exchange has ended is looked at after every τ samples.
    """

    def initialize(prototypes: jax.Array, samples: jax.Array) -> Asynchronous:
        shared = _agreed(prototypes, samples).shared
        one_each = jnp.broadcast_to(shared, (samples.shape[0], *shared.shape))
        one_each = vary_like(one_each, samples)
        return Asynchronous(shared, one_each, one_each, jnp.zeros_like(one_each), one_each)

    def advance(state: Asynchronous, work: Round) -> Asynchronous:
        local = jax.vmap(quantize, in_axes=(0, 0, None, None))(
            state.local, work.samples, work.t, work.steps
        )
        ended = _ended(work, delay)[:, None, None]
        since = displacement(state.start, local)
        arrived = jnp.where(ended, state.pending, 0)
        shared = state.shared - sum_over_workers(arrived, work.axis_name)
        local = jnp.where(ended, state.base - since, local)
        return Asynchronous(
            shared=shared,
            local=local,
            start=jnp.where(ended, local, state.start),
            pending=jnp.where(ended, since, state.pending),
            base=jnp.where(ended, shared[None] - since, state.base),
        )

    return Scheme(initialize, advance)


SCHEMES: dict[str, Callable[..., Scheme]] = {
    "averaging": averaging,
    "displacements": displacements,
    "asynchronous": asynchronous,
}
"""Makers of schemes A, B and C."""


def make_scheme(name: str, delay: float = 1.0) -> Scheme:
    """The scheme of a name.

    Args:
      name: a key of SCHEMES.
      delay: of "asynchronous"; the others communicate in no time.

    Raises:
      UserError: an unknown name, or a delay that is not accepted.
    """
    if name not in SCHEMES:
        raise UserError(f"the scheme is {name!r}; accepted: {', '.join(map(repr, SCHEMES))}")
    if name != "asynchronous":
        return SCHEMES[name]()
    if not 1 <= delay < float("inf"):
        raise UserError(f"the delay is {delay!r}; accepted: a mean of at least 1 sample")
    return asynchronous(delay)


def sum_over_workers(values: jax.Array, axis_name: AxisName) -> jax.Array:
    """Σ over all workers in their order, from [m, ...] to [...], the same on all devices."""
    stacked = stack_devices(values, axis_name).reshape(-1, *values.shape[1:])
    # A loop, for a reduction adds in an order that is the compiler's.
    return lax.fori_loop(1, len(stacked), lambda i, total: total + stacked[i], stacked[0])


def _agreed(prototypes: jax.Array, samples: jax.Array) -> Synchronous:
    del samples
    return Synchronous(prototypes)


def _quantize_from_shared(shared: jax.Array, work: Round) -> jax.Array:
    return jax.vmap(quantize, in_axes=(None, 0, None, None))(
        shared, work.samples, work.t, work.steps
    )


def _ended(work: Round, delay: float) -> jax.Array:
    """Which of the local workers' exchanges end in this round: [m] bool.

    A geometric duration has no memory: whatever has passed, an exchange ends with probability
    1/delay at each sample.
    """
    n_local, tau = work.samples.shape[:2]
    probability = 1 - (1 - 1 / delay) ** tau
    first = n_local * axis_index(work.axis_name)

    def draw(worker: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(work.key, worker), probability)

    return jax.vmap(draw)(first + jnp.arange(n_local))
