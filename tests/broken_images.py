"""Images that are broken, hostile or odd in every way that scoring has to tell apart, and good ones among them."""

import io
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from models.inputs.formats import ready

PLUGINS = ready("HEIF"), ready("JXL")
"""Encoders of HEIC and JPEG XL are brought in with their decoders."""


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(rng: random.Random, width: int = 48, height: int = 40) -> Image.Image:
    """Smooth and colorful, another one for each state of `rng`."""
    coarse = np.frombuffer(rng.randbytes(4 * 5 * 3), np.uint8).reshape(4, 5, 3)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG file (RGB, 8 bits) of these chunks after its header."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def pixels(width: int, height: int) -> bytes:
    """The chunk with a PNG file's pixels, all black."""
    return png_chunk(b"IDAT", zlib.compress(bytes((3 * width + 1) * height)))


def text_bomb() -> bytes:
    """A good PNG with 64 MiB of text in 64 KiB."""
    return png(8, 8, png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26))), pixels(8, 8))


def profile_bomb() -> bytes:
    """A good PNG with a color profile of 64 MiB in 64 KiB."""
    return png(8, 8, png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2**26))), pixels(8, 8))


def many_scans(side: int, scans: int) -> bytes:
    """A gray progressive JPEG: each of its empty scans is ten bytes, and makes the decoder go over the whole image once."""
    whole = encoded(Image.new("L", (side, side), 99), "JPEG", progressive=True, quality=50)
    return whole[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * scans + whole[-2:]


def hidden_tiles(columns: int, height: int) -> bytes:
    """A TIFF of 16 pixels' height whose tiles are `height` high (compressed to nothing): one call into C, of any length.

    Each tile decodes to 16 x `height` bytes, of which 256 are part of the image.
    """
    tile = zlib.compress(bytes(16 * height), 9)
    entries: list[tuple[int, int, int, int]] = []
    data_at = 8 + 2 + 12 * 11 + 4
    offsets_at = data_at + len(tile)
    counts_at = offsets_at + 4 * columns
    entries = [
        (256, 4, 1, 16 * columns),
        (257, 4, 1, 16),
        (258, 3, 1, 8),
        (259, 3, 1, 8),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (284, 3, 1, 1),
        (322, 4, 1, 16),
        (323, 4, 1, height),
        (324, 4, columns, offsets_at),
        (325, 4, columns, counts_at),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    tail = struct.pack(f"<{columns}I", *[data_at] * columns) + struct.pack(f"<{columns}I", *[len(tile)] * columns)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + tile + tail


def turned(rng: random.Random) -> bytes:
    """A JPEG that is upright only when its EXIF orientation is followed."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(rng), "JPEG", quality=95, exif=exif)


ODD_EXIF = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHHHI4sI", 8, 2, 0x112, 3, 1, 6, 0, 0x11A, 2, 3, b"72", 0)
"""An orientation, and a resolution in words."""


def segment(data: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment at its beginning."""
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + data[2:]


def floats(rng: random.Random, most: float) -> bytes:
    """A gray TIFF of floats from 0 to 1, and one other."""
    values = np.asarray(picture(rng).convert("L")).astype(np.float32) / 255
    values[3, 5] = most
    return encoded(Image.fromarray(values), "TIFF")


def sixteen_bits(rng: random.Random) -> bytes:
    """A gray PNG of 16 bits."""
    gray = np.asarray(picture(rng).convert("L")).astype(np.uint16)
    return encoded(Image.fromarray((gray << 8) + 77), "PNG")


def transparent_palette(rng: random.Random) -> bytes:
    """A palette PNG of which one color is transparent."""
    return encoded(picture(rng).quantize(16), "PNG", transparency=3)


def animated(rng: random.Random) -> bytes:
    """A GIF of three frames."""
    frames = [picture(rng) for _ in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def jpeg(rng: random.Random) -> bytes:
    """An ordinary image."""
    return encoded(picture(rng), "JPEG", quality=90)


ODD: dict[str, Callable[[random.Random], bytes]] = {
    "CMYK": lambda rng: encoded(picture(rng).convert("CMYK"), "JPEG"),
    "16 bits": sixteen_bits,
    "transparent palette": transparent_palette,
    "animated": animated,
    "EXIF-rotated": turned,
    "gray": lambda rng: encoded(picture(rng).convert("L"), "JPEG"),
    "progressive": lambda rng: encoded(picture(rng), "JPEG", progressive=True),
    "transparent WebP": lambda rng: encoded(picture(rng).convert("RGBA"), "WEBP"),
    "TIFF": lambda rng: encoded(picture(rng), "TIFF", compression="tiff_lzw"),
    "AVIF": lambda rng: encoded(picture(rng), "AVIF"),
    "one pixel": lambda rng: encoded(picture(rng, 1, 1), "PNG"),
    "HEIC": lambda rng: encoded(picture(rng), "HEIF"),
    "JPEG XL": lambda rng: encoded(picture(rng), "JXL"),
    "floats": lambda rng: floats(rng, 1.0),
    "odd EXIF": lambda rng: segment(jpeg(rng), 0xE1, ODD_EXIF),
    "EXIF that is noise": lambda rng: segment(jpeg(rng), 0xE1, b"Exif\0\0" + rng.randbytes(60)),
    "profile cut": lambda rng: segment(jpeg(rng), 0xE2, b"ICC_PROFILE\0"),
    "resolution cut": lambda rng: segment(jpeg(rng), 0xE0, b"JFIF\0"),
    "bomb of text": lambda rng: text_bomb(),
    "bomb of color": lambda rng: profile_bomb(),
    "animation that is none": lambda rng: png(8, 8, png_chunk(b"fcTL", b"\0"), pixels(8, 8)),
    "much text": lambda rng: png(8, 8, png_chunk(b"tEXt", b"Comment\0" + bytes(2**20)), pixels(8, 8)),
}
"""Unusual, and to be scored like any other."""

BROKEN: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    "zero bytes": ("empty", lambda rng: b""),
    "HTML": ("not_an_image", lambda rng: b"<html><body>404 Not Found</body></html>"),
    "noise": ("not_an_image", lambda rng: b"\0" + rng.randbytes(3000)),
    "EPS": ("not_an_image", lambda rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "ICO": ("not_an_image", lambda rng: encoded(picture(rng, 32, 32), "ICO")),
    "PSD": ("not_an_image", lambda rng: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(400)),
    "cut JPEG": ("truncated", lambda rng: jpeg(rng)[:800]),
    "cut PNG": ("truncated", lambda rng: encoded(picture(rng), "PNG")[:900]),
    "cut WebP": ("truncated", lambda rng: encoded(picture(rng), "WEBP")[:120]),
    "cut GIF": ("truncated", lambda rng: animated(rng)[:900]),
    "cut TIFF": ("decode_error", lambda rng: encoded(picture(rng), "TIFF", compression="tiff_lzw")[:900]),
    "cut AVIF": ("truncated", lambda rng: encoded(picture(rng), "AVIF")[:400]),
    "damaged PNG": ("decode_error", lambda rng: png(8, 8, png_chunk(b"IDAT", b"\xff" * 90))),
    "bomb of pixels": ("too_large", lambda rng: png(60_000, 60_000, png_chunk(b"IDAT", zlib.compress(b"\0")))),
    "floats out of range": ("decode_error", lambda rng: floats(rng, 1000.0)),
    "no number": ("decode_error", lambda rng: floats(rng, float("nan"))),
    "cut HEIC": ("decode_error", lambda rng: encoded(picture(rng), "HEIF")[:500]),
    "cut JPEG XL": ("decode_error", lambda rng: encoded(picture(rng), "JXL")[:90]),
    "bomb of JPEG XL": ("too_large", lambda rng: b"\xff\x0a" + bytes.fromhex("febf4efafffb02000000000000")),
    "many scans": ("slow", lambda rng: many_scans(4000, 6000)),
    "hidden tiles": ("slow", lambda rng: hidden_tiles(4000, 2**20)),
}
"""To be rejected: the reason, and the bytes."""


def tar(images: list[bytes], trailer: bool = True) -> bytes:
    """A shard of these images; without `trailer`, cut off after the last one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, data in enumerate(images):
            member = tarfile.TarInfo(f"{number:05d}.img")
            member.name = f"{number:05d}.jpg"
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        end = archive.offset
    return file.getvalue() if trailer else file.getvalue()[:end]


def shards(
    seed: int, count: int, images_per_shard: int, share: float, slow: int
) -> list[list[tuple[bytes, str | None]]]:
    """Shards of images, of which about `share` are broken in every way in turn.

    Args:
        seed: of the images and of the places of the broken ones.
        count: images altogether.
        images_per_shard: at most.
        share: of broken images.
        slow: at most so many of each way that takes as long as the time limit allows.

    Returns:
        For each shard its images: the bytes, and the reason for which they are rejected, None for good ones.
    """
    rng = random.Random(seed)
    ways = [(name, *BROKEN[name]) for name in BROKEN]
    odd, used = list(ODD.values()), dict.fromkeys(BROKEN, 0)
    images: list[tuple[bytes, str | None]] = [
        ((odd[number % len(odd)] if number % 5 == 0 else jpeg)(rng), None) for number in range(count)
    ]
    turn = 0
    for number in rng.sample(range(count), round(share * count)):
        while True:
            name, reason, make = ways[turn % len(ways)]
            turn += 1
            if reason != "slow" or used[name] < slow:
                break
        used[name] += 1
        images[number] = (make(rng), reason)
    return [images[start : start + images_per_shard] for start in range(0, count, images_per_shard)]
