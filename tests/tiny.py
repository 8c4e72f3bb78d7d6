"""A run small enough for tests: 203 examples of 3 blobs in 12 dimensions, 4 × 2 epochs."""

import importlib
import importlib.util

import numpy as np
import pytest

from jkmeans import datasets

N_EXAMPLES = 203  # Prime to 8 and to the batch size, so that padding is everywhere.


def blobs(n: int = N_EXAMPLES, d: int = 12, k: int = 3, seed: int = 0):
    """Examples [n, d] float32 and their blob [n] int32."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n).astype(np.int32)
    centers = rng.normal(size=(k, d)) * 2
    return (centers[labels] + 0.3 * rng.normal(size=(n, d))).astype(np.float32), labels


def dataset(**options) -> datasets.Dataset:
    """The blobs as a data set."""
    examples, labels = blobs(**options)
    return datasets.from_arrays(examples, labels, name="blobs")


def config(**changes):
    """A complete config; changes name fields with ``__`` between groups."""
    values = importlib.import_module("configs.npy").get_config()
    small = {
        "data.path": "blobs.npy",
        "n_clusters": 3,
        "network.widths": (16,),
        "network.embedding_dim": 4,
        "training.batch_size": 32,
        "training.n_pretrain_epochs": 2,
        "training.n_epochs": 2,
        "objective.warmup_epochs": 1.0,
        "centroids.n_init": 1,
        "checkpoint.every": 1,
        "report.pictures": False,
    }
    for name, value in (small | {k.replace("__", "."): v for k, v in changes.items()}).items():
        *groups, leaf = name.split(".")
        node = values
        for group in groups:
            node = node[group]
        node[leaf] = value
    return values


def all_but_slow(among, *names) -> list:
    """For ``parametrize``: all of ``among``, of which those that are not named are slow tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in among]


def skip_without_umap() -> None:
    """Where a config of N2D is refused; umap itself takes 10 seconds to import."""
    if importlib.util.find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
