import numpy as np
import pytest

from jkmeans.drawing import palette


@pytest.mark.parametrize("n", [1, 10, 11, 20, 500])
def test_palette_has_distinct_colours(n):
    colours = palette(n)
    assert colours.shape == (n, 3)
    assert len(np.unique(colours.round(6), axis=0)) == n
