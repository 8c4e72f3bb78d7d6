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
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.support.epochs import N_CLUSTERS, Benchmark, Contestant, Problem, main

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
    plan = blueprint(config.network, shape, config.training.pretrain_precision)
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


def make_contestants(
    problem: Problem, options: argparse.Namespace
) -> tuple[list[Contestant], list[str]]:
    """All, and what is to be said about them."""
    (pretraining, clustering), initial = jkmeans_contestants(problem)
    theirs, notes = torch_contestants(problem, initial, compiled=options.compile)
    return [pretraining, *theirs, clustering], notes


BENCHMARK = Benchmark(
    name="autoencoder_epoch",
    description="Time of an epoch of an autoencoder in jkmeans and in PyTorch.",
    title="784-500-500-2000-10 autoencoder",
    extras={"torch": "PyTorch"},
    make_contestants=make_contestants,
    columns={"last loss": lambda row: f"{row['losses'][-1]:.5f}"},
    flags={
        "--compile": {
            "action": argparse.BooleanOptionalAction,
            "default": True,
            "help": "whether to try torch.compile as well",
        }
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
