r"""Cluster anything from the shell: an .npy file, a folder of them, Zarr, Parquet, or a named set.

    python -m experiments.cluster --config configs/cluster.py --workdir runs/c \
        --config.input=embeddings.npy --config.n_clusters=1000

The same command goes on where it stopped. As it stands it clusters the digits of scikit-learn; with
--config.n_clusters=auto it tries the values of sweep.n_clusters and takes the one it finds best.
The workdir receives centroids.npy [K, D], labels.npy [N], distances.npy [N] (squared), sizes.npy
[K], summary.json and report/*.png.
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; every field is explained in jkmeans/clustering/settings.py."""
    config: Config = ConfigDict()
    config.seed = 0
    config.n_devices = 0  # All.

    config.input = "digits"  # Or mnist, fashion-mnist; or a path.
    config.columns = ()  # Of Parquet; all.
    config.memory_mebibytes = 0  # Data above this is streamed; 0: half of what is free.

    config.n_clusters = "10"  # A number, or auto.
    config.init = "k-means||"  # k-means++ passes 2K times over streamed data.
    config.n_init = 1
    config.max_iter = 300
    config.tol = 1e-4
    config.empty = "farthest"
    config.deterministic = False  # True: the same bits on 1, 2, 4 and 8 devices.
    config.iterations_per_program = 20

    config.sweep = ConfigDict()  # For n_clusters = auto.
    config.sweep.n_clusters = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32)
    config.sweep.n_init = 4
    config.sweep.n_refits = 10
    config.sweep.sample_size = 10_000

    config.report = ConfigDict()
    config.report.pictures = True
    config.report.sample_size = 4000
    return config
