"""What is read off the records of the epochs: series, terms of the loss, names of phases.

They are as `jkmeans.recorder.read_metrics` returns them, one mapping an epoch: "epoch", "phase" and
the metrics by name, absent or None where nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PHASE_NAMES = {"pretrain": "pretraining", "cluster": "clustering"}


def phase_name(phase: Any) -> str:
    """What a reader calls the phase of a record, which may have none."""
    return PHASE_NAMES.get(str(phase), str(phase)) if phase is not None else "training"


def finite(value: Any) -> float | None:
    """The value as a number, or None where it is none or not finite."""
    if not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return None
    return float(value)


def series_of(
    metrics: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A metric over the epochs, without what is not finite.

    Returns:
        (epochs [e], values [e]) for each stretch of one phase that has values.
    """
    phases: list[tuple[list[float], list[float]]] = []
    previous = None
    for record in metrics:
        if record.get("phase") != previous or not phases:
            previous = record.get("phase")
            phases.append(([], []))
        value = record.get(name)
        if value is not None and np.isfinite(value):
            phases[-1][0].append(record["epoch"])
            phases[-1][1].append(value)
    return [(np.asarray(epochs), np.asarray(values)) for epochs, values in phases if epochs]


def recorded_names(
    metrics: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, str]:
    """Of metrics and what a legend calls them, those of which there is a finite value."""
    return {name: label for name, label in names.items() if series_of(metrics, name)}


def agreement_names(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The metrics of agreement that were recorded, with what a legend calls them."""
    return recorded_names(metrics, {"acc": "ACC", "nmi": "NMI", "ari": "ARI"})


def loss_names(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The loss and its terms that were recorded, with what a legend calls them."""
    terms = dict.fromkeys(name for r in metrics for name in r if name.startswith("loss/"))
    terms = recorded_names(metrics, {name: name.removeprefix("loss/") for name in terms})
    # With a single term the total is that term.
    total = {} if len(terms) == 1 else recorded_names(metrics, {"loss": "total"})
    return {**total, **terms}
