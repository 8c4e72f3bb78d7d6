"""How many clusters: k-means over a range of K, judged by inertia, silhouette and stability.

The sweep shares its compiled programs: one k-means++ run of the largest K gives the starts of every
K (its first K rows are a k-means++ run themselves), and all K up to the same power of two run in
one Lloyd program, the surplus centroids switched off.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jkmeans import kmeans
from jkmeans.metrics import adjusted_rand_index

STABLE = 0.9
"""Refits whose mean pairwise ARI is at least this found the same clusters, for all one can see."""

WEAK = 0.25
"""A silhouette below this is no substantial structure: Kaufman and Rousseeuw 1990, table 4."""

SILHOUETTE_ROWS = 4000
"""Rows of the sample that silhouettes are computed from: all their distances are."""

_LEAST_WIDTH = 8
_BLOCK_DISTANCES = 2**22  # of a block of rows to all rows, in memory at a time


class Judged(NamedTuple):
    """One K.

    Attributes:
      n_clusters: K.
      inertia: sum of squared distances of the sample, of the best restart.
      silhouette: mean of the sample, −1 to 1.
      stability: mean adjusted Rand index of all pairs of refits to bootstrap samples, up to 1.
      centroids: [K, d], of the best restart on the sample itself.
    """

    n_clusters: int
    inertia: float
    silhouette: float
    stability: float
    centroids: np.ndarray


class SweepResult(NamedTuple):
    """What `sweep` found.

    Attributes:
      n_clusters: [m] int, the values of K, rising.
      inertia: [m] float, of the sample.
      silhouette: [m] float.
      stability: [m] float.
      centroids: m arrays [K, d].
      suggestion: the K to take.
      reason: why, in a sentence.
      n_rows: rows of the sample.
    """

    n_clusters: np.ndarray
    inertia: np.ndarray
    silhouette: np.ndarray
    stability: np.ndarray
    centroids: list[np.ndarray]
    suggestion: int
    reason: str
    n_rows: int


def sweep(
    key: jax.Array,
    x: np.ndarray | jax.Array,
    n_clusters: Sequence[int],
    *,
    n_init: int = 4,
    n_refits: int = 10,
    max_iter: int = 100,
    tol: float = 1e-4,
    sample_size: int = 10_000,
) -> SweepResult:
    """k-means for each of several K on one sample, three judgements of each, and a suggestion.

    Args:
      key: a JAX random key.
      x: [n, d], any real dtype, finite; a memory map is read only where the sample lies.
      n_clusters: the values of K, each from 2 to below the rows of the sample.
      n_init: restarts of every fit, of which the one of least inertia is kept.
      n_refits: fits to bootstrap samples for the stability, at least 2.
      max_iter: Lloyd iterations of a restart, at most.
      tol: a restart ends when the squared shift of its centroids is at most ``tol`` times the mean
        variance of the features.
      sample_size: rows that are looked at; 0 for all.

    Returns:
      SweepResult.

    Raises:
      ValueError: an argument is out of its range, or a row of the sample is not finite.

    Sources: silhouette, Rousseeuw 1987. Stability, Ben-Hur, Elisseeff and Guyon, PSB 2002, and
    von Luxburg, Clustering stability: an overview, 2010, section 2: clusterings of bootstrap
    samples are extended to the whole sample by nearest centroid and compared.
    """
    rows = sample(key, x, sample_size)
    steps = Sweep(
        key, rows, n_clusters, n_init=n_init, n_refits=n_refits, max_iter=max_iter, tol=tol
    )
    return steps.result([steps.judge(k) for k in steps.n_clusters])


def sample(key: jax.Array, x: np.ndarray | jax.Array, size: int) -> np.ndarray:
    """Different rows of x in their order, drawn uniformly: [min(n, size), d] float32 or float64.

    Args:
      key: a JAX random key.
      x: [n, d]; only the chosen rows are read.
      size: how many; 0 for all.
    """
    n = len(x)
    rows = x if size <= 0 or size >= n else x[sample_rows(key, n, size)]
    rows = np.asarray(rows)
    return rows if rows.dtype == np.float64 else rows.astype(np.float32)


def sample_rows(key: jax.Array, n: int, size: int) -> np.ndarray:
    """``size`` different numbers below n, rising: [size] int64."""
    # On the host: JAX would shuffle all n.
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32))
    return np.sort(generator.choice(n, size, replace=False))


def unit_of(rows: np.ndarray) -> float:
    """A power of two to divide float64 rows by that float32 cannot square, or 1.

    Args:
      rows: [s, d] float, around 0.
    """
    largest = float(np.max(np.abs(rows), initial=0))
    if rows.dtype != np.float64 or largest == 0 or 1e-12 < largest < 1e12:
        return 1.0
    return 2.0 ** math.floor(math.log2(largest))


class Sweep:
    """A sweep in steps, one K at a time, for who wants to show progress or stop in between.

    Args:
      key: a JAX random key.
      rows: [s, d] float, the sample.
      n_clusters: the values of K.
      n_init: see `sweep`.
      n_refits: see `sweep`.
      max_iter: see `sweep`.
      tol: see `sweep`.

    Raises:
      ValueError: as `sweep`.
    """

    def __init__(
        self,
        key: jax.Array,
        rows: np.ndarray,
        n_clusters: Sequence[int],
        *,
        n_init: int = 4,
        n_refits: int = 10,
        max_iter: int = 100,
        tol: float = 1e-4,
    ):
        ks = sorted({int(k) for k in n_clusters})
        if not ks or ks[0] < 2 or ks[-1] >= len(rows):
            raise ValueError(
                f"n_clusters is {tuple(n_clusters)}; accepted: numbers from 2 to below the "
                f"{len(rows)} rows of the sample"
            )
        for name, value, least in (("n_init", n_init, 1), ("n_refits", n_refits, 2)):
            if value < least:
                raise ValueError(f"{name} is {value}; accepted: at least {least}")
        n_bad = len(rows) - int(np.isfinite(rows).all(axis=1).sum())
        if n_bad:
            raise ValueError(
                f"the sample has NaN or infinity in {n_bad:,} of its {len(rows):,} rows; accepted: "
                "finite values"
            )
        self.n_clusters = ks
        self._largest = ks[-1]
        # What float32 keeps of the rows must not be the offset; float64 may become float32 in JAX.
        mean = rows.mean(axis=0, dtype=np.float64)
        if rows.dtype != np.float64:
            mean = kmeans.far_origin(mean, rows.var(axis=0, dtype=np.float64))
        self._offset = mean.astype(rows.dtype)
        centered = rows - self._offset
        self._unit = unit_of(centered)
        centered /= self._unit
        self._rows = jnp.asarray(centered)
        self._max_iter = max_iter
        self._tol = tol * float(np.var(centered, axis=0, dtype=np.float64).mean())
        start_key, weight_key, self._silhouette_key = jax.random.split(key, 3)
        counts = bootstrap_counts(weight_key, n_refits, len(rows))
        # The sample itself comes first.
        self._weights = jnp.concatenate([jnp.ones((1, len(rows)), counts.dtype), counts])
        self._start_key, self._n_init = start_key, n_init

    @functools.cached_property
    def _starts(self) -> jax.Array:
        return _seeds(self._start_key, self._rows, self._weights, self._n_init, self._largest)

    def judge(self, k: int) -> Judged:
        """Fits K clusters to the sample and to its bootstrap samples, and judges them."""
        # A few widths, hence a few programs, for any K.
        width = min(max(_LEAST_WIDTH, 1 << (k - 1).bit_length()), self._largest)
        fits = _fits(
            self._rows, self._weights, self._starts[:, :, :width], k, self._max_iter, self._tol
        )
        labels = np.asarray(fits.labels)
        refits = [labels[i] for i in range(1, len(labels))]
        agreement = [adjusted_rand_index(a, b) for a, b in itertools.combinations(refits, 2)]
        return Judged(
            n_clusters=k,
            inertia=float(fits.inertia[0]) * self._unit**2,
            silhouette=self._silhouette(labels[0]),
            stability=float(np.mean(agreement)),
            centroids=np.asarray(fits.centroids[0, :k], self._offset.dtype) * self._unit
            + self._offset,
        )

    def result(self, judged: Sequence[Judged]) -> SweepResult:
        """All K together, with a suggestion."""
        judged = sorted(judged, key=lambda one: one.n_clusters)
        columns = list(zip(*judged, strict=True))
        ks, inertia, silhouettes, stability = (np.asarray(column) for column in columns[:4])
        k, reason = suggest(ks, silhouettes, stability)
        return SweepResult(
            ks, inertia, silhouettes, stability, list(columns[4]), k, reason, len(self._rows)
        )

    def _silhouette(self, labels: np.ndarray) -> float:
        n = len(labels)
        chosen = np.arange(n)
        if n > SILHOUETTE_ROWS:
            chosen = sample_rows(self._silhouette_key, n, SILHOUETTE_ROWS)
        # The largest K for every K: one program.
        values = silhouette_samples(self._rows[chosen], labels[chosen], self._largest)
        return float(jnp.mean(values))


def suggest(
    n_clusters: np.ndarray, silhouette: np.ndarray, stability: np.ndarray
) -> tuple[int, str]:
    """The K of the highest silhouette among those that are stable, and why.

    Args:
      n_clusters: [m] int.
      silhouette: [m] float; NaN where all rows are in one cluster.
      stability: [m] float.

    Returns:
      K, and a sentence. Where no K is stable, the most stable one; where no silhouette is known,
      the smallest.
    """
    known = np.isfinite(silhouette)
    if not known.any():
        return int(n_clusters[0]), (
            "all rows are in one cluster whatever K is: they do not differ, or by less than "
            f"rounding; K = {n_clusters[0]} is the smallest of the sweep, and there is nothing to "
            "choose by"
        )
    silhouette, stability = (np.where(known, each, -np.inf) for each in (silhouette, stability))
    stable = stability >= STABLE
    if stable.any():
        best = int(np.argmax(np.where(stable, silhouette, -np.inf)))
        among = "all of them are" if stable.all() else f"{stable.sum()} of {len(stable)} are"
        reason = (
            f"K = {n_clusters[best]} has the highest silhouette ({silhouette[best]:.2f}) of the "
            f"stable values of K, whose refits agree with an ARI of {STABLE} or more ({among})"
        )
        if silhouette[best] < silhouette.max():
            peak = int(np.argmax(silhouette))
            reason += (
                f"; K = {n_clusters[peak]} has {silhouette[peak]:.2f}, but its refits agree by "
                f"{stability[peak]:.2f} only"
            )
    else:
        best = int(np.argmax(stability))
        reason = (
            f"no K is stable (refits agree with an ARI of {STABLE} or more); K = "
            f"{n_clusters[best]} comes nearest ({stability[best]:.2f}, silhouette "
            f"{silhouette[best]:.2f})"
        )
    if silhouette[best] < WEAK:
        reason += f"; a silhouette below {WEAK} says that clusters are hardly separated"
    if len(n_clusters) > 1 and best in (0, len(n_clusters) - 1) and n_clusters[best] != 2:
        reason += "; it is at the edge of the sweep: try a wider one"
    around = n_clusters[max(0, best - 1) : best + 2]
    if (np.diff(around) > 1).any():
        reason += f"; between {around[0]} and {around[-1]} the sweep left some K out: try those too"
    return int(n_clusters[best]), reason


def bootstrap_counts(key: jax.Array, n_samples: int, n: int) -> jax.Array:
    """How often each row is in each of several bootstrap samples: [n_samples, n] float32."""

    def one(sample_key: jax.Array) -> jax.Array:
        drawn = jax.random.randint(sample_key, (n,), 0, n)
        return jnp.zeros(n, jnp.float32).at[drawn].add(1)

    return jax.jit(jax.vmap(one))(jax.random.split(key, n_samples))


class _Fits(NamedTuple):
    """The best restart of each fit: fields [r, …]."""

    centroids: jax.Array
    labels: jax.Array
    inertia: jax.Array


@functools.partial(jax.jit, static_argnums=(3, 4))
def _seeds(key, x, weights, n_init: int, k: int) -> jax.Array:
    """k-means++ starts of every restart of every fit: [r, n_init, k, d]."""

    def start(i):
        return kmeans.kmeans_plus_plus(
            jax.random.fold_in(key, i), x, k, weights=weights[i // n_init]
        )

    n_fits = weights.shape[0]
    starts = lax.map(start, jnp.arange(n_fits * n_init))
    return starts.reshape(n_fits, n_init, k, x.shape[1])


@jax.jit
def _fits(x, weights, starts, k, max_iter, tol) -> _Fits:
    """The best Lloyd run of each fit, with the first k of its centroids only."""

    def fit(arguments) -> _Fits:
        fit_weights, fit_starts = arguments
        runs = lax.map(lambda start: _lloyd(x, fit_weights, start, k, max_iter, tol), fit_starts)
        best = jnp.argmin(runs.inertia)
        return jax.tree.map(lambda leaf: leaf[best], runs)

    return lax.map(fit, (weights, starts))


def _lloyd(x, weights, start, k, max_iter, tol) -> _Fits:
    """Lloyd's algorithm with a number of clusters that is not known when it is compiled.

    Centroids from k on lie on the first one. They tie with it, and ties go to the lowest index;
    should rounding decide otherwise, the row is the first one's all the same.
    """
    width = start.shape[0]

    def on_first(centroids):
        return jnp.where((jnp.arange(width) < k)[:, None], centroids, centroids[:1])

    def label(centroids):
        labels = kmeans.nearest(x, centroids)
        return jnp.where(labels < k, labels, 0)

    def step(carry):
        centroids, _, n_iter = carry
        statistics = kmeans.cluster_statistics(x, label(centroids), width, weights=weights)
        moved = on_first(kmeans.centroids_from(statistics, centroids))
        return moved, jnp.sum((moved - centroids) ** 2), n_iter + 1

    def unfinished(carry):
        _, shift, n_iter = carry
        return (n_iter < max_iter) & (shift > tol)

    first = (on_first(start), jnp.full((), jnp.inf, start.dtype), jnp.int32(0))
    centroids, _, _ = lax.while_loop(unfinished, step, first)
    labels = label(centroids)
    inertia = jnp.sum(weights * kmeans.squared_distances(x, centroids, labels))
    return _Fits(centroids, labels, inertia)


@functools.partial(jax.jit, static_argnums=2)
def silhouette_samples(x: jax.Array, labels: jax.Array, n_clusters: int) -> jax.Array:
    """The silhouette of each row: exact, from all pairs of rows, tiled.

    s(i) = (b − a) / max(a, b), with a the mean distance of row i to the others of its cluster and b
    the least mean distance to the rows of another one; 0 for a cluster of one row.

    Args:
      x: [n, d], any real dtype; computed in float32 (float64 if x is).
      labels: [n] int, in 0 … k-1.
      n_clusters: k; clusters without rows are passed over.

    Returns:
      [n] float, from −1 to 1; NaN where fewer than two clusters have rows.

    Source: Rousseeuw, Silhouettes, J. Comput. Appl. Math. 20 (1987).
    """
    x = jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32))
    x = x - jnp.mean(x, axis=0, keepdims=True)
    n = x.shape[0]
    one_hot = jax.nn.one_hot(labels, n_clusters, dtype=x.dtype)
    counts = jnp.sum(one_hot, axis=0)
    norms = jnp.sum(x**2, axis=1)

    def of_row_block(rows_b):
        x_bd, own = x[rows_b], labels[rows_b]
        products_bn = jnp.matmul(x_bd, x.T, precision=lax.Precision.HIGHEST)
        squares_bn = norms[rows_b][:, None] - 2 * products_bn + norms[None, :]
        # The distance of a row to itself is 0, which rounding misses.
        is_self = rows_b[:, None] == jnp.arange(n)[None, :]
        distances_bn = jnp.sqrt(jnp.where(is_self, 0, jnp.maximum(squares_bn, 0)))
        sums_bk = jnp.matmul(distances_bn, one_hot, precision=lax.Precision.HIGHEST)
        is_own = own[:, None] == jnp.arange(n_clusters)[None, :]
        own_count = counts[own]
        a = jnp.sum(jnp.where(is_own, sums_bk, 0), axis=1) / jnp.maximum(own_count - 1, 1)
        others = (counts > 0)[None, :] & ~is_own
        b = jnp.min(jnp.where(others, sums_bk / jnp.maximum(counts, 1)[None, :], jnp.inf), axis=1)
        larger = jnp.maximum(a, b)
        value = jnp.where(larger > 0, (b - a) / jnp.where(larger > 0, larger, 1), 0)
        value = jnp.where(own_count > 1, value, 0)
        return jnp.where(jnp.isfinite(b), value, jnp.nan)

    n_rows = max(1, min(n, _BLOCK_DISTANCES // n))
    n_blocks = -(-n // n_rows)
    blocks = jnp.minimum(jnp.arange(n_blocks * n_rows), n - 1).reshape(n_blocks, n_rows)
    return lax.map(of_row_block, blocks).reshape(-1)[:n]
