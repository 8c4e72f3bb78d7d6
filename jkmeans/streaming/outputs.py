"""Labels, distances and scores of data larger than memory, written as they are computed."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jkmeans import kmeans, processes
from jkmeans.errors import UserError
from jkmeans.sharding import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    data_parallel,
    make_mesh,
    place,
    to_host,
)
from jkmeans.sources import Source, open_source, open_weights
from jkmeans.streaming import passes, programs
from jkmeans.streaming.pipeline import (
    Chunk,
    Feeder,
    as_float,
    checked_sizes,
    computed_dtype,
    default_budget,
    refuse_not_finite,
    rows_per_chunk,
)
from jkmeans.streaming.progress import Reporter, StreamProgress
from jkmeans.whole_files import whole_file

Progress = bool | Callable[[StreamProgress], object]


class StreamPrediction(NamedTuple):
    """What the labels of a stream add up to.

    Attributes:
      counts: [k] int64, the rows of each cluster.
      inertia: the sum of the squared distances.
    """

    counts: np.ndarray
    inertia: float


def predict_stream(
    source: Any,
    centroids: Any,
    output_path: str | Path,
    *,
    distances_path: str | Path | None = None,
    mesh: Mesh | None = None,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    progress: Progress = False,
) -> StreamPrediction:
    """Writes the nearest centroid of each row to a .npy file.

    Args:
      source: anything that `jkmeans.sources.open_source` takes, [n, d].
      centroids: [k, d].
      output_path: labels, [n] int32. The file appears under its name when it is complete.
      distances_path: squared distances to the nearest centroid, [n] float32, or float64 where
        JAX has it enabled and rows or centroids need it (see `precision`); None for none.
      mesh: devices to use; None for all of them.
      memory_budget: see `fit_stream`.
      chunk_rows: see `fit_stream`.
      progress: see `fit_stream`.

    Returns:
      StreamPrediction.

    Raises:
      UserError: the source cannot be used, a file cannot be written, or the centroids do not fit.
    """
    outputs = {"output_path": output_path, "distances_path": distances_path}
    _refuse_outputs(source, {k: v for k, v in outputs.items() if v is not None})
    feeder, centroids = _prepare(source, centroids, mesh, memory_budget, chunk_rows, 8)
    n = feeder.source.n_rows
    counts, inertia = np.zeros(len(centroids), np.int64), 0.0
    with contextlib.ExitStack() as stack:
        write_labels = stack.enter_context(npy_file(output_path, (n,), np.dtype(np.int32)))
        write_distances = None
        if distances_path is not None:
            write_distances = stack.enter_context(npy_file(distances_path, (n,), centroids.dtype))
        for chunk, found in _map(feeder, _assign, centroids, "labels", progress):
            labels, distances = found
            total = float(np.sum(distances, dtype=np.float64))
            if not np.isfinite(total):
                _refuse(chunk, feeder)
            write_labels(labels)
            if write_distances is not None:
                write_distances(distances)
            counts += np.bincount(labels, minlength=len(counts))
            inertia += total
    return StreamPrediction(counts, inertia)


def transform_stream(
    source: Any,
    centroids: Any,
    output_path: str | Path,
    *,
    mesh: Mesh | None = None,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    progress: Progress = False,
) -> None:
    """Writes the Euclidean distance of each row to every centroid to a .npy file.

    Computed in float64, as by `jkmeans.sharded.distances`, which says why.

    Args:
      source: anything that `jkmeans.sources.open_source` takes, [n, d].
      centroids: [k, d].
      output_path: [n, k] float32, or float64 as in `predict_stream`. The file appears under its
        name when it is complete.
      mesh: devices to use; None for all of them.
      memory_budget: see `fit_stream`.
      chunk_rows: see `fit_stream`.
      progress: see `fit_stream`.

    Raises:
      UserError: the source cannot be used, the file cannot be written, or the centroids do not fit.
    """
    extra = 8 * len(centroids)
    _refuse_outputs(source, {"output_path": output_path})
    feeder, centroids = _prepare(source, centroids, mesh, memory_budget, chunk_rows, extra)
    shape = (feeder.source.n_rows, len(centroids))
    dtype = centroids.dtype
    function = _distances_in(dtype)
    centroids = centroids.astype(np.float64)
    with npy_file(output_path, shape, dtype) as write, jax.enable_x64(True):
        for chunk, (distances,) in _map(feeder, function, centroids, "distances", progress):
            if not np.isfinite(distances).all():
                _refuse(chunk, feeder)
            write(distances)


def score_stream(
    source: Any,
    centroids: Any,
    *,
    weights: Any = None,
    mesh: Mesh | None = None,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    progress: Progress = False,
) -> float:
    """Minus the inertia, as scikit-learn's ``KMeans.score``: more is better.

    Args:
      source: anything that `jkmeans.sources.open_source` takes, [n, d].
      centroids: [k, d].
      weights: see `fit_stream`.
      mesh: devices to use; None for all of them.
      memory_budget: see `fit_stream`.
      chunk_rows: see `fit_stream`.
      progress: see `fit_stream`.

    Raises:
      UserError: the source cannot be used, or the centroids do not fit.
    """
    feeder, centroids = _prepare(source, centroids, mesh, memory_budget, chunk_rows, 0, weights)
    with Reporter(progress, *_sizes(feeder)) as reporter:
        reporter.start("score")
        numbers, _ = passes.run_pass(
            feeder,
            programs.statistics,
            (centroids, jnp.zeros_like(centroids[0])),
            on_chunk=lambda done, snapshot: reporter.advance(done),
        )
    return -float(numbers[-1])


def _refuse_outputs(source: Any, outputs: dict[str, Any]) -> None:
    """Refuses to write over the rows that are read, among them, or twice to one file."""
    # Of a memory map, or of a file that is open already.
    given = source.path if isinstance(source, Source) else getattr(source, "filename", source)
    there = None
    if isinstance(given, str | os.PathLike):
        there = Path(given).expanduser().resolve()
    seen: dict[Path, str] = {}
    for name, output in outputs.items():
        path = Path(output).expanduser().resolve()
        if there is not None and (path == there or there in path.parents):
            raise UserError(
                f"{name} is {output}, which is {'' if path == there else 'in '}the source itself; "
                "accepted: another place."
            )
        if path in seen:
            raise UserError(f"{name} is {output}, as is {seen[path]}; accepted: another file.")
        seen[path] = name


def _prepare(
    source: Any,
    centroids: Any,
    mesh: Mesh | None,
    memory_budget: int | None,
    chunk_rows: int | None,
    row_extra_bytes: int,
    weights: Any = None,
) -> tuple[Feeder, np.ndarray]:
    source = open_source(source)
    mesh = make_mesh() if mesh is None else mesh
    memory_budget, chunk_rows = checked_sizes(memory_budget, chunk_rows)
    budget = min(processes.gather(default_budget())) if memory_budget is None else memory_budget
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(source, mesh, budget, row_extra_bytes)
    n_devices = mesh.shape[DATA_AXIS]
    weight_source = None if weights is None else open_weights(weights, source.n_rows)
    feeder = Feeder(source, mesh, -(-chunk_rows // n_devices) * n_devices, weight_source)
    centroids = np.asarray(centroids)
    if centroids.ndim != 2 or centroids.shape[1] != source.n_features or not len(centroids):
        raise UserError(
            f"the centroids are of shape {[*centroids.shape]}; accepted: [clusters, "
            f"{source.n_features}], the features of {source.name}."
        )
    if not np.isfinite(centroids).all():
        raise UserError("the centroids have NaN or infinity in them; accepted: finite ones.")
    return feeder, centroids.astype(computed_dtype(source, centroids))


def _refuse(chunk: Chunk, feeder: Feeder) -> None:
    """Says which row of a chunk is not finite: on all processes, where one of them has it."""

    def look() -> None:
        refuse_not_finite(chunk.rows, None, chunk.start + chunk.first, feeder.source.name)

    def look_at_own() -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.sum(as_float(chunk.rows) ** 2, dtype=np.float64)
        if not np.isfinite(total):
            look()

    processes.together(look_at_own)
    look()


def _sizes(feeder: Feeder) -> tuple[int, int]:
    return feeder.source.n_rows, feeder.source.n_features * feeder.dtype.itemsize


def _map(
    feeder: Feeder, function: Callable, centroids: np.ndarray, stage: str, progress: Progress
) -> Iterator[tuple[Chunk, list[np.ndarray]]]:
    """Yields each chunk with the results of its rows, in order."""
    placed = place(centroids, feeder.mesh, REPLICATED)
    in_flight: deque[tuple[Chunk, Any]] = deque()
    with Reporter(progress, *_sizes(feeder)) as reporter, feeder.chunks() as chunks:
        reporter.start(stage)

        def finish_oldest() -> tuple[Chunk, list[np.ndarray]]:
            chunk, found = in_flight.popleft()
            return chunk, [to_host(array)[: chunk.count] for array in found]

        for chunk in chunks:
            in_flight.append((chunk, _apply(chunk.x, placed, function=function, mesh=feeder.mesh)))
            if len(in_flight) == passes.IN_FLIGHT:
                done = finish_oldest()
                yield done
                reporter.advance(done[0].start + done[0].count)
                chunks.release(done[0])
        while in_flight:
            done = finish_oldest()
            yield done
            reporter.advance(done[0].start + done[0].count)


@functools.partial(jax.jit, static_argnames=("function", "mesh"))
def _apply(x, centroids, *, function, mesh):
    return data_parallel(function, mesh, (SHARDED, REPLICATED), SHARDED)(x, centroids)


def _assign(x: jax.Array, centroids: jax.Array) -> tuple[jax.Array, ...]:
    found = kmeans.assign(x, centroids)
    return found.labels, found.distances


@functools.cache
def _distances_in(dtype: np.dtype) -> Callable:
    """A function of rows and centroids, one and the same for a dtype lest it be compiled anew."""

    def distances(x: jax.Array, centroids: jax.Array) -> tuple[jax.Array, ...]:
        return (kmeans.distances_to_all(x, centroids, dtype),)

    return distances


@contextlib.contextmanager
def npy_file(
    path: str | Path, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[Callable[[np.ndarray], None]]:
    """A .npy file that is written from its start to its end, and is there when it is complete.

    Written, not mapped: the pages of a map count as memory until they reach the disk.
    """
    path = Path(path).expanduser()
    if not processes.is_first():
        yield lambda array: None
        return
    try:
        with whole_file(path) as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)

            def write(array: np.ndarray) -> None:
                try:
                    file.write(np.ascontiguousarray(array, dtype).data)
                except OSError as error:
                    raise _cannot_write(path, error) from error

            yield write
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path} ({error.strerror or error}); accepted: a file in a folder that "
        "exists and has room."
    )
