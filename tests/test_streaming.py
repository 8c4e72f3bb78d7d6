import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sklearn.cluster

from jkmeans import kmeans
from jkmeans.errors import UserError
from jkmeans.interruption import Interrupted
from jkmeans.sharding import make_mesh
from jkmeans.sources import Source, open_source
from jkmeans.streaming import (
    fit_stream,
    passes,
    picking,
    pipeline,
    plan,
    predict_stream,
    programs,
    score_stream,
    transform_stream,
)

N, D, K = 1003, 5, 6
KEY = jax.random.key(3)
CHUNK = 200  # neither divides N nor is a multiple of what is convenient


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    centres = 3 * rng.integers(0, 4, size=(N, 1))
    return (rng.normal(size=(N, D)) + centres).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    weights = np.random.default_rng(1).uniform(0.5, 2, N).astype(np.float32)
    weights[::7] = 0
    return weights


@pytest.fixture
def path(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "x.npy"


def in_sklearn(x, centroids, weights=None, **options):
    options = {"tol": 0, "max_iter": 300} | options
    model = sklearn.cluster.KMeans(len(centroids), init=centroids, n_init=1, **options)
    return model.fit(x, sample_weight=weights)


@pytest.mark.parametrize(
    "chunk_rows", [1, 200, 4096, *(pytest.param(n, marks=pytest.mark.slow) for n in (256, 997, N))]
)
@pytest.mark.parametrize("n_devices", [1, 8])
def test_lloyd_is_that_of_sklearn_whatever_the_chunks_and_devices(path, x, chunk_rows, n_devices):
    if chunk_rows == 1:
        path, x = x[:40], x[:40]
    expected = in_sklearn(x, x[:K])
    found = fit_stream(
        KEY, path, K, init=x[:K], tol=0, chunk_rows=chunk_rows, mesh=make_mesh(n_devices)
    )
    np.testing.assert_allclose(found.centroids, expected.cluster_centers_, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.counts, np.bincount(expected.labels_, minlength=K))
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)
    assert found.n_iter == expected.n_iter_
    assert found.n_passes == found.n_iter


@pytest.mark.parametrize("weighted", [False, True])
def test_tolerance_and_weights_are_those_of_sklearn(path, x, weights, weighted, tmp_path):
    w = weights if weighted else None
    if weighted:
        # sklearn's variance counts rows of weight 0; here they are not there at all.
        x, w = x[weights > 0], weights[weights > 0]
        np.save(tmp_path / "w.npy", weights)
    expected = in_sklearn(x, x[:K], w, tol=1e-2)
    found = fit_stream(
        KEY,
        path,
        K,
        init=x[:K],
        tol=1e-2,
        weights=tmp_path / "w.npy" if weighted else None,
        chunk_rows=CHUNK,
    )
    assert 1 < found.n_iter == expected.n_iter_ < in_sklearn(x, x[:K], w).n_iter_
    np.testing.assert_allclose(found.centroids, expected.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["sample", "k-means||"])
@pytest.mark.parametrize("weighted", [False, True])
def test_streamed_initialisation_chooses_the_rows_that_are_chosen_in_memory(
    path, x, weights, init, weighted
):
    w = weights if weighted else None
    chosen = jax.jit(
        lambda: kmeans.INITIALIZATIONS[init](jax.random.fold_in(KEY, 0), x, K, weights=w)
    )()
    for n_devices in (1, 8):
        found = fit_stream(
            KEY,
            path,
            K,
            init=init,
            max_iter=0,
            weights=w,
            chunk_rows=CHUNK,
            mesh=make_mesh(n_devices),
        )
        np.testing.assert_array_equal(found.centroids, chosen)


def test_kmeans_plus_plus_chooses_the_same_rows_whatever_the_chunks_and_devices(path, x):
    found = [
        fit_stream(
            KEY, path, 4, init="k-means++", max_iter=0, chunk_rows=chunk, mesh=make_mesh(n_devices)
        )
        for chunk, n_devices in ((CHUNK, 8), (400, 1))
    ]
    np.testing.assert_array_equal(found[0].centroids, found[1].centroids)
    assert all((x == centroid).all(axis=1).any() for centroid in found[0].centroids)
    assert found[0].n_passes == 2 * 4


