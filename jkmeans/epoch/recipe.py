"""What a run is made of, that no step of it changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jkmeans.augmentation import VIEWS, affine_views
from jkmeans.epoch.optimizers import Optimizers
from jkmeans.epoch.state import COUNT
from jkmeans.errors import UserError
from jkmeans.methods import Batch, Method, example_keys
from jkmeans.networks import Blueprint, Parameters, merge, network_input
from jkmeans.sharding import DATA_AXIS, Layout


def axis_of(layout: Layout, mesh: Mesh) -> str | None:
    """The mesh axis of the examples; None where every device has all of them."""
    return DATA_AXIS if layout.n_devices == mesh.size else None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parts of a run, and what follows from them alone.

    Attributes:
      config: validated; ``training``, ``centroids``, ``network``, ``augmentation`` and ``reset``
        are read.
      blueprint: of the network.
      method: the clustering method.
      layout: how the examples lie on the mesh.
      axis: the mesh axis of the examples; None where every device has all of them.
      example_shape: shape of one example.
      scale: examples are multiplied by it after their conversion to float32.
      optimizers: of both phases.
    """

    config: Any
    blueprint: Blueprint
    method: Method
    layout: Layout
    axis: str | None
    example_shape: tuple[int, ...]
    scale: float
    optimizers: Optimizers

    def input_of(self, examples: jax.Array) -> jax.Array:
        """What the network sees of examples [b, *example_shape] of their native type."""
        return network_input(examples, self.scale)

    def view_of(self, x: jax.Array, key: jax.Array, index: jax.Array, clustering: bool):
        """Random views of network inputs; the inputs themselves in a phase that sees none."""
        options = self.config.augmentation
        seen = clustering or options.pretraining
        if not (seen and any(options[view] for view in VIEWS)):
            return x
        return affine_views(
            example_keys(key, index),
            x,
            shift=options.shift,
            rotation=options.rotation,
            zoom=options.zoom,
        )

    def embed(self, parameters: Parameters, examples: jax.Array) -> jax.Array:
        """The embeddings [b, p] of examples of their native type."""
        return merge(self.blueprint.graphdef, parameters).encode(self.input_of(examples))

    def objective(self, parameters: Parameters, clusters: Any, batch: Batch):
        """The embeddings of a batch and its loss terms, one value per example."""
        blueprint = self.blueprint
        graphdef = blueprint.graphdef if batch.clustering else blueprint.pretraining
        return self.method.objective(merge(graphdef, parameters), clusters, batch)

    def learned(self, parameters: Parameters, clusters: Any) -> dict[str, Any]:
        """What the optimizer changes: the network and what the method learns of its clusters."""
        of_clusters = {name: getattr(clusters, name) for name in self.method.learned}
        return {"network": parameters, "clusters": of_clusters}

    def resting(self, parameters: Parameters, clustering: bool) -> Parameters:
        """The parameters that have no part in a phase: their gradients and moments stay 0."""
        if clustering:
            starts = () if self.method.decodes else self.blueprint.decoder_layers
        else:
            # A method that does not begin anew with clustering pretrains its network its own way.
            starts = self.blueprint.unpretrained_layers if self.method.fresh_optimizer else ()
        return {k: v for k, v in parameters.items() if k.startswith(starts)}

    def term_names(self, parameters: Parameters, clusters: Any, clustering: bool) -> set[str]:
        """The loss terms that the objective returns in a phase, found by abstract evaluation.

        Raises:
          UserError: what it returns is not what `jkmeans.methods.base` asks for.
        """
        rows = 3
        x = jnp.zeros((rows, *self.example_shape), jnp.float32)
        batch = Batch(
            x=x,
            view=x,
            other_view=x,
            stored=jnp.zeros((rows, clusters.centroids.shape[1]), jnp.float32),
            weights=jnp.ones((rows,), jnp.float32),
            labels=jnp.zeros((rows,), jnp.int32),
            index=jnp.arange(rows, dtype=jnp.int32),
            key=jax.random.key(0),
            progress=jnp.float32(0),
            clustering=clustering,
        )
        returned = jax.eval_shape(self.objective, parameters, clusters, batch)
        _check_returned(returned, rows, clusters.centroids.shape[1])
        return set(returned[1])


def _check_returned(returned: Any, rows: int, p: int) -> None:
    """Refuses what an objective must not return of so many rows and embeddings of p numbers.

    Raises:
      UserError: it is no pair, or a part of it has another shape or name.
    """
    where = f"objective.name: the objective, given {rows} examples, returns"
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise UserError(
            f"{where} {type(returned).__name__}; accepted: a pair of embeddings and a dict of terms"
        )
    embeddings, terms = returned
    if getattr(embeddings, "shape", None) != (rows, p):
        raise UserError(
            f"{where} embeddings of shape {list(getattr(embeddings, 'shape', ()))}; accepted: "
            f"{[rows, p]}"
        )
    for name, values in terms.items():
        if not isinstance(name, str) or name == COUNT:
            raise UserError(f"{where} a term named {name!r}; accepted: any other text")
        if getattr(values, "shape", None) != (rows,):
            raise UserError(
                f"{where} the term {name!r} of shape {list(getattr(values, 'shape', ()))}; "
                f"accepted: [{rows}], one value for each example"
            )
