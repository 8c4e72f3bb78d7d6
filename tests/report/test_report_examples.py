import numpy as np

from jkmeans.report import examples
from jkmeans.report.examples import NEAREST, nearest_figure
from tests.reports import clusters_of, run, texts


def test_mosaic_puts_each_example_in_its_place():
    arguments = run(n=6, k=3, shape=(2, 3), dtype=np.uint8)
    # Example i is all 40 i; cluster 1 is empty. Grey values are stretched from 40…160 to 0…1.
    arguments["examples"][:] = 40 * np.arange(6).reshape(6, 1, 1)
    arguments["labels"] = np.array([0, 0, 0, 2, 2, 2])
    arguments["distances"] = np.array([3.0, 2.0, 1.0, 1.0, 2.0, 3.0])
    mosaic = examples._mosaic(clusters_of(arguments), np.array([0, 1, 2]), 2)
    height, width = mosaic.shape[0] / 3, mosaic.shape[1] / 2
    centres = mosaic[[int(height * (row + 0.5)) for row in range(3)],][
        :, [int(width * (column + 0.5)) for column in range(2)]
    ]
    assert np.allclose(centres[0, :, 0], [1 / 3, 0])
    assert np.allclose(centres[1], 1.0)  # white
    assert np.allclose(centres[2, :, 0], [2 / 3, 1])


def test_mosaic_blends_transparent_images_with_white():
    arguments = run(n=1, k=1, shape=(2, 2, 4), dtype=np.uint8)
    arguments["examples"][:] = [255, 0, 0, 51]
    mosaic = examples._mosaic(clusters_of(arguments), np.array([0]), 1)
    assert np.allclose(mosaic, [1.0, 0.8, 0.8])


def test_largest_clusters_are_shown():
    arguments = run(n=300, k=24)
    arguments["labels"] = np.repeat(np.arange(24), np.arange(24) + 1)[:300].astype(int)
    clusters = clusters_of(arguments)
    assert clusters.shown(20).tolist() == list(range(23, 3, -1))
    assert clusters.shown(24).tolist() == list(range(24))
    assert any("largest 20 of 24" in text for text in texts(nearest_figure(clusters, "")))


def test_wide_vectors_show_the_features_that_differ():
    arguments = run(n=40, k=2, shape=(300,))
    arguments["examples"][:] = 1.0
    different = np.arange(7, 300, 6)[:45]
    arguments["examples"][np.ix_(arguments["labels"] == 1, different)] = 5.0
    clusters = clusters_of(arguments)
    means = np.stack([examples._mean(clusters.examples, clusters.members(i)) for i in range(2)])
    assert np.array_equal(means[1][different], np.full(45, 5.0))
    features = examples._features(means)
    assert len(features) == 50
    assert set(different) <= set(features.tolist())
    assert any("50 of 300 features" in text for text in texts(nearest_figure(clusters, "")))


def test_an_empty_cluster_of_vectors_has_a_panel_without_lines():
    arguments = run(n=40, k=4, shape=(7,))
    arguments["labels"] = arguments["labels"] % 3  # cluster 3 is empty
    figure = nearest_figure(clusters_of(arguments), "")
    assert [len(ax.lines) for ax in figure.axes[:4]] == [NEAREST + 1] * 3 + [0]
    assert "cluster 3: empty" in texts(figure)
