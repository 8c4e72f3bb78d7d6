import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec
from sklearn.cluster import KMeans

from jkmeans.kmeans import (
    KMeansResult,
    bounds,
    column_moments,
    far_origin,
    lloyd,
    relocation,
)

ROWS, SAME = PartitionSpec("data"), PartitionSpec()
RESULT_SPECS = KMeansResult(SAME, ROWS, ROWS, SAME, SAME, SAME, SAME, SAME)

# For tests whose point is not the algorithm, and which compile a program of their own for each.
_one_is_slow = pytest.mark.parametrize(
    "algorithm", ["lloyd", pytest.param("bounds", marks=pytest.mark.slow)], indirect=True
)

_program = jax.jit(lloyd, static_argnames=("algorithm", "empty", "block_size"))
_algorithm = "lloyd"


@pytest.fixture(params=["lloyd", "bounds"], autouse=True, scope="module")
def algorithm(request):
    """Every test runs with both; groups and blocks are small enough for there to be several."""
    global _algorithm
    _algorithm = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "GROUP_SIZE", 2)
        patch.setattr(bounds, "_BLOCK_ENTRIES", 400)
        patch.setattr(bounds, "_WORTH_ALL", 0.95)
        yield request.param


def run(x, start, *, weights=None, max_iter=300, tol=0.0, empty="farthest"):
    """One compiled program for each shape and policy."""
    if weights is not None:
        weights = weights.astype(np.float32)
    elif _algorithm == "lloyd":
        weights = np.ones(len(x), np.float32)
    return _program(
        x, start, weights=weights, max_iter=max_iter, tol=tol, empty=empty, algorithm=_algorithm
    )


def scikit_learn(x, centroids, *, max_iter=300, weights=None):
    model = KMeans(
        len(centroids), init=centroids, n_init=1, algorithm="lloyd", tol=0, max_iter=max_iter
    )
    return model.fit(x, sample_weight=weights)


