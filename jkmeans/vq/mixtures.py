"""Mixtures of noisy curves: the synthetic data of the paper on parallel vector quantization."""

from __future__ import annotations

import numpy as np

SCALE = 100.0
"""Length of a component's vector of spline coefficients."""

_COEFFICIENTS = (1, -4, 6, -4, 1)


def cubic_splines(places: np.ndarray, n_knots: int) -> np.ndarray:
    """The cubic B-splines on the knots 0, 1, … n_knots − 1.

    b_j(t) = B(t − j) with B(u) = 1/6 Σ_i (−1)^i binom(4, i) max(u − i, 0)³.

    Args:
      places: [d] float, in 0 … n_knots − 1.
      n_knots: χ, at least 5.

    Returns:
      [χ − 4, d] float64.
    """
    u = places[None, :] - np.arange(n_knots - 4)[:, None]
    powers = [c * np.maximum(u - i, 0) ** 3 for i, c in enumerate(_COEFFICIENTS)]
    # Beyond its support the five terms cancel up to rounding only.
    return np.where(u < 4, sum(powers) / 6, 0.0)


def spline_centres(
    rng: np.random.Generator, n_components: int, n_features: int, n_knots: int
) -> np.ndarray:
    """The centres of a mixture: curves whose spline coefficients are orthogonal.

    Coefficients are drawn uniformly from the unit cube, orthogonalised (Gram and Schmidt) in blocks
    of as many as they have dimensions, and scaled to the length `SCALE`.

    Args:
      rng: the source of randomness.
      n_components: G.
      n_features: d, the places at which a curve is looked at, evenly spread.
      n_knots: χ, at least 5.

    Returns:
      [G, d] float64.
    """
    n_splines = n_knots - 4
    coefficients = rng.uniform(size=(n_components, n_splines))
    for first in range(0, n_components, n_splines):
        block = coefficients[first : first + n_splines]
        q, r = np.linalg.qr(block.T)
        # Signs as Gram and Schmidt have them: along the vectors, not against them.
        block[:] = SCALE * (q * np.sign(np.diag(r))).T
    places = np.arange(n_features) * (n_knots - 1) / n_features
    return coefficients @ cubic_splines(places, n_knots)


def spline_mixture(
    seed: int, n_samples: int, n_components: int, n_features: int, n_knots: int
) -> np.ndarray:
    """Samples of a mixture of noisy curves: a centre drawn uniformly, and white noise.

    Args:
      seed: of centres and samples.
      n_samples: N.
      n_components: G.
      n_features: d.
      n_knots: χ, at least 5; the more, the rougher the curves, and the weaker the noise, whose
        standard deviation is 5 `SCALE` / χ.

    Returns:
      [N, d] float32.

    Source: the generator of Durut, Patra and Rossi as their published program has it (CloudDALVQ,
    orthogonal mixtures of splines).
    """
    rng = np.random.default_rng(seed)
    centres = spline_centres(rng, n_components, n_features, n_knots)
    noise = 5 * SCALE / n_knots * rng.standard_normal((n_samples, n_features))
    return (centres[rng.integers(n_components, size=n_samples)] + noise).astype(np.float32)
