"""What the steps of a job share: its data, its devices, and how they compute, tell and stop."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jkmeans import datasets, processes, selection, sharded
from jkmeans.clustering.data import Data, fits_into_memory, pick_rows, read_all
from jkmeans.clustering.folder import STATE_FILE
from jkmeans.clustering.progress import Progress
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption
from jkmeans.sharding import clustered_dtype
from jkmeans.workdir import has_checkpoints, usable


def began_streamed(workdir: Path) -> bool:
    """Whether a job has saved what it found streamed, and nothing of what it found in memory."""
    with usable(workdir):
        return has_checkpoints(workdir) and not (workdir / STATE_FILE).exists()


class Session:
    """A job while it runs, in one process or several.

    Args:
      config: as `validate` gives it.
      workdir: of the job.
      data: what it clusters.
      mesh: of the devices.

    Attributes:
      blocks: what the number of placed rows is a multiple of, besides the devices.
      rows: [n, d] in memory; None where they are streamed.
      fingerprint: of the data.
      progress: what it says.

    Raises:
      UserError: the data cannot be clustered, or not as the config asks.
    """

    def __init__(self, config: Config, workdir: Path, data: Data, mesh: Mesh):
        self.config = config
        self.workdir = workdir
        self.data = data
        self.mesh = mesh
        self.blocks = sharded.BLOCKS if config.deterministic else 1
        self._root_key = jax.random.key(config.seed)
        self.rows = None
        fits = fits_into_memory(data.source, mesh, config.memory_mebibytes)
        may_stream = config.empty == "farthest" and not config.deterministic
        # What began streamed goes on so where memory decides, and not the user.
        if may_stream and not config.memory_mebibytes:
            fits &= not processes.on_first(lambda: began_streamed(workdir))
        if fits:
            self.rows = processes.together(lambda: read_all(data.source, mesh, self.blocks))
        if self.rows is None and config.empty != "farthest":
            raise UserError(
                f"config.empty is {config.empty!r}, but {data.source.name} is streamed; accepted: "
                "'farthest', or a larger memory_mebibytes"
            )
        if self.rows is None and config.deterministic:
            raise UserError(
                f"config.deterministic is True, but {data.source.name} is streamed; accepted: "
                "False, or a larger memory_mebibytes"
            )
        if config.deterministic and (sharded.BLOCKS // 2) % mesh.size:
            raise UserError(
                f"config.deterministic is True, but there are {mesh.size} devices; accepted: 1, 2, "
                "4 or 8 of them"
            )
        self.fingerprint = data.source.fingerprint()

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as stack:
            self._interruption = stack.enter_context(Interruption())
            self.progress = stack.enter_context(Progress())
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._exit.__exit__(*exception)

    @property
    def in_memory(self) -> bool:
        """Whether the rows are, and not streamed."""
        return self.rows is not None

    def key(self, number: int) -> jax.Array:
        """A random key: 0 for the report, 1 for the sweep, 2 for the fit."""
        return jax.random.fold_in(self._root_key, number)

    def sample(self, key: jax.Array, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of different rows, rising, [s], and these rows in float32 or float64, [s, d].

        Args:
          key: chooses them.
          size: how many; 0 for all.
        """
        source = self.data.source
        numbers = np.arange(source.n_rows)
        if 0 < size < source.n_rows:
            numbers = selection.sample_rows(key, source.n_rows, size)
        if self.rows is not None:
            rows = self.rows[numbers]
        else:
            self.progress.say(f"reading {len(numbers):,} rows of {source.name}")
            rows = self.compute(lambda: pick_rows(source, numbers))
        wide = clustered_dtype(rows.dtype) == np.float64
        rows = rows.astype(np.float64 if wide else np.float32, copy=False)
        return numbers, datasets.check_examples(rows, name=f"a sample of {source.name}")

    def compute(self, call: Callable[[], Any]) -> Any:
        """Calls in a thread, so that this one hears signals, which a blocked one does not."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(call)
            while True:
                if concurrent.futures.wait([future], timeout=0.1).done:
                    return future.result()
                if self._interruption.announced():
                    self.progress.say("stopping at the next safe place; once more to stop at once")

    def asked_to_stop(self) -> bool:
        """Whether any process heard a signal; all of them must ask."""
        return self._interruption.agreed()

    def stop_if_asked(self) -> None:
        """Ends the job where it was asked to; what it found must be saved.

        Raises:
          Interrupted: it was.
        """
        if self.asked_to_stop():
            self.stop()

    def stop(self) -> None:
        """Ends the job, whose state is saved.

        Raises:
          Interrupted: always.
        """
        # Not before process 0 has saved what all have found.
        processes.gather("saved")
        self.progress.say("saved; the same command goes on")
        self._interruption.leave()
