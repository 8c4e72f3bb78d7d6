"""The output folder: parts, the journal of what is done, the manifest, and all of it in one file.

plan.json        which model predicts, and how files are cut; written first
journal.jsonl    a line for each part that is kept, written when it is
parts/           FILE.START.npz: the columns of the rows of FILE from START on
manifest.json    at the end: files, rows, parts and their SHA-256
labels.npy, …    with --merge: a column of all rows of all files, in the order of the manifest
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans.appending import Appender
from jkmeans.dispatch.inputs import InputFile
from jkmeans.dispatch.master import Part, Shard
from jkmeans.errors import UserError
from jkmeans.streaming.outputs import npy_file
from jkmeans.whole_files import write_json
from jkmeans.workdir import CENTROIDS_FILE, usable

PLAN_FILE = "plan.json"
JOURNAL_FILE = "journal.jsonl"
MANIFEST_FILE = "manifest.json"
PARTS_FOLDER = "parts"

_LONGEST_NAME = 255  # Bytes; of the usual file systems.


# Parts, as workers write them


def part_name(shard: Shard) -> str:
    """The name of the file of a shard's result."""
    return f"{shard.file}.{shard.start:012d}.npz"


def refuse_long_name(file: str) -> None:
    """Refuses a file whose parts would have a name longer than file systems take.

    Raises:
      UserError: it has.
    """
    n_bytes = len(os.fsencode(file))
    most = _LONGEST_NAME - len(os.fsencode(part_name(Shard("", 0, 0))))
    if n_bytes > most:
        raise UserError(
            f"its name has {n_bytes} bytes; accepted: up to {most}, to which the names of its "
            "parts add"
        )


