"""The notebook case: 1,000,000 points in the plane, 5 blobs.

python -m experiments.blobs --config configs/blobs_1m.py --workdir runs/blobs_1m

Half a minute on two cores, most of it compilation and scikit-learn. The adjusted Rand index is 1.0
with the blobs, with scikit-learn's best of 10 restarts, and with its run from the same start.
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; every field is explained in jkmeans/blobs.py."""
    config: Config = ConfigDict()
    config.seed = 79  # Centers far apart: more than eleven standard deviations.
    config.n_devices = 0  # All.

    config.blobs = ConfigDict()
    config.blobs.n_samples = 1_000_000
    config.blobs.n_features = 2
    config.blobs.n_clusters = 5
    config.blobs.cluster_std = 0.8
    config.blobs.center_box = (-10.0, 10.0)

    config.init = "k-means||"
    config.n_init = 10
    config.max_iter = 300
    config.tol = 1e-4
    config.scikit_learn = True
    config.pictures = True
    return config
