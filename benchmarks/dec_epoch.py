"""One epoch of DEC's clustering phase on MNIST, in jkmeans and in ClustPy.

    python -m benchmarks.dec_epoch --repeats 5 --threads 2 --json dec_epoch.json

Both train the encoder of the same 784-500-500-2000-10 network (ReLU, float32) and ten centroids
by Adam at 1e-4 in batches of 256 (Xie et al. 2016). jkmeans pretrains the autoencoder for an epoch
and finds the first centroids; every contestant starts from copies of both. They work on the same
cores or the same GPU, in one process, taking turns: an epoch of one, an epoch of the other. The
first epoch of each warms up and is not counted; compilation is timed apart, preparation not at all.

jkmeans runs its own compiled epoch (`jkmeans.epoch`), ClustPy its own training loop, that of its
`DEC`, called as its `fit` calls it, with its default loader of single examples. "ClustPy, tuned" is
the same loop with two options of its public class that cost its user a few lines: a loader that
gathers whole batches, and PyTorch's fused Adam.

The work is not the same in one way. ClustPy makes the targets P of each batch from that batch;
jkmeans makes them, as the paper does, from all examples: after the steps it embeds every image
anew, counts the frequencies and assigns the clusters. "jkmeans, stored" does not embed anew
(``centroids.bank = "stored"``): its targets are of all examples as the steps have embedded them.
"bfloat16" rounds the operands of the products in layers (``network.precision``), which GPUs and
processors with AVX512-BF16 or AMX multiply faster; for ClustPy it is the tuned loop within
PyTorch's autocast, which is not an option of ClustPy's. Per step all encode a batch, go back
through the encoder and change encoder and centroids; none touches the decoder. "embedding anew" is
that part of jkmeans' epoch, measured by itself.
The divergence KL(P‖Q) of the first images before and after is computed for all in the same way.

ClustPy is an extra: ``pip install -e .[benchmarks]``.
"""

# PyTorch and ClustPy are extras, and not there where types are checked.
# pyright: reportMissingImports=none

import argparse
import contextlib
import functools
import io
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.support.epochs import N_CLUSTERS, Benchmark, Contestant, Problem, main

LEARNING_RATE = 1e-4
"""ClustPy's default of the clustering phase."""

N_JUDGED = 10_000
"""Images whose divergence is computed before and after; all would take longer than an epoch."""


class Model(NamedTuple):
    """An encoder and its centroids, in NumPy.

    Attributes:
      layers: (kernel [i, o], bias [o]) of each layer, the first one first.
      centroids: [k, p].
    """

    layers: list[tuple[np.ndarray, np.ndarray]]
    centroids: np.ndarray


def divergence(model: Model, x: np.ndarray) -> float:
    """Mean KL(P‖Q) of images x [n, d] float32, P made of all of them, in nats.

    Written anew here, after Xie et al. 2016, eqs. 1 to 3, so that it is nobody's own account.
    """
    for i, (kernel, bias) in enumerate(model.layers):
        x = x @ kernel + bias
        if i < len(model.layers) - 1:
            x = np.maximum(x, 0)
    squared = np.sum((x[:, None, :].astype(np.float64) - model.centroids[None]) ** 2, axis=-1)
    q = 1 / (1 + squared)
    q /= q.sum(axis=1, keepdims=True)
    p = q**2 / q.sum(axis=0)
    p /= p.sum(axis=1, keepdims=True)
    return float(np.mean(np.sum(p * np.log(p / q), axis=1)))


