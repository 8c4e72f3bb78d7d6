"""The notebook case: a million points in a few blobs, made, clustered and predicted on all devices.

`cluster_blobs` measures it, next to scikit-learn on the same points.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jkmeans import experiment_folder, kmeans, metrics, sharded
from jkmeans.configuration import Config, Field, boolean, choice, convert_fields, integer, nest
from jkmeans.configuration import number as number_field
from jkmeans.errors import UserError
from jkmeans.generation import make_blobs
from jkmeans.recorder import results_table
from jkmeans.sharding import make_mesh
from jkmeans.whole_files import write_json
from jkmeans.workdir import RESULTS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_FILE = "blobs.png"

_PIXELS = 600


def _convert_box(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TypeError
    low, high = (float(bound) for bound in value)
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError
    return low, high


FIELDS: dict[str, Field] = {
    "seed": integer(0, "the root of all random keys"),
    "n_devices": integer(0, "devices of the mesh; 0 for all"),
    "blobs.n_samples": integer(1, "N"),
    "blobs.n_features": integer(1, "D"),
    "blobs.n_clusters": integer(1, "K"),
    "blobs.cluster_std": number_field("standard deviation of a blob"),
    "blobs.center_box": Field(
        _convert_box, "a tuple of a lower and a higher number", "where centers may lie"
    ),
    "init": choice(tuple(kmeans.INITIALIZATIONS), "how the first centroids are chosen"),
    "n_init": integer(1, "restarts, of both programs"),
    "max_iter": integer(1, "iterations of a restart, at most, of both programs"),
    "tol": number_field("in mean variances of the features, of both programs"),
    "scikit_learn": boolean("whether to run scikit-learn on the same points"),
    "pictures": boolean("whether to draw the clusters"),
}


def validate(config: Config) -> Config:
    """The config with every value in its proper type.

    Raises:
      UserError: a field is unknown, missing, of a wrong type or value, or contradicts another.
    """
    values = convert_fields(config, FIELDS)
    if values["blobs.n_clusters"] > values["blobs.n_samples"]:
        raise UserError(
            f"config.blobs.n_clusters is {values['blobs.n_clusters']}, but n_samples is "
            f"{values['blobs.n_samples']}; accepted: 1 to {values['blobs.n_samples']}"
        )
    return nest(values)


def cluster_blobs(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Makes blobs on all devices, clusters and predicts them, and compares with scikit-learn.

    Every step runs twice: the first time compiles, the second is measured. scikit-learn gets the
    same points twice as well: with as many restarts of its own k-means++, and for one run from the
    same first centroids as one run of jkmeans.

    Args:
      config: complete, as ``configs/blobs_1m.py``; see `FIELDS`.
      workdir: receives ``results.json`` and ``blobs.png``; where it has them of the same config,
        they are made anew.

    Returns:
      What is in ``results.json``: seconds of each step, compilation apart (``*_compile_seconds``);
      ``inertia``, ``n_iter``; ``ari_truth``, the adjusted Rand index with the blobs; and of
      scikit-learn ``*_seconds``, ``inertia`` and ``ari`` with its labels.

    Raises:
      UserError: the config or the workdir cannot be used.
    """
    config = validate(config)
    mesh = make_mesh(config.n_devices)
    folder = Path(workdir).absolute()
    with experiment_folder.held(folder, config, FIELDS, runtime=("pictures",)):
        return _measure(config, mesh, folder)


def _measure(config: Config, mesh: Mesh, folder: Path) -> dict[str, Any]:
    blobs = config.blobs
    key, start_key = jax.random.split(jax.random.key(config.seed))
    results: dict[str, Any] = {
        "devices": f"{mesh.size} × {mesh.devices.flat[0].platform}",
        "n_samples": blobs.n_samples,
        "n_features": blobs.n_features,
        "n_clusters": blobs.n_clusters,
    }

    def measured(name: str, call: Callable[[], Any]) -> Any:
        first = _seconds(call)[1]
        found, seconds = _seconds(call)
        results[f"{name}_seconds"] = seconds
        results[f"{name}_compile_seconds"] = max(0.0, first - seconds)
        return found

    x, truth, _ = measured(
        "generate",
        lambda: make_blobs(
            config.seed,
            blobs.n_samples,
            blobs.n_features,
            blobs.n_clusters,
            cluster_std=blobs.cluster_std,
            center_box=blobs.center_box,
            mesh=mesh,
        ),
    )
    options = {"max_iter": config.max_iter, "tol": config.tol, "relative_tol": True, "mesh": mesh}
    fitted = measured(
        "fit",
        lambda: sharded.fit(
            key, x, blobs.n_clusters, init=config.init, n_init=config.n_init, **options
        ),
    )
    labels = np.asarray(
        measured("predict", lambda: sharded.nearest(x, fitted.centroids, mesh=mesh))
    )
    results["inertia"] = float(fitted.inertia)
    results["n_iter"] = int(fitted.n_iter)
    results["ari_truth"] = metrics.adjusted_rand_index(np.asarray(truth), labels)
    if config.scikit_learn:
        host_x = np.asarray(x)
        generator = np.random.default_rng(np.asarray(jax.random.key_data(start_key)))
        start = host_x[generator.choice(len(host_x), blobs.n_clusters, replace=False)]
        one = measured(
            "one_run", lambda: sharded.fit(key, x, blobs.n_clusters, init=start, **options)
        )
        results |= _scikit_learn(config, host_x, labels, start, np.asarray(one.labels))
    if config.pictures:
        from jkmeans.drawing import save

        host_x = np.asarray(x)
        title = f"{blobs.n_samples:,} × {blobs.n_features}, K = {blobs.n_clusters}"
        save(draw(host_x, labels, np.asarray(fitted.centroids), title), folder / PICTURE_FILE)
    write_json(folder / RESULTS_FILE, results)
    results_table(_readable(results), f"Results in {folder}")
    return results


