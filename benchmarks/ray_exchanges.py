"""How many exchanges a second the parameter server on Ray makes, and what random kills do to a run.

    python -m benchmarks.ray_exchanges --json exchanges.json
    python -m benchmarks.ray_exchanges --kills 20 --undisturbed 5 --json kills.json

Stochastic vector quantization of a mixture of noisy curves by M processes (scheme C), K·D numbers
in every displacement and every answer. The speed is counted from the server's journal:
displacements applied, from the moment when every worker has sent one, to the end.

With --kills the same run is made several times undisturbed, and once while processes, drawn at
random from server and workers, are killed with SIGKILL. Printed are the final distortions, how many
of the applied displacements the server's deaths undid, and that every displacement of the version
that is left was counted once (the journal is compared with the server's clock; the program fails
otherwise).
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.support.flags import Parser, at_least, new_file


class Hang(NamedTuple):
    """A worker that is to hang (SIGSTOP), not to die."""

    worker: int


Victim = int | str | Hang


class Killer:
    """Kills processes of a run, as many as are wanted, while all of them are there.

    Args:
      victims: numbers of workers, or "server", or `Hang`, in turn.
      every: displacements that are applied from one kill to the next.
    """

    def __init__(self, victims: Sequence[Victim], every: int):
        self._victims = list(victims)
        self._every = self._at = every
        self.killed: list[Victim] = []

    def __call__(self, status) -> None:
        """What `jkmeans.asynchronous.engine.run` calls with the server's status."""
        all_there = 0 not in status.processes
        if not self._victims or status.clock < self._at or not all_there or status.ended:
            return
        victim = self._victims[0]
        if victim == "server":
            process = status.process
        else:
            process = status.processes[victim.worker if isinstance(victim, Hang) else victim]
        with contextlib.suppress(ProcessLookupError):  # It is dead, and not yet back.
            os.kill(process, signal.SIGSTOP if isinstance(victim, Hang) else signal.SIGKILL)
            self.killed.append(self._victims.pop(0))
            self._at = status.clock + self._every


def make_job(options: argparse.Namespace):
    """The job, and its samples."""
    from jkmeans.asynchronous.quantization import QuantizationJob
    from jkmeans.vq.mixtures import spline_mixture

    load = functools.partial(
        spline_mixture, 0, options.samples, options.clusters, options.features, 100
    )
    samples = load()
    job = QuantizationJob(
        load=load,
        prototypes=samples[: options.clusters],
        steps=("rational", 0.5, 0.001),
        n_workers=options.workers,
        tau=options.tau,
        budget=options.budget,
    )
    return job, samples


def measure(options: argparse.Namespace, victims: Sequence[Victim] = ()) -> dict[str, Any]:
    """One run in a folder of its own."""
    from ml_collections import ConfigDict

    from jkmeans.asynchronous import engine
    from jkmeans.asynchronous.quantization import make_criterion

    job, samples = make_job(options)
    killer = Killer(victims, options.kill_every)
    settings = ConfigDict(
        {
            "address": "local",
            "checkpoint_exchanges": options.checkpoint_exchanges,
            "max_restarts": -1,
            "ahead": options.ahead,
            "evaluate_seconds": 1e9,
            "patience_seconds": 10.0,
            "gpus_per_worker": 0.0,
        }
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = engine.run(job, Path(folder), settings, evaluate=lambda *_: True, watch=killer)
    applied = outcome.history.applied
    first = max(np.flatnonzero(applied["worker"] == w)[0] for w in range(job.n_workers))
    steady = applied[first:]
    seconds = steady["time"][-1] - steady["time"][0]
    return {
        "killed": killer.killed,
        "distortion": make_criterion(samples)(outcome.shared),
        "exchanges": outcome.status.clock,
        "samples": outcome.status.samples,
        "exchanges_per_second": (len(steady) - 1) / seconds,
        "samples_per_second": float(steady["samples"][1:].sum() / seconds),
        "staleness_mean": float(outcome.history.staleness.mean()),
        "staleness_most": int(outcome.history.staleness.max()),
        "rolled_back": outcome.history.rolled_back,
        "processes_of_workers": outcome.lives,
        "seconds": time.perf_counter() - started,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints; see the module."""
    parser = Parser("ray_exchanges", __doc__)
    one = at_least(1)
    parser.add_argument("--workers", type=one, default=3, help="M")
    parser.add_argument("--clusters", type=one, default=100, help="K")
    parser.add_argument("--features", type=one, default=100, help="D")
    parser.add_argument("--samples", type=one, default=3000, help="that a worker draws from")
    parser.add_argument("--budget", type=one, default=300_000, help="samples of all workers")
    parser.add_argument("--tau", type=one, default=10, help="samples from exchange to exchange")
    parser.add_argument(
        "--ahead", type=at_least(0), default=10, help="exchanges a worker may be ahead by"
    )
    parser.add_argument(
        "--checkpoint-exchanges",
        type=at_least(2),
        default=500,
        help="from checkpoint to checkpoint",
    )
    parser.add_argument("--kills", type=at_least(0), default=0, help="of a last run; 0 for none")
    parser.add_argument("--kill-every", type=one, default=200, help="displacements")
    parser.add_argument("--undisturbed", type=one, default=3, help="runs without kills")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of who is killed")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="where to write the numbers")
    options = parser.parse_args(argv)

    runs = [measure(options) for _ in range(options.undisturbed)]
    for run in runs:
        print(_line(run), flush=True)
    result: dict[str, Any] = {"undisturbed": runs}
    if options.kills:
        rng = random.Random(options.seed)
        who = ["server", *range(options.workers)]
        disturbed = measure(options, [rng.choice(who) for _ in range(options.kills)])
        result["disturbed"] = disturbed
        print(_line(disturbed), flush=True)
        if len(disturbed["killed"]) < options.kills:
            print(f"only {len(disturbed['killed'])} kills; give it a larger --budget", flush=True)
    result["settings"] = {k: v for k, v in vars(options).items() if k != "json"}
    result["machine"] = {"cores": os.cpu_count(), "python": platform.python_version()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _line(run: dict[str, Any]) -> str:
    text = (
        f"{run['exchanges_per_second']:,.0f} exchanges/s, {run['samples_per_second']:,.0f} "
        f"samples/s, staleness {run['staleness_mean']:.2f} (at most {run['staleness_most']}), "
        f"distortion {run['distortion']:.3f}, {run['exchanges']:,} exchanges, each counted once"
    )
    if run["killed"]:
        n_server = run["killed"].count("server")
        text += (
            f"; {len(run['killed'])} kills, {n_server} of the server, which undid "
            f"{sum(run['rolled_back']):,} displacements (at most {max(run['rolled_back'])} at once)"
        )
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
