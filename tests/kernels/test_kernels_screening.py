"""The kernel in Pallas' interpreter against NumPy, and its way to CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans.kernels import screening
from jkmeans.kernels.screening import Tiles, bits_of_slices, screen, tiles_for

# Its interpreter is not public yet.
interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


def problem(n, k, d):
    """Rows, centroids, half norms, units of rows, and the scores in float64: [n, k]."""
    rng = np.random.default_rng(d)
    rows, centroids = (jnp.asarray(rng.standard_normal((m, d)), jnp.bfloat16) for m in (n, k))
    x, c = (np.asarray(values.astype(jnp.float32), np.float64) for values in (rows, centroids))
    half_norms = (0.5 * (c**2).sum(axis=1)).astype(np.float32)
    scores = half_norms - x @ c.T
    units = 2.0 ** np.ceil(np.log2(1.001 * np.abs(scores).max(axis=1)) - (31 - bits_of_slices(k)))
    return rows, centroids, half_norms, units.astype(np.float32), scores


def run(rows, centroids, half_norms, units, *, by=screen, **options):
    if by is screen:
        options["interpret"] = interpreter.InterpretGPUParams(detect_races=True)
    offsets = jnp.asarray(1.5 * 2.0**23 * units)
    return by(rows, centroids, jnp.asarray(half_norms), offsets, **options)


# The last tile of centroids is full, has half a slice, and has one slice and a bit; features are
# all in shared memory, or come with each tile.
@pytest.mark.parametrize(
    ("n", "k", "d", "tiles"),
    [
        (512, 392, 64, "plainly"),
        (256, 392, 64, None),
        pytest.param(512, 256, 128, None, marks=pytest.mark.slow),
        # More parts of a tile than there is room for.
        (256, 146, 192, Tiles(64, 128, 2, True)),
        pytest.param(256, 146, 128, Tiles(128, 128, 3, False), marks=pytest.mark.slow),
        pytest.param(256, 300, 192, Tiles(64, 128, 4, True), marks=pytest.mark.slow),
        # So many features that the loop over them is not written out.
        pytest.param(256, 146, 832, None, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_numpy(n, k, d, tiles, capfd):
    rows, centroids, half_norms, units, scores = problem(n, k, d)
    if tiles == "plainly":
        found = run(rows, centroids, half_norms, units, by=screening.screen_plainly)
    else:
        found = run(rows, centroids, half_norms, units, tiles=tiles)
    order = np.argsort(scores, axis=1)[:, :3]
    near = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_array_equal(found.labels, order[:, 0])
    np.testing.assert_array_equal(found.rivals, order[:, 1])
    np.testing.assert_allclose(found.scores * units, near[:, 0], atol=0.6 * units.max())
    # Two scores, each rounded to a unit.
    np.testing.assert_allclose(
        found.second * units, near[:, 1] - near[:, 0], atol=1.1 * units.max()
    )
    third = np.asarray(found.third) - (near[:, 2] - near[:, 0]) / units
    assert third.max() < 1.1
    # It is as low as the second only where the two nearest share a slot.
    share = order[:, 0] % screening.FOLD == order[:, 1] % screening.FOLD
    np.testing.assert_array_equal(found.third[share], found.second[share])
    assert np.abs(third[~share]).max() < 1.1
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_only_the_nearest():
    rows, centroids, half_norms, units, scores = problem(256, 135, 64)
    found = run(rows, centroids, half_norms, units, only_nearest=True)
    np.testing.assert_array_equal(found.labels, np.argmin(scores, axis=1))
    np.testing.assert_allclose(found.scores * units, scores.min(axis=1), atol=0.6 * units.max())
    assert found[2:] == (None, None, None)
    same = run(rows, centroids, half_norms, units, by=screening.screen_plainly, only_nearest=True)
    np.testing.assert_array_equal(same.labels, found.labels)
    assert same[2:] == (None, None, None)


@pytest.mark.parametrize(
    ("d", "only_nearest"),
    [
        (128, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((64, True), (512, False))),
    ],
)
def test_is_lowered_for_cuda_without_a_gpu(d, only_nearest):
    def of(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    arguments = of((1024, d), jnp.bfloat16), of((300, d), jnp.bfloat16), of((300,)), of((1024,))
    program = jax.jit(functools.partial(screen, only_nearest=only_nearest))
    module = jax.export.export(program, platforms=["cuda"])(*arguments)
    assert "mosaic_gpu" in module.mlir_module()


@pytest.mark.parametrize("d", [64, 128, 192, 256, 320, 384, 512, 576, 1536, 4096])
def test_tiles_fit_into_shared_memory(d):
    tiles = tiles_for(d)
    assert screening.fits(d, tiles)
    # Rows stay there if they can.
    assert tiles.resident == (d <= 576)


def test_one_stage_is_not_enough():
    # The second worker would wait for a part that the first can only hand back after its turn.
    assert screening.fits(128, Tiles(128, 128, 2, True))
    assert not screening.fits(128, Tiles(128, 128, 1, True))


def test_more_centroids_than_a_key_tells_apart_are_an_error():
    rows = jnp.zeros((256, 64), jnp.bfloat16)
    many = jnp.zeros((2**20 + 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="1048577 centroids: expected at most 1048576"):
        screen(rows, many, jnp.zeros(2**20 + 1), jnp.ones(256))
