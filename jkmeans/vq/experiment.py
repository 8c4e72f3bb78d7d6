"""The experiment on parallel vector quantization: figures and speed-ups, or a run on Ray.

`run_experiment` is the one way in. Simulations are independent programs, each of which leaves a
file when it has ended; what is there is not simulated again.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jkmeans import experiment_folder
from jkmeans.configuration import Config, Field, choice, convert_fields, integer, integers, nest
from jkmeans.errors import CollapseError, UserError
from jkmeans.fields import number, text
from jkmeans.interruption import Interruption
from jkmeans.ray_session import ray_fields
from jkmeans.recorder import format_duration
from jkmeans.sharding import make_mesh
from jkmeans.sources.base import ArraySource
from jkmeans.telling import remark
from jkmeans.vq.data import NAMED, first_prototypes, load_samples
from jkmeans.vq.figures import (
    SCALING,
    Curve,
    comma_separated,
    figures_of,
    label,
    picture,
    sequential_setting,
    speed_up,
    table,
)
from jkmeans.vq.simulation import Setting, run
from jkmeans.vq.steps import STEPS
from jkmeans.whole_files import (
    UNREADABLE,
    read_arrays,
    remove_leftovers,
    write_arrays,
    write_json,
    write_whole,
)
from jkmeans.workdir import RESULTS_FILE

SIMULATIONS_FOLDER = "simulations"
TABLE_FILE = "speed_ups.md"
CURVES_FILE = "curves.csv"
ENGINES = ("simulation", "ray")

_LINE_SECONDS = 2.0
_RECENT = 10
# One step of several workers takes little longer than one of one worker, until they are so many.
_WORKERS_FOR_FREE = 8


def _convert_delay(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not 1 <= value < float("inf"):
        raise ValueError
    return float(value)


FIELDS: dict[str, Field] = {
    "seed": integer(0, "of the data, and the first of the seeds"),
    "n_seeds": integer(1, "orders of the samples, first prototypes and delays to try"),
    "n_devices": integer(0, "devices that may share the workers; 0 for all"),
    "engine": choice(ENGINES, "whether workers are simulated, or processes"),
    "n_clusters": integer(1, "K"),
    "init_samples": integer(1, "a first prototype is the mean of so many samples"),
    "data.input": text(f"{', '.join(NAMED)}, or a .npy file, a folder of them, .zarr or Parquet"),
    "data.n_samples": integer(0, "N of the mixture, or drawn from the others; 0 for all of them"),
    "data.patch": integer(0, "side of the patches that images are cut into; 0 for whole images"),
    "mixture.n_components": integer(1, "G"),
    "mixture.n_features": integer(1, "d"),
    "mixture.n_knots": integer(5, "χ; the more, the rougher the curves and the weaker the noise"),
    "steps.name": choice(tuple(STEPS), "how steps depend on the number of the sample"),
    "steps.a": number("the size of the steps", positive=True),
    "steps.b": number("how fast 'rational' steps decay, per sample"),
    "tau": integer(1, "τ, samples between two exchanges"),
    "delay": Field(
        _convert_delay,
        "a number of samples, at least 1",
        "mean duration of an exchange of scheme C, in samples",
    ),
    "duration": integer(1, "T, samples that each worker sees"),
    "n_evaluations": integer(1, "points of a curve"),
    "threshold": number("f: what is to be reached, as a part of what one worker achieves"),
    "figures.averaging": integers("M of scheme A; () leaves the figure out, as in the others"),
    "figures.displacements": integers("M of scheme B"),
    "figures.tau": integers("τ of scheme B"),
    "figures.tau_workers": integer(2, "M of that figure; one worker exchanges nothing"),
    "figures.delays": integers("M of scheme C"),
    "figures.scaling": integers("M of scheme C, up to many"),
    "workers": integer(1, "M of engine 'ray'"),
    **ray_fields("displacements", "times tau samples"),
}

_RUNTIME = ("n_seeds", "n_devices", "data.input", "threshold", "figures.", "workers", "ray.")
"""Fields that may differ when an experiment goes on: what is there of it remains true.

