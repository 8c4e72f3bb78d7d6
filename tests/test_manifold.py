"""N2D's stage after the autoencoder: clusters on the manifold, and their rule for new data."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from jkmeans.configuration import validate
from jkmeans.errors import UserError
from jkmeans.methods import layouts, with_method
from jkmeans.methods.manifold import manifold_clusters, nearest_labels
from jkmeans.metrics import adjusted_rand_index
from tests import tiny

needs_umap = pytest.mark.skipif(
    importlib.util.find_spec("umap") is None,
    reason='umap-learn is not installed: pip install "jkmeans[manifold]"',
)


LAYOUTS_HERE = [pytest.param("umap", marks=needs_umap), "t-sne", "spectral"]


def blobs(n_each=60, dimension=5):
    """Three far groups [3 n, p] in shuffled order, and which row is of which."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(3), n_each))
    means = 20.0 * np.eye(3, dimension)
    return (means[truth] + rng.standard_normal((len(truth), dimension))).astype(np.float32), truth


def rings(n_each=250):
    """Two concentric circles in four dimensions, which no two means can tell apart."""
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(2), n_each)
    angle = rng.uniform(0, 2 * np.pi, 2 * n_each)
    radius = 1.0 + 2.0 * truth
    plane = radius * np.stack([np.cos(angle), np.sin(angle)])
    noise = 0.05 * rng.standard_normal((2 * n_each, 4))
    return (np.concatenate([plane, np.zeros_like(plane)]).T + noise).astype(np.float32), truth


@needs_umap
def test_groups_are_found_in_the_dimension_asked_for():
    x, truth = blobs()
    labels, layout = manifold_clusters(x, 3, seed=0)
    assert labels.shape == (180,)
    assert labels.dtype == np.int32
    assert layout.shape == (180, 3)
    assert layout.dtype == np.float32
    assert adjusted_rand_index(truth, labels) == 1.0
    labels, layout = manifold_clusters(x, 3, seed=0, n_components=2, n_neighbors=10, min_dist=0.1)
    assert layout.shape == (180, 2)
    assert adjusted_rand_index(truth, labels) == 1.0


@needs_umap
def test_the_manifold_separates_what_kmeans_cannot():
    from sklearn.cluster import KMeans

    x, truth = rings()
    labels, _ = manifold_clusters(x, 2, seed=0, n_neighbors=15)
    assert adjusted_rand_index(truth, labels) == 1.0
    assert adjusted_rand_index(truth, KMeans(2, n_init=5, random_state=0).fit_predict(x)) < 0.1


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_the_seed_decides_every_bit(layout):
    x, _ = rings(100)
    first = manifold_clusters(x, 4, seed=3, layout=layout)
    again = manifold_clusters(x, 4, seed=3, layout=layout)
    other = manifold_clusters(x, 4, seed=4, layout=layout)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    # t-SNE starts from principal components, and eigenvectors of so few rows from nothing.
    assert np.array_equal(first[1], other[1]) == (layout != "umap")


@pytest.mark.parametrize("dense_rows", [0, 1000])
def test_the_spectral_layout_separates_what_kmeans_cannot(monkeypatch, dense_rows):
    monkeypatch.setattr(layouts, "_DENSE_ROWS", dense_rows)
    x, truth = rings()
    options = {"layout": "spectral", "clusterer": "k-means", "n_neighbors": 10, "starts": 5}
    labels, places = manifold_clusters(x, 2, seed=0, **options)
    assert adjusted_rand_index(truth, labels) == 1.0
    assert places.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), 1, rtol=1e-5)
    again = manifold_clusters(x, 2, seed=0, **options)[1]
    np.testing.assert_array_equal(again, places)


def test_the_spectral_layout_is_of_the_leading_eigenvectors(monkeypatch):
    x = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    monkeypatch.setattr(layouts, "_DENSE_ROWS", 0)
    places = layouts.spectral(x, 8, 4, seed=1)
    # By hand: neighbours by all distances, the matrix in full.
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)
    ties = np.zeros((300, 300))
    np.put_along_axis(ties, np.argsort(distances, axis=1)[:, 1:8], 1, axis=1)
    ties += ties.T
    scale = 1 / np.sqrt(ties.sum(axis=1))
    _, vectors = np.linalg.eigh(scale[:, None] * ties * scale)
    expected = vectors[:, -4:] / np.linalg.norm(vectors[:, -4:], axis=1, keepdims=True)
    # Eigenvectors have no sign: compare the angles between the places.
    np.testing.assert_allclose(places @ places.T, expected @ expected.T, atol=1e-3)


