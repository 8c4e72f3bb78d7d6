"""The job from the shell: cluster a file, write what came out, go on where it stopped.

`cluster` is the one way in. Data that fits into memory lies on the devices and Lloyd's algorithm
runs in programs of some iterations each, between which the job reports, can stop, and is saved.
Larger data is streamed by `jkmeans.streaming`, which does the same between its chunks.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jkmeans import configuration, datasets, kmeans, metrics, processes, selection, sharded
from jkmeans.configuration import (
    Config,
    Field,
    boolean,
    choice,
    convert_fields,
    integer,
    integers,
    nest,
    number,
    text,
)
from jkmeans.errors import UserError, overflow_sentence
from jkmeans.interruption import Interruption
from jkmeans.recorder import format_duration, results_table
from jkmeans.sharding import REPLICATED, device_dtype, make_mesh, to_host
from jkmeans.sources import Source, open_source
from jkmeans.streaming import StreamProgress, fit_stream, predict_stream
from jkmeans.streaming.pipeline import refuse_not_finite
from jkmeans.training import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    REPORT_FOLDER,
)
from jkmeans.workdir import device_room, only_process_in, versions, write_json

SUMMARY_FILE = "summary.json"
SWEEP_FILE = "sweep.json"
STATE_FILE = "state.npz"
NAMED = tuple(name for name in datasets.NAMES if name != "npy")
AUTO = "auto"

_SAVE_SECONDS = 30.0
_LINE_SECONDS = 10.0
_PIECE_BYTES = 2**25
_OUTPUTS = ("centroids", "labels", "distances", "sizes")


def _convert_n_clusters(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    if value == AUTO:
        return AUTO
    if not 1 <= int(value) < 2**31:
        raise ValueError
    return str(int(value))


def _convert_texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or any(not isinstance(v, str) for v in value):
        raise TypeError
    return tuple(value)


FIELDS: dict[str, Field] = {
    "seed": integer(0, "the root of all random keys"),
    "n_devices": integer(0, "devices of the mesh; 0 for all"),
    "input": text(f"{', '.join(NAMED)}, or a .npy file, a folder of them, .zarr or Parquet"),
    "columns": Field(
        _convert_texts,
        "a tuple of names",
        "columns of Parquet; () for all but the index of a data frame",
    ),
    "memory_mebibytes": integer(0, "data above this is streamed; 0 for half of what is free"),
    "n_clusters": Field(
        _convert_n_clusters, "an integer of at least 1, or auto", "K, or auto for a sweep"
    ),
    "init": choice(tuple(kmeans.INITIALIZATIONS), "how the first centroids are chosen"),
    "n_init": integer(1, "restarts, of which the one of least inertia is kept"),
    "max_iter": integer(1, "Lloyd iterations of a restart, at most"),
    "tol": number("a restart ends at this squared shift, in mean variances of the features"),
    "empty": choice(kmeans.EMPTY_POLICIES, "what becomes of an empty cluster"),
    "deterministic": boolean("whether 1, 2, 4 and 8 devices give the same bits, at some cost"),
    "iterations_per_program": integer(1, "iterations between two reports, at most"),
    "sweep.n_clusters": integers("values of K that auto tries"),
    "sweep.n_init": integer(1, "restarts of every fit of the sweep"),
    "sweep.n_refits": integer(2, "fits to bootstrap samples, for the stability"),
    "sweep.sample_size": integer(0, "rows that the sweep looks at; 0 for all"),
    "report.pictures": boolean("whether to draw them at the end"),
    "report.sample_size": integer(2, "rows for silhouettes and the map", most=20_000),
}

_RUNTIME = (
    "n_devices",
    "input",  # The data itself is compared with what the workdir remembers of it.
    "memory_mebibytes",
    "report.",
)
"""Fields that may differ when a job goes on."""


def validate(config: Config) -> Config:
    """The config with every value in its proper type and the path absolute.

    Raises:
      UserError: a field is unknown, missing, of a wrong type or value, or contradicts another.
    """
    values = convert_fields(config, FIELDS)
    if not values["input"]:
        raise UserError(f"config.input is ''; accepted: {FIELDS['input'].meaning}")
    if values["n_clusters"] == AUTO:
        ks = values["sweep.n_clusters"]
        if not ks or min(ks) < 2:
            raise UserError(
                f"config.sweep.n_clusters is {ks}; accepted: at least one integer, of at least 2"
            )
    if values["columns"] and values["input"] in NAMED:
        raise UserError(
            f"config.columns is {values['columns']}, but input is {values['input']!r}; accepted: "
            "() for all but Parquet"
        )
    if values["input"] not in NAMED:
        values["input"] = str(Path(values["input"]).expanduser().absolute())
    return nest(values)


def cluster(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Clusters a file or a named data set with k-means, or goes on where that stopped.

    Args:
      config: complete, as ``configs/cluster.py``; see `FIELDS`.
      workdir: receives ``centroids.npy`` [k, d], ``labels.npy`` [n] int32, ``distances.npy`` [n]
        (squared Euclidean distances to the centroids), ``sizes.npy`` [k] int64, ``summary.json``,
        for n_clusters = auto also ``sweep.json``, and ``report/*.png``. Where it holds an
        unfinished job of the same config, that goes on; a finished one is only reported.

    Returns:
      What is in ``summary.json``: ``n_rows``, ``n_features``, ``n_clusters``, ``inertia``,
      ``n_iter``, ``converged``, ``n_empty``, ``smallest`` and ``largest`` cluster, ``silhouette``
      of a sample, ``seconds``, where classes are known ``acc``, ``nmi``, ``ari``, ``purity``, and
      for n_clusters = auto the ``suggestion`` with its reason.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      Interrupted: SIGTERM or Ctrl-C came; everything up to there is saved.
    """
    config = validate(config)
    processes.agree("the config", config.to_dict())
    workdir = Path(workdir).absolute()
    data = processes.together(lambda: _open(config))
    ks = config.sweep.n_clusters if config.n_clusters == AUTO else (int(config.n_clusters),)
    if max(ks) > data.source.n_rows:
        field = "sweep.n_clusters" if config.n_clusters == AUTO else "n_clusters"
        raise UserError(
            f"config.{field} is {max(ks)}, but {data.source.name} has {data.source.n_rows:,} rows; "
            f"accepted: 1 to {data.source.n_rows:,}"
        )
    if processes.count() > data.source.n_rows:
        raise UserError(
            f"there are {processes.count()} processes for the {data.source.n_rows:,} rows of "
            f"{data.source.name}; accepted: up to one process a row"
        )
    job = _Job(config, workdir, data, make_mesh(config.n_devices))
    processes.agree("the data", {"checksum": job.fingerprint})
    processes.on_first(lambda: _claim(workdir, config))
    processes.same_folder(workdir)
    with only_process_in(workdir):
        return job.execute()


