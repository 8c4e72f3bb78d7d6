"""Train one config from several seeds and print mean and standard deviation.

    python -m experiments.seeds --config configs/digits.py --n_seeds 5 --workdir runs/digits_seeds

Each run has its own folder in the workdir; the same command goes on where it stopped.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.training.seeds.train_seeds`."""
    from jkmeans.training.seeds import train_seeds

    train_seeds(FLAGS.config, FLAGS.workdir, FLAGS.n_seeds)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the runs; made if missing.")
    flags.DEFINE_integer("n_seeds", 5, "How many, from config.seed on.", lower_bound=1)
    launch(main, required=("config", "workdir"), fields="jkmeans.configuration:fields_of")
