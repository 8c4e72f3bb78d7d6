"""Sprites: many examples as one sheet of small images, which a page holds as text."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np

from jkmeans.report.examples import as_pictures

SPRITE_BYTES = 2_500_000  # of a sheet of images before compression


def sprite_sheet(examples: np.ndarray, rows: np.ndarray, side: int) -> dict[str, Any] | None:
    """Examples as one sheet of small images, and how to find the i-th in it.

    Args:
        examples: images [n, h, w] or [n, h, w, 1 | 3 | 4], read one at a time.
        rows: [m] examples, in the order of the sheet.
        side: the longer side of a small image in pixels, if so many fit into `SPRITE_BYTES`.

    Returns:
        The data URL of the sheet, its columns, width and height of an image in pixels; None
        without rows.
    """
    if not len(rows):
        return None
    channels = 1 if len(examples.shape) == 3 or examples.shape[-1] == 1 else 3
    side = min(side, max(8, int(math.sqrt(SPRITE_BYTES / (len(rows) * channels)))))
    # Examples may hold infinities: their pictures need not be good, but must not stop the page.
    with np.errstate(all="ignore"):
        images = np.stack(
            [_reduced(np.asarray(examples[row], dtype=np.float32), side) for row in rows]
        )
        images = as_pictures(images, examples.dtype)
    m, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(m))
    n_rows = -(-m // columns)
    sheet = np.zeros((n_rows * columns, height, width, channels), dtype=np.uint8)
    sheet[:m] = np.rint(images * 255)
    sheet = sheet.reshape(n_rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(n_rows * height, columns * width, channels)
    return {"url": _png(sheet), "columns": columns, "width": width, "height": height}


def _reduced(image: np.ndarray, side: int) -> np.ndarray:
    """The image with neither side longer than `side`: means of squares of pixels, [h, w, c]."""
    image = image if image.ndim == 3 else image[..., None]
    height, width, channels = image.shape
    # Of a very large image every few pixels are enough.
    step = max(1, max(height, width) // (8 * side))
    image = image[::step, ::step]
    factor = -(-max(image.shape[:2]) // side)
    if factor == 1:
        return image
    height, width = (-(-length // factor) for length in image.shape[:2])
    missing = (height * factor - image.shape[0], width * factor - image.shape[1])
    image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    return image.reshape(height, factor, width, factor, channels).mean(axis=(1, 3))


def _png(pixels: np.ndarray) -> str:
    """Bytes [h, w, 1 | 3] as the data URL of a PNG file."""
    from PIL import Image  # matplotlib needs it too

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        file, format="png", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
