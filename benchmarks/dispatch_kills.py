"""What random kills do to predicting for many files on Ray: rows written once, and time.

    python -m benchmarks.dispatch_kills --kills 20 --json kills.json

Files of noisy digits, an autoencoder of `configs/digits.py` trained for an epoch. Three runs of the
same command: in one process, on Ray undisturbed, and on Ray while processes drawn at random are
killed (SIGKILL of a worker or of the master) or stopped for good (SIGSTOP of a worker, whose lease
has to lapse). The merged columns of all three are compared bit by bit, and the manifest with the
files: every row is in it once. The program fails otherwise.
"""

import contextlib
import hashlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.flags import Parser, at_least, new_file, positive

COLUMNS = ("labels", "distances", "embeddings")
VICTIMS = ("worker", "worker", "worker", "master", "stopped worker")


class Killer:
    """Kills, one after the other, while work goes on.

    Args:
      victims: whom; see `VICTIMS`.
      every: shards that are done from one kill to the next.
      seed: of which worker it is.
    """

    def __init__(self, victims: Sequence[str], every: float, seed: int):
        self._victims = list(victims)
        self._every, self._draw = every, random.Random(seed)
        self._hurt: set[int] = set()
        self.killed: list[str] = []
        self.status: Any = None

    def __call__(self, status) -> None:
        """What `jkmeans.dispatch.predict_files` calls with the master's status."""
        self.status = status
        due = self._every * (len(self.killed) + 1)
        if not self._victims or status.ended or status.shards_done < due:
            return
        victim = self._victims[0]
        at_work = [
            status.workers[name].pid
            for name in status.running
            if name in status.workers and status.workers[name].pid not in self._hurt
        ]
        if victim != "master" and not at_work:
            return
        process = status.process.pid if victim == "master" else self._draw.choice(at_work)
        if process in self._hurt:
            return
        stop = victim == "stopped worker"
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP if stop else signal.SIGKILL)
            self._hurt.add(process)
            self.killed.append(self._victims.pop(0))


def make_inputs(folder: Path, files: int, rows: int) -> None:
    """Files of digits with noise, all of them different: [about rows / files, 8, 8] float32."""
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.float32)  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    for i in range(files):
        n = rows // files + (i % 7) * 11
        chosen = images[rng.integers(0, len(images), n)]
        np.save(folder / f"part-{i}.npy", chosen + rng.normal(size=chosen.shape).astype(np.float32))


def train(workdir: Path) -> None:
    """A network of the size of `configs/digits.py`; what it predicts does not matter here."""
    from configs.digits import get_config
    from jkmeans.training import train_and_evaluate

    config = get_config()
    config.training.n_pretrain_epochs, config.training.n_epochs = 1, 1
    config.report.pictures = False
    train_and_evaluate(config, workdir)


def check(output: Path, expected: dict[str, str], inputs: Path) -> dict[str, Any]:
    """Compares a run with the first one, and its manifest with the files."""
    manifest = json.loads((output / "manifest.json").read_text())
    rows = {path.name: len(np.load(path, mmap_mode="r")) for path in inputs.iterdir()}
    seen: Counter[tuple[str, int]] = Counter()
    for file in manifest["files"]:
        for part in file["parts"]:
            content = (output / part["part"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != part["sha256"]:
                raise RuntimeError(f"{part['part']} has another checksum than in the manifest")
            with np.load(output / part["part"]) as arrays:
                if len(arrays["labels"]) != part["stop"] - part["start"]:
                    raise RuntimeError(f"{part['part']} has {len(arrays['labels'])} rows")
            seen.update((file["file"], row) for row in range(part["start"], part["stop"]))
    wanted = {(name, row) for name, n in rows.items() for row in range(n)}
    if set(seen) != wanted or max(seen.values()) != 1:
        raise RuntimeError("not every row is there once")
    sums = {
        name: hashlib.sha256((output / f"{name}.npy").read_bytes()).hexdigest() for name in COLUMNS
    }
    if expected and sums != expected:
        raise RuntimeError("the bits are not those of one process")
    left = [path.name for path in (output / "parts").iterdir() if path.name.startswith(".")]
    if left:
        raise RuntimeError(f"left behind: {left}")
    return {"rows_once": len(seen), "sums": sums}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints; see the module."""
    parser = Parser("dispatch_kills", __doc__)
    parser.add_argument("--files", type=at_least(1), default=40, help="that are predicted for")
    parser.add_argument("--rows", type=at_least(1), default=400_000, help="of all files")
    parser.add_argument("--shard-rows", type=at_least(1), default=1024, help="of a lease")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes that compute")
    parser.add_argument(
        "--lease-seconds", type=positive, default=10.0, help="a silent worker keeps its shard"
    )
    parser.add_argument("--kills", type=at_least(0), default=20, help="of the third run")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of who is killed")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="where to write the numbers")
    options = parser.parse_args(argv)

    from jkmeans.dispatch import Options, predict_files

    draw = random.Random(options.seed)
    victims = [draw.choice(VICTIMS) for _ in range(options.kills)]
    ray = Options("local", options.workers, 0.0, options.lease_seconds)
    result: dict[str, Any] = {"options": vars(options) | {"json": None}, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = folder / "inputs"
        inputs.mkdir()
        make_inputs(inputs, options.files, options.rows)
        train(folder / "run")
        expected: dict[str, str] = {}
        for kind in ("one process", "Ray", "Ray, kills"):
            shards = options.rows / options.shard_rows
            every = 0.9 * shards / (options.kills + 1)
            killer = Killer(victims if kind == "Ray, kills" else [], every, options.seed)
            started = time.perf_counter()
            predict_files(
                folder / "run", str(inputs), str(folder / kind), embeddings=True, merge=True,
                engine_name="process" if kind == "one process" else "ray", options=ray,
                shard_rows=options.shard_rows, n_devices=1, watch=killer,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            checked = check(folder / kind, expected, inputs)
            expected = checked["sums"]
            status = killer.status
            result["runs"].append(
                {
                    "kind": kind,
                    "seconds": round(seconds, 1),
                    "rows_once": checked["rows_once"],
                    "killed": dict(Counter(killer.killed)),
                    "master_lives": status.life,
                    "shards": status.shards,
                    "lapsed": status.lapsed,
                    "copies": status.copies,
                    "refused": status.twice,
                    "different_bits": status.different,
                }
            )
            print(json.dumps(result["runs"][-1]), flush=True)
            if len(killer.killed) < (options.kills if kind == "Ray, kills" else 0):
                print(f"only {len(killer.killed)} kills: more --rows are needed", file=sys.stderr)
    result["machine"] = {
        "platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg(),
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return result


if __name__ == "__main__":
    main()
