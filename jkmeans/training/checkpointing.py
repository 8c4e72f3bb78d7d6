"""The state of a run on the disk: saved, restored, or begun from a network of another run."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jkmeans import configuration, pretrained, processes, telling
from jkmeans.checkpoints import Checkpoints, DamagedError
from jkmeans.epoch import TrainState
from jkmeans.errors import UserError
from jkmeans.sharding import REPLICATED, place, relayout, to_host
from jkmeans.training.folder import is_same_data
from jkmeans.versions import PACKAGES, versions

if TYPE_CHECKING:
    from jkmeans.training.run import Run

_MODEL = ("parameters", "clusters")


def find_pretrained(run: Run) -> pretrained.Pretrained | None:
    """The network that another run has pretrained as this one would, if all processes find it."""
    # What the optimizer remembers is not kept with the network.
    continues = not run.method.fresh_optimizer
    found = None if continues else pretrained.load(run.config, run.data_record)
    if found is not None:
        found = found.of(run.blueprint)
    return None if processes.any_of(found is None) else found


def create_pretrained(run: Run, found: pretrained.Pretrained | None) -> tuple[TrainState, float]:
    """The state to begin with, and the seconds it stands for: pretrained, if that was found."""
    state = run.create()
    if found is None:
        return state, 0.0
    telling.tell(f"the network was pretrained by another run ({found.seconds:.0f} s)")
    everywhere = functools.partial(place, mesh=run.mesh, spec=REPLICATED)
    here = {name: everywhere(value) for name, value in found.parameters.items()}
    state = state._replace(
        # Layers that pretraining does not reach are as they were drawn.
        parameters=state.parameters | here,
        reference_variance=everywhere(np.asarray(found.reference_variance, np.float32)),
        epoch=everywhere(np.asarray(run.config.training.n_pretrain_epochs, np.int32)),
    )
    return state, found.seconds


def restore(
    run: Run, checkpoints: Checkpoints, among: Collection[int] | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state that can be read, with its record; None where there is none.

    Args:
      run: whose states they are.
      checkpoints: of the run.
      among: only these positions; all if None.

    Raises:
      UserError: the run is on other data, or of all its checkpoints none can be read.
    """
    positions = [p for p in checkpoints.positions() if among is None or p in among]
    for position in reversed(positions):
        try:
            record = checkpoints.record(position)
            if not is_same_data(record["data"], run.data_record):
                raise UserError(
                    f"{run.workdir} holds a run on other data: {record['data']} there, "
                    f"{run.data_record} now; accepted: the same data, or another --workdir"
                )
            return _restore(run, checkpoints, position, record), record
        except DamagedError as error:
            aside = checkpoints.set_aside(position)
            telling.warn(f"{error}; moved to {aside.name}, going back to the one before")
    if among is None and (positions or any(checkpoints.folder.glob("damaged-*"))):
        raise UserError(
            f"no checkpoint in {checkpoints.folder} can be read; accepted: one whole "
            "checkpoint, or another --workdir"
        )
    return None


def _restore(run: Run, checkpoints: Checkpoints, position: int, record: Any) -> TrainState:
    # As it was saved, then onto this mesh: padding at the end depends on the device count.
    n_rows = record["n_rows"]
    shardings = run.programs.shardings
    here = jax.eval_shape(run.programs.create, jax.ShapeDtypeStruct((), np.uint32))

    def abstract(field: str):
        sharding = getattr(shardings, field)
        if field not in ("bank", "labels"):
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                getattr(here, field),
            )
        leaf = getattr(here, field)
        fits = n_rows % run.mesh.size == 0
        return jax.ShapeDtypeStruct(
            (n_rows, *leaf.shape[1:]),
            leaf.dtype,
            sharding=sharding if fits else shardings.epoch,
        )

    fields = {field: abstract(field) for field in TrainState._fields}
    model = {field: fields.pop(field) for field in _MODEL}
    trees = checkpoints.load(position, {"model": model, "training": fields}).trees
    state = TrainState(**trees["model"], **trees["training"])
    if n_rows == run.layout.n_rows:
        return state
    return state._replace(
        bank=relayout(state.bank, run.layout, run.mesh),
        labels=relayout(state.labels, run.layout, run.mesh),
    )


def save(
    run: Run,
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
    position = epoch * run.n_steps + step + (results is not None)
    since_warmup = epoch - run.config.training.n_pretrain_epochs
    # Before, the weight of the centroids rises, and losses do not compare.
    warm = since_warmup - 1 >= run.method.warmup_epochs
    comparable = values is not None and since_warmup > 0 and warm
    checkpoints.save(
        position,
        {"model": model, "training": fields},
        {
            "config": configuration.to_json(run.config),
            "versions": versions(*PACKAGES),
            "data": run.data_record,
            "n_rows": run.layout.n_rows,
            "epoch": epoch,
            "step": step,
            "seconds": seconds,
            "results": results,
        },
        objective=values["loss"] if comparable else None,  # type: ignore[index]
    )


def keep_pretrained(run: Run, state: TrainState, seconds: float) -> None:
    """Leaves the network for other runs that would pretrain the same one."""
    parameters = {name: to_host(value) for name, value in state.parameters.items()}
    if not all(np.isfinite(value).all() for value in parameters.values()):
        return  # The last step diverged, as `check_pretrained` will say.
    variance = float(state.reference_variance)
    if processes.is_first():
        pretrained.save(
            run.config, run.data_record, pretrained.Pretrained(parameters, variance, seconds)
        )