def check_consistent(result, x, weights=None):
    """Labels, distances, counts and inertia are those of the centroids, by brute force."""
    x = np.asarray(x, np.float64)
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    centroids = np.asarray(result.centroids, np.float64)
    squared = ((x[:, None] - centroids[None]) ** 2).sum(axis=2)
    labels = np.asarray(result.labels)
    chosen = squared[np.arange(len(x)), labels]
    np.testing.assert_allclose(chosen, squared.min(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.distances, chosen, rtol=1e-4, atol=1e-4)
    counts = np.bincount(labels, weights, len(centroids))
    np.testing.assert_allclose(result.counts, counts, rtol=1e-5)
    np.testing.assert_allclose(result.inertia, (weights * chosen).sum(), rtol=1e-4, atol=1e-4)
    assert result.n_empty == (counts == 0).sum()


def check_equal(result, model):
    np.testing.assert_array_equal(result.labels, model.labels_)
    np.testing.assert_allclose(result.centroids, model.cluster_centers_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.inertia, model.inertia_, rtol=1e-5)
    assert result.n_iter == model.n_iter_


@pytest.mark.parametrize("empty", ["keep", "farthest"])
def test_agrees_with_scikit_learn(blobs, empty):
    result = _program(blobs, blobs[:6], empty=empty)
    check_equal(result, scikit_learn(blobs, blobs[:6]))
    check_consistent(result, blobs)
    assert result.n_iter > 5
    assert result.n_empty == 0
    assert result.n_relocated == 0
    assert result.labels.dtype == result.n_iter.dtype == jnp.int32


@pytest.mark.parametrize("max_iter", [1, 2, 5])
def test_stopped_early_agrees_with_scikit_learn(blobs, max_iter):
    result = run(blobs, blobs[:6], max_iter=max_iter)
    check_equal(result, scikit_learn(blobs, blobs[:6], max_iter=max_iter))
    check_consistent(result, blobs)


def test_no_iteration_only_assigns(blobs):
    result = run(blobs, blobs[:6], max_iter=0)
    np.testing.assert_array_equal(result.centroids, blobs[:6])
    assert result.n_iter == 0
    check_consistent(result, blobs)


def test_tolerance_is_on_the_squared_shift(blobs):
    # scikit-learn's tol is a share of the mean variance.
    model = KMeans(6, init=blobs[:6], n_init=1, algorithm="lloyd", tol=1e-2).fit(blobs)
    result = run(blobs, blobs[:6], tol=1e-2 * blobs.var(axis=0).mean())
    strict = run(blobs, blobs[:6], tol=0.0)
    check_equal(result, model)
    check_consistent(result, blobs)
    assert result.n_iter < strict.n_iter


def test_weighted_rows_are_repeated_rows(blobs):
    weights = np.random.default_rng(0).integers(0, 4, len(blobs))
    weighted = run(blobs, blobs[:6], weights=weights)
    repeated = scikit_learn(np.repeat(blobs, weights, axis=0), blobs[:6])
    np.testing.assert_array_equal(np.repeat(weighted.labels, weights), repeated.labels_)
    np.testing.assert_allclose(weighted.centroids, repeated.cluster_centers_, rtol=1e-4)
    np.testing.assert_allclose(weighted.inertia, repeated.inertia_, rtol=1e-5)
    assert weighted.n_iter == repeated.n_iter_
    check_consistent(weighted, blobs, weights)


def test_scaled_weights_change_nothing_but_the_scale(blobs):
    weights = np.random.default_rng(1).uniform(0.5, 2, len(blobs)).astype(np.float32)
    model = scikit_learn(blobs, blobs[:6], weights=weights)
    for scale in (1, 1024):
        result = run(blobs, blobs[:6], weights=scale * weights)
        np.testing.assert_array_equal(result.labels, model.labels_)
        np.testing.assert_allclose(result.centroids, model.cluster_centers_, rtol=1e-4)
        np.testing.assert_allclose(result.inertia, scale * model.inertia_, rtol=1e-5)


@pytest.mark.parametrize("wild", [1e6, np.nan])
def test_rows_of_weight_zero_are_ignored(blobs, wild):
    x, weights = blobs.copy(), np.ones(len(blobs), np.float32)
    x[::5], weights[::5] = wild, 0
    kept = weights > 0
    start = blobs[kept][:6]
    result = run(x, start, weights=weights)
    model = scikit_learn(blobs[kept], start)
    np.testing.assert_array_equal(np.asarray(result.labels)[kept], model.labels_)
    np.testing.assert_allclose(result.centroids, model.cluster_centers_, rtol=1e-4)
    np.testing.assert_allclose(result.inertia, model.inertia_, rtol=1e-5)


def test_rows_of_weight_zero_do_not_fill_an_empty_cluster():
    x = np.array([[0.0], [1.0], [3.0], [50.0]], np.float32)
    result = run(x, np.array([[0.0], [-100.0]], np.float32), weights=np.array([1.0, 1.0, 1.0, 0.0]))
    # Row 3 is farther, but does not count.
    np.testing.assert_allclose(result.centroids, [[0.5], [3.0]])


def test_an_empty_cluster_keeps_its_centroid():
    x = np.array([[0.0], [1.0], [5.0], [6.0]], np.float32)
    start = np.array([[0.2], [-77.0], [5.7]], np.float32)
    result = run(x, start, empty="keep")
    np.testing.assert_allclose(result.centroids, [[0.5], [-77.0], [5.5]])
    np.testing.assert_array_equal(result.counts, [2, 0, 2])
    assert result.n_empty == 1
    assert result.n_relocated == 0


def test_an_empty_cluster_takes_the_farthest_row():
    x = np.array([[0.0], [1.0], [2.0], [9.0], [20.0], [21.0]], np.float32)
    start = np.array([[1.0], [-77.0], [20.0]], np.float32)
    # Row 3 (9) leaves cluster 0, whose mean over the other rows is 1.
    first = run(x, start, max_iter=1)
    np.testing.assert_allclose(first.centroids, [[1.0], [9.0], [20.5]])
    assert first.n_relocated == 1
    result = run(x, start)
    check_equal(result, scikit_learn(x, start))
    assert result.n_empty == 0


def test_several_empty_clusters_take_different_rows_farthest_first():
    x = np.array([[0.0], [0.5], [5.0], [9.0]], np.float32)
    start = np.array([[0.0], [100.0], [-100.0]], np.float32)
    first = run(x, start, max_iter=1)
    np.testing.assert_allclose(first.centroids, [[0.25], [9.0], [5.0]])
    assert first.n_relocated == 2
    result = run(x, start)
    model = scikit_learn(x, start)
    assert result.n_iter == model.n_iter_
    np.testing.assert_allclose(
        np.sort(result.centroids, axis=0), np.sort(model.cluster_centers_, axis=0)
    )


@_one_is_slow
def test_more_clusters_than_moves_in_an_iteration(monkeypatch):
    monkeypatch.setattr(relocation, "MAX_RELOCATIONS", 1)
    x = np.array([[0.0], [0.5], [5.0], [9.0]], np.float32)
    start = np.array([[0.0], [100.0], [-100.0], [-200.0]], np.float32)
    result = jax.jit(lloyd)(x, start)
    np.testing.assert_allclose(np.sort(result.centroids, axis=0), x)
    assert result.n_relocated == 3


@_one_is_slow
@pytest.mark.parametrize("empty", ["keep", "farthest"])
def test_fewer_different_rows_than_clusters(empty):
    x = np.full((10, 2), 3.0, np.float32)
    start = np.array([[3.0, 3.0], [4.0, 4.0], [5.0, 5.0]], np.float32)
    result = run(x, start, empty=empty)
    np.testing.assert_array_equal(result.centroids, start)
    np.testing.assert_array_equal(result.counts, [10, 0, 0])
    assert result.inertia == 0
    assert result.n_empty == 2
    assert result.n_iter == 1


@_one_is_slow
def test_as_many_clusters_as_rows(blobs):
    result = run(blobs[:16], blobs[:16])
    np.testing.assert_array_equal(result.labels, np.arange(16))
    assert result.inertia == 0


_lattice = partial(_program, tol=0.0, block_size=5)


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.int32, (12, 2), elements=st.integers(-8, 8)),
    hnp.arrays(np.float32, 12, elements=st.sampled_from([0.0, 1.0, 2.0])),
    st.integers(0, 6),
    st.sampled_from(["keep", "farthest"]),
)
def test_properties(x, weights, max_iter, empty):
    result = _lattice(x, x[:3], weights=weights, max_iter=max_iter, empty=empty)
    check_consistent(result, x, weights)
    assert result.n_iter <= max_iter
    # One more iteration never raises the inertia.
    further = _lattice(x, x[:3], weights=weights, max_iter=max_iter + 1, empty=empty)
    assert further.inertia <= result.inertia * (1 + 1e-5) + 1e-5
    # Stopped by convergence: every cluster's centroid is the mean of its rows.
    if result.n_iter < max_iter:
        for cluster in np.flatnonzero(result.counts):
            rows = np.asarray(result.labels) == cluster
            mean = np.average(x[rows], axis=0, weights=weights[rows])
            np.testing.assert_allclose(result.centroids[cluster], mean, rtol=1e-4, atol=1e-4)


