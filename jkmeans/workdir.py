"""The folder of a run: whose it is, one run at a time, what the machine offers."""

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import Any

import jkmeans
from jkmeans import processes
from jkmeans.errors import UserError
from jkmeans.whole_files import remove_leftovers, write_json

CONFIG_FILE = "config.json"
"""What a run, a job or an experiment begins with."""
RESULTS_FILE = "results.json"
TABLE_FILE = "table.json"
"""The numbers of a table of many runs."""
CHECKPOINT_FOLDER = "checkpoints"
CENTROIDS_FILE = "centroids.npy"
"""Of experiments.cluster, and beside predictions."""
REPORT_FOLDER = "report"
LOCK_FILE = ".lock"


def claim(
    workdir: Path,
    content: Any,
    differences: Callable[[Any], list[str]],
    *,
    kind: str,
    name: str = CONFIG_FILE,
) -> None:
    """Writes what decides the results into a new workdir, or checks that it is what is there.

    Args:
      workdir: made if missing.
      content: for JSON.
      differences: of the content that is there, as JSON has it; raises where it is of no such kind.
      kind: "run", "job" or "experiment".
      name: of the file.

    Raises:
      UserError: the folder holds another one, or cannot be written.
    """
    path = workdir / name
    with usable(workdir):
        if not path.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            return
        found = path.read_bytes()
    article = "an" if kind.startswith("e") else "a"
    try:
        different = differences(json.loads(found.decode()))
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{path} is not the config of {article} {kind} of this version of jkmeans ({error}); "
            "accepted: another --workdir"
        ) from error
    if different:
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise UserError(
            f"{workdir} holds {article} {kind} with another config: {different[0]}{more}; "
            "accepted: the same config, or another --workdir"
        )


def has_checkpoints(workdir: Path) -> bool:
    """Whether anything was saved there, by a run or by a job on streamed rows."""
    folder = workdir / CHECKPOINT_FOLDER
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def folders_of_seeds(workdir: Path) -> list[Path]:
    """The folders of the runs of several seeds, of which there are none in the folder of one."""
    return sorted(path.parent for path in workdir.glob(f"seed_*/{CONFIG_FILE}"))


@contextlib.contextmanager
def usable(workdir: Path, called: str = "--workdir") -> Iterator[None]:
    """What of a workdir cannot be read or written, as a `UserError`.

    Args:
      workdir: or another folder.
      called: what the user calls it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {called} {workdir}: {error.strerror}") from error


@contextlib.contextmanager
def only_process_in(workdir: Path, called: str = "--workdir") -> Iterator[None]:
    """Holds the workdir against a second run, which would clean up the saves of the first.

    Of several processes that compute as one, process 0 holds it for all.

    Args:
      workdir: or another folder, which is there.
      called: what the user calls it.

    Raises:
      UserError: another run has it.
    """
    import fcntl

    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if not processes.is_first():
                return
            file = stack.enter_context(open(workdir / LOCK_FILE, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is running in {workdir}; accepted: another {called}, or wait"
                ) from None
            remove_leftovers(workdir)

        processes.together(lock)
        yield


def versions(*packages: str) -> dict[str, str]:
    """Versions of what computes: of jkmeans, Python and the packages named."""
    return {
        "jkmeans": jkmeans.__version__,
        "python": platform.python_version(),
        **{name: importlib_metadata.version(name) for name in packages},
    }


def device_room(mesh) -> float:
    """Bytes that examples may take on a device: what is left after networks and banks.

    The least that any of the processes has.

    Args:
      mesh: of the devices.
    """
    local = [device for device in mesh.devices.flat if device.process_index == processes.number()]
    # A CPU's devices share the memory of their host, and so do the processes on it.
    n_sharing = len(local) * processes.n_on_this_host()
    return min(processes.gather(_room(local[0], n_sharing)))


def _room(device, n_devices: int) -> float:
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return 0.6 * (statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    # macOS does not say how much is free.
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0.5 * free / n_devices
