"""How often labels differ from those of float64 brute force, and by how much it matters.

    python -m benchmarks.exactness --lines mnist-100 blobs-16d-100
    python -m benchmarks.exactness --ways exact exact-tf32 fast --iterations 4 --rows 4000

For each problem of `benchmarks.kmeans`, and two of principal components, k-means is run with and
without bounds for some iterations and stopped in mid-fit. Labels are compared with those of
differences computed in float64 to the very centroids that it returns. Where they differ, the gap is
printed by which the chosen centroid is farther than the nearest, in squared distance relative to
the distance itself. "exact", "exact-tf32", "fast" and "fast-tf32" label the rows that are checked
by products in low precision, with the centroids of the fit without bounds; for the first two, and
"exact-kernel", the table tells the share of rows that these products leave open, and of those that
had to be compared with every centroid: numbers that depend on the data, and hardly on the device.
The kernel itself runs on Hopper only: here it is what it must equal, in plain XLA.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.kmeans import LINES, Line, mnist
from benchmarks.support.flags import Parser, at_least


def components() -> np.ndarray:
    """70,000 × 50: the leading principal components of the pixels of MNIST."""
    x = mnist()
    x -= x.mean(axis=0)
    _, axes = np.linalg.eigh(x.T @ x)
    return np.ascontiguousarray((x @ axes[:, :-51:-1]).astype(np.float32))


PROBLEMS = (*LINES, Line("pca-100", components, 100), Line("pca-1000", components, 1000))
WAYS = ("lloyd", "bounds", "exact", "exact-tf32", "exact-kernel", "fast", "fast-tf32")


def squared_distances(x: np.ndarray, centroids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows: the first row and [rows, k] float64, from the differences themselves."""
    centroids = centroids.astype(np.float64)
    rows = max(1, 2**24 // centroids.size)
    for start in range(0, len(x), rows):
        block = x[start : start + rows].astype(np.float64)
        yield start, ((block[:, None] - centroids[None]) ** 2).sum(axis=2)


def find(x: Any, centroids: Any, precision: str) -> Any:
    """Labels and levels."""
    from jkmeans import kmeans
    from jkmeans.kernels.screening import screen_plainly
    from jkmeans.kmeans.certified import nearest_by_kernel

    if precision != "exact-kernel":
        return kmeans.certified_nearest(x, centroids, precision=precision)
    options = {"precision": precision, "block_size": None, "screen": screen_plainly}
    return nearest_by_kernel(x, centroids, None, **options)


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for and prints a table."""
    import jax

    from jkmeans import kmeans
    from jkmeans.kmeans.certified import CERTIFIED, RECOMPUTED

    parser = Parser("exactness", __doc__)
    names = [line.name for line in PROBLEMS]
    parser.add_argument("--lines", nargs="+", choices=names, default=names, help="the problems")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS[:2], help="that labels are found by"
    )
    parser.add_argument("--iterations", type=at_least(0), default=12, help="before labels count")
    parser.add_argument("--rows", type=at_least(1), default=20_000, help="rows that are checked")
    args = parser.parse_args(argv)
    fit = jax.jit(kmeans.lloyd, static_argnames=("algorithm",))
    label = jax.jit(find, static_argnames=("precision",))
    print(
        "| line | way | rows checked | labels that differ | largest relative gap | left open |"
        " against all |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for line in PROBLEMS:
        if line.name not in args.lines:
            continue
        x = line.make()
        rng = np.random.default_rng(1)
        init = x[rng.choice(len(x), line.n_clusters, replace=False)]
        checked = np.sort(rng.choice(len(x), min(args.rows, len(x)), replace=False))
        fitted = {
            way: fit(x, init, max_iter=args.iterations, algorithm=way)
            for way in ("lloyd", "bounds")
            if way in args.ways or (way == "lloyd" and set(args.ways) - {"bounds"})
        }
        # Ways that share their centroids, of which the distances in float64 are computed once.
        for of_fit in fitted:
            centroids = np.asarray(fitted[of_fit].centroids)
            labels, shares = {}, {}
            for way in args.ways:
                if way == of_fit:
                    labels[way] = np.asarray(fitted[way].labels)[checked]
                elif way not in fitted and of_fit == "lloyd":
                    found = label(x[checked], centroids, precision=way)
                    labels[way], levels = np.asarray(found.labels), np.asarray(found.levels)
                    if way.startswith("exact"):
                        shares[way] = (levels != CERTIFIED).mean(), (levels == RECOMPUTED).mean()
            n_different, gaps = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0.0)
            for start, squared in squared_distances(x[checked], centroids):
                nearest = squared.min(axis=1)
                for way in labels:
                    chosen = labels[way][start : start + len(squared)]
                    ours = squared[np.arange(len(squared)), chosen]
                    n_different[way] += int((ours > nearest).sum())
                    gap = ((ours - nearest) / np.maximum(nearest, 1e-300)).max()
                    gaps[way] = max(gaps[way], float(gap))
            for way in labels:
                both = [f"{share:.2%}" for share in shares.get(way, ())] or ["–", "–"]
                print(
                    f"| {line.name} | {way} | {len(checked):,} | {n_different[way]} | "
                    f"{gaps[way]:.1e} | {both[0]} | {both[1]} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
