import numpy as np
import pytest

from jkmeans.drawing import new_figure, palette, plain_numbers


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (400, 2000, ["400", "600", "1,000", "2,000"]),
        (0.08, 150, ["0.1", "1", "10", "100"]),
        (2e-7, 3e-5, ["1e-06", "1e-05"]),
        (4e5, 2e6, ["400,000", "600,000", "1,000,000", "2,000,000"]),
    ],
)
def test_logarithmic_axes_have_labels_of_one_form(low, high, shown):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([low, high], [1, 1])
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlim(low, high)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_xticklabels(which="both")]
    inside = [text for text in labels if text and low <= float(text.replace(",", "")) <= high]
    assert sorted(inside, key=lambda text: float(text.replace(",", ""))) == shown


@pytest.mark.parametrize("n", [1, 10, 11, 20, 500])
def test_palette_has_distinct_colours(n):
    colours = palette(n)
    assert colours.shape == (n, 3)
    assert len(np.unique(colours.round(6), axis=0)) == n
