"""Files that appear under their names only when they are whole, whatever ends the process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
)
"""What reading arrays from a file raises that is cut, changed, empty or something else (an array, a
pickle, another archive), and what taking an array from it raises that it does not have."""


@contextlib.contextmanager
def whole_file(path: Path, *, only_new: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which takes its name at the end of the block; none where that raises.

    What is there under the name stays until then. Several processes may write the same file, of
    one table for instance: the last one to end its block wins.

    Args:
      path: of the file, in a folder that exists.
      only_new: nothing that is there is replaced.

    Raises:
      FileExistsError: with `only_new`, where another file has the name when the block ends.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            yield file
        if only_new:
            _put_where_there_is_none(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what `whole_file` left in a folder where it was killed; nobody may be writing."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name):
            path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes all of a file, or nothing."""
    with whole_file(path) as file:
        file.write(content)


def write_json(path: Path, values: Any) -> Any:
    """Writes JSON; numbers that are not finite are null.

    Returns:
      The values as JSON has them: with None where they were not finite.
    """
    plain = _as_json_has_them(values)
    write_whole(path, _text(plain))
    return plain


def write_new_json(path: Path, values: Any) -> bool:
    """Writes JSON as `write_json` does, where there is no such file; whether there was none.

    Of several processes that do so at once, it is the file of one.
    """
    try:
        with whole_file(path, only_new=True) as file:
            file.write(_text(_as_json_has_them(values)))
    except FileExistsError:
        return False
    return True


def write_array(path: Path, array: Any) -> None:
    """Writes an array as .npy."""
    with whole_file(path) as file:
        np.save(file, array, allow_pickle=False)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays, or numbers and texts, by name as .npz."""
    with whole_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz file.

    Raises:
      one of `UNREADABLE`: there is no such file, or it is damaged.
    """
    try:
        # A file of our own, for NumPy leaves one that is damaged open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (SyntaxError, tokenize.TokenError, MemoryError) as error:
        # Of a header of an array that makes no sense, or asks for more than there is.
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _put_where_there_is_none(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError:
        # Another was there first and holds the folder, so that `remove_leftovers` may have run; or
        # this file system has no links, and then the last one wins.
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


def _as_json_has_them(values: Any) -> Any:
    return json.loads(json.dumps(values, default=_plain), parse_constant=lambda name: None)


def _text(plain: Any) -> bytes:
    return (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
