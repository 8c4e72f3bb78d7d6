"""Methods on all 70,000 images of Fashion-MNIST, three seeds each.

python -m experiments.table --config configs/table_fashion_mnist.py --workdir runs/table_fashion

What has been measured stands in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist
from configs.table_mnist import (
    after_gradient_descent,
    by_eigenvectors,
    by_gradient_descent,
    for_a_table,
    plain_autoencoder,
)
from jkmeans.configuration import Config
from jkmeans.methods import with_method


def get_config() -> Config:
    """The config: ``runs`` holds one complete config for each row."""
    joint = fashion_mnist.get_config()
    by_adam = plain_autoencoder(joint)
    plain = by_gradient_descent(by_adam)
    plain.training.learning_rate = 1.0  # These images are brighter than digits: 2 diverges.
    plain.training.n_pretrain_epochs = 160  # Twice as many as at the rate that digits bear.
    config: Config = ConfigDict()
    config.n_seeds = 3
    config.runs = ConfigDict(sort_keys=False)  # The order of the rows.
    config.runs.update(after_gradient_descent(plain))
    config.runs["n2d"] = with_method(by_adam, "n2d", objective__starts=10)
    for layout in ("spectral", "consensus"):
        config.runs[f"n2d, {layout}"] = by_eigenvectors(by_adam, layout)
    config.runs["joint"] = for_a_table(joint)
    return config
