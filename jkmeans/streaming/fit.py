"""k-means of data larger than memory: Lloyd's algorithm over chunks that stream from disk.

Pass after pass, as `plan` says, with a checkpoint after any chunk.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from jkmeans.streaming import passes, resident
from jkmeans.streaming.checkpointing import FitCheckpoints
from jkmeans.streaming.pipeline import (
    Feeder,
    checked_sizes,
    computed_dtype,
    default_budget,
    rows_per_chunk,
    streamed_dtype,
)
from jkmeans.streaming.plan import Init, Plan, State, key_data
from jkmeans.streaming.progress import Reporter, StreamProgress


class StreamResult(NamedTuple):
    """Where a fit over a stream stopped. Counts and inertia fit the centroids.

    Attributes:
      centroids: [k, d] float32; float64 if the rows are float64, or integers of more than two
        bytes, and JAX has it enabled.
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
    plan = Plan(
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
        weights=weight_source,
    )
    if plan.init_name == "k-means||" and 1 + n_rounds * plan.per_round < n_clusters:
        raise ValueError(
            f"oversampling_factor={oversampling_factor} and n_rounds={n_rounds} give "
            f"{1 + n_rounds * plan.per_round} candidates for {n_clusters} clusters: "
            "raise one of them"
        )
    feeder = Feeder(source, mesh, chosen_rows, weight_source)
    row_bytes = source.n_features * streamed_dtype(source).itemsize
    in_memory = checkpoint_folder is None and chunk_rows is None
    if in_memory and resident.needed_bytes(source) <= budget:
        return _fit_in_memory(plan, feeder)
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(Reporter(progress, source.n_rows, row_bytes))
        checkpoints = interruption = None
        if checkpoint_folder is not None:
            options = plan.options() | {
                "weights": None if weight_source is None else weight_source.fingerprint()
            }
            checkpoints = stack.enter_context(
                FitCheckpoints(Path(checkpoint_folder), options, checkpoint_seconds)
            )
            interruption = stack.enter_context(Interruption())
        return _run(plan, feeder, reporter, checkpoints, interruption, chunk_rows is None)


def _uncommitted(key: jax.Array) -> jax.Array:
    """The key, free to go to any mesh wherever it lies."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.array(key_data(key)), impl=jax.random.key_impl(key))
    return jnp.array(key_data(key))


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


def _run(
    plan: Plan,
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
        state = plan.start(State("first"), 0)

    while state.stage != "done":
        program, parameters, n_picked = plan.program(state)
        reporter.start(plan.describe(state), state.partial.position if state.partial else 0)
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
        state = plan.next(state, numbers, picked)
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


def _fit_in_memory(plan: Plan, feeder: Feeder) -> StreamResult:
    """The same fit of data that is kept on the devices: one program a restart."""
    data = resident.load(feeder)
    best = None
    for restart in range(plan.n_init):
        key = jax.random.fold_in(plan.key, restart)
        init: Any = plan.init
        if not isinstance(init, str):
            init = plan.given_centroids(restart)
        result = data.fit(
            key,
            init,
            n_clusters=plan.n_clusters,
            max_iter=plan.max_iter,
            tol=plan.tol,
            oversampling_factor=plan.oversampling_factor,
            n_rounds=plan.n_rounds,
        )
        if best is None or result.inertia < best.inertia:
            best = result
    assert best is not None
    return StreamResult(
        centroids=np.asarray(best.centroids),
        counts=np.asarray(best.counts, np.float64),
        inertia=float(best.inertia),
        n_iter=int(best.n_iter),
        n_empty=int(best.n_empty),
        n_relocated=int(best.n_relocated),
        n_passes=1,
    )
