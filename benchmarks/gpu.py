"""k-means on a GPU: are labels right, how long is an iteration, and what limits it.

    python -m benchmarks.gpu --markdown gpu.md --json gpu.json
    python -m benchmarks.gpu --lines 10M-128 --systems exact flash-kmeans --repeats 5

One command for whatever GPU is there. First its limits are measured: the rate of matrix products
in bfloat16, TensorFloat-32 and float32, and the bandwidth of memory. Then the bound of
`jkmeans.kmeans.certified` is probed: the largest error of a score in low precision, as a share of
its proven bound, which a tensor core that adds worse than assumed would push above 1. Then, for
each line, all systems take turns from the same rows and first centroids: an iteration's time is
that of 1 + I iterations less that of one, divided by I, the median over turns. Labels of jkmeans
are checked against differences in float64 on a sample of rows. Status 1 says that a certified label
was wrong, a bound was broken, or jkmeans itself failed; 2 that something given cannot be used.

A system with "-graph" in its name is the same compiled into one CUDA graph, its loops and branches
included: small problems spend their time between kernels.

Peers are optional, and named where they are missing: ``pip install flash-kmeans fastkmeans
faiss-gpu-cu12``, flashlib from github.com/FlashML-org/flashlib. They are called as their sources of
2026 say, and were not run by this script yet: one that fails is named with its error and left out.
With ``--allow-cpu`` everything runs on tiny problems where there is no GPU: a test of this script,
and no measurement of anything.
"""

# The peers are optional, and not there where types are checked.
# pyright: reportMissingImports=none

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.exactness import squared_distances
from benchmarks.support.flags import Parser, at_least, new_file


class Line(NamedTuple):
    """A problem.

    Attributes:
      name: in the table.
      n, d, n_clusters: its size.
      published: milliseconds of an iteration of flashlib in bfloat16 on an H200, if there are any.
      exact, fast: milliseconds to reach on an H200.
    """

    name: str
    n: int
    d: int
    n_clusters: int
    published: float | None
    exact: float
    fast: float


LINES = (
    Line("10M-64", 10_000_000, 64, 20_000, 103, 103, 85),
    Line("10M-128", 10_000_000, 128, 20_000, 130, 130, 110),
    Line("10M-256", 10_000_000, 256, 20_000, 182, 185, 170),
    Line("2.5M-512", 2_500_000, 512, 20_000, 110, 112, 100),
    Line("100K-512", 100_000, 512, 512, 0.38, 0.25, 0.2),
    Line("51K-512", 51_000, 512, 500, None, 0.15, 0.12),
)
# The same as one graph of CUDA: loops and branches too, of which the host else learns the outcome.
_GRAPH = "-graph"
_ONE_GRAPH: Any = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
    "DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
    # A loop whose results are copied to where its counter says is written out, or left outside.
    "xla_gpu_command_buffer_unroll_loops": True,
}
OURS = (
    "exact-kernel", "exact-kernel" + _GRAPH, "fast-kernel", "fast-kernel" + _GRAPH,
    "exact", "exact-tf32", "fast", "full",
)  # fmt: skip
# What has to be importable, and the package of which the version is told.
PEERS = {
    "flash-kmeans": ("flash_kmeans", "flash-kmeans"),
    "flashlib": ("flashlib", "flashlib"),
    "fastkmeans": ("fastkmeans", "fastkmeans"),
    "faiss-gpu": ("faiss", "faiss"),
}


class Problem(NamedTuple):
    """Rows [n, d] and first centroids [k, d] on the device, float32."""

    x: Any
    init: Any


def make(line: Line, data: str) -> Problem:
    """Random rows: one normal distribution, or one around each of K means in a box of side 2."""
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=0)
    def draw(line: Line) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (line.n, line.d), jnp.float32)
        if data == "mixture":
            means = jax.random.uniform(keys[1], (line.n_clusters, line.d), minval=-1, maxval=1)
            x = x + means[jax.random.randint(keys[2], (line.n,), 0, line.n_clusters)]
        rows = jax.random.choice(keys[3], line.n, (line.n_clusters,), replace=False)
        return x, x[rows]

    return Problem(*jax.block_until_ready(draw(line)))


