"""Stochastic vector quantization by processes that share prototypes through a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jkmeans.asynchronous.curve import claim, follow, results_of
from jkmeans.asynchronous.pictures import STALENESS_PICTURE, draw_curves, draw_staleness
from jkmeans.asynchronous.rules import Rule, displacement_rule
from jkmeans.asynchronous.work import Work, quantization_work
from jkmeans.asynchronous.worker import Read
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.kmeans.assignment import assign
from jkmeans.recorder import results_table
from jkmeans.vq import make_steps
from jkmeans.workdir import only_process_in, write_json

RESULTS_FILE = "results.json"
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


def quantize_in_parallel(
    job: QuantizationJob,
    folder: Path,
    ray: Config,
    *,
    settings: dict[str, Any],
    watch: Callable[[Any], object] = lambda status: None,
) -> dict[str, Any]:
    """Runs a job on Ray to its end, or goes on where it stopped, and writes what came of it.

    Args:
      job: what is computed.
      folder: receives ``prototypes.npy`` [k, d], ``results.json``, ``curve.jsonl``,
        ``distortion.png``, ``staleness.png``, the journal and the checkpoints.
      ray: the group ``ray`` of a config, see `jkmeans.asynchronous.fields`.
      settings: all that decides the result, as JSON can hold it: a folder with others is refused.
      watch: see `jkmeans.asynchronous.engine.run`.

    Returns:
      What is in ``results.json``: the distortion (``value``), exchanges, samples, seconds, rates,
      staleness, the share of each worker, processes and what deaths of the server undid.

    Raises:
      UserError: M, τ or the prototypes do not fit the data; the folder, Ray or the cluster cannot
        be used.
      CollapseError: the prototypes diverged; the last good ones are kept.
      Interrupted: Ctrl-C or SIGTERM came; the same call goes on.
    """
    make_steps(*job.steps)
    claim(folder, settings)
    with only_process_in(folder):
        if (folder / RESULTS_FILE).exists():
            return json.loads((folder / RESULTS_FILE).read_text())
        data = job.load()
        _check(job, len(data))
        followed = follow(job, folder, ray, make_criterion(data), name="distortion", watch=watch)
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
        temporary = folder / f".{PROTOTYPES_FILE}"
        np.save(temporary, followed.outcome.shared)
        temporary.with_suffix(".npy").replace(folder / PROTOTYPES_FILE)
        write_json(folder / RESULTS_FILE, results)
    shown = ("value", "seconds", "exchanges", "exchanges_per_second", "staleness_mean")
    results_table({name: results[name] for name in shown}, f"Results in {folder}")
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


def _check(job: QuantizationJob, n: int) -> None:
    for name, value, most in (
        ("workers", job.n_workers, n),
        ("tau", job.tau, job.budget),
        ("n_clusters", len(job.prototypes), n),
    ):
        if not 1 <= value <= most:
            raise UserError(f"config.{name} is {value}; accepted: 1 to {most:,}")
