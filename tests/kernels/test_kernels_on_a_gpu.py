"""The kernel, certified labels and sums on a Hopper GPU: JAX_PLATFORMS=cuda pytest -n0 -m gpu."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkmeans import kmeans
from jkmeans.kernels.screening import screen, screen_plainly
from jkmeans.kmeans import hopper
from jkmeans.kmeans.certainty import CERTIFIED, COMPARED, REFINED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper.suits(1000, 64, 64), reason="no Hopper GPU is there"),
]


@pytest.mark.parametrize("only_nearest", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(256, 40, 64), (33792, 20_000, 128), (512, 146, 192), (2560, 1000, 512), (768, 300, 1536)],
)
def test_the_kernel_equals_the_plain_function(n, k, d, only_nearest):
    keys = jax.random.split(jax.random.key(d))
    rows, centroids = (
        jax.random.normal(key, (m, d), jnp.bfloat16) for key, m in zip(keys, (n, k), strict=True)
    )
    half_norms = 0.5 * jnp.sum(centroids.astype(jnp.float32) ** 2, axis=1)
    sizes = jnp.sqrt(jnp.sum(rows.astype(jnp.float32) ** 2, axis=1))
    reach = 1.01 * (half_norms.max() + sizes * jnp.sqrt(2 * half_norms.max()))
    units = hopper.units_for(reach, k)
    given = rows, centroids, half_norms, units.offsets
    found = jax.jit(functools.partial(screen, only_nearest=only_nearest))(*given)
    right = jax.jit(functools.partial(screen_plainly, only_nearest=only_nearest))(*given)
    # Sums of another order, so that a score may be rounded to the next unit.
    allowed = 2 + 1e-5 * np.abs(np.asarray(right.scores)).max()
    assert np.abs(np.asarray(found.scores - right.scores)).max() <= allowed
    if only_nearest:
        return
    assert np.abs(np.asarray(found.second - right.second)).max() <= 2 * allowed
    apart = np.asarray(right.second) > 2 * allowed
    assert apart.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(found.labels)[apart], np.asarray(right.labels)[apart])
    apart &= np.asarray(right.third - right.second) > 2 * allowed
    np.testing.assert_array_equal(np.asarray(found.rivals)[apart], np.asarray(right.rivals)[apart])


@pytest.mark.parametrize(("n", "k", "d"), [(20_000, 500, 40), (20_000, 2000, 256)])
def test_certified_labels_are_the_nearest(n, k, d):
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(k, d)).astype(np.float32)
    x = (centroids[rng.integers(0, k, (n, 2))].mean(axis=1) + 0.05).astype(np.float32)
    find = jax.jit(functools.partial(kmeans.certified_nearest, precision="exact-kernel"))
    labels, levels = map(np.asarray, find(x, centroids))
    rows = rng.choice(n, 500, replace=False)
    distances = ((x[rows, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(
        2
    )
    proven = np.isin(levels[rows], (CERTIFIED, REFINED, COMPARED))
    assert proven.mean() > 0.5
    np.testing.assert_array_equal(labels[rows][proven], distances.argmin(axis=1)[proven])


def test_a_fit_has_the_same_bits_again():
    x = jax.random.normal(jax.random.key(0), (50_000, 64))
    fit = jax.jit(functools.partial(kmeans.lloyd, precision="exact-kernel", max_iter=5))
    one, other = fit(x, x[:300]), fit(x, x[:300])
    for a, b in zip(one, other, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    full = jax.jit(functools.partial(kmeans.lloyd, max_iter=5))(x, x[:300])
    assert float(one.inertia) == pytest.approx(float(full.inertia), rel=1e-3)
