"""The scikit-learn interface: scikit-learn's own checks, and equality with its estimators."""

import copy
import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import jkmeans
from jkmeans import (
    BisectingKMeans,
    HierarchicalKMeans,
    KMeans,
    MiniBatchKMeans,
    SphericalKMeans,
    sharding,
)
from jkmeans.estimators.inputs import read_rows
from tests import tiny

ESTIMATORS = [KMeans, MiniBatchKMeans, SphericalKMeans, BisectingKMeans, HierarchicalKMeans]

# As scikit-learn expects of its own k-means: other rows draw other random numbers. That weights
# are repetitions is tested below, from the same start.
STOCHASTIC = {
    "check_sample_weight_equivalence_on_dense_data": "initial centroids are drawn from the rows"
}


# Each fits rows of other shapes, which compiles anew.
SLOW_CHECKS = {
    "check_fit_score_takes_y", "check_estimators_overwrite_params",
    "check_dont_overwrite_parameters", "check_estimators_fit_returns_self",
    "check_readonly_memmap_input", "check_n_features_in_after_fitting",
    "check_positive_only_tag_during_fit", "check_sample_weights_pandas_series",
    "check_sample_weights_not_an_array", "check_sample_weights_list",
    "check_sample_weights_not_overwritten", "check_dtype_object", "check_pipeline_consistency",
    "check_array_api_input", "check_f_contiguous_array_estimator",
    "check_transformer_data_not_an_array", "check_transformer_preserve_dtypes",
    "check_transformer_n_iter", "check_clusterer_compute_labels_predict",
    "check_methods_sample_order_invariance", "check_methods_subset_invariance",
    "check_fit2d_1feature", "check_fit_check_is_fitted", "check_fit2d_predict1d",
    "check_sample_weights_shape", "check_estimators_pickle", "check_n_features_in",
    "check_estimators_nan_inf", "check_dict_unchanged", "check_fit_idempotent",
}  # fmt: skip


def checks_of(estimator):
    """scikit-learn's checks as parameters, of which `SLOW_CHECKS` are slow tests."""
    mark = parametrize_with_checks([estimator], expected_failed_checks=lambda _: STOCHASTIC)
    names, found = mark.args
    cases = []
    for case in found:
        values, marks = (case.values, case.marks) if hasattr(case, "marks") else (case, ())
        if values[1].func.__name__ in SLOW_CHECKS:
            marks = (*marks, pytest.mark.slow)
        cases.append(pytest.param(*values, marks=marks))
    return pytest.mark.parametrize(names, cases, **mark.kwargs)


@checks_of(KMeans())
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [estimator() for estimator in ESTIMATORS[1:]], expected_failed_checks=lambda _: STOCHASTIC
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_checks_of_the_others(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def blobs():
    x, _ = make_blobs(301, 5, centers=6, cluster_std=3.0, random_state=0)
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(8)


def check_equal(ours, theirs, rtol=1e-4):
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    scale = np.abs(theirs.cluster_centers_).max()
    np.testing.assert_allclose(
        ours.cluster_centers_, theirs.cluster_centers_, rtol=rtol, atol=rtol * scale
    )
    np.testing.assert_allclose(ours.inertia_, theirs.inertia_, rtol=rtol, atol=rtol * scale**2)


# KMeans


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tol", [0.0, 1e-4, 1e-2])
def test_kmeans_agrees_with_scikit_learn(blobs, dtype, weighted, tol):
    x = blobs.astype(dtype)
    weights = np.random.default_rng(0).uniform(0, 2, 301) if weighted else None
    ours = KMeans(6, init=x[:6], tol=tol).fit(x, sample_weight=weights)
    theirs = sklearn.cluster.KMeans(6, init=x[:6], tol=tol).fit(x, sample_weight=weights)
    check_equal(ours, theirs, rtol=1e-4 if dtype == np.float32 else 1e-11)
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.cluster_centers_.dtype == ours.transform(x).dtype == dtype
    assert ours.labels_.dtype == np.int32
    rtol = 1e-4 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=rtol)
    other = blobs[::-1] + 1
    np.testing.assert_array_equal(ours.predict(other), theirs.predict(other.astype(dtype)))
    np.testing.assert_allclose(
        ours.score(x, sample_weight=weights), theirs.score(x, sample_weight=weights), rtol=1e-5
    )


@pytest.mark.parametrize("max_iter", [1, 2, 5])
def test_kmeans_stopped_early_agrees_with_scikit_learn(blobs, max_iter):
    ours = KMeans(6, init=blobs[:6], max_iter=max_iter).fit(blobs)
    theirs = sklearn.cluster.KMeans(6, init=blobs[:6], max_iter=max_iter).fit(blobs)
    check_equal(ours, theirs)
    assert ours.n_iter_ == theirs.n_iter_ == max_iter


