"""The programs of an epoch, compiled ahead of time, and waiting for them with an open ear."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jkmeans.configuration import Config
from jkmeans.datasets import Dataset
from jkmeans.epoch import CLUSTER_SIZES, Programs, axis_of, make_programs
from jkmeans.interruption import Interruption, listen_until_ready
from jkmeans.methods import Method, make_method
from jkmeans.networks import Blueprint, blueprint
from jkmeans.recently_made import RecentlyMade, kind_of_programs
from jkmeans.recorder import Recorder
from jkmeans.sharding import Layout


class Prepared(NamedTuple):
    """What runs have in common that differ in their seeds, examples and folders only.

    Attributes:
      method: the clustering method.
      blueprint: of the network.
      programs: traced anew for each shape.
      compiled: of them, what has been needed so far, for `Compiled`.
    """

    method: Method
    blueprint: Blueprint
    programs: Programs
    compiled: dict[tuple, Callable]


recently_prepared: RecentlyMade[Prepared] = RecentlyMade(8)


def prepare(config: Config, dataset: Dataset, layout: Layout, mesh: Mesh) -> Prepared:
    """The programs of a run, or of ``config.n_seeds`` side by side; see `make_programs`.

    A process remembers the last few, so that a second run of the same kind compiles nothing; see
    `kind_of_programs`.

    Args:
      config: validated.
      dataset: of which the shape and scale of the examples are looked at.
      layout: how the examples lie on the mesh.
      mesh: of the data axis.
    """

    def make() -> Prepared:
        own = config.copy_and_resolve_references()  # Programs look at it whenever they are traced.
        shape, axis = dataset.example_shape, axis_of(layout, mesh)
        method = make_method(own, axis)
        plan = blueprint(own.network, shape, own.training.pretrain_precision)
        programs = make_programs(own, plan, method, layout, mesh, shape, dataset.scale)
        return Prepared(method, plan, programs, {})

    kind = kind_of_programs(config, tuple(dataset.example_shape), dataset.scale, layout, mesh)
    return recently_prepared.get(kind, make)


class Compiled:
    """Calls programs, each compiled before its first call, so that this is timed like the others.

    Attributes:
      seconds: spent compiling, since whoever reads it has set it to 0.
    """

    def __init__(self, prepared: Prepared):
        self.seconds = 0.0
        self._programs = prepared.programs
        self._compiled = prepared.compiled

    def __call__(self, name: str, *arguments: Any, **static: Any) -> Any:
        """What a program returns.

        Args:
          name: of a field of `Programs`.
          *arguments: pytrees of arrays.
          **static: what the program is compiled for.
        """
        leaves, structure = jax.tree.flatten(arguments)
        kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (name, structure, kinds, tuple(static.items()))
        if key not in self._compiled:
            started = time.perf_counter()
            lowered = getattr(self._programs, name).lower(*arguments, **static)
            self._compiled[key] = lowered.compile()
            self.seconds += time.perf_counter() - started
        return self._compiled[key](*arguments)


def await_devices(
    values: Any, recorder: Recorder, interruption: Interruption, fraction: float | None = None
) -> None:
    """Waits for the devices with an open ear for signals, which a blocking call has not.

    Args:
      values: arrays to wait for.
      recorder: told that something is waited for.
      interruption: announced to the user as soon as it comes.
      fraction: of the epoch that is done; None where that is not known.
    """
    leaves = jax.tree.leaves(values)
    listen_until_ready(
        leaves,
        interruption,
        lambda: recorder.say("stopping at the next safe place; once more to stop at once"),
        lambda: recorder.waiting(fraction),
    )
    jax.block_until_ready(leaves)


def scalars(values: Mapping[str, jax.Array]) -> dict[str, float]:
    """The metrics of a program that are numbers."""
    return {name: float(value) for name, value in values.items() if name != CLUSTER_SIZES}
