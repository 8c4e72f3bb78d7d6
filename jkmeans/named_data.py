"""The files of the named data sets: found, downloaded, verified, unpacked.

They are looked for in three places, in this order: `$JKMEANS_DATA/<name>/`, the cache folder
(`$JKMEANS_CACHE/<name>/`, or `<name>/` in the user's cache folder for jkmeans), and the mirrors on
the internet, from which they are put into the cache folder. Wherever a file came from, its
checksum is verified every time it is read.
"""

import gzip
import hashlib
import math
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jkmeans.errors import UserError

MD5 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte.gz": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte.gz": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte.gz": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
"""Of the unpacked files: mirrors compress them anew, with other bytes for the same content."""

_FILE_PREFIXES = {"all": ("train", "t10k"), "train": ("train",), "test": ("t10k",)}
# Tried in order. The last one has no https; the checksum guards what it sends.
_MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
}
_DOWNLOAD_TIMEOUT_SECONDS = 30


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits inside scikit-learn: images [1797, 8, 8] uint8, labels [1797]."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return digits.images.astype(np.uint8), digits.target


def mnist(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """MNIST or Fashion-MNIST: images [n, 28, 28] uint8, labels [n] uint8.

    Args:
      name: "mnist" or "fashion-mnist".
      split: "all" (train, then test), "train" or "test".

    Raises:
      UserError: a file is damaged, or is nowhere and cannot be downloaded.
    """
    images, labels = [], []
    needed = [
        f"{prefix}-{what}-ubyte.gz"
        for prefix in _FILE_PREFIXES[split]
        for what in ("images-idx3", "labels-idx1")
    ]
    for prefix in _FILE_PREFIXES[split]:
        images.append(_read_idx(name, f"{prefix}-images-idx3-ubyte.gz", 3, needed))
        labels.append(_read_idx(name, f"{prefix}-labels-idx1-ubyte.gz", 1, needed))
    return np.concatenate(images), np.concatenate(labels)


def _read_idx(name: str, file: str, ndim: int, needed: Sequence[str]) -> np.ndarray:
    """Read one file of a named set, from where it is found or downloaded to."""
    path = _find(name, file)
    if path is None:
        path = _download(name, file, needed)
    return _parse_idx(path, ndim, MD5[name][file])


def _find(name: str, file: str) -> Path | None:
    data = _data_folder()
    if data is not None and os.path.isfile(data / name / file):
        return data / name / file
    path = cache_folder() / name / file
    return path if os.path.isfile(path) else None


def _data_folder() -> Path | None:
    data = os.environ.get("JKMEANS_DATA", "")
    return Path(data).expanduser() if data else None


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: $JKMEANS_CACHE, or the user's cache."""
    cache = os.environ.get("JKMEANS_CACHE", "")
    if cache:
        return Path(cache).expanduser()
    import pooch

    return Path(pooch.os_cache("jkmeans"))


def _download(name: str, file: str, needed: Sequence[str]) -> Path:
    """Download a file into the cache folder: whole and verified, or not at all."""
    import pooch

    folder = cache_folder() / name
    reasons = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the same folder, because only there the final rename is atomic.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            part = Path(temporary) / file
            for mirror in _MIRRORS[name]:
                logging.info("Downloading %s%s to %s", mirror, file, folder)
                fetch = pooch.HTTPDownloader(timeout=_DOWNLOAD_TIMEOUT_SECONDS, chunk_size=2**16)
                try:
                    fetch(mirror + file, str(part), None)  # pyright: ignore[reportArgumentType]
                    _parse_idx(part, 3 if "idx3" in file else 1, MD5[name][file])
                except (OSError, ValueError) as error:
                    reasons.append(f"{mirror}: {type(error).__name__}")
                except UserError:
                    reasons.append(f"{mirror}: not the file expected")
                else:
                    os.replace(part, folder / file)
                    return folder / file
    except OSError as error:
        reasons.append(f"{folder}: {error.strerror or error}")
    missing = [wanted for wanted in needed if _find(name, wanted) is None]
    data = _data_folder()
    others = f" or {data / name}" if data is not None else ""
    raise UserError(
        f"{file} of data set {name!r} is not on this machine and could not be downloaded "
        f"({'; '.join(reasons)}): put {', '.join(missing)} into {folder}{others}."
    )


def _parse_idx(path: Path, ndim: int, md5: str) -> np.ndarray:
    """Unpack an IDX file of uint8: two zero bytes, 8, ndim, the big-endian sizes, the data."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}); accepted: the original .gz file."
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}); accepted: a readable .gz file."
        ) from error
    magic = bytes((0, 0, 8, ndim))
    header = len(magic) + 4 * ndim
    if data[: len(magic)] != magic or len(data) < header:
        raise UserError(
            f"{path} starts with the bytes {data[:header].hex(' ', 4) or '(none)'}; accepted: "
            f"{magic.hex()} and {ndim} sizes, as in an IDX file of bytes in {ndim} dimensions."
        )
    shape = tuple(int(size) for size in np.frombuffer(data[len(magic) : header], dtype=">u4"))
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise UserError(
            f"{path} is truncated or damaged: it holds {len(data):,} bytes after unpacking; "
            f"accepted: {expected:,}, as its header says."
        )
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(
            f"{path} has the checksum {found} after unpacking; accepted: {md5} (MD5); "
            "delete the file or replace it with the original."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
