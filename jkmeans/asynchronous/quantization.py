"""Stochastic vector quantization by processes that share prototypes through a server."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jkmeans.asynchronous.curve import SHOWN, follow, read_results, results_of
from jkmeans.asynchronous.pictures import STALENESS_PICTURE, draw_curves, draw_staleness
from jkmeans.asynchronous.rules import Rule, displacement_rule
from jkmeans.asynchronous.work import Work, quantization_work
from jkmeans.asynchronous.worker import Read
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.experiment_folder import claim_settings
from jkmeans.kmeans.assignment import assign
from jkmeans.recorder import results_table
from jkmeans.sources.base import ArraySource
from jkmeans.vq import make_steps
from jkmeans.vq.data import first_prototypes, load_samples
from jkmeans.whole_files import write_array, write_json
from jkmeans.workdir import RESULTS_FILE, only_process_in

PROTOTYPES_FILE = "prototypes.npy"
CURVE_PICTURE = "distortion.png"


class QuantizationJob(NamedTuple):
    """Scheme C as a `Job` of the engine.

    Attributes:
      load: the data of all workers, [N, d]; called in every worker, so it must pickle.
      prototypes: w(0), [k, d] float32.
      steps: name, a and b, as `jkmeans.vq.make_steps` takes them.
      n_workers: M; worker i sees rows i, i + M, …, from the first again after the last.
      tau: τ.
      budget: samples of all workers.
    """

    load: Callable[[], np.ndarray]
    prototypes: np.ndarray
    steps: tuple[str, float, float]
    n_workers: int
    tau: int
    budget: int
    synchronous: bool = False

    def first_version(self) -> np.ndarray:
        """See `Job`."""
        return self.prototypes

    def rule(self) -> Rule:
        """See `Job`."""
        return displacement_rule()

    def work(self, worker: int) -> tuple[Work, Read]:
        """See `Job`."""
        share = np.ascontiguousarray(self.load()[worker :: self.n_workers])

        def read(position: int, n: int) -> np.ndarray:
            return share[(position + np.arange(n)) % len(share)]

        return quantization_work(make_steps(*self.steps)), read


def run_vq(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Quantizes the data of an experiment with the worker processes of ``engine`` "ray".

    Order of the samples and first prototypes are those of the simulation with the same seed.

    Args:
      config: validated, see `jkmeans.vq.experiment.FIELDS`: ``workers`` processes see ``duration``
        samples each, on average; who is faster sees more.
      workdir: see `quantize_in_parallel`.

    Returns:
      See `quantize_in_parallel`.

    Raises:
      UserError, CollapseError, Interrupted: see `quantize_in_parallel`.
    """
    values = config.to_dict()
    load = functools.partial(_ordered_samples, values)
    data = load()
    if not 1 <= config.workers <= len(data):
        raise UserError(
            f"config.workers is {config.workers}, but there are {len(data):,} samples; accepted: 1 "
            f"to {len(data):,}"
        )
    rng = np.random.default_rng(config.seed)
    rng.permutation(len(data))  # Spent on the order, as in the simulation.
    job = QuantizationJob(
        load=load,
        prototypes=first_prototypes(rng, data, config.n_clusters, config.init_samples),
        steps=(config.steps.name, config.steps.a, config.steps.b),
        n_workers=config.workers,
        tau=config.tau,
        budget=config.workers * config.duration,
    )
    decisive = ("seed", "n_clusters", "init_samples", "steps", "tau", "duration", "workers")
    settings = {name: values[name] for name in decisive}
    return quantize_in_parallel(job, Path(workdir).absolute(), config.ray, settings, data)


def _ordered_samples(values: dict[str, Any]) -> np.ndarray:
    """The data of all workers, [N, d], in the order in which they are dealt."""
    data = load_samples(ConfigDict(values))
    return data[np.random.default_rng(values["seed"]).permutation(len(data))]


def quantize_in_parallel(
    job: QuantizationJob,
    folder: Path,
    ray: Config,
    settings: dict[str, Any],
    data: np.ndarray,
) -> dict[str, Any]:
    """Runs a job on Ray to its end, or goes on where it stopped, and writes what came of it.

    Args:
      job: what is computed.
      folder: receives ``prototypes.npy`` [k, d], ``results.json``, ``curve.jsonl``,
        ``distortion.png``, ``staleness.png``, the journal and the checkpoints.
      ray: the group ``ray`` of a config, see `jkmeans.ray_session.ray_fields`.
      settings: all that decides the result besides the data, as JSON can hold it: a folder with
        others is refused.
      data: [N, d], what ``job.load`` returns: the distortion is that of all of it.

    Returns:
      What is in ``results.json``: the distortion (``value``), exchanges, samples, seconds, rates,
      staleness, the share of each worker, processes and what deaths of the server undid.

    Raises:
      UserError: the folder, the data, Ray or the cluster cannot be used.
      CollapseError: the prototypes diverged; the last good ones are kept.
      Interrupted: Ctrl-C or SIGTERM came; the same call goes on.
    """
    claim_settings(folder, settings, ArraySource(data).fingerprint())
    with only_process_in(folder):
        results = read_results(folder / RESULTS_FILE) or _quantize(job, folder, ray, data)
    results_table({name: results[name] for name in SHOWN}, f"Results in {folder}")
    return results


def _quantize(job: QuantizationJob, folder: Path, ray: Config, data: np.ndarray) -> dict[str, Any]:
    followed = follow(job, folder, ray, make_criterion(data), name="distortion")
    results = results_of(followed)
    title = f"{len(job.prototypes):,} prototypes, M = {job.n_workers}, τ = {job.tau}"
    draw_staleness(folder / STALENESS_PICTURE, followed.outcome.history.staleness, title)
    draw_curves(
        folder / CURVE_PICTURE,
        {"distortion": followed.points},
        value="normalised distortion",
        count="samples, of all workers",
        title=title,
    )
    write_array(folder / PROTOTYPES_FILE, followed.outcome.shared)
    write_json(folder / RESULTS_FILE, results)
    return results


def make_criterion(data: np.ndarray) -> Callable[[np.ndarray], float]:
    """The distortion C(w) = 1/N Σ min_l ‖z − w_l‖² over the data of all workers.

    Args:
      data: [N, d].
    """
    x = jnp.asarray(data)

    @jax.jit
    def mean_distance(prototypes: jax.Array) -> jax.Array:
        return jnp.mean(assign(x, prototypes).distances)

    return lambda prototypes: float(mean_distance(prototypes))
