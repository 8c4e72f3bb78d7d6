"""Zarr arrays, read through the package zarr, which is imported when one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jkmeans.errors import UserError
from jkmeans.sources.base import ACCEPTED_PATHS, Source, check_matrix


class ZarrSource(Source):
    """A Zarr array, a band of its chunks at a time."""

    def __init__(self, array: Any, name: str):
        self.name = name
        if not hasattr(array, "shape") or not hasattr(array, "chunks"):
            raise UserError(f"{name} is a Zarr group; accepted: a Zarr array in it.")
        dtype = np.dtype(array.dtype)
        check_matrix(array.shape, dtype, name)
        self._array = array
        self.n_rows, self.n_features = map(int, array.shape)
        self.dtype = dtype.newbyteorder("=")
        # A chunk is unpacked whole, so the last band is kept for the read that goes on in it.
        self._band_rows = int(array.chunks[0])
        self._band: tuple[int, np.ndarray] | None = None
        row_bytes = self.n_features * dtype.itemsize
        self.overhead_bytes = 2 * min(self._band_rows, self.n_rows) * row_bytes

    def _read(self, start: int, out: np.ndarray) -> None:
        done = 0
        while done < len(out):
            band, first = divmod(start + done, self._band_rows)
            if self._band is None or self._band[0] != band:
                self._band = None  # Freed before the next one is made.
                self._band = band, self._load(band)
            rows = self._band[1][first : first + len(out) - done]
            out[done : done + len(rows)] = rows
            done += len(rows)

    def _load(self, band: int) -> np.ndarray:
        start = band * self._band_rows
        try:
            return np.asarray(self._array[start : start + self._band_rows])
        except Exception as error:  # Codecs and stores raise what they like.
            raise UserError(
                f"rows from {start:,} on of {self.name} cannot be read ({error}); accepted: a "
                "Zarr array whose chunks are whole."
            ) from error


def open_zarr(path: Path) -> ZarrSource:
    """The Zarr array at a path."""
    try:
        import zarr
    except ImportError as error:
        raise UserError(f"{path} needs the package zarr: pip install zarr.") from error
    try:
        array = zarr.open(str(path), mode="r")
    except Exception as error:
        raise UserError(
            f"{path} is no Zarr array ({error}); accepted: {ACCEPTED_PATHS}."
        ) from error
    return ZarrSource(array, str(path))