@pytest.mark.parametrize("init", ["k-means++", pytest.param("k-means||", marks=pytest.mark.slow)])
def test_kmeans_reaches_what_scikit_learn_reaches(init):
    x, y = make_blobs(400, 8, centers=8, cluster_std=0.5, random_state=1)
    ours = KMeans(8, init=init, n_init=10, random_state=0).fit(x.astype(np.float32))
    theirs = sklearn.cluster.KMeans(8, n_init=10, random_state=0).fit(x)
    np.testing.assert_allclose(ours.inertia_, theirs.inertia_, rtol=1e-4)
    assert len(set(zip(ours.labels_, y, strict=True))) == 8


def test_kmeans_with_a_callable(blobs):
    calls = []

    def init(X, n_clusters, random_state):
        calls.append(random_state.randint(10**6))
        # A copy, because scikit-learn moves the centroids where they lie, here in X.
        return X[calls[-1] % 100 :][:n_clusters].copy()

    ours = KMeans(6, init=init, random_state=3).fit(blobs)
    assert len(calls) == 10
    assert len(set(calls)) == 10
    theirs = sklearn.cluster.KMeans(6, init=init, random_state=3).fit(blobs)
    assert calls[:10] == calls[10:]
    np.testing.assert_allclose(ours.inertia_, theirs.inertia_, rtol=1e-5)


def test_kmeans_n_init_with_an_array(blobs):
    with pytest.warns(RuntimeWarning, match="performing only one init in KMeans instead of n_init"):
        KMeans(6, init=blobs[:6], n_init=3).fit(blobs)


def test_random_state(blobs):
    def labels(random_state):
        return KMeans(6, init="random", n_init=1, random_state=random_state).fit(blobs).labels_

    np.testing.assert_array_equal(labels(5), labels(5))
    np.testing.assert_array_equal(labels(np.random.RandomState(5)), labels(5))
    state = np.random.RandomState(5)
    assert (labels(state) != labels(state)).any()


def test_fewer_distinct_rows_than_clusters():
    x = np.repeat([[1.0, 2.0], [3.0, 4.0]], 10, axis=0)
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\) found smaller than n_cl"):
        model = KMeans(3, random_state=0).fit(x)
    assert model.inertia_ == 0
    assert len(set(zip(model.labels_, x[:, 0], strict=True))) == 2


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_kmeans_on_degenerate_data(data):
    """Duplicates, constants, one feature, K=1 and K=n: a right partition, as scikit-learn's."""
    n, d = data.draw(st.sampled_from([(1, 1), (6, 1), (6, 3)]))
    k = data.draw(st.sampled_from(sorted({1, min(2, n), n})))
    values = st.integers(-2, 2) if data.draw(st.booleans()) else st.just(7)
    x = data.draw(hnp.arrays(np.float64, (n, d), elements=values))
    start = x[:k] + data.draw(hnp.arrays(np.float64, (k, d), elements=st.sampled_from([0.0, 0.25])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ours = KMeans(k, init=start, tol=0).fit(x)
        theirs = sklearn.cluster.KMeans(k, init=start, tol=0).fit(x)
    squared = ((x[:, None] - ours.cluster_centers_[None]) ** 2).sum(axis=2)
    chosen = squared[np.arange(n), ours.labels_]
    np.testing.assert_allclose(chosen, squared.min(axis=1), atol=1e-12)
    np.testing.assert_allclose(ours.inertia_, chosen.sum(), atol=1e-12)
    if k == 1:
        np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-12)
    if k in (1, n):
        np.testing.assert_allclose(ours.inertia_, theirs.inertia_, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-28, 1e28])
@pytest.mark.parametrize("kind", [KMeans, BisectingKMeans])
def test_only_ratios_of_weights_matter(blobs, kind, scale):
    plain = kind(4, random_state=0).fit(blobs)
    scaled = kind(4, random_state=0).fit(blobs, sample_weight=np.full(301, scale))
    np.testing.assert_array_equal(scaled.labels_, plain.labels_)
    np.testing.assert_allclose(scaled.inertia_, scale * plain.inertia_, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-38, 1e-45, 1e35])