@pytest.mark.parametrize("dense_rows", [0, 1000])
@pytest.mark.parametrize(("n_groups", "n_components"), [(4, 4), (5, 5), (6, 6), (7, 4)])
def test_the_spectral_layout_has_a_dimension_for_each_group(
    monkeypatch, dense_rows, n_groups, n_components
):
    # Of 4 to 6 for four clusters; of seven groups none of these is told by a gap.
    monkeypatch.setattr(layouts, "_DENSE_ROWS", dense_rows)
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(n_groups), 50)
    x = (9 * np.eye(7)[truth] + rng.standard_normal((len(truth), 7))).astype(np.float32)
    labels, places = manifold_clusters(
        x, 4, seed=0, layout="spectral", clusterer="k-means", n_neighbors=10, starts=5
    )
    if n_groups < 7:
        assert places.shape[1] == n_components
    assert 4 <= places.shape[1] <= 6
    assert np.unique(labels).size == 4
    assert layouts.spectral(x, 10, 2, seed=0).shape[1] == 2


def test_the_consensus_is_of_clusterings_of_several_dimensions():
    x, truth = blobs()
    options = {"layout": "consensus", "clusterer": "k-means", "n_neighbors": 10, "starts": 5}
    labels, places = manifold_clusters(x, 3, seed=0, **options)
    assert adjusted_rand_index(truth, labels) == 1.0
    assert places.shape == (180, 3 * 4)  # Clusterings of 3, 4, 5 and 6 dimensions.
    np.testing.assert_array_equal(places.reshape(180, 4, 3).sum(axis=2), 1)
    for a, b in zip(manifold_clusters(x, 3, seed=0, **options), (labels, places), strict=True):
        np.testing.assert_array_equal(a, b)
    # The first clustering is that of the spectral layout of so many dimensions.
    alone = layouts.kmeans_labels(layouts.spectral(x, 10, 3, seed=0), 3, 0, 20)
    np.testing.assert_array_equal(places[:, :3], np.eye(3)[alone])
    _, one = manifold_clusters(x, 3, seed=0, n_components=3, **options)
    np.testing.assert_array_equal(one, places[:, :3])


def test_the_consensus_of_as_few_rows_as_there_can_be():
    options = {"layout": "consensus", "clusterer": "k-means", "n_neighbors": 2}
    for k in (1, 3):
        labels, _ = manifold_clusters(np.eye(3), k, seed=0, **options)
        assert labels.shape == (3,)


@needs_umap
def test_input_is_left_alone_and_its_type_does_not_matter():
    x, _ = blobs(20)
    x = np.round(x)
    before = x.copy()
    labels, layout = manifold_clusters(x, 3, seed=0)
    np.testing.assert_array_equal(x, before)
    for same in (x.astype(np.float64), x.astype(np.int16), x.tolist()):
        labels_of_same, layout_of_same = manifold_clusters(same, 3, seed=0)
        np.testing.assert_array_equal(labels_of_same, labels)
        np.testing.assert_array_equal(layout_of_same, layout)


@needs_umap
@pytest.mark.parametrize(
    "metric",
    [
        "cosine",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("manhattan", "correlation", "chebyshev")
        ),
    ],
)
def test_other_distances(metric):
    x, truth = blobs(30)
    labels, _ = manifold_clusters(x, 3, seed=0, metric=metric)
    assert adjusted_rand_index(truth, labels) == 1.0


def test_t_sne_has_two_dimensions_and_the_distance_that_is_asked_for():
    x, truth = blobs(30)
    labels, layout = manifold_clusters(x, 3, seed=0, layout="t-sne", metric="cosine")
    assert layout.shape == (90, 2)
    assert layout.dtype == np.float32
    assert adjusted_rand_index(truth, labels) == 1.0
    _, euclidean = manifold_clusters(x, 3, seed=0, layout="t-sne")
    assert not np.array_equal(layout, euclidean)


def test_kmeans_of_the_layout_is_that_of_scikit_learn():
    from sklearn.cluster import KMeans

    x, _ = rings(60)
    options = {"layout": "t-sne", "clusterer": "k-means", "starts": 5}
    labels, layout = manifold_clusters(x, 4, seed=0, **options)
    assert labels.dtype == np.int32
    other = KMeans(4, n_init=5, random_state=0).fit(layout)
    ours = sum(np.sum((m := layout[labels == k]).var(axis=0) * len(m)) for k in range(4))
    np.testing.assert_allclose(ours, other.inertia_, rtol=0.02)
    again, _ = manifold_clusters(x, 4, seed=0, **options)
    np.testing.assert_array_equal(labels, again)