def precision_of(system: str) -> str:
    """The ``precision`` of `kmeans.lloyd` that a system of ours stands for."""
    return system.removesuffix(_GRAPH)


@functools.cache
def _lloyd(system: str) -> Callable:
    import jax

    from jkmeans import kmeans

    options: dict[str, Any] = {"algorithm": "lloyd", "empty": "keep"}
    options["precision"] = precision_of(system)
    # No tolerance stops it; only centroids that are all at rest do.
    run = functools.partial(kmeans.lloyd, tol=-1.0, **options)
    return jax.jit(run, compiler_options=_ONE_GRAPH if system.endswith(_GRAPH) else None)


def jkmeans_system(system: str) -> Callable[[Problem, int], int]:
    """`kmeans.lloyd`, the whole loop in one program; returns the iterations run."""

    def run(problem: Problem, iterations: int) -> int:
        import jax

        result = _lloyd(system)(problem.x, problem.init, max_iter=iterations)
        return int(jax.block_until_ready(result).n_iter)

    return run


_shortened: list[tuple[Problem, Any]] = []


def _in_bfloat16(problem: Problem) -> Any:
    """Rows and first centroids for PyTorch, converted once: flashlib keeps what it is given."""
    import torch

    if not _shortened or _shortened[0][0] is not problem:
        _shortened.clear()
        given = [torch.from_dlpack(values).to(torch.bfloat16) for values in problem]
        _shortened.append((problem, given))
    return _shortened[0][1]


def flash_kmeans(problem: Problem, iterations: int) -> int:
    """flash-kmeans in bfloat16."""
    import torch
    from flash_kmeans import batch_kmeans_Euclid

    x, init = (tensor[None] for tensor in _in_bfloat16(problem))
    n_iter = batch_kmeans_Euclid(
        x, init.shape[1], max_iters=iterations, tol=-1.0, init_centroids=init
    )[2]
    torch.cuda.synchronize()
    return int(n_iter)


def flashlib(problem: Problem, iterations: int) -> int:
    """The package flashlib in bfloat16, by whichever of its kernels it chooses."""
    import torch
    from flashlib import flash_kmeans as fit

    x, init = _in_bfloat16(problem)
    n_iter = fit(x, len(init), max_iters=iterations, tol=-1.0, init_centroids=init[None])[2]
    torch.cuda.synchronize()
    return int(n_iter)


def fastkmeans(problem: Problem, iterations: int) -> int:
    """fastkmeans: rows come from the host, and it draws its own first centroids."""
    from fastkmeans import FastKMeans

    x = np.asarray(problem.x)
    model = FastKMeans(x.shape[1], len(problem.init), niter=iterations, tol=-1.0, gpu=True)
    model.train(x)
    return iterations


def faiss_gpu(problem: Problem, iterations: int) -> int:
    """`faiss.Kmeans` on all rows, which come from the host."""
    import faiss

    x, init = np.asarray(problem.x), np.asarray(problem.init)
    if not faiss.get_num_gpus():
        raise RuntimeError("this build of faiss sees no GPU")
    options = {"max_points_per_centroid": len(x), "min_points_per_centroid": 1}
    model: Any = faiss.Kmeans(x.shape[1], len(init), niter=iterations, gpu=True, **options)
    model.train(x, init_centroids=init)
    return len(model.obj)