@pytest.mark.parametrize("kind", [KMeans, BisectingKMeans, MiniBatchKMeans, SphericalKMeans])
def test_weights_that_float32_loses_are_refused(blobs, kind, scale, tmp_path):
    # At 1e-38 there was one cluster, because products below the least number are taken for 0.
    weights = np.full(301, scale, np.float32)
    with pytest.raises(ValueError, match=r"sample_weight is .*accepted"):
        kind(4).fit(blobs, sample_weight=weights)
    if kind is not KMeans:
        return
    np.save(tmp_path / "x.npy", blobs)
    with pytest.raises(ValueError, match=r"the weights .* in float32; accepted: a sum of"):
        kind(4).fit(tmp_path / "x.npy", sample_weight=weights)
    doubles = blobs.astype(np.float64)
    assert np.unique(kind(4).fit(doubles, sample_weight=np.full(301, scale)).labels_).size == 4


def test_weights_are_repetitions(blobs, mesh):
    weights = np.random.default_rng(0).integers(0, 4, 301)
    for where in (None, mesh):
        model = KMeans(6, init=blobs[:6], mesh=where, tol=0)
        weighted = clone(model).fit(blobs, sample_weight=weights)
        repeated = clone(model).fit(np.repeat(blobs, weights, axis=0))
        np.testing.assert_array_equal(np.repeat(weighted.labels_, weights), repeated.labels_)
        np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, rtol=1e-4)
        np.testing.assert_allclose(weighted.inertia_, repeated.inertia_, rtol=1e-5)


