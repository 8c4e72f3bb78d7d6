"""Parallel stochastic vector quantization of the pixels of MNIST.

python -m experiments.parallel_vq --config configs/parallel_vq_mnist.py --workdir runs/vq_mnist
"""

from configs import parallel_vq
from jkmeans.configuration import Config


def get_config() -> Config:
    """As ``configs/parallel_vq.py``, of 10,000 images, from three seeds.

    Mean speed-ups: A 1.07 with M = 10; B 10.2 with M = 10 and τ = 10, and none with τ = 1000, which
    overshoots; C 30.0 with M = 32 and delays of 20 samples, where B without any has 31.3.
    """
    config = parallel_vq.get_config()
    config.n_seeds = 3
    config.data.input = "mnist"
    config.duration = 20_000
    config.n_evaluations = 100
    config.figures.delays = (1, 10)
    config.figures.scaling = (1, 4, 32)
    return config
