"""Columns of Parquet files, read through pyarrow, which is imported when one is opened."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans.errors import UserError
from jkmeans.sources.base import Source, check_matrix, readable

# Rows that are unpacked at a time.
_BATCH_ROWS = 2**16
# Of the pages of a row group that pyarrow has in memory at a time, as far as they go.
_PAGES_BYTES = 2**26


class ParquetSource(Source):
    """Columns of one Parquet file: numbers, or one column of vectors."""

    def __init__(self, path: Path, columns: Sequence[str] | None):
        self.name = str(path)
        self.path: Path = path
        with readable(path):
            self._opened = self._state()
            self._file = self._open()
        schema = self._file.schema_arrow
        self._columns = _data_columns(schema) if columns is None else [*columns]
        if not self._columns:
            raise UserError(
                f"of {path} no column is taken; accepted: at least one of numbers, other than "
                "the index of a data frame unless it is asked for by columns=[...]."
            )
        found = collections.Counter([*self._columns, *schema.names])
        twice = [name for name in self._columns if found[name] > 2]
        if twice:
            raise UserError(
                f"column {twice[0]!r} of {path} is there, or asked for, more than once: accepted "
                "are columns of different names."
            )
        missing = [name for name in self._columns if name not in schema.names]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}: it has {', '.join(schema.names)}."
            )
        import pyarrow.types as types

        fields = [schema.field(name).type for name in self._columns]
        self._vectors = len(fields) == 1 and (
            types.is_list(fields[0])
            or types.is_large_list(fields[0])
            or types.is_fixed_size_list(fields[0])
        )
        values = [fields[0].value_type] if self._vectors else fields
        for name, kind in zip(self._columns, values, strict=False):
            if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
                raise UserError(
                    f"column {name!r} of {path} is of type {kind}; accepted: numeric columns, "
                    "or one column of vectors; choose with columns=[...]."
                )
        dtype = np.result_type(*(kind.to_pandas_dtype() for kind in values))
        self.n_rows = int(self._file.metadata.num_rows)
        self.dtype = np.dtype(dtype)
        self.n_features = len(fields)
        if self._vectors and self.n_rows:
            self.n_features = self._width_of_first_row()
        check_matrix((self.n_rows, self.n_features), self.dtype, self.name)
        # Pieces of a row group are unpacked as they are read; the pages of the group and the rows
        # of a batch are in memory besides.
        batch = min(_BATCH_ROWS, self.n_rows) * self.n_features * self.dtype.itemsize
        groups = self._file.metadata
        pages = max(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        self.overhead_bytes = 2 * batch + min(pages, _PAGES_BYTES)
        self._first_rows = np.cumsum(
            [0, *(groups.row_group(i).num_rows for i in range(groups.num_row_groups))]
        )
        self._next_row = -1
        self._batches: Iterator[Any] = iter(())
        self._rest = np.empty((0, self.n_features), self.dtype)

    def _open(self) -> Any:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{self.name} needs the package pyarrow: pip install pyarrow."
            ) from error
        try:
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=2**20)
        except OSError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.name} is not a Parquet file, or is truncated or damaged ({error}); "
                "accepted: a whole Parquet file."
            ) from error

    def _state(self) -> tuple[int, int]:
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raises a UserError if what is read is no longer what was opened."""
        with readable(self.path):
            state = self._state()
        if state != self._opened:
            raise UserError(
                f"{self.name} changed while it was being read; accepted: a file that nothing "
                "writes to."
            )

    def _width_of_first_row(self) -> int:
        batch = next(self._file.iter_batches(batch_size=1, columns=self._columns))
        first = batch.column(0)[0].as_py()
        if first is None:
            raise UserError(f"row 0 of {self.name} is null; accepted: numbers.")
        return len(first)

    def _read(self, start: int, out: np.ndarray) -> None:
        if start != self._next_row:
            group = int(np.searchsorted(self._first_rows, start, side="right")) - 1
            groups = range(group, len(self._first_rows) - 1)
            self._batches = self._file.iter_batches(
                batch_size=_BATCH_ROWS, row_groups=list(groups), columns=self._columns
            )
            self._next_row = int(self._first_rows[group])
            self._rest = self._rest[:0]
            while self._next_row < start:
                self._advance(start - self._next_row)
        done = 0
        while done < len(out):
            rows = self._advance(len(out) - done)
            out[done : done + len(rows)] = rows
            done += len(rows)

    def _advance(self, at_most: int) -> np.ndarray:
        """The next rows of the file, at least one."""
        if not len(self._rest):
            try:
                self._rest = self._to_matrix(next(self._batches))
            except (StopIteration, OSError) as error:
                raise UserError(
                    f"{self.name} cannot be read from row {self._next_row:,} on ({error}); "
                    "accepted: a whole Parquet file."
                ) from error
        rows, self._rest = self._rest[:at_most], self._rest[at_most:]
        self._next_row += len(rows)
        return rows

    def _to_matrix(self, batch: Any) -> np.ndarray:
        for name, column in zip(self._columns, batch.columns, strict=True):
            self._refuse_rows(column.is_null(), f"column {name!r} is null", "numbers")
        if not self._vectors:
            return np.stack(
                [c.to_numpy(zero_copy_only=False) for c in batch.columns], axis=1, dtype=self.dtype
            )
        column = batch.column(0)
        if hasattr(column, "value_lengths"):  # Others are of one length by their type.
            self._refuse_rows(
                np.asarray(column.value_lengths()) != self.n_features,
                "the vectors are of another length than the first",
                f"{self.n_features} values in each row",
            )
        values = column.flatten()
        if values.null_count:
            row = int(np.asarray(values.is_null()).argmax()) // self.n_features
            raise UserError(
                f"row {self._next_row + row:,} of {self.name} holds null (counted from 0); "
                "accepted: numbers."
            )
        return values.to_numpy(zero_copy_only=False).reshape(-1, self.n_features)

    def _refuse_rows(self, bad: Any, what: str, accepted: str) -> None:
        flags = np.asarray(bad)
        if flags.any():
            raise UserError(
                f"{what} in {int(flags.sum()):,} rows of {self.name}, the first is row "
                f"{self._next_row + int(flags.argmax()):,} (counted from 0); accepted: "
                f"{accepted}."
            )


def _data_columns(schema: Any) -> list[str]:
    """All columns but those that pandas has written as the index of a data frame."""
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    return [name for name in schema.names if name not in index]