@pytest.mark.parametrize("name", ["rows.npy", "folder"])
def test_kmeans_of_files(blobs, tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        np.save(path / "1.npy", blobs[:100])
        np.save(path / "2.npy", blobs[100:])
    else:
        np.save(path, blobs)
    theirs = sklearn.cluster.KMeans(6, init=blobs[:6]).fit(blobs)
    model = KMeans(6, init=blobs[:6])
    model.feature_names_in_ = np.array(list("abcde"), object)  # Of an earlier fit.
    model.fit(str(path))
    assert not hasattr(model, "feature_names_in_")
    check_equal(model, theirs)
    assert model.n_iter_ == theirs.n_iter_
    assert model.n_features_in_ == 5
    np.testing.assert_array_equal(model.predict(path), theirs.labels_)
    np.testing.assert_allclose(model.transform(path), theirs.transform(blobs), rtol=1e-3)
    np.testing.assert_allclose(model.score(path), theirs.score(blobs), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", pytest.param("int64", marks=pytest.mark.slow)])
def test_files_of_integers_that_float32_cannot_tell_apart(dtype, tmp_path):
    path, truth = tmp_path / "x.npy", np.arange(300) % 3
    x = np.random.default_rng(0).integers(-2, 3, (300, 2)) + 20 * truth[:, None] + 1_700_000_000
    np.save(path, x.astype(dtype))
    theirs = sklearn.cluster.KMeans(3, init=x[:3].astype(float)).fit(x.astype(float))
    model = KMeans(3, init=x[:3]).fit(path)
    check_equal(model, theirs, rtol=1e-12)
    np.testing.assert_array_equal(model.labels_, truth)
    assert model.score(path) == pytest.approx(-theirs.inertia_)
    own = np.sqrt(np.sum((x - theirs.cluster_centers_[truth]) ** 2, axis=1))
    np.testing.assert_allclose(model.transform(path).min(axis=1), own, rtol=1e-6)


def test_centroids_that_float32_cannot_tell_apart_and_files_of_float32(tmp_path):
    x = np.full((1, 1), 1_700_000_000, np.float32)
    np.save(tmp_path / "x.npy", x)
    model = KMeans(2)
    model.cluster_centers_, model.n_features_in_ = x + np.array([[-50.0], [40.0]]), 1
    for rows in (x, tmp_path / "x.npy"):
        assert model.predict(rows) == [1]
        np.testing.assert_array_equal(model.transform(rows), [[50, 40]])
        assert model.score(rows) == -1600


def test_files_of_float64_are_judged_in_float64(blobs, tmp_path):
    path, x = tmp_path / "x.npy", blobs.astype(np.float64) * 1e60
    np.save(path, x)
    theirs = sklearn.cluster.KMeans(6, init=x[:6]).fit(x)
    for scale in (1e-60, 1e60):
        model = KMeans(6, init=x[:6]).fit(path, sample_weight=np.full(301, scale))
        np.testing.assert_array_equal(model.labels_, theirs.labels_)
        assert model.inertia_ == pytest.approx(scale * theirs.inertia_)


def test_bad_files(blobs, tmp_path):
    with pytest.raises(ValueError, match=r"none\.npy does not exist; accepted:"):
        KMeans(6).fit(tmp_path / "none.npy")
    np.save(tmp_path / "two.npy", blobs[:, :2])
    with pytest.raises(ValueError, match="has 2 features, but 5 are expected"):
        KMeans(3).fit(blobs).predict(tmp_path / "two.npy")
    with pytest.raises(TypeError, match="SphericalKMeans does not read here"):
        SphericalKMeans(3).fit(tmp_path / "two.npy")


# MiniBatchKMeans


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_partial_fit_agrees_with_scikit_learn(blobs, dtype):
    x = blobs.astype(dtype)
    options = {"init": x[:6], "n_init": 1, "reassignment_ratio": 0}
    ours = MiniBatchKMeans(6, **options)
    theirs = sklearn.cluster.MiniBatchKMeans(6, **options)
    rng = np.random.default_rng(0)
    for _ in range(4):
        batch, weights = x[rng.choice(301, 64)], rng.uniform(0, 2, 64)
        for model in (ours, theirs):
            model.partial_fit(batch, sample_weight=weights)
        check_equal(ours, theirs, rtol=1e-4 if dtype == np.float32 else 1e-11)
    assert ours.n_steps_ == theirs.n_steps_ == 4
    assert ours.cluster_centers_.dtype == dtype


def test_partial_fit_goes_on_after_fit_and_pickling(blobs, mesh):
    model = MiniBatchKMeans(6, random_state=0, batch_size=64).fit(blobs)
    n_steps = model.n_steps_
    assert n_steps > 10
    other = pickle.loads(pickle.dumps(model)).set_params(mesh=mesh)
    for each in (model, other):
        each.partial_fit(blobs[:100])
    assert model.n_steps_ == n_steps + 1
    np.testing.assert_allclose(other.cluster_centers_, model.cluster_centers_, rtol=1e-5)


@pytest.mark.parametrize("init", tiny.all_but_slow(["k-means++", "random", "callable"], "callable"))
def test_minibatch_reaches_nearly_what_lloyd_reaches(init):
    x, _ = make_blobs(2000, 8, centers=4, cluster_std=2.0, random_state=1)
    full = sklearn.cluster.KMeans(4, n_init=10, random_state=0).fit(x)
    init = sklearn.cluster.kmeans_plusplus if init == "callable" else init
    if callable(init):
        init = lambda X, k, random_state: sklearn.cluster.kmeans_plusplus(  # noqa: E731
            X, k, random_state=random_state
        )[0]
    model = MiniBatchKMeans(4, init=init, n_init=5, batch_size=256, random_state=0).fit(x)
    assert model.inertia_ < 1.05 * full.inertia_
    assert 1 <= model.n_iter_ <= 100
    np.testing.assert_allclose(-model.score(x), model.inertia_)


def test_minibatch_without_labels(blobs):
    model = MiniBatchKMeans(6, batch_size=64, compute_labels=False, random_state=0).fit(blobs)
    assert not hasattr(model, "labels_")
    # An estimate, from batches.
    np.testing.assert_allclose(model.inertia_, -model.score(blobs), rtol=0.3)
    with pytest.warns(RuntimeWarning, match=r"init_size=2 should be larger than n_clusters=6"):
        MiniBatchKMeans(6, batch_size=64, init_size=2).fit(blobs)


# SphericalKMeans


def test_spherical_clusters_directions(blobs):
    lengths = np.random.default_rng(0).uniform(0.1, 10, (301, 1)).astype(np.float32)
    model = SphericalKMeans(6, init=blobs[:6]).fit(blobs)
    scaled = SphericalKMeans(6, init=blobs[:6]).fit(blobs * lengths)
    np.testing.assert_array_equal(model.labels_, scaled.labels_)
    np.testing.assert_array_equal(model.predict(blobs * lengths), model.labels_)
    unit = blobs / np.linalg.norm(blobs, axis=1, keepdims=True)
    cosines = unit @ model.cluster_centers_.T
    np.testing.assert_array_equal(cosines.argmax(axis=1), model.labels_)
    np.testing.assert_allclose(model.inertia_, (1 - cosines.max(axis=1)).sum(), rtol=1e-4)
    np.testing.assert_allclose(model.transform(blobs), 1 - cosines, atol=1e-5)
    np.testing.assert_allclose(model.score(blobs * lengths), -model.inertia_, rtol=1e-4)


# BisectingKMeans


@pytest.mark.parametrize(
    ("strategy", "weighted"),
    [
        ("biggest_inertia", True),
        ("largest_cluster", False),
        pytest.param("biggest_inertia", False, marks=pytest.mark.slow),
        pytest.param("largest_cluster", True, marks=pytest.mark.slow),
    ],
)
def test_bisecting_agrees_with_scikit_learn(blobs, strategy, weighted):
    def init(X, n_clusters, random_state):
        return X[:n_clusters].copy()

    weights = np.random.default_rng(0).uniform(0, 2, 301) if weighted else None
    options = {"init": init, "bisecting_strategy": strategy}
    ours = BisectingKMeans(6, **options).fit(blobs, sample_weight=weights)
    theirs = sklearn.cluster.BisectingKMeans(6, **options).fit(blobs, sample_weight=weights)
    check_equal(ours, theirs)
    other = blobs[::-1] * 1.5
    np.testing.assert_array_equal(ours.predict(other), theirs.predict(other))


# HierarchicalKMeans


@pytest.mark.slow
def test_hierarchy_of_nested_blobs():
    """Nine fine clusters in three coarse ones, of very different sizes."""
    rng = np.random.default_rng(0)
    coarse = np.repeat([0, 1, 2], 3)
    centers = np.array([[0, 0], [100, 0], [0, 100]])[coarse] + 10 * np.tile(
        [[0, 0], [1, 0], [0, 1]], (3, 1)
    )
    truth = np.repeat(np.arange(9), [80, 20, 10, 40, 10, 10, 10, 10, 10])
    x = (centers[truth] + rng.normal(size=(200, 2))).astype(np.float32)
    model = HierarchicalKMeans((9, 3), n_init=5, n_resampling=2, random_state=0).fit(x)
    for found, expected in zip(model.level_labels_, (truth, coarse[truth]), strict=True):
        pairs = set(zip(found, expected, strict=True))
        assert len(pairs) == len(set(expected)) == len(set(found))
    np.testing.assert_array_equal(model.predict_levels(x), np.stack(model.level_labels_, axis=1))
    rows = model.sample(27, random_state=0)
    np.testing.assert_array_equal(np.bincount(truth[rows]), np.full(9, 3))
    with pytest.raises(ValueError, match=r"n_clusters=\(3, 9\): expected a number of clusters"):
        HierarchicalKMeans((3, 9)).fit(x)


def test_without_resampling_the_first_level_is_kmeans(blobs):
    model = HierarchicalKMeans(6, n_resampling=0, random_state=0).fit(blobs)
    assert len(model.level_centers_) == 1
    lloyd = sklearn.cluster.KMeans(6, init=model.cluster_centers_).fit(blobs)
    assert lloyd.n_iter_ <= 2
    np.testing.assert_allclose(model.inertia_, lloyd.inertia_, rtol=1e-3)


def test_rows_of_weight_0_do_not_take_over_the_hierarchy(blobs):
    # Many of them, nearer to the centroid than any row that counts.
    crowd = np.tile(blobs.mean(axis=0), (3 * len(blobs), 1))
    weights = np.repeat([1, 0], [len(blobs), len(crowd)])
    model, alone = (HierarchicalKMeans(1, n_resampling=1, random_state=0) for _ in range(2))
    alone.fit(blobs)
    model.fit(np.concatenate([blobs, crowd]), sample_weight=weights)
    assert model.inertia_ == pytest.approx(alone.inertia_, rel=1e-5)
    np.testing.assert_allclose(model.cluster_centers_, alone.cluster_centers_, rtol=1e-4)


# All estimators


@pytest.fixture(params=ESTIMATORS, ids=lambda kind: kind.__name__)
def make(request):
    """Makes an estimator of three clusters."""

    def make(**options):
        few = {"n_resampling": 1} if request.param is HierarchicalKMeans else {}
        return request.param(n_clusters=3, random_state=0, **few, **options)

    return make


def slow_for(*kinds):
    """Makes a test slow for some estimators, whose way there is shared or tested elsewhere too."""
    cases = [
        pytest.param(kind, marks=[pytest.mark.slow] if kind in kinds else [], id=kind.__name__)
        for kind in ESTIMATORS
    ]
    return pytest.mark.parametrize("make", cases, indirect=True)


@slow_for(MiniBatchKMeans, SphericalKMeans, BisectingKMeans, HierarchicalKMeans)
def test_one_device_and_eight(make, blobs, mesh):
    one, eight = make().fit(blobs), make(mesh=mesh).fit(blobs)
    check_equal(eight, one)
    np.testing.assert_array_equal(eight.predict(blobs), one.predict(blobs))
    np.testing.assert_allclose(eight.transform(blobs), one.transform(blobs), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(eight.score(blobs), one.score(blobs), rtol=1e-4)


class Exchanged:
    """Memory that is known by the DLPack protocol only."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Convertible:
    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype=dtype)


def test_kinds_of_arrays(blobs):
    plain = KMeans(3, random_state=0).fit(blobs)
    for x in (
        jax.device_put(blobs, jax.devices()[3]),
        Exchanged(blobs),
        Convertible(blobs),
        np.asfortranarray(blobs),
    ):
        model = KMeans(3, random_state=0).fit(x)
        check_equal(model, plain)
        np.testing.assert_array_equal(model.predict(x), plain.labels_)


@slow_for(*ESTIMATORS[1:])
def test_arrays_of_jax(make, blobs, mesh):
    rows = blobs[:296]
    plain = make().fit(rows)
    for x in (jnp.asarray(rows), jax.device_put(rows, NamedSharding(mesh, sharding.SHARDED))):
        model = make().fit(x)
        check_equal(model, plain)
        for result in (model.predict(x), model.transform(x), model.labels_, model.cluster_centers_):
            assert type(result) is np.ndarray
        assert type(model.inertia_) is float


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((KMeans, dtype) for dtype in (np.uint8, np.int64, jnp.bfloat16)),
        *(pytest.param(KMeans, d, marks=pytest.mark.slow) for d in (np.float16, np.int8)),
        *(pytest.param(kind, jnp.bfloat16, marks=pytest.mark.slow) for kind in ESTIMATORS[1:]),
    ],
)
def test_other_dtypes(kind, dtype):
    x = np.random.default_rng(0).integers(0, 100, (61, 4)).astype(dtype)
    wide = np.float64 if dtype == np.int64 else np.float32
    options = {"n_resampling": 1} if kind is HierarchicalKMeans else {}
    model = kind(3, random_state=0, **options).fit(x)
    expected = kind(3, random_state=0, **options).fit(x.astype(wide))
    assert model.cluster_centers_.dtype == wide
    check_equal(model, expected)
    np.testing.assert_array_equal(model.predict(x), expected.labels_)


class Frame:
    """A data frame whose columns have types of their own beside NumPy's, as polars has them."""

    def __init__(self, values, dtype):
        self.shape, self.dtypes = values.shape, [dtype] * values.shape[1]
        self._values = values

    def __len__(self):
        return len(self._values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self._values, dtype)


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (np.ones((5, 2), ">f4"), np.float32),
        (np.ones((5, 2), ">f8"), np.float64),
        (Frame(np.ones((5, 2), np.float32), "Float32"), np.float32),
        (Frame(np.ones((5, 2), np.uint8), "UInt8"), np.float64),  # Any of which may be missing.
        (Frame(np.ones((5, 2), np.float64), "Decimal"), np.float64),
    ],
)
def test_dtypes_that_scikit_learn_does_not_know(rows, dtype):
    read = read_rows(KMeans(), rows, reset=True)
    assert read.dtype == np.dtype(dtype)
    assert read.dtype.isnative
    assert (read == 1).all()


@slow_for(MiniBatchKMeans, SphericalKMeans, BisectingKMeans)
def test_pickle_clone_copy(make, blobs, mesh):
    model = make(mesh=mesh).fit(blobs)
    assert clone(model).mesh == mesh
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.mesh is None
        np.testing.assert_array_equal(other.predict(blobs), model.labels_)


@slow_for(MiniBatchKMeans, SphericalKMeans, BisectingKMeans)
def test_pipeline_and_output(make, blobs):
    pipeline = make_pipeline(StandardScaler(), make())
    labels = pipeline.fit_predict(blobs)
    np.testing.assert_array_equal(pipeline.predict(blobs), labels)
    model = pipeline[-1]
    names = model.get_feature_names_out()
    assert names[0] == type(model).__name__.lower() + "0"
    assert pipeline.transform(blobs).shape == (len(blobs), len(names))
    assert model.set_output(transform="default") is model
    assert model.set_params(n_clusters=4).n_clusters == 4


def test_results_may_be_written_to(make, blobs):
    model = make().fit(blobs)
    model.labels_[0] = 1
    model.cluster_centers_[0] = 0


@pytest.mark.parametrize("as_jax", [False, True])
def test_rows_that_are_not_finite_are_named(make, blobs, as_jax):
    x = blobs.copy()
    x[17, 2], x[40, 0] = np.nan, np.inf
    message = r"NaN or infinity \(inf\) in 2 of 301 rows, the first is row 17 "
    with pytest.raises(ValueError, match=message):
        make().fit(jnp.asarray(x) if as_jax else x)


@pytest.mark.parametrize("make", [KMeans, MiniBatchKMeans, BisectingKMeans])
def test_values_whose_squares_overflow_leave_the_model_of_the_fit_before(make, blobs):
    model = make(3, random_state=0)
    attempts = [model.fit, model.partial_fit] if make is MiniBatchKMeans else [model.fit]
    for attempt in attempts:
        for learn in (None, *attempts):
            if learn:
                learn(blobs)
            before = vars(model).copy()
            with pytest.raises(ValueError, match=r"inertia is (nan|inf): squares .* overflow fl"):
                attempt(np.float32(1e30) * blobs)
            assert vars(model).keys() == before.keys()
            assert all(vars(model)[name] is before[name] for name in before)


@pytest.mark.slow  # As of lloyd.
@pytest.mark.parametrize("kind", [KMeans, BisectingKMeans])
def test_rows_far_from_the_origin(kind, mesh):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_001, 4)) + 20 * rng.normal(size=(6, 4))[rng.integers(6, size=20_001)]
    near = kind(6, random_state=0, mesh=mesh).fit(x)  # In float64.
    far = (x + np.array([1e6, 0, -3e5, 5])).astype(np.float32)
    model = kind(6, random_state=0, mesh=mesh).fit(far)
    assert model.inertia_ == pytest.approx(near.inertia_, rel=1e-2)
    assert adjusted_rand_score(model.labels_, near.labels_) > 0.99


