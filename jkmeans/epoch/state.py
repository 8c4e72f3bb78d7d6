"""What a run computes with: rows on the devices, and the state that steps and epochs change."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax

from jkmeans.networks import Parameters
from jkmeans.sharding import BY_STEP, REPLICATED, SHARDED

CLUSTER_SIZES = "cluster_sizes"
"""The one metric that is not a scalar: [k], examples of each cluster."""

COUNT = "#examples"
"""Among the totals of an epoch, which otherwise go by the names of loss terms."""


class Rows(NamedTuple):
    """The examples as they lie on the devices, sharded; see `jkmeans.sharding.Layout`.

    Attributes:
      examples: [n_rows, *example_shape], native dtype; None when the host feeds them.
      weights: [n_rows] float32, 1 for an example and 0 for padding.
      index: [n_rows] int32, the number of the example; −1 for padding.
    """

    examples: Any
    weights: jax.Array
    index: jax.Array


class TrainState(NamedTuple):
    """Everything that a run needs to go on; data only.

    Attributes:
      parameters: of the network, by path; replicated.
      optimizer: optax state, of the parameters and of what a method learns of its clusters;
        replicated.
      clusters: of the method, with ``centroids`` [k, p]; replicated.
      bank: [n_rows, p] float32, the embedding of each row; sharded.
      labels: [n_rows] int32, the cluster of each row; sharded.
      totals: sums of each loss term and of the weights over the steps of the epoch in progress.
      reference_variance: [] float32, variance of the embeddings when training, then clustering,
        began; what a collapse is measured against.
      epoch: [] int32, finished epochs, pretraining included.
      step: [] int32, finished steps of the epoch in progress; 0 between epochs.
      key: [2] uint32, the root of all keys: every key is folded from it and a position.
    """

    parameters: Parameters
    optimizer: Any
    clusters: Any
    bank: jax.Array
    labels: jax.Array
    totals: dict[str, jax.Array]
    reference_variance: jax.Array
    epoch: jax.Array
    step: jax.Array
    key: jax.Array

    @classmethod
    def specs(cls, stacked: bool = False) -> TrainState:
        """How each field lies on the mesh, as a prefix of the state.

        Args:
          stacked: whether there is an axis of seeds in front.
        """
        by_row: Any = BY_STEP if stacked else SHARDED
        return cls.everywhere(REPLICATED)._replace(bank=by_row, labels=by_row)

    @classmethod
    def everywhere(cls, spec: Any) -> TrainState:
        """One spec for all fields."""
        return cls(*[spec] * len(cls._fields))


class Purpose(enum.IntEnum):
    """What a key of an epoch is for; the numbers decide what is drawn."""

    ORDER = 0
    VIEWS = 1
    CLUSTERS = 2
    RECLUSTERING = 3
    BATCH = 4
    OTHER_VIEWS = 5
    FRESH_LAYERS = 6
    CLUSTERS_AFTER_RESET = 7


def epoch_key(state: TrainState, purpose: Purpose) -> jax.Array:
    """The key of an epoch for one purpose."""
    root = jax.random.wrap_key_data(state.key)
    return jax.random.fold_in(jax.random.fold_in(root, purpose), state.epoch)