@pytest.mark.slow
def test_more_starts_never_make_the_mixture_less_likely():
    from sklearn.mixture import GaussianMixture

    x, _ = rings(60)
    gains = []
    for seed in range(3):
        one, layout = manifold_clusters(x, 8, seed=seed, layout="t-sne")
        best, _ = manifold_clusters(x, 8, seed=seed, layout="t-sne", starts=8)
        places = layout.astype(np.float64)
        bounds = []
        for labels, starts in ((one, 1), (best, 8)):
            mixture = GaussianMixture(8, n_init=starts, random_state=seed).fit(places)
            np.testing.assert_array_equal(labels, mixture.predict(places))
            bounds.append(mixture.lower_bound_)
        gains.append(bounds[1] - bounds[0])
    assert min(gains) >= 0
    assert max(gains) > 0


@pytest.mark.slow
@needs_umap
def test_cosine_sees_directions_only():
    x, _ = blobs(30)
    lengths = np.exp2(np.random.default_rng(5).integers(-3, 4, (len(x), 1))).astype(np.float32)
    labels, _ = manifold_clusters(x, 3, seed=0, metric="cosine")
    of_scaled, _ = manifold_clusters(x * lengths, 3, seed=0, metric="cosine")
    assert adjusted_rand_index(labels, of_scaled) == 1.0


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_as_few_rows_as_there_can_be(layout):
    options = {"layout": layout, "n_neighbors": 2, "n_components": 1}
    labels, layout = manifold_clusters(np.eye(3), 1, seed=0, **options)
    assert layout.shape == (3, 1)
    np.testing.assert_array_equal(labels, 0)


@pytest.mark.slow
@needs_umap
def test_equal_rows_are_no_obstacle():
    x, truth = blobs(30)
    labels, layout = manifold_clusters(np.repeat(x, 2, axis=0), 3, seed=0)
    assert np.isfinite(layout).all()
    assert adjusted_rand_index(np.repeat(truth, 2), labels) == 1.0


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"embeddings": np.zeros(5)}, "embeddings is float64 of shape [5]; accepted: numbers of"),
        ({"embeddings": np.zeros((2, 3))}, "embeddings is float64 of shape [2, 3]; accepted:"),
        ({"embeddings": np.zeros((9, 0))}, "embeddings is float64 of shape [9, 0]; accepted:"),
        ({"embeddings": [[1.0], [1.0, 2.0], [3.0]]}, "embeddings is float64 of shape [0]"),
        ({"embeddings": np.full((9, 2), "a")}, "embeddings is <U1 of shape [9, 2]; accepted:"),
        ({"embeddings": np.array([[0.0], [np.nan], [1.0]])}, "embeddings has a number in row 1"),
        ({"embeddings": np.array([[0.0], [1.0], [1e39]])}, "embeddings has a number in row 2"),
        ({"n_clusters": 0}, "n_clusters is 0; accepted: an integer from 1 to 30"),
        ({"n_clusters": 31}, "n_clusters is 31; accepted: an integer from 1 to 30"),
        ({"n_clusters": 2.0}, "n_clusters is 2.0; accepted: an integer"),
        ({"n_neighbors": 1}, "n_neighbors is 1; accepted: an integer from 2 to 29"),
        ({"n_neighbors": 30}, "n_neighbors is 30; accepted: an integer from 2 to 29"),
        ({"n_components": 0}, "n_components is 0; accepted: an integer from 1 to 28"),
        ({"n_components": 29}, "n_components is 29; accepted: an integer from 1 to 28"),
        ({"n_clusters": 29}, "n_components is 29; accepted: an integer from 1 to 28"),
        ({"seed": -1}, "seed is -1; accepted: an integer from 0 to 4294967295"),
        ({"min_dist": 1.5}, "min_dist is 1.5; accepted: a number from 0 to 1"),
        ({"min_dist": "0"}, "min_dist is '0'; accepted: a number from 0 to 1"),
        ({"min_dist": float("nan")}, "min_dist is nan; accepted: a number from 0 to 1"),
        ({"layout": "tsne"}, "layout is 'tsne'; accepted: umap, t-sne"),
        ({"layout": "t-sne", "n_components": 4}, "n_components is 4; accepted: an integer from 1"),
        ({"clusterer": "kmeans"}, "clusterer is 'kmeans'; accepted: mixture, k-means"),
        ({"layout": "consensus"}, "accepted with layout 'consensus': 'k-means'"),
        (
            {"layout": "consensus", "clusterer": "k-means", "n_components": 2},
            "n_components is 2; accepted: an integer from 3 to 28",
        ),
        ({"starts": 0}, "starts is 0; accepted: an integer from 1"),
        ({"metric": "euclid"}, "metric is 'euclid'; accepted: euclidean, cosine"),
    ],
)
def test_what_cannot_be_used_is_a_sentence(changed, sentence):
    arguments = {"embeddings": blobs(10)[0], "n_clusters": 3, "seed": 0} | changed
    with pytest.raises(UserError) as caught:
        manifold_clusters(**arguments)
    assert sentence in str(caught.value)


