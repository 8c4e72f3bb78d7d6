"""Programs that are dear to make and were made a moment ago, by the same process."""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import jax

from jkmeans import configuration, processes
from jkmeans.configuration import Config

T = TypeVar("T")

_OF_A_RUN = ("seed", "data.", "report.", "checkpoint.", "training.pretrained_folder")
"""Fields, or their beginnings, that no program depends on."""


def kind_of_programs(config: Config, *more: Hashable) -> Hashable | None:
    """What programs depend on of a config and of JAX's; None where programs are not to be kept.

    That is so with a user's functions, for we cannot know what these depend on, and with several
    processes, which compile together.

    Args:
      config: validated.
      *more: what else they depend on.
    """
    of_jax = getattr(jax.config, "values", None)  # Another JAX may not have it.
    names = (config.objective.name, config.network.name)
    if processes.count() > 1 or any(":" in name for name in names) or of_jax is None:
        return None
    values = configuration.flat(config).items()
    fields = {name: value for name, value in values if not name.startswith(_OF_A_RUN)}
    # As attributes they are those of this thread.
    options = {name: str(getattr(jax.config, name, value)) for name, value in of_jax.items()}
    return (json.dumps([fields, options], sort_keys=True), *more)


class RecentlyMade(Generic[T]):
    """The last few things that were made or asked for, by a key; threads may share it.

    Args:
      most: things that are kept.
    """

    def __init__(self, most: int):
        self._most = most
        self._made: collections.OrderedDict[Hashable, T] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable | None, make: Callable[[], T]) -> T:
        """What was made for this key, or is made now; always now, and not kept, for None."""
        if key is None:
            return make()
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        made = make()  # Two threads may both do so; that is better than that one waits for all.
        with self._lock:
            made = self._made.setdefault(key, made)
            self._made.move_to_end(key)
            while len(self._made) > self._most:
                self._made.popitem(last=False)
        return made

    def forget(self) -> None:
        """Forgets all."""
        with self._lock:
            self._made.clear()
