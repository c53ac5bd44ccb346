"""Which part of an image a network sees, as rectangles: pure arithmetic."""

import math
import random
from typing import NamedTuple

from models.config import Transform


class Box(NamedTuple):
    """A rectangle in an upright image, in pixels from the upper left corner; edges may lie between pixels, and outside the image."""

    left: float
    top: float
    right: float
    bottom: float


def whole_box(width: int, height: int, transform: Transform) -> Box:
    """What of a `width` x `height` image evaluation shows, by `transform.fit`."""
    if transform.fit == "squash":
        return Box(0, 0, width, height)
    if transform.fit == "pad":
        side = max(width, height)
        return Box((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    new_width, new_height = _resized(width, height, transform)
    left, top = round((new_width - transform.size) / 2), round((new_height - transform.size) / 2)
    across, down = width / new_width, height / new_height
    return Box(left * across, top * down, (left + transform.size) * across, (top + transform.size) * down)


def _resized(width: int, height: int, transform: Transform) -> tuple[int, int]:
    """Width and height once the shorter side is `transform.resize`."""
    shorter = min(width, height)
    new_width = transform.resize if width == shorter else int(transform.resize * width / shorter)
    return new_width, transform.resize if height == shorter else int(transform.resize * height / shorter)


def random_box(width: int, height: int, transform: Transform, rng: random.Random) -> Box:
    """A random part of a `width` x `height` image: a share of its area in `scale`, an aspect ratio from 3/4 to 4/3.

    Where `fit` is `pad` or `squash`, area and aspect ratio are of the square picture. The part of a padded one is moved so that,
    along each side, it lies within the image or holds all of it: none shows the padding alone.
    """
    if transform.fit == "crop":
        return _random_part(width, height, transform.scale, rng)
    side = max(width, height)
    part = _random_part(side, side, transform.scale, rng)
    if transform.fit == "squash":
        across, down = width / side, height / side
        return Box(part.left * across, part.top * down, part.right * across, part.bottom * down)
    across, down = part.right - part.left, part.bottom - part.top
    left, top = _placed(width, across, side, rng), _placed(height, down, side, rng)
    return Box(left, top, left + across, top + down)


def _random_part(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> Box:
    """As torchvision's `RandomResizedCrop`: ten attempts, then the largest center crop of a permitted aspect ratio."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = rng.randint(0, width - across), rng.randint(0, height - down)
            return Box(left, top, left + across, top + down)
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - across) // 2, (height - down) // 2
    return Box(left, top, left + across, top + down)


def _placed(length: int, extent: float, side: int, rng: random.Random) -> float:
    """Where a part of that extent begins, along a side of an image of that length in the middle of a padded one of `side`."""
    first = max(min(0, length - extent), (length - side) / 2)
    last = min(max(0, length - extent), (length + side) / 2 - extent)
    return rng.uniform(first, last)
