"""Seconds that the simulation of parallel vector quantization takes, for each scheme.

    python -m benchmarks.vq_simulation

M = 32 workers, K = 100, D = 32, τ = 10, 10⁷ samples in all, the criterion 100 times over 20,000
samples. The first run of a scheme compiles; the second is the one that is reported as seconds. On
two cores: A 14.8 s, B 16.0 s, C 18.7 s, that is 530,000 to 680,000 samples/s.
"""

import time

import numpy as np

from benchmarks.support.flags import Parser, at_least
from jkmeans.vq import SCHEMES, Setting
from jkmeans.vq.data import first_prototypes
from jkmeans.vq.mixtures import spline_mixture
from jkmeans.vq.simulation import run

K, D, TAU, DELAY, N, EVALUATIONS = 100, 32, 10, 20.0, 20_000, 100


def main() -> None:
    """Prints one line for each scheme."""
    parser = Parser("vq_simulation", __doc__)
    parser.add_argument("--workers", type=at_least(1), default=32, help="M")
    parser.add_argument("--samples", type=at_least(1), default=10_000_000, help="of all workers")
    arguments = parser.parse_args()
    samples = spline_mixture(0, N, 150, D, 40)
    prototypes = first_prototypes(np.random.default_rng(0), samples, K, 1)
    for name in SCHEMES:
        setting = Setting(
            scheme=name,
            n_workers=arguments.workers,
            tau=TAU,
            delay=DELAY,
            steps=("constant", 0.02, 0.0),
            duration=arguments.samples // arguments.workers,
            n_evaluations=EVALUATIONS,
        )
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            found = run(setting, 0, prototypes, samples)
            seconds.append(time.perf_counter() - start)
        done = int(setting.times[-1]) * arguments.workers
        print(
            f"{name}: {done:,} samples in {seconds[1]:.1f} s ({seconds[0]:.1f} s with compilation),"
            f" {done / seconds[1]:,.0f} samples/s, distortion {found.distortion[0]:.0f} → "
            f"{found.distortion[-1]:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
