r"""Stochastic vector quantization on many workers: three schemes, simulated or on Ray.

    python -m experiments.parallel_vq --config configs/parallel_vq.py --workdir runs/vq

Simulations that have ended are not made again: the same command goes on where it stopped.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.vq.experiment.run_experiment`."""
    from jkmeans.vq.experiment import run_experiment

    run_experiment(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the results; made if missing.")
    launch(
        main, required=("config", "workdir"), several=False, fields="jkmeans.vq.experiment:FIELDS"
    )