SYSTEMS: dict[str, Callable[[Problem, int], int]] = {
    **{name: jkmeans_system(name) for name in OURS},
    "flash-kmeans": flash_kmeans,
    "flashlib": flashlib,
    "fastkmeans": fastkmeans,
    "faiss-gpu": faiss_gpu,
}


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The median of some runs after one that is not counted."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def limits(size: int, n_bytes: int, repeats: int) -> dict[str, float]:
    """Operations and bytes a second: what the device does at best, as XLA reaches it.

    Args:
      size: of the square matrices that are multiplied.
      n_bytes: that are read, and as many are written.
      repeats: runs on the clock.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    # Several in one program, lest the launch counts.
    turns = 8

    def rate(dtype: Any, precision: Any) -> float:
        # Random numbers: a device is faster on zeros and ones, which take less power.
        left, right = (
            (jax.random.normal(jax.random.key(i), (size, size)) / size**0.5).astype(dtype)
            for i in range(2)
        )

        @jax.jit
        def products(left: jax.Array, right: jax.Array) -> jax.Array:
            def step(_: Any, value: jax.Array) -> jax.Array:
                product = lax.dot(
                    value, right, precision=precision, preferred_element_type=jnp.float32
                )
                return product.astype(dtype)

            return lax.fori_loop(0, turns, step, left)

        seconds = seconds_of(lambda: products(left, right).block_until_ready(), repeats)
        return 2.0 * turns * size**3 / seconds

    numbers = jnp.zeros(n_bytes // 4, jnp.float32)
    copy = jax.jit(lambda numbers: numbers + 1)
    seconds = seconds_of(lambda: copy(numbers).block_until_ready(), repeats)
    return {
        "bfloat16": rate(jnp.bfloat16, lax.Precision.DEFAULT),
        "tf32": rate(jnp.float32, lax.Precision.DEFAULT),
        "float32": rate(jnp.float32, lax.Precision.HIGHEST),
        "bandwidth": 2.0 * numbers.nbytes / seconds,
    }


def bound_use(precision: str, d: int, seed: int = 0) -> float:
    """The largest error of a low-precision score as a share of its bound; above 1 it is broken.

    On rows of one size, of numbers between 10⁻⁴ and 10⁴, and on sums that cancel, [256, d] each.
    Of the kernel only the scores of the nearest centroids can be seen.
    """
    import jax

    from jkmeans.kmeans import hopper
    from jkmeans.kmeans.certified import low_scores

    by_kernel = precision.endswith("-kernel")
    probe: Any = (
        hopper.nearest_scores if by_kernel else functools.partial(low_scores, precision=precision)
    )
    probe = jax.jit(probe)
    rng = np.random.default_rng(seed)
    worst = 0.0
    for spread in (0, 4):
        x, c = (
            rng.standard_normal((m, d)) * 10.0 ** rng.uniform(-spread, spread, (m, d))
            for m in (256, 128)
        )
        for cancel in (False, True):
            if cancel:
                # Large terms that come in pairs of opposite sign.
                x[:, 1::2] = x[:, : d // 2 * 2 : 2]
                c[:, 1::2] = -c[:, : d // 2 * 2 : 2] * (1 + 1e-4)
            rows, centroids = x.astype(np.float32), c.astype(np.float32)
            *labels, scores, bounds = (np.asarray(a, np.float64) for a in probe(rows, centroids))
            rows, centroids = rows.astype(np.float64), centroids.astype(np.float64)
            exact = 0.5 * (centroids**2).sum(axis=1)[:, None] - centroids @ rows.T
            if labels:
                exact = exact[labels[0].astype(int), np.arange(len(rows))]
            worst = max(worst, float((np.abs(scores - exact) / bounds).max()))
    return worst


class Check(NamedTuple):
    """Labels of a sample of rows against differences in float64.

    Attributes:
      rows: that were checked.
      different: whose label is not the nearest.
      wrong: those among them that were certified; must be 0.
      gap: the largest (d² of the label − d² of the nearest) / d² of the nearest.
      recomputed: share of rows that low precision left open.
      all_centroids: share of rows that were compared with every centroid.
    """

    rows: int
    different: int
    wrong: int
    gap: float
    recomputed: float
    all_centroids: float


def check(problem: Problem, system: str, n_rows: int) -> Check:
    """Labels after two iterations, when centroids are no longer rows."""
    import jax

    from jkmeans import kmeans
    from jkmeans.kmeans import certainty

    # By the program that was measured: another one would have to be compiled.
    centroids = _lloyd(system)(problem.x, problem.init, max_iter=2).centroids
    n, precision = problem.x.shape[0], precision_of(system)
    rows = np.sort(np.random.default_rng(0).choice(n, min(n_rows, n), replace=False))
    x = np.asarray(problem.x[rows])
    if precision == "full":
        labels = np.asarray(jax.jit(kmeans.nearest)(problem.x, centroids))[rows]
        levels = np.full(n, certainty.RECOMPUTED)
    else:
        find = jax.jit(kmeans.certified_nearest, static_argnames=("precision",))
        found = find(problem.x, centroids, precision=precision)
        labels, levels = np.asarray(found.labels)[rows], np.asarray(found.levels)
    different = np.zeros(len(rows), bool)
    gap = 0.0
    for start, squared in squared_distances(x, np.asarray(centroids)):
        part = slice(start, start + len(squared))
        ours = squared[np.arange(len(squared)), labels[part]]
        best = squared.min(axis=1)
        different[part] = ours > best
        gap = max(gap, float(((ours - best) / np.maximum(best, 1e-300)).max()))
    proven = (certainty.CERTIFIED, certainty.REFINED, certainty.COMPARED)
    promised = precision.startswith("exact") & np.isin(levels[rows], proven)
    return Check(
        len(rows),
        int(different.sum()),
        int((different & promised).sum()),
        gap,
        float((levels != certainty.CERTIFIED).mean()),
        float((levels == certainty.RECOMPUTED).mean()),
    )


def iteration_of(problem: Problem, system: str) -> list[tuple[str, float, float]]:
    """The kernels of one iteration: those of a run of five, less those of a run of one."""
    runs = [kernels_of(lambda n=n: SYSTEMS[system](problem, n)) for n in (1, 5)]
    short = {name: (count, ms) for name, count, ms in runs[0]}
    each = []
    for name, count, ms in runs[1]:
        before = short.get(name, (0, 0.0))
        each.append((name, (count - before[0]) / 4, (ms - before[1]) / 4))
    return sorted(each, key=lambda kernel: -kernel[2])


def roof(line: Line, system: str, found: dict[str, float]) -> tuple[float, str]:
    """The least seconds of an iteration on this device, and what sets it.

    2NKD operations at the rate of the system's products, and rows read twice (labels, sums).
    """
    rate = {"exact-tf32": "tf32", "full": "float32"}.get(system, "bfloat16")
    compute = 2.0 * line.n * line.d * line.n_clusters / found[rate]
    # Peers keep rows in bfloat16 where they take them so.
    width = 2 if system in ("flash-kmeans", "flashlib") else 4
    memory = 2.0 * width * line.n * line.d / found["bandwidth"]
    return max(compute, memory), f"{rate} products" if compute >= memory else "bandwidth"


def run_line(
    line: Line,
    problem: Problem,
    systems: list[str],
    iterations: int,
    repeats: int,
    found: dict[str, float],
) -> list[dict[str, Any]]:
    """One record a system: median seconds of an iteration, or the error it ended with."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    errors: dict[str, str] = {}

    def timed(name: str, n: int) -> tuple[float, int]:
        start = time.perf_counter()
        done = SYSTEMS[name](problem, n)
        return time.perf_counter() - start, done

    for turn in range(repeats + 1):  # The first warms up.
        for name in systems:
            if name in errors:
                continue
            try:
                (short, one), (long, many) = timed(name, 1), timed(name, 1 + iterations)
            except Exception as error:  # A peer that fails must not lose the others' results.
                errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
                print(f"{name} failed on {line.name}: {errors[name]}", file=sys.stderr)
                continue
            if turn:
                seconds[name].append((long - short) / max(many - one, 1))
    records = []
    for name in systems:
        least, limit = roof(line, name, found)
        records.append(
            {
                "line": line.name,
                "system": name,
                "seconds": seconds[name],
                "median": statistics.median(seconds[name]) if seconds[name] else math.nan,
                "roof": least,
                "limit": limit,
                "error": errors.get(name),
            }
        )
    return records


