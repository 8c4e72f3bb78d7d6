"""The fit over a mesh: scikit-learn from the same start, on one and on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs

from jkmeans import kmeans, sharded, sharding
from jkmeans.sharded import fits, programs

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def blobs():
    """301 rows: eight devices do not divide them."""
    x, _ = make_blobs(301, 5, centers=6, cluster_std=3.0, random_state=0)
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(8)


@pytest.fixture(scope="module", params=[None, pytest.param(1, marks=pytest.mark.slow), 8])
def any_mesh(request):
    return None if request.param is None else sharding.make_mesh(request.param)


def aligned(array):
    """A copy at an address that is a multiple of 64, as that of a memory map is."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def check_equal(result, model, rtol=1e-4):
    np.testing.assert_array_equal(result.labels, model.labels_)
    np.testing.assert_allclose(result.centroids, model.cluster_centers_, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(result.inertia, model.inertia_, rtol=rtol)
    assert result.n_iter == model.n_iter_


@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_agrees_with_scikit_learn_on_any_mesh(blobs, any_mesh, tol):
    model = KMeans(6, init=blobs[:6], n_init=1, tol=tol).fit(blobs)
    result = sharded.fit(KEY, blobs, 6, mesh=any_mesh, init=blobs[:6], tol=tol, relative_tol=True)
    check_equal(result, model)
    assert result.labels.shape == result.distances.shape == (301,)
    np.testing.assert_allclose(result.counts, np.bincount(model.labels_))


def test_float64_is_computed_in_float64(blobs, any_mesh):
    x = blobs.astype(np.float64)
    model = KMeans(6, init=x[:6], n_init=1).fit(x)
    result = sharded.fit(KEY, x, 6, mesh=any_mesh, init=x[:6], tol=1e-4, relative_tol=True)
    assert result.centroids.dtype == np.float64
    check_equal(result, model, rtol=1e-12)


def test_weights_with_padding(blobs, mesh):
    weights = np.random.default_rng(0).uniform(0, 2, 301).astype(np.float32)
    model = KMeans(6, init=blobs[:6], n_init=1, tol=0).fit(blobs, sample_weight=weights)
    result = sharded.fit(KEY, blobs, 6, mesh=mesh, weights=weights, init=blobs[:6])
    check_equal(result, model)
    np.testing.assert_allclose(
        sharded.inertia(blobs, model.cluster_centers_, weights=weights, mesh=mesh),
        model.inertia_,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "init",
    ["k-means++", *(pytest.param(i, marks=pytest.mark.slow) for i in ("sample", "k-means||"))],
)
def test_initialisation_does_not_depend_on_the_devices(blobs, mesh, init):
    one = sharded.fit(KEY, blobs, 6, init=init, n_init=2)
    eight = sharded.fit(KEY, blobs, 6, init=init, n_init=2, mesh=mesh)
    np.testing.assert_array_equal(one.labels, eight.labels)
    np.testing.assert_allclose(one.centroids, eight.centroids, rtol=1e-4)


@pytest.mark.slow
def test_oversampling_factor(blobs):
    # One candidate a cluster in each round, all of them drawn before anything is chosen.
    result = sharded.fit(KEY, blobs, 6, init="k-means||", n_init=3, oversampling_factor=1.0)
    single = [
        float(sharded.fit(jax.random.key(0), blobs, 6, init=start).inertia)
        for start in (
            kmeans.kmeans_parallel(jax.random.fold_in(KEY, r), blobs, 6, oversampling_factor=1.0)
            for r in range(3)
        )
    ]
    np.testing.assert_allclose(result.inertia, min(single), rtol=1e-5)


def test_assignment_and_distances(blobs, any_mesh):
    model = KMeans(6, init=blobs[:6], n_init=1).fit(blobs)
    centroids = model.cluster_centers_
    found = sharded.assign(blobs, centroids, mesh=any_mesh)
    np.testing.assert_array_equal(found.labels, model.labels_)
    np.testing.assert_array_equal(sharded.nearest(blobs, centroids, mesh=any_mesh), model.labels_)
    squared = ((blobs[:, None] - centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(found.distances, squared.min(axis=1), rtol=1e-4)
    every = sharded.distances(blobs, centroids, mesh=any_mesh)
    assert every.dtype == np.float32
    np.testing.assert_allclose(every, np.sqrt(squared), rtol=1e-4)


def test_distances_are_right_far_from_the_origin():
    x = np.array([[1e4, 1.0], [1e4, 2.0]], np.float32)
    np.testing.assert_allclose(sharded.distances(x, x), [[0, 1], [1, 0]], atol=1e-6)
    rows = np.random.default_rng(0).integers(-9, 9, (4, 5)) + 1e9
    expected = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(axis=2))
    np.testing.assert_allclose(sharded.distances(rows, rows), expected, rtol=1e-12)


def test_a_sharded_array_stays_where_it_is(blobs, mesh):
    # Of another axis name, devices in another order, rows on all of them.
    other = Mesh(np.array(jax.devices()[::-1]), ("rows",), axis_types=(AxisType.Auto,))
    x = jax.device_put(blobs[:296], NamedSharding(other, PartitionSpec("rows")))
    rows = sharded.place(x)
    assert rows.n_rows == 296
    here = [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
    there = [shard.data.unsafe_buffer_pointer() for shard in rows.x.addressable_shards]
    assert sorted(here) == sorted(there)
    model = KMeans(6, init=blobs[:6], n_init=1, tol=0).fit(blobs[:296])
    check_equal(sharded.fit(KEY, x, 6, init=blobs[:6]), model)
    # Onto fewer devices, which do not divide it.
    check_equal(sharded.fit(KEY, x, 6, init=blobs[:6], mesh=sharding.make_mesh(3)), model)


def test_aligned_memory_is_shared(blobs, mesh):
    x = aligned(np.tile(blobs[:296], (1, 16)))
    rows = sharded.place(x)
    assert rows.x.unsafe_buffer_pointer() == x.ctypes.data
    for shard in sharded.place(x, mesh=mesh).x.addressable_shards:
        offset = shard.index[0].start * x.strides[0]
        assert shard.data.unsafe_buffer_pointer() == x.ctypes.data + offset
    # With padding only the last device's rows are copied.
    x = x[:295]
    *most, last = sharded.place(x, mesh=mesh).x.addressable_shards
    for shard in most:
        offset = shard.index[0].start * x.strides[0]
        assert shard.data.unsafe_buffer_pointer() == x.ctypes.data + offset
    np.testing.assert_array_equal(last.data[:-1], x[-36:])


@pytest.fixture(scope="module")
def compilations():
    """The names of what was traced or compiled so far."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: events.append(event) if "compile" in event else None
    )
    return events


@pytest.mark.slow
def test_a_second_fit_compiles_nothing(blobs, mesh, compilations):
    def fit(x, start, tol, max_iter, mesh):
        result = sharded.fit(
            KEY, x, 7, init=start, tol=tol, max_iter=max_iter, mesh=mesh, relative_tol=True
        )
        return np.asarray(result.labels)

    for where in (None, mesh):
        compilations.clear()
        fit(blobs, blobs[:7], 0.0, 300, where)
        assert compilations
        compilations.clear()
        fit(blobs + 1, blobs[7:14], 1e-3, 20, where)
        assert not compilations


@pytest.mark.slow
def test_no_copy_of_the_rows_beside_the_core():
    x = jax.ShapeDtypeStruct((40_000, 64), np.float32)
    options = {"n_clusters": 8, "n_init": 1, "init": "k-means++"}
    static = tuple(sorted({**options, "relative_tol": True}.items()))
    program = programs._program(fits._fit, None, fits.RESULT_SPECS, None, static)
    whole = program.lower(x, None, KEY, None, 0, 300, 1e-4, 40_000).compile().memory_analysis()
    core = jax.jit(lambda key, x: kmeans.fit(key, x, **options)).lower(KEY, x).compile()
    extra = whole.temp_size_in_bytes - core.memory_analysis().temp_size_in_bytes
    assert extra < 0.05 * 40_000 * 64 * 4


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        np.uint8,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (np.float16, np.int8)),
    ],
)
def test_small_types_stay_small_on_the_devices(dtype, mesh):
    x = np.random.default_rng(0).integers(0, 100, (61, 4)).astype(dtype)
    for where in (None, mesh):
        assert sharded.place(x, mesh=where).x.dtype == dtype
    wide = x.astype(np.float32)
    model = KMeans(4, init=wide[:4], n_init=1, tol=0).fit(wide)
    result = sharded.fit(KEY, x, 4, init=wide[:4], mesh=mesh)
    assert result.centroids.dtype == np.float32
    check_equal(result, model)


def test_fewer_rows_than_devices(mesh):
    x = np.array([[0.0], [1.0], [10.0]], np.float32)
    result = sharded.fit(KEY, x, 2, mesh=mesh)
    np.testing.assert_allclose(np.sort(result.centroids[:, 0]), [0.5, 10])
    assert result.labels.shape == (3,)


def test_errors(blobs):
    with pytest.raises(ValueError, match=r"n_samples=3 should be >= n_clusters=4"):
        sharded.fit(KEY, blobs[:3], 4)
    with pytest.raises(ValueError, match=r"expected at least one row"):
        sharded.fit(KEY, blobs[:0], 4)
    wrong = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"has the axes \('model',\): expected one called 'data'"):
        sharded.fit(KEY, blobs, 4, mesh=wrong)
