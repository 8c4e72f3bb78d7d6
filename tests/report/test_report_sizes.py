from jkmeans.report.sizes import sizes_figure
from tests.reports import clusters_of, run, texts


def test_sizes_say_how_many_are_empty():
    arguments = run(n=120, k=6)
    arguments["labels"] = arguments["labels"] % 4
    figure = sizes_figure(clusters_of(arguments), "")
    found = texts(figure)
    assert "Sizes of 6 clusters, 2 empty" in found
    assert "n / K = 20" in found
    assert [bar.get_height() for bar in figure.axes[0].patches] == [40, 40, 20, 20, 0, 0]
