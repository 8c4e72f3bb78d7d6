"""What the kernel of `jkmeans.kernels.screening` compiles to for Hopper: no GPU is needed.

    pip install "jkmeans[cuda13]"
    python -m benchmarks.gpu_code --markdown code.md

For each number of features the kernel is compiled down to instructions of sm_90a, as XLA does it
where there is a GPU, and told are: bytes of registers that had to be spilled to memory; shared
memory; and, where nvdisasm is to be found (``pip install nvidia-cuda-nvdisasm``), instructions of
the loop over tiles for each score. **Nothing is run.** The least times, of ten million rows and
20,000 centroids, are what the units could do if they never waited, at 132 multiprocessors of
1.7 GHz: in a cycle 2,048 multiply-adds of matrices, 64 minima or maxima of integers, and 128
instructions of whatever kind, as NVIDIA's programming guide has them. The largest is a floor, not a
prediction.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
from typing import NamedTuple

from benchmarks.support.flags import Parser, at_least, new_file

# An H100 as XLA describes one: what a compiler has to know.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
N, K = 10_000_000, 20_000
MULTIPROCESSORS, HERTZ = 132, 1.7e9
# In a cycle of a multiprocessor.
MULTIPLY_ADDS, INTEGERS, ISSUED = 2048, 64, 128


class Code(NamedTuple):
    """What the compiler told.

    Attributes:
      spilled: bytes of registers stored to memory, in all of the kernel.
      shared: bytes of shared memory of a block.
      instructions: of the loop over tiles, by name; empty where nothing could take them apart.
    """

    spilled: int
    shared: int
    instructions: collections.Counter[str]


def compiled(d: int, only_nearest: bool, folder: pathlib.Path) -> Code:
    """Compiles the kernel for rows of d features; the compiler's files go to an empty folder."""
    import functools

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from jkmeans.kernels import screening

    devices = topologies.get_topology_desc(
        "hopper", "cuda", target_config=TARGET, topology="1x1x1"
    ).devices
    place = SingleDeviceSharding(devices[0])
    n = 132 * screening.ROWS

    def of(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shapes = of((n, d), jnp.bfloat16), of((K, d), jnp.bfloat16), of((K,)), of((n,))
    run = functools.partial(screening.screen, only_nearest=only_nearest)
    jax.jit(run).trace(*shapes).lower().compile()
    told = next(folder.glob("*.ptxas")).read_text()
    resources = next(folder.glob("*.resources.txt"), None)
    spills = re.search(r"(\d+) bytes spill stores", told)
    # Of jax 0.11 on.
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text() if resources else "")
    listing = next(folder.glob("*.sass_ctrl"), None)
    text = listing.read_text() if listing else ""
    return Code(int(spills[1]) if spills else 0, int(shared[1]) if shared else 0, loop_of(text))


def loop_of(listing: str) -> collections.Counter[str]:
    """Instructions of the shortest loop that has half of the products of matrices.

    The other half, of a last tile that is not full, stands after it.
    """
    lines = listing.splitlines()
    places = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    found: tuple[int, int] | None = None
    for end, line in enumerate(lines):
        for label in re.findall(r"\.L_x_\d+", line) if "BRA" in line else ():
            start = places.get(label, end)
            inside = sum(start < i < end for i in products)
            if (
                inside
                and 2 * inside >= len(products)
                and (found is None or end - start < found[1] - found[0])
            ):
                found = start, end
    inside = lines[found[0] : found[1]] if found else []
    names = (re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", line) for line in inside)
    return collections.Counter(name[1] for name in names if name)


def row_of(d: int, only_nearest: bool, code: Code) -> str:
    """A line of the table."""
    from jkmeans.kernels import screening

    tiles = screening.tiles_for(d)
    # Of one thread; a warpgroup has 128.
    scores = tiles.rows * tiles.centroids / 128
    cores = MULTIPROCESSORS * HERTZ
    products = 1e3 * N * K * d / (MULTIPLY_ADDS * cores)
    minima = sum(n for name, n in code.instructions.items() if name.startswith("VIMNMX")) / scores
    each = sum(code.instructions.values()) / scores
    cells = [
        str(d),
        "the nearest" if only_nearest else "two",
        f"{tiles.rows} × {tiles.centroids} × {tiles.stages}",
        f"{code.shared:,}" if code.shared else "–",
        f"{code.spilled:,}",
        f"{each:.2f}" if each else "–",
        f"{minima:.2f}" if each else "–",
        f"{products:.0f}",
        f"{1e3 * N * K * minima / (INTEGERS * cores):.0f}" if each else "–",
        f"{1e3 * N * K * each / (ISSUED * cores):.0f}" if each else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for, prints a table and returns the status."""
    parser = Parser("gpu_code", __doc__)
    widths = [64, 128, 256, 512]
    parser.add_argument("--features", nargs="+", type=at_least(64), default=widths, help="of rows")
    parser.add_argument("--markdown", type=new_file, metavar="FILE", help="where to write it")
    args = parser.parse_args(argv)
    for d in args.features:
        if d % 64:
            parser.error(f"--features: {d} is given; accepted: a multiple of 64")
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)):
        parser.error("JAX has no CUDA here; accepted: an environment with jkmeans[cuda13]")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder)
        import jax

        lines = [
            f"jax {jax.__version__}; {N:,} rows, {K:,} centroids. Compiled, not run.",
            "",
            "| features | keeps | rows × centroids × stages | shared memory | spilled, bytes | "
            "instructions a score | minima a score | products, least ms | minima, least ms | "
            "all instructions, least ms |",
            "| --- " * 10 + "|",
        ]
        for d in args.features:
            for only_nearest in (False, True):
                print(f"{d} features …", file=sys.stderr, flush=True)
                code = compiled(d, only_nearest, folder)
                lines.append(row_of(d, only_nearest, code))
                for path in folder.iterdir():
                    path.unlink()
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    return 0


def prepare(folder: pathlib.Path) -> None:
    """Tells the compiler, before JAX is imported, to work without a GPU and to show its work."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    found = shutil.which("nvdisasm")
    for root in map(pathlib.Path, sys.path):
        found = found or next(map(str, root.glob("nvidia/cu*/bin/nvdisasm")), None)
    if found:
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(found), os.environ["PATH"]])


if __name__ == "__main__":
    sys.exit(main())
