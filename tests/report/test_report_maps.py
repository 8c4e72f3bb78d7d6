import numpy as np
import pytest
from matplotlib.figure import Figure

from jkmeans.report import maps
from jkmeans.report.maps import MAP_EXAMPLES, map_embeddings, map_figure, principal_plane
from tests.reports import clusters_of, run, texts


def test_map_shows_a_sample_and_the_centroids_of_clusters_in_use():
    arguments = run(n=MAP_EXAMPLES + 500, k=4, p=2)
    arguments["labels"] = arguments["labels"] % 3  # cluster 3 is empty
    clusters = clusters_of(arguments)
    drawn = map_embeddings(clusters, seed=0)
    assert len(drawn.rows) == MAP_EXAMPLES
    assert np.array_equal(drawn.rows, np.unique(drawn.rows))
    assert np.allclose(drawn.points, arguments["embeddings"][drawn.rows])
    assert np.allclose(drawn.centroids, arguments["centroids"][:3])
    assert np.array_equal(drawn.rows, map_embeddings(clusters, seed=0).rows)
    assert not np.array_equal(drawn.rows, map_embeddings(clusters, seed=1).rows)


def test_without_a_finite_centroid_the_map_shows_the_embeddings():
    arguments = run(n=40, k=4)
    arguments["centroids"][:] = np.nan
    drawn = map_embeddings(clusters_of(arguments), seed=0)
    assert drawn.points.shape == (40, 2)
    assert drawn.centroids.shape == (0, 2)


def test_map_separates_separate_clusters():
    from sklearn.neighbors import KNeighborsClassifier

    arguments = run(n=120, k=4, p=6)
    arguments["embeddings"][0] = np.nan
    clusters = clusters_of(arguments)
    drawn = map_embeddings(clusters, seed=0)
    assert drawn.method.startswith("t-SNE")
    assert drawn.rows.tolist() == list(range(1, 120))
    knn = KNeighborsClassifier(5).fit(drawn.points, clusters.labels[drawn.rows])
    assert knn.score(drawn.points, clusters.labels[drawn.rows]) == 1.0
    # Each centroid lies among its own cluster.
    assert knn.predict(drawn.centroids).tolist() == [0, 1, 2, 3]


def test_principal_plane_equals_scikit_learn():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(30, 5)) * [9, 5, 1, 1, 1]
    ours, theirs = principal_plane(x, x), PCA(2).fit_transform(x)
    # Each axis up to its sign; ours is scaled as a whole.
    ratio = ours / theirs
    assert np.allclose(np.abs(ratio), np.abs(ratio[0, 0]))
    # Points that did not choose the plane lie where scikit-learn puts them.
    others = x[:4] + 3
    assert np.allclose(principal_plane(x, others), PCA(2).fit(x).transform(others) * ratio[0])


def test_labels_in_one_place_are_moved_apart():
    ax = Figure(figsize=(4, 4)).subplots()
    ax.plot([0, 1], [0, 1])
    places = np.array([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    offsets = maps._label_offsets(ax, places, ["Coat", "Pullover", "Bag"], 10, np.zeros((0, 2)))
    assert offsets[0] - offsets[1] > 10
    assert offsets[2] == 0


def test_the_title_counts_what_is_on_the_map():
    arguments = run(n=40)
    arguments["embeddings"][:3] = np.nan
    clusters = clusters_of(arguments)
    drawn = texts(map_figure(clusters, map_embeddings(clusters, 0), ""))
    assert any("37 of 40 embeddings" in text for text in drawn), drawn


@pytest.mark.parametrize(
    ("heights", "marks"),
    [([0.5, 0.9], [0.52]), ([0.50, 0.56], [0.5]), ([0.5], [0.50, 0.54, 0.58, 0.62]), ([0.5], [])],
)
def test_labels_cover_neither_each_other_nor_the_marks_of_centroids(heights, marks):
    ax = Figure(figsize=(4, 4), dpi=72).subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    places = np.column_stack([np.full(len(heights), 0.5), heights])
    fixed = np.column_stack([np.full(len(marks), 0.5), marks])
    offsets = maps._label_offsets(ax, places, ["8"] * len(heights), 10, fixed)
    labels = ax.transData.transform(places)[:, 1] + offsets  # A pixel is a point.
    crosses = ax.transData.transform(fixed)[:, 1] if len(marks) else np.zeros(0)
    assert np.abs(labels[:, None] - crosses).min(initial=99) > 9
    assert np.abs(np.diff(labels)).min(initial=99) > 11
    assert np.abs(offsets).max() < 40
