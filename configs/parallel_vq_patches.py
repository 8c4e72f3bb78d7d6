"""Parallel stochastic vector quantization of 8 × 8 patches of Fashion-MNIST.

python -m experiments.parallel_vq --config configs/parallel_vq_patches.py --workdir runs/vq_patches
"""

from configs import parallel_vq
from jkmeans.configuration import Config


def get_config() -> Config:
    """As ``configs/parallel_vq.py``, of 10,000 patches drawn from all images, from three seeds.

    Many patches are nearly black, and one prototype gets them all: what many workers move it by
    while an exchange is under way must be less than the way to go, so steps are smaller here and
    exchanges more frequent. With those of ``parallel_vq.py`` 32 workers diverge.

    Four minutes on one busy core. Mean speed-ups: A 0.99 and B 9.9 with M = 10; C 31.8 with M = 32
    and delays of 5 samples, where B without any has 31.6.
    """
    config = parallel_vq.get_config()
    config.n_seeds = 3
    config.data.input = "fashion-mnist"
    config.data.patch = 8
    config.steps.a = 0.005
    config.tau = 5
    config.delay = 5.0
    config.figures.tau = (5, 20, 100)
    return config
