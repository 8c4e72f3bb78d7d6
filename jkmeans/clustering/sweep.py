"""The choice of K: every K of the config is judged, once, and one is suggested."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from jkmeans import processes, selection
from jkmeans.clustering.folder import SWEEP_FILE, read_sweep
from jkmeans.clustering.session import Session
from jkmeans.errors import UserError, refuse_overflow
from jkmeans.recorder import format_duration
from jkmeans.whole_files import write_json


def choose_n_clusters(session: Session) -> dict[str, Any]:
    """Judges every K that is not judged yet.

    Returns:
      The sweep as ``sweep.json`` holds it.

    Raises:
      UserError: the sample is too small, or its squares overflow.
      Interrupted: the job was asked to stop; what is judged is saved.
    """
    settings = session.config.sweep
    key = session.key(1)
    sample = session.sample(key, settings.sample_size)[1]
    ks = [k for k in sorted(set(settings.n_clusters)) if k < len(sample)]
    if len(sample) < 3:
        raise UserError(
            f"config.n_clusters is 'auto', but the sample has {len(sample):,} rows; accepted: "
            "a number of clusters, or at least 3 rows (and sweep.sample_size 0 or at least 3)"
        )
    if not ks:
        raise UserError(
            f"config.sweep.n_clusters is {tuple(settings.n_clusters)}, but the sample has "
            f"{len(sample):,} rows; accepted: 2 to {len(sample) - 1:,}"
        )
    steps = selection.Sweep(key, sample, ks, n_init=settings.n_init, n_refits=settings.n_refits)
    path = session.workdir / SWEEP_FILE
    found = processes.on_first(lambda: [*read_sweep(path, session.fingerprint).items()])
    done = {int(k): tuple(values) for k, values in found}

    def record() -> dict[str, Any]:
        return _record(done, len(sample)) | {"fingerprint": session.fingerprint}

    # Time is told from the second K on: the first one compiles.
    started, timed = 0.0, 0
    for k in ks:
        if k in done:
            continue
        session.stop_if_asked()
        one = session.compute(lambda k=k: steps.judge(k))
        refuse_overflow(one.inertia, sample.dtype)
        # Hosts of different kinds round differently, and must choose the same K.
        done[k] = tuple(processes.share([one.inertia, one.silhouette, one.stability]))
        left = sum(other for other in ks if other not in done)
        remaining = ""
        if not started:
            started = time.monotonic()
        elif left:
            timed += k
            seconds = (time.monotonic() - started) / timed * left
            remaining = f", about {format_duration(seconds)} left"
        session.progress.update(
            f"sweep: K = {k}, inertia {one.inertia:.5g}, silhouette {one.silhouette:.3f}, "
            f"stability {one.stability:.3f}{remaining}"
        )
        if processes.is_first():
            write_json(path, record())
    whole = record()
    if processes.is_first():
        write_json(path, whole)
    session.progress.say(whole["reason"])
    return whole


def _record(done: dict[int, tuple], n_rows: int) -> dict[str, Any]:
    ks = sorted(done)
    columns = np.asarray([done[k] for k in ks])
    suggestion, reason = selection.suggest(np.asarray(ks), columns[:, 1], columns[:, 2])
    return {
        "suggestion": suggestion,
        "reason": reason,
        "n_rows": n_rows,
        "n_clusters": ks,
        "inertia": columns[:, 0].tolist(),
        "silhouette": columns[:, 1].tolist(),
        "stability": columns[:, 2].tolist(),
    }
