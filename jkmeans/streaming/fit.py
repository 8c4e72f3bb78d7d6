"""k-means of data larger than memory: Lloyd's algorithm over chunks that stream from disk.

A fit is a sequence of passes. Its state says which pass comes next and holds the few arrays that
it needs; `_next` turns a state and what the pass found into the state after it. So a fit can stop
after any chunk and go on from a checkpoint with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jkmeans import kmeans, processes
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption
from jkmeans.sharding import DATA_AXIS, make_mesh
from jkmeans.sources import Source, open_source, open_weights
from jkmeans.streaming import passes, programs, resident
from jkmeans.streaming.checkpointing import FitCheckpoints
from jkmeans.streaming.picking import Picked
from jkmeans.streaming.pipeline import (
    Feeder,
    checked_sizes,
    computed_dtype,
    default_budget,
    rows_per_chunk,
    streamed_dtype,
)
from jkmeans.streaming.progress import Reporter, StreamProgress

Init = str | np.ndarray | jax.Array | Callable[[jax.Array, Source, int], Any]


class StreamResult(NamedTuple):
    """Where a fit over a stream stopped. Counts and inertia fit the centroids.

    Attributes:
      centroids: [k, d] float32 (float64 if that is what the rows are and JAX has it enabled).
      counts: [k] float64, the weight of each cluster.
      inertia: the weighted sum of the squared distances.
      n_iter: the iterations run.
      n_empty: clusters without weight at the end.
      n_relocated: how often an empty cluster was moved to a far row.
      n_passes: over the data, initialisation included; 1 where the data was kept in memory.
    """

    centroids: np.ndarray
    counts: np.ndarray
    inertia: float
    n_iter: int
    n_empty: int
    n_relocated: int
    n_passes: int


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


def fit_stream(
    key: jax.Array,
    source: Any,
    n_clusters: int,
    *,
    init: Init = "k-means||",
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    weights: Any = None,
    oversampling_factor: float = 2.0,
    n_rounds: int = 5,
    mesh: Mesh | None = None,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    checkpoint_folder: str | Path | None = None,
    checkpoint_seconds: float = 300.0,
    progress: bool | Callable[[StreamProgress], object] = False,
) -> StreamResult:
    """k-means of a source of any size, in host memory of a stated size.

    The rows are read chunk by chunk, sharded over the data axis of the mesh, while the devices
    compute; a Lloyd iteration is one pass and one all-reduce of k(d+1)+1 numbers. Which rows an
    initialisation chooses depends neither on chunks nor on devices, except where rounding decides
    between two near-equal candidates; "sample" and "k-means||" choose those that the in-memory
    functions choose, "k-means++" draws others by the same probabilities. Data that fits the
    budget is read once and kept on the devices; the result is the same to rounding (k-means++
    aside). With a checkpoint folder it is streamed nevertheless.

    Args:
      key: a JAX random key.
      source: anything that `open_source` takes, [n, d].
      n_clusters: k.
      init: "k-means||" (2 + n_rounds passes), "sample" (1 pass), "k-means++" (2k - 1 passes),
        the first centroids [k, d], or a function (key, source, n_clusters) that gives them.
      n_init: restarts, of which the one of lowest inertia is returned; centroids that are given
        are run once.
      max_iter: iterations of a restart at most; 0 only assigns.
      tol: iterations end when the squared shift of the centroids is at most tol times the mean
        variance of the features, as in scikit-learn. 0: when they rest.
      weights: one for each row, finite and at least 0, of any kind that `open_source` takes; None
        for ones.
      oversampling_factor: candidates of a round of k-means‖ for each cluster.
      n_rounds: of k-means‖.
      mesh: devices to use; None for all of them.
      memory_budget: bytes of host memory that reading and computing may take, besides the
        centroids and their like; None for 1 GiB, or a quarter of the memory if that is less.
      chunk_rows: rows of a chunk, rounded up to a multiple of the devices; None for what the
        budget allows. The result depends on it in rounding only. Data is then streamed, whatever
        its size.
      checkpoint_folder: where the fit is saved as it runs, and from where it goes on, with the
        same bits, if it was stopped (Ctrl-C and SIGTERM are heard) or killed.
      checkpoint_seconds: between two checkpoints.
      progress: True shows a bar with rate and remaining time (lines where stderr is no terminal);
        or a function called with a `StreamProgress` after every chunk.

    Returns:
      StreamResult.

    Raises:
      UserError: the source or the weights cannot be used, the budget is too small, or the folder
        holds the checkpoint of another fit.
      ValueError: another argument is wrong.
      Interrupted: asked to stop; everything is saved.

    Source: Lloyd, IEEE Trans. Inf. Theory 28 (1982); Bahmani et al., Scalable k-means++, VLDB 2012.
    """
    source = open_source(source)
    weight_source = None if weights is None else open_weights(weights, source.n_rows)
    numbers = {
        "n_init": (n_init, 1),
        "max_iter": (max_iter, 0),
        "n_rounds": (n_rounds, 0),
    }
    _check_arguments(key, source, n_clusters, init, numbers, tol)
    if not isinstance(oversampling_factor, Real) or not 0 < oversampling_factor < float("inf"):
        raise ValueError(f"oversampling_factor={oversampling_factor!r}: expected a number above 0")
    memory_budget, chunk_rows = checked_sizes(memory_budget, chunk_rows)
    mesh = make_mesh() if mesh is None else mesh
    budget = min(processes.gather(default_budget())) if memory_budget is None else memory_budget
    if chunk_rows is None:
        chosen_rows = rows_per_chunk(source, mesh, budget)
    else:
        n_devices = mesh.shape[DATA_AXIS]
        chosen_rows = -(-chunk_rows // n_devices) * n_devices
    fit = _Fit(
        key=_uncommitted(key),
        source=source,
        n_clusters=n_clusters,
        init=init,
        n_init=n_init if isinstance(init, str) or callable(init) else 1,
        max_iter=max_iter,
        tol=tol,
        oversampling_factor=oversampling_factor,
        n_rounds=n_rounds,
        dtype=computed_dtype(source),
    )
    if fit.init_name == "k-means||" and 1 + n_rounds * fit.per_round < n_clusters:
        raise ValueError(
            f"oversampling_factor={oversampling_factor} and n_rounds={n_rounds} give "
            f"{1 + n_rounds * fit.per_round} candidates for {n_clusters} clusters: "
            "raise one of them"
        )
    feeder = Feeder(source, mesh, chosen_rows, weight_source)
    row_bytes = source.n_features * streamed_dtype(source).itemsize
    in_memory = checkpoint_folder is None and chunk_rows is None
    if in_memory and resident.needed_bytes(source) <= budget:
        return _fit_in_memory(fit, feeder)
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(Reporter(progress, source.n_rows, row_bytes))
        checkpoints = interruption = None
        if checkpoint_folder is not None:
            options = fit.options() | {
                "weights": None if weight_source is None else weight_source.fingerprint()
            }
            checkpoints = stack.enter_context(
                FitCheckpoints(Path(checkpoint_folder), options, checkpoint_seconds)
            )
            interruption = stack.enter_context(Interruption())
        return _run(fit, feeder, reporter, checkpoints, interruption, chunk_rows is None)


def _key_data(key: jax.Array) -> np.ndarray:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key)


def _uncommitted(key: jax.Array) -> jax.Array:
    """The key, free to go to any mesh wherever it lies."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.array(_key_data(key)), impl=jax.random.key_impl(key))
    return jnp.array(_key_data(key))


