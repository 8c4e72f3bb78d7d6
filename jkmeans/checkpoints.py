"""Checkpoints of a run. This is the only module that knows Orbax.

A checkpoint is a folder ``<position>`` with two trees, ``model`` (parameters and clusters: all that
evaluation needs) and ``training`` (the rest of the state), and a JSON record with the config, the
versions, the data it belongs to and a checksum of every array. It appears under its name only when
complete; a save that was cut leaves a temporary folder that is never read.

Several processes write one checkpoint in a folder that all of them see, each the parts of arrays on
its own devices; any other number of processes reads it again.
"""

import contextlib
import gc
import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from orbax.checkpoint import v1 as ocp

from jkmeans import processes
from jkmeans.errors import CollapseError, LostError, UserError
from jkmeans.fingerprints import added_up, fingerprints, sums_here
from jkmeans.interruption import Interrupted

OBJECTIVE = "objective"
"""Name of the metric by which the best checkpoint is chosen; less is better."""

_FULL_DISK = ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED", "Disk quota exceeded")
_LAST_SAVE_SECONDS = 60.0
"""How long a process that ends by an error waits for the others' part of the last save."""
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 3.0
"""After a part of a save has failed, in which Orbax may raise by itself, as one process does."""
_OF_A_SAVE = ("async_checkpointer.py", "future.py")
"""Files of Orbax whose errors end a save; it goes on after others, such as one of a removal."""
_one_of_orbax = threading.Lock()
"""Held while a save begins or something is read: Orbax has one number in a process for what it does
now, by which the parts of a save find each other."""


class _Failures(logging.Handler):
    """Errors that Orbax logs in this process while it writes.

    Where one of several processes cannot write its part, Orbax does not raise: that process waits
    for the others at one barrier, and they for its part at another, for ten minutes. What it has
    logged says so at once.
    """

    def __init__(self):
        super().__init__(logging.ERROR)
        self.forget()

    def forget(self) -> None:
        self.error: BaseException | None = None
        self.at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if self.error is None and error is not None and record.filename in _OF_A_SAVE:
            self.at = time.monotonic()
            self.error = error


