"""Stochastic vector quantization: online k-means, one prototype moved by one sample.

Source: Durut, Patra and Rossi, A discussion on parallelization schemes for stochastic vector
quantization algorithms, ESANN 2012 (arXiv 1205.2282), section 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jkmeans.kmeans.assignment import accumulation_dtype
from jkmeans.kmeans.collectives import vary_like
from jkmeans.kmeans.updates import move_towards
from jkmeans.vq.steps import Steps


def quantize(
    prototypes: jax.Array, samples: jax.Array, t: jax.Array | int, steps: Steps
) -> jax.Array:
    """The prototypes after some more samples, taken one after another.

    w(t+1) = w(t) − ε_{t+1} H(z_{t+1}, w(t)), where H(z, w) is w_l − z for the prototype l nearest
    to z and 0 for the others.

    Args:
      prototypes: w(t), [k, d] float.
      samples: z_{t+1} … z_{t+τ}, [tau, d], any real dtype.
      t: [] int, the samples seen before.
      steps: from the number of a sample to ε; see `jkmeans.vq.steps`.

    Returns:
      w(t+τ), [k, d]. Ties go to the lowest index. The same bits alone, under ``vmap`` and inside
      ``shard_map``: no sum depends on how many workers there are.
    """
    dtype = accumulation_dtype(prototypes, samples)
    samples = samples.astype(dtype)
    # Features first, so that sums over them run across prototypes, in vector instructions.
    w_dk = vary_like(prototypes.astype(dtype).T, samples, t)
    numbers = jnp.arange(prototypes.shape[0])

    def step(w_dk: jax.Array, sample: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        z_d, epsilon = sample
        distances = jnp.sum((w_dk - z_d[:, None]) ** 2, axis=0)
        # Two minima, which become vector instructions, as an argmin on a CPU does not.
        closest = jnp.where(distances == jnp.min(distances), numbers, numbers.size)
        rates = jnp.where(numbers == jnp.min(closest), epsilon, 0)
        return move_towards(w_dk, z_d[:, None], rates[None, :]), None

    numbered = jnp.asarray(t) + 1 + jnp.arange(samples.shape[0])
    epsilons = steps(numbered).astype(dtype)
    w_dk, _ = lax.scan(step, w_dk, (samples, epsilons))
    return w_dk.T


def displacement(before: jax.Array, after: jax.Array) -> jax.Array:
    """Δ_{t→t+τ} = w(t) − w(t+τ) = Σ ε H, the paper's sign: what a shared version *loses*.

    Args:
      before: w(t), [k, d].
      after: w(t+τ), [k, d].

    Source: Durut, Patra and Rossi 2012, section 4.
    """
    return before - after
