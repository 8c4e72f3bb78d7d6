"""Parallel stochastic vector quantization of the pixels of MNIST.

python -m experiments.parallel_vq --config configs/parallel_vq_mnist.py --workdir runs/vq_mnist
"""

from configs import parallel_vq
from jkmeans.configuration import Config


def get_config() -> Config:
    """As ``configs/parallel_vq.py``, of 10,000 images, from three seeds."""
    config = parallel_vq.get_config()
    config.n_seeds = 3
    config.data.input = "mnist"
    config.duration = 20_000
    config.n_evaluations = 100
    config.figures.delays = (1, 10)
    config.figures.scaling = (1, 4, 32)
    return config
