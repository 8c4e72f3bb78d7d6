import numpy as np

from jkmeans.report.confusion import confusion_figure
from tests.reports import clusters_of, run, texts


def test_confusion_counts():
    arguments = run(n=6, k=2)
    arguments["truth"] = np.array([0, 0, 0, 1, 1, 1])
    arguments["labels"] = np.array([1, 1, 1, 0, 0, 1])
    found = texts(confusion_figure(clusters_of(arguments, ["bag", "boot"]), ""))
    assert any("accuracy 83.3%" in text for text in found)
    for expected in ("bag", "boot", "3", "2", "1"):
        assert expected in found


def test_confusion_of_many_clusters_joins_those_of_a_class():
    arguments = run(n=400, k=100, n_classes=4)
    arguments["truth"][:10] = 0  # eight more examples of class 0 than the clusters have
    clusters = clusters_of(arguments, ["a", "b", "c", "d"])
    figure = confusion_figure(clusters, "")
    heads = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert heads == ["a (25)", "b (25)", "c (25)", "d (25)"]
    wrong = np.count_nonzero(np.arange(10) % 4)
    assert any(f"purity {100 * (400 - wrong) / 400:.1f}%" in text for text in texts(figure))