@pytest.mark.slow
def test_kmeans_plus_plus_finds_clusters_that_are_far_apart():
    # A draw by D² misses one of four tight clusters once in a million times.
    labels = np.random.default_rng(0).integers(0, 4, 400)
    centres = 1000 * np.array([[0, 0], [0, 1], [1, 0], [3, 3]], np.float32)
    y = centres[labels] + np.random.default_rng(1).normal(size=(400, 2)).astype(np.float32)
    for seed in range(4):
        found = fit_stream(
            jax.random.key(seed), y, 4, init="k-means++", max_iter=0, chunk_rows=CHUNK
        )
        assert sorted(found.counts) == sorted(np.bincount(labels))


@pytest.mark.parametrize("n_init", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_data_that_fits_the_budget_gives_the_same(path, weights, n_init):
    options = {"init": "sample", "n_init": n_init, "tol": 1e-3, "weights": weights}
    resident = fit_stream(KEY, path, K, **options)
    streamed = fit_stream(KEY, path, K, chunk_rows=CHUNK, **options)
    assert resident.n_passes == 1 < streamed.n_passes
    assert resident.n_iter == streamed.n_iter
    np.testing.assert_allclose(resident.centroids, streamed.centroids, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(resident.counts, streamed.counts, rtol=1e-6)
    assert resident.inertia == pytest.approx(streamed.inertia, rel=1e-5)


def test_the_best_restart_is_kept(path):
    options = {"init": "sample", "chunk_rows": CHUNK, "tol": 0}
    inertias = []

    def first_centroids(key, source, n_clusters):
        rows = jax.random.choice(key, source.n_rows, (n_clusters,), replace=False)
        return np.stack([source.read(int(row), int(row) + 1)[0] for row in rows])

    for r in range(3):
        key = jax.random.fold_in(KEY, r)
        init = first_centroids(key, open_source(path), K)
        inertias.append(fit_stream(KEY, path, K, **(options | {"init": init})).inertia)
    best = fit_stream(KEY, path, K, n_init=3, **(options | {"init": first_centroids}))
    assert best.inertia == min(inertias) < max(inertias)


def test_empty_clusters_move_to_the_farthest_rows():
    # By hand: everything is nearest to centroid 0; 100 and 40 are farthest.
    x = np.array([[0.0], [1], [2], [40], [100], [1]], np.float32)
    init = np.array([[1.0], [-500], [900]], np.float32)
    found = fit_stream(KEY, x, 3, init=init, tol=0, chunk_rows=8)
    np.testing.assert_array_equal(found.centroids, [[1], [100], [40]])
    np.testing.assert_array_equal(found.counts, [4, 1, 1])
    assert (found.inertia, found.n_relocated, found.n_empty) == (2, 2, 0)
    resident = fit_stream(KEY, x, 3, init=init, tol=0)
    np.testing.assert_array_equal(found.centroids, resident.centroids)
    assert (found.n_iter, found.n_relocated) == (resident.n_iter, resident.n_relocated)


def test_empty_clusters_as_in_memory(path, x):
    init = np.concatenate([x[:3], np.full((3, D), 1e3, np.float32) + np.arange(3)[:, None]])
    init = init.astype(np.float32)
    reference = jax.jit(lambda: kmeans.lloyd(x, init))()
    assert int(reference.n_relocated) > 0
    for n_devices in (1, 8):
        found = fit_stream(
            KEY, path, K, init=init, tol=0, chunk_rows=CHUNK, mesh=make_mesh(n_devices)
        )
        np.testing.assert_allclose(found.centroids, reference.centroids, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.counts, reference.counts)
        assert found.n_relocated == reference.n_relocated


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_far_from_the_origin(in_memory):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30_000, 3)) + 20 * rng.normal(size=(3, 3))[rng.integers(3, size=30_000)]
    far = (x + np.array([1e6, -3e5, 10])).astype(np.float32)
    options = {} if in_memory else {"chunk_rows": 10_000}
    result = fit_stream(KEY, far, 3, init=far[:3], mesh=make_mesh(1), **options)
    model = sklearn.cluster.KMeans(3, init=far[:3], n_init=1).fit(far.astype(np.float64))
    np.testing.assert_allclose(result.centroids, model.cluster_centers_, atol=0.07)
    assert result.inertia == pytest.approx(model.inertia_, rel=2e-3)


