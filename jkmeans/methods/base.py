"""The contract of a deep clustering method: what a factory in this folder returns.

A method is a small tuple of pure functions. When they are called is the trainer's business
(`jkmeans.training`): ``initialize`` once, on the bank of all embeddings, at the end of
pretraining; ``objective`` in every step; ``update`` after every epoch, on the bank. All of them
run inside ``shard_map``: their examples are the local ones, their clusters the same everywhere.

A user's own objective is a function ``objective(network, clusters, batch) -> (embeddings, terms)``
named in the config as ``module:function``. It sees the examples of one device, returns one value
per example for every term, and never sums over examples: the trainer weights, sums and averages
over the batch and over all devices, so the same text is right on one CPU and on a cluster. What
must be averaged over the whole batch inside the objective goes through ``batch.mean``.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jkmeans.kmeans.collectives import all_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The examples that one device has in one step.

    Attributes:
      x: [b, *example_shape] float32, scaled.
      view: [b, *example_shape] float32, a random view of each example, for the network to see;
        x itself without augmentation.
      weights: [b] float32; 1 for an example, 0 for padding.
      labels: [b] int32, the cluster of each example at the last re-computation; −1 before the
        first.
      index: [b] int32, the number of the example in the data set; −1 for padding.
      key: random key of the step, the same on every device; ``example_keys(key, index)`` makes
        one for each example.
      progress: [] float32, epochs since clustering began (fractions within an epoch).
      clustering: False while the network is pretrained and the clusters mean nothing; static.
      axis_name: mesh axis of the examples; static.
    """

    x: jax.Array
    view: jax.Array
    weights: jax.Array
    labels: jax.Array
    index: jax.Array
    key: jax.Array
    progress: jax.Array
    clustering: bool = dataclasses.field(metadata={"static": True})
    axis_name: str | None = dataclasses.field(default=None, metadata={"static": True})

    def mean(self, values: jax.Array) -> jax.Array:
        """Mean of per-example ``values: [b, …]`` over the examples of all devices; differentiable.

        Costs one all-reduce, and one more in the backward pass where the loss is not linear in it.
        """
        weights = jnp.expand_dims(self.weights, tuple(range(1, values.ndim)))
        sums = jnp.sum(weights * values, axis=0), jnp.sum(self.weights)
        value, weight = all_sum(sums, self.axis_name)
        return value / jnp.maximum(weight, 1.0)


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """A key for each example, the same on any number of devices: [b] of ``index: [b]``."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


class Clusters(NamedTuple):
    """What a method knows of its clusters, equal on every device.

    Attributes:
      centroids: [k, p] float32.
    """

    centroids: jax.Array


class Assigned(NamedTuple):
    """The bank as the clusters see it.

    Attributes:
      labels: [n] int32, of the local rows.
      distances: [n] float32, squared, to the centroid of the label.
      counts: [k] float32, examples of each cluster on all devices.
      inertia: [] float32, the sum of distances over all examples.
      n_relocated: [] int32, empty clusters that were moved.
    """

    labels: jax.Array
    distances: jax.Array
    counts: jax.Array
    inertia: jax.Array
    n_relocated: jax.Array


class Method(NamedTuple):
    """A deep clustering method.

    Attributes:
      initialize: ``(key, bank, weights, index) -> (clusters, assigned)``; bank [n, p] local.
      objective: ``(network, clusters, batch) -> (embeddings [b, p], terms {name: [b]})``; the loss
        of an example is the sum of its terms.
      update: ``(key, clusters, bank, weights, index, n_iterations) -> (clusters, assigned)``;
        with n_iterations = 0 the clusters stay and the bank is assigned.
    """

    initialize: Callable
    objective: Callable
    update: Callable
