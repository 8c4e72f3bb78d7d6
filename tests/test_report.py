import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from jkmeans import drawing, report
from jkmeans.report import MAP_EXAMPLES, PICTURES, write_report
from tests import tiny


def history(truth=True):
    records = []
    for epoch in range(1, 13):
        phase = "pretrain" if epoch <= 4 else "cluster"
        record = {"epoch": epoch, "phase": phase, "time": "", "seconds": 1.0}
        record["loss/reconstruction"] = record["loss"] = 1.0 / epoch
        if phase == "cluster":
            record["loss/centroid"] = 0.1 / epoch
            record |= {"label_change": 0.5 / epoch, "inertia": 100.0 - epoch, "empty_clusters": 0}
        if truth:
            record |= {"acc": 0.5 + epoch / 30, "nmi": 0.4 + epoch / 30, "ari": None}
        records.append(record)
    return records


def run(n=120, k=4, p=5, shape=(8, 8), n_classes=4, seed=0, dtype=np.float32):
    """The arguments of a report on n examples in k separate groups."""
    rng = np.random.default_rng(seed)
    centroids = 10 * rng.normal(size=(k, p))
    labels = np.arange(n) % k
    embeddings = (centroids[labels] + rng.normal(size=(n, p))).astype(np.float32)
    return {
        "metrics": history(),
        "embeddings": embeddings,
        "labels": labels.astype(np.int32),
        "distances": np.linalg.norm(embeddings - centroids[labels], axis=1),
        "centroids": centroids,
        "examples": (255 * rng.random((n, *shape))).astype(dtype),
        "truth": labels % n_classes,
    }


def clusters_of(arguments, class_names=None):
    names = ("embeddings", "labels", "distances", "centroids", "examples", "truth")
    return report.ClusteredExamples.of(*(arguments[name] for name in names), class_names)


def check_pictures(paths, folder, names):
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        pixels = imread(path)[..., :3]
        height, width = pixels.shape[:2]
        assert 300 <= height <= 3500
        assert 500 <= width <= 3500
        assert pixels.std() > 0.02, f"{path.name} is blank"


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


# --- whole reports ---------------------------------------------------------------------------


def test_all_pictures(tmp_path):
    arguments = run()
    class_names = ["T-shirt", r"$\bag$", "boot", "coat"]
    paths = write_report(tmp_path / "report", **arguments, class_names=class_names, title="t")
    check_pictures(paths, tmp_path / "report", PICTURES)
    # The summary is wide, for the top of a page.
    height, width = imread(paths[-1]).shape[:2]
    assert width > 2 * height


def test_vectors_without_truth(tmp_path):
    arguments = run(shape=(6,)) | {"truth": None, "metrics": history(truth=False)}
    paths = write_report(tmp_path, **arguments)
    check_pictures(paths, tmp_path, ["curves", "map", "nearest", "sizes", "summary"])


@pytest.mark.slow
def test_500_clusters_of_colour_images(tmp_path):
    arguments = run(n=1000, k=500, p=2, shape=(4, 5, 3), dtype=np.uint8)
    paths = write_report(tmp_path, **arguments)
    check_pictures(paths, tmp_path, PICTURES)


def constant():
    arguments = run(n=60, shape=(3,))
    arguments["embeddings"][:] = 1.0
    arguments["examples"][:] = 0.0
    arguments["centroids"][:] = 1.0
    arguments["distances"][:] = 0.0
    return arguments | {"metrics": [{"epoch": 1, "phase": "cluster", "loss": 0.0}]}


def not_finite():
    arguments = run(n=60, p=1)
    arguments["embeddings"][:] = np.nan
    arguments["distances"][:] = np.nan
    arguments["examples"][0] = np.nan
    return arguments | {"metrics": [{"epoch": 1, "phase": "pretrain", "loss": None}]}


def empties():
    arguments = run(n=60, k=7, n_classes=2)
    arguments["labels"] = np.where(arguments["labels"] < 3, 1, 5)
    arguments["centroids"][0] = np.nan
    return arguments | {"metrics": []}