The data itself is compared, whatever it is called.
"""


def validate(config: Config) -> Config:
    """The config with every value in its proper type and the path absolute.

    Raises:
      UserError: a field is unknown, missing, of a wrong type or value, or contradicts another.
    """
    values = convert_fields(config, FIELDS)
    source = values["data.input"]
    if not source:
        raise UserError(f"config.data.input is ''; accepted: {FIELDS['data.input'].meaning}")
    if source == "mixture" and not values["data.n_samples"]:
        raise UserError("config.data.n_samples is 0; accepted: at least 1 for the mixture")
    if values["data.patch"] and (source == "mixture" or source not in NAMED):
        raise UserError(
            f"config.data.patch is {values['data.patch']}, but data.input is {source!r}; accepted: "
            "0 for all but sets of images"
        )
    if values["threshold"] >= 1:
        raise UserError(f"config.threshold is {values['threshold']}; accepted: 0 to below 1")
    longest = max((values["tau"], *values["figures.tau"]))
    if values["duration"] < longest:
        which = "tau is" if longest == values["tau"] else "figures.tau goes up to"
        raise UserError(
            f"config.duration is {values['duration']:,}, but {which} {longest:,}; accepted: at "
            f"least {longest:,}"
        )
    if source not in NAMED:
        values["data.input"] = str(Path(source).expanduser().absolute())
    return nest(values)


def run_experiment(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Simulates what the figures show and draws them, or goes on where that stopped.

    Args:
      config: complete, as ``configs/parallel_vq.py``; see `FIELDS`. With ``engine`` "ray" it is
        `jkmeans.asynchronous.run_vq` that runs.
      workdir: receives ``simulations/*.npz`` (times, distortion, shared prototypes), one picture a
        figure, ``speed_ups.md``, ``results.json`` and ``curves.csv``.

    Returns:
      What is in ``results.json``: of each figure, the speed-ups of its settings by their labels.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      CollapseError: simulations diverged; all others are done, and the last good version of each
        is in its file.
      Interrupted: SIGTERM or Ctrl-C came; every simulation that had ended is saved.
    """
    config = validate(config)
    if config.engine == "ray":
        from jkmeans.asynchronous import run_vq

        return run_vq(config, workdir)
    workdir = Path(workdir).absolute()
    samples = load_samples(config)
    _check_sizes(config, samples)
    fingerprint = ArraySource(samples).fingerprint()
    folder = experiment_folder.held(workdir, config, FIELDS, _RUNTIME, fingerprint)
    with folder, Interruption() as interruption:
        return _Experiment(config, workdir, samples).execute(interruption)


class _Outcome(NamedTuple):
    """What the file of a simulation says."""

    distortion: np.ndarray
    shared: np.ndarray
    n_evaluations: int


