"""Parallel stochastic vector quantization of 8 × 8 patches of Fashion-MNIST.

python -m experiments.parallel_vq --config configs/parallel_vq_patches.py --workdir runs/vq_patches
"""

from configs import parallel_vq
from jkmeans.configuration import Config


def get_config() -> Config:
    """As ``configs/parallel_vq.py``, of 10,000 patches drawn from all images, from three seeds."""
    config = parallel_vq.get_config()
    config.n_seeds = 3
    config.data.input = "fashion-mnist"
    config.data.patch = 8
    return config