_failures = _Failures()


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      position: its number.
      trees: the trees that were asked for.
      record: the JSON record given to `Checkpoints.save`.
    """

    position: int
    trees: dict[str, Any]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder; a context manager that ends background writes on leaving.

    Args:
      folder: where they are; made at the first save.
      keep: newest ones that are kept, besides the best by `OBJECTIVE`.
    """

    def __init__(self, folder: Path, *, keep: int = 1):
        # Orbax logs every save at length; what a user must know is raised.
        logger = logging.getLogger("absl")
        logger.setLevel(logging.ERROR)
        if _failures not in logger.handlers:
            logger.addHandler(_failures)
        self.folder = Path(folder).absolute()
        policies = ocp.training.preservation_policies
        self._policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    # The best are the last in ascending order.
                    get_metric_fn=lambda metrics: -metrics[OBJECTIVE],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._open: ocp.training.Checkpointer | None = None
        self._pending = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.wait()
        elif processes.count() == 1:
            # The error under way matters more than one of the background write.
            with contextlib.suppress(Exception):
                self.wait()
        else:
            # Others may be dead, or never come to write their part.
            pending, self._pending, self._open = self._pending, None, None
            wanted = isinstance(error, (CollapseError, Interrupted, UserError))
            if pending is not None and wanted and _failures.error is None:
                with contextlib.suppress(Exception):
                    pending.result(timeout=_LAST_SAVE_SECONDS)
        if self._open is not None:
            self._open.close()
            self._open = None

    def positions(self) -> list[int]:
        """Positions of complete checkpoints, oldest first, as process 0 sees them."""

        def listed() -> list[int]:
            if not self.folder.is_dir():
                return []
            return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())

        return processes.on_first(listed)

    def save(
        self, position: int, trees: dict[str, Any], record: dict[str, Any], objective: float | None
    ) -> None:
        """Starts to write a checkpoint in the background, once the one before is complete.

        Args:
          position: its number, above all numbers there are.
          trees: pytrees of arrays by name.
          record: anything that JSON can hold.
          objective: the unsupervised objective by which the best is chosen; None where it does
            not compare with others.

        Raises:
          UserError: the disk is full; older checkpoints are left as they are.
        """
        self.wait()
        with _disk_errors(self.folder):
            record = record | {
                "fingerprints": _by_tree(trees, fingerprints(_leaves(trees))),
                "structures": _structures(trees),
                OBJECTIVE: None if objective is None else float(objective),
            }
            text = json.dumps(record)
            n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
            processes.on_first(lambda: self._make_room(n_bytes))
            if self._open is None:
                _wait_without_collectives()
                # Only who writes may clean up: a reader would remove a save of another process.
                self._open = ocp.training.Checkpointer(
                    self.folder,  # type: ignore[arg-type]
                    preservation_policy=self._policy,  # type: ignore[arg-type]
                    cleanup_tmp_directories=True,
                )
            _failures.forget()
            with _one_of_orbax:
                self._pending = self._open.save_checkpointables_async(
                    position,
                    trees,
                    custom_metadata={"record": text, "crc32": zlib.crc32(text.encode())},
                    metrics=None if objective is None else {OBJECTIVE: float(objective)},
                    force=True,
                    overwrite=True,
                )

    def _make_room(self, n_bytes: int) -> None:
        """Makes the folder, and sees to it that the disk has room for so much."""
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < n_bytes + 2**20:
                raise OSError(f"No space left: {free / 2**20:.0f} MiB free")

    def _by_all(self, call: Callable[[], Any]) -> Any:
        """Calls on every process; what one of them finds damaged is so for all.

        Raises:
          DamagedError, UserError: of any process.
        """
        if processes.count() == 1:
            return call()
        result = processes.together(lambda: _damage_as_value(call))
        messages = processes.gather(str(result) if isinstance(result, DamagedError) else None)
        for message in messages:
            if message is not None:
                raise DamagedError(message)
        return result

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          UserError: the disk was full.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with _disk_errors(self.folder):
                _finish(pending)

    def best(self) -> int | None:
        """Position of the checkpoint with the least objective; None where none has one.

        A checkpoint whose record cannot be read is passed over.
        """
        measured = []
        for position in self.positions():
            with contextlib.suppress(DamagedError):
                objective = self.record(position)[OBJECTIVE]
                if objective is not None:
                    measured.append((objective, position))
        return min(measured)[1] if measured else None

    def record(self, position: int) -> dict[str, Any]:
        """The JSON record of a checkpoint, which is read without its arrays.

        Raises:
          DamagedError: it cannot be read.
        """
        return self._by_all(lambda: self._record(position))

    def _record(self, position: int) -> dict[str, Any]:
        with _damage(self.folder / str(position)):
            path = self.folder / str(position) / "_CHECKPOINT_METADATA"
            ours = json.loads(path.read_text())["custom_metadata"]
            if zlib.crc32(ours["record"].encode()) != ours["crc32"]:
                raise ValueError("the checksum of its record is wrong")
            return json.loads(ours["record"])

    def load(self, position: int, abstract: dict[str, Any]) -> Restored:
        """Reads a checkpoint and compares every array with its checksum.

        Args:
          position: its number.
          abstract: the trees wanted, of ``jax.ShapeDtypeStruct`` with shardings; the mesh need
            not be the one that it was saved on.

        Raises:
          DamagedError: something is missing, cut or changed.
          UserError: it is whole, but holds other arrays than those wanted.
        """
        record = self.record(position)
        folder = self.folder / str(position)
        with _damage(folder):
            saved = {name: record["structures"][name] for name in abstract}
        _refuse_other_arrays(folder, saved, _structures(abstract))

        def read() -> dict[str, Any]:
            with _damage(folder), _one_of_orbax, _alone(), _without_late_complaints():
                return ocp.load_checkpointables(str(folder), abstract)

        def add_up() -> list[int]:
            with _damage(folder):
                return sums_here(leaves)

        def compare() -> None:
            with _damage(folder):
                wrong = [name for name in found if found[name] != record["fingerprints"][name]]
                if wrong:
                    raise ValueError(f"the checksum of {wrong[0]} is wrong")

        restored = self._by_all(read)
        trees = {name: restored[name] for name in abstract}
        leaves = _leaves(trees)
        here = self._by_all(add_up)
        found = _by_tree(trees, added_up(leaves, here))
        self._by_all(compare)
        return Restored(position, trees, record)

    def set_aside(self, position: int) -> Path:
        """Renames a damaged checkpoint, so that it is neither read nor overwritten."""

        def rename() -> str:
            target = self.folder / f"damaged-{position}"
            n = 1
            while target.exists():
                n += 1
                target = self.folder / f"damaged-{position}-{n}"
            os.rename(self.folder / str(position), target)
            return target.name

        target = self.folder / processes.on_first(rename)
        if self._open is not None:
            self._open.close()
            self._open = None
        return target


