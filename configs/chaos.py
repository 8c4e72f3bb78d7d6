"""Faults in runs of three processes on the digits of scikit-learn; see docs/elastic.md.

python -m experiments.chaos --config configs/chaos.py --workdir runs/chaos
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; every field is explained in jkmeans/chaos/settings.py."""
    config: Config = ConfigDict()
    config.seed = 0
    config.n_faults = 100
    config.faults_per_round = 9
    config.kinds = (
        "worker", "coordinator", "two", "save", "notice", "stop", "slow", "damage", "disk",
    )  # fmt: skip
    config.n_processes = 3
    config.spares = 3  # Kept ready for the next generation.
    config.hang_seconds = 5.0
    config.slow_seconds = 3.0
    config.patience_seconds = 300.0
    config.train_config = "configs/digits.py"
    config.train_flags = (
        "--config.network.widths=(32,)",
        "--config.training.n_pretrain_epochs=3",
        "--config.training.n_epochs=300",
        "--config.centroids.n_init=1",
        "--config.centroids.final_max_iter=20",
        "--config.checkpoint.every=2",
        "--config.report.pictures=False",
    )
    return config
