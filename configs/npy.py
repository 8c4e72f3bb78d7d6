r"""Your own array: an .npy file [n, ...] of numbers, memory-mapped, labels optional.

    python -m experiments.train --config configs/npy.py --workdir runs/mine \
        --config.data.path=examples.npy --config.n_clusters=20

Scale your features to about unit variance: the reconstruction error is taken as it is. Images go
in as [n, height, width] or [n, height, width, channels] and may use network.name=convolutional;
pictures show a fourth channel as opacity, over white.
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; every field is explained in jkmeans/configuration.py."""
    config: Config = ConfigDict()
    config.seed = 0
    config.n_seeds = 1  # Side by side in one program, from seed on.
    config.n_devices = 0  # All.
    config.n_clusters = 10

    config.data = ConfigDict()
    config.data.name = "npy"
    config.data.split = "all"
    config.data.path = ""  # An .npy file, to be given.
    config.data.labels_path = ""  # An .npy file of integers, for metrics only.
    config.data.n_examples = 0  # All.
    config.data.n_shards = 8
    config.data.placement = "auto"
    config.data.chunk_mebibytes = 64

    config.augmentation = ConfigDict()  # Random views of images; all 0 for none.
    config.augmentation.shift = 0.0  # Pixels.
    config.augmentation.rotation = 0.0  # Degrees.
    config.augmentation.zoom = 0.0
    config.augmentation.pretraining = True  # Whether pretraining sees them, too.
    config.augmentation.invariance = False  # Examples and views, or views only.

    config.network = ConfigDict()
    config.network.name = "fully_connected"
    config.network.embedding_dim = 10
    config.network.widths = (500, 500, 2000)
    config.network.decoder = True
    config.network.normalize = False
    config.network.initializer = "glorot_uniform"
    config.network.precision = "float32"  # Or "bfloat16": products in layers, after pretraining.

    config.objective = ConfigDict()
    config.objective.name = "joint"
    config.objective.assignment = "nearest"
    config.objective.reconstruction_weight = 1.0
    config.objective.centroid_weight = 0.1
    config.objective.warmup_epochs = 10.0
    config.objective.balance_weight = 0.0
    config.objective.temperature = 1.0

    config.centroids = ConfigDict()
    config.centroids.init = "k-means++"
    config.centroids.n_init = 20
    config.centroids.init_max_iter = 100
    config.centroids.n_iterations = 10
    config.centroids.every = 1
    config.centroids.bank = "stored"
    config.centroids.empty = "farthest"
    config.centroids.final_max_iter = 300

    config.training = ConfigDict()
    config.training.batch_size = 256
    config.training.n_pretrain_epochs = 50
    config.training.pretrained_folder = ""  # Where pretrained networks are kept.
    config.training.n_epochs = 50
    config.training.pretrain_precision = "float32"  # The same while pretraining.
    config.training.optimizer = "adam"
    config.training.clustering_optimizer = "adam"
    config.training.learning_rate = 1e-3
    config.training.clustering_learning_rate = 1e-3
    config.training.schedule = "constant"
    config.training.clustering_schedule = "constant"
    config.training.weight_decay = 0.0
    config.training.collapse_ratio = 1e-4

    config.reset = ConfigDict()  # Soft resets (BRB).
    config.reset.every = 0  # None.
    config.reset.kept = 0.8

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 5
    config.checkpoint.keep = 2

    config.report = ConfigDict()
    config.report.pictures = True
    return config