def _check_arguments(
    key: Any,
    source: Source,
    n_clusters: Any,
    init: Init,
    numbers: dict[str, tuple[Any, int]],
    tol: Any,
) -> None:
    if not hasattr(key, "dtype"):
        raise ValueError(f"key={key!r}: expected a JAX random key, as jax.random.key(0)")
    integers = numbers | {"n_clusters": (n_clusters, n_clusters)}
    for name, (value, _) in integers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected an integer")
    if source.n_rows >= 2**32:
        raise UserError(
            f"{source.name} has {source.n_rows:,} rows; accepted: at most {2**32 - 1:,}."
        )
    if not 1 <= n_clusters <= source.n_rows:
        raise UserError(
            f"n_clusters={n_clusters}; accepted: 1 to {source.n_rows:,}, the rows of {source.name}."
        )
    if isinstance(init, str) and init not in kmeans.INITIALIZATIONS:
        raise ValueError(
            f"init={init!r}: expected an array, a function or one of "
            f"{', '.join(kmeans.INITIALIZATIONS)}"
        )
    if not isinstance(tol, Real):
        raise ValueError(f"tol={tol!r}: expected a number")
    for name, (value, least) in {**numbers, "tol": (tol, 0)}.items():
        if not value >= least:
            raise ValueError(f"{name}={value}: expected at least {least}")


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The problem, and the rules by which one pass follows another."""

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
            "key": _key_data(self.key).tolist(),
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
        if n == 0:
            raise UserError("all weights are 0; accepted: at least one weight above 0.")
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
        """What the first pass makes its sums around, [d]."""
        row = self.source.read(0, 1)[0].astype(self.dtype)
        return np.where(np.isfinite(row), row, 0)

    def _shift(self, state: State) -> np.ndarray:
        """What is taken from every row before it is added, [d]."""
        # There is none without that pass, nor in a state that an older version has saved.
        return state.arrays.get("shift", np.zeros(self.source.n_features, self.dtype))

    def _after_lloyd(self, state: State, numbers: np.ndarray, picked: Picked) -> State:
        centroids = state.arrays["centroids"]
        sums, counts, inertia = _unpack(numbers, centroids.shape)
        _refuse_no_weight(counts)
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
        _refuse_no_weight(counts)
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
        if not len(picked.rows):
            raise UserError("all weights are 0; accepted: at least one weight above 0.")
        return picked.rows[np.arange(k) % len(picked.rows)].astype(self.dtype)


@functools.partial(jax.jit, static_argnames="n_clusters")
def _choose_among(key, candidates, counts, *, n_clusters):
    return kmeans.kmeans_plus_plus(key, candidates, n_clusters, weights=counts)


def _unpack(numbers: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    size = shape[0] * shape[1]
    return numbers[:size].reshape(shape), numbers[size:-1], float(numbers[-1])


def _refuse_no_weight(counts: np.ndarray) -> None:
    if not counts.sum() > 0:
        raise UserError("all weights are 0; accepted: at least one weight above 0.")


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


def _run(
    fit: _Fit,
    feeder: Feeder,
    reporter: Reporter,
    checkpoints: FitCheckpoints | None,
    interruption: Interruption | None,
    may_choose_rows: bool,
) -> StreamResult:
    state = None
    if checkpoints is not None:
        state, chunk_rows = checkpoints.load(State)
        if state is not None and may_choose_rows and chunk_rows % feeder.mesh.shape[DATA_AXIS] == 0:
            # The chunks it was started with: sums are then rounded alike.
            feeder = Feeder(feeder.source, feeder.mesh, chunk_rows, feeder.weights)
    if state is None:
        state = fit.start(State("first"), 0)

    while state.stage != "done":
        program, parameters, n_picked = fit.program(state)
        reporter.start(fit.describe(state), state.partial.position if state.partial else 0)
        current = state

        def on_chunk(
            done: int, snapshot: Callable[[], passes.Partial], current: State = current
        ) -> None:
            reporter.advance(done)
            stop = interruption is not None and interruption.agreed()
            if checkpoints is not None and (stop or checkpoints.due()):
                unfinished = dataclasses.replace(current, partial=snapshot())
                checkpoints.save(unfinished, feeder.chunk_rows)
            if stop and checkpoints is not None and interruption is not None:
                checkpoints.wait()
                interruption.leave()

        numbers, picked = passes.run_pass(
            feeder,
            program,
            parameters,
            n_picked=n_picked,
            partial=state.partial,
            on_chunk=on_chunk,
        )
        reporter.advance(feeder.source.n_rows)
        state = fit.next(state, numbers, picked)
    if checkpoints is not None and not checkpoints.finished:
        checkpoints.save(state, feeder.chunk_rows)
    if checkpoints is not None and interruption is not None and interruption.agreed():
        # It came after the last chunk, and nobody else hears it.
        checkpoints.wait()
        interruption.leave()
    counts = state.arrays["best_counts"]
    return StreamResult(
        centroids=state.arrays["best_centroids"],
        counts=counts,
        inertia=state.numbers["best_inertia"],
        n_iter=int(state.numbers["best_n_iter"]),
        n_empty=int(np.sum(counts == 0)),
        n_relocated=int(state.numbers["best_n_relocated"]),
        n_passes=int(state.numbers["n_passes"]),
    )


def _fit_in_memory(fit: _Fit, feeder: Feeder) -> StreamResult:
    """The same fit of data that is kept on the devices: one program a restart."""
    data = resident.load(feeder)
    best = None
    for restart in range(fit.n_init):
        key = jax.random.fold_in(fit.key, restart)
        init: Any = fit.init
        if not isinstance(init, str):
            init = fit.given_centroids(restart)
        result = data.fit(
            key,
            init,
            n_clusters=fit.n_clusters,
            max_iter=fit.max_iter,
            tol=fit.tol,
            oversampling_factor=fit.oversampling_factor,
            n_rounds=fit.n_rounds,
        )
        if best is None or result.inertia < best.inertia:
            best = result
    assert best is not None
    _refuse_no_weight(np.asarray(best.counts))
    return StreamResult(
        centroids=np.asarray(best.centroids),
        counts=np.asarray(best.counts, np.float64),
        inertia=float(best.inertia),
        n_iter=int(best.n_iter),
        n_empty=int(best.n_empty),
        n_relocated=int(best.n_relocated),
        n_passes=1,
    )