def test_permuting_rows_and_centroids_permutes_the_result(blobs):
    rng = np.random.default_rng(0)
    rows, clusters = rng.permutation(len(blobs)), rng.permutation(6)
    plain = run(blobs, blobs[:6])
    permuted = run(blobs[rows], blobs[:6][clusters])
    np.testing.assert_array_equal(clusters[permuted.labels], np.asarray(plain.labels)[rows])
    np.testing.assert_allclose(permuted.centroids, plain.centroids[clusters], rtol=1e-4)
    assert permuted.n_iter == plain.n_iter


@_one_is_slow
def test_vmap_over_restarts(blobs):
    starts = np.stack([blobs[6 * i : 6 * i + 6] for i in range(4)])
    results = jax.jit(jax.vmap(lambda start: lloyd(blobs, start)))(starts)
    for i in range(4):
        check_equal(
            jax.tree.map(lambda leaf, i=i: leaf[i], results), scikit_learn(blobs, starts[i])
        )


@_one_is_slow
def test_bytes_are_clustered_in_float32():
    x = np.random.default_rng(0).integers(0, 256, (60, 3)).astype(np.uint8)
    result = run(x, x[:4])
    check_equal(result, scikit_learn(x.astype(np.float32), x[:4].astype(np.float32)))


@_one_is_slow
def test_first_centroids_far_from_the_data():
    rng = np.random.default_rng(0)
    x = (1e5 + rng.normal(size=(300, 4))).astype(np.float32)
    start = rng.normal(size=(4, 4)).astype(np.float32)
    result = run(x, start, max_iter=100)
    model = scikit_learn(x.astype(np.float64), start.astype(np.float64), max_iter=100)
    assert result.n_empty == 0
    np.testing.assert_allclose(result.inertia, model.inertia_, rtol=0.1)


@_one_is_slow
@pytest.mark.parametrize("kind", ["lloyd", "bounds"])
def test_rows_far_from_the_origin(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 9)) + 20 * rng.normal(size=(8, 9))[rng.integers(8, size=20_000)]
    far = (x + 1e6 * (np.arange(9) % 2)).astype(np.float32)
    origin = far_origin(*column_moments(far))
    np.testing.assert_array_equal(origin != 0, np.arange(9) % 2 == 1)
    result = lloyd(far, far[:8], algorithm=kind, origin=origin)
    best = sum(
        np.sum((rows - rows.mean(axis=0)) ** 2)
        for rows in (far[np.asarray(result.labels) == i].astype(np.float64) for i in range(8))
    )
    np.testing.assert_allclose(result.inertia, best, rtol=1e-3)
    # Centroids are known to .06 there.
    sk = KMeans(8, init=far[:8], n_init=1, tol=0, algorithm="lloyd").fit(far)
    assert result.inertia == pytest.approx(sk.inertia_, rel=1e-3)


