"""The experiments on consensus: estimation, k-means, vector quantization, training; one way in.

`run_experiment` computes cases that do not depend on each other (a topology with a method, say),
each of which leaves a file when it has ended; what is there is not computed again. Then it draws.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import Any

import jax

from jkmeans import experiment_folder
from jkmeans.configuration import Config, convert_fields, nest
from jkmeans.consensus.averaging import check_loss
from jkmeans.consensus.graphs import EDGES
from jkmeans.consensus.mixing import MIXINGS
from jkmeans.consensus.tasks.base import GEOMETRIC, GRAPH_NAMES, Arrays, Case, Check, Task
from jkmeans.errors import CollapseError, UserError
from jkmeans.fields import Field, choice, integer, number, text, words
from jkmeans.interruption import Interruption
from jkmeans.recorder import format_duration
from jkmeans.telling import remark
from jkmeans.whole_files import UNREADABLE, read_arrays, remove_leftovers, write_arrays, write_json
from jkmeans.workdir import RESULTS_FILE

CASES_FOLDER = "cases"
TASKS = ("estimation", "kmeans", "vq", "training")

COMMON_FIELDS: dict[str, Field] = {
    "seed": integer(0, "of everything random"),
    "task": choice(TASKS, "what the nodes do together"),
    "nodes": choice(("vmap", "mesh"), "all on one device, or each on a device of its own"),
    "precision": choice(("float32", "float64"), "of what is computed and sent"),
    "graph.n_nodes": integer(0, "N; 0, for 'edges' only: as many as the file has"),
    "graph.topologies": words(GRAPH_NAMES, "graphs to compare"),
    "graph.radius": number("of 'geometric', in sides of the square; 0 for a safe one"),
    "graph.edges": text("the file of 'edges': two node numbers a line, and a weight if given"),
    "graph.mixing": choice(tuple(MIXINGS), "how much of a neighbour's value is taken"),
    "loss.links": number("probability that a link fails in a round, both ways"),
    "loss.messages": number("probability that a message is lost, each way on its own"),
}

_RUNTIME = ("graph.edges",)
"""Fields that may differ when an experiment goes on; the edges themselves are compared."""


def fields_of(config: Config) -> dict[str, Field]:
    """All fields of a config: the common ones and those of its task."""
    task = config.get("task")
    own = _task_module(task).FIELDS if task in TASKS else {}
    return COMMON_FIELDS | own


def validate(config: Config) -> Config:
    """The config with every value in its proper type and paths absolute.

    Raises:
      UserError: a field is unknown, missing, of a wrong type or value, or contradicts another.
    """
    if config.get("task") not in TASKS:
        raise UserError(
            f"config.task is {config.get('task')!r}; accepted: {COMMON_FIELDS['task'].accepted}"
        )
    values = convert_fields(config, fields_of(config))
    topologies = values["graph.topologies"]
    for name in ("loss.links", "loss.messages"):
        check_loss(f"config.{name}", values[name])
    if EDGES in topologies:
        if not values["graph.edges"]:
            raise UserError("config.graph.edges is ''; accepted: a file, for topology 'edges'")
        values["graph.edges"] = str(Path(values["graph.edges"]).expanduser().absolute())
    if topologies != (EDGES,) and not values["graph.n_nodes"]:
        raise UserError(
            "config.graph.n_nodes is 0; accepted: at least 2, or 0 where the only topology is "
            "'edges'"
        )
    if values["graph.mixing"] == "given" and topologies != (EDGES,):
        raise UserError(
            "config.graph.mixing is 'given', but only edges of a file have weights; accepted: "
            "topologies ('edges',), or 'metropolis' or 'maximum_degree'"
        )
    if values["graph.radius"] and GEOMETRIC not in topologies:
        raise UserError(
            f"config.graph.radius is {values['graph.radius']}, but no topology is 'geometric'; "
            "accepted: 0"
        )
    return nest(values)


def run_experiment(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Computes what a config asks for and draws it, or goes on where that stopped.

    Args:
      config: complete; see `fields_of`, and the files ``configs/consensus_*.py``.
      workdir: receives ``cases/*.npz``, pictures, tables (Markdown and CSV) and ``results.json``.

    Returns:
      What is in ``results.json``.

    Raises:
      UserError: the config, a graph, the data or the workdir cannot be used.
      CollapseError: a case diverged; all others are done, and everything is written.
      Interrupted: SIGTERM or Ctrl-C came; every case that had ended is saved.
    """
    config = validate(config)
    with jax.enable_x64(config.precision == "float64"):
        task = _task_module(config.task).make_task(config)
        workdir = Path(workdir).absolute()
        folder = experiment_folder.held(
            workdir, config, fields_of(config), _RUNTIME, task.fingerprint
        )
        with folder, Interruption() as interruption:
            found = _compute(task, workdir / CASES_FOLDER, interruption)
            outcome = task.write(workdir, found)
            results = {"task": config.task, **outcome.results}
            results = write_json(workdir / RESULTS_FILE, results)
            if outcome.collapse:
                raise CollapseError(outcome.collapse)
            return results


def _task_module(name: str) -> Any:
    return importlib.import_module(f"jkmeans.consensus.tasks.{name}")


def _compute(task: Task, folder: Path, interruption: Interruption) -> dict[str, Arrays]:
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    found = {case.name: _read(folder, case) for case in task.cases}
    todo = [case for case in task.cases if found[case.name] is None]
    begun = time.monotonic()

    check = Check(interruption)
    for n_done, case in enumerate(todo, 1):
        check()
        started = time.monotonic()
        arrays = case.run(check)
        write_arrays(_path(folder, case), arrays)
        found[case.name] = arrays
        now = time.monotonic()
        left = (now - begun) / n_done * (len(todo) - n_done)
        remark(
            f"case {len(task.cases) - len(todo) + n_done} of {len(task.cases)}: {case.name}, "
            f"{now - started:.1f} s" + (f"; {format_duration(left)} left" if left else "")
        )
    return {name: arrays for name, arrays in found.items() if arrays is not None}


def _read(folder: Path, case: Case) -> Arrays | None:
    """What a case left; None where it left nothing that can be read."""
    try:
        return read_arrays(_path(folder, case))
    except UNREADABLE:
        return None


def _path(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}.npz"