@pytest.mark.slow
def test_fewer_distinct_rows_than_clusters():
    x = np.repeat(np.eye(2, D, dtype=np.float32), 20, axis=0)
    for init in ("sample", "k-means++", "k-means||"):
        found = fit_stream(KEY, x, K, init=init, chunk_rows=CHUNK)
        assert found.inertia == 0
        assert found.counts.sum() == 40
        assert found.n_empty == K - np.sum(found.counts > 0) >= K - 40


@pytest.mark.parametrize(
    "dtype",
    [
        *("bfloat16", "float64", "uint8"),
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "int8", "int64")),
    ],
)
def test_dtypes(dtype, x, tmp_path):
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    y = (np.abs(x) * 4).astype(dtype)
    expected = in_sklearn(y.astype(np.float64), y[:K].astype(np.float64))
    np.save(tmp_path / "y.npy", y)
    found = fit_stream(KEY, tmp_path / "y.npy", K, init=y[:K], tol=0, chunk_rows=CHUNK)
    np.testing.assert_allclose(found.centroids, expected.cluster_centers_, rtol=1e-5)
    assert found.n_iter == expected.n_iter_


def test_counts_and_inertia_are_right_where_float32_is_not(monkeypatch):
    # A float32 count stands still at 2²⁴; this starts there and adds 1 at a time.
    x = np.array([[0.0], [1.0], [1.0]], np.float32)
    feeder = pipeline.Feeder(open_source(np.tile(x, (5, 1))), make_mesh(1), 3)
    start = np.array([[2.0**24, 2.0**24, 2.0**24]], np.float32)  # sums, counts, inertia
    nothing = picking.nothing(1, x.dtype)
    partial = passes.Partial(0, start, np.zeros_like(start), nothing)
    numbers, _ = passes.run_pass(
        feeder,
        programs.statistics,
        (np.zeros((1, 1), np.float32), np.zeros(1, np.float32)),
        partial=partial,
    )
    np.testing.assert_array_equal(numbers, [2**24 + 10, 2**24 + 15, 2**24 + 10])


def test_one_all_reduce_a_pass_and_none_a_chunk():
    mesh = make_mesh(8)
    size = K * (D + 1) + 1
    pair = jnp.zeros((8, size))
    with jax.enable_x64(True):
        text = passes.reduce.lower(pair, pair, mesh=mesh).compile().as_text()
    found = [line for line in text.splitlines() if " all-reduce(" in line]
    assert len(found) == 1
    assert f"f64[{size}]" in found[0]
    chunk = passes.contribute.lower(
        jnp.zeros((64, D)),
        None,
        np.uint32(0),
        np.int32(64),
        (jnp.zeros((K, D)), jnp.zeros(D)),
        program=programs.statistics,
        mesh=mesh,
        n_picked=K,
    )
    text = chunk.compile().as_text() + passes.accumulate.lower(pair, pair, pair).compile().as_text()
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert name not in text


class Counting(Source):
    """Rows that are computed as they are read; it knows what is being read into."""

    def __init__(self, n_rows, dtype=np.float32):
        self.name, self.n_rows, self.n_features = "the rows", n_rows, D
        self.dtype = np.dtype(dtype)
        self.addresses = set()

    def _read(self, start, out):
        self.addresses.add(out.ctypes.data)
        out[:] = np.random.default_rng(start).normal(size=out.shape)


def test_memory_is_bounded_whatever_the_number_of_rows(monkeypatch):
    allocated = []
    make = pipeline._page_aligned
    monkeypatch.setattr(
        pipeline, "_page_aligned", lambda *a: allocated.append(make(*a).nbytes) or make(*a)
    )
    budget = 200_000
    for n_rows in (20_000, 100_000):
        allocated.clear()
        source = Counting(n_rows)
        found = fit_stream(
            KEY, source, 2, init=np.eye(2, D), max_iter=0, memory_budget=budget, mesh=make_mesh(1)
        )
        assert found.counts.sum() == n_rows
        assert found.n_passes == 2  # the variance and the assignment: it was streamed
        assert sum(allocated) // 2 <= budget / 2
        assert len(allocated) == 2 * pipeline.N_BUFFERS
        assert len(source.addresses) <= 2 * pipeline.N_BUFFERS + 1


def test_a_budget_that_is_too_small_says_what_is_needed(path):
    with pytest.raises(UserError, match=r"accepted with .*: at least"):
        fit_stream(KEY, path, K, memory_budget=100)


