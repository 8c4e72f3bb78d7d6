"""The pictures of a k-means job."""

from jkmeans.report.kmeans import _sweep


def test_nothing_is_written_where_lines_run():
    sweep = {
        "n_clusters": [2, 3, 4],
        "inertia": [3.0, 2.0, 1.0],
        "silhouette": [0.1, 0.2, 0.3],
        "stability": [0.5, 0.6, 0.95],
        "suggestion": 4,
        "n_rows": 100,
    }
    figure = _sweep(sweep, "title")
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert not ax.texts
        assert ax._left_title.get_window_extent().x1 <= ax.get_window_extent().x1
    assert "stable from 0.9 on" in figure.axes[2].get_title(loc="left")
