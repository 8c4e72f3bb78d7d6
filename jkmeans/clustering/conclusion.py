"""The end of a job: its centroids, pictures and summary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jkmeans import metrics, processes, selection
from jkmeans.clustering.folder import LABELS_FILE, SIZES_FILE, SUMMARY_FILE, write_npy
from jkmeans.clustering.found import Found
from jkmeans.clustering.session import Session
from jkmeans.errors import underflow_sentence
from jkmeans.versions import versions
from jkmeans.whole_files import write_json
from jkmeans.workdir import CENTROIDS_FILE, REPORT_FOLDER


def conclude(session: Session, found: Found, sweep: dict[str, Any] | None) -> dict[str, Any]:
    """Writes what is not written yet: centroids, sizes, pictures and, last, the summary.

    Args:
      session: of the job.
      found: by its fit.
      sweep: over K, where there was one.

    Returns:
      What is in ``summary.json``.

    Raises:
      Interrupted: the job was asked to stop while there was more to do than to draw.
    """
    session.stop_if_asked()
    k = len(found.sizes)
    write_npy(session.workdir / CENTROIDS_FILE, found.centroids)
    write_npy(session.workdir / SIZES_FILE, found.sizes)
    labels = found.labels
    if labels is None:
        # Of a file that another host has just written: when process 0 says it is there.
        processes.gather("written")
        labels = np.load(session.workdir / LABELS_FILE, mmap_mode="r")
    key = session.key(0)
    numbers, rows = session.sample(key, session.config.report.sample_size)
    sample_labels = np.asarray(labels[numbers])
    # Around their mean, because JAX may take float64 as float32.
    centered = rows - rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    centered /= selection.unit_of(centered)
    silhouettes = session.compute(
        lambda: np.asarray(selection.silhouette_samples(centered, sample_labels, k))
    )
    session.stop_if_asked()
    summary = _summary(session, found, len(rows), silhouettes, np.asarray(labels), sweep)
    if session.config.report.pictures and processes.is_first():
        session.progress.update("drawing")
        from jkmeans.report.kmeans import write_report

        write_report(
            session.workdir / REPORT_FOLDER,
            rows=rows,
            labels=sample_labels,
            silhouettes=silhouettes,
            centroids=found.centroids,
            sizes=found.sizes,
            history=found.history,
            sweep=sweep,
            image_shape=session.data.shape,
            title=f"{session.data.name}, K = {k:,}",
        )
    if summary["n_empty"]:
        session.progress.say(
            f"{summary['n_empty']:,} of {k:,} clusters are empty: there are fewer different "
            "rows than clusters, or config.empty is 'keep'"
        )
    if vanishing := underflow_sentence(found.centroids):
        session.progress.say(vanishing)
    # Last: it says that all the rest is there.
    if processes.is_first():
        write_json(session.workdir / SUMMARY_FILE, summary)
    return summary


def _summary(
    session: Session,
    found: Found,
    n_sampled: int,
    silhouettes: np.ndarray,
    labels: np.ndarray,
    sweep: dict[str, Any] | None,
) -> dict[str, Any]:
    silhouette = float(np.mean(silhouettes))
    summary: dict[str, Any] = {
        "input": session.data.name,
        "n_rows": len(labels),
        "n_features": session.data.source.n_features,
        "n_clusters": len(found.sizes),
        "inertia": found.inertia,
        "n_iter": found.n_iter,
        "converged": found.converged,
        "n_empty": int((found.sizes == 0).sum()),
        "smallest": int(found.sizes.min()),
        "largest": int(found.sizes.max()),
        "silhouette": silhouette if math.isfinite(silhouette) else None,
        "silhouette_rows": n_sampled,
    }
    if session.data.truth is not None:
        summary |= metrics.summarize(session.data.truth, labels)
    if sweep is not None:
        summary |= {"suggestion": sweep["suggestion"], "reason": sweep["reason"]}
    summary["seconds"] = round(found.seconds, 3)
    summary["history"] = [{"restart": r, "iteration": i, "inertia": v} for r, i, v in found.history]
    summary["fingerprint"] = session.fingerprint
    summary["versions"] = versions("jax", "jaxlib", "numpy")
    return summary
