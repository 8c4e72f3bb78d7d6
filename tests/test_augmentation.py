"""Affine views against hand-made images and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from jkmeans.augmentation import affine_views

KEYS = jax.random.split(jax.random.key(0), 6)
IMAGES = np.random.default_rng(0).uniform(size=(6, 9, 7)).astype(np.float32)


def draws(shift, rotation, zoom):
    """What the views draw: down, right (pixels), angle (radians), scale."""
    unit = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (4,)))(KEYS))
    span = np.array([shift, shift, np.radians(rotation), zoom])
    return (2 * unit - 1) * span + np.array([0, 0, 0, 1.0])


def test_no_range_no_change():
    views = affine_views(KEYS, jnp.asarray(IMAGES), shift=0.0, rotation=0.0, zoom=0.0)
    np.testing.assert_allclose(views, IMAGES, atol=1e-6)


def test_views_equal_scipy():
    views = affine_views(KEYS, jnp.asarray(IMAGES), shift=2.0, rotation=30.0, zoom=0.3)
    centre = (np.array(IMAGES.shape[1:]) - 1) / 2
    for image, view, (down, right, angle, scale) in zip(
        IMAGES, np.asarray(views), draws(2.0, 30.0, 0.3), strict=True
    ):
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
        offset = centre - turn @ (centre + np.array([down, right]))
        # A frame of zeros makes SciPy interpolate across the border as we do.
        framed = np.pad(image, 20)
        expected = scipy.ndimage.affine_transform(
            framed, turn, offset + 20, order=1, output_shape=image.shape
        )
        np.testing.assert_allclose(view, expected, atol=1e-4)


def test_ranges_are_kept_and_used():
    keys = jax.random.split(jax.random.key(1), 400)
    image = np.zeros((400, 21, 21), np.float32)
    image[:, 10, 10] = 1.0
    views = np.asarray(affine_views(keys, jnp.asarray(image), shift=3.0, rotation=0.0, zoom=0.0))
    mass = views.sum((1, 2))
    np.testing.assert_allclose(mass, 1.0, atol=1e-4)
    where = (views * np.arange(21)[None, :, None]).sum((1, 2)) - 10
    assert where.min() < -2.8
    assert where.max() > 2.8
    assert np.abs(where).max() <= 3.001
    assert abs(where.mean()) < 0.3


def test_channels_move_together():
    colour = np.stack([IMAGES, 2 * IMAGES, IMAGES**2], axis=-1)
    options = {"shift": 1.5, "rotation": 20.0, "zoom": 0.2}
    views = np.asarray(affine_views(KEYS, jnp.asarray(colour), **options))
    gray = np.asarray(affine_views(KEYS, jnp.asarray(IMAGES), **options))
    np.testing.assert_allclose(views[..., 0], gray, atol=1e-6)
    np.testing.assert_allclose(views[..., 1], 2 * gray, atol=1e-6)