@pytest.mark.parametrize("kind", [KMeans, BisectingKMeans])
def test_one_far_row_costs_no_digits(kind):
    x = np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
    weights = np.ones(2000)
    x[0], weights[0] = 1e8, 0
    init = {"init": np.full((1, 2), 1e6)} if kind is KMeans else {}
    model = kind(1, **init).fit(x, sample_weight=weights)
    mean = x[1:].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(model.cluster_centers_[0], mean, atol=1e-6)


@pytest.mark.parametrize("make", [KMeans, MiniBatchKMeans])
@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1e-25), (np.float64, 1e-200)])
def test_values_whose_squares_vanish(make, dtype, scale, blobs):
    x = (np.asarray(blobs, np.float64) * scale).astype(dtype)
    with pytest.warns(ConvergenceWarning, match=f"vanish in {np.dtype(dtype).name}, .* scale"):
        make(3, random_state=0).fit(x)


def test_integers_of_jax_are_those_of_numpy():
    x = np.array([[2**24 + 1], [2**24], [5], [6]], np.int32)
    model = KMeans(4, random_state=0).fit(jnp.asarray(x))
    assert model.cluster_centers_.dtype == np.float64
    np.testing.assert_array_equal(np.sort(model.cluster_centers_, axis=0), np.sort(x, axis=0))
    np.testing.assert_array_equal(model.predict(jnp.asarray(x)), model.labels_)


