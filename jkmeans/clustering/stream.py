"""The fit of rows that are streamed: its passes, and the one that writes what came out."""

from __future__ import annotations

import time

from jkmeans import processes
from jkmeans.clustering.folder import DISTANCES_FILE, LABELS_FILE, STATE_FILE
from jkmeans.clustering.found import Found
from jkmeans.clustering.session import Session
from jkmeans.errors import refuse_overflow
from jkmeans.recorder import format_duration
from jkmeans.streaming import (
    StreamPrediction,
    StreamProgress,
    StreamResult,
    fit_stream,
    precision,
    predict_stream,
)
from jkmeans.workdir import CHECKPOINT_FOLDER


def fit_streamed(session: Session, k: int) -> Found:
    """Fits rows that are streamed, or goes on where that stopped; writes labels and distances.

    Args:
      session: of the job.
      k: the number of clusters.

    Raises:
      UserError: a row is not finite, the data changed meanwhile, or the inertia overflows.
      Interrupted: the job was asked to stop; what it found is saved.
    """
    config = session.config
    if processes.on_first((session.workdir / STATE_FILE).exists):
        session.progress.say(
            "the rows have no room in memory now: they are streamed from the first restart on, and "
            "what was found in memory stays for when they have"
        )
    started = time.monotonic()
    with precision(session.data.source):
        result, predicted = _fit_and_predict(session, k)
    refuse_overflow(predicted.inertia, result.centroids.dtype)
    return Found(
        centroids=result.centroids,
        sizes=predicted.counts,
        inertia=predicted.inertia,
        n_iter=result.n_iter,
        converged=result.n_iter < config.max_iter,
        history=[],
        seconds=time.monotonic() - started,
    )


def _fit_and_predict(session: Session, k: int) -> tuple[StreamResult, StreamPrediction]:
    config, source = session.config, session.data.source
    budget = config.memory_mebibytes * 2**20 or None

    def tell(now: StreamProgress) -> None:
        session.progress.update(_line(now, config.max_iter), often=True)

    def tell_and_listen(now: StreamProgress) -> None:
        tell(now)
        session.stop_if_asked()

    result = fit_stream(
        session.key(2),
        source,
        k,
        init=config.init,
        n_init=config.n_init,
        max_iter=config.max_iter,
        tol=config.tol,
        mesh=session.mesh,
        memory_budget=budget,
        checkpoint_folder=session.workdir / CHECKPOINT_FOLDER,
        progress=tell,
    )
    session.stop_if_asked()
    predicted = predict_stream(
        source,
        result.centroids,
        session.workdir / LABELS_FILE,
        distances_path=session.workdir / DISTANCES_FILE,
        mesh=session.mesh,
        memory_budget=budget,
        progress=tell_and_listen,
    )
    return result, predicted


def _line(now: StreamProgress, max_iter: int) -> str:
    line = str(now)
    iteration = now.stage.rpartition("iteration ")[2]
    if iteration.isdecimal() and now.rows_per_second:
        left = (max_iter - int(iteration)) * now.n_rows / now.rows_per_second
        line += f" of this pass; at most {format_duration(left)} after it"
    return line
