"""The folder of a run: whose it is, and one run at a time."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jkmeans import processes
from jkmeans.errors import UserError
from jkmeans.whole_files import remove_leftovers, write_new_json

CONFIG_FILE = "config.json"
"""What a run, a job or an experiment begins with."""
SETTINGS_FILE = "settings.json"
"""What experiments with a server begin with, in place of a config."""
RESULTS_FILE = "results.json"
TABLE_FILE = "table.json"
"""The numbers of a table of many runs."""
SEEDS = "seed_*"
"""The folders of the runs of several seeds."""
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

    Of two processes that find it new at the same moment, one checks what the other wrote.

    Args:
      workdir: made if missing.
      content: for JSON.
      differences: of the content that is there, as JSON has it; raises where it is of no such kind.
      kind: "run", "job" or "experiment".
      name: of the file.

    Raises:
      UserError: the folder holds another one, or something else, or cannot be written.
    """
    path = workdir / name
    refuse_other_kinds(workdir, name)
    with usable(workdir):
        if not path.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            if write_new_json(path, content):
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


def refuse_other_kinds(workdir: Path, own: str) -> None:
    """Refuses a folder of something else, whose files would stand among ours.

    Args:
      workdir: that does not belong to us as long as ``own`` is not in it.
      own: what ours begin with: `CONFIG_FILE`, `SETTINGS_FILE`, `TABLE_FILE` or `SEEDS`.

    Raises:
      UserError: it holds something of another kind, or cannot be read.
    """
    with usable(workdir):
        there = {
            CONFIG_FILE: (workdir / CONFIG_FILE).exists(),
            SETTINGS_FILE: (workdir / SETTINGS_FILE).exists(),
            SEEDS: bool(folders_of_seeds(workdir)),
            TABLE_FILE: (workdir / TABLE_FILE).exists(),
        }
        there |= {name: (workdir / name).exists() for name in (CHECKPOINT_FOLDER, RESULTS_FILE)}
    if there[own]:
        return
    found = next((name for name, is_there in there.items() if is_there), None)
    if found is not None:
        raise UserError(f"{workdir} holds {_WORDS[found]}; accepted: another --workdir")


_WORDS = {
    CONFIG_FILE: f"a run, a job or an experiment ({CONFIG_FILE})",
    SETTINGS_FILE: f"an experiment ({SETTINGS_FILE})",
    SEEDS: "the runs of several seeds, each in a folder of its own",
    TABLE_FILE: f"a table of many runs ({TABLE_FILE})",
    CHECKPOINT_FOLDER: f"{CHECKPOINT_FOLDER} but no {CONFIG_FILE}",
    RESULTS_FILE: f"{RESULTS_FILE} of something else",
}


def has_checkpoints(workdir: Path) -> bool:
    """Whether anything was saved there, by a run or by a job on streamed rows."""
    folder = workdir / CHECKPOINT_FOLDER
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def folders_of_seeds(workdir: Path) -> list[Path]:
    """The folders of the runs of several seeds, of which there are none in the folder of one."""
    return sorted(path.parent for path in workdir.glob(f"{SEEDS}/{CONFIG_FILE}"))


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
      UserError: another run has it, or it cannot be written.
    """
    import fcntl

    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if not processes.is_first():
                return
            with usable(workdir, called):
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
