"""A run: a network and its centroids trained together, checkpointed, resumed, reported.

`train_and_evaluate` is the one way in. It holds the loop over epochs and nothing of what happens
inside one: the epoch is a compiled program (`jkmeans.epoch`), the objective is a method
(`jkmeans.methods`).
"""

import functools
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jkmeans import configuration, datasets, metrics, pretrained, processes
from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.configuration import Config
from jkmeans.epoch import CLUSTER_SIZES, Rows, TrainState, make_programs
from jkmeans.errors import CollapseError, UserError
from jkmeans.feeding import HostFeeder
from jkmeans.interruption import Interruption
from jkmeans.methods import make_method, method_spec
from jkmeans.networks import blueprint
from jkmeans.recorder import NoRecorder, Recorder, read_metrics, results_table
from jkmeans.sharding import (
    DATA_AXIS,
    REPLICATED,
    SHARDED,
    Layout,
    device_dtype,
    gather_examples,
    make_mesh,
    place,
    place_rows,
    relayout,
    to_host,
)
from jkmeans.whole_files import write_json
from jkmeans.workdir import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    REPORT_FOLDER,
    RESULTS_FILE,
    claim,
    device_room,
    only_process_in,
    usable,
    versions,
)

PAGE_FILE = "report.html"

_AFTER_SCORES = "train_seconds"  # Where results go on that are not of the labels of the data.
_MODEL = ("parameters", "clusters")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def train_and_evaluate(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains a network and its centroids together, or goes on where a run stopped.

    Args:
      config: complete, as the files in ``configs/``; see `jkmeans.configuration.FIELDS`.
      workdir: folder of the run. It receives ``config.json``, ``checkpoints/``,
        ``metrics.jsonl``, ``tensorboard/``, ``results.json``, ``report/`` and ``report.html``.
        Where it holds an unfinished run of the same config, that run goes on; a finished one is
        reported again, with scores by the labels that the data has now.

    Returns:
      The results that are in ``results.json``: ``n_examples``, ``n_clusters``, ``inertia``,
      ``embedding_variance``, ``empty_clusters``, ``n_epochs``, ``train_seconds``,
      ``peak_host_mebibytes`` and, where labels exist, ``acc``, ``nmi``, ``ari`` and ``purity``.
      With ``n_seeds`` above 1, see `jkmeans.seeds.train_side_by_side`.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      CollapseError: the embeddings shrank to a point or ran away, or the loss is not finite.
      Interrupted: SIGTERM or Ctrl-C came; everything up to the last step is saved.
    """
    config = configuration.validate(config)
    processes.agree("the config", configuration.flat(config))
    dataset = processes.together(
        lambda: datasets.load(
            config.data.name,
            split=config.data.split,
            path=config.data.path,
            labels_path=config.data.labels_path,
            n_examples=config.data.n_examples,
            part=(processes.number(), processes.count()),
        )
    )
    return train(config, dataset, workdir)


def train(config: Config, dataset: datasets.Dataset, workdir: str | os.PathLike) -> dict[str, Any]:
    """`train_and_evaluate` on data that is there already.

    Args:
      config: complete; what it says of ``data`` by name and path is not looked at.
      dataset: the examples, and labels if there are any; with several processes, the same on each,
        which reads only the rows of its own devices.
      workdir: folder of the run.
    """
    config = configuration.validate(config)
    workdir = Path(workdir).absolute()
    configuration.check_data(config, dataset.n_examples, dataset.example_shape)
    if not processes.on_first((workdir / CONFIG_FILE).exists):  # A run there has been checked.
        part = processes.number(), processes.count()
        check = method_spec(config.objective.name).check_data
        processes.together(lambda: check(config, dataset, part))
    if config.n_seeds > 1:
        from jkmeans.seeds import train_side_by_side

        return train_side_by_side(config, dataset, workdir)
    mesh = make_mesh(config.n_devices)
    run = Run(config, workdir, dataset, mesh)
    refuse_idle_processes(run.layout, mesh)
    processes.agree("the data", run.data_record)
    processes.on_first(lambda: claim_workdir(workdir, config))
    processes.same_folder(workdir)
    with (
        only_process_in(workdir),
        Checkpoints(workdir / CHECKPOINT_FOLDER, keep=config.checkpoint.keep) as checkpoints,
    ):
        return run.execute(checkpoints)


def refuse_idle_processes(layout: Layout, mesh) -> None:
    """Refuses more processes than the shards of the data give work to.

    Raises:
      UserError: a process has no example.
    """
    busy = set()
    for i, device in enumerate(mesh.devices.flat):
        first = i * layout.shards_per_device
        shards = range(first, min(first + layout.shards_per_device, layout.n_shards))
        if any(np.diff(layout.shard_bounds(shard))[0] for shard in shards):
            busy.add(device.process_index)
    idle = sorted(set(range(processes.count())) - busy)
    if idle and processes.count() > 1:
        raise UserError(
            f"there are {processes.count()} processes for {layout.n_examples:,} examples in "
            f"data.n_shards = {layout.n_shards} shards, and process {idle[0]} would have none; "
            f"accepted: up to {len(busy)} processes, or a larger data.n_shards"
        )


class Run:
    """One run, of one process or several: what stays the same from its first epoch to its last."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        dataset: datasets.Dataset,
        mesh,
        like: "Run | None" = None,
    ):
        """Nothing is computed yet, on any device.

        Args:
          config: validated, of one seed.
          workdir: folder of the run.
          dataset: the examples.
          mesh: of the data axis.
          like: a run that differs in its seed and workdir only; it shares its programs.
        """
        self.config = config
        self.workdir = workdir
        self.dataset = dataset
        self.mesh = mesh
        self.layout = Layout(
            n_examples=dataset.n_examples,
            batch_size=config.training.batch_size,
            n_shards=config.data.n_shards,
            n_devices=mesh.size,
        )
        self.n_epochs = config.training.n_pretrain_epochs + config.training.n_epochs
        self.n_steps = self.layout.n_steps
        if like is not None:
            self.method, self.programs = like.method, like.programs
            self.blueprint = like.blueprint
        else:
            self.method = make_method(config, DATA_AXIS)
            self.blueprint = blueprint(
                config.network, dataset.example_shape, config.training.pretrain_precision
            )
            self.programs = make_programs(
                config,
                self.blueprint,
                self.method,
                self.layout,
                mesh,
                dataset.example_shape,
                dataset.scale,
            )
        self._compiled: dict[tuple, Callable] = {}
        self._compiling = 0.0  # Seconds, within the epoch that runs.
        self.data_record = describe_data(dataset)

    # What is where

    @functools.cached_property
    def on_host(self) -> bool:
        """Whether examples stay on the host and are fed."""
        placement = self.config.data.placement
        if placement != "auto":
            return placement == "host"
        value_bytes = device_dtype(self.dataset.examples.dtype).itemsize
        n_bytes = self.layout.n_rows * int(np.prod(self.dataset.example_shape)) * value_bytes
        return n_bytes / self.mesh.size > device_room(self.mesh)

    @functools.cached_property
    def rows(self) -> Rows:
        """The examples on the devices, or only their weights and numbers where they are fed."""
        index = self.layout.row_index()
        examples = None
        if not self.on_host:
            examples = place_rows(self.dataset.examples, self.layout, self.mesh)
        return Rows(
            examples=examples,
            weights=place((index >= 0).astype(np.float32), self.mesh, SHARDED),
            index=place(index, self.mesh, SHARDED),
        )

    @functools.cached_property
    def feeder(self) -> HostFeeder:
        """Feeds examples that stay on the host."""
        chunk_bytes = self.config.data.chunk_mebibytes * 2**20
        return HostFeeder(self.dataset.examples, self.layout, self.mesh, chunk_bytes)

    # The run

    def execute(self, checkpoints: Checkpoints) -> dict[str, Any]:
        """Trains what is left to train, and reports."""
        restored, record = self.restore(checkpoints), None
        if restored is None:
            state, seconds = self.create_pretrained()
        else:
            state, record = restored
            seconds = record["seconds"]
        epoch = int(state.epoch)
        if record and record["results"]:
            processes.tell(f"{self.workdir} holds a finished run of this config; nothing to train")
            return self.report_again(state, record["results"])
        with Interruption() as interruption, self.make_recorder(epoch, record) as recorder:
            self.recorder, self.interruption = recorder, interruption
            self.announce(epoch, record is not None)
            while epoch < self.n_epochs:
                started = time.perf_counter()
                state, values = self.run_epoch(state, epoch)
                seconds += time.perf_counter() - started
                if values is not None:
                    epoch += 1
                    self.check_collapse(values, float(state.reference_variance), epoch)
                    if epoch == self.config.training.n_pretrain_epochs:
                        self.keep_pretrained(state, seconds)
                due = epoch % self.config.checkpoint.every == 0 or epoch == self.n_epochs
                # Asked once, at the end of the epoch: a signal that comes now is for the next one.
                stopping = interruption.agreed()
                if due or stopping:
                    self.save(checkpoints, state, seconds, values, results=None)
                if stopping:
                    checkpoints.wait()
                    recorder.say(f"saved; the same command goes on from epoch {epoch}")
                    interruption.leave()
            state, results = self.finish(state, seconds)
            self.save(checkpoints, state, seconds, None, results=results)
            checkpoints.wait()
            if interruption.agreed():
                recorder.say("trained and saved; the same command reports it")
                interruption.leave()
        return self.report(state, results)

    def make_recorder(self, epoch: int, record: dict[str, Any] | None) -> Recorder:
        """The recorder from ``epoch`` on; one that records nothing where that is process 0's."""
        if not processes.is_first():
            return NoRecorder()
        return Recorder(
            self.workdir, n_epochs=self.n_epochs, position=epoch, resumed=record is not None
        )

    def announce(self, epoch: int, resumed: bool) -> None:
        """Says once what is about to run, and on what."""
        devices = f"{self.mesh.size} × {self.mesh.devices.flat[0].platform}"
        if processes.count() > 1:
            devices += f" of {processes.count()} processes"
        feeding = "fed from the host" if self.on_host else "on the devices"
        self.recorder.say(
            f"{self.dataset.name}: {self.dataset.n_examples:,} examples {feeding} ({devices}), "
            f"{self.n_steps} steps of {self.layout.effective_batch_size} an epoch"
        )
        if resumed:
            self.recorder.say(f"going on after epoch {epoch} of {self.n_epochs}")

    def run_epoch(
        self, state: TrainState, epoch: int
    ) -> tuple[TrainState, dict[str, float] | None]:
        """One epoch, from wherever the state stands in it.

        Returns:
          The state and the metrics of the epoch; None for these where the examples are fed and an
          interruption was asked for before its end.
        """
        n_pretrain = self.config.training.n_pretrain_epochs
        clustering = epoch >= n_pretrain
        if int(state.step) == 0:
            state = self.begin_epoch(state, epoch - n_pretrain)
        started, self._compiling = time.perf_counter(), 0.0
        first_step = int(state.step)
        if self.on_host:
            state, values = self._fed_epoch(state, clustering)
            if values is None:
                return state, None
        else:
            program = self._program("epoch", state, self.rows, clustering=clustering)
            state, values = program(state, self.rows)
        self.await_devices(values, None)
        seconds = time.perf_counter() - started - self._compiling
        named = scalars(values)
        if clustering:
            named |= self.scores(state)
        self.recorder.epoch(
            "cluster" if clustering else "pretrain",
            epoch + 1,
            named,
            round(self.dataset.n_examples * (1 - first_step / self.n_steps)),
            seconds,
            to_host(values[CLUSTER_SIZES]) if CLUSTER_SIZES in values else None,
        )
        return state, named

    def _fed_epoch(self, state: TrainState, clustering: bool):
        order = to_host(self._program("order", state)(state))
        done = first = int(state.step)
        for rows, examples in self.feeder.chunks(order, first):
            program = self._program(
                "steps", state, self.rows, rows, examples, clustering=clustering
            )
            state = program(state, self.rows, rows, examples)
            # One chunk at a time: see docs/architecture.md, "Fake devices".
            done += len(rows)
            self.await_devices(state.step, done / self.n_steps)
            self.recorder.waiting(done / self.n_steps)
            if done < self.n_steps and self.interruption.agreed():
                return state, None
        if clustering and self.config.centroids.bank == "refreshed":
            state = self.refresh(state)
        return self._program("finish", state, self.rows, clustering=clustering)(state, self.rows)

    def refresh(self, state: TrainState) -> TrainState:
        """Embeds every example with the weights as they are now."""
        if not self.on_host:
            return self._program("refresh", state, self.rows)(state, self.rows)
        for rows, examples in self.feeder.chunks(self.feeder.in_row_order()):
            state = self._program("fill", state, rows, examples)(state, rows, examples)
            self.await_devices(state.step, 0.0)
        return state

    def begin_epoch(self, state: TrainState, n_done: int) -> TrainState:
        """What happens between two epochs, ``n_done`` of them done since clustering began."""
        if n_done == 0:
            return self.initialize(state)
        every = self.config.reset.every
        if not every or n_done < 0 or n_done % every:
            return state
        state = self._program("reset", state)(state)
        state, values = self._restart(self.refresh(state))
        self.await_devices(values, 0.0)
        self.recorder.say(f"soft reset, new clusters: inertia {float(values['inertia']):.4g}")
        return state

    def _restart(self, state: TrainState):
        return self._program("restart", state, self.rows)(state, self.rows)

    def initialize(self, state: TrainState) -> TrainState:
        """The first centroids, from the embeddings of all examples."""
        state = self.refresh(state)
        state, values = self._program("initialize", state, self.rows)(state, self.rows)
        self.await_devices(values, 0.0)
        found = scalars(values)
        self.check_pretrained(found)
        text = (
            f"first centroids ({self.config.centroids.init}): inertia {found['inertia']:.4g}, "
            f"variance of the embeddings {found['embedding_variance']:.4g}, "
            f"{found['empty_clusters']:.0f} empty"
        )
        if scores := self.scores(state):
            text += f", acc {scores['acc']:.3f}, nmi {scores['nmi']:.3f}"
        self.recorder.say(text)
        return state

    def keep_pretrained(self, state: TrainState, seconds: float) -> None:
        """Leaves the network for other runs that would pretrain the same one."""
        parameters = {name: to_host(value) for name, value in state.parameters.items()}
        if not all(np.isfinite(value).all() for value in parameters.values()):
            return  # The last step diverged, as `check_pretrained` will say.
        variance = float(state.reference_variance)
        if processes.is_first():
            pretrained.save(
                self.config, self.data_record, pretrained.Pretrained(parameters, variance, seconds)
            )

    def scores(self, state: TrainState) -> dict[str, float]:
        """ACC, NMI, ARI and purity of the clusters; empty where the data has no labels."""
        return self.scores_of(gather_examples(state.labels, self.layout))

    def scores_of(self, labels: np.ndarray) -> dict[str, float]:
        """The same for labels [n_examples] in the order of the examples."""
        if self.dataset.labels is None:
            return {}
        return metrics.summarize(self.dataset.labels, labels)

    def finish(self, state: TrainState, seconds: float) -> tuple[TrainState, dict[str, Any]]:
        """Final centroids and labels: k-means on the embeddings by the final weights."""
        started = time.perf_counter()
        if self.config.training.n_epochs == 0:
            state = self.initialize(state)
        else:
            state = self.refresh(state)
        n_iterations = np.int32(self.config.centroids.final_max_iter)
        program = self._program("assign", state, self.rows, n_iterations)
        state, values = program(state, self.rows, n_iterations)
        self.await_devices(values, 1.0)
        found = scalars(values)
        return self.conclude(state, found, seconds + time.perf_counter() - started)

    def conclude(
        self, state: TrainState, found: dict[str, float], seconds: float
    ) -> tuple[TrainState, dict[str, Any]]:
        """The results of a state that is trained and assigned, with what its programs found."""
        started = time.perf_counter()
        if self.method.on_host is not None:
            state, changed = self.cluster_on_host(state)
            found |= changed
        results: dict[str, Any] = {
            "data": self.dataset.name,
            "n_examples": self.dataset.n_examples,
            "n_clusters": self.config.n_clusters,
            "n_epochs": self.n_epochs,
            "inertia": found["inertia"],
            "embedding_variance": found["embedding_variance"],
            "empty_clusters": int(found["empty_clusters"]),
        }
        results |= self.scores(state)
        results[_AFTER_SCORES] = round(seconds + time.perf_counter() - started, 1)
        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results["peak_host_mebibytes"] = peak // (2**20 if sys.platform == "darwin" else 2**10)
        return state, results

    def cluster_on_host(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The clusters of a method that makes them on the host, at the end."""
        assert self.method.on_host is not None
        self.recorder.say("clustering the embeddings on the host")
        embeddings = gather_examples(state.bank, self.layout)
        clusters, labels = self.cluster_embeddings(embeddings)
        index = self.layout.row_index()
        distances = np.sum((embeddings - clusters.centroids[labels]) ** 2, axis=1, dtype=np.float64)
        counts = np.bincount(labels, minlength=self.config.n_clusters)
        state = state._replace(
            clusters=jax.tree.map(lambda leaf: place(leaf, self.mesh, REPLICATED), clusters),
            labels=place(np.where(index >= 0, labels[index], 0), self.mesh, SHARDED),
        )
        return state, {
            "inertia": float(np.sum(distances)),
            "empty_clusters": float(np.sum(counts == 0)),
        }

    def cluster_embeddings(self, embeddings: np.ndarray) -> tuple[Any, np.ndarray]:
        """What the method makes of all embeddings: on process 0, whose result all take."""
        on_host, seed = self.method.on_host, self.config.seed
        assert on_host is not None
        found = processes.together(
            lambda: on_host(embeddings, seed) if processes.is_first() else None
        )
        if processes.count() == 1:
            assert found is not None
            return found
        from jax.experimental import multihost_utils

        k, p = self.config.n_clusters, self.config.network.embedding_dim
        blank = (self.method.blank(k, p, len(embeddings)), np.zeros(len(embeddings), np.int32))
        given = jax.tree.map(
            lambda leaf, value: np.asarray(value, leaf.dtype), blank, found or blank
        )
        return multihost_utils.broadcast_one_to_all(given)

    def report(self, state: TrainState, results: dict[str, Any]) -> dict[str, Any]:
        """Writes results.json and the pictures, prints the table."""
        if processes.is_first():
            write_json(self.workdir / RESULTS_FILE, results)
        if self.config.report.pictures:
            self._draw(state, results)
        results_table(results, f"Results in {self.workdir}")
        return results

    def report_again(self, state: TrainState, results: dict[str, Any]) -> dict[str, Any]:
        """Reports a finished run, with scores by the labels that the data has now."""
        scores = self.scores(state)
        again = {}
        for name, value in results.items():
            if name == _AFTER_SCORES:
                again |= scores
            if name not in metrics.SUMMARY:
                again[name] = value
        return self.report(state, again)

    def _draw(self, state: TrainState, results: dict[str, Any]) -> None:
        from jkmeans.report import write_page, write_report
        from jkmeans.report.clusters import ClusteredExamples
        from jkmeans.report.maps import map_embeddings

        bank = gather_examples(state.bank, self.layout)
        labels = gather_examples(state.labels, self.layout)
        centroids = to_host(state.clusters.centroids)
        if not processes.is_first():
            return
        arrays = {
            "embeddings": bank,
            "labels": labels,
            "distances": np.sqrt(np.sum((bank - centroids[labels]) ** 2, axis=1)),
            "centroids": centroids,
            "examples": self.dataset.examples,
            "truth": self.dataset.labels,
        }
        seed = self.config.seed
        placed = map_embeddings(ClusteredExamples.of(**arrays, class_names=None), seed)
        shared: dict[str, Any] = {
            "metrics": read_metrics(self.workdir),
            "seed": seed,
            "title": f"{self.dataset.name}, {self.config.objective.name}, "
            f"K = {self.config.n_clusters}",
            "embedding_map": placed,
            **arrays,
        }
        write_report(self.workdir / REPORT_FOLDER, **shared)
        config = configuration.to_json(self.config)
        write_page(self.workdir / PAGE_FILE, results=results, config=config, **shared)

    def _remedies(self, epoch: int) -> str:
        """What to try where the phase of an epoch went wrong."""
        if epoch <= self.config.training.n_pretrain_epochs:
            return "a smaller training.learning_rate"
        # The user's own objective has that field, but is not called with it.
        weighted = "centroid_weight" in self.config.objective
        if not weighted or ":" in self.config.objective.name:
            return "a smaller training.clustering_learning_rate"
        return "a smaller training.clustering_learning_rate or objective.centroid_weight"

    def check_pretrained(self, found: dict[str, float]) -> None:
        """Raises CollapseError where the embeddings to be clustered first are not finite.

        The loss of an epoch is that before its last step, and does not show it.
        """
        if np.isfinite(found["embedding_variance"]):
            return
        n_epochs = self.config.training.n_pretrain_epochs
        if not n_epochs:
            raise CollapseError(
                "the embeddings of the network as it was drawn are not finite; try another "
                "network.initializer, or examples scaled down"
            )
        raise CollapseError(
            f"the embeddings are not finite after {n_epochs} epochs of pretraining: it diverged; "
            f"try a smaller training.learning_rate{self._kept()}"
        )

    def _kept(self) -> str:
        """Where what was saved before is, if anything was."""
        folder = self.workdir / CHECKPOINT_FOLDER
        saved = folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())
        return f"; what was saved before is in {folder}" if saved else ""

    def check_collapse(self, values: dict[str, float], reference: float, epoch: int) -> None:
        """Raises CollapseError where there is nothing left to cluster.

        Args:
          values: the metrics of the epoch.
          reference: the variance of the embeddings that theirs is compared with.
          epoch: that ended.
        """
        if not np.isfinite(values["loss"]) or not np.isfinite(values["embedding_variance"]):
            raise CollapseError(
                f"the loss is {values['loss']} in epoch {epoch}: training diverged; try "
                f"{self._remedies(epoch)}{self._kept()}"
            )
        least = self.config.training.collapse_ratio * reference
        most = reference / max(self.config.training.collapse_ratio, 1e-30)
        if values["embedding_variance"] > most:
            # The embeddings of VaDE are Gaussian.
            bounded = self.config.network.normalize or self.config.objective.name == "vade"
            unit_norm = "" if bounded else "network.normalize = True or "
            raise CollapseError(
                f"the embeddings ran away in epoch {epoch}: their variance is "
                f"{values['embedding_variance']:.3g}, and was {reference:.3g} at first; try "
                f"{unit_norm}{self._remedies(epoch)}{self._kept()}"
            )
        if values["embedding_variance"] < least:
            raise CollapseError(
                f"the embeddings collapsed in epoch {epoch}: their variance is "
                f"{values['embedding_variance']:.3g}, below training.collapse_ratio = "
                f"{self.config.training.collapse_ratio:g} of the {reference:.3g} it began with; "
                f"try {self._remedies(epoch)}{self._kept()}"
            )

    # State and checkpoints

    def create(self) -> TrainState:
        """The state before the first epoch."""
        return self.programs.create(np.uint32(self.config.seed % 2**32))

    def create_pretrained(self) -> tuple[TrainState, float]:
        """The state to begin with, and the seconds it stands for: pretrained, if it can be."""
        state = self.create()
        # What the optimizer remembers is not kept with the network.
        continues = not self.method.fresh_optimizer
        found = None if continues else pretrained.load(self.config, self.data_record)
        if found is not None:
            found = found.of(self.blueprint)
        if processes.any_of(found is None) or found is None:
            return state, 0.0
        processes.tell(f"the network was pretrained by another run ({found.seconds:.0f} s)")
        everywhere = functools.partial(place, mesh=self.mesh, spec=REPLICATED)
        here = {name: everywhere(value) for name, value in found.parameters.items()}
        state = state._replace(
            # Layers that pretraining does not reach are as they were drawn.
            parameters=state.parameters | here,
            reference_variance=everywhere(np.asarray(found.reference_variance, np.float32)),
            epoch=everywhere(np.asarray(self.config.training.n_pretrain_epochs, np.int32)),
        )
        return state, found.seconds

    def restore(
        self, checkpoints: Checkpoints, among: Collection[int] | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that can be read, with its record; None where there is none.

        Args:
          checkpoints: of the run.
          among: only these positions; all if None.

        Raises:
          UserError: the run is on other data, or of all its checkpoints none can be read.
        """
        positions = [p for p in checkpoints.positions() if among is None or p in among]
        for position in reversed(positions):
            try:
                record = checkpoints.record(position)
                if record["data"] != self.data_record:
                    raise UserError(
                        f"{self.workdir} holds a run on other data: {record['data']} there, "
                        f"{self.data_record} now; accepted: the same data, or another --workdir"
                    )
                return self._restore(checkpoints, position, record), record
            except DamagedError as error:
                aside = checkpoints.set_aside(position)
                processes.tell(
                    f"warning: {error}; moved to {aside.name}, going back to the one before"
                )
        if among is None and (positions or any(checkpoints.folder.glob("damaged-*"))):
            raise UserError(
                f"no checkpoint in {checkpoints.folder} can be read; accepted: one whole "
                "checkpoint, or another --workdir"
            )
        return None

    def _restore(self, checkpoints: Checkpoints, position: int, record: Any) -> TrainState:
        # As it was saved, then onto this mesh: padding at the end depends on the device count.
        n_rows = record["n_rows"]
        shardings = self.programs.shardings
        here = jax.eval_shape(self.programs.create, jax.ShapeDtypeStruct((), np.uint32))

        def abstract(field: str):
            sharding = getattr(shardings, field)
            if field not in ("bank", "labels"):
                return jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                    getattr(here, field),
                )
            leaf = getattr(here, field)
            fits = n_rows % self.mesh.size == 0
            return jax.ShapeDtypeStruct(
                (n_rows, *leaf.shape[1:]),
                leaf.dtype,
                sharding=sharding if fits else shardings.epoch,
            )

        fields = {field: abstract(field) for field in TrainState._fields}
        model = {field: fields.pop(field) for field in _MODEL}
        trees = checkpoints.load(position, {"model": model, "training": fields}).trees
        state = TrainState(**trees["model"], **trees["training"])
        if n_rows == self.layout.n_rows:
            return state
        return state._replace(
            bank=relayout(state.bank, self.layout, self.mesh),
            labels=relayout(state.labels, self.layout, self.mesh),
        )

    def save(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        seconds: float,
        values: Any,
        results: dict[str, Any] | None,
    ) -> None:
        """Starts to write the state; its position is its number of steps."""
        fields = state._asdict()
        model = {field: fields.pop(field) for field in _MODEL}
        epoch, step = int(state.epoch), int(state.step)
        position = epoch * self.n_steps + step + (results is not None)
        since_warmup = epoch - self.config.training.n_pretrain_epochs
        # Before, the weight of the centroids rises, and losses do not compare.
        warm = since_warmup - 1 >= self.method.warmup_epochs
        comparable = values is not None and since_warmup > 0 and warm
        checkpoints.save(
            position,
            {"model": model, "training": fields},
            {
                "config": configuration.to_json(self.config),
                "versions": versions(*_PACKAGES),
                "data": self.data_record,
                "n_rows": self.layout.n_rows,
                "epoch": epoch,
                "step": step,
                "seconds": seconds,
                "results": results,
            },
            objective=values["loss"] if comparable else None,  # type: ignore[index]
        )

    # Programs

    def _program(self, name: str, *arguments, **static) -> Callable:
        """A program compiled ahead of time, so that its first call is timed like the others."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        key = (name, shapes, tuple(static.items()))
        if key not in self._compiled:
            started = time.perf_counter()
            lowered = getattr(self.programs, name).lower(*arguments, **static)
            self._compiled[key] = lowered.compile()
            self._compiling += time.perf_counter() - started
        return self._compiled[key]

    def await_devices(self, values, fraction: float | None) -> None:
        """Waits for the devices with an open ear for signals, which a blocking call has not."""
        leaves = jax.tree.leaves(values)
        pause = 0.0005
        while not all(leaf.is_ready() for leaf in leaves):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            if pause == 0.05:
                self.recorder.waiting(fraction)
            if self.interruption.announced():
                self.recorder.say("stopping at the next safe place; once more to stop at once")
        jax.block_until_ready(leaves)


def scalars(values: Mapping[str, jax.Array]) -> dict[str, float]:
    """The metrics of a program that are numbers."""
    return {name: float(value) for name, value in values.items() if name != CLUSTER_SIZES}


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes the config into a new workdir, or checks that the one there is the same.

    Raises:
      UserError: the folder holds a run with another config, or cannot be written.
    """
    with usable(workdir):
        lost = (workdir / CHECKPOINT_FOLDER).exists() and not (workdir / CONFIG_FILE).exists()
    if lost:
        raise UserError(
            f"{workdir} holds checkpoints but no {CONFIG_FILE}, so they are not of a run of "
            "jkmeans; accepted: a new folder or that of a run"
        )
    claim(
        workdir,
        configuration.to_json(config),
        lambda there: configuration.differences(config, configuration.from_json(there)),
        kind="run",
    )


def describe_data(dataset: datasets.Dataset) -> dict[str, Any]:
    """What a checkpoint remembers of its data; the checksum is of 256 rows spread over it."""
    rows = np.unique(np.linspace(0, dataset.n_examples - 1, 256).astype(np.int64))
    sample = np.ascontiguousarray(dataset.examples[rows])
    return {
        "name": dataset.name,
        "n_examples": dataset.n_examples,
        "example_shape": list(dataset.example_shape),
        "dtype": str(dataset.examples.dtype),
        "scale": dataset.scale,
        "checksum": zlib.crc32(sample.tobytes()),
    }
