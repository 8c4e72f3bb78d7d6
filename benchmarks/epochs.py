"""What benchmarks of an epoch share: the problem, contestants, cores, flags."""

# PyTorch is an extra, and not there where types are checked.
# pyright: reportMissingImports=none

import argparse
import contextlib
import dataclasses
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

N_CLUSTERS = 10
PRECISIONS = {"tf32": "tensorfloat32", "float32": "highest"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every contestant is given.

    Attributes:
      images: [n, 28, 28] uint8.
      source: where they come from, in words.
      scale: images are multiplied by it.
      batch_size: examples of a step.
      threads: of the CPU.
      gpu: whether the work is done on a GPU.
      seed: of parameters and order.
    """

    images: np.ndarray
    source: str
    scale: float
    batch_size: int
    threads: int
    gpu: bool
    seed: int


@dataclasses.dataclass
class Contestant:
    """One way to compute an epoch, ready to run.

    Attributes:
      name: in the table.
      detail: the choices behind it, in words.
      n_steps: steps of an epoch.
      compile_seconds: spent before the first epoch; 0 where nothing is compiled.
      epoch: trains for an epoch, waits for its end and returns its mean loss.
      seconds: of the epochs that count.
      losses: of all epochs, the one that warms up included.
    """

    name: str
    detail: str
    n_steps: int
    compile_seconds: float
    epoch: Callable[[], float]
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)


def summarize(contestant: Contestant, first: Contestant, n_examples: int) -> dict[str, Any]:
    """The numbers of a contestant; its ratio is to ``first``, with the spread of single turns."""
    median = statistics.median(contestant.seconds)
    turns = [a / b for a, b in zip(contestant.seconds, first.seconds, strict=True)]
    return {
        "name": contestant.name,
        "detail": contestant.detail,
        "n_steps": contestant.n_steps,
        "compile_seconds": contestant.compile_seconds,
        "seconds": contestant.seconds,
        "median_seconds": median,
        "min_seconds": min(contestant.seconds),
        "max_seconds": max(contestant.seconds),
        "examples_per_second": n_examples / median,
        "ratio": median / statistics.median(first.seconds),
        "ratio_min": min(turns),
        "ratio_max": max(turns),
        "losses": contestant.losses,
    }


def load_images(name: str, n_examples: int, seed: int) -> tuple[np.ndarray, str]:
    """Images [n, 28, 28] uint8, and where they come from.

    Args:
      name: ``mnist``, ``random``, or ``auto`` for MNIST where it can be had, random otherwise.
      n_examples: the first so many; 0 for 70,000.
      seed: of random images.

    Raises:
      UserError: MNIST was asked for and cannot be had.
    """
    from jkmeans import datasets
    from jkmeans.errors import UserError

    without = ""
    if name != "random":
        try:
            found = datasets.load("mnist", n_examples=n_examples)
            return np.asarray(found.examples), "MNIST"
        except UserError as error:
            if name == "mnist":
                raise
            without = f" (MNIST: {error})"
    rng = np.random.default_rng(seed)
    shape = (n_examples or 70_000, 28, 28)
    return rng.integers(0, 256, shape, np.uint8), "random uint8" + without


def on_gpu() -> bool:
    """Whether both frameworks see a GPU; where only JAX does, it is told to stay on the CPU."""
    import jax
    import torch

    if not torch.cuda.is_available():
        jax.config.update("jax_platforms", "cpu")
        return False
    return jax.default_backend() == "gpu"


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def use_cores(n: int) -> None:
    """Keeps everything that starts from here on the first n cores.

    JAX has no option for its number of threads; it starts one for each core that it may use.

    Raises:
      UserError: there are fewer, or it is too late or impossible to choose.
    """
    from jkmeans.errors import UserError

    available = cores()
    if n == len(available):
        return
    if n > len(available):
        raise UserError(f"--threads is {n}; accepted: 0 (all) to {len(available)}, the cores here")
    if "jax" in sys.modules or not hasattr(os, "sched_setaffinity"):
        reason = "JAX has started" if "jax" in sys.modules else "this system cannot pin processes"
        raise UserError(f"--threads is {n}, but {reason}; accepted: 0 (all cores)")
    os.sched_setaffinity(0, available[:n])


def hardware(threads: int, gpu: bool) -> dict[str, Any]:
    """What the epochs ran on."""
    import jax

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), model)
    return {
        "cpu": model,
        "threads": threads,
        "gpu": jax.devices()[0].device_kind if gpu else None,
    }


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one sentence."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that holds an integer of at least so much."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} is given; accepted: an integer of at least {least}"
            )
        return value

    return convert
