"""What the experiments on parallel vector quantization quantize."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jkmeans import datasets
from jkmeans.configuration import Config
from jkmeans.errors import UserError
from jkmeans.sources import Source, open_source
from jkmeans.vq.mixtures import spline_mixture

MIXTURE = "mixture"
_CHUNK_BYTES = 2**26
NAMED = (MIXTURE, *datasets.NAMED)


def load_samples(config: Config) -> np.ndarray:
    """The samples of a config, in their original order.

    Args:
      config: validated; its groups ``data`` and ``mixture`` and its ``seed`` are used.

    Returns:
      [N, d] float32: of the mixture, images of a named set (their pixels, or patches of them), or
      rows of a file.

    Raises:
      UserError: the data cannot be read, or not be cut as asked for.
    """
    name, n_samples = config.data.input, config.data.n_samples
    if name == MIXTURE:
        mixture = config.mixture
        return spline_mixture(
            config.seed, n_samples, mixture.n_components, mixture.n_features, mixture.n_knots
        )
    return load_rows(name, n_samples, patch=config.data.patch, seed=config.seed, named=NAMED)


def load_rows(
    name: str,
    n_samples: int,
    *,
    patch: int = 0,
    seed: int,
    named: Sequence[str] = datasets.NAMED,
) -> np.ndarray:
    """Images of a named set, their pixels or patches of them, or rows of a file, in their order.

    Args:
      name: of the set, or of the file.
      n_samples: drawn from them; 0 for all.
      patch: side of the patches; 0 for whole images.
      seed: of the draw.
      named: what could have been named instead of a file, for the error.

    Returns:
      [N, d] float32.

    Raises:
      UserError: the data cannot be read, or not be cut as asked for.
    """
    if name in datasets.NAMED:
        dataset = datasets.load(name)
        images = dataset.examples * np.float32(dataset.scale)
        if patch:
            images = cut_patches(images, patch)
        rows = images.reshape(len(images), -1)
        return rows[_drawn(name, len(rows), n_samples, seed)]
    source = open_source(name, named=named)
    return _read_rows(source, _drawn(name, source.n_rows, n_samples, seed))


def _drawn(name: str, n_rows: int, n_samples: int, seed: int) -> np.ndarray:
    """Which rows of a data set are used, in their order."""
    if n_samples > n_rows:
        raise UserError(
            f"config.data.n_samples is {n_samples:,}, but {name} has {n_rows:,}; accepted: up "
            "to that many, or 0 for all"
        )
    if not n_samples:
        return np.arange(n_rows)
    # Drawn rather than the first: patches of one image come one after another.
    return np.sort(np.random.default_rng(seed).permutation(n_rows)[:n_samples])


def _read_rows(source: Source, chosen: np.ndarray) -> np.ndarray:
    """Rows of a source, of which no more than these and a chunk are in memory."""
    rows = np.empty((len(chosen), source.n_features), np.float32)
    size = max(1, _CHUNK_BYTES // (source.n_features * source.dtype.itemsize))
    for start in range(0, source.n_rows, size):
        first, last = np.searchsorted(chosen, (start, start + size))
        if first == last:
            continue
        chunk = source.read(start, min(start + size, source.n_rows))
        where = f"{source.name} from row {start:,} on" if start else source.name
        rows[first:last] = datasets.check_examples(chunk, name=where)[chosen[first:last] - start]
    return rows


def cut_patches(images: np.ndarray, size: int) -> np.ndarray:
    """All patches of images that lie side by side, from the top left; the rest is not used.

    Args:
      images: [n, height, width].
      size: p, at most height and width.

    Returns:
      [n · (height // p) · (width // p), p, p].

    Raises:
      UserError: patches are larger than the images.
    """
    n, height, width = images.shape
    if size > min(height, width):
        raise UserError(
            f"config.data.patch is {size}, but images have {height}×{width} pixels; accepted: 1 to "
            f"{min(height, width)}, or 0 for whole images"
        )
    rows, columns = height // size, width // size
    cut = images[:, : rows * size, : columns * size]
    return cut.reshape(n, rows, size, columns, size).swapaxes(2, 3).reshape(-1, size, size)


def first_prototypes(
    rng: np.random.Generator, samples: np.ndarray, n_clusters: int, n_averaged: int
) -> np.ndarray:
    """w(0): each prototype the mean of some samples drawn for it, all of them different.

    Args:
      rng: the source of randomness.
      samples: [N, d].
      n_clusters: k; k times ``n_averaged`` is at most N.
      n_averaged: how many samples a prototype is the mean of; 1 for samples themselves, 20 in the
        program of Durut, Patra and Rossi.

    Returns:
      [k, d] float32.

    Raises:
      UserError: there are fewer samples than that.
    """
    needed = n_clusters * n_averaged
    if needed > len(samples):
        raise UserError(
            f"config.n_clusters is {n_clusters:,} and init_samples {n_averaged:,}, which takes "
            f"{needed:,} samples, but there are {len(samples):,}; accepted: up to that many"
        )
    chosen = rng.choice(len(samples), needed, replace=False)
    groups = samples[chosen].reshape(n_clusters, n_averaged, -1)
    return groups.mean(axis=1, dtype=np.float64).astype(np.float32)
