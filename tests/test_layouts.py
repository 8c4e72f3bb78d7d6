"""Results that do not depend on the devices; centroids on several devices."""

import re

import jax
import numpy as np
import pytest

from jkmeans import KMeans, kmeans, sharded, sharding
from jkmeans.sharded import fits, programs

N, D, K = 333, 6, 8


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return (5 + 2 * rng.normal(size=(N, D)) + 3 * rng.integers(0, 3, (N, 1))).astype(np.float32)


@pytest.mark.parametrize(
    ("init", "weighted"),
    [
        pytest.param("sample", True, marks=pytest.mark.slow),
        ("k-means++", False),
        pytest.param("k-means++", True, marks=pytest.mark.slow),
        pytest.param("k-means||", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "n_devices", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))]
)
def test_the_same_bits_on_any_number_of_devices(x, init, weighted, n_devices):
    weights = np.random.default_rng(1).uniform(size=N).astype(np.float32) if weighted else None

    def fit(mesh):
        result = sharded.fit(
            jax.random.key(0),
            x,
            K,
            init=init,
            n_init=2,
            mesh=mesh,
            weights=weights,
            deterministic=True,
            tol=1e-6,
            relative_tol=True,
        )
        return [np.asarray(leaf) for leaf in result]

    alone = fit(None)
    assert alone[5] > 2  # Some iterations, in which sums could have gone apart.
    spread = fit(sharding.make_mesh(n_devices))
    for name, one, several in zip(kmeans.KMeansResult._fields, alone, spread, strict=True):
        np.testing.assert_array_equal(one, several, err_msg=name)


def test_it_is_the_answer(x):
    start = x[:K]
    ours = KMeans(K, init=start, n_init=1, tol=0, deterministic=True).fit(x)
    plain = KMeans(K, init=start, n_init=1, tol=0).fit(x)
    np.testing.assert_array_equal(ours.labels_, plain.labels_)
    np.testing.assert_allclose(ours.cluster_centers_, plain.cluster_centers_, rtol=1e-5)
    assert ours.n_iter_ == plain.n_iter_


def test_a_number_of_devices_that_does_not_divide_the_blocks(x):
    with pytest.raises(ValueError, match=r"3 devices: deterministic=True expects a divisor of 8"):
        sharded.fit(jax.random.key(0), x, K, mesh=sharding.make_mesh(3), deterministic=True)


@pytest.mark.parametrize("empty_start", [False, True])
@pytest.mark.parametrize(
    "shards", [(8, 8), (6, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 2), (4, 4)))]
)
def test_centroids_on_several_devices(x, shards, empty_start):
    mesh = sharding.make_mesh(*shards)
    start = x[:K].copy()
    if empty_start:
        start[3:6] += 1000
    spread = sharded.fit(jax.random.key(0), x, K, init=start, mesh=mesh)
    whole = sharded.fit(jax.random.key(0), x, K, init=start)
    assert spread.centroids.sharding.shard_shape((K, D)) == (K // shards[1], D)
    np.testing.assert_array_equal(spread.labels, whole.labels)
    for name in ("centroids", "distances", "counts", "inertia"):
        ours, theirs = np.asarray(getattr(spread, name)), np.asarray(getattr(whole, name))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    for name in ("n_iter", "n_empty", "n_relocated"):
        assert getattr(spread, name) == getattr(whole, name)


@pytest.mark.slow
def test_random_rows_are_drawn_onto_the_devices_that_keep_them(x):
    mesh = sharding.make_mesh(8, 4)
    spread = sharded.fit(jax.random.key(3), x, K, init="sample", mesh=mesh, n_init=3)
    whole = sharded.fit(jax.random.key(3), x, K, init="sample", n_init=3)
    np.testing.assert_allclose(spread.centroids, whole.centroids, rtol=1e-4)
    model = KMeans(K, init="random", n_init=2, mesh=mesh, random_state=0).fit(x)
    same = KMeans(K, init="random", n_init=2, random_state=0).fit(x)
    np.testing.assert_array_equal(model.labels_, same.labels_)
    np.testing.assert_array_equal(model.predict(x), same.labels_)


def test_no_device_holds_all_sums(x):
    """The compiled program has no array of all centroids' sums."""
    mesh = sharding.make_mesh(8, 4)
    rows = sharded.place(x, mesh=mesh)
    program = programs._program(
        fits._fit_large_k,
        mesh,
        fits.LARGE_K_SPECS,
        None,
        (("init", "sample"), ("n_clusters", 88), ("n_init", 1), ("relative_tol", False)),
    )
    text = (
        program.lower(rows.x, rows.weights, jax.random.key(0), None, 0, 10, 0.0, N)
        .compile()
        .as_text()
    )
    assert re.search(rf"f32\[22,{D}\]", text)
    assert not re.search(rf"f32\[88,{D}\]", text)


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (9, {"init": "sample"}, r"n_clusters=9: expected a multiple of the 4 devices"),
        (8, {"init": "k-means++"}, r"init='k-means\+\+': expected random rows or an array"),
        (8, {"init": "sample", "deterministic": True}, r"not accepted where the mesh shards"),
    ],
)
def test_what_a_mesh_of_centroids_does_not_take(x, k, options, message):
    with pytest.raises(ValueError, match=message):
        sharded.fit(jax.random.key(0), x, k, mesh=sharding.make_mesh(8, 4), **options)