def test_bad_input(make, blobs):
    with pytest.raises(ValueError, match=r"n_samples=2 should be >= n_clusters=3"):
        make().fit(blobs[:2])
    with pytest.raises(ValueError, match=r"Negative values in data passed .* first is -1 in row 7"):
        make().fit(blobs, sample_weight=np.where(np.arange(301) == 7, -1, 1))
    with pytest.raises(ValueError, match="zero for all samples"):
        make().fit(blobs, sample_weight=np.zeros(301))
    with pytest.raises(ValueError, match=r"sample_weight.shape == \(3,\), expected \(301,\)"):
        make().fit(blobs, sample_weight=np.ones(3))
    with pytest.raises(TypeError, match=r"Sparse data was passed for X.*toarray\(\)"):
        make().fit(csr_array(np.eye(5)))
    with pytest.raises(ValueError, match=r"Expected 2D array"):
        make().fit(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"minimum of 1 is required"):
        make().fit(jnp.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"Complex data not supported"):
        make().fit(jnp.zeros((5, 3), jnp.complex64))
    with pytest.raises(NotFittedError):
        make().predict(blobs)
    model = make().fit(blobs)
    for x in (blobs[:, :2], jnp.asarray(blobs[:, :2])):
        with pytest.raises(ValueError, match=r"X has 2 features, but \w+ is expecting 5 features"):
            model.predict(x)
    with pytest.raises(ValueError, match=r"'mesh' parameter of \w+ must be an instance of"):
        make(mesh=8).fit(blobs)