DEGENERATE = {
    "one cluster": lambda: run(n=40, k=1, n_classes=1, shape=(300,)),
    "one example": lambda: run(n=1, k=1, p=3),
    "fewer examples than clusters": lambda: run(n=5, k=8, p=3, shape=(200, 150, 4)),
    "constant": constant,
    "not finite": not_finite,
    "empty clusters": empties,
    "one dimension, scalars": lambda: run(p=1, shape=()),
    "neither image nor vector": lambda: (
        run(n=50, p=2, shape=(2, 3, 2)) | {"metrics": history()[:3]}
    ),
}


IN_PICTURES = {"one example", "not finite", "empty clusters", "one dimension, scalars"}
"""In the default run; the others are there in tests/test_page.py."""


@pytest.mark.parametrize("name", tiny.all_but_slow(DEGENERATE, *IN_PICTURES))
def test_degenerate_runs(tmp_path, name):
    arguments = DEGENERATE[name]()
    paths = write_report(tmp_path, **arguments)
    expected = [n for n in PICTURES if n != "curves" or arguments["metrics"]]
    assert [path.stem for path in paths] == expected
    for path in paths:
        assert min(imread(path).shape[:2]) >= 300


def test_report_reads_only_the_examples_it_shows(tmp_path):
    arguments = run(n=400, k=4, p=2)

    class Counted:
        """A large file: rows are read one at a time."""

        shape, dtype = arguments["examples"].shape, arguments["examples"].dtype
        read = 0

        def __len__(self):
            return self.shape[0]

        def __getitem__(self, row):
            assert np.ndim(row) == 0
            Counted.read += 1
            return arguments["examples"][row]

    write_report(tmp_path, **arguments | {"examples": Counted()})
    assert 0 < Counted.read <= 2 * 4 * report.NEAREST  # in nearest.png and in summary.png


def test_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    old = tmp_path / "curves.png"
    old.write_bytes(b"old")

    def fail(self, file, **kwargs):
        file.write_bytes(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, **run(n=20, p=2))
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old"


