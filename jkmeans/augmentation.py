"""Random affine views of images, made on the devices inside the compiled step."""

import math

import jax
import jax.numpy as jnp

VIEWS = ("shift", "rotation", "zoom")
"""Fields of ``config.augmentation``: where all are 0 there are no views."""


def affine_views(
    keys: jax.Array, images: jax.Array, *, shift: float, rotation: float, zoom: float
) -> jax.Array:
    """One random view of each image: zoomed and rotated about its centre, then shifted.

    Args:
      keys: [b] random keys, one for each image.
      images: [b, h, w] or [b, h, w, c] float32.
      shift: pixels; each direction is uniform in ±shift.
      rotation: degrees; the angle is uniform in ±rotation.
      zoom: the scale is uniform in 1 ± zoom.

    Returns:
      The views, in the shape of the images; bilinear, zero where a view looks past the border.
    """
    b, h, w = images.shape[:3]
    pixels = images.reshape(b, h * w, -1)
    least = jnp.array([-shift, -shift, -math.radians(rotation), 1.0 - zoom], jnp.float32)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys)
    # The last is a scale about 1, the others are about 0.
    middle = jnp.array([0.0, 0.0, 0.0, 1.0], jnp.float32)
    down, right, angle, scale = (least[None, :] + 2.0 * draws * (middle - least)[None, :]).T[
        :, :, None
    ]

    # Where each pixel of the view comes from: the inverse of the map, about the centre.
    rows, columns = jnp.divmod(jnp.arange(h * w), w)
    y = (rows - (h - 1) / 2)[None, :] - down
    x = (columns - (w - 1) / 2)[None, :] - right
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    from_y = cos * y + sin * x + (h - 1) / 2
    from_x = cos * x - sin * y + (w - 1) / 2

    top, left = jnp.floor(from_y), jnp.floor(from_x)
    below, beside = from_y - top, from_x - left
    view = jnp.zeros_like(pixels)
    for dy, weight_y in ((0, 1.0 - below), (1, below)):
        for dx, weight_x in ((0, 1.0 - beside), (1, beside)):
            row = top.astype(jnp.int32) + dy
            column = left.astype(jnp.int32) + dx
            inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            place = jnp.clip(row, 0, h - 1) * w + jnp.clip(column, 0, w - 1)
            values = jnp.take_along_axis(pixels, place[:, :, None], axis=1)
            view += values * jnp.where(inside, weight_y * weight_x, 0.0)[:, :, None]
    return view.reshape(images.shape)