def jkmeans_contestants(
    problem: Problem, judged: np.ndarray
) -> tuple[list[Contestant], dict[str, np.ndarray], np.ndarray]:
    """Ours, and what all start from: parameters by path, centroids [k, p].

    Args:
      problem: what to train on.
      judged: [m, d] float32, the images whose divergence is computed.
    """
    import jax
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    from configs import mnist
    from jkmeans import configuration
    from jkmeans.epoch import Rows, make_programs
    from jkmeans.methods import make_method
    from jkmeans.networks import blueprint
    from jkmeans.sharding import DATA_AXIS, SHARDED, Layout, make_mesh, place, place_rows

    config = mnist.get_config()
    with config.unlocked():
        config.objective = ConfigDict({"name": "dec"})
    config.update_from_flattened_dict(
        {
            "n_devices": 1,
            "n_clusters": N_CLUSTERS,
            "data.n_shards": 1,
            "training.batch_size": problem.batch_size,
            "training.n_pretrain_epochs": 1,
            "training.clustering_learning_rate": LEARNING_RATE,
            # What ClustPy runs here has neither views nor embeddings of length one.
            "network.normalize": False,
            "augmentation.shift": 0.0,
            "augmentation.rotation": 0.0,
            "augmentation.zoom": 0.0,
            "centroids.bank": "refreshed",
            "centroids.every": 1,
        }
    )

    def changed(bank: str, precision: str):
        other = config.copy_and_resolve_references()
        other.centroids.bank, other.network.precision = bank, precision
        return configuration.validate(other)

    config = changed("refreshed", "float32")

    shape = problem.images.shape[1:]
    mesh = make_mesh(1)
    layout = Layout(len(problem.images), problem.batch_size, n_shards=1, n_devices=1)
    plan = blueprint(config.network, shape, config.training.pretrain_precision)
    method = make_method(config, DATA_AXIS)
    programs = make_programs(config, plan, method, layout, mesh, shape, problem.scale)
    index = layout.row_index()
    rows = Rows(
        examples=place_rows(problem.images, layout, mesh),
        weights=place((index >= 0).astype(np.float32), mesh, SHARDED),
        index=place(index, mesh, SHARDED),
    )

    state = programs.create(np.uint32(problem.seed))
    state, _ = programs.epoch(state, rows, clustering=False)
    state = programs.refresh(state, rows)
    state, _ = programs.initialize(state, rows)

    def copied(state):
        return jax.tree.map(jnp.copy, state)  # Programs donate their state.

    initial = {name: np.array(value) for name, value in state.parameters.items()}
    centroids = np.array(state.clusters.centroids)

    def contestant(name: str, detail: str, config, state) -> Contestant:
        plan = blueprint(config.network, shape, config.training.pretrain_precision)
        programs = make_programs(config, plan, method, layout, mesh, shape, problem.scale)
        started = time.perf_counter()
        program = programs.epoch.lower(state, rows, clustering=True).compile()
        seconds = time.perf_counter() - started

        def epoch() -> float:
            nonlocal state
            state, metrics = program(state, rows)
            jax.block_until_ready((state, metrics))
            return float(metrics["loss"])

        def judge() -> float:
            now = {name: np.array(value) for name, value in state.parameters.items()}
            model = Model(encoder_layers(now), np.array(state.clusters.centroids))
            return divergence(model, judged)

        return Contestant(name, detail, layout.n_steps, seconds, epoch, judge)

    detail = "one compiled program; targets of all examples embedded anew, clusters assigned"
    whole = contestant("jkmeans", detail, config, copied(state))
    others = [
        contestant(name, detail, changed(bank, precision), copied(state))
        for name, bank, precision, detail in (
            ("jkmeans, stored", "stored", "float32", "targets as the steps have embedded them"),
            ("jkmeans, bfloat16", "refreshed", "bfloat16", "rounded operands"),
            ("jkmeans, stored, bfloat16", "stored", "bfloat16", "such targets, such operands"),
        )
    ]

    def refresh() -> float:
        nonlocal state
        state = jax.block_until_ready(programs.refresh(state, rows))
        return math.nan  # Learns nothing.

    detail = "a part of jkmeans' epoch that ClustPy's does not have, by itself"
    part = Contestant("embedding anew", detail, 0, 0.0, refresh, whole.judge)
    return [whole, part, *others], initial, centroids


