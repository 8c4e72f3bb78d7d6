"""The contract of a deep clustering method: what a factory in this folder returns.

A method is a small tuple of pure functions. When they are called is the trainer's business
(`jkmeans.training`): ``initialize`` once, on the bank of all embeddings, at the end of
pretraining; ``objective`` and ``after_step`` in every step; ``update`` after every epoch, on the
bank; ``predict`` for whoever has embeddings and wants clusters. All of them run inside
``shard_map``: their examples are the local ones, their clusters the same everywhere.

A user's own objective is a function ``objective(network, clusters, batch) -> (embeddings, terms)``
named in the config as ``module:function``. It sees the examples of one device, returns one value
per example for every term, and never sums over examples: the trainer weights, sums and averages
over the batch and over all devices, so the same text is right on one CPU and on a cluster. What
must be averaged over the whole batch inside the objective goes through ``batch.mean``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jkmeans import kmeans
from jkmeans.augmentation import VIEWS
from jkmeans.errors import UserError
from jkmeans.fields import Field, choice
from jkmeans.kmeans.collectives import AxisName, all_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The examples that one device has in one step.

    Attributes:
      x: [b, *example_shape] float32, scaled.
      view: [b, *example_shape] float32, a random view of each example, for the network to see;
        x itself without augmentation, or while pretraining where that is to see no views.
      other_view: [b, *example_shape] float32, a second view, drawn independently.
      stored: [b, p] float32, the embedding of each example in the bank: as it was at the last
        re-computation where the bank is refreshed then.
      weights: [b] float32; 1 for an example, 0 for padding.
      labels: [b] int32, the cluster of each example at the last re-computation; −1 before the
        first.
      index: [b] int32, the number of the example in the data set; −1 for padding.
      key: random key of the step, the same on every device; ``example_keys(key, index)`` makes
        one for each example.
      progress: [] float32, epochs since clustering began (fractions within an epoch).
      clustering: False while the network is pretrained and the clusters mean nothing; static.
      invariance: whether the network is to see examples and views; static.
      axis_name: mesh axis of the examples; static.
    """

    x: jax.Array
    view: jax.Array
    other_view: jax.Array
    stored: jax.Array
    weights: jax.Array
    labels: jax.Array
    index: jax.Array
    key: jax.Array
    progress: jax.Array
    clustering: bool = dataclasses.field(metadata={"static": True})
    invariance: bool = dataclasses.field(default=False, metadata={"static": True})
    axis_name: AxisName = dataclasses.field(default=None, metadata={"static": True})

    @property
    def inputs(self) -> tuple[jax.Array, ...]:
        """What the network is to see: the views, or the examples and their views."""
        return (self.x, self.view) if self.invariance and self.clustering else (self.view,)

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


def nearest_centroid(clusters, embeddings: jax.Array) -> kmeans.Assignment:
    """The nearest centroid of each embedding, and the squared distance to it."""
    return kmeans.assign(embeddings, clusters.centroids)


ASSIGNMENT = choice(("nearest", "stored"), "of an example in a step")
"""The field of a method that asks for the cluster of an example; see `distances_of`."""


def distances_of(z: jax.Array, centroids: jax.Array, batch: Batch, assignment: str) -> jax.Array:
    """Squared distances [b] of embeddings [b, p] to the centroids of their clusters.

    Args:
      z: of the examples of the batch, or of views of them.
      centroids: [k, p].
      batch: has the clusters of the last re-computation.
      assignment: "nearest" for the nearest centroid, "stored" for that of the last re-computation.
    """
    if assignment == "nearest":
        return kmeans.assign(z, centroids).distances
    return kmeans.squared_distances(z, centroids, batch.labels)


class Method(NamedTuple):
    """A deep clustering method.

    Attributes:
      initialize: ``(key, bank, weights, index) -> (clusters, assigned)``; bank [n, p] local. Fields
        of ``blank`` that the clusters do not have stay as they are.
      objective: ``(network, clusters, batch) -> (embeddings [b, p], terms {name: [b]})``; the loss
        of an example is the sum of its terms.
      update: ``(key, clusters, bank, weights, index, n_iterations) -> (clusters, assigned)``;
        with n_iterations = 0 the clusters stay and the bank is assigned.
      blank: ``(k, p, n) -> clusters`` of the right shapes and types, before there are any; n is the
        number of examples.
      predict: ``(clusters, embeddings [b, p]) -> (labels [b] int32, squared distances [b] to the
        centroid of the label)``.
      learned: names of the fields of the clusters that the optimizer changes, by the gradient of
        the objective, as it changes the network.
      learned_rate_factor: their learning rate is that of the network times this.
      after_step: ``(clusters, embeddings [b, p], batch) -> clusters`` after each step, or None.
      on_host: ``(embeddings [n, p], seed) -> (clusters, labels [n])`` of NumPy arrays, the last
        thing of a run, or None.
      warmup_epochs: epochs of clustering before losses of different epochs compare.
      decodes: whether clustering uses the decoder; where it does not, the decoder stays as it is.
      fresh_optimizer: whether clustering begins without the optimizer's memory of pretraining, as
        the reference programs of most methods do. Adam's first steps are then of full length in
        every direction, which at the rate of pretraining undoes part of it. A method that goes on
        with that memory learns nothing of its clusters, and pretrains its network itself.
    """

    initialize: Callable
    objective: Callable
    update: Callable
    blank: Callable = lambda k, p, n: Clusters(jnp.zeros((k, p), jnp.float32))
    predict: Callable = nearest_centroid
    learned: tuple[str, ...] = ()
    learned_rate_factor: float = 1.0
    after_step: Callable | None = None
    on_host: Callable | None = None
    warmup_epochs: float = 0.0
    decodes: bool = True
    fresh_optimizer: bool = True


