import numpy as np

from jkmeans.report import sprites


def test_reduced_images_are_means_of_squares():
    image = np.arange(24.0).reshape(4, 6)
    assert sprites._reduced(image, 3)[..., 0].tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]
    assert sprites._reduced(image, 6)[..., 0].tolist() == image.tolist()