# Where things go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("in_memory", [False, True])
def test_not_finite_rows_are_named(x, tmp_path, bad, in_memory):
    y = x.astype(np.float64)
    y[[437, 439, 440], [1, 2, 3]] = bad
    np.save(tmp_path / "y.npy", y)
    chunk_rows = None if in_memory else CHUNK
    with pytest.raises(UserError, match=r"(NaN|infinity).* in 3 of the rows .* first is row 437 "):
        fit_stream(KEY, tmp_path / "y.npy", K, init=x[:K], chunk_rows=chunk_rows)
    if in_memory:
        return
    with pytest.raises(UserError, match="first is row 437 "):
        fit_stream(KEY, tmp_path / "y.npy", K, chunk_rows=CHUNK)
    for write in (predict_stream, transform_stream):
        with pytest.raises(UserError, match="first is row 437 "):
            write(tmp_path / "y.npy", x[:K], tmp_path / "out.npy", chunk_rows=CHUNK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["y.npy"]


@pytest.mark.parametrize("anything", [np.nan, 1e8])
def test_rows_of_weight_zero_may_hold_anything(x, weights, anything):
    y = x.copy()
    y[weights == 0] = anything
    kept = weights > 0
    for chunk_rows in (None, CHUNK):
        found = fit_stream(KEY, y, K, init=x[:K], weights=weights, tol=1e-3, chunk_rows=chunk_rows)
        expected = in_sklearn(x[kept], x[:K], weights[kept], tol=1e-3)
        assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)


def test_the_first_row_that_counts_may_come_late():
    weights = np.zeros((2 * plan._WEIGHTS_READ, 1))
    assert plan.first_weight(open_source(weights)) == 0
    weights[plan._WEIGHTS_READ + 5 :] = 2
    assert plan.first_weight(open_source(weights)) == plan._WEIGHTS_READ + 5


@pytest.mark.parametrize(("dtype", "most"), [("float32", "1e18"), ("float64", "1e153")])
def test_squares_that_overflow_are_of_the_type_that_is_computed_in(dtype, most):
    with pytest.raises(UserError, match=f"overflow {dtype}; .* below {most}"):
        pipeline.refuse_not_finite(np.full((2, 2), 1e30, dtype), None, 0, "x")


def test_weights_that_are_none(path, weights):
    for chunk_rows in (None, CHUNK):
        bad = weights.copy()
        bad[300] = -1
        with pytest.raises(UserError, match=r"weight 300 .* is -1"):
            fit_stream(KEY, path, K, init="sample", weights=bad, chunk_rows=chunk_rows)
        with pytest.raises(UserError, match="weights are all 0"):
            fit_stream(KEY, path, K, init="sample", weights=0 * weights, chunk_rows=chunk_rows)
        for scale in (1e-35, 1e35):
            with pytest.raises(UserError, match=r"weights add up to .* in float32; accepted: a s"):
                fit_stream(
                    KEY, path, K, init="sample", weights=scale * weights, chunk_rows=chunk_rows
                )


def test_a_file_that_changes_between_passes(path, x):
    def change(progress):
        if progress.stage == "iteration 2" and progress.rows == N:
            with open(path, "ab") as file:
                file.write(b"more")

    with pytest.raises(UserError, match="changed while it was being read"):
        fit_stream(KEY, path, K, init=x[:K], tol=0, chunk_rows=CHUNK, progress=change)


