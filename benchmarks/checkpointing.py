"""What checkpoints in the background cost: epochs with one after each, and epochs without.

    python -m benchmarks.checkpointing --epochs 20 --repeats 3

The time of an epoch is that from its end to the end of the next, so everything between them counts.
The two kinds of run take turns; the first three epochs of each, which compile, are left out.
"""

import datetime
import importlib
import itertools
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.support.flags import Parser, at_least

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def epoch_seconds(config_module: str, n_epochs: int, every: int, workdir: Path) -> list[float]:
    """Seconds from epoch to epoch of one run, checkpointed ``every`` so many epochs."""
    from jkmeans.recorder import read_metrics, silence
    from jkmeans.training import train_and_evaluate

    config = importlib.import_module(config_module).get_config()
    config.training.n_pretrain_epochs = n_epochs
    config.training.n_epochs = 0
    config.centroids.n_init = 1
    config.centroids.final_max_iter = 1
    config.checkpoint.every = every
    config.report.pictures = False
    with silence():
        train_and_evaluate(config, workdir)
    ends = [datetime.datetime.fromisoformat(r["time"]) for r in read_metrics(workdir)]
    gaps = [(b - a).total_seconds() for a, b in itertools.pairwise(ends)]
    return gaps[3:-1]  # The last epoch of both kinds is saved.


def main() -> None:
    """Prints the median epoch of both kinds, for each turn and in all."""
    parser = Parser("checkpointing", __doc__)
    parser.add_argument("--config", default="configs.digits", help="module with get_config()")
    parser.add_argument("--epochs", type=at_least(6), default=20, help="of a run")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="turns")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"without": [], "with": []}
    print("| turn | without, ms | with one an epoch, ms | cost |\n| --- | --- | --- | --- |")
    for turn in range(options.repeats):
        medians = {}
        for kind, every in (("without", 10**6), ("with", 1)):
            with tempfile.TemporaryDirectory() as folder:
                seconds = epoch_seconds(options.config, options.epochs, every, Path(folder) / "run")
            found[kind] += seconds
            medians[kind] = statistics.median(seconds)
        print(_row(str(turn + 1), medians), flush=True)
    print(_row("all", {kind: statistics.median(seconds) for kind, seconds in found.items()}))


def _row(name: str, medians: dict[str, float]) -> str:
    cost = medians["with"] / medians["without"] - 1
    return (
        f"| {name} | {1000 * medians['without']:.0f} | {1000 * medians['with']:.0f} | {cost:+.1%} |"
    )


if __name__ == "__main__":
    main()
