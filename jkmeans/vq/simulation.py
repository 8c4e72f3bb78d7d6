"""A simulated machine of M workers that quantize in parallel, and its clock.

Time is counted in samples per worker: computing one takes a unit, whatever the number of workers.
Communication takes no time, or the delays of scheme C.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jkmeans.errors import UserError
from jkmeans.kmeans.assignment import accumulation_dtype, assign
from jkmeans.kmeans.collectives import AxisName
from jkmeans.kmeans.statistics import inertia_of
from jkmeans.sharding import DATA_AXIS, REPLICATED, SHARDED, data_parallel, place
from jkmeans.vq.schemes import Round, Scheme, make_scheme, sum_over_workers
from jkmeans.vq.steps import Steps, make_steps

EXPLODED = 10.0
"""A simulation stops once the distortion is so many times that of the initial prototypes."""


class Shares(NamedTuple):
    """Samples dealt to workers, one after another, as cards are.

    Attributes:
      samples: [m, n, d], those of worker i first in row i, padding (zeros) after.
      counts: [m] int32, how many samples each worker has, at least 1.
    """

    samples: jax.Array
    counts: jax.Array


class Simulation(NamedTuple):
    """What came of a simulation; arrays of JAX inside a program, of NumPy outside.

    Attributes:
      distortion: [E+1] float, C of the shared version before the first round and after each
        evaluation's rounds; NaN from where the simulation stopped.
      shared: [k, d], the last shared version whose distortion was good.
      n_evaluations: [] int32, how many evaluations were good; fewer than E where it diverged.
    """

    distortion: jax.Array
    shared: jax.Array
    n_evaluations: jax.Array


class _Progress(NamedTuple):
    state: NamedTuple
    good: jax.Array
    distortion: jax.Array
    evaluation: jax.Array
    diverged: jax.Array


def deal(data: np.ndarray, n_workers: int) -> Shares:
    """Deals the rows of an array to workers: worker i has rows i, i + M, i + 2M and so on.

    Args:
      data: [N, d], in the order in which they are to be seen.
      n_workers: M.

    Raises:
      UserError: M is below 1 or above N.
    """
    n = len(data)
    if not 1 <= n_workers <= n:
        raise UserError(f"there are {n_workers} workers; accepted: 1 to {n:,}, one for a sample")
    padding = np.zeros((-n % n_workers, data.shape[1]), data.dtype)
    dealt = np.concatenate([data, padding]).reshape(-1, n_workers, data.shape[1])
    counts = (n - np.arange(n_workers) + n_workers - 1) // n_workers
    # Of NumPy for now: whoever runs a program puts them on its devices.
    return Shares(
        np.ascontiguousarray(dealt.swapaxes(0, 1)),  # pyright: ignore
        counts.astype(np.int32),  # pyright: ignore
    )


def distortion(prototypes: jax.Array, shares: Shares, axis_name: AxisName = None) -> jax.Array:
    """The criterion C(w) = 1/N Σ_i Σ_t min_l ‖z^i_t − w_l‖² over the data of all workers: [].

    Args:
      prototypes: w, [k, d].
      shares: of the local workers.
      axis_name: the mesh axis that workers are sharded over, or None.

    Source: Durut, Patra and Rossi 2012, the empirical distortion C_{n,M}.
    """

    def of_worker(share: Shares) -> jax.Array:
        counted = jnp.arange(share.samples.shape[0]) < share.counts
        distances = assign(share.samples, prototypes).distances
        return inertia_of(distances, counted.astype(distances.dtype))

    # Worker after worker: a product of several workers' samples at once is rounded otherwise.
    sums = lax.map(of_worker, shares)
    counts = shares.counts.astype(sums.dtype)
    return sum_over_workers(sums, axis_name) / sum_over_workers(counts, axis_name)


def simulate(
    key: jax.Array,
    prototypes: jax.Array,
    shares: Shares,
    scheme: Scheme,
    steps: Steps,
    *,
    tau: int,
    n_rounds: int,
    n_evaluations: int,
    axis_name: AxisName = None,
) -> Simulation:
    """Runs a scheme from w(0) for E · R rounds of τ samples per worker.

    Worker i sees its samples in their order, from the first again after the last.

    Args:
      key: a JAX random key, the same on all devices: of the delays of scheme C.
      prototypes: w(0), [k, d] float, the same for all workers.
      shares: of the local workers.
      scheme: see `jkmeans.vq.schemes`.
      steps: see `jkmeans.vq.steps`.
      tau: τ, samples of a round, at least 1.
      n_rounds: R, rounds from one evaluation to the next.
      n_evaluations: E.
      axis_name: the mesh axis that workers are sharded over, or None.

    Returns:
      `Simulation`. It stops early where the distortion is not finite or has exploded.
    """
    dtype = accumulation_dtype(prototypes, shares.samples)
    prototypes = prototypes.astype(dtype)

    def samples_of(t: jax.Array) -> jax.Array:
        rows = (t + jnp.arange(tau))[None, :] % shares.counts[:, None]
        return jax.vmap(lambda samples, rows: samples[rows])(shares.samples, rows)

    def advance(number: jax.Array, state):
        t = number * tau
        work = Round(samples_of(t), t, steps, jax.random.fold_in(key, number), axis_name)
        return scheme.advance(state, work)

    def is_good(progress: _Progress) -> jax.Array:
        return (progress.evaluation < n_evaluations) & ~progress.diverged

    def evaluate(progress: _Progress) -> _Progress:
        first = progress.evaluation * n_rounds
        state = lax.fori_loop(first, first + n_rounds, advance, progress.state)
        found = distortion(state.shared, shares, axis_name)
        # Written so that NaN is not good either. The distortion does not show every prototype: one
        # that is no number is nearest to no sample.
        finite = jnp.all(jnp.isfinite(state.shared))
        good = finite & (found <= EXPLODED * progress.distortion[0])
        return _Progress(
            state=state,
            good=jnp.where(good, state.shared, progress.good),
            distortion=progress.distortion.at[progress.evaluation + 1].set(
                jnp.where(good, found, jnp.nan)
            ),
            evaluation=progress.evaluation + good.astype(jnp.int32),
            diverged=~good,
        )

    first = distortion(prototypes, shares, axis_name)
    start = _Progress(
        state=scheme.initialize(prototypes, shares.samples),
        good=prototypes,
        distortion=jnp.full(n_evaluations + 1, jnp.nan, dtype).at[0].set(first),
        evaluation=jnp.zeros((), jnp.int32),
        diverged=jnp.zeros((), bool),
    )
    end = lax.while_loop(is_good, evaluate, start)
    return Simulation(end.distortion, end.good, end.evaluation)


class Setting(NamedTuple):
    """What is simulated; hashable, so that a program is compiled once for all seeds.

    Attributes:
      scheme: a key of SCHEMES.
      n_workers: M, at least 1.
      tau: τ, samples of a round, at least 1.
      delay: of the scheme "asynchronous", in samples; see `jkmeans.vq.schemes`.
      steps: name, a and b of the steps, see `jkmeans.vq.steps`.
      duration: samples that each worker sees; rounded down to a whole number of evaluations.
      n_evaluations: E wanted; fewer where there are fewer rounds, and up to twice as many where
        rounds cannot be shared out evenly.
    """

    scheme: str
    n_workers: int
    tau: int
    delay: float
    steps: tuple[str, float, float]
    duration: int
    n_evaluations: int

    @property
    def n_rounds(self) -> int:
        """R, rounds from one evaluation to the next."""
        return max(1, self.duration // (self.tau * self.n_evaluations))

    @property
    def times(self) -> np.ndarray:
        """Samples per worker at each evaluation: [E+1] int64, from 0 on."""
        every = self.n_rounds * self.tau
        return np.arange(self.duration // every + 1) * every


def run(
    setting: Setting, seed: int, prototypes: np.ndarray, data: np.ndarray, mesh: Mesh | None = None
) -> Simulation:
    """Simulates a setting as one program.

    Args:
      setting: see `Setting`.
      seed: of the delays.
      prototypes: w(0), [k, d].
      data: [N, d], in the order in which samples are dealt and seen.
      mesh: devices that share the workers, whose number they divide; None for one device. The
        shared version has the same bits on any number of devices.

    Returns:
      `Simulation`, as NumPy arrays.

    Raises:
      UserError: the setting, or what it is given, cannot be used.
    """
    _check(setting, prototypes, data, mesh)
    shares = deal(data, setting.n_workers)
    if mesh is not None:
        shares = jax.tree.map(lambda leaf: place(leaf, mesh, SHARDED), shares)
    found = _program(setting, mesh)(jax.random.key(seed), jnp.asarray(prototypes), shares)
    found = jax.tree.map(np.asarray, jax.block_until_ready(found))
    if not np.isfinite(found.distortion[0]):
        raise UserError(
            f"the distortion of the first prototypes is {found.distortion[0]}: the samples are too "
            f"large for {found.distortion.dtype}; accepted: samples of a smaller scale"
        )
    return found


@functools.lru_cache(maxsize=64)
def _program(setting: Setting, mesh: Mesh | None):
    scheme, steps = make_scheme(setting.scheme, setting.delay), make_steps(*setting.steps)
    axis_name = None if mesh is None else DATA_AXIS

    def program(key, prototypes, shares) -> Simulation:
        return simulate(
            key,
            prototypes,
            shares,
            scheme,
            steps,
            tau=setting.tau,
            n_rounds=setting.n_rounds,
            n_evaluations=len(setting.times) - 1,
            axis_name=axis_name,
        )

    if mesh is None:
        return jax.jit(program)
    return jax.jit(data_parallel(program, mesh, (REPLICATED, REPLICATED, SHARDED), REPLICATED))


def _check(setting: Setting, prototypes: np.ndarray, data: np.ndarray, mesh: Mesh | None) -> None:
    for name in ("n_workers", "tau", "n_evaluations"):
        value = getattr(setting, name)
        if value < 1:
            raise UserError(f"{name} is {value}; accepted: an integer of at least 1")
    if setting.duration < setting.tau:
        raise UserError(
            f"duration is {setting.duration:,} samples, but a round has tau = {setting.tau:,}; "
            f"accepted: at least {setting.tau:,}"
        )
    if setting.duration >= 2**31:
        raise UserError(f"duration is {setting.duration:,}; accepted: below {2**31:,} samples")
    if len(prototypes) > len(data):
        raise UserError(
            f"there are {len(prototypes):,} prototypes, but {len(data):,} samples; accepted: up to "
            f"{len(data):,} prototypes"
        )
    if mesh is not None and setting.n_workers % mesh.size:
        raise UserError(
            f"n_workers is {setting.n_workers}, but there are {mesh.size} devices; accepted: a "
            "multiple of them"
        )
