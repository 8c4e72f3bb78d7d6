"""The first 51,000 training images of Fashion-MNIST, 512 features, K = 500.

    python -m experiments.train --config configs/fashion_mnist_500x512.py --workdir runs/500x512

11 minutes on two busy cores. Purity 81.9 (the share of the largest class in each cluster; ACC
means little with 500 clusters of 10 classes), no empty cluster (docs/results.md).

The first centroids are the features of 500 sampled images; after each pass over the data they are
recomputed from the features of all images, as these were stored during the pass.
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; every field is explained in jkmeans/configuration.py."""
    config: Config = ConfigDict()
    config.seed = 0
    config.n_seeds = 1  # Side by side in one program, from seed on.
    config.n_devices = 0  # All.
    config.n_clusters = 500

    config.data = ConfigDict()
    config.data.name = "fashion-mnist"
    config.data.split = "train"
    config.data.path = ""
    config.data.labels_path = ""
    config.data.n_examples = 51_000
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
    config.network.embedding_dim = 512
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
    config.centroids.init = "sample"
    config.centroids.n_init = 1
    config.centroids.init_max_iter = 0  # The sampled features themselves.
    config.centroids.n_iterations = 10
    config.centroids.every = 1
    config.centroids.bank = "stored"
    config.centroids.empty = "farthest"
    config.centroids.final_max_iter = 100

    config.training = ConfigDict()
    config.training.batch_size = 256
    config.training.n_pretrain_epochs = 10
    config.training.pretrained_folder = ""  # Where pretrained networks are kept.
    config.training.n_epochs = 20
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
