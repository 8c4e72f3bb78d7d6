r"""Decentralised vector quantization of MNIST: online k-means by nodes that mix with neighbours.

python -m experiments.consensus --config configs/consensus_vq.py --workdir runs/gossip_vq

A minute of computing. One worker ends at a distortion of 24.5, sixteen with a shared version
(scheme B) at 20.2, and sixteen that mix with neighbours at 20.1 to 20.2 on ring, torus and
hypercube, shuffled or sorted.
"""

from ml_collections import ConfigDict

from configs import consensus_kmeans
from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; fields are explained in jkmeans/consensus/experiment.py and tasks/vq.py."""
    config = consensus_kmeans.get_config()
    config.task = "vq"
    config.loss.messages = 0.0
    del config.kmeans
    config.vq = ConfigDict()
    config.vq.n_clusters = 100
    config.vq.scheme = "displacements"  # Or averaging.
    config.vq.deals = ("shuffled", "sorted")
    config.vq.rounds = 5
    config.vq.tau = 10
    config.vq.duration = 4_000
    config.vq.n_evaluations = 40
    config.vq.steps = ConfigDict()
    config.vq.steps.name = "constant"  # Or inverse, rational, inverse_sqrt.
    config.vq.steps.a = 0.02
    config.vq.steps.b = 0.0
    return config
