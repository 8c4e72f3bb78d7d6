"""Stochastic vector quantization by processes that share prototypes through a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jkmeans.asynchronous.rules import Rule, displacement_rule
from jkmeans.asynchronous.work import Work, quantization_work
from jkmeans.asynchronous.worker import Read
from jkmeans.vq import make_steps


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
