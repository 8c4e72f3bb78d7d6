"""k-means to convergence from the same start, in jkmeans and in the systems people use.

    python -m benchmarks.kmeans --repeats 3 --json kmeans.json
    python -m benchmarks.kmeans --lines mnist-100 --systems scikit-learn-lloyd

Every system fits the same float32 array from the same initial centroids (rows drawn at random) with
the same relative tolerance and bound on the iterations, in one process on the same cores, taking
turns. faiss has no such tolerance: it may run as many iterations as jkmeans needed, and stops
itself where its objective hardly falls. Times are those of the whole ``fit`` as a user calls it,
with its checks, copies and final labels; the first fit of every system warms up and is not counted,
and what JAX spent in tracing and compiling during it is shown apart. Memory is the most that the
process held beyond the data during a second fit, sampled every two milliseconds, divided by the
size of the data; 1 is added for the data. Inertia is computed anew from everyone's centroids in
float64.

Peers: ``pip install -e .[benchmarks]``; those that are not installed are left out and named.
"""

# The peers are extras, and not there where types are checked.
# pyright: reportMissingImports=none

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.support.flags import Parser, at_least, new_file, not_negative


class Line(NamedTuple):
    """A problem.

    Attributes:
      name: in the table.
      make: the data, [n, d] float32.
      n_clusters: K.
    """

    name: str
    make: Callable[[], np.ndarray]
    n_clusters: int


class Fit(NamedTuple):
    """What a system found.

    Attributes:
      centroids: [k, d].
      n_iter: iterations.
    """

    centroids: np.ndarray
    n_iter: int


def features() -> np.ndarray:
    """51,000 × 512: images of Fashion-MNIST through a random layer of rectified linear units."""
    from jkmeans import datasets

    images = datasets.load("fashion-mnist", split="train").examples[:51_000]
    rng = np.random.default_rng(0)
    layer = rng.standard_normal((784, 512)).astype(np.float32) / 28
    return np.maximum(images.reshape(-1, 784).astype(np.float32) / 255 @ layer, 0)


def mixture() -> np.ndarray:
    """51,000 × 512: 500 Gaussians of deviation 1 whose means lie in a box of side 2."""
    rng = np.random.default_rng(0)
    means = rng.uniform(-1, 1, (500, 512)).astype(np.float32)
    return means[rng.integers(0, 500, 51_000)] + rng.standard_normal((51_000, 512)).astype("f4")


def mnist() -> np.ndarray:
    """70,000 × 784: the pixels of MNIST between 0 and 1."""
    from jkmeans import datasets

    return datasets.load("mnist").examples.reshape(-1, 784).astype(np.float32) / 255


def blobs(n_features: int, n_clusters: int, deviation: float) -> np.ndarray:
    """1,000,000 rows of Gaussian blobs whose means lie in a box of side 20."""
    rng = np.random.default_rng(0)
    means = rng.uniform(-10, 10, (n_clusters, n_features)).astype(np.float32)
    noise = deviation * rng.standard_normal((1_000_000, n_features)).astype(np.float32)
    return means[rng.integers(0, n_clusters, 1_000_000)] + noise


LINES = (
    Line("features-500", features, 500),
    Line("mixture-500", mixture, 500),
    Line("mnist-10", mnist, 10),
    Line("mnist-100", mnist, 100),
    Line("mnist-1000", mnist, 1000),
    Line("blobs-2d-5", lambda: blobs(2, 5, 1.0), 5),
    Line("blobs-16d-100", lambda: blobs(16, 100, 2.0), 100),
)


def jkmeans_system(x: np.ndarray, init: np.ndarray, tol: float, max_iter: int) -> Fit:
    """`jkmeans.KMeans`."""
    from jkmeans import KMeans

    model = KMeans(len(init), init=init, n_init=1, tol=tol, max_iter=max_iter).fit(x)
    return Fit(model.cluster_centers_, model.n_iter_)


def scikit_learn(algorithm: str) -> Callable[..., Fit]:
    """`sklearn.cluster.KMeans` as it comes: it copies the data, to subtract the mean."""

    def fit(x: np.ndarray, init: np.ndarray, tol: float, max_iter: int) -> Fit:
        from sklearn.cluster import KMeans

        options: dict[str, Any] = {"init": init, "n_init": 1, "algorithm": algorithm}
        model = KMeans(len(init), tol=tol, max_iter=max_iter, **options).fit(x)
        return Fit(model.cluster_centers_, model.n_iter_)

    return fit


def intelex(x: np.ndarray, init: np.ndarray, tol: float, max_iter: int) -> Fit:
    """`sklearnex.cluster.KMeans`, Intel's extension."""
    from sklearnex.cluster import KMeans

    kind: Any = KMeans
    model = kind(len(init), init=init, n_init=1, tol=tol, max_iter=max_iter).fit(x)
    return Fit(model.cluster_centers_, model.n_iter_)


def faiss(x: np.ndarray, init: np.ndarray, tol: float, max_iter: int) -> Fit:
    """`faiss.Kmeans` on all rows, and the labels that the others return too."""
    import faiss as library

    del tol
    k, d = init.shape
    model: Any = library.Kmeans(
        d, k, niter=max_iter, max_points_per_centroid=len(x), min_points_per_centroid=1
    )
    model.train(x, init_centroids=init)
    model.index.search(x, 1)
    return Fit(model.centroids, len(model.obj))