def test_kmeans_bad_centroids(blobs):
    with pytest.raises(ValueError, match=r"\(5, 5\) does not match the number of clus"):
        KMeans(6, init=blobs[:5]).fit(blobs)
    with pytest.raises(ValueError, match=r"\(6, 2\) does not match the number of feat"):
        KMeans(6, init=blobs[:6, :2]).fit(blobs)


@slow_for(SphericalKMeans, BisectingKMeans, HierarchicalKMeans)
def test_a_second_fit_compiles_nothing(make, blobs):
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: events.append(event) if "compile" in event else None
    )
    x = np.tile(blobs[:100], (1, 2))
    make().fit(x)
    assert events
    events.clear()
    make().set_params(random_state=1).fit(x + 1)
    assert not events


def test_import_stays_light():
    program = (
        # scikit-learn imports pandas, and pandas much else, where it is installed.
        "import sys; sys.modules['pandas'] = None; import jkmeans;"
        "jkmeans.KMeans if len(sys.argv) > 1 else 0;"
        "print(sorted({'jax', 'sklearn', 'matplotlib', 'pyarrow', 'zarr', 'torch'}"
        " & set(sys.modules)))"
    )
    run = [sys.executable, "-c", program]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n"
    found = subprocess.run([*run, "x"], capture_output=True, text=True, check=True).stdout
    assert found == "['jax', 'sklearn']\n"
    with pytest.raises(AttributeError, match="module 'jkmeans' has no attribute 'Kmeans'"):
        _ = jkmeans.Kmeans
    assert set(jkmeans.__all__) <= set(dir(jkmeans))