def write_part(folder: Path, shard: Shard, columns: Mapping[str, np.ndarray], worker: str) -> Part:
    """Writes the result of a shard under a name of its own, and waits until it is on the disk.

    Args:
      folder: the output folder.
      shard: what was computed.
      columns: [rows, ...] by name.
      worker: who computed it.

    Returns:
      What is to be reported to the master.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    content = buffer.getbuffer()
    # Not of the name of the part, which may be as long as names can be; `clean` finds it.
    attempt = f".new.npz.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}"
    path = folder / PARTS_FOLDER / attempt
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        discard_part(folder, attempt)
        raise UserError(
            f"cannot write {path}: {error.strerror}; accepted: an --output folder with room, that "
            "every host sees; what is done is kept, and the same command goes on"
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    return Part(attempt, shard.stop - shard.start, len(content), sha256, worker)


def discard_part(folder: Path, attempt: str) -> None:
    """Removes a part that was not kept, where it can be removed."""
    with contextlib.suppress(OSError):
        (folder / PARTS_FOLDER / attempt).unlink()


def read_part(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """The columns of a part.

    Raises:
      UserError: it is missing, or is no longer what was written.
    """
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its checksum is another one than in the manifest")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be used ({error}); accepted: what was written; delete it, and the same "
            "command computes it again"
        ) from error


# What the master keeps


class PartStore:
    """Names parts and notes them in the journal; see `jkmeans.dispatch.master.Store`.

    Args:
      folder: the output folder.
      files: of the input, by name.
    """

    def __init__(self, folder: Path, files: Mapping[str, InputFile]):
        self._parts = folder / PARTS_FOLDER
        self._files = files
        path = folder / JOURNAL_FILE
        self._journal = Appender(path, _whole)
        try:
            self._records = read_journal(path)
        except UserError:
            self._journal.close()
            raise

    def begin(self) -> int:
        """A life of the master begins; its number, from 1."""
        life = 1 + sum("life" in record for record in self._records)
        self._note({"life": life})
        return life

    def kept(self, shards: Iterable[Shard]) -> dict[Shard, Part]:
        """Which of the shards are done, of files that nobody has written to since."""
        wanted = set(shards)
        found = {}
        for record in self._records:
            if "part" not in record:
                continue
            shard, part = record["shard"], record["part"]
            if shard not in wanted:
                continue
            # The last record is of what lies under the name of the shard, whatever came before.
            found.pop(shard, None)
            if record["identity"] == self._files[shard.file].identity:
                found[shard] = part
        return {shard: part for shard, part in found.items() if self._is_there(shard, part)}

    def keep(self, shard: Shard, part: Part) -> bool:
        """Gives a part the name of its shard and notes it; False where the part is not there.

        Raises:
          UserError: the folder cannot be written to, or is not the one that the worker sees.
        """
        path = self._parts / part_name(shard)
        try:
            os.replace(self._parts / part.attempt, path)
        except FileNotFoundError:
            # A master that died here may have renamed it.
            if not path.exists():
                host = f" on {part.attempt.split('.')[-3]}" if "." in part.attempt else ""
                raise UserError(
                    f"worker {part.worker}{host} wrote {path.name} as {part.attempt}, which is not "
                    f"in {self._parts} on {socket.gethostname()}; accepted: an --output folder "
                    "that is shared by all hosts, and that nobody cleans up meanwhile"
                ) from None
            if hashlib.sha256(path.read_bytes()).hexdigest() != part.sha256:
                return False
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; accepted: an --output folder that can be "
                "written to"
            ) from error
        identity = self._files[shard.file].identity
        self._note({"shard": shard, "identity": identity, "part": part})
        return True

    def close(self) -> None:
        """Closes the journal, once it is on the disk."""
        if not self._journal.closed:
            self._journal.flush()
            self._journal.close()

    def _note(self, record: dict[str, Any]) -> None:
        self._journal.append((json.dumps(record) + "\n").encode())

    def _is_there(self, shard: Shard, part: Part) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self._parts / part_name(shard)).st_size == part.bytes
        return False


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a journal, in order; one that is missing has none.

    A last line without an end was cut by a kill, and is no record.

    Raises:
      UserError: a line is no record.
    """
    content = path.read_bytes() if path.exists() else b""
    records = []
    for number, line in enumerate(content[: _whole(content)].splitlines(), 1):
        try:
            record = json.loads(line)
            if "part" in record:
                record["shard"] = Shard(*record["shard"])
                record["part"] = Part(*record["part"])
                record["identity"] = str(record["identity"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"line {number} of {path} is damaged ({error}); delete the line, and what it "
                "stands for is computed again"
            ) from error
        records.append(record)
    return records


def _whole(content: bytes) -> int:
    """Bytes of the lines that have an end."""
    return content.rfind(b"\n") + 1


# The folder


def make_folder(folder: Path) -> None:
    """Makes the output folder, or checks that there is nothing else in it.

    Raises:
      UserError: there is, or it cannot be made.
    """
    with usable(folder, "--output"):
        folder.mkdir(parents=True, exist_ok=True)
        others = [f.name for f in folder.iterdir() if not f.name.startswith(".")]
    if others and PLAN_FILE not in others:
        raise UserError(
            f"--output {folder} is a folder with other things in it, such as {min(others)}; "
            "accepted: a new or empty folder, or one of this command"
        )


def claim(folder: Path, plan: Mapping[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """Writes down what an output folder is for, or checks that it is of the same model and columns.

    Args:
      folder: of the output.
      files: names of the input's, readable or not; some must be those that the folder is about.
      plan: what `PLAN_FILE` is to hold: ``model`` (its digest), ``described`` (in words),
        ``columns``, ``input`` (the folder of the files), ``shard_rows`` (0 for those of the folder,
        or ``default_shard_rows``) and ``default_shard_rows``.

    Returns:
      The plan of the folder.

    Raises:
      UserError: it is of another model, has other columns or is about other files or those of
        another folder, or it cannot be written to.
    """
    path = folder / PLAN_FILE
    done = {r["shard"].file for r in read_journal(folder / JOURNAL_FILE) if "part" in r}
    if path.exists() and done:
        there = _read_plan(path)
        _refuse_other(path, there, plan, done, files)
        if "input" in there:
            return there
        mine = there | {"input": plan["input"]}  # A folder of before it was noted.
    else:  # A folder in which nothing was done yet may become one of another model.
        mine = {name: plan[name] for name in ("model", "described", "columns", "input")}
        mine["shard_rows"] = plan["shard_rows"] or plan["default_shard_rows"]
    with usable(folder, "--output"):
        (folder / PARTS_FOLDER).mkdir(exist_ok=True)
        write_json(path, mine)
    return mine


_TEXT: Any = (lambda value: isinstance(value, str), "a text")
_PLAN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": _TEXT,
    "described": _TEXT,
    "columns": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "shard_rows": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "input": _TEXT,  # Not in a folder of before it was noted.
}


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_text())
        if missing := set(_PLAN) - {"input"} - set(plan):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        for name, (is_one, accepted) in _PLAN.items():
            if name in plan and not is_one(plan[name]):
                raise ValueError(f"{name} is {plan[name]!r}, not {accepted}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); accepted: another --output") from error
    return plan


def _refuse_other(
    path: Path,
    there: Mapping[str, Any],
    plan: Mapping[str, Any],
    done: Set[str],
    files: Iterable[str],
) -> None:
    """Refuses a plan that the one at the path cannot serve; arguments as in `claim`."""
    folder, columns, shard_rows = path.parent, there["columns"], there["shard_rows"]
    if there["model"] != plan["model"]:
        raise UserError(
            f"{folder} holds what another model predicted: {there['described']} with digest "
            f"{there['model']}, and this is {plan['described']} with digest {plan['model']}; "
            "accepted: the same model (--checkpoint chooses one), or another --output"
        )
    if columns != list(plan["columns"]):
        raise UserError(
            f"{folder} holds {', '.join(columns)}, and {', '.join(plan['columns'])} are asked "
            "for; accepted: the same (--embeddings or not), or another --output"
        )
    if plan["shard_rows"] not in (0, shard_rows):
        raise UserError(
            f"--shard_rows is {plan['shard_rows']:,}, but the files of {folder} are cut into "
            f"{shard_rows:,} rows; accepted: {shard_rows}, 0, or another --output"
        )
    # Files of one name, size and time are taken for the same, so they must be in one place.
    before = there.get("input", plan["input"])
    if Path(before).expanduser().resolve() != Path(plan["input"]):
        raise UserError(
            f"{folder} holds predictions for the files in {before}, and --input has those in "
            f"{plan['input']}; accepted: the same --input, or another --output (if the files "
            f'have only moved, write "input": "{plan["input"]}" into {path})'
        )
    if done.isdisjoint(files):
        more = f" and {len(done) - 1:,} more" if len(done) > 1 else ""
        raise UserError(
            f"{folder} holds predictions for {min(done)}{more}, and --input has none of that; "
            "accepted: the same input, with files more or less, or another --output"
        )


def clean(folder: Path) -> None:
    """Removes what attempts left behind that were killed; nobody may be at work."""
    for path in (folder / PARTS_FOLDER).glob(".*.npz.*"):
        path.unlink(missing_ok=True)


def make_manifest(
    files: Sequence[InputFile],
    parts: Mapping[Shard, Part],
    failed: Mapping[str, str],
    plan: Mapping[str, Any],
) -> dict[str, Any]:
    """What there is; of failed files nothing is listed but the reason.

    Returns:
      The manifest: ``model``, ``columns``, ``n_rows``, ``complete``, ``files`` in order, each with
      its ``rows``, its ``first_row`` among all, and its ``parts``; ``failed``.
    """
    by_file: dict[str, list[dict[str, Any]]] = {}
    for shard, part in sorted(parts.items(), key=lambda item: item[0]):
        record = {
            "part": f"{PARTS_FOLDER}/{part_name(shard)}",
            "start": shard.start,
            "stop": shard.stop,
            "bytes": part.bytes,
            "sha256": part.sha256,
        }
        by_file.setdefault(shard.file, []).append(record)
    listed = []
    first_row = 0
    for file in files:
        if file.name in failed:
            continue
        its_parts = by_file.get(file.name, [])
        stops = [0, *(part["stop"] for part in its_parts)]
        starts = [*(part["start"] for part in its_parts), file.n_rows]
        if stops != starts:
            raise RuntimeError(f"the parts of {file.name} are not its rows, each once")
        record = {"file": file.name, "rows": file.n_rows, "first_row": first_row}
        listed.append(record | {"parts": its_parts})
        first_row += file.n_rows
    return {
        "model": plan["model"],
        "described": plan["described"],
        "columns": plan["columns"],
        "n_rows": first_row,
        "complete": not failed,
        "files": listed,
        "failed": [{"file": name, "reason": reason} for name, reason in sorted(failed.items())],
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes down what there is; see `make_manifest`."""
    write_json(folder / MANIFEST_FILE, manifest)


def remove_merged(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Removes merged files that are not of the rows of a manifest, before it is written.

    Returns:
      The names of those that were there.
    """
    path = folder / MANIFEST_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(path.read_text())["files"] == manifest["files"]:
            return []
    there = [path for name in manifest["columns"] if (path := folder / f"{name}.npy").exists()]
    for path in there:
        path.unlink()
    return [path.name for path in there]


def read_predictions(
    folder: str | os.PathLike[str],
) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
    """What was predicted, part by part, in the order of files and rows; checksums are compared.

    Args:
      folder: of the output, with a manifest.

    Yields:
      Name of the file; start, the first row of the part within its file (``first_row`` of the
      manifest is that of a file among all); and columns [rows, ...] by name.

    Raises:
      UserError: there is no manifest, or a part is not what was written.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.exists():
        raise UserError(f"there is no {path}; accepted: the --output of a run that has ended")
    for file in json.loads(path.read_text())["files"]:
        for part in file["parts"]:
            columns = read_part(Path(folder) / part["part"], part["sha256"])
            yield file["file"], part["start"], columns


def merge(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Writes each column of all rows into one .npy file, which appears when it is complete.

    Returns:
      The files: [n_rows, ...], in the order of the manifest.

    Raises:
      UserError: a part is not what was written, or the disk is full.
    """
    n_rows = manifest["n_rows"]
    paths: list[Path] = []
    with contextlib.ExitStack() as stack:
        writers: dict[str, Any] = {}
        for _, _, columns in read_predictions(folder):
            for name, column in columns.items():
                if name not in writers:
                    paths.append(folder / f"{name}.npy")
                    shape = (n_rows, *column.shape[1:])
                    writers[name] = stack.enter_context(npy_file(paths[-1], shape, column.dtype))
                writers[name](column)
    return paths


def write_centroids(folder: Path, centroids: np.ndarray) -> None:
    """Writes the centroids [k, p] that distances are to."""
    with npy_file(folder / CENTROIDS_FILE, centroids.shape, centroids.dtype) as write:
        write(centroids)
