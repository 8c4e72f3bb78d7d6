"""Predicting for a file or a folder of files, by one process or by many on Ray."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans.blocks import block_rows
from jkmeans.dispatch import engine, output
from jkmeans.dispatch.inputs import InputFile, Reader, cut, find_files, inspect
from jkmeans.dispatch.master import Answer, Lease, Master, Part, Shard, Status
from jkmeans.dispatch.models import Predictor, load_predictor
from jkmeans.dispatch.worker import work_on
from jkmeans.errors import UserError
from jkmeans.interruption import Interruption
from jkmeans.ray_session import ACCEPTED_GPUS, gpus_of_worker
from jkmeans.recorder import results_table
from jkmeans.streaming.progress import Reporter
from jkmeans.telling import remark
from jkmeans.workdir import only_process_in

ENGINES = ("process", "ray")
"""Who may compute."""

_SHARD_BYTES = 2**26
_LISTED = 10
_HERE = "this process"
_HOW = engine.Options()


def predict_files(
    workdir: str | os.PathLike[str],
    input_path: str,
    output_path: str,
    *,
    checkpoint: str = "latest",
    embeddings: bool = False,
    merge: bool = False,
    engine_name: str = "process",
    options: engine.Options = _HOW,
    shard_rows: int = 0,
    n_devices: int = 0,
    watch=lambda status: None,
) -> dict[str, Any]:
    """Predicts for every row of every file and writes each result once; goes on where that stopped.

    Args:
      workdir: of experiments.train or experiments.cluster.
      input_path: a .npy or Parquet file or a Zarr array, or a folder of those; rows are examples
        of the model, in the units of the training data.
      output_path: a folder; see `jkmeans.dispatch.output` for what is in it. ``labels`` [n] int32,
        ``distances`` [n] (squared, to the nearest centroid) and, if asked for, ``embeddings``
        [n, p] float32.
      checkpoint: ``latest``, ``best`` or a position.
      embeddings: whether to write them.
      merge: whether to write each column into one file too, once all files are done.
      engine_name: one of `ENGINES`: ``process`` for this one alone, ``ray`` for workers on Ray.
      options: for Ray.
      shard_rows: rows that are computed and written at a time; a multiple of
        `jkmeans.blocks.block_rows`; 0 for about 64 MiB.
      n_devices: of the mesh of this process; 0 for all. Workers on Ray have one device each.
      watch: called with the status of the master, several times a second.

    Returns:
      The manifest.

    Raises:
      UserError: nothing can be done with what was given; or some files could not be used: the
        others are done, and the sentence and the manifest name these.
      Interrupted: Ctrl-C or SIGTERM came; what is done is in the journal.
    """
    if engine_name not in ENGINES:
        raise UserError(f"engine_name is {engine_name!r}; accepted: {', '.join(ENGINES)}")
    if engine_name == "ray" and not 1 <= options.lease_seconds < float("inf"):
        raise UserError(
            f"--lease_seconds is {options.lease_seconds}; accepted: a number of seconds from 1 on"
        )
    if not options.gpus_per_worker < 0:
        try:
            options = options._replace(gpus_per_worker=gpus_of_worker(options.gpus_per_worker))
        except (TypeError, ValueError):
            raise UserError(
                f"--gpus_per_worker is {options.gpus_per_worker!r}; accepted: -1, {ACCEPTED_GPUS}"
            ) from None
    if jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} processes, but one alone predicts for a folder, "
            "or workers on Ray; accepted: --processes=1, with --engine=ray for many"
        )
    paths = find_files(input_path)
    folder = Path(output_path).expanduser().absolute()
    if folder.is_file():
        raise UserError(f"--output {output_path} is a file; accepted: a folder, new or of this "
                        "command, or with one .npy file a name that ends in .npz")  # fmt: skip
    with Interruption() as interruption:
        predictor = load_predictor(workdir, checkpoint, embeddings=embeddings, n_devices=n_devices)
        files, unreadable = _inspect(paths, predictor, interruption)
    block = block_rows(predictor.example_shape)
    if shard_rows % block:
        raise UserError(
            f"--shard_rows is {shard_rows:,}; accepted: a multiple of {block:,} for examples of "
            f"shape {list(predictor.example_shape)}, or 0"
        )
    row_bytes = 4 * int(np.prod(predictor.example_shape))
    default = max(1, _SHARD_BYTES // (row_bytes * block)) * block
    plan = {
        "model": predictor.digest,
        "described": predictor.described,
        "columns": list(predictor.columns),
        "shard_rows": shard_rows,
        "default_shard_rows": default,
        "input": str(paths[0].parent.resolve()),
    }
    output.make_folder(folder)
    with only_process_in(folder, "--output"):
        plan = output.claim(folder, plan, [path.name for path in paths])
        output.clean(folder)
        job = engine.Job(
            workdir=str(Path(workdir).absolute()),
            checkpoint=predictor.checkpoint,
            digest=predictor.digest,
            embeddings=embeddings,
            files=files,
            shards=[shard for file in files for shard in cut(file, plan["shard_rows"])],
            unreadable=unreadable,
            folder=folder,
            lease_seconds=options.lease_seconds if engine_name == "ray" else float("inf"),
        )
        started = time.monotonic()
        with _Bar(row_bytes) as bar:

            def follow(status: Status) -> None:
                bar(status)
                watch(status)

            if engine_name == "ray":
                status = engine.run(job, options, say=remark, watch=follow)
                output.clean(folder)
            else:
                status = _run_here(job, predictor, follow)
        seconds = time.monotonic() - started
        manifest = _finish(job, plan, predictor, status, merge)
    summary = {
        "files": len(manifest["files"]),
        "rows": manifest["n_rows"],
        "parts": sum(len(file["parts"]) for file in manifest["files"]),
        "computed now": bar.rows_done,
        "seconds": round(seconds, 1),
    }
    results_table(summary, f"Written to {output_path}")
    if status.different:
        remark(
            f"warning: {status.different} shards were computed twice with different bits: hosts of "
            "different kinds took part"
        )
    if manifest["failed"]:
        raise _failed(manifest["failed"], len(paths), merge)
    return manifest


def _inspect(
    paths: list[Path], predictor: Predictor, interruption: Interruption
) -> tuple[list[InputFile], dict[str, str]]:
    """The files that can be read, and of the others the reason."""
    files: list[InputFile] = []
    unreadable: dict[str, str] = {}
    for path in paths:
        if interruption.requested:
            interruption.leave()
        try:
            output.refuse_long_name(path.name)
            files.append(inspect(path, predictor.example_shape, predictor.input_columns))
        except UserError as error:
            unreadable[path.name] = str(error)
            remark(f"{path.name} cannot be used: {error}")
    if not files:
        raise _failed(
            [{"file": name, "reason": reason} for name, reason in unreadable.items()],
            len(paths),
            False,
        )
    return files, unreadable


def _failed(failed: list[dict[str, str]], n_files: int, merge: bool) -> UserError:
    """What is said in the end of files that could not be used."""
    listed = "; ".join(f"{f['file']} ({f['reason']})" for f in failed[:_LISTED])
    more = f"; and {len(failed) - _LISTED:,} more" if len(failed) > _LISTED else ""
    others = n_files - len(failed)
    done = f"the other {others:,} are done" if others else "nothing was done"
    merged = ", but not merged" if merge and others else ""
    return UserError(
        f"{len(failed):,} of {n_files:,} files could not be used, {done}{merged}: {listed}{more}; "
        "mend or remove them, and the same command does the rest"
    )


def _run_here(job: engine.Job, predictor: Predictor, watch) -> Status:
    """This process is the only worker."""
    master, store = engine.make_master(job)
    reader = Reader(list(job.files), predictor.example_shape, predictor.input_columns)
    told = set(job.unreadable)
    with Interruption() as interruption:

        def between() -> None:
            status = master.status()
            for file in sorted(set(status.failed) - told):
                told.add(file)
                remark(f"{file} cannot be used: {status.failed[file]}")
            watch(status)
            if interruption.requested:
                remark("stopping; what is done is kept, and the same command goes on")
                interruption.leave()

        try:
            between()
            work_on(
                _HERE, _Direct(master), predictor, reader, job.folder,
                renew_seconds=float("inf"), between=between,
            )  # fmt: skip
            between()
        finally:
            store.close()
    return master.status()


class _Direct:
    """A worker's way to a master in the same process."""

    def __init__(self, master: Master):
        self._master = master

    def ask(self, worker: str) -> Answer:
        return self._master.ask(worker)

    def renew(self, worker: str, lease: Lease) -> bool:
        return self._master.renew(worker, lease)

    def done(self, worker: str, lease: Lease, part: Part) -> bool:
        return self._master.done(worker, lease, part)

    def failed(self, worker: str, lease: Lease, reason: str) -> None:
        self._master.failed(worker, lease, reason)


