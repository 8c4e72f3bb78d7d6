"""Methods on all 70,000 images of Fashion-MNIST, three seeds each.

python -m experiments.table --config configs/table_fashion_mnist.py --workdir runs/table_fashion
"""

from ml_collections import ConfigDict

from configs import fashion_mnist
from configs.table_mnist import by_gradient_descent, for_a_table, plain_autoencoder
from jkmeans.configuration import Config
from jkmeans.methods import with_method


def get_config() -> Config:
    """The config: ``runs`` holds one complete config for each row."""
    joint = fashion_mnist.get_config()
    plain = by_gradient_descent(plain_autoencoder(joint))
    config: Config = ConfigDict()
    config.n_seeds = 3
    config.runs = ConfigDict(sort_keys=False)  # The order of the rows.
    config.runs["autoencoder"] = with_method(plain, "autoencoder")
    config.runs["n2d"] = with_method(plain, "n2d", objective__starts=10)
    for name in ("dec", "idec", "dcn", "dkm"):
        config.runs[name] = with_method(plain, name)
    config.runs["joint"] = for_a_table(joint)
    return config
