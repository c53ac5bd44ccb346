"""From hostile bytes to the square uint8 image that enters a network.

Nothing here trusts the bytes: the format is one of a closed list, a decoder sees only what the pixels need
(`models.inputs.needed`), the size is checked in the header before any pixel is decoded, and no crop allocates more than its
output, whatever the aspect ratio. Whatever goes wrong is one `UndecodableImage` with a reason of a small closed set. Decoding
has a time limit, which is checked whenever a decoder asks for more bytes; `models.inputs.decoding` holds to it those that never
ask. Decoded images stay uint8; `normalize` makes floats of whole batches on the device, and alone needs torch.
"""

import io
import logging
import math
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cluster.errors import TophatError, one_line
from models.config import Transform
from models.inputs.boxes import Box, _resized, random_box, whole_box
from models.inputs.formats import FORMATS, PLUGINS, known, ready
from models.inputs.needed import exif_orientation, needed

if TYPE_CHECKING:  # decoding runs in many processes, and needs no torch
    import torch
    from torch import Tensor

Reason = Literal[
    "empty", "no_image", "needs_plugin", "unreadable", "not_an_image", "too_large", "truncated", "slow", "decode_error"
]
REASONS: tuple[str, ...] = get_args(Reason)

DETAIL = 200
"""Longest detail, in characters."""

DECODE_SECONDS = 10.0
"""CPU time that decoding one image may take, unless the caller says otherwise."""

UNSIGNED = ("BMP", "PPM")
"""Formats of which a signature tells too little to be `known` by it."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Of each `Transform.interpolation`."""
LOSSY = ("JPEG", "WEBP", "AVIF", "HEIF", "JXL")
"""Formats of photographs, which another lossy coding does little to."""

LONGEST = 16
"""Times `size` to which the longer side is resized at most before it is cropped, where `Transform.exact` asks for that."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright; one of 1 is."""

JPEG_BLOCK = 1024
"""Bytes of a JPEG that are decoded between two looks at the clock. Ten bytes of a progressive JPEG (an empty scan) make the decoder go
over the whole image once: 40 ms at 100 million pixels."""

# The bytes are not the user's doing, so what PIL says about them belongs in the rejects, not on the terminal; and PIL's own
# pixel limit, which warns before it refuses, gives way to `max_pixels`.
Image.MAX_IMAGE_PIXELS = None
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"PIL\.")


