"""The fit of rows in memory: programs of some iterations each, between which it can stop.

Restarts run one after the other; what they found is saved now and then, and when it stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jkmeans import kmeans, processes, sharded
from jkmeans.clustering.folder import (
    DISTANCES_FILE,
    LABELS_FILE,
    STATE_FILE,
    State,
    write_npy,
)
from jkmeans.clustering.found import Found
from jkmeans.clustering.session import Session, began_streamed
from jkmeans.errors import refuse_overflow
from jkmeans.recorder import format_duration
from jkmeans.sharding import REPLICATED, to_host

_SAVE_SECONDS = 30.0


def fit_in_memory(session: Session, k: int) -> Found:
    """Fits the rows in memory, or goes on where that stopped; writes labels and distances.

    Args:
      session: of the job.
      k: the number of clusters.

    Raises:
      UserError: the saved state is damaged or of other data, or the inertia overflows.
      Interrupted: the job was asked to stop; what it found is saved.
    """
    return _Fit(session, k).execute()


class _Fit:
    def __init__(self, session: Session, k: int):
        self._session = session
        self._config = session.config
        self._k = k
        self._path = session.workdir / STATE_FILE
        self._state = processes.together(lambda: State.load(self._path, session.fingerprint))
        processes.agree("the state", {"iterations": [self._state.restart, self._state.n_iter]})
        self._compiled = False
        with sharded.precision(session.rows):
            self._rows = sharded.place(session.rows, mesh=session.mesh, multiple_of=session.blocks)

    def execute(self) -> Found:
        session, config, state = self._session, self._config, self._state
        if processes.on_first(lambda: began_streamed(session.workdir)):
            session.progress.say(
                "the rows have room in memory now: they are clustered there from the first restart "
                "on, and what was found streamed stays as it is"
            )
        if state.restart or state.n_iter:
            session.progress.say(
                f"going on after iteration {state.n_iter} of restart {state.restart + 1}"
                if state.restart < config.n_init
                else "going on after the last iteration"
            )
        scale, self._origin = self._run(_scale_and_origin, self._rows.n_rows)
        tol = config.tol * float(scale)
        saved = time.monotonic()
        while state.restart < config.n_init:
            started = time.monotonic()
            self._advance(tol)
            state.seconds += time.monotonic() - started
            stopping = session.asked_to_stop()
            if stopping or time.monotonic() - saved > _SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            if stopping:
                session.stop()
        self._save()
        session.stop_if_asked()
        return self._assign_best()

    def _advance(self, tol: float) -> None:
        """Some iterations of the restart that runs, and its end where it comes to rest."""
        session, config, state = self._session, self._config, self._state
        if state.centroids is None:
            session.progress.update(f"choosing the first {self._k:,} centroids by {config.init}")
            # As where rows are streamed: k-means‖ and a sample begin with the same centroids.
            key = jax.random.fold_in(session.key(2), state.restart)
            chosen = self._run(_initialize, key, n_clusters=self._k, init=config.init)
            state.centroids = np.asarray(chosen)
        asked = min(
            max(1, state.n_iter), config.iterations_per_program, config.max_iter - state.n_iter
        )
        started = time.monotonic()
        found = self._run(
            _iterate, state.centroids, asked, tol, self._origin, empty=config.empty,
            algorithm="lloyd" if config.deterministic else "auto", out_specs=sharded.RESULT_SPECS,
        )  # fmt: skip
        done, inertia = int(found.n_iter), float(found.inertia)
        state.centroids = np.asarray(found.centroids)
        state.n_iter += done
        state.history.append((state.restart, state.n_iter, inertia))
        refuse_overflow(inertia, state.centroids.dtype)
        self._tell(inertia, done, time.monotonic() - started)
        converged = done < asked
        if converged or state.n_iter >= config.max_iter:
            state.end_restart(inertia, converged)

    def _assign_best(self) -> Found:
        session, state = self._session, self._state
        assert state.best is not None
        started = time.monotonic()
        final = self._run(_assign, state.best, out_specs=sharded.RESULT_SPECS)
        labels = to_host(final.labels)[: self._rows.n_rows]
        distances = to_host(final.distances)[: self._rows.n_rows]
        write_npy(session.workdir / LABELS_FILE, labels)
        write_npy(session.workdir / DISTANCES_FILE, distances)
        return Found(
            centroids=state.best,
            sizes=np.bincount(labels, minlength=self._k).astype(np.int64),
            inertia=float(np.sum(distances, dtype=np.float64)),
            n_iter=state.best_n_iter,
            converged=state.best_converged,
            history=state.history,
            seconds=state.seconds + time.monotonic() - started,
            labels=labels,
        )

    def _run(self, function: Callable, *arguments, **options) -> Any:
        """A function of the core on the placed rows; see `jkmeans.sharded.run`."""
        options.setdefault("out_specs", REPLICATED)
        options |= {"in_blocks": True} if self._config.deterministic else {}

        def call():
            with sharded.precision(self._session.rows):
                return sharded.run(function, self._rows, *arguments, **options)

        return self._session.compute(call)

    def _save(self) -> None:
        if processes.is_first():
            self._state.save(self._path, self._session.fingerprint)

    def _tell(self, inertia: float, done: int, seconds: float) -> None:
        """Says where the fit is; of the first program, which was compiled, no speed."""
        config, state = self._config, self._state
        left = (
            config.max_iter - state.n_iter + config.max_iter * (config.n_init - 1 - state.restart)
        )
        restart = f"restart {state.restart + 1} of {config.n_init}, " if config.n_init > 1 else ""
        speed = (
            f", {done * self._rows.n_rows / seconds:,.0f} rows/s, at most "
            f"{format_duration(left * seconds / done)} left"
        )
        self._session.progress.update(
            f"{restart}iteration {state.n_iter} of at most {config.max_iter}, inertia "
            f"{inertia:.6g}{speed if self._compiled else ''}"
        )
        self._compiled = True


# Functions of the core on placed rows, as `jkmeans.sharded.run` takes them.


def _scale_and_origin(x, weights, n_rows, *, axis_name):
    del weights
    return sharded.scale_and_origin(x, n_rows, axis_name)


def _initialize(x, weights, key, *, n_clusters, init, axis_name):
    initialize = kmeans.INITIALIZATIONS[init]
    return initialize(key, x, n_clusters, weights=weights, axis_name=axis_name)


def _iterate(x, weights, centroids, max_iter, tol, origin, **options):
    return kmeans.lloyd(
        x, centroids, weights=weights, max_iter=max_iter, tol=tol, origin=origin, **options
    )


def _assign(x, weights, centroids, *, axis_name):
    return kmeans.lloyd(
        x, centroids, weights=weights, max_iter=0, algorithm="lloyd", axis_name=axis_name
    )