class _Data(NamedTuple):
    """What is clustered.

    Attributes:
      name: of the data set, or of the file.
      source: its rows.
      truth: [n] int32 classes, for metrics only; None where they are not known.
      shape: of an example that is an image; None otherwise.
    """

    name: str
    source: Source
    truth: np.ndarray | None
    shape: tuple[int, ...] | None


def _open(config: Config) -> _Data:
    if config.input not in NAMED:
        return _Data(
            Path(config.input).name, open_source(config.input, config.columns or None), None, None
        )
    dataset = datasets.load(config.input)
    rows = dataset.examples.reshape(dataset.n_examples, -1) * np.float32(dataset.scale)
    source = open_source(rows)
    source.name = dataset.name
    return _Data(dataset.name, source, dataset.labels, dataset.example_shape)


class _State:
    """What a job has found so far, and needs to go on: arrays in one file.

    Attributes:
      restart: restarts that are finished.
      n_iter: iterations of the one that runs.
      centroids: [k, d] of the one that runs; None before its initialisation.
      best: [k, d] of the finished restart of least inertia; None before the first.
      best_inertia: its inertia.
      best_n_iter: its iterations.
      best_converged: whether it came to rest.
      history: (restart, iteration, inertia), in the order of time.
      seconds: spent by all processes that ran this job.
    """

    def __init__(self):
        self.restart = 0
        self.n_iter = 0
        self.centroids: np.ndarray | None = None
        self.best: np.ndarray | None = None
        self.best_inertia = float("inf")
        self.best_n_iter = 0
        self.best_converged = False
        self.history: list[tuple[int, int, float]] = []
        self.seconds = 0.0

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes the state, under its name only when it is complete."""
        scalars = (
            self.restart, self.n_iter, self.best_inertia, self.best_n_iter, self.best_converged,
            self.seconds,
        )  # fmt: skip
        arrays = {
            "scalars": np.asarray(scalars, np.float64),
            "history": np.asarray(self.history, np.float64).reshape(-1, 3),
            "fingerprint": np.asarray(fingerprint),
        }
        arrays |= {
            name: array
            for name in ("centroids", "best")
            if (array := getattr(self, name)) is not None
        }
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path, fingerprint: str) -> _State:
        """The state in a file; a new one where there is no file.

        Raises:
          UserError: the file is damaged, or of other data.
        """
        state = _State()
        if not path.exists():
            return state
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            restart, n_iter, inertia, best_n_iter, converged, seconds = found["scalars"].tolist()
            history = [(int(r), int(i), float(v)) for r, i, v in found["history"]]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is damaged ({error}); accepted: the state that the job wrote; delete it "
                "to start anew"
            ) from error
        if str(found["fingerprint"]) != fingerprint:
            raise _other_data(path.parent)
        state.restart, state.n_iter, state.best_n_iter = int(restart), int(n_iter), int(best_n_iter)
        state.best_inertia, state.best_converged = inertia, bool(converged)
        state.seconds, state.history = seconds, history
        state.centroids, state.best = found.get("centroids"), found.get("best")
        return state


class _Found(NamedTuple):
    """What a fit ends with; labels and distances are in their files already.

    Attributes:
      centroids: [k, d].
      sizes: [k] int64.
      inertia: in float64.
      n_iter: of the best restart.
      converged: whether it came to rest.
      history: (restart, iteration, inertia); empty for streamed data.
      seconds: of initialisation, iterations and the last assignment.
      labels: [n]; None where they are in their file only.
    """

    centroids: np.ndarray
    sizes: np.ndarray
    inertia: float
    n_iter: int
    converged: bool
    history: list[tuple[int, int, float]]
    seconds: float
    labels: np.ndarray | None = None


class _OwnRows:
    """The rows of a source, of which those on this process's devices are in memory, checked.

    As much of an array [n, d] as `sharded.place` and a sample ask for; other rows are read when
    they are asked for.

    Args:
      source: of the rows.
      mesh: over whose devices they are to be cut.
      multiple_of: what the number of rows is padded to a multiple of, besides the devices.
    """

    def __init__(self, source: Source, mesh, multiple_of: int):
        self._source = source
        self.shape = (source.n_rows, source.n_features)
        unit = math.lcm(mesh.size, multiple_of)
        n_each = -(-source.n_rows // unit) * unit // mesh.size
        own = [
            i
            for i, device in enumerate(mesh.devices.flat)
            if device.process_index == processes.number()
        ]
        self._first = min(own[0] * n_each, source.n_rows)
        last = min((own[-1] + 1) * n_each, source.n_rows)
        self._rows = self._read(self._first, last)
        self.dtype = self._rows.dtype
        source.check_unchanged()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if not isinstance(index, slice):
            return _checked(_rows_of(self._source, index), self._source.name)
        start, stop, _ = index.indices(len(self))
        first = start - self._first
        if first >= 0 and stop - self._first <= len(self._rows):
            return self._rows[first : stop - self._first]
        return self._read(start, stop)

    def astype(self, dtype: np.dtype, copy: bool = False) -> _OwnRows:
        """The rows themselves, which have the type for the devices already."""
        assert dtype == self.dtype
        assert not copy
        return self

    def _read(self, start: int, stop: int) -> np.ndarray:
        rows = self._source.read(start, stop)
        # Numbered as in the file.
        refuse_not_finite(rows, None, start, self._source.name, only_if_any=True)
        return _checked(rows, self._source.name)


def _checked(rows: np.ndarray, name: str) -> np.ndarray:
    """Rows in the type for the devices; none of them NaN or infinite."""
    if rows.dtype != np.float64:
        rows = rows.astype(device_dtype(rows.dtype), copy=False)
    return datasets.check_examples(rows, name=name) if len(rows) else rows


class _Job:
    """One job, of one process or several."""

    def __init__(self, config: Config, workdir: Path, data: _Data, mesh):
        self.config = config
        self.workdir = workdir
        self.data = data
        self.mesh = mesh
        self.root_key = jax.random.key(config.seed)
        self.compiled = False
        # Before the workdir is touched: a file that cannot be clustered leaves no trace.
        self.rows = processes.together(self._read) if self._fits_into_memory() else None
        if self.rows is None and config.empty != "farthest":
            raise UserError(
                f"config.empty is {config.empty!r}, but {data.source.name} is streamed; accepted: "
                "'farthest', or a larger memory_mebibytes"
            )
        if self.rows is None and config.deterministic:
            raise UserError(
                f"config.deterministic is True, but {data.source.name} is streamed; accepted: "
                "False, or a larger memory_mebibytes"
            )
        if config.deterministic and (sharded.BLOCKS // 2) % mesh.size:
            raise UserError(
                f"config.deterministic is True, but there are {mesh.size} devices; accepted: 1, 2, "
                "4 or 8 of them"
            )
        self.fingerprint = data.source.fingerprint()

    def _fits_into_memory(self) -> bool:
        source = self.data.source
        # float32 on the devices, and labels, distances and the like of every row.
        row_bytes = source.n_features * max(4, source.dtype.itemsize) + 64
        needed = source.n_rows * row_bytes + source.overhead_bytes
        if self.config.memory_mebibytes:
            return needed <= self.config.memory_mebibytes * 2**20
        return needed <= self.mesh.size * device_room(self.mesh)

    def _read(self) -> Any:
        """All rows, in memory, checked; of several processes, each has those of its devices."""
        source = self.data.source
        if processes.count() > 1:
            return _OwnRows(source, self.mesh, sharded.BLOCKS if self.config.deterministic else 1)
        rows = source.read(0, source.n_rows)
        source.check_unchanged()
        return _checked(rows, source.name)

    def execute(self) -> dict[str, Any]:
        """Does what is left to do."""
        summary = self._finished()
        if summary is not None:
            processes.tell(f"{self.workdir} holds a finished job of this config; nothing to do")
            results_table(_headline(summary), f"Results in {self.workdir}")
            return summary
        with Interruption() as interruption, _Progress() as progress:
            self.interruption, self.progress = interruption, progress
            source = self.data.source
            where = "streamed to" if self.rows is None else "on"
            progress.say(
                f"{self.data.name}: {source.n_rows:,} × {source.n_features:,} {source.dtype}, "
                f"{where} {self.mesh.size} × {self.mesh.devices.flat[0].platform}"
            )
            sweep = self._sweep() if self.config.n_clusters == AUTO else None
            k = int(self.config.n_clusters) if sweep is None else int(sweep["suggestion"])
            found = self._fit_in_memory(k) if self.rows is not None else self._fit_stream(k)
            summary = self._finish(found, sweep)
        results_table(_headline(summary), f"Results in {self.workdir}")
        return summary

    def _finished(self) -> dict[str, Any] | None:
        return processes.on_first(self._read_summary)

    def _read_summary(self) -> dict[str, Any] | None:
        path = self.workdir / SUMMARY_FILE
        if not path.exists():
            return None
        try:
            summary = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); delete it to do the job anew") from error
        if summary.get("fingerprint") != self.fingerprint:
            raise _other_data(self.workdir)
        missing = [n for n in _OUTPUTS if not (self.workdir / f"{n}.npy").exists()]
        return None if missing else summary

    # The number of clusters

    def _sweep(self) -> dict[str, Any]:
        """Judges every K that is not judged yet; the sweep as JSON holds it."""
        settings = self.config.sweep
        key = jax.random.fold_in(self.root_key, 1)
        sample = self._sample(key, settings.sample_size)[1]
        ks = [k for k in sorted(set(settings.n_clusters)) if k < len(sample)]
        if len(sample) < 3:
            raise UserError(
                f"config.n_clusters is 'auto', but the sample has {len(sample):,} rows; accepted: "
                "a number of clusters, or at least 3 rows (and sweep.sample_size 0 or at least 3)"
            )
        if not ks:
            raise UserError(
                f"config.sweep.n_clusters is {tuple(settings.n_clusters)}, but the sample has "
                f"{len(sample):,} rows; accepted: 2 to {len(sample) - 1:,}"
            )
        steps = selection.Sweep(key, sample, ks, n_init=settings.n_init, n_refits=settings.n_refits)
        path = self.workdir / SWEEP_FILE
        found = processes.on_first(lambda: [*_read_sweep(path, self.fingerprint).items()])
        done = {int(k): tuple(values) for k, values in found}
        # Time is told from the second K on: the first one compiles.
        started, timed = 0.0, 0
        for k in ks:
            if k in done:
                continue
            self._stop_if_asked()
            one = self._compute(lambda k=k: steps.judge(k))
            # Hosts of different kinds round differently, and must choose the same K.
            done[k] = tuple(processes.share([one.inertia, one.silhouette, one.stability]))
            left = sum(other for other in ks if other not in done)
            remaining = ""
            if not started:
                started = time.monotonic()
            elif left:
                timed += k
                seconds = (time.monotonic() - started) / timed * left
                remaining = f", about {format_duration(seconds)} left"
            self.progress.update(
                f"sweep: K = {k}, inertia {one.inertia:.5g}, silhouette {one.silhouette:.3f}, "
                f"stability {one.stability:.3f}{remaining}"
            )
            if processes.is_first():
                write_json(path, self._sweep_record(done, len(sample)))
        record = self._sweep_record(done, len(sample))
        if processes.is_first():
            write_json(path, record)
        self.progress.say(record["reason"])
        return record

    def _sweep_record(self, done: dict[int, tuple], n_rows: int) -> dict[str, Any]:
        ks = sorted(done)
        columns = np.asarray([done[k] for k in ks])
        suggestion, reason = selection.suggest(np.asarray(ks), columns[:, 1], columns[:, 2])
        return {
            "suggestion": suggestion,
            "reason": reason,
            "n_rows": n_rows,
            "n_clusters": ks,
            "inertia": columns[:, 0].tolist(),
            "silhouette": columns[:, 1].tolist(),
            "stability": columns[:, 2].tolist(),
            "fingerprint": self.fingerprint,
        }

    def _sample(self, key: jax.Array, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of different rows, rising, [s], and these rows in float32 or float64, [s, d]."""
        source = self.data.source
        numbers = np.arange(source.n_rows)
        if 0 < size < source.n_rows:
            numbers = selection.sample_rows(key, source.n_rows, size)
        if self.rows is not None:
            rows = self.rows[numbers]
        else:
            self.progress.say(f"reading {len(numbers):,} rows of {source.name}")
            rows = self._compute(lambda: _rows_of(source, numbers))
        if rows.dtype != np.float64:
            rows = rows.astype(np.float32, copy=False)
        return numbers, datasets.check_examples(rows, name=f"a sample of {source.name}")

    # The fit

    def _fit_stream(self, k: int) -> _Found:
        config, source = self.config, self.data.source
        budget = config.memory_mebibytes * 2**20 or None
        started = time.monotonic()
        result = fit_stream(
            jax.random.fold_in(self.root_key, 2),
            source,
            k,
            init=config.init,
            n_init=config.n_init,
            max_iter=config.max_iter,
            tol=config.tol,
            mesh=self.mesh,
            memory_budget=budget,
            checkpoint_folder=self.workdir / CHECKPOINT_FOLDER,
            progress=lambda now: self.progress.update(self._stream_line(now), often=True),
        )
        self._stop_if_asked()

        def tell(now: StreamProgress) -> None:
            self.progress.update(self._stream_line(now), often=True)
            self._stop_if_asked()

        predicted = predict_stream(
            source,
            result.centroids,
            self.workdir / "labels.npy",
            distances_path=self.workdir / "distances.npy",
            mesh=self.mesh,
            memory_budget=budget,
            progress=tell,
        )
        _refuse_overflow(predicted.inertia, result.centroids.dtype)
        return _Found(
            centroids=result.centroids,
            sizes=predicted.counts,
            inertia=predicted.inertia,
            n_iter=result.n_iter,
            converged=result.n_iter < config.max_iter,
            history=[],
            seconds=time.monotonic() - started,
        )

    def _stream_line(self, now: StreamProgress) -> str:
        line = str(now)
        iteration = now.stage.rpartition("iteration ")[2]
        if iteration.isdecimal() and now.rows_per_second:
            left = (self.config.max_iter - int(iteration)) * now.n_rows / now.rows_per_second
            line += f" of this pass; at most {format_duration(left)} after it"
        return line

    def _fit_in_memory(self, k: int) -> _Found:
        config = self.config
        state = processes.together(lambda: _State.load(self.workdir / STATE_FILE, self.fingerprint))
        processes.agree("the state", {"iterations": [state.restart, state.n_iter]})
        if state.restart or state.n_iter:
            self.progress.say(
                f"going on after iteration {state.n_iter} of restart {state.restart + 1}"
                if state.restart < config.n_init
                else "going on after the last iteration"
            )
        with sharded.precision(self.rows):
            blocks = sharded.BLOCKS if config.deterministic else 1
            rows = sharded.place(self.rows, mesh=self.mesh, multiple_of=blocks)
        tol = 0.0
        if config.tol > 0:
            tol = config.tol * float(self._run(_mean_variance, rows, rows.n_rows))
        saved = time.monotonic()
        while state.restart < config.n_init:
            started = time.monotonic()
            if state.centroids is None:
                self.progress.update(f"choosing the first {k:,} centroids by {config.init}")
                key = jax.random.fold_in(self.root_key, 2 + state.restart)
                chosen = self._run(_initialize, rows, key, n_clusters=k, init=config.init)
                state.centroids = np.asarray(chosen)
            asked = min(
                max(1, state.n_iter), config.iterations_per_program, config.max_iter - state.n_iter
            )
            iterating = time.monotonic()
            found = self._run(
                _iterate, rows, state.centroids, asked, tol, empty=config.empty,
                algorithm="lloyd" if config.deterministic else "auto", out_specs=_ITERATED,
            )  # fmt: skip
            done, inertia = int(found.n_iter), float(found.inertia)
            state.centroids = np.asarray(found.centroids)
            state.n_iter += done
            state.history.append((state.restart, state.n_iter, inertia))
            _refuse_overflow(inertia, state.centroids.dtype)
            self._tell(state, inertia, done, time.monotonic() - iterating)
            converged = done < asked
            if converged or state.n_iter >= config.max_iter:
                if inertia < state.best_inertia or state.best is None:
                    state.best, state.best_inertia = state.centroids, inertia
                    state.best_n_iter, state.best_converged = state.n_iter, converged
                state.restart, state.n_iter, state.centroids = state.restart + 1, 0, None
            state.seconds += time.monotonic() - started
            stopping = self.interruption.agreed()
            if stopping or time.monotonic() - saved > _SAVE_SECONDS:
                self._save(state)
                saved = time.monotonic()
            if stopping:
                self._stop()
        self._save(state)
        self._stop_if_asked()
        started = time.monotonic()
        final = self._run(_assign, rows, state.best, out_specs=sharded.RESULT_SPECS)
        labels = to_host(final.labels)[: rows.n_rows]
        distances = to_host(final.distances)[: rows.n_rows]
        _write_npy(self.workdir / "labels.npy", labels)
        _write_npy(self.workdir / "distances.npy", distances)
        assert state.best is not None
        return _Found(
            centroids=state.best,
            sizes=np.bincount(labels, minlength=k).astype(np.int64),
            inertia=float(np.sum(distances, dtype=np.float64)),
            n_iter=state.best_n_iter,
            converged=state.best_converged,
            history=state.history,
            seconds=state.seconds + time.monotonic() - started,
            labels=labels,
        )

    def _tell(self, state: _State, inertia: float, done: int, seconds: float) -> None:
        """Says where the fit is; of the first program, which was compiled, no speed."""
        config = self.config
        left = (
            config.max_iter - state.n_iter + config.max_iter * (config.n_init - 1 - state.restart)
        )
        restart = f"restart {state.restart + 1} of {config.n_init}, " if config.n_init > 1 else ""
        speed = (
            f", {done * self.data.source.n_rows / seconds:,.0f} rows/s, at most "
            f"{format_duration(left * seconds / done)} left"
        )
        self.progress.update(
            f"{restart}iteration {state.n_iter} of at most {config.max_iter}, inertia "
            f"{inertia:.6g}{speed if self.compiled else ''}"
        )
        self.compiled = True

    # The end

    def _finish(self, found: _Found, sweep: dict[str, Any] | None) -> dict[str, Any]:
        k = len(found.sizes)
        _write_npy(self.workdir / "centroids.npy", found.centroids)
        _write_npy(self.workdir / "sizes.npy", found.sizes)
        labels = found.labels
        if labels is None:
            # Of a file that another host has just written: when process 0 says it is there.
            processes.gather("written")
            labels = np.load(self.workdir / "labels.npy", mmap_mode="r")
        key = jax.random.fold_in(self.root_key, 0)
        numbers, rows = self._sample(key, self.config.report.sample_size)
        sample_labels = np.asarray(labels[numbers])
        # Around their mean, because JAX may take float64 as float32.
        centered = rows - rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
        silhouettes = self._compute(
            lambda: np.asarray(selection.silhouette_samples(centered, sample_labels, k))
        )
        summary: dict[str, Any] = {
            "input": self.data.name,
            "n_rows": len(labels),
            "n_features": rows.shape[1],
            "n_clusters": k,
            "inertia": found.inertia,
            "n_iter": found.n_iter,
            "converged": found.converged,
            "n_empty": int((found.sizes == 0).sum()),
            "smallest": int(found.sizes.min()),
            "largest": int(found.sizes.max()),
            "silhouette": _finite(float(np.mean(silhouettes))),
            "silhouette_rows": len(rows),
        }
        if self.data.truth is not None:
            summary |= metrics.summarize(self.data.truth, np.asarray(labels))
        if sweep is not None:
            summary |= {"suggestion": sweep["suggestion"], "reason": sweep["reason"]}
        summary["seconds"] = round(found.seconds, 3)
        summary["history"] = [
            {"restart": r, "iteration": i, "inertia": v} for r, i, v in found.history
        ]
        summary["fingerprint"] = self.fingerprint
        summary["versions"] = versions("jax", "jaxlib", "numpy")
        if self.config.report.pictures and processes.is_first():
            self.progress.update("drawing")
            from jkmeans.report.kmeans import write_report

            write_report(
                self.workdir / REPORT_FOLDER,
                rows=rows,
                labels=sample_labels,
                silhouettes=silhouettes,
                centroids=found.centroids,
                sizes=found.sizes,
                history=found.history,
                sweep=sweep,
                image_shape=self.data.shape,
                title=f"{self.data.name}, K = {k:,}",
            )
        if summary["n_empty"]:
            self.progress.say(
                f"{summary['n_empty']:,} of {k:,} clusters are empty: there are fewer different "
                "rows than clusters, or config.empty is 'keep'"
            )
        # Last: it says that all the rest is there.
        if processes.is_first():
            write_json(self.workdir / SUMMARY_FILE, summary)
        return summary

    # Computing with an open ear

    def _run(self, function: Callable, rows: sharded.Rows, *arguments, **options) -> Any:
        options.setdefault("out_specs", REPLICATED)
        options |= {"in_blocks": True} if self.config.deterministic else {}

        def call():
            with sharded.precision(self.rows):
                return sharded.run(function, rows, *arguments, **options)

        return self._compute(call)

    def _compute(self, call: Callable[[], Any]) -> Any:
        """Calls in a thread, so that this one hears signals, which a blocked one does not."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(call)
            while True:
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    return future.result(timeout=0.1)
                if self.interruption.announced():
                    self.progress.say("stopping at the next safe place; once more to stop at once")

    def _save(self, state: _State) -> None:
        if processes.is_first():
            state.save(self.workdir / STATE_FILE, self.fingerprint)

    def _stop_if_asked(self) -> None:
        if self.interruption.agreed():
            self._stop()

    def _stop(self) -> None:
        # Not before process 0 has saved what all have found.
        processes.gather("saved")
        self.progress.say("saved; the same command goes on")
        self.interruption.leave()


class _Progress:
    """What the job does, on stderr: a line that is rewritten on a terminal, lines elsewhere."""

    def __init__(self):
        from rich.console import Console

        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self._line_at = -_LINE_SECONDS
        self._status = None
        self._console.quiet = not processes.is_first()
        if self._console.is_terminal and processes.is_first():
            self._status = self._console.status("")

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self._console.print(sentence)

    def update(self, sentence: str, often: bool = False) -> None:
        """Where the job is now; of what comes ``often``, a log gets a line now and then."""
        if self._status is None:
            now = time.monotonic()
            if not often or now - self._line_at >= _LINE_SECONDS:
                self._line_at = now
                self._console.print(sentence)
        else:
            from rich.text import Text

            self._status.update(Text(sentence))


# Functions of the core on placed rows, as `jkmeans.sharded.run` takes them.

_ITERATED = sharded.RESULT_SPECS


def _mean_variance(x, weights, n_rows, *, axis_name):
    """The mean variance of the features: [] float."""
    del weights
    return sharded.mean_variance(x, n_rows, axis_name)


def _initialize(x, weights, key, *, n_clusters, init, axis_name):
    initialize = kmeans.INITIALIZATIONS[init]
    return initialize(key, x, n_clusters, weights=weights, axis_name=axis_name)


def _iterate(x, weights, centroids, max_iter, tol, *, empty, algorithm, axis_name):
    return kmeans.lloyd(
        x,
        centroids,
        weights=weights,
        max_iter=max_iter,
        tol=tol,
        empty=empty,
        algorithm=algorithm,
        axis_name=axis_name,
    )


def _assign(x, weights, centroids, *, axis_name):
    return kmeans.lloyd(
        x, centroids, weights=weights, max_iter=0, algorithm="lloyd", axis_name=axis_name
    )


# Files


def _rows_of(source: Source, numbers: np.ndarray) -> np.ndarray:
    """Some rows of a source, read in one pass from its start: [s, d]."""
    piece_rows = max(1, _PIECE_BYTES // (source.n_features * source.dtype.itemsize))
    found = []
    for start in range(0, int(numbers[-1]) + 1, piece_rows):
        stop = min(start + piece_rows, source.n_rows)
        first, last = np.searchsorted(numbers, (start, stop))
        # Every piece, because Parquet and Zarr are quick only in their own order.
        found.append(source.read(start, stop)[numbers[first:last] - start])
    return np.concatenate(found)


def _refuse_overflow(inertia: float, dtype: Any) -> None:
    if sentence := overflow_sentence(inertia, dtype):
        raise UserError(sentence)


def _claim(workdir: Path, config: Config) -> None:
    """Writes the config into a new workdir, or checks that the one there is the same."""
    path = workdir / CONFIG_FILE
    try:
        if path.exists():
            try:
                there = nest(convert_fields(json.loads(path.read_text()), FIELDS))
            except (ValueError, AttributeError, UserError) as error:
                raise UserError(
                    f"{path} is not the config of a job of this version of jkmeans ({error}); "
                    "accepted: another --workdir"
                ) from error
            different = configuration.differences(config, there, FIELDS, _RUNTIME)
            if different:
                more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
                raise UserError(
                    f"{workdir} holds a job with another config: {different[0]}{more}; accepted: "
                    "the same config, or another --workdir"
                )
            return
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, configuration.to_json(config))
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error


def _read_sweep(path: Path, fingerprint: str) -> dict[int, tuple]:
    """Inertia, silhouette and stability of every K that an earlier process judged."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        if record["fingerprint"] != fingerprint:
            raise _other_data(path.parent)
        columns = (
            [math.nan if value is None else value for value in record[name]]
            for name in ("inertia", "silhouette", "stability")
        )
        return dict(zip(record["n_clusters"], zip(*columns, strict=True), strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to sweep anew") from error


def _other_data(workdir: Path) -> UserError:
    return UserError(
        f"{workdir} holds a job on other data; accepted: the same data, or another --workdir"
    )


def _write_npy(path: Path, array: np.ndarray) -> None:
    if not processes.is_first():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)


def _headline(summary: dict[str, Any]) -> dict[str, Any]:
    hidden = ("history", "fingerprint", "versions", "reason")
    return {
        name: "none" if value is None else value
        for name, value in summary.items()
        if name not in hidden
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