def _scikit_learn(config, x, labels, start, one_labels) -> dict[str, Any]:
    """Times of scikit-learn, and how far its labels agree."""
    from sklearn.cluster import KMeans

    options = {"n_clusters": len(start), "max_iter": config.max_iter, "tol": config.tol}
    best, seconds = _seconds(
        lambda: KMeans(n_init=config.n_init, random_state=config.seed, **options).fit(x)
    )
    predicted, predict_seconds = _seconds(lambda: best.predict(x))
    from_start: Any = {"init": start, "n_init": 1}
    one, one_seconds = _seconds(lambda: KMeans(**from_start, **options).fit(x))
    return {
        "scikit_learn_fit_seconds": seconds,
        "scikit_learn_predict_seconds": predict_seconds,
        "scikit_learn_one_run_seconds": one_seconds,
        "scikit_learn_inertia": float(best.inertia_),
        "scikit_learn_n_iter": int(best.n_iter_),
        "ari_scikit_learn": metrics.adjusted_rand_index(predicted, labels),
        "ari_one_run": metrics.adjusted_rand_index(one.labels_, one_labels),
    }


def draw(x: np.ndarray, labels: np.ndarray, centroids: np.ndarray, title: str) -> Figure:
    """Density of the first two features, in the colours of the clusters.

    Args:
      x: [n, d], d at least 1.
      labels: [n] int.
      centroids: [k, d].
      title: of the picture.
    """
    from jkmeans.drawing import INK, head_figure, new_figure, palette, soften
    from jkmeans.report.clusters import SHOWN_CLUSTERS

    one_feature = x.shape[1] == 1
    if one_feature:
        # The height means nothing: it only spreads the points.
        height = np.random.default_rng(0).uniform(-1, 1, len(x))
        x = np.column_stack([x[:, 0], height])
        centroids = np.column_stack([centroids[:, 0], np.zeros(len(centroids))])
    k = len(centroids)
    lowest, highest = x[:, :2].min(axis=0), x[:, :2].max(axis=0)
    margin = 0.02 * np.maximum(highest - lowest, 1e-6)
    lowest, highest = lowest - margin, highest + margin
    pixel = ((x[:, :2] - lowest) / (highest - lowest) * _PIXELS).astype(np.int64)
    cell = pixel[:, 1] * _PIXELS + pixel[:, 0]
    palette = palette(k)
    total = np.bincount(cell, minlength=_PIXELS**2)
    # The mean colour of a cell's points, on white; the more points, the fuller, by the logarithm.
    colour = (
        np.stack(
            [np.bincount(cell, palette[labels, c], minlength=_PIXELS**2) for c in range(3)], axis=1
        )
        / np.maximum(total, 1)[:, None]
    )
    strength = np.where(total > 0, 0.25 + 0.75 * np.log1p(total) / np.log1p(total.max()), 0)
    image = 1 - strength[:, None] * (1 - colour)
    figure = new_figure(7, 7)
    ax = figure.subplots()
    ax.imshow(
        image.reshape(_PIXELS, _PIXELS, 3),
        origin="lower",
        extent=(lowest[0], highest[0], lowest[1], highest[1]),
        interpolation="nearest",
        aspect="auto",
    )
    few = k <= SHOWN_CLUSTERS
    ax.scatter(
        centroids[:, 0],
        centroids[:, 1],
        marker="X" if few else "o",
        s=60 if few else 10,
        c=INK,
        edgecolors="white",
        linewidths=0.9,
    )
    ax.set_xlabel("feature 0", fontsize=9, color=INK)
    ax.set_ylabel("" if one_feature else "feature 1", fontsize=9, color=INK)
    soften(ax, 8.5)
    ax.grid(visible=False)
    head_figure(figure, title, "Points by cluster, darker where there are more (× centroids)")
    return figure


def _seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = jax.block_until_ready(call())
    return found, time.perf_counter() - started


def _readable(results: dict[str, Any]) -> dict[str, Any]:
    return {
        name: f"{value:.3f}" if name.endswith("seconds") else value
        for name, value in results.items()
    }