class UndecodableImage(TophatError):  # noqa: N818 - the design's word for it
    """An image that cannot be used: a row of the rejects, not a failure of the run.

    Args:
        reason: one of `REASONS`.
        detail: what the decoder said, in one line of at most 200 characters.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason = reason
        self.detail = one_line(detail)[:DETAIL]
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type["UndecodableImage"], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


def decode(data: bytes, transform: Transform) -> NDArray[np.uint8]:
    """The whole image, upright: uint8 [height, width, 3], RGB.

    A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size, with the shorter side still at least
    `transform.resize`. Of an animation, the first frame. Transparent pixels are shown on white. Color profiles are not applied.

    What becomes of values, by Pillow's mode:

    - 1, L, P, RGB, RGBX, YCbCr, CMYK, LAB, HSV, and LA, PA, La, RGBA, RGBa with transparency: converted to RGB of 8 bits. Colors of
      16 bits lose their lower byte.
    - I;16, I;16B, I;16L, I;16N (gray of 16 bits): lose their lower byte; gray of 12 bits in a TIFF loses its lower 4 bits.
    - I (gray of 32 bits, or 16 with a sign): taken as they are if all are from 0 to 255; as 16 bits if all are from 0 to 65535.
      Those of a PPM always are 16 bits.
    - F (gray of floats): 255 times the value if all are from 0 to 1; taken as they are if all are from 0 to 255 and the greatest is over
      2, as one that is a little over 1 may be meant either way. JPEG XL defines its own to be from 0 to 1: what lossy coding puts
      outside, by up to 0.1, is cut off.
    - Any other value (infinite, no number, out of these ranges) is not guessed at: the image is rejected.

    Gray of 16 bits or floats in a TIFF whose zero is white is inverted, as Pillow leaves it to others.

    Raises:
        UndecodableImage: whatever the bytes are.
    """
    with _opened(data, transform) as encoded:
        return np.asarray(encoded.pixels(transform.resize / min(encoded.size)))


def evaluation_image(data: bytes, transform: Transform, seconds: float = DECODE_SECONDS) -> NDArray[np.uint8]:
    """The image as evaluation and scoring see it: uint8 [3, size, size], RGB.

    By `transform.fit`: `crop` resizes the shorter side to `resize`, then crops the center `size` x `size`, as torchvision's
    `Resize` and `CenterCrop` on PIL images; `pad` resizes the longer side to `size` and puts the whole image in the middle of
    the transform's mean color, as `PIL.ImageOps.pad`; `squash` resizes both sides to `size`.

    Args:
        data: an encoded image.
        transform: the sizes, `fit` and `interpolation`.
        seconds: of CPU time, after which decoding is given up.

    Raises:
        UndecodableImage: whatever the bytes are.
    """
    with _opened(data, transform, seconds) as encoded:
        return _channels_first(_whole(encoded, transform))


def reduced(data: bytes, shorter: int, seconds: float = DECODE_SECONDS) -> bytes:
    """The image, encoded again with a shorter side of `shorter` pixels, upright and in RGB; the same bytes, where that is not more now.

    The longer side is what `evaluation_image` makes of it. What was lossy becomes a JPEG of quality 95 with all of its color
    (4:4:4), all else a PNG.

    Args:
        data: an encoded image.
        shorter: the shorter side, in pixels.
        seconds: of CPU time, after which decoding is given up.

    Raises:
        UndecodableImage: whatever the bytes are.
    """
    with _opened(data, Transform(), seconds) as encoded:
        least = min(encoded.size)
        if least <= shorter:
            return data
        width, height = (shorter if side == least else int(shorter * side / least) for side in encoded.size)
        pixels = encoded.pixels(shorter / least).resize((width, height), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        if known(data) in LOSSY:
            pixels.save(file, "JPEG", quality=95, subsampling=0)
        else:
            pixels.save(file, "PNG")
        return file.getvalue()


def training_image(data: bytes, transform: Transform, rng: random.Random) -> NDArray[np.uint8]:
    """The image as training sees it, cropped and mirrored at random: uint8 [3, size, size], RGB.

    Args:
        data: an encoded image.
        transform: whose `crop`, `scale`, `padding` and `flip` say how.
        rng: the source of all randomness; the same state gives the same image.

    Raises:
        UndecodableImage: whatever the bytes are.
    """
    with _opened(data, transform) as encoded:
        size = encoded.size
        box = random_box(*size, transform, rng) if transform.crop == "random_resized" else whole_box(*size, transform)
        pixels = _crop(encoded, box, transform)
    if transform.crop == "pad":
        pixels = _shifted(pixels, transform.padding, rng)
    if transform.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return _channels_first(pixels)


def upright_size(data: bytes, transform: Transform) -> tuple[int, int]:
    """Width and height as the header says, upright; no pixel is decoded.

    Raises:
        UndecodableImage: there is no such header, or it tells of more than `transform.max_pixels`.
    """
    with _opened(data, transform) as encoded:
        return encoded.size


def normalize(images: "Tensor", transform: Transform, device: "torch.device") -> "Tensor":
    """Floats for a network: scaled to [0, 1], minus `mean`, over `std`, computed on the device.

    Args:
        images: uint8 [N, 3, H, W], RGB.
        transform: whose `mean` and `std` are used.
        device: where the result is.

    Returns:
        float32 [N, 3, H, W], in channels_last memory format.
    """
    import torch

    mean, std = (_of_channels(values, device) for values in (transform.mean, transform.std))
    moved = images.to(device, non_blocking=True).to(dtype=torch.float32, memory_format=torch.channels_last)
    return moved.sub_(mean).div_(std)


@cache
def _of_channels(values: tuple[float, ...], device: "torch.device") -> "Tensor":
    """255 times a value for each channel, [1, 3, 1, 1], on the device; kept there, as bringing it would wait for all that the device does."""
    import torch

    with torch.inference_mode(False):
        return (255 * torch.tensor(values).view(1, 3, 1, 1)).to(device)


class _Watched(io.BytesIO):
    """Bytes that a decoder gets only while it has time left."""

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self._until_cpu = time.thread_time() + seconds  # on a busy machine, less than what went by

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._until and time.thread_time() > self._until_cpu:
            raise UndecodableImage("slow", f"decoding took more than {self.seconds:g} s")
        return super().read(size)


class _Encoded:
    """An image whose header was read: its size, and its pixels once they are asked for.

    Args:
        image: as Pillow opened it, without metadata.
        orientation: as in EXIF; what Pillow decodes is to be turned so.
    """

    def __init__(self, image: Image.Image, orientation: int) -> None:
        self._image = image
        self._turn = TURNS.get(orientation)
        self.size = (image.height, image.width) if orientation > 4 else image.size
        """Width and height, upright."""

    def pixels(self, scale: float) -> Image.Image:
        """Decodes: upright, RGB, and of a JPEG at least `scale` times the size in the header."""
        image = self._image
        if scale < 1:
            image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image.load()
        rgb = image if image.mode == "RGB" and "transparency" not in image.info else _rgb(image)
        return rgb if self._turn is None else rgb.transpose(self._turn)


@contextmanager
def _opened(data: bytes, transform: Transform, seconds: float = DECODE_SECONDS) -> Iterator[_Encoded]:
    """The image of hostile bytes, header read and checked; every error in the block becomes an `UndecodableImage`."""
    if not data:
        raise UndecodableImage("empty", "no bytes")
    name = known(data)
    if name in PLUGINS and not ready(name):
        raise UndecodableImage("needs_plugin", f"{PLUGINS[name]}, which needs a plug-in: pip install 'tophat[formats]'")
    try:
        only = needed(data, name)
        if only.size:
            _check_size(*only.size, transform)
        image = Image.open(_Watched(only.data, seconds), formats=(name,) if name else UNSIGNED)
        _check_size(*image.size, transform)
        if name == "TIFF":
            _check_planes(image)
        if name == "JPEG":
            image.decodermaxblock = JPEG_BLOCK
        turned = (
            exif_orientation(image.info.get("exif", b"")) if name == "AVIF" else None
        )  # made by Pillow from the file's own boxes
        yield _Encoded(image, turned or only.orientation)
    except UndecodableImage:
        raise
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise _undecodable(error, data) from error


def _check_planes(image: Image.Image) -> None:
    """Refuses a TIFF that Pillow reads wrongly: planes of more than 8 bits that are not compressed."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(284) == 2 and tags.get(259, 1) == 1 and max(tags.get(258, (1,))) > 8:
        raise UndecodableImage(
            "decode_error", "separate planes of 16 bits that are not compressed, which are not decoded"
        )


