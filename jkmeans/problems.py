"""What workers or nodes compute gradients of: a model, a loss, examples; and optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jkmeans import datasets
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.fingerprints import fingerprint_of_rows
from jkmeans.naming import resolve

Tree = Any
"""A pytree of float arrays."""

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
}
"""Optimizers by name: learning rate -> optax transformation."""

_HELD_OUT = 6  # Every sixth example is held out, as in MNIST.


class Problem(NamedTuple):
    """A user's model and loss.

    Attributes:
      init: key -> parameters, a pytree of float arrays.
      loss: (parameters, batch) -> [], the mean over the examples of the batch.
      examples: a pytree of NumPy arrays [n, ...]; a batch is made of some of their rows.
      error: parameters -> [], the number that is drawn, less is better; on examples of its own.
    """

    init: Callable[[jax.Array], Tree]
    loss: Callable[[Tree, Any], jax.Array]
    examples: Any
    error: Callable[[Tree], jax.Array]


def multilayer_perceptron(config: Config) -> Problem:
    """Classification of a data set with labels by a perceptron with hidden layers of ReLUs.

    Parameters are drawn as He et al. (2015) have it. The loss is the cross-entropy, the error the
    share of held-out examples (every sixth) that are classified wrongly.

    Args:
      config: its groups ``data`` and ``problem`` are used.

    Raises:
      UserError: the data set cannot be read, has no labels, or is too small.
    """
    data = datasets.load(config.data.name, n_examples=config.data.n_examples)
    labels = data.labels
    if labels is None:
        raise UserError(f"data set {data.name!r} has no labels; accepted: one that has")
    x = data.examples.reshape(len(data.examples), -1).astype(np.float32) * np.float32(data.scale)
    held_out = np.arange(len(x)) % _HELD_OUT == _HELD_OUT - 1
    if not held_out.any():
        raise UserError(
            f"config.data.n_examples is {len(x)}, of which none is held out; accepted: at least "
            f"{_HELD_OUT}, or 0 for all"
        )
    widths = [x.shape[1], *config.problem.widths, int(labels.max()) + 1]

    def init(key: jax.Array) -> Tree:
        return [
            {
                "kernel": jnp.sqrt(2 / n)
                * jax.random.normal(jax.random.fold_in(key, layer), (n, m)),
                "bias": jnp.zeros(m),
            }
            for layer, (n, m) in enumerate(itertools.pairwise(widths))
        ]

    def logits(parameters: Tree, inputs: jax.Array) -> jax.Array:
        for layer in parameters[:-1]:
            inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"][None, :])
        return inputs @ parameters[-1]["kernel"] + parameters[-1]["bias"][None, :]

    def loss(parameters: Tree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs, classes = batch
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits(parameters, inputs), classes)
        )

    @jax.jit
    def error(parameters: Tree) -> jax.Array:
        found = jnp.argmax(logits(parameters, jnp.asarray(x[held_out])), axis=1)
        return jnp.mean(found != labels[held_out])

    return Problem(init, loss, (x[~held_out], labels[~held_out]), error)


def fingerprint_of_examples(problem: Problem) -> str:
    """Identifies the examples of a problem by their names, shapes, types and bits."""
    leaves = [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(problem.examples)
    ]
    return " ".join(
        f"{name}{list(rows.shape)}{rows.dtype.name}:{fingerprint_of_rows(rows):08x}"
        for name, rows in leaves
    )


PROBLEMS: dict[str, Callable[[Config], Problem]] = {"multilayer_perceptron": multilayer_perceptron}
"""Makers of problems by name: config -> `Problem`."""


def make_problem(config: Config) -> Problem:
    """The problem that a config names, of ours or the user's ``module:function``.

    Raises:
      UserError: there is none of that name, or it returns something else.
    """
    problem = resolve(config.problem.name, PROBLEMS, "config.problem.name")(config)
    if not isinstance(problem, Problem):
        raise UserError(
            f"config.problem.name is {config.problem.name!r}, which returns "
            f"{type(problem).__name__}; accepted: jkmeans.problems.Problem"
        )
    lengths = {len(leaf) for leaf in jax.tree.leaves(problem.examples)}
    if len(lengths) != 1:
        raise UserError(
            f"the examples of {config.problem.name!r} are of {sorted(lengths)} rows; accepted: "
            "arrays with the same number of rows"
        )
    return problem