SYSTEMS: dict[str, tuple[str, Callable[..., Fit]]] = {
    "jkmeans": ("jax", jkmeans_system),
    "scikit-learn-lloyd": ("scikit-learn", scikit_learn("lloyd")),
    "scikit-learn-elkan": ("scikit-learn", scikit_learn("elkan")),
    "scikit-learn-intelex": ("scikit-learn-intelex", intelex),
    "faiss": ("faiss-cpu", faiss),
}


class PeakMemory:
    """The most that this process grew by while it is entered, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self._before = self.peak = _resident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *exception) -> None:
        self._end.set()
        self._thread.join()
        self.growth = max(self.peak, _resident()) - self._before


class CompileTime:
    """Seconds that JAX spent in tracing and compiling since it was made."""

    def __init__(self):
        import jax

        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


def run_line(
    line: Line, systems: list[str], repeats: int, tol: float, max_iter: int, clock: CompileTime
) -> Iterator[dict[str, Any]]:
    """One record a system: times, iterations, inertia, memory."""
    x = np.ascontiguousarray(line.make())
    rows = np.random.default_rng(1).choice(len(x), line.n_clusters, replace=False)
    init = x[rows]
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    fits: dict[str, Fit] = {}
    iterations: dict[str, int] = {}
    memory: dict[str, float] = {}
    compiled: dict[str, float] = {}
    for name in systems:  # jkmeans first: faiss needs its number of iterations.
        limit = iterations.get("jkmeans", max_iter) if name == "faiss" else max_iter
        before = clock.seconds
        fits[name] = SYSTEMS[name][1](x, init, tol, limit)
        iterations[name] = fits[name].n_iter
        compiled[name] = clock.seconds - before
        with PeakMemory() as peak:
            SYSTEMS[name][1](x, init, tol, limit)
        memory[name] = 1 + peak.growth / x.nbytes
    for _ in range(repeats):
        for name in systems:
            limit = iterations["jkmeans"] if name == "faiss" else max_iter
            start = time.perf_counter()
            SYSTEMS[name][1](x, init, tol, limit)
            seconds[name].append(time.perf_counter() - start)
    for name in systems:
        yield {
            "line": line.name,
            "shape": [*x.shape],
            "n_clusters": line.n_clusters,
            "system": name,
            "seconds": seconds[name],
            "median": statistics.median(seconds[name]),
            "n_iter": iterations[name],
            "inertia": inertia(x, fits[name].centroids),
            "memory": memory[name],
            "compile_seconds": compiled[name],
        }


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """The sum of squared distances to the nearest centroid, in float64."""
    centroids = np.asarray(centroids, np.float64)
    norms, total = (centroids**2).sum(axis=1), 0.0
    for start in range(0, len(x), 4096):
        block = x[start : start + 4096].astype(np.float64)
        squared = norms - 2 * block @ centroids.T
        total += float((squared.min(axis=1) + (block**2).sum(axis=1)).sum())
    return total


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each system of each line."""
    lines = [
        "| line | system | seconds | iterations | ms per iteration | inertia | memory | compile |"
        " slower than jkmeans |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours = {r["line"]: r["median"] for r in records if r["system"] == "jkmeans"}
    for r in records:
        ratio = r["median"] / ours[r["line"]] if r["line"] in ours else float("nan")
        n, d = r["shape"]
        lines.append(
            f"| {r['line']} ({n:,} × {d}) | {r['system']} | {r['median']:.3f} | {r['n_iter']} | "
            f"{1e3 * r['median'] / r['n_iter']:.1f} | {r['inertia']:.6g} | {r['memory']:.2f} | "
            f"{r['compile_seconds']:.1f} | {ratio:.2f} × |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for and prints the table."""
    parser = Parser("kmeans", __doc__)
    names = [line.name for line in LINES]
    parser.add_argument("--lines", nargs="+", choices=names, default=names, help="the problems")
    parser.add_argument(
        "--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], help="that take turns"
    )
    parser.add_argument("--repeats", type=at_least(1), default=3, help="turns on the clock")
    parser.add_argument(
        "--tol", type=not_negative, default=1e-4, help="relative to the mean variance"
    )
    parser.add_argument("--max-iter", type=at_least(1), default=300, help="of a fit, at most")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="where to write measurements")
    args = parser.parse_args(argv)
    # Some peers complain about a memory leak on Windows, and about not having converged.
    warnings.simplefilter("ignore")
    systems, versions = [], {"python": platform.python_version()}
    for name in dict.fromkeys(["jkmeans", *args.systems]):
        try:
            versions[SYSTEMS[name][0]] = importlib.metadata.version(SYSTEMS[name][0])
            systems.append(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is left out: {SYSTEMS[name][0]} is not installed", file=sys.stderr)
    clock = CompileTime()
    head = {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
        "versions": versions,
        "tol": args.tol,
        "max_iter": args.max_iter,
        "repeats": args.repeats,
    }
    print(json.dumps(head), flush=True)
    records: list[dict[str, Any]] = []
    for line in LINES:
        if line.name not in args.lines:
            continue
        new = list(run_line(line, systems, args.repeats, args.tol, args.max_iter, clock))
        records += new
        print(table(new), flush=True)
        best = min((r["median"] for r in new if r["system"] != "jkmeans"), default=None)
        if best is not None:
            print(f"fastest other / jkmeans: {best / new[0]['median']:.2f}\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps({**head, "records": records}, indent=1))
    return 0


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
