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
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


@dataclasses.dataclass(kw_only=True)
class Clusterer(Contestant):
    """A contestant that says what it has learned.

    Attributes:
      model: what it is now.
    """

    model: Callable[[], Model]


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
    problem: Problem,
) -> tuple[list[Clusterer], dict[str, np.ndarray], np.ndarray]:
    """Ours, and what all start from: parameters by path, centroids [k, p]."""
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
    plan = blueprint(config.network, shape)
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

    def contestant(name: str, detail: str, config, state) -> Clusterer:
        plan = blueprint(config.network, shape)
        programs = make_programs(config, plan, method, layout, mesh, shape, problem.scale)
        started = time.perf_counter()
        program = programs.epoch.lower(state, rows, clustering=True).compile()
        seconds = time.perf_counter() - started

        def epoch() -> float:
            nonlocal state
            state, metrics = program(state, rows)
            jax.block_until_ready((state, metrics))
            return float(metrics["loss"])

        def model() -> Model:
            now = {name: np.array(value) for name, value in state.parameters.items()}
            return Model(encoder_layers(now), np.array(state.clusters.centroids))

        return Clusterer(name, detail, layout.n_steps, seconds, epoch, model=model)

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
    part = Clusterer("embedding anew", detail, 0, 0.0, refresh, model=whole.model)
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
    problem: Problem, initial: dict[str, np.ndarray], centroids: np.ndarray
) -> list[Clusterer]:
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
    ) -> Clusterer:
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

        def model() -> Model:
            now = [
                (layer.weight.detach().cpu().numpy().T.copy(), layer.bias.detach().cpu().numpy())
                for layer in network.encoder.block
                if isinstance(layer, torch.nn.Linear)
            ]
            return Model(now, clusters.centers.detach().cpu().numpy())

        n_steps = math.ceil(n / problem.batch_size)
        return Clusterer(name, detail, n_steps, 0.0, epoch, model=model)

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


def measure(contestants: Sequence[Clusterer], repeats: int, judged: np.ndarray) -> None:
    """Runs one epoch of each in turn, once to warm up and ``repeats`` times on the clock.

    What a contestant keeps as its losses are divergences of ``judged`` [m, d]: the first one from
    before the first epoch, the others from after each.
    """
    for contestant in contestants:
        contestant.losses.append(divergence(contestant.model(), judged))
    for repeat in range(repeats + 1):
        for contestant in contestants:
            started = time.perf_counter()
            contestant.epoch()
            seconds = time.perf_counter() - started
            contestant.losses.append(divergence(contestant.model(), judged))
            if repeat > 0:
                contestant.seconds.append(seconds)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a line for each row of `summarize`."""
    header = (
        *("", "s/epoch", "min–max", "examples/s", "time / jkmeans", "min–max"),
        *("compile s", "steps", "KL before", "KL after"),
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
            f"{row['losses'][0]:.4f}",
            f"{row['losses'][-1]:.4f}",
        )
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table, writes the file, and returns what is in it.

    Raises:
      UserError: PyTorch or ClustPy is not installed, or an option cannot be used here.
    """
    from jkmeans.errors import UserError

    for package, title in (("torch", "PyTorch"), ("clustpy", "ClustPy")):
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
    judged = images[:N_JUDGED].reshape(len(images[:N_JUDGED]), -1).astype(np.float32) / 255
    with jax.default_matmul_precision(PRECISIONS[precision]) if gpu else contextlib.nullcontext():
        ours, initial, centroids = jkmeans_contestants(problem)
        contestants = [*ours, *clustpy_contestants(problem, initial, centroids)]
        measure(contestants, options.repeats, judged)
    notes = []
    if load is not None and load > 0.5 * len(cores()):
        notes.append(
            f"warning: the load average was {load:.1f} at the start; threads that wait for each "
            "other, PyTorch's above all, suffer from other programs, so measure on a quiet machine"
        )
    packages = ("jkmeans", "jax", "jaxlib", "flax", "optax", "clustpy", "torch", "numpy")
    result = {
        "benchmark": "dec_epoch",
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
        "rows": [summarize(contestant, ours[0], len(images)) for contestant in contestants],
    }
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def show(result: dict[str, Any]) -> None:
    """Prints what `run` returns."""
    where, settings = result["hardware"], result["settings"]
    print(
        f"DEC on {settings['n_examples']:,} images ({settings['data']}), 784-500-500-2000-10, "
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
        prog="dec_epoch",
        description="Time of an epoch of deep embedded clustering in jkmeans and in ClustPy.",
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
    parser.add_argument("--json", default="", metavar="FILE", help="also write the result here")
    options = parser.parse_args(argv)
    from jkmeans.errors import UserError

    try:
        return run(options)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
