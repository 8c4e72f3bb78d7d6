"""Kill, stop and slow the processes of a run, fill its disk, and count what it survives.

    python -m experiments.chaos --config configs/chaos.py --workdir runs/chaos

The workdir receives faults.csv, a line for each fault, and chaos.md, a table by kind. The same
command goes on after the rounds that are done.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.chaos.run_chaos`."""
    from jkmeans.chaos import run_chaos

    run_chaos(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", "runs/chaos", "Folder of the results; made if missing.")
    launch(main, required=("config",), several=False, fields="jkmeans.chaos:FIELDS")
