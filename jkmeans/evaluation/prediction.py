"""Examples to their clusters, block by block."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jkmeans import datasets, processes
from jkmeans.blocks import blocks
from jkmeans.evaluation.model import TrainedModel
from jkmeans.sharding import to_host


class Prediction(NamedTuple):
    """Clusters of examples.

    Attributes:
      labels: [n] int32, the nearest centroid.
      distances: [n] float32, squared Euclidean distance to it.
      embeddings: [n, p] float32.
    """

    labels: np.ndarray
    distances: np.ndarray
    embeddings: np.ndarray


def predict(
    model: TrainedModel,
    examples: np.ndarray,
    progress: Callable[[int], object] = lambda n_done: None,
) -> Prediction:
    """Embeds examples and assigns each to its nearest centroid.

    Args:
      model: from `load_model`.
      examples: [n, *example_shape], in the units of the training data (scaling is the model's);
        read in blocks, so it may be a memory map. Each process reads the rows of its own devices;
        what they come to is gathered on all.
      progress: called with the number of examples done.

    Raises:
      UserError: wrong shape or type, no examples, NaN or infinity.
    """
    part = (processes.number(), processes.count())
    examples = processes.together(
        lambda: datasets.check_examples(examples, expected_shape=model.example_shape, part=part)
    )
    return Prediction(*compute_in_blocks(model.predict_rows, examples, model.n_devices, progress))


def compute_in_blocks(
    compute: Callable[[Callable[[int, int], np.ndarray], int], tuple],
    examples: np.ndarray,
    n_devices: int,
    progress: Callable[[int], object],
    dtype: np.dtype | None = None,
) -> list[np.ndarray]:
    """Columns [n, ...] of what is computed of examples [n, ...], block by block.

    Args:
      compute: ``(read, r) -> arrays [r, ...]`` on the devices; see ``predict_rows`` of
        `TrainedModel`.
      examples: see `jkmeans.blocks.blocks`.
      n_devices: of the mesh.
      progress: called with the number of examples done.
      dtype: see `jkmeans.blocks.blocks`.
    """
    parts = []
    n_done = 0
    for block in blocks(examples, n_devices, dtype):
        found = compute(block.read, block.n_rows)
        parts.append([to_host(array)[: block.n_examples] for array in found])
        n_done += block.n_examples
        progress(n_done)
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def embed(model: TrainedModel, examples: np.ndarray) -> np.ndarray:
    """Embeddings [n, p] float32 of examples [n, *example_shape]."""
    return predict(model, examples).embeddings
