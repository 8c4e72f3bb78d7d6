"""Train a network and its centroids together.

    python -m experiments.train --config configs/digits.py --workdir runs/digits

Any field can be changed on the command line, such as --config.seed=1 or
--config.training.n_epochs=10. The same command goes on where a run stopped.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.training.train_and_evaluate`."""
    from jkmeans.training import train_and_evaluate

    train_and_evaluate(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")
    launch(main, required=("config", "workdir"), fields="jkmeans.configuration:fields_of")
