r"""Train one model by asynchronous and by synchronous gradients, through a parameter server on Ray.

    python -m experiments.parallel_sgd --config configs/parallel_sgd.py --workdir runs/sgd

Needs ``pip install "jkmeans[ray]"``. The same command goes on where it stopped.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.asynchronous.gradients.run_sgd`."""
    from jkmeans.asynchronous import run_sgd

    run_sgd(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the results; made if missing.")
    launch(
        main,
        required=("config", "workdir"),
        several=False,
        fields="jkmeans.asynchronous.gradients:FIELDS",
    )
