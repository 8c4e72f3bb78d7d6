"""The job from its beginning to its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jkmeans import processes, telling
from jkmeans.clustering.conclusion import conclude
from jkmeans.clustering.data import open_data
from jkmeans.clustering.folder import claim_workdir, read_summary
from jkmeans.clustering.memory import fit_in_memory
from jkmeans.clustering.session import Session
from jkmeans.clustering.settings import AUTO, validate
from jkmeans.clustering.stream import fit_streamed
from jkmeans.clustering.sweep import choose_n_clusters
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.recorder import results_table
from jkmeans.sharding import make_mesh
from jkmeans.workdir import only_process_in


def cluster(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Clusters a file or a named data set with k-means, or goes on where that stopped.

    Args:
      config: complete, as ``configs/cluster.py``; see `FIELDS`.
      workdir: receives ``centroids.npy`` [k, d], ``labels.npy`` [n] int32, ``distances.npy`` [n]
        (squared Euclidean distances to the centroids), ``sizes.npy`` [k] int64, ``summary.json``,
        for n_clusters = auto also ``sweep.json``, and ``report/*.png``. Where it holds an
        unfinished job of the same config, that goes on; a finished one is only reported.

    Returns:
      What is in ``summary.json``: ``n_rows``, ``n_features``, ``n_clusters``, ``inertia``,
      ``n_iter``, ``converged``, ``n_empty``, ``smallest`` and ``largest`` cluster, ``silhouette``
      of a sample, ``seconds``, where classes are known ``acc``, ``nmi``, ``ari``, ``purity``, and
      for n_clusters = auto the ``suggestion`` with its reason.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      Interrupted: SIGTERM or Ctrl-C came; everything up to there is saved.
    """
    config = validate(config)
    processes.agree("the config", config.to_dict())
    workdir = Path(workdir).absolute()
    data = processes.together(lambda: open_data(config))
    auto, n_rows = config.n_clusters == AUTO, data.source.n_rows
    most = max(config.sweep.n_clusters) if auto else int(config.n_clusters)
    if most > n_rows and not (auto and n_rows < 3):  # The sweep says that it needs three.
        about = f"sweep.n_clusters has {most} in it" if auto else f"n_clusters is {most}"
        accepted = f"2 to {n_rows - 1:,}" if auto else f"1 to {n_rows:,}"
        raise UserError(
            f"config.{about}, but {data.source.name} has {n_rows:,} rows; accepted: {accepted}"
        )
    if processes.count() > data.source.n_rows:
        raise UserError(
            f"there are {processes.count()} processes for the {data.source.n_rows:,} rows of "
            f"{data.source.name}; accepted: up to one process a row"
        )
    session = Session(config, workdir, data, make_mesh(config.n_devices))
    processes.agree("the data", {"checksum": session.fingerprint})
    # Not before all is read and checked: a file that cannot be clustered leaves no trace.
    processes.on_first(lambda: claim_workdir(workdir, config))
    processes.same_folder(workdir)
    with only_process_in(workdir):
        return _execute(session)


def _execute(session: Session) -> dict[str, Any]:
    """Does what is left to do."""
    config, workdir, source = session.config, session.workdir, session.data.source
    summary = processes.on_first(lambda: read_summary(workdir, session.fingerprint))
    if summary is not None:
        telling.tell(f"{workdir} holds a finished job of this config; nothing to do")
    else:
        with session:
            where = "on" if session.in_memory else "streamed to"
            session.progress.say(
                f"{session.data.name}: {source.n_rows:,} × {source.n_features:,} {source.dtype}, "
                f"{where} {session.mesh.size} × {session.mesh.devices.flat[0].platform}"
            )
            sweep = choose_n_clusters(session) if config.n_clusters == AUTO else None
            k = int(config.n_clusters if sweep is None else sweep["suggestion"])
            found = (fit_in_memory if session.in_memory else fit_streamed)(session, k)
            summary = conclude(session, found, sweep)
    results_table(_headline(summary), f"Results in {workdir}")
    return summary


def _headline(summary: dict[str, Any]) -> dict[str, Any]:
    hidden = ("history", "fingerprint", "versions", "reason")
    return {
        name: "none" if value is None else value
        for name, value in summary.items()
        if name not in hidden
    }
