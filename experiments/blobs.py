"""Make blobs on all devices, cluster them, and compare with scikit-learn.

python -m experiments.blobs --config configs/blobs_1m.py --workdir runs/blobs_1m
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.blobs.cluster_blobs`."""
    from jkmeans.blobs import cluster_blobs

    cluster_blobs(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the results; made if missing.")
    launch(main, required=("config", "workdir"), several=False, fields="jkmeans.blobs:FIELDS")