def _finish(pending: Any) -> None:
    """Waits for a save, but not for others where the part of this process has failed."""
    if processes.count() == 1:
        pending.result()
        return
    while True:
        began = time.monotonic()
        try:
            pending.result(timeout=_POLL_SECONDS)
            return
        except TimeoutError:
            if time.monotonic() - began < _POLL_SECONDS / 2:
                raise  # Not the end of our patience, but of Orbax's.
        error = _failures.error
        if error is not None and time.monotonic() - _failures.at > _GRACE_SECONDS:
            raise error


class DamagedError(Exception):
    """A checkpoint cannot be read; the message names it and says why."""


def _wait_without_collectives() -> None:
    """Has Orbax's processes wait for each other at the coordination service.

    Its own choice is a collective on all devices, which would mix with those of the steps.
    """
    name = "experimental_orbax_use_distributed_barrier"
    if processes.count() > 1 and name in flags.FLAGS and flags.FLAGS.is_parsed():
        flags.FLAGS[name].value = True


def _alone() -> contextlib.AbstractContextManager:
    """Orbax then does not wait for other processes: one that cannot read its part never comes."""
    if processes.count() == 1:
        return contextlib.nullcontext()
    me = processes.number()
    options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    return ocp.Context(multiprocessing_options=options)


def _damage_as_value(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except DamagedError as error:
        return error


def _leaves(trees: dict[str, Any]) -> list[Any]:
    return [leaf for tree in trees.values() for leaf in jax.tree.leaves(tree)]


def _by_tree(trees: dict[str, Any], sums: list[int]) -> dict[str, list[int]]:
    """The sums of `_leaves`, by the tree that each leaf is of."""
    left = iter(sums)
    return {name: [next(left) for _ in jax.tree.leaves(tree)] for name, tree in trees.items()}


def _structures(trees: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Shape and type of every array, by the path in its tree."""
    return {
        name: {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{[*leaf.shape]}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for name, tree in trees.items()
    }


def _refuse_other_arrays(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for tree, arrays in wanted.items():
        for path in sorted(saved[tree] | arrays):
            there, here = saved[tree].get(path, "nothing"), arrays.get(path, "nothing")
            if there != here:
                raise UserError(
                    f"checkpoint {folder} has {there} as {tree}/{path}, where this program has "
                    f"{here}; accepted: the network and the method that it was trained with"
                )


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, PermissionError) as error:
        # Not the checkpoint's fault, and no reason to go back to an older one.
        raise UserError(f"cannot read checkpoint {folder}: {error or 'out of memory'}") from error
    except Exception as error:
        # Orbax drops tasks that it never awaited; their complaints say nothing to a user.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            error.__traceback__ = None
            gc.collect()
        words = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = " ".join(str(words).split()) or type(error).__name__
        reason = reason if len(reason) <= 200 else f"{reason[:200]}…"
        raise DamagedError(f"checkpoint {folder} cannot be read: {reason}") from error


@contextlib.contextmanager
def _without_late_complaints() -> Iterator[None]:
    """Where a load fails, what is still being read ends in an event loop that is closed by then.

    Each such read would write a traceback, now or later, so that they are kept quiet from there on.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        while error is not None and not _is_of_an_end(error):
            error = error.__cause__ or error.__context__  # Orbax may have wrapped it.
        if error is None:
            before(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = before


def _is_of_an_end(error: BaseException) -> bool:
    """Whether it says no more than that nobody waits any longer."""
    return isinstance(error, GeneratorExit) or str(error) == "Event loop is closed"


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if any(sign in str(error) for sign in _FULL_DISK):
            raise UserError(
                f"the disk of {folder} is full, so the checkpoint was not written; the ones "
                "before it are whole: make room and start the same command again"
            ) from error
        if isinstance(error, TimeoutError) and processes.count() > 1:
            # Of Orbax, which waited for the others.
            raise LostError(processes.loss_sentence(error)) from error
        if isinstance(error, OSError):
            raise UserError(f"cannot write checkpoints to {folder}: {error}") from error
        raise
