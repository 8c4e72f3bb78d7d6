"""One epoch of the 784-500-500-2000-10 autoencoder, in jkmeans and in PyTorch.

    python -m benchmarks.autoencoder_epoch --repeats 5 --threads 2 --json epoch.json

Both train the same network (ReLU between the layers, mean squared error, Adam at 1e-3, batches of
256, float32) from the same initial parameters on the same images, on the same cores or the same
GPU, in one process, taking turns: an epoch of one, an epoch of the other. The first epoch of each
warms up and is not counted; compilation is timed apart. PyTorch gets the fastest of its Adam
implementations and of two ways to hold the images, found by a trial on the spot. The losses are
printed to show that the same work is done.

jkmeans runs its own compiled epoch (`jkmeans.epoch`); besides the pretraining epoch, which is what
PyTorch is compared with, its epoch of joint clustering is timed, re-computation of the centroids
included. PyTorch is an extra: ``pip install -e .[benchmarks]``.
"""

# PyTorch is an extra, and not there where types are checked.
# pyright: reportMissingImports=none

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.epochs import (
    N_CLUSTERS,
    PRECISIONS,
    Contestant,
    Parser,
    Problem,
    at_least,
    cores,
    hardware,
    load_images,
    on_gpu,
    summarize,
    use_cores,
)

TRIAL_STEPS = 20


def jkmeans_contestants(problem: Problem) -> tuple[list[Contestant], dict[str, np.ndarray]]:
    """The compiled epochs of jkmeans on one device, and the initial parameters by path."""
    import jax

    from configs import mnist
    from jkmeans import configuration
    from jkmeans.epoch import Rows, make_programs
    from jkmeans.methods import make_method
    from jkmeans.networks import blueprint
    from jkmeans.sharding import DATA_AXIS, SHARDED, Layout, make_mesh, place, place_rows

    config = mnist.get_config()
    config.update_from_flattened_dict(
        {
            "n_devices": 1,
            "n_clusters": N_CLUSTERS,
            "data.n_shards": 1,
            "training.batch_size": problem.batch_size,
            # The phase is chosen below; the weight of the centroids rises from the start.
            "training.n_pretrain_epochs": 0,
            # The first centroids are not part of an epoch, so one start will do.
            "centroids.n_init": 1,
            # The plain autoencoder and the plain objective, which is what PyTorch runs here.
            "network.normalize": False,
            "augmentation.shift": 0.0,
            "augmentation.rotation": 0.0,
            "augmentation.zoom": 0.0,
            "centroids.bank": "stored",
            "objective.assignment": "nearest",
            "objective.reconstruction_weight": 1.0,
            "objective.centroid_weight": 0.1,
            "objective.balance_weight": 0.0,
        }
    )
    config = configuration.validate(config)

    shape = problem.images.shape[1:]
    mesh = make_mesh(1)
    layout = Layout(len(problem.images), problem.batch_size, n_shards=1, n_devices=1)
    plan = blueprint(config.network, shape)
    method = make_method(config, DATA_AXIS)
    programs = make_programs(config, plan, method, layout, mesh, shape, problem.scale)
    first = programs.create(np.uint32(problem.seed)).parameters
    initial = {name: np.array(value) for name, value in first.items()}
    index = layout.row_index()
    rows = Rows(
        examples=place_rows(problem.images, layout, mesh),
        weights=place((index >= 0).astype(np.float32), mesh, SHARDED),
        index=place(index, mesh, SHARDED),
    )

    def contestant(name: str, *, clustering: bool) -> Contestant:
        state = programs.create(np.uint32(problem.seed))
        if clustering:
            state = programs.refresh(state, rows)
            state, _ = programs.initialize(state, rows)
        started = time.perf_counter()
        program = programs.epoch.lower(state, rows, clustering=clustering).compile()
        seconds = time.perf_counter() - started

        def epoch() -> float:
            nonlocal state
            state, metrics = program(state, rows)
            jax.block_until_ready((state, metrics))
            return float(metrics["loss/reconstruction"])

        detail = "one compiled program"
        if clustering:
            detail += f", K = {N_CLUSTERS}, Lloyd iterations at its end included"
        return Contestant(name, detail, layout.n_steps, seconds, epoch)

    return [
        contestant("jkmeans", clustering=False),
        contestant("jkmeans, clustering", clustering=True),
    ], initial


