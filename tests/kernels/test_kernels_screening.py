"""The kernel in Pallas' interpreter against the plain function, and its way to CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans.kernels.screening import screen, screen_rows
from jkmeans.kmeans import bounds, certified

# Its interpreter is not public yet.
interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_agrees_with_the_plain_function():
    # Neither rows, centroids nor features fill their tiles.
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(150, 40)).astype(np.float32)
    pairs = rng.integers(0, 150, (70, 2))
    x = centroids[pairs].mean(axis=1) + 0.05 * rng.normal(size=(70, 40)).astype(np.float32)
    x[10:30] = centroids[:20]
    x[3] = np.nan
    x[4] = 3e38
    at = bounds.geometry(jnp.asarray(centroids), jnp.zeros((1, 40)), jnp.zeros((0, 0), int))
    labels, rivals, levels = jax.jit(certified.screening(at, 7))(x)
    found = screen_rows(
        jnp.asarray(x), at.centroids, at.half_norms, interpret=interpreter.InterpretGPUParams()
    )
    np.testing.assert_array_equal(found[2], levels)
    assert set(np.asarray(levels).tolist()) == {0, 1, 2}
    some = np.asarray(levels) != certified.RECOMPUTED
    np.testing.assert_array_equal(np.asarray(found[0])[some], np.asarray(labels)[some])
    compared = np.asarray(levels) == certified.COMPARED
    np.testing.assert_array_equal(np.asarray(found[1])[compared], np.asarray(rivals)[compared])
    np.testing.assert_array_equal(np.asarray(levels)[[3, 4]], certified.RECOMPUTED)
    np.testing.assert_array_equal(np.asarray(levels)[10:30], certified.CERTIFIED)


def test_is_lowered_for_cuda_without_a_gpu():
    def of(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    arguments = of((1000, 128), jnp.bfloat16), of((300, 128), jnp.bfloat16), of((2, 1000))
    module = jax.export.export(jax.jit(screen), platforms=["cuda"])(*arguments, of((4, 300)))
    assert "mosaic_gpu" in module.mlir_module()


def test_more_features_than_shared_memory_holds_are_an_error():
    rows = jnp.zeros((2, 513), jnp.bfloat16)
    with pytest.raises(ValueError, match="rows have 513 features: expected at most 512"):
        screen(rows, rows, jnp.zeros((2, 2)), jnp.zeros((4, 2)))
