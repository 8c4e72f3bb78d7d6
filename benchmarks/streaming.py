"""How fast a Lloyd pass streams a file, compared with how fast the machine reads it.

    python -m benchmarks.streaming --gib 4 --budget-mib 512 --repeats 3

Writes a .npy file of float32 rows several times the memory budget, then takes turns: the file is
dropped from the page cache and read from start to end into one reused buffer (plain reading: no
thread, no computation); it is dropped again and `fit_stream` runs Lloyd passes over it. Each pass
reads every byte from the disk. Printed are the speeds of both, their ratio, and the most memory
that the process had above what it had before the first pass (compiled programs included).

The ratio of a turn compares the two neighbours in time, so that a disk whose speed changes from
minute to minute does not decide it.
"""

import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.flags import Parser, at_least, new_file, positive

_BLOCK_BYTES = 2**23


def write_file(path: Path, n_rows: int, n_features: int) -> None:
    """Writes [n_rows, n_features] float32: rows around 16 centres, block by block."""
    rng = np.random.default_rng(0)
    rows = _BLOCK_BYTES // (4 * n_features)
    centres = 3 * rng.normal(size=(16, n_features)).astype(np.float32)
    # One block of noise, rolled: random numbers for every row would take longer than the disk.
    noise = rng.normal(size=(rows, n_features)).astype(np.float32)
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, n_features)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, n_rows, rows):
            block = np.roll(noise, rng.integers(rows), axis=0)
            block = block + centres[rng.integers(16, size=rows)]
            file.write(block[: n_rows - start].data)
        file.flush()
        os.fsync(file.fileno())


def drop_from_cache(path: Path) -> None:
    """Asks the operating system to forget the pages of a file."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def read_plainly(path: Path) -> float:
    """Seconds to read a file from start to end into one buffer."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def resident_bytes() -> int:
    """Memory of this process, without the pages of files that it maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Watches the memory of this process; the list holds the peak above the start at the end."""
    before = peak = resident_bytes()
    found: list[int] = []
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(peak, resident_bytes()) - before)


def measure(
    path: Path, n_clusters: int, budget: int, repeats: int, n_devices: int, n_bytes: int
) -> dict[str, Any]:
    """Takes turns; see the module.

    Returns:
      Speeds in bytes a second, one of each turn, and the peak of memory.
    """
    import jax

    from jkmeans.sharding import make_mesh
    from jkmeans.sources import open_source
    from jkmeans.streaming import fit_stream

    mesh = make_mesh(n_devices)
    source = open_source(path)
    init = source.read(0, n_clusters)
    ends: list[float] = []

    def note(progress: Any) -> None:
        if progress.rows == progress.n_rows and progress.stage.startswith("iteration"):
            ends.append(time.perf_counter())

    def fit(rows: Any, max_iter: int) -> None:
        fit_stream(
            jax.random.key(0), rows, n_clusters, init=init, tol=0, max_iter=max_iter, mesh=mesh,
            memory_budget=budget, progress=note,
        )  # fmt: skip

    plain, streamed, ratios = [], [], []
    with peak_memory() as peak:
        started = time.perf_counter()
        drop_from_cache(path)
        fit(path, 1)  # Compiles; not counted.
        first_seconds = time.perf_counter() - started
        for turn in range(repeats):
            drop_from_cache(path)
            plain.append(n_bytes / read_plainly(path))
            drop_from_cache(path)
            ends.clear()
            started = time.perf_counter()
            # One iteration and the pass that gives the inertia of its centroids.
            fit(path, 1)
            streamed.append(n_bytes / (ends[0] - started))
            ratios.append(streamed[-1] / plain[-1])
            print(
                f"turn {turn + 1}: reading {plain[-1] / 1e6:,.0f} MB/s, a Lloyd pass "
                f"{streamed[-1] / 1e6:,.0f} MB/s, ratio {ratios[-1]:.2f}",
                flush=True,
            )
    return {
        "plain_bytes_per_second": plain,
        "streamed_bytes_per_second": streamed,
        "ratios": ratios,
        "peak_bytes": peak[0],
        "first_seconds": first_seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses flags, measures, prints."""
    parser = Parser("streaming", __doc__)
    parser.add_argument("--gib", type=positive, default=4.0, help="size of the file")
    parser.add_argument(
        "--budget-mib", type=at_least(1), default=512, help="memory budget of the fit"
    )
    parser.add_argument("--features", type=at_least(1), default=64, help="D")
    parser.add_argument("--clusters", type=at_least(1), default=16, help="K")
    parser.add_argument("--devices", type=at_least(0), default=0, help="0: all that there are")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="turns")
    parser.add_argument(
        "--folder", help="where the file is written; that of temporary files if None"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the numbers here")
    flags = parser.parse_args(arguments)
    n_rows = max(1, int(flags.gib * 2**30) // (4 * flags.features))
    n_bytes = n_rows * 4 * flags.features
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        path = Path(folder) / "rows.npy"
        print(f"{n_rows:,} rows of {flags.features} float32 ({n_bytes / 2**30:.2f} GiB), ", end="")
        print(f"K={flags.clusters}, budget {flags.budget_mib} MiB", flush=True)
        write_file(path, n_rows, flags.features)
        found = measure(
            path, flags.clusters, flags.budget_mib * 2**20, flags.repeats, flags.devices, n_bytes
        )
    found |= {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "rows": n_rows,
        "budget_bytes": flags.budget_mib * 2**20,
    }
    print(
        f"median ratio {statistics.median(found['ratios']):.2f} "
        f"(reading {statistics.median(found['plain_bytes_per_second']) / 1e6:,.0f} MB/s, streaming "
        f"{statistics.median(found['streamed_bytes_per_second']) / 1e6:,.0f} MB/s)\n"
        f"peak memory above the start {found['peak_bytes'] / 2**20:,.0f} MiB, budget "
        f"{flags.budget_mib} MiB, file {n_bytes / 2**20:,.0f} MiB"
    )
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
