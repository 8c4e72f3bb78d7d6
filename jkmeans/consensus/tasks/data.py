"""Points for the tasks that cluster: loaded, reduced to few features, dealt to nodes."""

from __future__ import annotations

import numpy as np

from jkmeans import datasets
from jkmeans.configuration import Config
from jkmeans.consensus.tasks.base import number_type
from jkmeans.errors import UserError
from jkmeans.fields import Field, integer, text
from jkmeans.vq.data import MIXTURE, load_rows

DEALS = ("shuffled", "sorted")

FIELDS: dict[str, Field] = {
    "data.input": text(
        f"{', '.join(datasets.NAMED)}, or a .npy file, a folder of them, .zarr or Parquet"
    ),
    "data.n_samples": integer(0, "drawn from them; 0 for all"),
    "data.n_features": integer(0, "principal components that are kept; 0 for what there is"),
}


def load_points(config: Config) -> np.ndarray:
    """The points of a config: [n, d] float32.

    Raises:
      UserError: the data cannot be read, or has fewer features than asked for.
    """
    from sklearn.decomposition import PCA

    if not config.data.input or config.data.input == MIXTURE:
        raise UserError(
            f"config.data.input is {config.data.input!r}; accepted: {FIELDS['data.input'].meaning}"
        )
    points = load_rows(config.data.input, config.data.n_samples, seed=config.seed)
    n_features = config.data.n_features
    # Principal components are computed in the type of the points.
    seen = points if n_features else points.astype(number_type(config))
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.sum((seen - seen.mean(axis=0)) ** 2))
    if not np.isfinite(squares):
        wider = "" if n_features else ", or config.precision 'float64'"
        raise UserError(
            f"squares of values as large as those of {config.data.input} overflow {seen.dtype}; "
            f"accepted: rows scaled down{wider}"
        )
    if not n_features:
        return points
    most = min(points.shape)
    if n_features > most:
        raise UserError(
            f"config.data.n_features is {n_features}, but the data has {most} principal "
            f"components; accepted: 0 to {most}"
        )
    reduced = PCA(n_features, svd_solver="covariance_eigh").fit_transform(points)
    return np.ascontiguousarray(reduced, np.float32)


def order_of(points: np.ndarray, deal: str, seed: int) -> np.ndarray:
    """The order in which points are dealt, a stretch of it to each node: [n] int.

    "sorted": by the first principal component, so that each node has seen a corner of the data.
    """
    if deal == "shuffled":
        return np.random.default_rng(seed).permutation(len(points))
    centred = points - points.mean(axis=0)
    component = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    return np.argsort(centred @ component, kind="stable")


def stretches(points: np.ndarray, n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals points in their order, to each node a stretch of (nearly) the same length.

    Returns:
      [N, r, d], padded with zeros, and which rows count, [N, r] float.

    Raises:
      UserError: fewer points than nodes.
    """
    check_enough(len(points), n_nodes)
    parts = np.array_split(points, n_nodes)
    rows = max(map(len, parts))
    dealt = np.zeros((n_nodes, rows, points.shape[1]), points.dtype)
    counted = np.zeros((n_nodes, rows), points.dtype)
    for node, part in enumerate(parts):
        dealt[node, : len(part)], counted[node, : len(part)] = part, 1
    return dealt, counted


def check_enough(n_points: int, n_nodes: int) -> None:
    """Raises a UserError where some node would have no point."""
    if n_points < n_nodes:
        raise UserError(
            f"there are {n_points:,} points for {n_nodes:,} nodes; accepted: at least one each"
        )
