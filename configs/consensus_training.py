r"""A perceptron on Fashion-MNIST trained by 16 nodes that mix parameters with their neighbours.

python -m experiments.consensus --config configs/consensus_training.py --workdir runs/gossip_sgd

A minute of computing. Held-out errors after two epochs, mean over nodes: shuffled examples 22.3 %
by all-reducing, 20.5 to 21.0 % by gossip, 23.0 % alone; sorted ones (one or two classes a node)
20.8 % by all-reducing, 36 to 63 % by gossip, 85 % alone.
"""

from ml_collections import ConfigDict

from configs import consensus_kmeans
from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; fields are explained in jkmeans/consensus/experiment.py and tasks/training.py."""
    config = consensus_kmeans.get_config()
    config.task = "training"
    config.loss.messages = 0.0
    del config.kmeans
    config.data = ConfigDict()
    config.data.name = "fashion-mnist"
    config.data.n_examples = 0  # All.
    config.problem = ConfigDict()
    config.problem.name = "multilayer_perceptron"  # Or the user's module:function.
    config.problem.widths = (64,)

    config.training = ConfigDict()
    config.training.modes = ("all_reduce", "gossip", "alone")
    config.training.deals = ("shuffled", "sorted")  # Sorted: a node sees one or two classes.
    config.training.optimizer = "sgd"
    config.training.learning_rate = 0.1
    config.training.batch_size = 32
    config.training.n_epochs = 2
    return config