def test_a_file_that_is_cut_within_a_pass(path, x):
    def cut(progress):
        if progress.stage == "iteration 2":
            os.truncate(path, 3000)

    with pytest.raises(UserError, match=r"truncated while|changed while"):
        fit_stream(KEY, path, K, init=x[:K], tol=0, chunk_rows=16, progress=cut)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"n_clusters": N + 1}, UserError, f"n_clusters={N + 1}; accepted: 1 to 1,003"),
        ({"n_clusters": 0}, UserError, "n_clusters=0"),
        ({"init": "best"}, ValueError, "init='best': expected"),
        ({"init": np.zeros((2, D))}, ValueError, r"init has shape \(2, 5\): expected \(6, 5\)"),
        ({"init": np.full((K, D), np.nan)}, ValueError, "init has NaN"),
        ({"n_init": 0}, ValueError, "n_init=0"),
        ({"max_iter": -1}, ValueError, "max_iter=-1"),
        ({"tol": -1.0}, ValueError, "tol=-1"),
        ({"oversampling_factor": 0.1, "n_rounds": 1}, ValueError, "raise one of them"),
        ({"oversampling_factor": 0}, ValueError, "oversampling_factor=0: expected a number above"),
        ({"key": 0}, ValueError, r"key=0: expected a JAX random key"),
        ({"n_clusters": 6.0}, ValueError, r"n_clusters=6\.0: expected an integer"),
        ({"n_clusters": "6"}, ValueError, "n_clusters='6': expected an integer"),
        ({"max_iter": 2.5}, ValueError, r"max_iter=2\.5: expected an integer"),
        ({"n_init": 2.5}, ValueError, r"n_init=2\.5: expected an integer"),
        ({"tol": "1"}, ValueError, "tol='1': expected a number"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows=0: expected an integer of at least 1"),
        ({"chunk_rows": 2.5}, ValueError, r"chunk_rows=2\.5: expected an integer"),
        ({"memory_budget": "1GiB"}, ValueError, "memory_budget='1GiB': expected bytes"),
        ({"memory_budget": -1}, ValueError, "memory_budget=-1: expected bytes, more than 0"),
    ],
)
def test_bad_arguments(path, change, kind, message):
    options = {"key": KEY, "source": path, "n_clusters": K, "chunk_rows": CHUNK} | change
    with pytest.raises(kind, match=message):
        fit_stream(**options)


def test_a_folder_of_checkpoints_is_of_one_fit_at_a_time(path, x, tmp_path):
    folder, seen = tmp_path / "checkpoints", []

    def begin_another(now):
        if not seen:
            seen.append(now)
            with pytest.raises(UserError, match=r"is running in .*; accepted: another che"):
                fit_stream(KEY, path, K, init=x[:K], chunk_rows=16, checkpoint_folder=folder)

    options = {"init": x[:K], "chunk_rows": 16, "checkpoint_folder": folder}
    fit_stream(KEY, path, K, progress=begin_another, **options)
    assert seen


