"""The programs of an epoch, compiled ahead of time, and waiting for them with an open ear."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jkmeans.epoch import CLUSTER_SIZES, Programs
from jkmeans.interruption import Interruption
from jkmeans.recorder import Recorder


class Compiled:
    """Calls programs, each compiled before its first call, so that this is timed like the others.

    Attributes:
      seconds: spent compiling, since whoever reads it has set it to 0.
    """

    def __init__(self, programs: Programs):
        self.seconds = 0.0
        self._programs = programs
        self._compiled: dict[tuple, Callable] = {}

    def __call__(self, name: str, *arguments: Any, **static: Any) -> Any:
        """What a program returns.

        Args:
          name: of a field of `Programs`.
          *arguments: pytrees of arrays.
          **static: what the program is compiled for.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        key = (name, shapes, tuple(static.items()))
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
    pause = 0.0005
    while not all(leaf.is_ready() for leaf in leaves):
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        if pause == 0.05:
            recorder.waiting(fraction)
        if interruption.announced():
            recorder.say("stopping at the next safe place; once more to stop at once")
    jax.block_until_ready(leaves)


def scalars(values: Mapping[str, jax.Array]) -> dict[str, float]:
    """The metrics of a program that are numbers."""
    return {name: float(value) for name, value in values.items() if name != CLUSTER_SIZES}
