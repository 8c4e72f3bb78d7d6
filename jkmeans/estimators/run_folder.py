"""The folder of a run as the model of an estimator: loaded once, copied, pickled."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import jax

from jkmeans import evaluation, telling
from jkmeans.recorder import METRICS_FILE
from jkmeans.workdir import CHECKPOINT_FOLDER, CONFIG_FILE, RESULTS_FILE


class Files(dict[str, bytes]):
    """What of the folder of a run makes a model, by relative path."""

    def write(self, folder: Path) -> None:
        """Writes them into a folder, which is made if it is missing."""
        for name, content in self.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def unpacked(self) -> RunFolder:
        """A new folder with these files, which is removed with the object."""
        run = RunFolder.temporary()
        self.write(run.path)
        return run


class RunFolder:
    """The folder of a run and the model in it; a pickle holds the files that make the model."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser().absolute()
        self._loaded: dict[int, evaluation.TrainedModel] = {}

    @classmethod
    def temporary(cls) -> RunFolder:
        """A new folder, which is removed with the object."""
        run = cls.__new__(cls)
        run._make_temporary()
        return run

    def _make_temporary(self) -> None:
        RunFolder.__init__(self, tempfile.mkdtemp(prefix="jkmeans-"))
        weakref.finalize(self, _remove, self.path, os.getpid())

    def model(self, n_devices: int) -> evaluation.TrainedModel:
        """The newest model, read once for each number of devices.

        Args:
          n_devices: of the mesh; 0 for all. Where there are fewer, all of them, with a warning: the
            model may come from a larger machine, and says the same here.
        """
        n_devices = int(n_devices)
        if n_devices not in self._loaded:
            available = len(jax.devices())
            if n_devices > available:
                telling.warn(
                    f"n_devices is {n_devices}, but JAX sees {available}: predicting on "
                    f"{available}; accepted without a warning: 0 (all of them) to {available}"
                )
            self._loaded[n_devices] = evaluation.load_model(
                self.path, n_devices=min(n_devices, available)
            )
        return self._loaded[n_devices]

    def results(self) -> dict[str, Any] | None:
        """What results.json holds; None where the run has not come so far."""
        try:
            return json.loads((self.path / RESULTS_FILE).read_text())
        except FileNotFoundError:
            return None

    def files(self) -> Files:
        """The files that make the model: what `jkmeans.evaluation` reads, and the record.

        Raises:
          UserError: it holds no checkpoint that can be read.
          ValueError: the folder is gone.
        """
        if not self._loaded:
            self.model(0)
        position = max(self._loaded.values(), key=lambda model: model.position).position
        checkpoint = self.path / CHECKPOINT_FOLDER / str(position)
        optional = [self.path / name for name in (RESULTS_FILE, METRICS_FILE)]
        paths = [
            self.path / CONFIG_FILE,
            *(path for path in optional if path.exists()),
            *(path for path in sorted(checkpoint.rglob("*")) if path.is_file()),
        ]
        try:
            if not checkpoint.is_dir():
                raise FileNotFoundError(2, "No such folder", str(checkpoint))
            return Files({str(p.relative_to(self.path)): p.read_bytes() for p in paths})
        except OSError as error:
            raise ValueError(
                f"the folder {self.path} of this estimator's run is gone or cannot be read "
                f"({error.strerror}); accepted: the folder as fit has left it"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._make_temporary()
        state["files"].write(self.path)


def _remove(path: Path, process: int) -> None:
    # A forked process has the object as well, but the folder is its parent's.
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