def test_a_folder_of_checkpoints_that_cannot_be_made(path, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write to checkpoint_folder .*file: File exists"):
        fit_stream(KEY, path, K, checkpoint_folder=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_outputs_never_replace_what_is_read(x, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    file = folder / "x.npy"
    np.save(file, x)
    before = file.read_bytes()
    for write in (predict_stream, transform_stream):
        for source, output, message in (
            (file, file, "which is the source itself"),
            (str(file), folder / ".." / "rows" / "x.npy", "which is the source itself"),
            (np.load(file, mmap_mode="r"), file, "which is the source itself"),
            (open_source(file), file, "which is the source itself"),
            (folder, folder / "labels.npy", "which is in the source itself"),
        ):
            with pytest.raises(UserError, match=message):
                write(source, x[:K], output)
    output = tmp_path / "l.npy"
    with pytest.raises(UserError, match=r"distances_path is .*, as is output_path"):
        predict_stream(file, x[:K], output, distances_path=output)
    with pytest.raises(UserError, match="the centroids have NaN or infinity"):
        predict_stream(file, x[:K] * np.nan, output)
    assert file.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [folder]
    predict_stream(file, x[:K], output, memory_budget=0.5 * 2**30)
    assert len(np.load(output)) == len(x)


# Checkpoints --------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def same(a, b):
    for name in a._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize(
    "init",
    ["k-means||", *(pytest.param(i, marks=pytest.mark.slow) for i in ("k-means++", "sample"))],
)
def test_a_fit_that_was_stopped_goes_on_with_the_same_bits(path, weights, init, tmp_path):
    options = {
        "init": init,
        "n_init": 2 if init == "sample" else 1,
        "n_rounds": 2,
        "weights": weights,
        "chunk_rows": 400,
        "tol": 0,
        "max_iter": 3,
        "checkpoint_seconds": 0,
    }
    n_chunks = 0

    def count(progress):
        nonlocal n_chunks
        n_chunks += 1

    whole = fit_stream(KEY, path, 4, progress=count, **options)
    stops = iter(np.random.default_rng(0).integers(n_chunks // 4, n_chunks // 2, 100))
    restarts = 0

    def stop(progress):
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop

    while True:
        left = int(next(stops))
        try:
            found = fit_stream(
                KEY, path, 4, checkpoint_folder=tmp_path / "c", progress=stop, **options
            )
        except Stop:
            restarts += 1
            continue
        break
    assert restarts >= 2
    same(found, whole)
    # A finished one is not run again.
    left = 1
    same(
        fit_stream(KEY, path, 4, checkpoint_folder=tmp_path / "c", progress=stop, **options), whole
    )


def stopped(path, folder, after, **options):
    def stop(progress):
        nonlocal after
        after -= 1
        if after == 0:
            raise Stop

    options = {"init": "sample", "chunk_rows": CHUNK, "checkpoint_seconds": 0} | options
    with pytest.raises(Stop):
        fit_stream(KEY, path, K, checkpoint_folder=folder, progress=stop, **options)


def test_a_fit_goes_on_with_other_devices_and_chunks(path, tmp_path):
    whole = fit_stream(KEY, path, K, init="sample", chunk_rows=CHUNK)
    stopped(path, tmp_path / "c", 20, mesh=make_mesh(8))
    found = fit_stream(
        KEY,
        path,
        K,
        init="sample",
        chunk_rows=333,
        mesh=make_mesh(1),
        checkpoint_folder=tmp_path / "c",
    )
    assert found.n_iter == whole.n_iter
    np.testing.assert_allclose(found.centroids, whole.centroids, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_fit_is_refused(path, x, weights, tmp_path):
    folder = tmp_path / "c"
    stopped(path, folder, 9)
    options = {"init": "sample", "chunk_rows": CHUNK, "checkpoint_folder": folder}
    for change, message in (
        ({"source": x + 1}, "is of a fit with other data"),
        ({"n_clusters": K + 1}, "another number of clusters"),
        ({"key": jax.random.key(4)}, "another key"),
        ({"init": "k-means++"}, "another initialisation"),
        ({"weights": weights}, "other weights"),
        ({"tol": 0.5}, "tol=0.0001, where this one has 0.5"),
    ):
        arguments = {"key": KEY, "source": path, "n_clusters": K} | options | change
        with pytest.raises(UserError, match=message):
            fit_stream(**arguments)
    # A copy of the same data in another form is the same data.
    folder_of_parts = tmp_path / "parts"
    folder_of_parts.mkdir()
    np.save(folder_of_parts / "1.npy", x[:100])
    np.save(folder_of_parts / "2.npy", x[100:])
    same(
        fit_stream(KEY, folder_of_parts, K, **options),
        fit_stream(KEY, path, K, init="sample", chunk_rows=CHUNK),
    )


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_used(path, tmp_path, capfd):
    folder = tmp_path / "c"
    stopped(path, folder, 12)
    newest = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    for file in (folder / str(newest)).rglob("*"):
        if file.is_file() and file.stat().st_size:
            os.truncate(file, file.stat().st_size // 2)
    found = fit_stream(KEY, path, K, init="sample", chunk_rows=CHUNK, checkpoint_folder=folder)
    same(found, fit_stream(KEY, path, K, init="sample", chunk_rows=CHUNK))
    assert f"damaged-{newest}" in capfd.readouterr().err
    assert (folder / f"damaged-{newest}").is_dir()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_signals_save_and_leave(path, tmp_path, number):
    def interrupt(progress):
        if progress.stage == "iteration 2" and progress.rows > 300:
            os.kill(os.getpid(), number)

    options = {"init": "sample", "chunk_rows": CHUNK, "checkpoint_folder": tmp_path / "c"}
    with pytest.raises(Interrupted):
        fit_stream(KEY, path, K, progress=interrupt, **options)
    stages = []
    found = fit_stream(KEY, path, K, progress=stages.append, **options)
    assert stages[0].stage == "iteration 2"
    assert stages[0].rows > 300
    same(found, fit_stream(KEY, path, K, init="sample", chunk_rows=CHUNK))


KILLED = """
import os, signal, sys
import jax
from jkmeans.streaming import fit_stream
def kill(progress):
    if progress.stage == "iteration 3" and progress.rows > 500:
        os.kill(os.getpid(), signal.SIGKILL)
fit_stream(jax.random.key(3), sys.argv[1], 6, init="sample", chunk_rows=200, tol=0,
           checkpoint_folder=sys.argv[2], checkpoint_seconds=0, progress=kill)
"""


def test_a_fit_killed_in_the_middle_of_a_pass_goes_on_with_the_same_bits(path, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, path, tmp_path / "c"], timeout=120)
    assert done.returncode == -signal.SIGKILL
    stages = []
    options = {"init": "sample", "chunk_rows": CHUNK, "tol": 0}
    found = fit_stream(
        KEY, path, K, checkpoint_folder=tmp_path / "c", progress=stages.append, **options
    )
    assert stages[0].stage in ("iteration 2", "iteration 3")
    same(found, fit_stream(KEY, path, K, **options))


# Outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_predict_transform_and_score_are_those_of_sklearn(path, x, weights, n_devices, tmp_path):
    options = {"chunk_rows": CHUNK, "mesh": make_mesh(n_devices)}
    model = in_sklearn(x, x[:K])
    c = model.cluster_centers_
    found = predict_stream(
        path, c, tmp_path / "labels.npy", distances_path=tmp_path / "distances.npy", **options
    )
    labels, distances = np.load(tmp_path / "labels.npy"), np.load(tmp_path / "distances.npy")
    assert (labels.dtype, distances.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(labels, model.labels_)
    np.testing.assert_array_equal(found.counts, np.bincount(labels, minlength=K))
    to_all = model.transform(x)
    np.testing.assert_allclose(distances, to_all.min(axis=1) ** 2, rtol=1e-4)
    assert found.inertia == pytest.approx(model.inertia_, rel=1e-5)
    transform_stream(path, c, tmp_path / "all.npy", **options)
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), to_all, rtol=1e-4)
    assert score_stream(path, c, **options) == pytest.approx(model.score(x), rel=1e-5)
    assert score_stream(path, c, weights=weights, **options) == pytest.approx(
        model.score(x, sample_weight=weights), rel=1e-5
    )


def test_distances_keep_their_digits_near_a_centroid(tmp_path):
    x = np.random.default_rng(0).normal(scale=0.01, size=(90, D)).astype(np.float32)
    centroids = np.full((3, D), [[0], [1000], [-1000]], np.float32)
    x += centroids[np.arange(90) % 3]
    transform_stream(x, centroids, tmp_path / "all.npy")
    found = np.load(tmp_path / "all.npy")
    assert found.dtype == np.float32
    differences = x[:, None].astype(np.float64) - centroids[None]
    np.testing.assert_allclose(found, np.sqrt(np.sum(differences**2, axis=2)), rtol=1e-4)


def test_outputs_appear_when_they_are_complete(path, x, tmp_path):
    output = tmp_path / "labels.npy"
    output.write_bytes(b"old")

    def look(progress):
        assert output.read_bytes() == b"old"
        if progress.rows > 500:
            raise Stop

    with pytest.raises(Stop):
        predict_stream(path, x[:K], output, chunk_rows=CHUNK, progress=look)
    assert output.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.npy", "x.npy"]


def test_outputs_that_cannot_be_written(path, x, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*No such file or directory"):
        predict_stream(path, x[:K], tmp_path / "nowhere" / "labels.npy", chunk_rows=CHUNK)
    with pytest.raises(UserError, match=r"the centroids are of shape \[6, 4\]; .* 5\]"):
        predict_stream(path, x[:K, :4], tmp_path / "labels.npy", chunk_rows=CHUNK)


def test_progress_in_lines_and_not_at_all(path, x, capfd):
    options = {"init": x[:K], "tol": 0, "max_iter": 2, "chunk_rows": CHUNK}
    fit_stream(KEY, path, K, **options)
    assert capfd.readouterr().err == ""
    fit_stream(KEY, path, K, progress=True, **options)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["iteration 1", "iteration 2", "inertia"]
    assert "1,003 of 1,003 rows" in lines[0]
    assert "MB/s" in lines[0]


def test_a_slow_source_is_read_while_the_devices_compute(x):
    # Two passes' worth of sleeping in the reader must not wait for the main thread to come by:
    # at any time the reader is ahead by at least one chunk.
    ahead = []

    class Slow(Counting):
        read_until = 0

        def _read(self, start, out):
            super()._read(start, out)
            self.read_until = start + len(out)

    source = Slow(2000)

    def look(progress):
        time.sleep(0.02)
        ahead.append(source.read_until - progress.rows)

    fit_stream(
        KEY, source, 2, init=np.eye(2, D), tol=0, max_iter=0, chunk_rows=CHUNK, progress=look
    )
    assert min(ahead[:5]) >= 2 * CHUNK
    assert max(ahead) <= pipeline.N_BUFFERS * CHUNK
