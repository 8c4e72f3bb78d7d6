r"""A perceptron on Fashion-MNIST by asynchronous and by synchronous gradients of three workers.

    python -m experiments.parallel_sgd --config configs/parallel_sgd.py --workdir runs/sgd

Of the held-out images 16 % were classified wrongly after four epochs of asynchronous gradients
(their staleness was 5 on average), and 15 % after as many of synchronous ones; one run each.
The workdir receives, for each of the two, curve.jsonl (the error on held-out images over seconds
and examples), staleness.png, results.json, journal.bin and checkpoints/; and curves.png with both.
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; every field is explained in jkmeans/asynchronous/gradients.py."""
    config: Config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.name = "fashion-mnist"
    config.data.n_examples = 0  # All.
    config.problem = ConfigDict()
    config.problem.name = "multilayer_perceptron"  # Or the user's module:function.
    config.problem.widths = (128,)

    config.workers = 3
    config.batch_size = 64
    config.n_epochs = 4
    config.optimizer = "sgd"
    config.asynchronous = ConfigDict()
    config.asynchronous.learning_rate = 0.1
    config.synchronous = ConfigDict()
    config.synchronous.learning_rate = 0.3  # The mean of three gradients is less noisy.

    config.ray = ConfigDict()
    config.ray.address = "local"  # Or auto, or host:port of a cluster that has this machine in it.
    config.ray.checkpoint_exchanges = 1000
    config.ray.max_restarts = -1  # Any number.
    config.ray.ahead = 1
    config.ray.evaluate_seconds = 1.0
    config.ray.patience_seconds = 10.0
    config.ray.gpus_per_worker = 0.0
    return config
