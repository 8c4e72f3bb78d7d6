import numpy as np
import pytest

from jkmeans.report.signs import failure_signs
from tests.reports import clusters_of, history, run


def sign(name, metrics=(), **change):
    found = {s.name: s for s in failure_signs(clusters_of(run() | change), metrics)}
    return found[name].status, found[name].sentence


def epochs(name, *values, phase="cluster"):
    return [{"epoch": i + 1, "phase": phase, name: v} for i, v in enumerate(values)]


def test_sound_run_shows_no_sign():
    metrics = [
        r | {"embedding_variance": 1.0 + 0.1 * r["epoch"]} | {"label_change": 0.001}
        for r in history()
    ]
    assert {s.status for s in failure_signs(clusters_of(run()), metrics)} == {"none"}


def test_collapse():
    name = "Collapse of the embeddings"
    status, text = sign(name, epochs("embedding_variance", 2.0, 1.0, 0.01))
    assert (status, text) == (
        "found",
        "They collapsed: the variance of the embeddings is 0.01 at the end, and was 2 at first.",
    )
    # What pretraining does to the scale is no collapse.
    before = epochs("embedding_variance", 90.0, 1.5, phase="pretrain")
    status, text = sign(name, [*before, *epochs("embedding_variance", 1.2, 1.1)])
    assert status == "none"
    assert "is 1.1 at the end, and was 1.5 when clustering began" in text
    assert sign(name)[0] == "unknown"
    assert sign(name, embeddings=np.ones((120, 5)))[0] == "found"
    embeddings = run()["embeddings"]
    embeddings[:7, 2] = np.nan
    assert "7 of 120" in sign(name, embeddings=embeddings)[1]


def test_empty_clusters_are_counted():
    assert sign("Empty clusters") == ("none", "No sign of empty clusters: the smallest has 30.")
    status, text = sign("Empty clusters", labels=np.arange(120) % 2)
    assert (status, text) == ("found", "2 of 4 clusters are empty at the end: 2, 3.")


def test_duplicate_centroids():
    centroids = run()["centroids"]
    assert sign("Duplicate centroids")[0] == "none"
    for gap in (0.0, 0.01):
        close = centroids.copy()
        close[3] = close[1] + gap
        status, text = sign("Duplicate centroids", centroids=close)
        assert status == "found"
        assert "2 of 4 centroids" in text
        assert ": 1 and 3 lie" in text
    close[0] = np.nan
    assert sign("Duplicate centroids", centroids=close)[0] == "found"
    close[1:3] = np.nan
    assert sign("Duplicate centroids", centroids=close)[0] == "unknown"


@pytest.mark.parametrize(
    ("k", "p"),
    [
        (2, 1),
        (300, 30),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((2, 30), (300, 1), (300, 2))),
    ],
)
def test_many_centroids_in_few_dimensions_are_no_duplicates(k, p):
    from sklearn.cluster import KMeans

    x = np.random.default_rng(0).normal(size=(3000, p))
    fitted = KMeans(k, n_init=1, random_state=0).fit(x)
    arguments = run(n=3000, k=k, p=p, shape=(1,)) | {
        "embeddings": x, "centroids": fitted.cluster_centers_, "labels": fitted.labels_,
    }  # fmt: skip
    centroids = failure_signs(clusters_of(arguments), [])[2]
    assert (centroids.name, centroids.status) == ("Duplicate centroids", "none")


def test_dominant_cluster():
    name = "One cluster that holds most"
    assert sign(name)[0] == "none"
    labels = np.where(np.arange(120) < 30, np.arange(120) % 4, 2)
    status, text = sign(name, labels=labels)
    assert status == "found"
    assert "cluster 2, the largest, has 97 of 120 examples (80.8%)" in text
    assert sign(name, labels=np.zeros(120, int), centroids=np.zeros((1, 5)))[0] == "unknown"
    two = {"centroids": np.eye(2, 5)}
    assert sign(name, labels=(np.arange(120) < 80).astype(int), **two)[0] == "none"
    assert sign(name, labels=(np.arange(120) < 115).astype(int), **two)[0] == "found"


def test_labels_still_changing():
    name = "Labels still changing"
    assert sign(name)[0] == "unknown"
    status, text = sign(name, epochs("label_change", 0.5, 0.071, None))
    assert status == "found"
    assert "7.1% of them changed in epoch 2" in text
    assert sign(name, epochs("label_change", 0.5, 0.0))[0] == "none"


def test_loss_that_ran_away():
    status, text = sign("Loss", epochs("loss", 1.2e32))  # Of one epoch, which cannot rise.
    assert (status, text) == ("found", "The loss ran away: it reached 1.20e32.")


def test_loss_that_does_not_fall():
    assert sign("Loss")[0] == "unknown"
    assert sign("Loss", epochs("loss", 1.0))[0] == "unknown"
    assert sign("Loss", epochs("loss", 1.0, 0.5)) == (
        "none", "No sign of trouble: the loss fell from 1 to 0.5 in clustering.",
    )  # fmt: skip
    both = [*epochs("loss", 3.0, 2.0, phase="pretrain"), *epochs("loss", 1.0, 1.5)]
    assert sign("Loss", both) == (
        "found", "The loss did not fall: it went from 1 to 1.5 in clustering.",
    )  # fmt: skip


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_loss_that_is_not_finite(value):
    status, text = sign("Loss", epochs("loss/centroid", 1.0, value, value))
    assert status == "found"
    assert text == "loss/centroid was not finite in 2 epochs of 3, first in epoch 2."
