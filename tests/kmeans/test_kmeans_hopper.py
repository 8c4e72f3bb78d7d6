"""Certified labels by the kernel, in Pallas' interpreter, and by what it must equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans import kmeans
from jkmeans.kernels import screening
from jkmeans.kmeans import bounds, certified, hopper
from jkmeans.kmeans.certainty import (
    CERTIFIED,
    COMPARED,
    RECOMPUTED,
    REFINED,
    SETTLED,
    Radii,
    error_of,
    radii,
    rounded,
    share_of_sums,
)

plainly = screening.screen_plainly


@pytest.fixture(params=["plainly", pytest.param("kernel", marks=pytest.mark.slow)])
def screen(request):
    if request.param == "plainly":
        return plainly
    # It is not public yet.
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    return functools.partial(screening.screen, interpret=interpreter.InterpretGPUParams())


def crowded(k=150, d=40, n=256):
    """Centroids, and rows halfway between two of them, among three, on one, and out of range."""
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(k, d)).astype(np.float32)
    x = centroids[rng.integers(0, k, (n, 2))].mean(axis=1)
    x += 0.05 * rng.normal(size=(n, d)).astype(np.float32)
    x[100:150] = centroids[rng.integers(0, k, (50, 3))].mean(axis=1)
    x[10:30] = centroids[:20]
    x[3], x[4] = np.nan, 3e38
    return x, centroids


def float64_distances(x, centroids):
    return ((x[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(axis=2)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_labels_that_it_certifies_are_the_nearest(screen):
    x, centroids = crowded()
    # An origin that is not the middle, as where centroids have moved on.
    ready = hopper.make_ready(jnp.asarray(x), jnp.asarray(centroids[7:8]))
    at = bounds.geometry(jnp.asarray(centroids), ready.origin, jnp.zeros((0, 0), jnp.int32))
    first = hopper.look(ready, hopper.make_centroids(at), screen)
    undecided = hopper.undecided(first.levels)
    again = hopper.look_again(jnp.asarray(x), at, first, undecided.rows, screen)
    distances = float64_distances(x, centroids)
    nearest = np.argmin(distances, axis=1)
    levels, levels_again = np.asarray(first.levels), np.asarray(again.levels)
    assert set(levels.tolist()) == {CERTIFIED, COMPARED, RECOMPUTED}
    np.testing.assert_array_equal(levels[[3, 4]], RECOMPUTED)
    np.testing.assert_array_equal(levels_again[[3, 4]], RECOMPUTED)
    np.testing.assert_array_equal(levels[10:30], CERTIFIED)
    counts = [(levels == level).sum() for level in (RECOMPUTED, COMPARED)]
    assert [int(rows.count) for rows in undecided] == [counts[0], sum(counts)]
    order = np.asarray(undecided.with_pairs.rows)
    np.testing.assert_array_equal(levels[order[: counts[0]]], RECOMPUTED)
    np.testing.assert_array_equal(levels[order[counts[0] : sum(counts)]], COMPARED)
    certain = np.isin(levels_again, (CERTIFIED, REFINED))
    np.testing.assert_array_equal(np.asarray(again.labels)[certain], nearest[certain])
    # Of two that are left, one is the nearest.
    pair = levels_again == COMPARED
    two = np.stack([again.labels, again.rivals], axis=1)[pair]
    np.testing.assert_array_equal((two == nearest[pair, None]).any(axis=1), True)
    # Another look settles most of what is left, and leaves the rest as it was.
    seen = levels == RECOMPUTED
    assert np.mean(levels_again[seen] == RECOMPUTED) < 0.5
    np.testing.assert_array_equal(levels_again[~seen], levels[~seen])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_the_whole_assignment(screen):
    x, centroids = crowded()
    x[4] = 0

    def assign(precision):
        given = jnp.asarray(x), jnp.asarray(centroids), None
        options = {"precision": precision, "block_size": None, "screen": screen}
        return certified.nearest_by_kernel(*given, **options)

    found = assign("exact-kernel")
    right = np.asarray(kmeans.nearest(x, centroids))
    close = np.sort(float64_distances(np.nan_to_num(x), centroids), axis=1)
    told_apart = close[:, 1] - close[:, 0] > 1e-4
    np.testing.assert_array_equal(np.asarray(found.labels)[told_apart], right[told_apart])
    assert found.labels[3] == 0
    levels = set(np.asarray(found.levels).tolist())
    assert {CERTIFIED, COMPARED} <= levels
    fast = assign("fast-kernel")
    assert fast.labels[3] == 0
    assert np.mean(np.asarray(fast.labels) == right) > 0.9


def test_a_program_for_hopper_has_the_kernel_and_one_for_a_cpu_has_not(monkeypatch):
    monkeypatch.setattr(hopper, "suits", lambda n, d, k: True)
    x, centroids = jnp.zeros((1000, 40)), jnp.zeros((150, 40))
    program = jax.jit(functools.partial(kmeans.lloyd, max_iter=3, precision="exact-kernel"))
    module = jax.export.export(program, platforms=["cuda"])(x, centroids).mlir_module()
    # One for the first look, and one for the second.
    assert module.count("mosaic_gpu_v2") == 2
    assert "mosaic_gpu" not in jax.export.export(program)(x, centroids).mlir_module()


def test_elsewhere_it_is_left_out():
    assert not hopper.suits(10**6, 128, 1000)
    x, centroids = crowded()
    x[3:5] = 0
    ways = [kmeans.certified_nearest(x, centroids, precision=p) for p in ("exact", "exact-kernel")]
    for one, other in zip(*ways, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15, 1e25])
def test_units_hold_every_score(scale):
    rng = np.random.default_rng(0)
    reach = jnp.asarray(np.abs(rng.normal(size=1000)) * scale, jnp.float32)
    for k in (32, 20_000, 10**6):
        units, offsets, are_valid = hopper.units_for(reach, k)
        assert bool(are_valid.all())
        bits = screening.bits_of_slices(k)
        assert float((reach / units).max()) < 2.0 ** (31 - bits)
        # A score of either sign keeps the exponent of the offset, in which units are counted.
        for sign in (-1, 1):
            ends = np.asarray(offsets + sign * reach)
            np.testing.assert_array_equal(np.spacing(ends), np.asarray(units))
        if scale > 1e-20:
            assert float((reach / units).min()) > 0
            assert float(np.median(reach / units)) > 2.0 ** (28 - bits)
    assert not hopper.units_for(jnp.array([np.inf, np.nan, 3e38]), 100).are_valid.any()


def test_with_an_outlying_centroid_it_is_by_plain_products():
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(100, 40)).astype(np.float32)
    x = centroids[rng.integers(0, 100, 512)] + 0.1 * rng.normal(size=(512, 40))
    x, right = jnp.asarray(x, jnp.float32), float64_distances(x, centroids).argmin(axis=1)
    for scale in (1, 1e5):
        centroids[7] *= scale
        at = bounds.geometry(jnp.asarray(centroids), jnp.zeros((1, 40)), jnp.zeros((0, 0), int))
        assert bool(hopper.make_centroids(at).are_even) == (scale == 1)
        right = float64_distances(np.asarray(x), centroids).argmin(axis=1)
        for precision in ("exact-kernel", "fast-kernel"):
            options = {"precision": precision, "block_size": None, "screen": plainly}
            found = certified.nearest_by_kernel(x, jnp.asarray(centroids), None, **options)
            np.testing.assert_array_equal(found.labels, right)
            assert np.mean(np.asarray(found.levels) == RECOMPUTED) < 0.05


def test_equal_pairs_go_to_the_lower_index():
    # Sums of integers are exact, so that "full" and the kernel's pairs agree on every tie.
    rng = np.random.default_rng(0)
    centroids = 2.0 * rng.integers(-8, 8, (60, 24)).astype(np.float32)
    x = jnp.asarray(centroids[rng.integers(0, 60, (512, 2))].mean(axis=1))
    options = {"precision": "exact-kernel", "block_size": None, "screen": plainly}
    found = certified.nearest_by_kernel(x, jnp.asarray(centroids), None, **options)
    assert np.mean(np.asarray(found.levels) == SETTLED) > 0.5
    np.testing.assert_array_equal(found.labels, kmeans.nearest(x, centroids))


def assert_right(found, nearest, level):
    """Some rows have the level, and their nearest centroid; and some a pair with it."""
    labels, levels = np.asarray(found.labels), np.asarray(found.levels)
    certain, pair = levels == level, levels == COMPARED
    assert certain.any()
    assert pair.any()
    np.testing.assert_array_equal(labels[certain], nearest[certain])
    two = np.stack([labels, np.asarray(found.rivals)], axis=1)[pair]
    assert (two == nearest[pair, None]).any(axis=1).all()


def test_errors_as_large_as_the_bound_certify_no_wrong_label():
    rng = np.random.default_rng(0)
    n, k, d = 256, 64, 20
    centroids = rng.normal(size=(k, d)).astype(np.float32)
    # From one centroid to another: gaps of all sizes about that of the bound.
    near, far = rng.integers(0, k, (2, n))
    along = np.linspace(0.46, 0.5, n)[:, None]
    x = (centroids[near] * (1 - along) + centroids[far] * along).astype(np.float32)
    ready = hopper.make_ready(jnp.asarray(x), jnp.asarray(centroids[:1]))
    at = bounds.geometry(jnp.asarray(centroids), ready.origin, jnp.zeros((0, 0), jnp.int32))
    c = np.asarray(at.centroids, np.float64)
    exact = 0.5 * (c**2).sum(axis=1) - (x - np.asarray(ready.origin)).astype(np.float64) @ c.T
    of_centroids = radii(at.centroids, rounded(at.centroids, 7))
    largest = Radii(jnp.max(of_centroids.size), jnp.max(of_centroids.change))
    errors = np.asarray(error_of(largest, ready.radii, d), np.float64)[:, None]
    nearest = exact.argmin(axis=1)
    row = np.arange(n)
    gap = np.sort(exact, axis=1)[:, 1] - exact.min(axis=1)

    # What the kernel may tell at worst: the nearest as far as can be, all others as near.
    def hostile(rows, low, half_norms, offsets, *, only_nearest):
        del rows, low, half_norms, only_nearest
        unit = np.spacing(np.asarray(offsets))[:, None].astype(np.float64)
        wrong = np.floor((exact - errors) / unit)
        wrong[row, nearest] = np.ceil((exact + errors) / unit)[row, nearest]
        order = wrong.argsort(axis=1)[:, :3]
        scores = np.take_along_axis(wrong, order, axis=1).astype(np.float32)
        second, third = scores[:, 1] - scores[:, 0], scores[:, 2] - scores[:, 0]
        given = order[:, 0], scores[:, 0], order[:, 1], second, third
        return screening.Screened(*map(jnp.asarray, given))

    found = hopper.look(ready, hopper.make_centroids(at), hostile)
    # Rows that half the bound would certify, wrongly; and some that all of it does.
    assert ((gap > errors[:, 0]) & (gap < 1.9 * errors[:, 0])).sum() > 10
    assert_right(found, nearest, CERTIFIED)


def parts(values):
    high = np.asarray(jnp.asarray(values).astype(jnp.bfloat16), np.float64)
    rest = np.asarray(jnp.asarray(values - high, jnp.float32).astype(jnp.bfloat16), np.float64)
    return high, rest, values - high - rest


def test_errors_of_a_second_look_certify_no_wrong_label():
    rng = np.random.default_rng(0)
    n, k, d = 256, 64, 20
    centroids = rng.normal(size=(k, d)).astype(np.float32)
    near, far = rng.integers(0, k, (2, n))
    along = 0.5 - np.geomspace(1e-6, 1e-3, n)[:, None]
    x = (centroids[near] * (1 - along) + centroids[far] * along).astype(np.float32)
    origin = jnp.zeros((1, d), jnp.float32)
    at = bounds.geometry(jnp.asarray(centroids), origin, jnp.zeros((0, 0), jnp.int32))
    rows, c = x.astype(np.float64), centroids.astype(np.float64)
    half = 0.5 * (c**2).sum(axis=1)
    exact = half - rows @ c.T
    (x1, x2, dx), (c1, c2, dc) = parts(rows), parts(c)

    def largest(values):
        return np.linalg.norm(values, axis=1).max()

    def norm(values):
        return np.linalg.norm(values, axis=1, keepdims=True)

    # What such products leave out, in the worst case of these norms, and what sums may err.
    size = norm(x1) + norm(x2)
    errors = norm(x2) * largest(c2) + norm(dx) * largest(c) + size * largest(dc)
    size_c = largest(c1) + largest(c2)
    errors = errors + share_of_sums(3 * d) * (0.5 * largest(c) ** 2 + size * size_c)
    nearest = exact.argmin(axis=1)
    gap = np.sort(exact, axis=1)[:, 1] - exact.min(axis=1)
    # The second look takes centroids in another order.
    order = np.argsort(np.arange(k) % screening.FOLD, kind="stable")

    def hostile(rows, low, half_norms, offsets, *, only_nearest):
        del rows, only_nearest
        assert low.shape[0] == k
        np.testing.assert_allclose(half_norms, half[order], rtol=1e-5)
        unit = jnp.exp2(jnp.floor(jnp.log2(offsets)) - 23)[:, None]
        worst = exact - errors
        worst[np.arange(n), nearest] = (exact + errors)[np.arange(n), nearest]
        worst = worst[:, order]
        first = worst.argsort(axis=1)[:, :3]
        scores = np.take_along_axis(worst, first, axis=1)
        between = jnp.asarray(scores[:, 1:] - scores[:, :1], jnp.float32)
        between = jnp.floor(between / unit)
        given = first[:, 0], scores[:, 0], first[:, 1], between[:, 0], between[:, 1]
        return screening.Screened(*map(jnp.asarray, given))

    zeros = jnp.zeros(n, jnp.int32)
    first = hopper.Look(zeros, zeros, jnp.full(n, RECOMPUTED, jnp.int8))
    every = bounds.Rows(jnp.arange(n, dtype=jnp.int32), jnp.int32(n))
    found = hopper.look_again(jnp.asarray(x), at, first, every, hostile)
    assert ((gap > 0) & (gap < 1.9 * errors[:, 0])).sum() > 10
    assert_right(found, nearest, REFINED)
