"""What a fit ends with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """What a fit ends with; labels and distances are in their files already.

    Attributes:
      centroids: [k, d].
      sizes: [k] int64.
      inertia: in float64.
      n_iter: of the best restart.
      converged: whether it came to rest.
      history: (restart, iteration, inertia); empty for streamed data.
      seconds: of initialisation, iterations and the last assignment.
      labels: [n]; None where they are in their file only.
    """

    centroids: np.ndarray
    sizes: np.ndarray
    inertia: float
    n_iter: int
    converged: bool
    history: list[tuple[int, int, float]]
    seconds: float
    labels: np.ndarray | None = None
