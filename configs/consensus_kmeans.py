r"""Decentralised k-means of MNIST by 16 nodes, each with its own part of the images.

python -m experiments.consensus --config configs/consensus_kmeans.py --workdir runs/gossip_kmeans

Two and a half minutes on two busy cores (65 s of computing). Lloyd's algorithm on all points ends
at an inertia of 2,101,500; with the centroids of its worst node every case is within 0.001 % of it,
on ring, torus and hypercube, points shuffled or sorted, with 20 % of the messages lost too.
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; fields are explained in jkmeans/consensus/experiment.py and tasks/kmeans.py."""
    config: Config = ConfigDict()
    config.seed = 0
    config.task = "kmeans"
    config.nodes = "vmap"  # All on one device; mesh: a device for each.
    config.precision = "float32"

    config.graph = ConfigDict()
    config.graph.n_nodes = 16
    config.graph.topologies = ("ring", "torus", "hypercube")
    config.graph.radius = 0.0
    config.graph.edges = ""
    config.graph.mixing = "metropolis"
    config.loss = ConfigDict()
    config.loss.links = 0.0
    config.loss.messages = 0.2  # Beside the same without loss.

    config.data = ConfigDict()
    config.data.input = "mnist"
    config.data.n_samples = 0  # All 70,000.
    config.data.n_features = 50  # Principal components.
    config.kmeans = ConfigDict()
    config.kmeans.n_clusters = 10
    config.kmeans.n_iter = 100
    config.kmeans.deals = ("shuffled", "sorted")  # Sorted: each node sees a corner of the data.
    config.kmeans.rounds = 0  # As many as shrink needs, by the spectral gap.
    config.kmeans.shrink = 0.03
    return config
