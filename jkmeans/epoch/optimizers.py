"""The optimizers of pretraining and clustering, what they remember, and the rates of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": lambda options: optax.scale_by_adam(),
    "adamw": lambda options: optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(options.weight_decay)
    ),
    "sgd": lambda options: optax.trace(decay=0.9),
}


class Optimizers:
    """The optimizers of both phases, as one.

    Where they are the same, so is their state, and clustering may go on with the moments of
    pretraining. Where they differ, the state is a pair, of which a phase changes its own.
    """

    def __init__(self, options):
        """Of ``config.training``."""
        names = (options.optimizer, options.clustering_optimizer)
        self._of_phase = [OPTIMIZERS[name](options) for name in names]
        self._same = names[0] == names[1]

    def init(self, variables):
        """The state before the first step of a phase."""
        if self._same:
            return self._of_phase[0].init(variables)
        return tuple(optimizer.init(variables) for optimizer in self._of_phase)

    def update(self, gradients, state, variables, *, clustering: bool) -> tuple[Any, Any]:
        """What a rate of 1 would subtract from the variables, and the next state."""
        phase = int(clustering)
        if self._same:
            return self._of_phase[0].update(gradients, state, variables)
        updates, changed = self._of_phase[phase].update(gradients, state[phase], variables)
        return updates, (changed, state[1]) if phase == 0 else (state[0], changed)


def learning_rate(options, clustering: bool, epoch, step, n_steps: int) -> jax.Array:
    """The rate of a step: constant, or a half cosine to zero over each phase.

    Args:
      options: ``config.training``.
      clustering: the phase.
      epoch: [] int32, epochs finished in this phase.
      step: [] int32, steps finished in this epoch.
      n_steps: steps of an epoch.
    """
    base = options.clustering_learning_rate if clustering else options.learning_rate
    schedule = options.clustering_schedule if clustering else options.schedule
    if schedule == "constant":
        return jnp.float32(base)
    n_epochs = options.n_epochs if clustering else options.n_pretrain_epochs
    done = (epoch + step / n_steps) / max(n_epochs, 1)
    return base * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(done, 1.0)))


def with_leaves_of(old, new, names):
    """A state of the optimizer with the old moments of the parameters ``names``."""

    def choose(path, before, after):
        rests = any(getattr(key, "key", None) in names for key in path)
        return before if rests else after

    return jax.tree_util.tree_map_with_path(choose, old, new) if names else new


def forget_clusters(optimizer_state):
    """The state of the optimizer with zeros for the moments of what clusters learn."""

    def forget(path, leaf):
        of_clusters = any(getattr(key, "key", None) == "clusters" for key in path)
        return jnp.zeros_like(leaf) if of_clusters else leaf

    return jax.tree_util.tree_map_with_path(forget, optimizer_state)
