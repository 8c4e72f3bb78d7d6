"""Asynchronous and synchronous stochastic gradient descent with a parameter server, compared.

Asynchronous: a step of the optimizer for every gradient, as it comes. Synchronous: a step for every
round, with the mean of the gradients of all workers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jkmeans import datasets
from jkmeans.asynchronous.curve import (
    CURVE_FILE,
    SHOWN,
    Curve,
    follow,
    read_results,
    results_of,
)
from jkmeans.asynchronous.pictures import STALENESS_PICTURE, draw_curves, draw_staleness
from jkmeans.asynchronous.rules import Rule, Tree, gradient_rule
from jkmeans.asynchronous.work import Work, gradient_work
from jkmeans.asynchronous.worker import Read
from jkmeans.configuration import Config, convert_fields, nest
from jkmeans.errors import UserError
from jkmeans.experiment_folder import claim_settings
from jkmeans.fields import Field, choice, integer, integers, number
from jkmeans.problems import (
    OPTIMIZERS,
    PROBLEMS,
    Problem,
    fingerprint_of_examples,
    make_problem,
)
from jkmeans.ray_session import ray_fields
from jkmeans.recorder import results_table
from jkmeans.whole_files import write_json
from jkmeans.workdir import RESULTS_FILE, only_process_in

CURVES_PICTURE = "curves.png"
MODES = ("asynchronous", "synchronous")

FIELDS: dict[str, Field] = {
    "seed": integer(0, "of the first parameters and the order of examples"),
    "data.name": choice(datasets.NAMED, "the data set"),
    "data.n_examples": integer(0, "only the first so many; 0 for all"),
    "problem.name": choice(tuple(PROBLEMS), "model, loss and examples", or_function=True),
    "problem.widths": integers("of hidden layers"),
    "workers": integer(1, "M, processes that compute gradients"),
    "batch_size": integer(1, "examples of a gradient"),
    "n_epochs": integer(1, "times that all examples are seen, by all workers together"),
    "optimizer": choice(tuple(OPTIMIZERS), "of the server; momentum is .9"),
    "asynchronous.learning_rate": number("of a step with one gradient", positive=True),
    "synchronous.learning_rate": number("of a step with the mean of M gradients", positive=True),
    **ray_fields("gradients", "batches"),
}


class GradientJob(NamedTuple):
    """Stochastic gradient descent as a `Job` of the engine.

    Attributes:
      config: plain values, see `FIELDS`.
      parameters: the first ones, a pytree of NumPy arrays.
      mode: one of MODES.
      n_workers: M; worker i has examples i, i + M, …, in an order of its own in every epoch.
      tau: examples of a gradient.
      budget: examples of all workers.
      synchronous: whether workers wait for each other.
    """

    config: dict[str, Any]
    parameters: Tree
    mode: str
    n_workers: int
    tau: int
    budget: int
    synchronous: bool

    def first_version(self) -> Tree:
        """See `Job`."""
        return self.parameters

    def rule(self) -> Rule:
        """See `Job`."""
        rate = self.config[self.mode]["learning_rate"]
        return gradient_rule(OPTIMIZERS[self.config["optimizer"]](rate))

    def work(self, worker: int) -> tuple[Work, Read]:
        """See `Job`."""
        problem = make_problem(ConfigDict(self.config))
        share = jax.tree.map(lambda rows: rows[worker :: self.n_workers], problem.examples)
        order = _Order(self.config["seed"], worker, len(jax.tree.leaves(share)[0]))

        def read(position: int, n: int) -> Any:
            rows = order.rows(position, n)
            return jax.tree.map(lambda examples: examples[rows], share)

        return gradient_work(problem.loss), read


class _Order:
    """The order in which a worker sees its examples: shuffled anew in each epoch."""

    def __init__(self, seed: int, worker: int, n: int):
        self._seed, self._worker, self._n = seed, worker, n
        self._epoch = -1
        self._permutation = np.arange(0)

    def rows(self, position: int, n: int) -> np.ndarray:
        found = []
        while n > 0:
            epoch, start = divmod(position, self._n)
            if epoch != self._epoch:
                rng = np.random.default_rng((self._seed, self._worker, epoch))
                self._permutation, self._epoch = rng.permutation(self._n), epoch
            found.append(self._permutation[start : start + n])
            position, n = position + len(found[-1]), n - len(found[-1])
        return np.concatenate(found)


def validate(config: Config) -> Config:
    """The config with every value in its proper type.

    Raises:
      UserError: a field is unknown, missing, or of a wrong type or value.
    """
    values = convert_fields(config, FIELDS)
    if values["ray.checkpoint_exchanges"] < 2 * values["workers"]:
        raise UserError(
            f"config.ray.checkpoint_exchanges is {values['ray.checkpoint_exchanges']}, but a round "
            f"has {values['workers']}; accepted: at least {2 * values['workers']}"
        )
    return nest(values)


def run_sgd(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains one model twice, asynchronously and synchronously, on the same examples.

    Args:
      config: complete, as ``configs/parallel_sgd.py``; see `FIELDS`.
      workdir: receives a folder for each mode, ``results.json`` and ``curves.png``. What is there
        already goes on, or is reported again.

    Returns:
      What is in ``results.json``: for each mode the error (``value``), seconds, gradients
      (``exchanges``), rates and the staleness.

    Raises:
      UserError: the config, the workdir or the cluster cannot be used.
      CollapseError: the error is not finite, or has exploded.
      Interrupted: Ctrl-C or SIGTERM came; the same command goes on.
    """
    config = validate(config)
    folder = Path(workdir).absolute()
    plain = config.to_dict()
    # Before the workdir is touched: a config that cannot be used leaves no trace.
    problem = make_problem(config)
    n = len(jax.tree.leaves(problem.examples)[0])
    if n < config.workers:
        raise UserError(
            f"config.workers is {config.workers}, but there are {n:,} examples; accepted: 1 to "
            f"{n:,}"
        )
    decisive = {name: value for name, value in plain.items() if name != "ray"}
    claim_settings(folder, decisive, fingerprint_of_examples(problem))
    with only_process_in(folder):
        results, curves = {}, {}
        for mode in MODES:
            results[mode], curves[mode] = _train(config, mode, folder / mode, problem, n)
        write_json(folder / RESULTS_FILE, results)
        draw_curves(
            folder / CURVES_PICTURE,
            curves,
            value="error",
            count="examples, of all workers",
            title=f"{config.problem.name} on {config.data.name}, M = {config.workers}",
        )
    for mode in MODES:
        results_table({name: results[mode][name] for name in SHOWN}, f"{mode}, in {folder}")
    return results


def _train(
    config: Config, mode: str, folder: Path, problem: Problem, n: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Results and curve of one mode; those that are there already, if it has ended."""
    folder.mkdir(exist_ok=True)
    there, points = read_results(folder / RESULTS_FILE), Curve(folder / CURVE_FILE).points
    if there is not None and points:
        return there, points
    job = GradientJob(
        config=config.to_dict(),
        parameters=jax.tree.map(np.asarray, problem.init(jax.random.key(config.seed))),
        mode=mode,
        n_workers=config.workers,
        tau=config.batch_size,
        budget=config.n_epochs * n,
        synchronous=mode == "synchronous",
    )
    options = ConfigDict(config.ray.to_dict())
    if job.synchronous:
        options.ahead = 0
    followed = follow(
        job, folder, options, lambda shared: float(problem.error(shared)), name="error"
    )
    results = results_of(followed)
    draw_staleness(
        folder / STALENESS_PICTURE,
        followed.outcome.history.staleness,
        f"{mode.capitalize()} gradients, M = {config.workers}",
    )
    write_json(folder / RESULTS_FILE, results)
    return results, followed.points