def torch_contestants(
    problem: Problem, initial: dict[str, np.ndarray], *, compiled: bool
) -> tuple[list[Contestant], list[str]]:
    """PyTorch, eager and compiled.

    Args:
      problem: what to train on.
      initial: parameters by path, as jkmeans has them.
      compiled: whether to try ``torch.compile`` as well.

    Returns:
      The contestants, and what is to be said about them.
    """
    import torch
    from torch import nn

    torch.set_num_threads(problem.threads)
    torch.manual_seed(problem.seed)
    device = torch.device("cuda" if problem.gpu else "cpu")
    n = len(problem.images)
    flat = torch.from_numpy(problem.images.reshape(n, -1)).to(device)
    held = {"float32 images": flat.to(torch.float32) * problem.scale, "uint8 images": flat}
    adams: dict[str, dict[str, Any]] = {
        "fused Adam": {"fused": True},
        "foreach Adam": {"foreach": True},
        "plain Adam": {"foreach": False},
    }

    def network() -> nn.Sequential:
        layers: list[nn.Module] = []
        for part in ("encoder", "decoder"):
            n_layers = sum(name.startswith(part) for name in initial) // 2
            for i in range(n_layers):
                kernel = torch.from_numpy(initial[f"{part}/{i}/kernel"].T.copy())
                linear = nn.Linear(kernel.shape[1], kernel.shape[0])
                with torch.no_grad():
                    linear.weight.copy_(kernel)
                    linear.bias.copy_(torch.from_numpy(initial[f"{part}/{i}/bias"]))
                layers += [linear, nn.ReLU()] if i < n_layers - 1 else [linear]
        return nn.Sequential(*layers).to(device)

    def make_step(adam: str, images: str, *, compiled: bool) -> tuple[Callable, Callable]:
        """A step from the numbers of a batch to its mean loss, and the way back to the start."""
        model, pixels = network(), held[images]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **adams[adam])

        def objective(x):
            return nn.functional.mse_loss(model(x), x)

        if compiled:
            # On a GPU the compiled step is also replayed as a CUDA graph.
            mode = "reduce-overhead" if problem.gpu else None
            objective = torch.compile(objective, dynamic=False, mode=mode)

        def step(chosen):
            x = pixels.index_select(0, chosen)
            if x.dtype == torch.uint8:
                x = x.to(torch.float32).mul_(problem.scale)
            optimizer.zero_grad(set_to_none=True)
            loss = objective(x)
            loss.backward()
            optimizer.step()
            return loss.detach()

        start = {name: value.clone() for name, value in model.state_dict().items()}

        def restart():
            model.load_state_dict(start)
            optimizer.state.clear()

        return step, restart

    def synchronize() -> None:
        if problem.gpu:
            torch.cuda.synchronize()

    def batches():
        return torch.randperm(n, device=device).split(problem.batch_size)

    def seconds_of_step(step: Callable) -> float:
        times = []
        chosen = batches()[0]
        for _ in range(TRIAL_STEPS):
            started = time.perf_counter()
            step(chosen)
            synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    trials = {
        (adam, images): seconds_of_step(make_step(adam, images, compiled=False)[0])
        for adam in adams
        for images in held
    }
    adam, images = min(trials, key=lambda choice: trials[choice])
    notes = [
        "PyTorch trial, ms a step: "
        + ", ".join(f"{a} on {i} {1e3 * s:.1f}" for (a, i), s in trials.items())
    ]

    def contestant(name: str, *, compiled: bool) -> Contestant:
        step, restart = make_step(adam, images, compiled=compiled)
        n_steps = len(batches())

        def epoch() -> float:
            total = torch.zeros((), device=device)
            for chosen in batches():
                total += step(chosen) * len(chosen)
            synchronize()
            return float(total) / n

        seconds = 0.0
        if compiled:
            # Both batch shapes, the last one being smaller; training then starts anew.
            sizes = {len(chosen): chosen for chosen in batches()}
            started = time.perf_counter()
            for chosen in sizes.values():
                step(chosen)
            synchronize()
            seconds = time.perf_counter() - started
            restart()
        return Contestant(name, f"{adam}, {images}", n_steps, seconds, epoch)

    contestants = [contestant("PyTorch", compiled=False)]
    if compiled:
        # Workers that compile in parallel would stay alive beside the measurement.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        try:
            contestants.append(contestant("PyTorch, torch.compile", compiled=True))
        except Exception as error:  # Anything from a missing compiler to a defect of the compiler.
            reason = " ".join(str(error).split())[:200]
            notes.append(f"torch.compile failed: {type(error).__name__}: {reason}")
    return contestants, notes