def test_picture_that_no_longer_applies_is_removed(tmp_path):
    for name in ("confusion.png", "curves.png", "notes.png"):
        (tmp_path / name).write_bytes(b"old")
    write_report(tmp_path, **run(n=20, p=2) | {"truth": None, "metrics": []})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"map.png", "nearest.png", "sizes.png", "summary.png", "notes.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": np.zeros(3)}, "distances has 3 rows, but there are 120 labels"),
        ({"labels": np.full(120, 4)}, "integers from 0 to 3"),
        ({"labels": np.full(120, -1)}, "integers from 0 to 3"),
        ({"labels": np.zeros(120)}, "integers from 0 to 3"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report", **run() | change)
    assert not (tmp_path / "report").exists()


def test_no_global_state(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from jkmeans.report import write_report\n"
        "x = np.arange(8.0).reshape(4, 2)\n"
        f"write_report({str(tmp_path)!r}, metrics=[], embeddings=x, labels=np.array([0, 0, 1, 1]),"
        " distances=np.zeros(4), centroids=x[::2], examples=x)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


# --- what the pictures show ------------------------------------------------------------------


def test_nearest_are_in_order_of_distance():
    arguments = run(n=6, k=2, shape=(2, 2))
    arguments["labels"] = np.array([0, 0, 0, 0, 1, 1])
    arguments["distances"] = np.array([3.0, 1.0, np.nan, 2.0, 5.0, 4.0])
    clusters = clusters_of(arguments)
    assert clusters.members(0).tolist() == [1, 3, 0, 2]
    assert clusters.members(1).tolist() == [5, 4]


def test_mosaic_puts_each_example_in_its_place():
    arguments = run(n=6, k=3, shape=(2, 3), dtype=np.uint8)
    # Example i is all 40 i; cluster 1 is empty. Grey values are stretched from 40…160 to 0…1.
    arguments["examples"][:] = 40 * np.arange(6).reshape(6, 1, 1)
    arguments["labels"] = np.array([0, 0, 0, 2, 2, 2])
    arguments["distances"] = np.array([3.0, 2.0, 1.0, 1.0, 2.0, 3.0])
    mosaic = report._mosaic(clusters_of(arguments), np.array([0, 1, 2]), 2)
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
    mosaic = report._mosaic(clusters_of(arguments), np.array([0]), 1)
    assert np.allclose(mosaic, [1.0, 0.8, 0.8])


def test_largest_clusters_are_shown():
    arguments = run(n=300, k=24)
    arguments["labels"] = np.repeat(np.arange(24), np.arange(24) + 1)[:300].astype(int)
    clusters = clusters_of(arguments)
    assert clusters.shown(20).tolist() == list(range(23, 3, -1))
    assert clusters.shown(24).tolist() == list(range(24))
    assert any("largest 20 of 24" in text for text in texts(report._nearest(clusters, "")))


def test_rows_say_size_and_class():
    arguments = run(n=8, k=3)
    arguments["labels"] = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    arguments["truth"] = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    clusters = clusters_of(arguments, ["bag", "boot"])
    assert [clusters.describe(i) for i in range(3)] == ["4 · 75% boot", "4 · 100% bag", "empty"]
    assert clusters_of(arguments).describe(0) == "4 · 75% class 1"
    assert clusters_of(arguments | {"truth": None}).describe(0) == "4 examples"


def test_matched_clusters_have_the_colours_of_their_classes():
    arguments = run(n=120, k=4)
    new_number = np.array([2, 0, 3, 1])
    arguments["labels"] = new_number[arguments["truth"]]
    clusters = clusters_of(arguments)
    assert np.array_equal(clusters.colours[new_number], clusters.class_colours[:4])


@pytest.mark.parametrize("n", [1, 10, 11, 20, 500])
def test_palette_has_distinct_colours(n):
    colours = drawing.palette(n)
    assert colours.shape == (n, 3)
    assert len(np.unique(colours.round(6), axis=0)) == n


def test_map_shows_a_sample_and_the_centroids_of_clusters_in_use():
    arguments = run(n=MAP_EXAMPLES + 500, k=4, p=2)
    arguments["labels"] = arguments["labels"] % 3  # cluster 3 is empty
    clusters = clusters_of(arguments)
    drawn = report.map_embeddings(clusters, seed=0)
    assert len(drawn.rows) == MAP_EXAMPLES
    assert np.array_equal(drawn.rows, np.unique(drawn.rows))
    assert np.allclose(drawn.points, arguments["embeddings"][drawn.rows])
    assert np.allclose(drawn.centroids, arguments["centroids"][:3])
    assert np.array_equal(drawn.rows, report.map_embeddings(clusters, seed=0).rows)
    assert not np.array_equal(drawn.rows, report.map_embeddings(clusters, seed=1).rows)


def test_map_separates_separate_clusters():
    from sklearn.neighbors import KNeighborsClassifier

    arguments = run(n=120, k=4, p=6)
    arguments["embeddings"][0] = np.nan
    clusters = clusters_of(arguments)
    drawn = report.map_embeddings(clusters, seed=0)
    assert drawn.method.startswith("t-SNE")
    assert drawn.rows.tolist() == list(range(1, 120))
    knn = KNeighborsClassifier(5).fit(drawn.points, clusters.labels[drawn.rows])
    assert knn.score(drawn.points, clusters.labels[drawn.rows]) == 1.0
    # Each centroid lies among its own cluster.
    assert knn.predict(drawn.centroids).tolist() == [0, 1, 2, 3]


def test_principal_plane_equals_scikit_learn():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(30, 5)) * [9, 5, 1, 1, 1]
    ours, theirs = report._principal_plane(x), PCA(2).fit_transform(x)
    # Each axis up to its sign; ours is scaled as a whole.
    ratio = ours / theirs
    assert np.allclose(np.abs(ratio), np.abs(ratio[0, 0]))


def test_labels_in_one_place_are_moved_apart():
    ax = Figure(figsize=(4, 4)).subplots()
    ax.plot([0, 1], [0, 1])
    places = np.array([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    offsets = report._label_offsets(ax, places, ["Coat", "Pullover", "Bag"], 10)
    assert offsets[0] - offsets[1] > 10
    assert offsets[2] == 0


def test_series_break_between_phases_and_skip_what_is_missing():
    records = [
        {"epoch": 1, "phase": "pretrain", "loss": 3.0},
        {"epoch": 2, "phase": "pretrain", "loss": None},
        {"epoch": 3, "phase": "pretrain", "loss": 2.0},
        {"epoch": 4, "phase": "cluster"},
        {"epoch": 5, "phase": "cluster", "loss": float("nan")},
        {"epoch": 6, "phase": "cluster", "loss": 1.0},
    ]
    series = [(e.tolist(), v.tolist()) for e, v in report._series(records, "loss")]
    assert series == [([1, 3], [3.0, 2.0]), ([6], [1.0])]


def test_curves_have_a_panel_for_each_kind_of_metric():
    figure = report._curves(history(), "")
    drawn = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title("left") for ax in drawn] == [
        "Loss",
        "Agreement with the true classes",
        "Labels that changed",
        "Empty clusters",
        "Inertia",
    ]
    # ARI was recorded as null throughout.
    assert [t.get_text() for t in drawn[1].get_legend().get_texts()] == ["ACC", "NMI"]
    assert drawn[0].get_yscale() == "log"
    # Pretraining is shaded, up to the middle between its last epoch and the next.
    assert drawn[0].patches[0].get_extents().transformed(drawn[0].transData.inverted()).x1 == (
        pytest.approx(4.5)
    )
    assert "pretraining" in texts(figure)


def test_confusion_counts():
    arguments = run(n=6, k=2)
    arguments["truth"] = np.array([0, 0, 0, 1, 1, 1])
    arguments["labels"] = np.array([1, 1, 1, 0, 0, 1])
    found = texts(report._confusion(clusters_of(arguments, ["bag", "boot"]), ""))
    assert any("accuracy 83.3%" in text for text in found)
    for expected in ("bag", "boot", "3", "2", "1"):
        assert expected in found


def test_confusion_of_many_clusters_joins_those_of_a_class():
    arguments = run(n=400, k=100, n_classes=4)
    arguments["truth"][:10] = 0  # eight more examples of class 0 than the clusters have
    clusters = clusters_of(arguments, ["a", "b", "c", "d"])
    figure = report._confusion(clusters, "")
    heads = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert heads == ["a (25)", "b (25)", "c (25)", "d (25)"]
    wrong = np.count_nonzero(np.arange(10) % 4)
    assert any(f"purity {100 * (400 - wrong) / 400:.1f}%" in text for text in texts(figure))


def test_sizes_say_how_many_are_empty():
    arguments = run(n=120, k=6)
    arguments["labels"] = arguments["labels"] % 4
    figure = report._sizes(clusters_of(arguments), "")
    found = texts(figure)
    assert "Sizes of 6 clusters, 2 empty" in found
    assert "n / K = 20" in found
    assert [bar.get_height() for bar in figure.axes[0].patches] == [40, 40, 20, 20, 0, 0]


def test_wide_vectors_show_the_features_that_differ():
    arguments = run(n=40, k=2, shape=(300,))
    arguments["examples"][:] = 1.0
    different = np.arange(7, 300, 6)[:45]
    arguments["examples"][np.ix_(arguments["labels"] == 1, different)] = 5.0
    clusters = clusters_of(arguments)
    means = np.stack([report._mean(clusters.examples, clusters.members(i)) for i in range(2)])
    assert np.array_equal(means[1][different], np.full(45, 5.0))
    features = report._features(clusters, means)
    assert len(features) == 50
    assert set(different) <= set(features.tolist())
    assert any("50 of 300 features" in text for text in texts(report._nearest(clusters, "")))
