"""How often labels differ from those of float64 brute force, and by how much it matters.

    python -m benchmarks.exactness --lines mnist-100 blobs-16d-100

For each problem of `benchmarks.kmeans`, k-means is run with and without bounds for some iterations
and stopped in mid-fit. Labels are compared with those of differences computed in float64 to the
very centroids that it returns. Where they differ, the gap is printed by which the chosen centroid
is farther than the nearest, in squared distance relative to the distance itself.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from benchmarks.kmeans import LINES


def squared_distances(x: np.ndarray, centroids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows: the first row and [rows, k] float64, from the differences themselves."""
    centroids = centroids.astype(np.float64)
    rows = max(1, 2**24 // centroids.size)
    for start in range(0, len(x), rows):
        block = x[start : start + rows].astype(np.float64)
        yield start, ((block[:, None] - centroids[None]) ** 2).sum(axis=2)


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for and prints a table."""
    import jax

    from jkmeans import kmeans

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [line.name for line in LINES]
    parser.add_argument("--lines", nargs="+", choices=names, default=names)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--rows", type=int, default=20_000, help="rows that are checked")
    args = parser.parse_args(argv)
    print("| line | algorithm | rows checked | labels that differ | largest relative gap |")
    print("| --- | --- | --- | --- | --- |")
    for line in LINES:
        if line.name not in args.lines:
            continue
        x = line.make()
        rng = np.random.default_rng(1)
        init = x[rng.choice(len(x), line.n_clusters, replace=False)]
        checked = np.sort(rng.choice(len(x), min(args.rows, len(x)), replace=False))
        for algorithm in ("lloyd", "bounds"):
            fit = jax.jit(kmeans.lloyd, static_argnames=("algorithm",))
            result = fit(x, init, max_iter=args.iterations, algorithm=algorithm)
            labels = np.asarray(result.labels)[checked]
            n_different, gap = 0, 0.0
            for start, squared in squared_distances(x[checked], np.asarray(result.centroids)):
                ours = squared[np.arange(len(squared)), labels[start : start + len(squared)]]
                nearest = squared.min(axis=1)
                different = ours > nearest
                n_different += int(different.sum())
                gap = max(gap, float(((ours - nearest) / np.maximum(nearest, 1e-300)).max()))
            print(
                f"| {line.name} | {algorithm} | {len(checked):,} | {n_different} | {gap:.1e} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