class _Experiment:
    """All simulations of one config, in one process."""

    def __init__(self, config: Config, workdir: Path, samples: np.ndarray):
        self.config = config
        self.samples = samples
        self.folder = workdir / SIMULATIONS_FOLDER
        self.workdir = workdir
        self.seeds = range(config.seed, config.seed + config.n_seeds)
        self.figures = figures_of(config)
        found = [sequential_setting(config)]
        found += [setting for _, settings in self.figures.values() for setting in settings]
        self.settings = list(dict.fromkeys(found))
        self.n_devices = make_mesh(config.n_devices).size

    def execute(self, interruption: Interruption) -> dict[str, Any]:
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        # Seed by seed, so that an experiment cut short has something of every figure.
        todo = [
            (setting, seed)
            for seed in self.seeds
            for setting in self.settings
            if self._read(setting, seed) is None
        ]
        progress = _Progress(len(self.settings) * len(self.seeds), [setting for setting, _ in todo])
        for setting, seed in todo:
            if interruption.requested:
                interruption.leave()
            outcome = self._simulate(setting, seed)
            progress.tell(setting, seed, outcome)
        results = self._write(interruption)
        self._refuse_divergence()
        return results

    def _simulate(self, setting: Setting, seed: int) -> _Outcome:
        rng = np.random.default_rng(seed)
        ordered = self.samples[rng.permutation(len(self.samples))]
        prototypes = first_prototypes(
            rng, ordered, self.config.n_clusters, self.config.init_samples
        )
        n_devices = max(n for n in range(1, self.n_devices + 1) if setting.n_workers % n == 0)
        mesh = make_mesh(n_devices) if n_devices > 1 else None
        found = run(setting, seed, prototypes, ordered, mesh)
        outcome = _Outcome(
            np.asarray(found.distortion), np.asarray(found.shared), int(found.n_evaluations)
        )
        arrays = {"times": setting.times, **outcome._asdict()}
        write_arrays(self._path(setting, seed), arrays)
        return outcome

    def _path(self, setting: Setting, seed: int) -> Path:
        delay = f"_delay_{setting.delay:g}" if setting.scheme == "asynchronous" else ""
        name = f"{setting.scheme}_M_{setting.n_workers}_tau_{setting.tau}{delay}_seed_{seed}.npz"
        return self.folder / name

    def _read(self, setting: Setting, seed: int) -> _Outcome | None:
        """What a simulation left; None where it left nothing that can be read."""
        try:
            arrays = read_arrays(self._path(setting, seed))
            outcome = _Outcome(arrays["distortion"], arrays["shared"], int(arrays["n_evaluations"]))
        except UNREADABLE:
            return None
        return outcome if outcome.distortion.shape == setting.times.shape else None

    def _curve(self, setting: Setting) -> Curve:
        outcomes = [self._read(setting, seed) for seed in self.seeds]
        return Curve(
            setting, setting.times, np.stack([found.distortion for found in outcomes if found])
        )

    def _write(self, interruption: Interruption) -> dict[str, Any]:
        curves = {setting: self._curve(setting) for setting in self.settings}
        threshold = self.config.threshold
        results: dict[str, Any] = {}
        for name, (title, settings) in self.figures.items():
            if interruption.requested:
                interruption.leave()
            drawn = [curves[setting] for setting in settings]
            write_whole(
                self.workdir / f"{name}.png", picture(title, drawn, logarithmic=name == SCALING)
            )
            results[name] = {
                label(curve.setting): speed_up(drawn[0], curve, threshold)._asdict()
                for curve in drawn
            }
        text_of_table = table(self.figures, curves, threshold)
        write_whole(self.workdir / TABLE_FILE, text_of_table.encode())
        write_whole(self.workdir / CURVES_FILE, comma_separated(curves, self.seeds).encode())
        results = write_json(self.workdir / RESULTS_FILE, results)
        print(text_of_table, flush=True)
        return results

    def _refuse_divergence(self) -> None:
        diverged = [
            self._path(setting, seed)
            for setting in self.settings
            for seed in self.seeds
            if (found := self._read(setting, seed)) and np.isnan(found.distortion[-1])
        ]
        if diverged:
            raise CollapseError(
                f"{len(diverged)} of {len(self.settings) * len(self.seeds)} simulations diverged, "
                f"the first {diverged[0].stem}; the last good version of each is in its file in "
                f"{self.folder}; accepted: smaller steps, fewer workers, a smaller tau or delay"
            )


class _Progress:
    """A line now and then: how far, how fast, how long still.

    Rate and remaining time follow the last few simulations, for the first seed of every setting
    compiles a program and those after it do not.
    """

    def __init__(self, n_all: int, todo: Sequence[Setting]):
        self._n_all, self._n_done = n_all, n_all - len(todo)
        self._left = sum(map(_cost, todo))
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_RECENT)
        self._ended = time.monotonic()
        self._told = float("-inf")

    def tell(self, setting: Setting, seed: int, outcome: _Outcome) -> None:
        """After a simulation."""
        now = time.monotonic()
        n_samples = setting.duration * setting.n_workers
        self._recent.append((now - self._ended, n_samples, _cost(setting)))
        self._ended = now
        self._n_done += 1
        self._left -= _cost(setting)
        diverged = bool(np.isnan(outcome.distortion[-1]))
        if not diverged and self._left and now - self._told < _LINE_SECONDS:
            return
        self._told = now
        seconds, samples, cost = (sum(column) for column in zip(*self._recent, strict=True))
        last = f"distortion {outcome.distortion[outcome.n_evaluations]:.5g}"
        if diverged:
            last = f"diverged after {outcome.n_evaluations} evaluations, the last with {last}"
        remark(
            f"simulation {self._n_done} of {self._n_all}: {label(setting)}, seed {seed}: {last}; "
            f"{samples / seconds:,.0f} samples/s, {format_duration(self._left * seconds / cost)} "
            "left"
        )


def _cost(setting: Setting) -> int:
    return setting.duration * (_WORKERS_FOR_FREE + setting.n_workers)


def _check_sizes(config: Config, samples: np.ndarray) -> None:
    if config.n_clusters > len(samples):
        raise UserError(
            f"config.n_clusters is {config.n_clusters:,}, but there are {len(samples):,} samples; "
            f"accepted: 1 to {len(samples):,}"
        )
    first_prototypes(np.random.default_rng(0), samples, config.n_clusters, config.init_samples)
    for _, settings in figures_of(config).values():
        most = max(setting.n_workers for setting in settings)
        if most > len(samples):
            raise UserError(
                f"config.figures asks for {most:,} workers, but there are {len(samples):,} "
                f"samples; accepted: 1 to {len(samples):,}"
            )
