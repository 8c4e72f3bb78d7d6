"""The end of a run: its scores and results, clusters that are made on the host, its report."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jkmeans import configuration, metrics, processes
from jkmeans.epoch import TrainState
from jkmeans.recorder import read_metrics, results_table
from jkmeans.sharding import REPLICATED, SHARDED, gather_examples, place, to_host
from jkmeans.whole_files import write_json
from jkmeans.workdir import REPORT_FOLDER, RESULTS_FILE

if TYPE_CHECKING:
    from jkmeans.training.run import Run

PAGE_FILE = "report.html"

_AFTER_SCORES = "train_seconds"  # Where results go on that are not of the labels of the data.


def scores(run: Run, state: TrainState) -> dict[str, float]:
    """ACC, NMI, ARI and purity of the clusters; empty where the data has no labels."""
    return scores_of(run, gather_examples(state.labels, run.layout))


def scores_of(run: Run, labels: np.ndarray) -> dict[str, float]:
    """The same for labels [n_examples] in the order of the examples."""
    if run.dataset.labels is None:
        return {}
    return metrics.summarize(run.dataset.labels, labels)


def conclude(
    run: Run, state: TrainState, found: dict[str, float], seconds: float
) -> tuple[TrainState, dict[str, Any]]:
    """The results of a state that is trained and assigned, with what its programs found."""
    started = time.perf_counter()
    if run.method.on_host is not None:
        state, changed = _cluster_on_host(run, state)
        found |= changed
    results: dict[str, Any] = {
        "data": run.dataset.name,
        "n_examples": run.dataset.n_examples,
        "n_clusters": run.config.n_clusters,
        "n_epochs": run.n_epochs,
        "inertia": found["inertia"],
        "embedding_variance": found["embedding_variance"],
        "empty_clusters": int(found["empty_clusters"]),
    }
    results |= scores(run, state)
    results[_AFTER_SCORES] = round(seconds + time.perf_counter() - started, 1)
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results["peak_host_mebibytes"] = peak // (2**20 if sys.platform == "darwin" else 2**10)
    return state, results


def _cluster_on_host(run: Run, state: TrainState) -> tuple[TrainState, dict[str, float]]:
    """The clusters of a method that makes them on the host, at the end."""
    assert run.method.on_host is not None
    run.recorder.say("clustering the embeddings on the host")
    embeddings = gather_examples(state.bank, run.layout)
    clusters, labels = _cluster_embeddings(run, embeddings)
    index = run.layout.row_index()
    distances = np.sum((embeddings - clusters.centroids[labels]) ** 2, axis=1, dtype=np.float64)
    counts = np.bincount(labels, minlength=run.config.n_clusters)
    state = state._replace(
        clusters=jax.tree.map(lambda leaf: place(leaf, run.mesh, REPLICATED), clusters),
        labels=place(np.where(index >= 0, labels[index], 0), run.mesh, SHARDED),
    )
    return state, {
        "inertia": float(np.sum(distances)),
        "empty_clusters": float(np.sum(counts == 0)),
    }


def _cluster_embeddings(run: Run, embeddings: np.ndarray) -> tuple[Any, np.ndarray]:
    """What the method makes of all embeddings: on process 0, whose result all take."""
    on_host, seed = run.method.on_host, run.config.seed
    assert on_host is not None
    found = processes.together(lambda: on_host(embeddings, seed) if processes.is_first() else None)
    if processes.count() == 1:
        assert found is not None
        return found
    from jax.experimental import multihost_utils

    k, p = run.config.n_clusters, run.config.network.embedding_dim
    blank = (run.method.blank(k, p, len(embeddings)), np.zeros(len(embeddings), np.int32))
    given = jax.tree.map(lambda leaf, value: np.asarray(value, leaf.dtype), blank, found or blank)
    return multihost_utils.broadcast_one_to_all(given)


def report(run: Run, state: TrainState, results: dict[str, Any]) -> dict[str, Any]:
    """Writes results.json and the pictures, prints the table."""
    if processes.is_first():
        write_json(run.workdir / RESULTS_FILE, results)
    if run.config.report.pictures:
        _draw(run, state, results)
    results_table(results, f"Results in {run.workdir}")
    return results


def report_again(run: Run, state: TrainState, results: dict[str, Any]) -> dict[str, Any]:
    """Reports a finished run, with scores by the labels that the data has now."""
    now = scores(run, state)
    again = {}
    for name, value in results.items():
        if name == _AFTER_SCORES:
            again |= now
        if name not in metrics.SUMMARY:
            again[name] = value
    return report(run, state, again)


def _draw(run: Run, state: TrainState, results: dict[str, Any]) -> None:
    from jkmeans.report import write_page, write_report
    from jkmeans.report.clusters import ClusteredExamples
    from jkmeans.report.maps import map_embeddings

    bank = gather_examples(state.bank, run.layout)
    labels = gather_examples(state.labels, run.layout)
    centroids = to_host(state.clusters.centroids)
    if not processes.is_first():
        return
    arrays = {
        "embeddings": bank,
        "labels": labels,
        "distances": np.sqrt(np.sum((bank - centroids[labels]) ** 2, axis=1)),
        "centroids": centroids,
        "examples": run.dataset.examples,
        "truth": run.dataset.labels,
    }
    seed = run.config.seed
    placed = map_embeddings(ClusteredExamples.of(**arrays, class_names=None), seed)
    shared: dict[str, Any] = {
        "metrics": read_metrics(run.workdir),
        "seed": seed,
        "title": f"{run.dataset.name}, {run.config.objective.name}, K = {run.config.n_clusters}",
        "embedding_map": placed,
        **arrays,
    }
    write_report(run.workdir / REPORT_FOLDER, **shared)
    config = configuration.to_json(run.config)
    write_page(run.workdir / PAGE_FILE, results=results, config=config, **shared)
