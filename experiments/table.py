"""Train methods from several seeds and write one table of them.

    python -m experiments.table --config configs/table_digits.py --workdir runs/table

Runs that have ended are not trained again: the same command goes on where it stopped.
--methods=dec,idec trains only these rows; a name with a comma has double quotes:
--methods='dec,"dec, BRB"'.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.comparison.compare`."""
    from jkmeans.comparison import compare

    compare(FLAGS.config, FLAGS.workdir, FLAGS.methods)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the runs and the table; made if missing.")
    flags.DEFINE_list("methods", [], "Rows to train; all if empty.")
    launch(main, required=("config", "workdir"), several=False)