def test_missing_umap_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r'pip install "jkmeans\[manifold\]"'):
        manifold_clusters(blobs(10)[0], 3, seed=0)


def test_umap_is_not_imported_with_the_module():
    program = (
        "import sys, jkmeans.methods.manifold; assert not {'umap', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_embeddings_in_one_place_have_a_layout():
    ones = np.ones((60, 4), np.float32)
    labels, layout = manifold_clusters(ones, 3, seed=0, layout="t-sne", clusterer="k-means")
    assert np.isfinite(layout).all()
    assert set(labels) <= {0, 1, 2}


@pytest.mark.parametrize("p", [2, 40])
def test_new_rows_get_the_cluster_of_the_nearest(p):
    rng = np.random.default_rng(2)
    bank = rng.standard_normal((300, p)).astype(np.float32)
    labels = rng.integers(0, 7, 300)
    queries = rng.standard_normal((50, p)).astype(np.float32)
    distances = np.linalg.norm(queries[:, None].astype(float) - bank[None], axis=-1)
    expected = labels[np.argmin(distances, axis=1)]
    got = nearest_labels(bank, labels, queries)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(nearest_labels(bank, labels, bank), labels)


def test_neighbours_vote_and_the_nearest_decides_between_equals():
    bank = np.array([[0.0], [1.0], [3.0], [6.0], [10.0]])
    labels = np.array([5, 2, 2, 7, 7])
    query = [[-1.0]]  # Its neighbours lie in the order of the bank.
    found = [int(nearest_labels(bank, labels, query, n_neighbors=k)[0]) for k in range(1, 6)]
    assert found == [5, 5, 2, 2, 2]
    # From the other end: 7, 7, then 7 against 2, then two of each.
    found = [int(nearest_labels(bank, labels, [[11.0]], n_neighbors=k)[0]) for k in range(1, 6)]
    assert found == [7, 7, 7, 7, 7]


def test_no_new_rows_have_no_clusters():
    got = nearest_labels(np.eye(3), np.arange(3), np.zeros((0, 3)))
    assert got.shape == (0,)
    assert got.dtype == np.int32


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"bank": np.zeros((0, 2))}, "bank is float64 of shape [0, 2]; accepted: numbers"),
        ({"bank_labels": np.zeros(4, int)}, "bank_labels is int64 of shape [4]; accepted:"),
        ({"bank_labels": np.zeros(3)}, "bank_labels is float64 of shape [3]; accepted:"),
        ({"queries": np.zeros((1, 3))}, "queries have 3 numbers each, but the bank's"),
        ({"queries": np.full((1, 2), np.inf)}, "queries has a number in row 0 that is not finite"),
        ({"n_neighbors": 0}, "n_neighbors is 0; accepted: an integer from 1 to 3"),
        ({"n_neighbors": 4}, "n_neighbors is 4; accepted: an integer from 1 to 3"),
    ],
)
def test_what_nearest_labels_cannot_use_is_a_sentence(changed, sentence):
    arguments = {
        "bank": np.arange(6.0).reshape(3, 2),
        "bank_labels": np.arange(3),
        "queries": np.zeros((1, 2)),
    }
    with pytest.raises(UserError) as caught:
        nearest_labels(**(arguments | changed))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective__layout": "consensus"}, "clusterer is 'mixture', but layout 'consensus'"),
        (
            {"objective__layout": "t-sne", "objective__n_components": 4},
            "n_components is 4, but a layout of t-sne has 1 to 3 dimensions",
        ),
    ],
)
def test_a_config_that_no_layout_fits(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        validate(with_method(tiny.config(), "n2d", **changes))
    fits = {"objective__layout": "consensus", "objective__clusterer": "k-means"}
    assert validate(with_method(tiny.config(), "n2d", **fits)).objective.layout == "consensus"
