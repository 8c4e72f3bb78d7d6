"""VaDE: variational deep embedding, an autoencoder whose prior is a mixture of Gaussians.

With the prior p(c) = π_c, p(z|c) = N(z; μ_c, diag σ_c²), the decoder p(x|z) = Π_d Bernoulli(x_d;
g_d(z)) and the encoder q(z|x) = N(z; μ̃(x), diag σ̃²(x)), the objective of an example is the
negative evidence lower bound per pixel, with one sample z = μ̃ + σ̃ ε,

    (1/d) · { − log p(x|z)  +  ½ Σ_c γ_c Σ_j [ log σ²_cj + (σ̃²_j + (μ̃_j − μ_cj)²) / σ²_cj ]
              − Σ_c γ_c log(π_c / γ_c)  −  ½ Σ_j (1 + log σ̃²_j) },     γ_c = p(c|z) (eq. 16)

or, with ``likelihood = "gaussian"``, p(x|z) = N(x; g(z), pixel_variance · I), as the paper has it
for data that are not binary; its constant is left out. Mixture and network learn by gradient, the
mixture at ``mixture_rate_factor`` times the rate of the network (the authors' program has a rate
for each: the same on MNIST, a hundredth on HAR). While pretraining, the objective is − log p(x|z)
alone, of the mean z = μ̃(x): the cross-entropy, or the squared error that other methods are
pretrained by. The cluster of an example is the most probable at z = μ̃(x).

The mixture begins as k-means on the pretrained embeddings: as the mixture whose clusters are those
of k-means (equal weights, one variance), or as the diagonal mixture that ``em_iterations`` of
expectation and maximisation make of it.

The bound holds for any γ, and is tightest for that of eq. 16. With ``responsibilities = "stored"``
γ is p(c|z) at the embedding z of the example in the bank, which is refreshed after every epoch,
and no gradient goes through it: all views that the network sees of an example are pulled to the
clusters of the example, and what a step does to an embedding does not at once move it to another
cluster.

The network must be ``variational`` (see `jkmeans.networks`). With Bernoulli pixels these are in 0
to 1, and decode(z) holds their logits.

Source: Jiang, Zheng, Tan, Tang and Zhou 2017, "Variational deep embedding", eqs. 11 to 16.
Deviations: responsibilities that are stored and the start without EM; the whole is divided by the
number of pixels, so that learning rates compare with those of the other methods (Adam does not feel
it); weights are the softmax of logits and variances the exponential of logarithms, where the
authors clip; pretraining is end to end.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jkmeans import kmeans
from jkmeans.errors import UserError
from jkmeans.fields import choice, integer, number
from jkmeans.kmeans.collectives import AxisName, all_sum
from jkmeans.methods.base import (
    RECONSTRUCTION,
    Batch,
    Method,
    MethodSpec,
    assign_by,
    check_bank_of_examples,
    check_pretraining,
    example_keys,
    first_kmeans,
    mean_terms,
    only_assign,
    reconstruction_error,
)

_LEAST_VARIANCE = 1e-6


_ROUNDING = 1e-5  # By which values of 0 to 1 can be off once they are scaled.


class Mixture(NamedTuple):
    """A mixture of Gaussians with diagonal covariance, all of it learned.

    Attributes:
      centroids: [k, p] float32, the means μ.
      log_variances: [k, p] float32, log σ².
      logits: [k] float32; their softmax is π.
    """

    centroids: jax.Array
    log_variances: jax.Array
    logits: jax.Array


def log_joint(z: jax.Array, mixture: Mixture) -> jax.Array:
    """Log π_c + log N(z; μ_c, σ_c²): [b, k] of z [b, p]."""
    precisions = jnp.exp(-mixture.log_variances)
    # Σ_j (z_j − μ_cj)² / σ²_cj as three products, around a point amid the means.
    middle = jax.lax.stop_gradient(jnp.mean(mixture.centroids, axis=0, keepdims=True))
    z, means = z - middle, mixture.centroids - middle
    highest = jax.lax.Precision.HIGHEST
    squared = (
        jnp.dot(z * z, precisions.T, precision=highest)
        - 2.0 * jnp.dot(z, (means * precisions).T, precision=highest)
        + jnp.sum(means * means * precisions, axis=1)[None, :]
    )
    constant = jnp.sum(mixture.log_variances, axis=1) + z.shape[1] * math.log(2 * math.pi)
    log_weights = jax.nn.log_softmax(mixture.logits)
    return log_weights[None, :] - 0.5 * (constant[None, :] + squared)


def log_responsibilities(z: jax.Array, mixture: Mixture) -> jax.Array:
    """Log γ_c = log p(c|z): [b, k]."""
    return jax.nn.log_softmax(log_joint(z, mixture), axis=-1)


def cross_entropy(logits: jax.Array, x: jax.Array) -> jax.Array:
    """− log p(x|z) of Bernoulli pixels, their mean for each example, in nats: [b]."""
    losses = jax.nn.softplus(logits) - x * logits
    return jnp.mean(losses.reshape(losses.shape[0], -1), axis=-1)


def divergence(mean, log_variance, log_gamma, mixture: Mixture) -> jax.Array:
    """The bound without its reconstruction, in nats, of each example: [b].

    Args:
      mean: [b, p], of q(z|x).
      log_variance: [b, p], of q(z|x).
      log_gamma: [b, k], log q(c|x).
      mixture: the prior.
    """
    gamma = jnp.exp(log_gamma)
    precisions = jnp.exp(-mixture.log_variances)
    squared = (mean[:, None, :] - mixture.centroids[None, :, :]) ** 2
    spread = (jnp.exp(log_variance)[:, None, :] + squared) * precisions[None, :, :]
    of_cluster = jnp.sum(mixture.log_variances[None, :, :] + spread, axis=-1)
    log_weights = jax.nn.log_softmax(mixture.logits)
    prior = 0.5 * jnp.sum(gamma * of_cluster, axis=-1)
    choice = jnp.sum(gamma * (log_gamma - log_weights[None, :]), axis=-1)
    return prior + choice - 0.5 * jnp.sum(1.0 + log_variance, axis=-1)


def objective(
    network,
    mixture: Mixture,
    batch: Batch,
    pixel_variance: float | None = None,
    *,
    stored: bool = False,
):
    """The terms of the module's formula; the reconstruction alone while pretraining.

    Args:
      network: with ``encode_distribution`` and ``decode``.
      mixture: the prior.
      batch: of a step.
      pixel_variance: of Gaussian pixels; None for Bernoulli ones.
      stored: whether γ is of the stored embedding, and not of the sample.
    """
    noise_of = example_keys(batch.key, batch.index)
    if stored:
        of_stored = jax.lax.stop_gradient(log_responsibilities(batch.stored, mixture))

    def reconstruction(z: jax.Array) -> jax.Array:
        if pixel_variance is None:
            return cross_entropy(network.decode(z), batch.x)
        error = reconstruction_error(network, z, batch.x)
        return error / (2.0 * pixel_variance) if batch.clustering else error

    def terms_of(seen, number: int):
        mean, log_variance = network.encode_distribution(seen)
        if not batch.clustering:
            return mean, {"reconstruction": reconstruction(mean)}
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(noise_of, number)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        log_gamma = of_stored if stored else log_responsibilities(z, mixture)
        n_pixels = math.prod(batch.x.shape[1:])
        return mean, {
            "reconstruction": reconstruction(z),
            "divergence": divergence(mean, log_variance, log_gamma, mixture) / n_pixels,
        }

    found = [terms_of(seen, number) for number, seen in enumerate(batch.inputs)]
    return found[0][0], mean_terms([terms for _, terms in found])


def maximize(bank, weights, gamma, axis_name: AxisName) -> Mixture:
    """The mixture of greatest likelihood for responsibilities gamma [n, k] of the local rows."""
    gamma = gamma * weights[:, None]
    counts = all_sum(jnp.sum(gamma, axis=0), axis_name)
    n_each = jnp.maximum(counts, 1e-6)[:, None]
    highest = jax.lax.Precision.HIGHEST  # A variance is a difference of two of these.
    means = all_sum(jnp.dot(gamma.T, bank, precision=highest), axis_name) / n_each
    # Around one point for all clusters, whose distance from the means is of the size of the data.
    middle = jnp.mean(means, axis=0, keepdims=True)
    squares = jnp.dot(gamma.T, (bank - middle) ** 2, precision=highest)
    squares = all_sum(squares, axis_name) / n_each
    variances = jnp.maximum(squares - (means - middle) ** 2, _LEAST_VARIANCE)
    return Mixture(means, jnp.log(variances), jnp.log(jnp.maximum(counts, 1e-6)))


def mixture_of_kmeans(result: kmeans.KMeansResult) -> Mixture:
    """The mixture whose clusters are those of k-means: equal weights, one variance for all.

    It is the mean square of what a number of an embedding lies from that of its centroid.
    """
    k, p = result.centroids.shape
    variance = result.inertia / (jnp.sum(result.counts) * p)
    log_variance = jnp.log(jnp.maximum(variance, _LEAST_VARIANCE))
    return Mixture(result.centroids, jnp.full((k, p), log_variance), jnp.zeros((k,)))


def vade(config, axis_name: AxisName) -> Method:
    """VaDE as a `Method`.

    Args:
      config: a whole, validated config; ``centroids`` is of the k-means at the start.
      axis_name: mesh axis of the examples.
    """
    first = first_kmeans(config, axis_name)
    gaussian = config.objective.likelihood == "gaussian"
    variance = config.objective.pixel_variance if gaussian else None
    stored = config.objective.responsibilities == "stored"

    def initialize(key, bank, weights, index):
        result = first(key, bank, weights, index)
        if not config.objective.em_iterations:
            mixture = mixture_of_kmeans(result)
            return mixture, assign_by(predict, mixture, bank, weights, axis_name)
        hard = jax.nn.one_hot(result.labels, config.n_clusters, dtype=jnp.float32)
        mixture = maximize(bank, weights, hard, axis_name)

        def improve(_, mixture):
            gamma = jnp.exp(log_responsibilities(bank, mixture))
            return maximize(bank, weights, gamma, axis_name)

        mixture = jax.lax.fori_loop(0, config.objective.em_iterations, improve, mixture)
        return mixture, assign_by(predict, mixture, bank, weights, axis_name)

    def blank(k: int, p: int, n: int) -> Mixture:
        del n
        zeros = jnp.zeros((k, p), jnp.float32)
        return Mixture(zeros, zeros, jnp.zeros((k,), jnp.float32))

    return Method(
        initialize,
        functools.partial(objective, pixel_variance=variance, stored=stored),
        only_assign(predict, axis_name),
        blank,
        predict,
        learned=Mixture._fields,
        learned_rate_factor=config.objective.mixture_rate_factor,
    )


def predict(mixture: Mixture, embeddings: jax.Array) -> kmeans.Assignment:
    """The most probable component of each embedding, and the distance to its mean."""
    labels = jnp.argmax(log_joint(embeddings, mixture), axis=-1).astype(jnp.int32)
    return kmeans.Assignment(
        labels, kmeans.squared_distances(embeddings, mixture.centroids, labels)
    )


def _check(values: Mapping[str, Any]) -> None:
    check_pretraining(values)
    if values["network.name"] != "variational" and ":" not in values["network.name"]:
        raise UserError(
            f"config.network.name is {values['network.name']!r}, but vade needs the variance of "
            "embeddings; accepted: 'variational' or 'module:function' with encode_distribution"
        )
    if values["network.normalize"]:
        raise UserError(
            "config.network.normalize is True, but the embeddings of vade are Gaussian; "
            "accepted: False"
        )
    if values["objective.responsibilities"] == "stored":
        check_bank_of_examples(values, "responsibilities")


def _check_data(config: Any, dataset: Any, part: tuple[int, int]) -> None:
    """Refuses values that no Bernoulli distribution can have: the bound would have no end."""
    if config.objective.likelihood != "bernoulli":
        return
    low, high = dataset.value_range(part)
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise UserError(
            "config.objective.likelihood is 'bernoulli', but the values of the examples go from "
            f"{low:.4g} to {high:.4g}; accepted: values from 0 to 1, or 'gaussian'"
        )


def _pretraining(options: Any) -> str:
    gaussian = options.likelihood == "gaussian"
    return RECONSTRUCTION if gaussian else "cross-entropy"


SPEC = MethodSpec(
    vade,
    {
        "em_iterations": integer(0, "of the diagonal mixture at the start; 0 for that of k-means"),
        "responsibilities": choice(("sample", "stored"), "γ of an example in a step"),
        "mixture_rate_factor": number("the mixture's learning rate is the network's times this"),
        "likelihood": choice(("bernoulli", "gaussian"), "of a pixel"),
        "pixel_variance": number("of a gaussian pixel", positive=True),
    },
    _check,
    "Jiang et al. 2017, Variational deep embedding",
    {
        "objective.em_iterations": 20,
        "objective.responsibilities": "sample",
        "objective.mixture_rate_factor": 1.0,
        "objective.likelihood": "bernoulli",
        "objective.pixel_variance": 0.1,
        "network.name": "variational",
        "network.normalize": False,
    },
    check_data=_check_data,
    pretraining=_pretraining,
)
