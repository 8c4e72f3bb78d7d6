r"""Start a command in several processes that compute as one, and again when one of them dies.

    python -m experiments.launch --processes 4 --min_processes 1 --max_restarts 10 -- \
        python -m experiments.train --config configs/digits.py --workdir runs/digits

Every process writes to LOGS/process-N.log; all lines come on stdout, with the number in front.
Signals are passed on. SIGUSR1, or a number in the file LOGS/wanted, asks for as many processes as
at first, or that many: they save, leave, and start again. One machine only; see docs/elastic.md.
"""

import math
from pathlib import Path

from absl import flags

from experiments.launcher import FLAGS, launch


def main(command: list[str]) -> int:
    """Calls `jkmeans.processes.supervisor.Supervisor`."""
    from jkmeans.errors import UserError
    from jkmeans.processes.supervisor import Options, Supervisor

    if not command:
        raise UserError("there is no command; accepted: flags, --, and the command of one process")
    if FLAGS.min_processes > FLAGS.processes:
        raise UserError(
            f"--min_processes is {FLAGS.min_processes}, but --processes is {FLAGS.processes}; "
            f"accepted: 1 to {FLAGS.processes}"
        )
    seconds = {"hang_seconds": FLAGS.hang_seconds, "grace_seconds": FLAGS.grace_seconds}
    for name, value in seconds.items():
        if math.isnan(value):  # Which no bound of a flag refuses.
            raise UserError(f"--{name} is nan; accepted: a number of seconds")
    logs = Path(FLAGS.logs) if FLAGS.logs else _beside(command)
    options = Options(
        command=command,
        n_processes=FLAGS.processes,
        min_processes=FLAGS.min_processes,
        max_restarts=FLAGS.max_restarts,
        hang_seconds=FLAGS.hang_seconds,
        grace_seconds=FLAGS.grace_seconds,
        gpus_per_process=FLAGS.gpus_per_process,
        spares=FLAGS.spares,
        logs=logs,
    )
    return Supervisor(options).run()


def _beside(command: list[str]) -> Path | None:
    """The folder ``processes`` in the workdir that the command names; None where it names none."""
    for i, word in enumerate(command):
        name, _, value = word.partition("=")
        if name in ("--workdir", "-workdir"):
            value = value or "".join(command[i + 1 : i + 2])
            return Path(value).expanduser() / "processes" if value else None
    return None


if __name__ == "__main__":
    flags.DEFINE_integer("processes", None, "Processes to start, and the most.", lower_bound=1)
    flags.DEFINE_integer(
        "min_processes", 1, "Deaths do not take the number below this.", lower_bound=1
    )
    flags.DEFINE_integer("max_restarts", 10, "Restarts after failures.", lower_bound=0)
    flags.DEFINE_float(
        "hang_seconds", 30.0, "A process that is silent for so long is ended.", lower_bound=2.0
    )
    flags.DEFINE_float(
        "grace_seconds", 300.0, "Time to save for processes asked to leave.", lower_bound=0.0
    )
    flags.DEFINE_integer(
        "gpus_per_process", 0, "GPUs dealt to each, in order; 0: all see all.", lower_bound=0
    )
    flags.DEFINE_integer(
        "spares",
        0,
        "Processes kept ready with everything imported (about 300 MB each), for faster restarts; "
        "the command must be one of experiments.*.",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "logs", "", "Folder of logs and control file; WORKDIR/processes of the command if empty."
    )
    launch(main, required=("processes",), takes_command=True)