RECONSTRUCTION = "reconstruction"
"""The pretraining of most methods: the squared error of an autoencoder."""


class MethodSpec(NamedTuple):
    """A method as configs know it.

    Attributes:
      make: ``(config, axis_name) -> Method``.
      fields: what ``config.objective`` holds besides its name.
      check: ``(values by full name)``; raises UserError where fields contradict each other.
      source: the paper.
      settings: what a config of this method says, by full names: its own fields as in the paper,
        and what it cannot do without. See `jkmeans.methods.with_method`.
      check_data: ``(config, dataset, part)``; raises UserError where the method cannot be of such a
        `jkmeans.datasets.Dataset`, of which it reads part i of m where part is (i, m).
      pretraining: ``(config.objective) -> str``, what the network learns before there are clusters;
        methods of the same pretraining can share a network.
    """

    make: Callable[[Any, AxisName], Method]
    fields: Mapping[str, Field]
    check: Callable[[Mapping[str, Any]], None]
    source: str
    settings: Mapping[str, Any]
    check_data: Callable[[Any, Any, tuple[int, int]], None] = lambda config, dataset, part: None
    pretraining: Callable[[Any], str] = lambda options: RECONSTRUCTION


def check_pretraining(values: Mapping[str, Any]) -> None:
    """Refuses a reconstruction without a decoder.

    Raises:
      UserError: naming the field.
    """
    if not values["network.decoder"]:
        raise UserError(
            f"config.network.decoder is False, but {values['objective.name']} has a "
            "reconstruction; accepted: True"
        )


def check_bank_of_examples(values: Mapping[str, Any], what: str) -> None:
    """Refuses a bank of views, where what is made from it is to be of the examples themselves.

    Args:
      values: by full name.
      what: is made from the bank, a noun in the plural.

    Raises:
      UserError: naming the field.
    """
    views = any(values[f"augmentation.{view}"] for view in VIEWS)
    if values["centroids.bank"] == "stored" and views:
        raise UserError(
            f"config.centroids.bank is 'stored', but the {what} of {values['objective.name']} are "
            "of the examples, not of the views that the augmentation shows the network; "
            "accepted: 'refreshed'"
        )


def first_kmeans(config, axis_name: AxisName) -> Callable:
    """K-means on the bank, as ``config.centroids`` asks: ``(key, bank, weights, index)``.

    Returns:
      A function to `KMeansResult`.
    """
    options = config.centroids

    def fit(key, bank, weights, index) -> kmeans.KMeansResult:
        return kmeans.fit(
            key,
            bank,
            config.n_clusters,
            init=options.init,
            n_init=options.n_init,
            max_iter=options.init_max_iter,
            empty=options.empty,
            weights=weights,
            index=index,
            algorithm=lloyd_algorithm(config),
            axis_name=axis_name,
        )

    return fit


def lloyd_algorithm(config) -> str:
    """What `kmeans.lloyd` is to use: bounds are not made for a ``vmap`` over seeds."""
    return "auto" if config.n_seeds == 1 else "lloyd"


def assign_by(predict: Callable, clusters, bank, weights, axis_name: AxisName) -> Assigned:
    """The bank as ``predict`` assigns it; see `Method`."""
    labels, distances = predict(clusters, bank)
    found = kmeans.cluster_statistics(
        bank,
        labels,
        clusters.centroids.shape[0],
        weights=weights,
        distances=distances,
        axis_name=axis_name,
    )
    none = jnp.zeros_like(found.counts[0], jnp.int32)
    return Assigned(labels, distances, found.counts, found.inertia, none)


def only_assign(predict: Callable, axis_name: AxisName) -> Callable:
    """The ``update`` of a method whose steps learn its clusters; see `Method`."""

    def update(key, clusters, bank, weights, index, n_iterations):
        del key, index, n_iterations
        return clusters, assign_by(predict, clusters, bank, weights, axis_name)

    return update


def assigned(result: kmeans.KMeansResult) -> Assigned:
    """What k-means says of the bank."""
    return Assigned(
        result.labels, result.distances, result.counts, result.inertia, result.n_relocated
    )


def reconstruction_error(network, z: jax.Array, x: jax.Array) -> jax.Array:
    """‖x − g(z)‖² / d of each example: [b]."""
    error = (x - network.decode(z)).reshape(z.shape[0], -1)
    return jnp.mean(error * error, axis=-1)


def all_squared_distances(z: jax.Array, centroids: jax.Array) -> jax.Array:
    """‖z_i − c_k‖² of all pairs: [b, k]; differentiable with respect to both."""
    middle = jax.lax.stop_gradient(jnp.mean(centroids, axis=0, keepdims=True))
    z, centroids = z - middle, centroids - middle
    products = jnp.dot(z, centroids.T, precision=jax.lax.Precision.HIGHEST)
    squared = (
        jnp.sum(z * z, axis=-1, keepdims=True)
        - 2 * products
        + jnp.sum(centroids * centroids, axis=-1)[None, :]
    )
    return jnp.maximum(squared, 0.0)


def mean_terms(terms: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The mean of each term over what the network saw of an example."""
    if len(terms) == 1:
        return terms[0]
    return {name: jnp.mean(jnp.stack([one[name] for one in terms]), axis=0) for name in terms[0]}
