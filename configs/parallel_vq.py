r"""Parallel stochastic vector quantization of a synthetic mixture: the figures of the paper.

    python -m experiments.parallel_vq --config configs/parallel_vq.py --workdir runs/vq

Durut, Patra and Rossi, A discussion on parallelization schemes for stochastic vector quantization
algorithms, ESANN 2012. With --config.engine=ray the workers are processes.

Seven minutes on one busy core. Mean speed-ups of ten seeds: A 1.03 with M = 10; B 9.9 with M = 10
and τ = 10, 10.7 with τ = 100, and 3.5 with τ = 1000, where only seven seeds get that far; C 34.3
with M = 32 and delays of 20 samples, where B without any has 32.2.
"""

from ml_collections import ConfigDict

from jkmeans.configuration import Config


def get_config() -> Config:
    """The config; every field is explained in jkmeans/vq/experiment.py."""
    config: Config = ConfigDict()
    config.seed = 0
    config.n_seeds = 10
    config.n_devices = 1  # 0: all; worth it for many workers only.
    config.engine = "simulation"  # Or ray.

    config.n_clusters = 100
    config.init_samples = 1  # The authors' program: 20.
    config.data = ConfigDict()
    config.data.input = "mixture"  # Or digits, mnist, fashion-mnist; or a path.
    config.data.n_samples = 10_000
    config.data.patch = 0
    config.mixture = ConfigDict()
    config.mixture.n_components = 150
    config.mixture.n_features = 32
    config.mixture.n_knots = 40

    config.steps = ConfigDict()
    config.steps.name = "constant"  # Or inverse, rational, inverse_sqrt.
    config.steps.a = 0.02  # As the authors' program has it.
    config.steps.b = 0.0
    config.tau = 10
    config.delay = 20.0
    config.duration = 40_000
    config.n_evaluations = 200
    config.threshold = 0.05

    config.figures = ConfigDict()
    config.figures.averaging = (1, 2, 10)
    config.figures.displacements = (1, 2, 10)
    config.figures.tau = (10, 100, 1000)
    config.figures.tau_workers = 10
    config.figures.delays = (1, 2, 10)
    config.figures.scaling = (1, 2, 4, 8, 16, 32)

    config.workers = 3  # Of Ray.
    config.ray = ConfigDict()
    config.ray.address = "local"
    config.ray.checkpoint_exchanges = 1000
    config.ray.max_restarts = -1
    config.ray.ahead = 1
    config.ray.evaluate_seconds = 0.5
    config.ray.patience_seconds = 10.0
    config.ray.gpus_per_worker = 0.0
    return config
