"""Faults on purpose: what a run survives, how fast, and whether its result is the same.

Processes are killed, stopped and slowed, the disk is filled, the newest checkpoint damaged.

A round is one run under the supervisor with several faults in it, one after the other, each once
the run has got over the one before. At its end the checksums of every array of the last checkpoint
are compared with those of a run that nobody disturbed.

`run_chaos` is the way in: `settings` is what is asked for, `rounds` what is done, to a
`supervised_run` on `disks` of its own, and `records` what came of it.
"""

import os
from pathlib import Path

from jkmeans import experiment_folder
from jkmeans.chaos.records import Fault
from jkmeans.chaos.rounds import Chaos
from jkmeans.chaos.settings import FIELDS, validate
from jkmeans.configuration import Config
from jkmeans.interruption import Interruption

__all__ = ["FIELDS", "Fault", "run_chaos", "validate"]


def run_chaos(config: Config, workdir: str | os.PathLike[str]) -> list[Fault]:
    """Disturbs runs, and reports what survived; goes on after the rounds that are done.

    Args:
      config: complete, as ``configs/chaos.py``; see `FIELDS`.
      workdir: receives ``faults.csv`` (a line for each fault, see `Fault`), ``chaos.md`` (a table
        by kind) and the folders of the runs.

    Returns:
      All faults.

    Raises:
      UserError: the config or the workdir cannot be used, or the undisturbed run failed.
      Interrupted: Ctrl-C or SIGTERM came; finished rounds are kept.
    """
    config = validate(config)
    workdir = Path(workdir).absolute()
    folder = experiment_folder.held(workdir, config, FIELDS, runtime=("n_faults",))
    with folder, Interruption() as interruption:
        return Chaos(config, workdir, interruption).execute()
