"""What benchmarks of an epoch share: the problem, contestants, the clock, the table, flags."""

# PyTorch is an extra, and not there where types are checked.
# pyright: reportMissingImports=none

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.flags import Parser, at_least

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
      judge: says outside the clock what has been learned, in place of the loss of `epoch`.
      seconds: of the epochs that count.
      losses: of all epochs, the one that warms up included; with a judge, what it says before the
        first and after each.
    """

    name: str
    detail: str
    n_steps: int
    compile_seconds: float
    epoch: Callable[[], float]
    judge: Callable[[], float] | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An epoch in jkmeans and in other systems.

    Attributes:
      name: of the module.
      description: what is measured, in a sentence.
      title: what is trained, in words.
      extras: the packages that it needs beyond those of jkmeans, and what people call them.
      make_contestants: from the problem and the flags; returns them, the one that ratios are to
        first, and what is to be said about them.
      columns: the last ones of the table: what is above, and the cell of a row of `summarize`.
      flags: its own ones, as `argparse` takes them.
    """

    name: str
    description: str
    title: str
    extras: Mapping[str, str]
    make_contestants: Callable[[Problem, argparse.Namespace], tuple[list[Contestant], list[str]]]
    columns: Mapping[str, Callable[[dict[str, Any]], str]]
    flags: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def measure(contestants: Sequence[Contestant], repeats: int) -> None:
    """Runs one epoch of each in turn, once to warm up and ``repeats`` times on the clock."""
    for contestant in contestants:
        if contestant.judge:
            contestant.losses.append(contestant.judge())
    for repeat in range(repeats + 1):
        for contestant in contestants:
            started = time.perf_counter()
            loss = contestant.epoch()
            seconds = time.perf_counter() - started
            contestant.losses.append(contestant.judge() if contestant.judge else loss)
            if repeat > 0:
                contestant.seconds.append(seconds)


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


def table(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a line for each row of `summarize`."""
    header = (
        *("", "s/epoch", "min–max", "examples/s", "time / jkmeans", "min–max"),
        *("compile s", "steps", *benchmark.columns),
    )
    lines = [header, ("---",) + ("---:",) * (len(header) - 1)]
    lines += [
        (
            row["name"],
            f"{row['median_seconds']:.3f}",
            f"{row['min_seconds']:.3f}–{row['max_seconds']:.3f}",
            f"{row['examples_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}",
            f"{row['compile_seconds']:.1f}",
            str(row["n_steps"]),
            *(cell(row) for cell in benchmark.columns.values()),
        )
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table, writes the file, and returns what is in it.

    Raises:
      UserError: an extra is not installed, or an option cannot be used here.
    """
    from jkmeans.errors import UserError

    for package, title in benchmark.extras.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{title} is not installed; pip install -e .[benchmarks] installs it")
    threads = options.threads or len(cores())
    use_cores(threads)
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json is {options.json!r}; accepted: a file in a folder that exists")
    import jax
    import torch

    gpu = on_gpu()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    images, source = load_images(options.data, options.examples, options.seed)
    if len(images) < N_CLUSTERS:
        raise UserError(f"--examples is {len(images)}; accepted: 0 (all) or at least {N_CLUSTERS}")
    # Spread evenly over the steps, as jkmeans does: for 70,000 images 256 stays 256.
    n_steps = math.ceil(len(images) / options.batch_size)
    batch_size = math.ceil(len(images) / n_steps)
    problem = Problem(images, source, 1 / 255, batch_size, threads, gpu, options.seed)
    torch.backends.cuda.matmul.allow_tf32 = gpu and options.precision == "tf32"
    precision = options.precision if gpu else "float32"
    with jax.default_matmul_precision(PRECISIONS[precision]) if gpu else contextlib.nullcontext():
        contestants, notes = benchmark.make_contestants(problem, options)
        measure(contestants, options.repeats)
    if load is not None and load > 0.5 * len(cores()):
        notes.append(
            f"warning: the load average was {load:.1f} at the start; threads that wait for each "
            "other, PyTorch's above all, suffer from other programs, so measure on a quiet machine"
        )
    packages = ("jkmeans", "jax", "jaxlib", "flax", "optax", *benchmark.extras, "numpy")
    result = {
        "benchmark": benchmark.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(threads, gpu) | {"load_before": load},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "settings": {
            "data": source,
            "n_examples": len(images),
            "batch_size": batch_size,
            "repeats": options.repeats,
            "seed": options.seed,
            "matmul_precision": precision,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        },
        "notes": notes,
        "rows": [summarize(contestant, contestants[0], len(images)) for contestant in contestants],
    }
    show(benchmark, result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def show(benchmark: Benchmark, result: dict[str, Any]) -> None:
    """Prints what `run` returns."""
    where, settings = result["hardware"], result["settings"]
    print(
        f"{benchmark.title}, {settings['n_examples']:,} images ({settings['data']}), "
        f"batches of {settings['batch_size']}, {settings['matmul_precision']} products, "
        f"medians of {settings['repeats']} epochs"
    )
    print(
        f"{where['gpu'] or 'no GPU'}; {where['cpu']}, {where['threads']} threads; {result['date']}"
    )
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    print()
    print(table(benchmark, result["rows"]))
    print()
    for row in result["rows"]:
        print(f"{row['name']}: {row['detail']}")
    for note in result["notes"]:
        print(note)


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses flags and calls `run`; exits with 2 where something given cannot be used.

    Args:
      benchmark: what to run.
      argv: flags; those of the command line if None.
    """
    parser = Parser(benchmark.name, benchmark.description)
    parser.add_argument("--repeats", type=at_least(1), default=5, help="epochs on the clock")
    parser.add_argument("--threads", type=at_least(0), default=0, help="CPU cores; 0 for all")
    parser.add_argument(
        "--data", choices=("auto", "mnist", "random"), default="auto", help="the images"
    )
    parser.add_argument("--examples", type=at_least(0), default=0, help="how many; 0 for 70,000")
    parser.add_argument("--batch-size", type=at_least(1), default=256, help="examples of a step")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of parameters and order")
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="tf32", help="of products on a GPU"
    )
    for flag, settings in benchmark.flags.items():
        parser.add_argument(flag, **settings)
    parser.add_argument("--json", default="", metavar="FILE", help="also write the result here")
    options = parser.parse_args(argv)
    from jkmeans.errors import UserError

    try:
        return run(benchmark, options)
    except UserError as error:
        parser.error(str(error))
