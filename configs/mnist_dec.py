"""DEC on all 70,000 images of MNIST, ten seeds in one program: the row ``dec`` of table_mnist.py.

python -m experiments.train --config configs/mnist_dec.py --workdir runs/mnist_dec

Pretraining, k-means and clustering of all ten; for one accelerator or several (seeds are dealt to
devices where their numbers allow it). On two cores one seed takes 24 minutes.
"""

from configs import table_mnist
from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; fields are explained in jkmeans/configuration.py."""
    config = table_mnist.get_config().runs["dec"].copy_and_resolve_references()
    config.n_seeds = 10
    return config
