r"""Least squares by nodes that talk to their neighbours: a course exercise, done without deadlocks.

python -m experiments.consensus --config configs/consensus_least_squares.py --workdir runs/ls

Half a minute on two busy cores. Gossip takes the rounds that the spectral gap predicts (ring 266,
star 215, torus and hypercube 28, exponential 20, complete 1). Gradient tracking and EXTRA come
within 1e-5 of the closed form (7.959, 1.996) on each topology, in 41 to 998 rounds; plain
decentralised descent stops 0.3 to 1 % away. The exercise as it was set, with two nodes:

    … --config.graph.n_nodes=2 --config.graph.topologies="('complete',)"
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; see jkmeans/consensus/experiment.py and tasks/estimation.py for the fields."""
    config: Config = ConfigDict()
    config.seed = 0
    config.task = "estimation"
    config.nodes = "vmap"  # All on one device; mesh: a device for each.
    config.precision = "float64"

    config.graph = ConfigDict()
    config.graph.n_nodes = 16
    config.graph.topologies = ("ring", "torus", "hypercube", "exponential", "star", "complete")
    config.graph.radius = 0.0
    config.graph.edges = ""
    config.graph.mixing = "metropolis"  # Or maximum_degree; given, for edges with weights.
    config.loss = ConfigDict()
    config.loss.links = 0.0
    config.loss.messages = 0.0

    config.gossip = ConfigDict()
    config.gossip.tolerance = 1e-6
    config.estimation = ConfigDict()
    config.estimation.problem = "exercise"
    config.estimation.matrix = ((5.0, 1.0), (1.0, 4.0))  # Row i mod 2 at node i.
    config.estimation.x = (8.0, 2.0)
    config.estimation.n_unknowns = 2  # Of sensors.
    config.estimation.noise = 0.5
    config.estimation.methods = (
        "gradient_descent",
        "decentralised_descent",
        "gradient_tracking",
        "extra",
    )
    config.estimation.step = 0.0  # What suits each method and topology.
    config.estimation.tolerance = 1e-5
    config.estimation.max_rounds = 20_000
    return config
