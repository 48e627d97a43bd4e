"""Pictures as pixels: what Pillow decodes, resizes and crops, here in one place."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlocal.errors import ArgumentError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's


def pillow() -> Any:
    """PIL.Image. Raises ArgumentError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ArgumentError(
            "data: pictures are decoded by Pillow, which is not installed; pip install pillow"
        ) from error
    return Image


def opened(path: Path, mode: str) -> Any:
    """The decoded picture, converted to ``mode``. Raises ArgumentError naming a file that is none."""
    try:
        with pillow().open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's for a broken PNG
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"data: cannot decode {path} ({error}); replace or remove the file") from error


def pixels(image: Any) -> NDArray[np.uint8]:
    """uint8 [C, H, W] of a picture in mode L or RGB."""
    array = np.array(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def centered(image: Any, size: int, resize: int | None = None) -> Any:
    """The shorter side resized to ``resize`` (None: ``size``), bilinearly, then the middle ``size`` x ``size``."""
    width, height = image.size
    short = size if resize is None else resize
    if min(width, height) != short:
        scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize(scaled, pillow().Resampling.BILINEAR)
        width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_resized(image: Any, size: int, scale: tuple[float, float], draw: random.Random) -> Any:
    """A random part of the picture, resized to ``size`` x ``size``.

    Its area is a share from ``scale``, its ratio of sides from 3/4 to 4/3, both as torchvision's RandomResizedCrop draws
    them: ten tries, then the largest middle part of an allowed ratio.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((size, size), pillow().Resampling.BILINEAR)