def _finish(
    job: engine.Job, plan: dict[str, Any], predictor: Predictor, status: Status, merge: bool
) -> dict[str, Any]:
    store = output.PartStore(job.folder, {file.name: file for file in job.files})
    try:
        parts: dict[Shard, Part] = store.kept(job.shards)
    finally:
        store.close()
    manifest = output.make_manifest(job.files, parts, status.failed, plan)
    removed = output.remove_merged(job.folder, manifest)
    if removed and not (merge and manifest["complete"]):
        remark(
            f"removed {', '.join(removed)}, merged of other rows; --merge writes such files anew"
        )
    output.write_manifest(job.folder, manifest)
    output.write_centroids(job.folder, predictor.centroids)
    if merge and manifest["complete"]:
        remark(f"merging {manifest['n_rows']:,} rows")
        output.merge(job.folder, manifest)
    return manifest


class _Bar:
    """Rows done, rate and remaining time."""

    def __init__(self, row_bytes: int):
        self._row_bytes = row_bytes
        self._reporter: Reporter | None = None
        self._before = 0
        self._running = False
        self.rows_done = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._reporter is not None:
            self._reporter.__exit__(None, None, None)

    def __call__(self, status: Status) -> None:
        if self._reporter is None:
            if status.rows_done:
                remark(
                    f"{status.shards_done:,} of {status.shards:,} shards are done already"
                    if status.shards_done < status.shards
                    else "everything is done already"
                )
            self._before = status.rows_done
            self._reporter = Reporter(True, status.rows, self._row_bytes)
            self._reporter.__enter__()
            self._reporter.start("predict", status.rows_done)
            return
        if not self._running:
            # Time counts from when the first worker is at work.
            self._running = bool(status.running)
            self._reporter.start("predict", self._before)
        rows = status.rows_done
        if rows - self._before > self.rows_done:
            self.rows_done = rows - self._before
            self._reporter.advance(rows)
