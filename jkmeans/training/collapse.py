"""Whether there is something left to cluster, and what to try where there is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jkmeans.configuration import Config
from jkmeans.errors import CollapseError
from jkmeans.workdir import CHECKPOINT_FOLDER, has_checkpoints

_VARIANCE = "embedding_variance"


def check_pretrained(config: Config, workdir: Path, found: Mapping[str, float]) -> None:
    """Raises CollapseError where the embeddings to be clustered first are not finite.

    The loss of an epoch is that before its last step, and does not show it.

    Args:
      config: of the run.
      workdir: of the run.
      found: what the program that made the first clusters says of them.
    """
    if np.isfinite(found[_VARIANCE]):
        return
    n_epochs = config.training.n_pretrain_epochs
    if not n_epochs:
        raise CollapseError(
            "the embeddings of the network as it was drawn are not finite; try another "
            "network.initializer, or examples scaled down"
        )
    raise CollapseError(
        f"the embeddings are not finite after {n_epochs} epochs of pretraining: it diverged; "
        f"try a smaller training.learning_rate{_kept(workdir)}"
    )


def check_epoch(
    config: Config, workdir: Path, values: Mapping[str, float], reference: float, epoch: int
) -> None:
    """Raises CollapseError where there is nothing left to cluster.

    Args:
      config: of the run.
      workdir: of the run.
      values: the metrics of the epoch.
      reference: the variance of the embeddings that theirs is compared with.
      epoch: that ended.
    """
    for name, field in (("loss", "loss"), ("variance of the embeddings", _VARIANCE)):
        if not np.isfinite(values[field]):
            raise CollapseError(
                f"the {name} is {values[field]} in epoch {epoch}: training diverged; try "
                f"{_remedies(config, epoch)}{_kept(workdir)}"
            )
    least = config.training.collapse_ratio * reference
    most = reference / max(config.training.collapse_ratio, 1e-30)
    if values[_VARIANCE] > most:
        # The embeddings of VaDE are Gaussian.
        bounded = config.network.normalize or config.objective.name == "vade"
        unit_norm = "" if bounded else "network.normalize = True or "
        raise CollapseError(
            f"the embeddings ran away in epoch {epoch}: their variance is "
            f"{values[_VARIANCE]:.3g}, and was {reference:.3g} at first; try "
            f"{unit_norm}{_remedies(config, epoch)}{_kept(workdir)}"
        )
    if values[_VARIANCE] < least:
        raise CollapseError(
            f"the embeddings collapsed in epoch {epoch}: their variance is "
            f"{values[_VARIANCE]:.3g}, below training.collapse_ratio = "
            f"{config.training.collapse_ratio:g} of the {reference:.3g} it began with; "
            f"try {_remedies(config, epoch)}{_kept(workdir)}"
        )


def _remedies(config: Config, epoch: int) -> str:
    """What to try where the phase of an epoch went wrong."""
    if epoch <= config.training.n_pretrain_epochs:
        return "a smaller training.learning_rate"
    # The user's own objective has that field, but is not called with it.
    weighted = "centroid_weight" in config.objective
    if not weighted or ":" in config.objective.name:
        return "a smaller training.clustering_learning_rate"
    return "a smaller training.clustering_learning_rate or objective.centroid_weight"


def _kept(workdir: Path) -> str:
    """Where what was saved before is, if anything was."""
    if not has_checkpoints(workdir):
        return ""
    return f"; what was saved before is in {workdir / CHECKPOINT_FOLDER}"
