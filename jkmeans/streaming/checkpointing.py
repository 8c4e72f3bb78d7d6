"""Checkpoints of a fit over a stream: what `jkmeans.checkpoints` needs to know of its state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans import processes
from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.errors import UserError
from jkmeans.streaming.passes import Partial
from jkmeans.streaming.picking import Picked
from jkmeans.telling import remark
from jkmeans.workdir import only_process_in, usable

_FOLDER = "checkpoint_folder"
"""What the user calls the folder."""
_NAMES = {
    "data": "other data",
    "weights": "other weights",
    "n_clusters": "another number of clusters",
    "key": "another key",
    "init": "another initialisation",
}


class FitCheckpoints:
    """The checkpoints of one fit in a folder; a context manager.

    Args:
      folder: where they are.
      options: all that decides the result of the fit, as JSON can hold it.
      seconds: between two of them.
    """

    def __init__(self, folder: Path, options: dict[str, Any], seconds: float):
        # Two: should the newest be damaged, the one before it is used.
        self._checkpoints = Checkpoints(folder, keep=2)
        self._folder = folder
        self._options = options
        self._seconds = seconds
        self._saved_at = time.monotonic()
        self._next = 1
        self.finished = False

    def __enter__(self) -> FitCheckpoints:
        with contextlib.ExitStack() as stack:
            processes.on_first(self._make_folder)
            stack.enter_context(only_process_in(self._folder, _FOLDER))
            stack.enter_context(self._checkpoints)
            self._exit = stack.pop_all()
        return self

    def _make_folder(self) -> None:
        with usable(self._folder, _FOLDER):
            self._folder.mkdir(parents=True, exist_ok=True)

    def __exit__(self, kind, error, trace) -> None:
        self._exit.__exit__(kind, error, trace)

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return processes.share(time.monotonic() - self._saved_at >= self._seconds)

    def wait(self) -> None:
        """Waits until the last one is complete."""
        self._checkpoints.wait()

    def save(self, state: Any, chunk_rows: int) -> None:
        """Starts to write the state of a fit.

        Raises:
          UserError: the disk is full.
        """
        arrays = dict(state.arrays)
        position = None
        if state.partial is not None:
            position = state.partial.position
            arrays |= {"high": state.partial.high, "low": state.partial.low}
            arrays |= {f"picked_{k}": v for k, v in state.partial.picked._asdict().items()}
        record = {
            "options": self._options,
            "chunk_rows": chunk_rows,
            "stage": state.stage,
            "step": state.step,
            "restart": state.restart,
            "numbers": state.numbers,
            "position": position,
            "arrays": {name: [a.dtype.name, [*a.shape]] for name, a in arrays.items()},
        }
        # As bytes: float64 would come back as float32 where JAX does not have it enabled.
        trees = {
            "state": {
                name: np.frombuffer(a.tobytes(), np.uint8) for name, a in arrays.items() if a.size
            }
        }
        self._checkpoints.save(self._next, trees, record, None)
        self._next += 1
        self._saved_at = time.monotonic()

    def load(self, make_state: Callable[..., Any]) -> tuple[Any | None, int]:
        """The newest whole state, or None, and the rows of its chunks.

        Damaged ones are put aside.

        Args:
          make_state: called with the fields of the state.

        Raises:
          UserError: the checkpoint is of another fit, or cannot be read.
        """
        for position in reversed(self._checkpoints.positions()):
            self._next = max(self._next, position + 1)
            try:
                return self._load(position, make_state)
            except DamagedError as error:
                aside = self._checkpoints.set_aside(position)
                if processes.is_first():
                    remark(f"{error}; it is now {aside.name}")
        return None, 0

    def _load(self, position: int, make_state: Callable[..., Any]) -> tuple[Any, int]:
        record = self._checkpoints.record(position)
        self._refuse_other_options(record.get("options", {}))
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = {
            name: (np.dtype(dtype), tuple(shape))
            for name, (dtype, shape) in record["arrays"].items()
        }
        sizes = {name: dtype.itemsize * int(np.prod(s)) for name, (dtype, s) in shapes.items()}
        abstract = {
            name: jax.ShapeDtypeStruct((size,), np.uint8, sharding=sharding)
            for name, size in sizes.items()
            if size
        }
        found = self._checkpoints.load(position, {"state": abstract}).trees["state"]
        arrays = {
            name: np.frombuffer(
                np.asarray(found[name]).tobytes() if sizes[name] else b"", dtype
            ).reshape(shape)
            for name, (dtype, shape) in shapes.items()
        }
        partial = None
        if record["position"] is not None:
            picked = Picked(*(arrays.pop(f"picked_{name}") for name in Picked._fields))
            partial = Partial(record["position"], arrays.pop("high"), arrays.pop("low"), picked)
        self.finished = record["stage"] == "done"
        state = make_state(
            stage=record["stage"],
            step=record["step"],
            restart=record["restart"],
            numbers=record["numbers"],
            arrays=arrays,
            partial=partial,
        )
        return state, record["chunk_rows"]

    def _refuse_other_options(self, saved: dict[str, Any]) -> None:
        for name, value in self._options.items():
            if saved.get(name) != value:
                what = _NAMES.get(name, f"{name}={saved.get(name)}, where this one has {value}")
                raise UserError(
                    f"the checkpoint in {self._checkpoints.folder} is of a fit with {what}; "
                    "accepted: the fit that it was started with; give another folder or delete "
                    "this one."
                )