@_one_is_slow
def test_an_origin_has_no_part_in_the_derivative():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2)) + 1e3, jnp.float32)

    def of_rows(x):
        return jnp.sum(lloyd(x, x[:1], origin=x[0]).centroids)

    np.testing.assert_allclose(jax.grad(of_rows)(x), 1 / 40, rtol=1e-5)


@_one_is_slow
def test_rows_in_one_place():
    for value in (0.1, 1e8):
        x = np.full((100_000, 3), value, np.float32)
        result = lloyd(x, x[:1], origin=far_origin(*column_moments(x)))
        assert float(result.inertia) == 0
        np.testing.assert_array_equal(result.centroids, x[:1])


def test_rows_in_float32_and_centroids_in_float64(blobs):
    with jax.enable_x64(True):
        result = run(blobs, blobs[:6].astype(np.float64))
        assert result.centroids.dtype == result.counts.dtype == np.float64
        check_consistent(result, blobs)


def test_a_row_whose_square_overflows(blobs):
    x = blobs.copy()
    x[5] = 3e19
    labels = np.asarray(run(x, blobs[10:16], max_iter=0).labels)
    others = np.asarray(run(blobs, blobs[10:16], max_iter=0).labels)
    np.testing.assert_array_equal(np.delete(labels, 5), np.delete(others, 5))


@_one_is_slow
def test_unknown_algorithm():
    with pytest.raises(ValueError, match=r"algorithm='fast': expected one of auto, bounds, lloyd"):
        lloyd(jnp.zeros((3, 1)), jnp.zeros((2, 1)), algorithm="fast")


@_one_is_slow
def test_unknown_policy():
    with pytest.raises(ValueError, match=r"empty='drop': expected one of farthest, keep"):
        lloyd(jnp.zeros((3, 1)), jnp.zeros((2, 1)), empty="drop")


@pytest.mark.parametrize("empty", [pytest.param("keep", marks=pytest.mark.slow), "farthest"])
def test_eight_devices_agree_with_scikit_learn(on_eight_devices, blobs, empty):
    # 317 rows and three of padding; padding holds zeros and weight 0.
    x, weights = blobs.copy(), np.ones(len(blobs), np.float32)
    x[317:], weights[317:] = 0, 0
    start = blobs[:6].copy()
    if empty == "farthest":
        start[2:4] += 1000  # two empty clusters, filled from rows of any device
    f = partial(lloyd, empty=empty, axis_name="data", algorithm=_algorithm)
    program = on_eight_devices(
        lambda x, weights, start: f(x, start, weights=weights), RESULT_SPECS, replicated=(2,)
    )
    result = program(x, weights, start)
    check_consistent(result, x, weights)
    one = run(x, start, weights=weights, empty=empty)
    np.testing.assert_array_equal(result.labels, one.labels)
    np.testing.assert_allclose(result.centroids, one.centroids, rtol=1e-4)
    assert result.n_iter == one.n_iter
    assert result.n_relocated == one.n_relocated == (2 if empty == "farthest" else 0)
    if empty == "keep":
        model = scikit_learn(x[:317], start)
        np.testing.assert_array_equal(np.asarray(result.labels)[:317], model.labels_)
        assert result.n_iter == model.n_iter_


def test_one_all_reduce_an_iteration(on_eight_devices, blobs, algorithm):
    f = partial(lloyd, empty="keep", axis_name="data", algorithm=_algorithm)
    program = on_eight_devices(lambda x, start: f(x, start), RESULT_SPECS, replicated=(1,))
    text = program.lower(blobs, blobs[:6]).compile().as_text()
    computations = re.split(r"\n(?=(?:ENTRY )?%)", text)
    entry = [
        computation.startswith("ENTRY")
        for computation in computations
        for _ in re.findall(r" all-reduce(?:-start)?\(", computation)
    ]
    # One in the loop; after it one for the inertia and, where sums have followed the rows that
    # moved, one in a branch for sums made anew.
    assert sorted(entry) == ([False, True] if algorithm == "lloyd" else [False, False, True])
    assert not re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)", text)