@pytest.mark.parametrize("shape", [(8,), pytest.param((4, 1), marks=pytest.mark.slow)])
def test_rows_on_a_mesh_with_explicit_axes(blobs, shape):
    """As ``jax.make_mesh`` makes them."""
    axes = ("a", "b")[: len(shape)]
    x = blobs[:296]
    there = jax.device_put(x, NamedSharding(jax.make_mesh(shape, axes), PartitionSpec(*axes)))
    model, expected = (KMeans(4, init=x[:4]).fit(rows) for rows in (there, x))
    np.testing.assert_allclose(model.inertia_, expected.inertia_, rtol=1e-5)
    np.testing.assert_array_equal(model.predict(there), expected.predict(x))
    np.testing.assert_allclose(model.transform(there), expected.transform(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.score(there), expected.score(x), rtol=1e-5)


@pytest.mark.parametrize(
    "kind",
    tiny.all_but_slow([KMeans, BisectingKMeans, MiniBatchKMeans, SphericalKMeans], KMeans),
)
@pytest.mark.parametrize(
    ("rows", "weights", "said"),
    [
        (np.full((10, 2), np.nan), None, "NaN"),
        (np.ones((2, 2)), None, "n_samples=2"),
        (np.eye(9, 2), np.ones(3), "sample_weight"),
    ],
)
def test_a_fit_that_fails_leaves_the_model_of_the_one_before(blobs, kind, rows, weights, said):
    model = kind(4, random_state=0).fit(blobs)
    labels = model.predict(blobs)
    with pytest.raises(ValueError, match=said):
        model.fit(rows, sample_weight=weights)
    assert model.n_features_in_ == blobs.shape[1]
    np.testing.assert_array_equal(model.predict(blobs), labels)
    unfitted = kind(4)
    with pytest.raises(ValueError, match=said):
        unfitted.fit(rows, sample_weight=weights)
    assert not hasattr(unfitted, "n_features_in_")


@pytest.mark.parametrize(
    "kind",
    [
        KMeans,
        MiniBatchKMeans,
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (BisectingKMeans, SphericalKMeans)
        ),
    ],
)
def test_more_iterations_than_int32_counts(blobs, kind):
    model, expected = (kind(3, random_state=0, max_iter=n).fit(blobs) for n in (10**10, 1000))
    np.testing.assert_array_equal(model.labels_, expected.labels_)


def test_a_mask_is_refused(blobs, tmp_path):
    masked = np.ma.masked_array(blobs, mask=blobs > 5)
    with pytest.raises(ValueError, match="X is a masked array; accepted: an array without a mask"):
        KMeans(3).fit(masked)
    with pytest.raises(ValueError, match="sample_weight is a masked array; accepted"):
        KMeans(3).fit(blobs, sample_weight=masked[:, 0])
    np.save(tmp_path / "x.npy", blobs)
    with pytest.raises(ValueError, match="weights is a masked array; accepted"):
        KMeans(3).fit(tmp_path / "x.npy", sample_weight=masked[:, 0])
    with pytest.raises(ValueError, match="X is a masked array; accepted"):
        KMeans(3).fit(blobs).predict(masked)


@pytest.mark.parametrize("weighted", [False, True])
def test_minibatch_has_an_inertia_after_one_step_without_labels(blobs, weighted):
    weights = np.linspace(1, 2, len(blobs)) if weighted else None
    plain, other = (
        MiniBatchKMeans(3, random_state=0, max_iter=1, compute_labels=labels).fit(
            blobs, sample_weight=weights
        )
        for labels in (True, False)
    )
    assert other.n_steps_ == 1
    np.testing.assert_allclose(other.inertia_, plain.inertia_, rtol=1e-6)