def encoder_layers(parameters: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kernel [i, o], bias [o]) of each layer of the encoder, from parameters by path."""
    n_layers = sum(name.startswith("encoder") for name in parameters) // 2
    names = [f"encoder/{i}" for i in range(n_layers)]
    return [(parameters[f"{name}/kernel"], parameters[f"{name}/bias"]) for name in names]


class BatchLoader:
    """Shuffled batches as ClustPy's loop wants them, gathered a batch at a time.

    Attributes:
      batch_size: examples of a batch.
    """

    def __init__(self, x: Any, batch_size: int):
        """Of x [n, d], a tensor."""
        self.x, self.batch_size = x, batch_size

    def __iter__(self) -> Iterator[list]:
        """The number of each example, and the example."""
        import torch

        order = torch.randperm(len(self.x), device=self.x.device)
        for chosen in order.split(self.batch_size):
            yield [chosen, self.x.index_select(0, chosen)]


def clustpy_contestants(
    problem: Problem, judged: np.ndarray, initial: dict[str, np.ndarray], centroids: np.ndarray
) -> list[Contestant]:
    """ClustPy as it comes, and with the options that make it fastest."""
    import torch
    from clustpy.deep._data_utils import get_dataloader
    from clustpy.deep._utils import mean_squared_error
    from clustpy.deep.dec import _DEC_Module
    from clustpy.deep.neural_networks import FeedforwardAutoencoder

    torch.set_num_threads(problem.threads)
    torch.manual_seed(problem.seed)
    device = torch.device("cuda" if problem.gpu else "cpu")
    n = len(problem.images)
    x = torch.from_numpy(problem.images.reshape(n, -1).astype(np.float32) * problem.scale)
    sizes = [kernel.shape[0] for kernel, _ in encoder_layers(initial)] + [centroids.shape[1]]

    def contestant(
        name: str, detail: str, loader: Any, optimizer_class: Callable, autocast: bool = False
    ) -> Contestant:
        network = FeedforwardAutoencoder(sizes, activation_fn=torch.nn.ReLU)
        for part, block in (("encoder", network.encoder), ("decoder", network.decoder)):
            linears = [layer for layer in block.block if isinstance(layer, torch.nn.Linear)]
            for i, linear in enumerate(linears):
                with torch.no_grad():
                    linear.weight.copy_(torch.from_numpy(initial[f"{part}/{i}/kernel"].T.copy()))
                    linear.bias.copy_(torch.from_numpy(initial[f"{part}/{i}/bias"]))
        network.to(device)
        clusters = _DEC_Module(centroids.copy(), 1.0).to(device)
        # From here on as in clustpy.deep.dec._dec, an epoch at a time.
        parameters = list(network.parameters()) + list(clusters.parameters())
        optimizer = optimizer_class(parameters, lr=LEARNING_RATE)

        def epoch() -> float:
            rounded = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
            with contextlib.redirect_stderr(io.StringIO()), rounded:  # It shows a progress bar.
                clusters.fit(network, loader, 1, device, optimizer, mean_squared_error, 1.0, 0.0)
            if problem.gpu:
                torch.cuda.synchronize()
            return math.nan  # Its loss, of P of each batch, is shown in its progress bar only.

        def judge() -> float:
            now = [
                (layer.weight.detach().cpu().numpy().T.copy(), layer.bias.detach().cpu().numpy())
                for layer in network.encoder.block
                if isinstance(layer, torch.nn.Linear)
            ]
            return divergence(Model(now, clusters.centers.detach().cpu().numpy()), judged)

        n_steps = math.ceil(n / problem.batch_size)
        return Contestant(name, detail, n_steps, 0.0, epoch, judge)

    return [
        contestant(
            "ClustPy",
            "its own loader, a Python call for each example; Adam as PyTorch has it by default",
            get_dataloader(x, problem.batch_size, True),
            torch.optim.Adam,
        ),
        contestant(
            "ClustPy, tuned",
            "a loader that gathers batches, fused Adam",
            BatchLoader(x.to(device), problem.batch_size),
            functools.partial(torch.optim.Adam, fused=True),
        ),
        contestant(
            "ClustPy, tuned, bfloat16",
            "the same within torch.autocast",
            BatchLoader(x.to(device), problem.batch_size),
            functools.partial(torch.optim.Adam, fused=True),
            autocast=True,
        ),
    ]


def make_contestants(problem: Problem, _: argparse.Namespace) -> tuple[list[Contestant], list[str]]:
    """All, judged by the divergence of the first images; nothing is to be said about them."""
    first = problem.images[:N_JUDGED]
    judged = first.reshape(len(first), -1).astype(np.float32) / 255
    ours, initial, centroids = jkmeans_contestants(problem, judged)
    return [*ours, *clustpy_contestants(problem, judged, initial, centroids)], []


BENCHMARK = Benchmark(
    name="dec_epoch",
    description="Time of an epoch of deep embedded clustering in jkmeans and in ClustPy.",
    title="DEC, 784-500-500-2000-10",
    extras={"torch": "PyTorch", "clustpy": "ClustPy"},
    make_contestants=make_contestants,
    columns={
        "KL before": lambda row: f"{row['losses'][0]:.4f}",
        "KL after": lambda row: f"{row['losses'][-1]:.4f}",
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
