r"""Cluster a file, or a named data set, with k-means.

    python -m experiments.cluster --config configs/cluster.py --workdir runs/c \
        --config.input=embeddings.npy --config.n_clusters=1000

With --config.n_clusters=auto a sweep chooses the number. The same command goes on where it stopped.
"""

from absl import flags

from experiments.launcher import FLAGS, launch


def main() -> None:
    """Calls `jkmeans.clustering.cluster`."""
    from jkmeans.clustering import cluster

    cluster(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "File with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the results; made if missing.")
    launch(main, required=("config", "workdir"), fields="jkmeans.clustering:FIELDS")
