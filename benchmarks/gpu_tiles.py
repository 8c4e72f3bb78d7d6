"""The kernel of `jkmeans.kernels.screening` alone, with one size of tiles after another.

    python -m benchmarks.gpu_tiles --markdown tiles.md
    python -m benchmarks.gpu_tiles --features 128 --rows 811008 --clusters 20000

Random rows and centroids in bfloat16. For each number of features all sizes of tiles take turns;
labels and gaps are checked against float64 on a thousand rows. What is fastest belongs into
`screening.tiles_for`. Needs a Hopper GPU. All kernels are compiled at once before the first runs.
Status 1 says that a kernel failed or was wrong.
"""

from __future__ import annotations

import concurrent.futures
import functools
import sys
from typing import Any

import numpy as np

from benchmarks.gpu import seconds_of
from benchmarks.support.flags import Parser, at_least, new_file

SIZES = (
    # Rows of a warpgroup, centroids of a tile, stages, and whether rows stay in shared memory.
    (128, 128, 4, True),
    (128, 128, 6, True),
    (128, 64, 6, True),
    (64, 256, 4, True),
    (64, 128, 4, True),
    (128, 128, 4, False),
)
CHECKED = 1024


def problem(n: int, d: int, k: int) -> tuple[Any, ...]:
    """Arguments of `screening.screen`, and units of rows."""
    import jax
    import jax.numpy as jnp

    from jkmeans.kmeans import hopper

    keys = jax.random.split(jax.random.key(d))
    rows, centroids = (
        jax.random.normal(key, (m, d), jnp.bfloat16) for key, m in zip(keys, (n, k), strict=True)
    )
    half_norms = 0.5 * jnp.sum(centroids.astype(jnp.float32) ** 2, axis=1)
    sizes = jnp.sqrt(jnp.sum(rows.astype(jnp.float32) ** 2, axis=1))
    reach = hopper.reach_of(sizes, jnp.sqrt(2 * half_norms.max()), d)
    units = hopper.units_for(reach, k)
    return rows, centroids, half_norms, units.offsets, np.asarray(units.units)


def right(given: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest and the next centroid of the first rows, and their scores: [2, rows] each."""
    rows, centroids, half_norms = (
        np.asarray(a, np.float64) for a in (given[0][:CHECKED], *given[1:3])
    )
    scores = half_norms[:, None] - centroids @ rows.T
    order = np.argpartition(scores, 1, axis=0)[:2]
    near = np.take_along_axis(scores, order, axis=0)
    first = np.argsort(near, axis=0)
    return np.take_along_axis(order, first, axis=0), np.take_along_axis(near, first, axis=0)


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for, prints a table and returns the status."""
    parser = Parser("gpu_tiles", __doc__)
    parser.add_argument(
        "--features", nargs="+", type=at_least(64), default=[64, 128, 256, 384, 512]
    )
    parser.add_argument("--rows", type=at_least(256), default=132 * 24 * 256, help="of a run")
    parser.add_argument("--clusters", type=at_least(2), default=20_000, help="centroids")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="runs on the clock")
    parser.add_argument(
        "--markdown", type=new_file, metavar="FILE", help="where to write the table"
    )
    args = parser.parse_args(argv)
    import jax
    import jax.numpy as jnp

    from jkmeans.kernels import screening
    from jkmeans.kmeans import hopper

    for name, values, multiple in (
        ("--features", args.features, screening.FEATURES),
        ("--rows", [args.rows], screening.ROWS),
    ):
        for value in values:
            if value % multiple:
                parser.error(f"{name}: {value} is given; accepted: a multiple of {multiple}")
    if not hopper.suits(args.rows, 64, 64):
        parser.error(f"the device is {jax.devices()[0]}; accepted: a Hopper GPU")
    n, k = args.rows, args.clusters

    def build(case: tuple[int, bool, screening.Tiles]) -> Any:
        d, only_nearest, tiles = case
        of = jax.ShapeDtypeStruct
        shapes = of((n, d), jnp.bfloat16), of((k, d), jnp.bfloat16), of((k,), jnp.float32)
        run = functools.partial(screening.screen, only_nearest=only_nearest, tiles=tiles)
        try:
            return jax.jit(run).lower(*shapes, of((n,), jnp.float32)).compile()
        except Exception as error:  # One that cannot be built must not lose the others.
            return error

    cases = [
        (d, only_nearest, tiles)
        for d in args.features
        for tiles in (screening.Tiles(*size) for size in SIZES)
        if screening.fits(d, tiles)
        for only_nearest in (False, True)
    ]
    print(f"compiling {len(cases)} kernels …", file=sys.stderr, flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        built = list(pool.map(build, cases))
    lines = [
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {n:,} rows, {k:,} centroids; "
        f"medians of {args.repeats} runs.",
        "",
        "| features | rows × centroids × stages | keeps | ms | of 10M rows, ms | TFLOP/s | wrong |",
        "| --- " * 7 + "|",
    ]
    status, seen = 0, None
    given: Any = ()
    truth = np.zeros(0), np.zeros(0)
    for (d, only_nearest, tiles), kernel in zip(cases, built, strict=True):
        if d != seen:
            given, seen = (), d  # Room for the next.
            given = problem(n, d, k)
            truth = right(given)
        where = "" if tiles.resident else ", rows come again"
        start = f"| {d} | {tiles.rows} × {tiles.centroids} × {tiles.stages}{where} | "
        start += "the nearest | " if only_nearest else "two | "
        try:
            if isinstance(kernel, Exception):
                raise kernel
            run = functools.partial(kernel, *given[:4])
            wrong = mistakes(run(), given[4], *truth)
            ms = 1e3 * seconds_of(lambda run=run: jax.block_until_ready(run()), args.repeats)
        except Exception as error:
            lines.append(start + f"{type(error).__name__}: {str(error).splitlines()[:1]} |")
            status = 1
            continue
        rate = 2e-9 * n * d * k / ms
        lines.append(start + f"{ms:.3f} | {ms * 1e7 / n:.1f} | {rate:.0f} | {wrong} |")
        status = status or int(wrong > 0)
        if args.markdown:
            args.markdown.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return status


def mistakes(found: Any, units: np.ndarray, order: np.ndarray, near: np.ndarray) -> int:
    """Rows whose nearest centroid, or how far behind the next is, is more wrong than rounding."""
    m = order.shape[1]
    units = units[:m].astype(np.float64)
    gap = near[1] - near[0]
    # Two scores are rounded to a unit, and added up in float32 before.
    allowed = 2 * units + 1e-5 * np.abs(near[0])
    wrong = (np.asarray(found.labels[:m]) != order[0]) & (gap > allowed)
    wrong |= np.abs(np.asarray(found.scores[:m]) * units - near[0]) > allowed
    if found.second is not None:
        wrong |= np.abs(np.asarray(found.second[:m]) * units - gap) > allowed
    return int(wrong.sum())


if __name__ == "__main__":
    sys.exit(main())
