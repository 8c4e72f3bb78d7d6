"""Certified labels by the kernel, in Pallas' interpreter, and by what it must equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans import kmeans
from jkmeans.kernels import screening
from jkmeans.kmeans import bounds, certified, hopper
from jkmeans.kmeans.certainty import CERTIFIED, COMPARED, RECOMPUTED, REFINED

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
    first = hopper.look(ready, at, screen)
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
