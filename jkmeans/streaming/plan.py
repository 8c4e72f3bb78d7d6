"""Which pass follows which: the state of a fit over a stream, and the rules between passes.

A fit is a sequence of passes. Its state says which pass comes next and holds the few arrays that
it needs; `Plan.next` turns a state and what the pass found into the state after it. So a fit can
stop after any chunk and go on from a checkpoint with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkmeans import kmeans
from jkmeans.sources import Source, open_source
from jkmeans.streaming import passes, programs
from jkmeans.streaming.picking import Picked
from jkmeans.streaming.pipeline import refuse_total_weight

_WEIGHTS_READ = 2**16

Init = str | np.ndarray | jax.Array | Callable[[jax.Array, Source, int], Any]


@dataclasses.dataclass
class State:
    """What a fit needs to go on.

    Attributes:
      stage: the next pass: "first", "draw", "trial", "weigh", "lloyd", "final"; or "done".
      step: its number within the stage.
      restart: the number of the restart.
      numbers: scalars by name.
      arrays: by name.
      partial: the pass that is not finished, or None.
    """

    stage: str
    step: int = 0
    restart: int = 0
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    partial: passes.Partial | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The problem, with the arguments of `fit_stream`, and the rules from one pass to the next."""

    key: jax.Array
    source: Source
    n_clusters: int
    init: Init
    n_init: int
    max_iter: int
    tol: float
    oversampling_factor: float
    n_rounds: int
    dtype: np.dtype
    weights: Source | None

    def options(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as JSON can hold it."""
        init = self.init
        if callable(init):
            init = "a function"
        elif not isinstance(init, str):
            init = open_source(np.asarray(init)).fingerprint()
        return {
            "data": self.source.fingerprint(),
            "n_clusters": self.n_clusters,
            "key": key_data(self.key).tolist(),
            "init": init,
            "n_init": self.n_init,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "oversampling_factor": self.oversampling_factor,
            "n_rounds": self.n_rounds,
            "dtype": self.dtype.name,
        }

    def start(self, state: State, restart: int) -> State:
        """The state before the first pass of a restart."""
        state = dataclasses.replace(state, restart=restart, step=0, partial=None)
        state.numbers["n_relocated"] = 0
        if isinstance(self.init, str):
            return dataclasses.replace(state, stage="first")
        state.arrays["centroids"] = self.given_centroids(restart)
        return self._first_iteration(state)

    def given_centroids(self, restart: int) -> np.ndarray:
        """The first centroids that the user gave, or the user's function: [k, d]."""
        centroids: Any = self.init
        if callable(centroids):
            centroids = centroids(
                jax.random.fold_in(self.key, restart), self.source, self.n_clusters
            )
        centroids = np.asarray(centroids)
        expected = (self.n_clusters, self.source.n_features)
        if centroids.shape != expected:
            raise ValueError(
                f"init has shape {centroids.shape}: expected {expected}, one centroid for each "
                "cluster"
            )
        if not np.isfinite(centroids.astype(self.dtype)).all():
            raise ValueError("init has NaN or infinity: expected finite centroids")
        return centroids.astype(self.dtype)

    def program(self, state: State) -> tuple[programs.Program, tuple[Any, ...], int]:
        """The next pass: a program, its parameters, and how many rows it picks."""
        key = jax.random.fold_in(self.key, state.restart)
        arrays, step = state.arrays, state.step
        if state.stage == "first":
            shift = self._first_row
            if self.init_name == "sample":
                return programs.moments_and_sample, (shift, key), self.n_clusters
            return programs.moments, (shift, jax.random.fold_in(key, 0)), 1
        if state.stage == "draw":
            n_picked = self.per_round if self.init_name == "k-means||" else self._n_trials
            return programs.draw, (arrays["candidates"], jax.random.fold_in(key, step)), n_picked
        if state.stage == "trial":
            return programs.potentials, (arrays["candidates"], arrays["trials"]), 0
        if state.stage == "weigh":
            return programs.counts, (arrays["candidates"],), 0
        # A single cluster cannot be empty.
        n_far = min(self.n_clusters, kmeans.MAX_RELOCATIONS) if self.n_clusters > 1 else 0
        parameters = arrays["centroids"], self._shift(state)
        return programs.statistics, parameters, n_far if state.stage == "lloyd" else 0

    def describe(self, state: State) -> str:
        """The next pass in words."""
        restart = f"restart {state.restart + 1}, " if self.n_init > 1 else ""
        words = {
            "first": "initialisation",
            "draw": f"initialisation, round {state.step}",
            "trial": f"initialisation, round {state.step}",
            "weigh": "initialisation, weighing",
            "lloyd": f"iteration {state.step + 1}",
            "final": "inertia",
        }
        return restart + words[state.stage]

    def next(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        """The state after a pass."""
        state = dataclasses.replace(
            state, numbers=dict(state.numbers), arrays=dict(state.arrays), partial=None
        )
        state.numbers["n_passes"] = state.numbers.get("n_passes", 0) + 1
        return getattr(self, f"_after_{state.stage}")(state, numbers, picked)

    @property
    def init_name(self) -> str:
        """The name of the initialisation; "" where centroids or a function are given."""
        return self.init if isinstance(self.init, str) else ""

    @property
    def per_round(self) -> int:
        """Candidates that a round of k-means‖ draws."""
        return min(max(1, round(self.oversampling_factor * self.n_clusters)), self.source.n_rows)

    @property
    def _n_trials(self) -> int:
        return min(2 + int(np.log(self.n_clusters)), self.source.n_rows)

    def _after_first(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        n, sums, squares = numbers[0], *np.split(numbers[1:], 2)
        refuse_total_weight(n, self.dtype)
        variance = np.maximum(squares / n - (sums / n) ** 2, 0)
        state.numbers["tolerance"] = self.tol * float(np.mean(variance))
        mean = self._first_row.astype(np.float64) + sums / n
        state.arrays["shift"] = kmeans.far_origin(mean, variance).astype(self.dtype)
        if not isinstance(self.init, str):
            return self._first_iteration(state)
        if self.init_name == "sample":
            state.arrays["centroids"] = self._in_turn(picked, self.n_clusters)
            return self._first_iteration(state)
        first = self._in_turn(picked, 1)
        if self.init_name == "k-means||":
            state.arrays["candidates"] = first
        elif self.n_clusters == 1:
            state.arrays["centroids"] = first
            return self._first_iteration(state)
        else:
            # Rounds share a shape, and so a program: what is not chosen yet repeats the first.
            state.arrays["candidates"] = np.repeat(first, self.n_clusters, axis=0)
        return dataclasses.replace(state, stage="draw", step=1)

    def _after_draw(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        if self.init_name == "k-means++":
            state.arrays["trials"] = self._in_turn(picked, self._n_trials)
            return dataclasses.replace(state, stage="trial")
        drawn = self._in_turn(picked, self.per_round)
        state.arrays["candidates"] = np.concatenate([state.arrays["candidates"], drawn])
        if state.step < self.n_rounds:
            return dataclasses.replace(state, step=state.step + 1)
        return dataclasses.replace(state, stage="weigh")

    def _after_trial(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        candidates = state.arrays["candidates"].copy()
        candidates[state.step] = state.arrays.pop("trials")[int(np.argmin(numbers))]
        if state.step + 1 < self.n_clusters:
            state.arrays["candidates"] = candidates
            return dataclasses.replace(state, stage="draw", step=state.step + 1)
        del state.arrays["candidates"]
        state.arrays["centroids"] = candidates
        return self._first_iteration(state)

    def _after_weigh(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        key = jax.random.fold_in(jax.random.fold_in(self.key, state.restart), self.n_rounds + 1)
        state.arrays["centroids"] = np.asarray(
            _choose_among(
                key,
                state.arrays.pop("candidates"),
                numbers.astype(self.dtype),
                n_clusters=self.n_clusters,
            )
        )
        return self._first_iteration(state)

    def _first_iteration(self, state: State) -> State:
        if self.tol > 0 and "tolerance" not in state.numbers:
            return dataclasses.replace(state, stage="first", step=0)
        stage = "lloyd" if self.max_iter > 0 else "final"
        return dataclasses.replace(state, stage=stage, step=0)

    @functools.cached_property
    def _first_row(self) -> np.ndarray:
        """What the first pass makes its sums around, [d]: the first row that counts."""
        first = 0 if self.weights is None else first_weight(self.weights)
        row = self.source.read(first, first + 1)[0].astype(self.dtype)
        return np.where(np.isfinite(row), row, 0)

    def _shift(self, state: State) -> np.ndarray:
        """What is taken from every row before it is added, [d]."""
        # There is none without that pass, nor in a state that an older version has saved.
        return state.arrays.get("shift", np.zeros(self.source.n_features, self.dtype))

    def _after_lloyd(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        centroids = state.arrays["centroids"]
        sums, counts, inertia = _unpack(numbers, centroids.shape)
        refuse_total_weight(counts.sum(), self.dtype)
        shift = self._shift(state).astype(np.float64)
        sums, counts, n_moved = _relocate(sums, counts.copy(), picked, shift)
        means = shift + sums / np.where(counts > 0, counts, 1)[:, None]
        moved = np.where(counts[:, None] > 0, means, centroids).astype(self.dtype)
        moved_by = float(np.sum((moved.astype(np.float64) - centroids) ** 2))
        state.arrays["centroids"] = moved
        state.numbers["n_relocated"] += n_moved
        state.step += 1
        if moved_by == 0:
            # Centroids that did not move have the statistics they were made from.
            return self._end_of_restart(state, counts, inertia)
        if moved_by <= state.numbers.get("tolerance", 0.0) or state.step >= self.max_iter:
            return dataclasses.replace(state, stage="final")
        return state

    def _after_final(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        _, counts, inertia = _unpack(numbers, state.arrays["centroids"].shape)
        refuse_total_weight(counts.sum(), self.dtype)
        return self._end_of_restart(state, counts, inertia)

    def _end_of_restart(self, state: State, counts: np.ndarray, inertia: float) -> State:
        if "best_inertia" not in state.numbers or inertia < state.numbers["best_inertia"]:
            state.arrays["best_centroids"] = state.arrays["centroids"]
            state.arrays["best_counts"] = counts
            state.numbers["best_inertia"] = inertia
            state.numbers["best_n_iter"] = state.step
            state.numbers["best_n_relocated"] = state.numbers["n_relocated"]
        if state.restart + 1 < self.n_init:
            return self.start(state, state.restart + 1)
        return dataclasses.replace(state, stage="done")

    def _in_turn(self, picked: Picked, k: int) -> np.ndarray:
        """K of the rows picked; if there are fewer, they are repeated in turn."""
        refuse_total_weight(len(picked.rows), self.dtype)
        return picked.rows[np.arange(k) % len(picked.rows)].astype(self.dtype)


@functools.partial(jax.jit, static_argnames="n_clusters")
def _choose_among(key, candidates, counts, *, n_clusters):
    return kmeans.kmeans_plus_plus(key, candidates, n_clusters, weights=counts)


def _unpack(numbers: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    size = shape[0] * shape[1]
    return numbers[:size].reshape(shape), numbers[size:-1], float(numbers[-1])


def first_weight(weights: Source) -> int:
    """The first row whose weight is not 0; 0 if there is none.

    Args:
      weights: [n, 1], of which no more is read than that takes, in pieces.
    """
    for start in range(0, weights.n_rows, _WEIGHTS_READ):
        piece = weights.read(start, min(start + _WEIGHTS_READ, weights.n_rows))
        if piece.any():
            return start + int((piece[:, 0] != 0).argmax())
    return 0


def _relocate(
    sums: np.ndarray, counts: np.ndarray, picked: Picked, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Gives each empty cluster one of the farthest rows, which leaves its old cluster."""
    empty = np.flatnonzero(counts == 0)
    n_moved = min(len(empty), int(np.sum(picked.priority > 0)))
    if not n_moved:
        return sums, counts, 0
    sums = sums.copy()
    rows = picked.rows[:n_moved].astype(np.float64) - shift
    for cluster, row, old, weight in zip(empty, rows, picked.labels, picked.weights, strict=False):
        sums[old] -= weight * row
        counts[old] -= weight
        sums[cluster], counts[cluster] = weight * row, weight
    return sums, counts, n_moved


def key_data(key: jax.Array) -> np.ndarray:
    """The numbers of a random key, typed or not."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key)