def _check_size(width: int, height: int, transform: Transform) -> None:
    if width * height > transform.max_pixels:
        raise UndecodableImage("too_large", f"{width} x {height} pixels, at most {transform.max_pixels} are allowed")


def _undecodable(error: Exception, data: bytes) -> UndecodableImage:
    text = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        if not known(data):
            return UndecodableImage("not_an_image", f"not in one of the formats {', '.join((*FORMATS, *PLUGINS))}")
        text = "begins like an image, and its header is damaged, cut off, or of a kind that is not decoded"
    reason: Reason = "decode_error"
    if isinstance(error, MemoryError):
        reason = "too_large"
    elif "truncated" in text.lower() or isinstance(error, EOFError) or _cut_short(data):
        reason = "truncated"
    return UndecodableImage(reason, text)


def _cut_short(data: bytes) -> bool:
    """Whether bytes that are a WebP file are fewer than it says it has."""
    return known(data) == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _gray(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        kind, image = image.format, image.convert("RGBA")
        if kind == "BMP" and image.getchannel("A").getextrema() == (0, 0):
            return image.convert("RGB")  # most writers of BMP leave alpha at 0
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _gray(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits, by the rule that `decode` states."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    least, most = values.min(), values.max()
    if image.mode == "F":
        slack = 0.1 if image.format == "JXL" else 0.0
        top = 1 if most <= 1 + slack else 255
    else:
        slack, sixteen = 0.0, image.mode != "I" or image.format == "PPM" or most > 255
        top = 0xFFFF if sixteen else 255
        if tags.get(258) == (12,):
            top = 0xFFF
    unclear = image.mode == "F" and top == 255 and most <= 2
    if unclear or not (least >= -slack and most <= top + slack):  # also where a value is no number
        ranges = "0 to 1, or 0 to over 2 and at most 255" if image.mode == "F" else "0 to 255 or 0 to 65535"
        raise UndecodableImage("decode_error", f"gray values from {least:g} to {most:g}, where {ranges} are understood")
    if image.mode == "F":
        gray = np.rint(np.clip(values, 0, top) * (255 // top)).astype(np.uint8)
    else:
        gray = (values >> (top.bit_length() - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # zero is white
        gray = 255 - gray
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray = np.where(values == clear, np.uint8(255), gray)
    return Image.fromarray(gray)


def _whole(encoded: _Encoded, transform: Transform) -> NDArray[np.uint8]:
    """What evaluation sees, uint8 [size, size, 3]."""
    size = transform.size
    width, height = _resized(*encoded.size, transform)
    if transform.exact and transform.fit == "crop" and max(width, height) <= LONGEST * size:
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = encoded.pixels(1.0).resize((width, height), RESAMPLING[transform.interpolation])
        return np.asarray(resized.crop((left, top, left + size, top + size)))
    return _crop(encoded, whole_box(*encoded.size, transform), transform, whole=transform.exact)


def _crop(encoded: _Encoded, box: Box, transform: Transform, *, whole: bool = False) -> NDArray[np.uint8]:
    """Decodes and resizes `box`, given in the upright header's pixels, to uint8 [size, size, 3]; outside the image is the mean color.
    With `whole`, a JPEG is decoded at its full size."""
    size, (width, height) = transform.size, encoded.size
    scale = max(size / (box.right - box.left), size / (box.bottom - box.top))
    pixels = encoded.pixels(1.0 if whole else scale)
    if pixels.size == (size, size) and box == (0, 0, size, size):
        return np.asarray(pixels)
    across, down = pixels.width / width, pixels.height / height
    scaled = (
        max(0.0, box.left * across),
        max(0.0, box.top * down),
        min(float(pixels.width), box.right * across),
        min(float(pixels.height), box.bottom * down),
    )
    (left, columns), (top, rows) = _span(box.left, box.right, width, size), _span(box.top, box.bottom, height, size)
    shown = np.asarray(pixels.resize((columns, rows), RESAMPLING[transform.interpolation], box=scaled))
    if (columns, rows) == (size, size):
        return shown
    padded = np.empty((size, size, 3), np.uint8)
    padded[:] = [round(255 * value) for value in transform.mean]
    padded[top : top + rows, left : left + columns] = shown
    return padded


def _span(start: float, end: float, length: int, size: int) -> tuple[int, int]:
    """Where an image from 0 to `length` begins in `size` pixels that show `start` to `end`, and how many it takes: at least one."""
    before, after = max(0.0, -start), max(0.0, end - length)
    if before + after == 0:
        return 0, size
    taken = max(1, round(size * (1 - (before + after) / (end - start))))
    return round((size - taken) * before / (before + after)), taken


def _shifted(pixels: NDArray[np.uint8], padding: int, rng: random.Random) -> NDArray[np.uint8]:
    """`pixels` [size, size, 3] moved by up to `padding` both ways; what was outside is black."""
    size = pixels.shape[0]
    padded = np.zeros((size + 2 * padding, size + 2 * padding, 3), np.uint8)
    padded[padding : padding + size, padding : padding + size] = pixels
    top, left = rng.randint(0, 2 * padding), rng.randint(0, 2 * padding)
    return padded[top : top + size, left : left + size]


def _channels_first(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return cast("NDArray[np.uint8]", np.ascontiguousarray(pixels.transpose(2, 0, 1)))
