"""Rows that are in files: the one seam between the estimators and `jkmeans.streaming`."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jkmeans.errors import UserError


def is_source(X: Any) -> bool:
    """Whether X is a path or a `jkmeans.sources.Source` rather than an array."""
    # Of a module that was never imported there are no objects.
    sources = sys.modules.get("jkmeans.sources")
    return isinstance(X, str | os.PathLike) or (
        sources is not None and isinstance(X, sources.Source)
    )


@contextlib.contextmanager
def opened(X: Any, centroids: Any = None) -> Iterator[tuple[Any, Any]]:
    """The streaming module and the source of X, in a context of the precision they need.

    Args:
      X: a path or a source.
      centroids: [k, d], of the features that X must have; None in a fit.

    Raises:
      ValueError: what is a UserError in the commands is a ValueError here.
    """
    from jkmeans import sources, streaming

    try:
        source = sources.open_source(X)
        if centroids is not None and centroids.shape[1] != source.n_features:
            raise UserError(
                f"{source.name} has {source.n_features} features, but {centroids.shape[1]} are "
                "expected; accepted: what the estimator was fitted on."
            )
        with streaming.precision(source, centroids):
            yield streaming, source
    except UserError as error:
        raise ValueError(str(error)) from error


def written(write: Callable[[Path], Any]) -> np.ndarray:
    """The array that a function writes to a .npy file, read back and the file removed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        write(path)
        return np.load(path)
