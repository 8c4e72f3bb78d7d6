"""Errors that are answers to the user: one sentence, no traceback, a stated exit status."""

import math

import numpy as np


class UserError(Exception):
    """Something the user gave cannot be used; launchers print the sentence and exit with 2.

    The message says in one sentence what was wrong, which value it was, and what is accepted.
    """

    exit_status = 2


class CollapseError(Exception):
    """Training stopped because the embeddings collapsed or diverged; launchers exit with 3.

    Everything saved before the collapse is still in the workdir.
    """

    exit_status = 3


class LostError(Exception):
    """Another process died, hangs or never came; launchers exit with 75, "try again".

    Nothing is wrong with what the user gave: all processes started again go on from the last
    checkpoint. `jkmeans.processes.supervisor` does that on one machine, an engine on a cluster.
    """

    exit_status = 75


def refuse_overflow(inertia: float, dtype: object, error: type[Exception] = UserError) -> None:
    """Refuses finite rows that are so large that sums of their squares are not.

    Args:
      inertia: such a sum.
      dtype: of the sum.
      error: what is raised.

    Raises:
      UserError: the inertia is not finite; or ``error``.
    """
    if not math.isfinite(inertia):
        raise error(
            f"the inertia is {inertia}: squares of such large values overflow {dtype}; accepted: "
            "rows scaled down, or as float64"
        )


def weight_bounds(dtype: object) -> tuple[float, float]:
    """The least that the largest weight of rows may be, and the most that weights may add up to.

    Only their ratios matter; so small or large, sums and products in this dtype lose them.
    """
    return (2.0**-900, 2.0**900) if dtype == np.float64 else (2.0**-100, 2.0**110)


def refuse_mask(name: str, array: object, error: type[Exception] = UserError) -> None:
    """Refuses a masked array, whose mask nothing here would look at.

    Raises:
      UserError: it is one; or ``error``.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise error(
            f"{name} is a masked array; accepted: an array without a mask (what is masked can have "
            "a sample_weight of 0, or be left out)."
        )


def underflow_sentence(centroids: np.ndarray) -> str:
    """What to say of rows so small that their squares vanish; empty if they are not.

    Args:
      centroids: [k, d] float, somewhere among the rows.
    """
    largest = float(np.max(np.abs(centroids), initial=0))
    if largest == 0 or largest >= np.sqrt(np.finfo(centroids.dtype).tiny):
        return ""
    return (
        f"no value is above {largest:.2g} in size: squares of such small ones vanish in "
        f"{centroids.dtype}, and with them the differences between rows; scale the rows up"
        + (", or give them as float64" if centroids.dtype == np.float32 else "")
    )