def hopper_is_there() -> bool:
    """Whether the kernel for Hopper would be taken; without it, its systems are the plain ones."""
    from jkmeans.kmeans import hopper

    return hopper.suits(10**6, 128, 10**3)


def kernels_of(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """What a device did in a run: names of kernels, how often, and milliseconds, longest first."""
    import jax

    total: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                streams = [line for line in plane.lines if line.name.startswith("Stream")]
                for event in (event for stream in streams for event in stream.events):
                    seen = total.setdefault(event.name, [0, 0.0])
                    seen[0] += 1
                    seen[1] += event.duration_ns / 1e6
    found = [(name, int(count), ms) for name, (count, ms) in total.items()]
    return sorted(found, key=lambda kernel: -kernel[2])


def hardware() -> dict[str, Any]:
    """What this runs on; clocks, power and driver as nvidia-smi tells them."""
    import jax

    device = jax.devices()[0]
    told = "nvidia-smi is not there"
    if shutil.which("nvidia-smi"):
        names = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = done.stdout.strip() or done.stderr.strip()
    return {"device": device.device_kind, "platform": device.platform, "nvidia-smi": told}


def versions(peers: list[str]) -> dict[str, str]:
    """Of Python, JAX and the peers that are there."""
    found = {"python": platform.python_version()}
    for package in ("jkmeans", "jax", "jaxlib", "torch", "triton", *(PEERS[p][1] for p in peers)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # faiss goes by several names, and tells its version itself.
            version = getattr(sys.modules.get(package), "__version__", None)
            if version:
                found[package] = str(version)
    return found


def report(result: dict[str, Any]) -> str:
    """The whole result in Markdown."""
    limits = result["limits"]
    lines = [
        f"# k-means on {result['hardware']['device']}, {result['date']}",
        "",
        "**Tiny problems on a CPU: a test of the script, not a measurement.**\n"
        if result["tiny"]
        else "",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
        *("    " + text for text in result["hardware"]["nvidia-smi"].splitlines()),
        "",
        f"Measured limits: {limits['bfloat16'] / 1e12:.3g} TFLOP/s in bfloat16, "
        f"{limits['tf32'] / 1e12:.3g} in TensorFloat-32, "
        f"{limits['float32'] / 1e12:.3g} in float32, "
        f"{limits['bandwidth'] / 1e9:.4g} GB/s. Rows: {result['data']}; medians of "
        f"{result['repeats']} turns of {result['iterations']} iterations.",
        "",
        "Largest error of a score ÷ its bound (must stay below 1): "
        + ", ".join(f"{name} {use:.3f}" for name, use in result["bound_use"].items())
        + ".",
        "",
    ]
    if result["missing"]:
        lines += [f"Not installed, so left out: {', '.join(result['missing'])}.", ""]
    lines += [
        "| N × D × K | system | ms per iteration | TFLOP/s | of the roof | limit | target, ms |"
        " flashlib, published | rows left open | against all | labels ≠ float64 | largest gap |",
        "| --- " * 12 + "|",
    ]
    by_name = {line.name: line for line in result["lines"]}
    for r in result["records"]:
        line = by_name[r["line"]]
        ms, seen = 1e3 * r["median"], r.get("check")
        flops = 2e-12 * line.n * line.d * line.n_clusters
        good = r["median"] > 0
        plain = precision_of(r["system"]).removesuffix("-kernel")
        target = {"exact": line.exact, "fast": line.fast}.get(plain)
        cells = [
            f"{line.n:,} × {line.d} × {line.n_clusters:,}",
            r["system"] if r["error"] is None else f"{r['system']}: {r['error']}",
            f"{ms:.3f}" if good else "–",
            f"{flops / r['median']:.3g}" if good else "–",
            f"{r['roof'] / r['median']:.0%}" if good else "–",
            r["limit"],
            "–" if target is None or result["tiny"] else f"{target:g}",
            "–" if line.published is None or result["tiny"] else f"{line.published:g}",
        ]
        if seen is None:
            cells += ["–"] * 4
        else:
            cells += [
                f"{seen['recomputed']:.2%}" if r["system"].startswith("exact") else "–",
                f"{seen['all_centroids']:.2%}" if r["system"].startswith("exact") else "–",
                f"{seen['different']} of {seen['rows']}, certified {seen['wrong']}",
                f"{seen['gap']:.1e}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    for r in result["records"]:
        if r.get("kernels"):
            lines += ["", f"{r['line']}, {r['system']}: an iteration by kernels, milliseconds", ""]
            lines += ["| kernel | launches | ms |", "| --- | --- | --- |"]
            lines += [f"| {name} | {count:g} | {ms:.3f} |" for name, count, ms in r["kernels"][:20]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for, prints the table and returns the status."""
    names = [line.name for line in LINES]
    parser = Parser("gpu", __doc__)
    parser.add_argument("--lines", nargs="+", choices=names, default=names, help="of the table")
    parser.add_argument(
        "--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], help="that take turns"
    )
    parser.add_argument(
        "--data", choices=("mixture", "normal"), default="mixture", help="how rows are drawn"
    )
    parser.add_argument("--iterations", type=at_least(1), default=10, help="on the clock")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="turns on the clock")
    parser.add_argument("--rows", type=at_least(1), default=1024, help="rows that are checked")
    parser.add_argument(
        "--markdown", type=new_file, metavar="FILE", help="where to write the table"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="where to write measurements")
    parser.add_argument(
        "--profile", action="store_true", help="tell which kernels an iteration's time goes to"
    )
    parser.add_argument(
        "--allow-cpu", action="store_true", help="tiny problems where there is no GPU"
    )
    args = parser.parse_args(argv)
    # The peers need memory of the device too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    tiny = jax.default_backend() != "gpu"
    if tiny and not args.allow_cpu:
        parser.error(
            f"JAX finds no GPU here, only {jax.default_backend()!r}; accepted: a machine with a "
            "GPU and jax[cuda13], or --allow-cpu for a test of this script on tiny problems"
        )
    lines = [line for line in LINES if line.name in args.lines]
    if tiny:
        lines = [line._replace(n=600, d=16, n_clusters=20) for line in lines]
    missing = [
        name
        for name in PEERS
        if name in args.systems and importlib.util.find_spec(PEERS[name][0]) is None
    ]
    systems = [name for name in SYSTEMS if name in args.systems and name not in missing]
    for name in missing:
        print(f"{name} is left out: it is not installed", file=sys.stderr)
    if not hopper_is_there():
        for name in systems:
            if precision_of(name).endswith("-kernel"):
                print(f"{name} is left out: no Hopper GPU is there", file=sys.stderr)
        systems = [name for name in systems if not precision_of(name).endswith("-kernel")]
    screened = [name for name in ("exact-kernel", "exact", "exact-tf32") if name in systems]
    size, n_bytes = (128, 2**16) if tiny else (8192, 2**30)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions([name for name in systems if name in PEERS]),
        "tiny": tiny,
        "data": args.data,
        "iterations": args.iterations,
        "repeats": args.repeats,
        "missing": missing,
        "limits": limits(size, n_bytes, args.repeats),
        "bound_use": {
            name: max(bound_use(name, d) for d in ((16,) if tiny else (16, 64, 256, 512)))
            for name in screened
        },
        "lines": lines,
        "records": [],
    }

    def write() -> None:
        # After each line, so that a run that is cut short loses none that is done.
        if args.markdown:
            args.markdown.write_text(report(result))
        if args.json:
            plain = {**result, "lines": [line._asdict() for line in lines]}
            args.json.write_text(json.dumps(plain, indent=1) + "\n")

    failed = [name for name, use in result["bound_use"].items() if not use < 1]
    for name in failed:
        print(f"{name}: the bound is broken on this device", file=sys.stderr)
    for line in lines:
        print(f"{line.name}: {line.n:,} × {line.d}, K = {line.n_clusters:,} …", file=sys.stderr)
        problem = make(line, args.data)
        records = run_line(line, problem, systems, args.iterations, args.repeats, result["limits"])
        for r in records:
            if r["system"] in OURS and r["error"] is None:
                seen = check(problem, r["system"], args.rows)
                r["check"] = seen._asdict()
                if seen.wrong:
                    print(
                        f"{r['system']} on {line.name}: certified labels are wrong", file=sys.stderr
                    )
                    failed.append(r["system"])
                if args.profile:
                    r["kernels"] = iteration_of(problem, r["system"])
            elif r["system"] in OURS:
                failed.append(r["system"])
        result["records"] += records
        write()
    print(report(result), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
