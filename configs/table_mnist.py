"""Every method on all 70,000 images of MNIST, three seeds each.

python -m experiments.table --config configs/table_mnist.py --workdir runs/table_mnist
"""

from ml_collections import ConfigDict

from configs import mnist
from jkmeans.configuration import Config
from jkmeans.methods import with_method


def get_config() -> Config:
    """The config: ``runs`` holds one complete config for each row."""
    config: Config = ConfigDict()
    config.n_seeds = 3
    config.runs = ConfigDict(rows(mnist.get_config()), sort_keys=False)  # In this order.
    return config


def rows(joint: Config) -> dict[str, Config]:
    """The rows of a table of 28 × 28 images.

    Args:
      joint: the config of joint deep k-means on these data, a row of its own.
    """
    joint.report.pictures = False
    joint.checkpoint.every = 50
    joint.checkpoint.keep = 1

    # The autoencoder of the literature, on the images as they are.
    plain = joint.copy_and_resolve_references()
    plain.augmentation.shift = plain.augmentation.rotation = plain.augmentation.zoom = 0.0
    plain.network.normalize = False
    plain.centroids.bank = "refreshed"
    plain.centroids.n_init = 10
    plain.training.n_pretrain_epochs = 40
    plain.training.n_epochs = 15

    # Views while clustering only, so that the pretrained network is the same.
    return {
        "autoencoder": with_method(plain, "autoencoder"),
        "n2d": with_method(plain, "n2d"),
        "dec": with_method(plain, "dec", training__clustering_learning_rate=1e-4),
        "idec": with_method(plain, "idec", training__clustering_learning_rate=1e-4),
        "dcn": with_method(plain, "dcn", training__clustering_learning_rate=1e-4),
        "dkm": with_method(plain, "dkm", training__clustering_learning_rate=1e-4),
        "vade": with_method(plain, "vade"),
        "joint, views": joint,
    }