def measure(contestants: Sequence[Contestant], repeats: int) -> None:
    """Runs one epoch of each in turn, once to warm up and ``repeats`` times on the clock."""
    for repeat in range(repeats + 1):
        for contestant in contestants:
            started = time.perf_counter()
            loss = contestant.epoch()
            seconds = time.perf_counter() - started
            contestant.losses.append(loss)
            if repeat > 0:
                contestant.seconds.append(seconds)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned text with a line for each row of `summarize`."""
    header = (
        *("", "s/epoch", "min–max", "examples/s"),
        *("time / jkmeans", "min–max", "compile s", "steps", "last loss"),
    )
    lines = [header] + [
        (
            row["name"],
            f"{row['median_seconds']:.3f}",
            f"{row['min_seconds']:.3f}–{row['max_seconds']:.3f}",
            f"{row['examples_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}",
            f"{row['compile_seconds']:.1f}",
            str(row["n_steps"]),
            f"{row['losses'][-1]:.5f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table, writes the file, and returns what is in it.

    Raises:
      UserError: PyTorch is not installed, or an option cannot be used here.
    """
    from jkmeans.errors import UserError

    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed; pip install -e .[benchmarks] installs it")
    threads = options.threads or len(cores())
    use_cores(threads)
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json is {options.json!r}; accepted: a file in a folder that exists")
    import jax
    import torch

    gpu = on_gpu()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    images, source = load_images(options.data, options.examples, options.seed)
    # Spread evenly over the steps, as jkmeans does: for 70,000 images 256 stays 256.
    n_steps = math.ceil(len(images) / options.batch_size)
    batch_size = math.ceil(len(images) / n_steps)
    problem = Problem(images, source, 1 / 255, batch_size, threads, gpu, options.seed)
    if len(images) < N_CLUSTERS:
        raise UserError(f"--examples is {len(images)}; accepted: 0 (all) or at least {N_CLUSTERS}")
    torch.backends.cuda.matmul.allow_tf32 = gpu and options.precision == "tf32"
    precision = options.precision if gpu else "float32"
    with jax.default_matmul_precision(PRECISIONS[precision]) if gpu else contextlib.nullcontext():
        ours, initial = jkmeans_contestants(problem)
        theirs, notes = torch_contestants(problem, initial, compiled=options.compile)
        contestants = [ours[0], *theirs, ours[1]]
        measure(contestants, options.repeats)
    if load is not None and load > 0.5 * len(cores()):
        notes.append(
            f"warning: the load average was {load:.1f} at the start; threads that wait for each "
            "other, PyTorch's above all, suffer from other programs, so measure on a quiet machine"
        )
    rows = [summarize(contestant, ours[0], len(images)) for contestant in contestants]
    packages = ("jkmeans", "jax", "jaxlib", "flax", "optax", "torch", "numpy")
    result = {
        "benchmark": "autoencoder_epoch",
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
        "rows": rows,
    }
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def show(result: dict[str, Any]) -> None:
    """Prints what `run` returns."""
    where, settings = result["hardware"], result["settings"]
    print(
        f"784-500-500-2000-10 autoencoder, {settings['n_examples']:,} images ({settings['data']}), "
        f"batches of {settings['batch_size']}, {settings['matmul_precision']} products, "
        f"medians of {settings['repeats']} epochs"
    )
    print(
        f"{where['gpu'] or 'no GPU'}; {where['cpu']}, {where['threads']} threads; {result['date']}"
    )
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    print()
    print(table(result["rows"]))
    print()
    for row in result["rows"]:
        print(f"{row['name']}: {row['detail']}")
    for note in result["notes"]:
        print(note)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses flags and calls `run`; exits with 2 where something given cannot be used.

    Args:
      argv: flags; those of the command line if None.
    """
    parser = Parser(
        prog="autoencoder_epoch",
        description="Time of an epoch of an autoencoder in jkmeans and in PyTorch.",
        allow_abbrev=False,
    )
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
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to try torch.compile as well",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="also write the result here")
    options = parser.parse_args(argv)
    from jkmeans.errors import UserError

    try:
        return run(options)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
