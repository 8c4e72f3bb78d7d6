r"""Nodes that only talk to their neighbours: estimation, k-means, vector quantization, training.

    python -m experiments.consensus --config configs/consensus_least_squares.py --workdir runs/ls
    python -m experiments.consensus --config configs/consensus_kmeans.py --workdir runs/gossip

Cases that have ended are not computed again: the same command goes on where it stopped. A CPU is
given a device for each of up to 64 nodes, on which the bytes of messages are counted (and with
--config.nodes=mesh the nodes run).
"""

import os

from absl import flags

# Several fake CPU devices in one process; see docs/architecture.md, "Fake devices".
os.environ.setdefault("NPROC", "16")

from experiments.launcher import FLAGS, launch

_MOST_DEVICES = 64


def main() -> None:
    """Calls `jkmeans.consensus.experiment.run_experiment`."""
    import jax

    from jkmeans.consensus.experiment import run_experiment, validate
    from jkmeans.consensus.tasks.base import number_of_nodes

    config = validate(FLAGS.config)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        n_devices = min(_MOST_DEVICES, max(1, number_of_nodes(config)))
        jax.config.update("jax_num_cpu_devices", n_devices)
    run_experiment(config, FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the results; made if missing.")
    launch(
        main,
        required=("config", "workdir"),
        several=False,
        fields="jkmeans.consensus.experiment:fields_of",
    )
