"""Every format, however it is turned, whatever metadata it has, and whatever its values are, against the upright image itself."""

import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from broken_images import encoded, png_chunk
from models.config import Transform
from models.inputs.decoding import Decoder
from models.inputs.formats import known, ready
from models.inputs.image import REASONS, UndecodableImage, decode, evaluation_image, training_image
from models.inputs.needed import needed

SMALL = Transform(size=28, resize=32)
WIDTH, HEIGHT = 90, 60
COLORS = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
COLORS[..., 0] = np.linspace(0, 255, WIDTH)[None]
COLORS[..., 1] = np.linspace(0, 255, HEIGHT)[:, None]
COLORS[..., 2] = 90
UPRIGHT = Image.fromarray(COLORS)
"""An image that no turn leaves as it is."""
GRAY = np.asarray(UPRIGHT.convert("L"))

STORED = dict(zip(range(2, 9), (0, 3, 1, 5, 2, 6, 4), strict=True))
"""By which turn (as Pillow numbers them) the upright image becomes the one that a file of an orientation stores."""

PLUGINS = ready("HEIF"), ready("JXL")
"""Encoders of HEIC and JPEG XL are brought in with their decoders."""


def stored(orientation: int) -> Image.Image:
    """The image that is upright once it is turned as `orientation` says."""
    return UPRIGHT.transpose(Image.Transpose(STORED[orientation])) if orientation > 1 else UPRIGHT


def exif_of(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A block of EXIF with these entries: tag, type, count, and 4 bytes that are the value or where it is."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(entries)) + body + bytes(4)


def turned(orientation: int) -> bytes:
    return exif_of((0x112, 3, 1, struct.pack("<HH", orientation, 0)))


FILES: dict[str, Callable[[Image.Image, bytes], bytes]] = {
    "JPEG": lambda image, exif: encoded(image, "JPEG", quality=98, subsampling=0, exif=exif),
    "MPO": lambda image, exif: encoded(
        image, "MPO", save_all=True, append_images=[image], quality=98, subsampling=0, exif=exif
    ),
    "PNG": lambda image, exif: encoded(image, "PNG", exif=exif),
    "PNG of ImageMagick": lambda image, exif: with_chunk(encoded(image, "PNG"), b"zTXt", raw_profile(exif)),
    "WEBP": lambda image, exif: encoded(image, "WEBP", lossless=True, exif=exif),
    "TIFF": lambda image, exif: encoded(image, "TIFF", exif=exif),
    "TIFF, LZW": lambda image, exif: encoded(image, "TIFF", compression="tiff_lzw", exif=exif),
    "AVIF": lambda image, exif: encoded(image, "AVIF", quality=100, subsampling="4:4:4", exif=exif),
    "HEIC": lambda image, exif: encoded(image, "HEIF", quality=100, exif=exif),
    "JPEG XL": lambda image, exif: encoded(image, "JXL", lossless=True, use_container=True, exif=exif),
}


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    return png[:33] + png_chunk(kind, body) + png[33:]


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment at its beginning."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def raw_profile(exif: bytes) -> bytes:
    lines = b"\n".join(exif.hex().encode()[at : at + 72] for at in range(0, 2 * len(exif), 72))
    return b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(exif) + lines + b"\n")


def away(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FILES)
def test_a_turned_image_is_the_upright_one(kind: str, orientation: int) -> None:
    data, upright = FILES[kind](stored(orientation), turned(orientation)), encoded(UPRIGHT, "PNG")
    assert away(decode(data, SMALL), COLORS) <= 6
    assert away(evaluation_image(data, SMALL), evaluation_image(upright, SMALL)) <= 4
    for seed in range(4):
        got, expected = (training_image(each, SMALL, random.Random(seed)) for each in (data, upright))
        assert away(got, expected) <= 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_that_is_decoded_smaller_is_cropped_as_the_upright_one(orientation: int) -> None:
    whole = UPRIGHT.resize((1800, 1200), Image.Resampling.BICUBIC)
    image = whole.transpose(Image.Transpose(STORED[orientation])) if orientation > 1 else whole
    data, upright = FILES["JPEG"](image, turned(orientation)), encoded(whole, "PNG")
    assert decode(data, SMALL).shape == (150, 225, 3)
    assert away(evaluation_image(data, SMALL), evaluation_image(upright, SMALL)) <= 4


def test_a_jpeg_inside_jpeg_xl_is_turned_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(FILES["JPEG"](stored(6), turned(6)))
    with Image.open(tmp_path / "a.jpg") as image:
        data = encoded(image, "JXL", lossless_jpeg=True)
    assert away(decode(data, SMALL), COLORS) <= 6
    block = bytes(4) + turned(6)[6:]
    box = struct.pack(">I", len(block) + 8) + b"Exif" + block
    assert away(decode(data[:32] + box + data[32:], SMALL), COLORS) <= 6  # the codestream is turned by itself


SHORT = struct.pack("<HH", 6, 0)
TURNS = {
    "a long": (exif_of((0x112, 4, 1, struct.pack("<I", 6))), True),
    "Motorola's order": (exif_of((0x112, 3, 1, struct.pack(">HH", 6, 0)), order=">"), True),
    "after an odd resolution": (exif_of((0x11A, 2, 3, b"72\0\0"), (0x112, 3, 1, SHORT)), True),
    "before a type that is not": (exif_of((0x112, 3, 1, SHORT), (0x9999, 99, 2**32 - 1, b"\xff" * 4)), True),
    "before a directory in a circle": (exif_of((0x112, 3, 1, SHORT), (0x8769, 4, 1, struct.pack("<I", 8))), True),
    "before a cut": (exif_of((0x112, 3, 1, SHORT), (0x11A, 5, 1, b"\xff\xff\0\0"))[:28], True),
    "64 KiB": (exif_of((0x112, 3, 1, SHORT)) + bytes(65000), True),
    "a byte": (exif_of((0x112, 1, 1, b"\6\0\0\0")), False),
    "text": (exif_of((0x112, 2, 2, b"6\0\0\0")), False),
    "two numbers": (exif_of((0x112, 3, 2, struct.pack("<HH", 6, 6))), False),
    "many numbers": (exif_of((0x112, 3, 2**31, b"\xff" * 4)), False),
    "0": (turned(0), False),
    "9": (turned(9), False),
    "-1": (turned(0xFFFF), False),
    "huge": (exif_of((0x112, 4, 1, b"\xff" * 4)), False),
    "cut in the entry": (turned(6)[:20], False),
    "cut in the head": (turned(6)[:12], False),
    "a directory beyond the end": (b"Exif\0\0II*\0\xff\xff\xff\x7f" + turned(6)[14:], False),
    "noise": (b"Exif\0\0" + random.Random(0).randbytes(400), False),
    "no bytes": (b"Exif\0\0", False),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG of ImageMagick", "WEBP"])
@pytest.mark.parametrize("way", TURNS)
def test_only_an_orientation_that_can_be_read_turns(way: str, kind: str) -> None:
    exif, turns = TURNS[way]
    alone = kind == "JPEG"  # Pillow would not write all of these
    data = with_segment(FILES[kind](stored(6), b""), 0xE1, exif) if alone else FILES[kind](stored(6), exif)
    expected = COLORS if turns else np.asarray(stored(6))
    assert away(decode(data, SMALL), expected) <= 4


SMALL_TURNS = [way for way in TURNS if not any(word in way for word in ("cut", "noise", "no bytes", "KiB", "beyond"))]


@pytest.mark.parametrize("way", SMALL_TURNS)
def test_only_an_orientation_that_can_be_read_turns_a_tiff(way: str) -> None:
    exif, turns = TURNS[way]
    order = ">" if exif[6:8] == b"MM" else "<"
    (count,) = struct.unpack(f"{order}H", exif[14:16])
    expected = COLORS if turns else np.asarray(stored(6))
    data = tiff_with(stored(6), [exif[16 + 12 * at : 28 + 12 * at] for at in range(count)], order)
    assert away(decode(data, SMALL), expected) == 0


def tiff_with(image: Image.Image, entries: list[bytes], order: str = "<") -> bytes:
    """A TIFF of RGB pixels with these entries besides its own."""
    pixels = image.tobytes()
    own = (
        (256, 4, 1, image.width),
        (257, 4, 1, image.height),
        (258, 3, 3, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 14),
        (277, 3, 1, 3),
        (278, 4, 1, image.height),
        (279, 4, 1, len(pixels)),
    )
    packed = [
        struct.pack(f"{order}HHIHH", tag, kind, n, *((8, 0) if tag == 258 else (value, 0)))
        if kind == 3
        else struct.pack(f"{order}HHII", tag, kind, n, value)
        for tag, kind, n, value in own
    ]
    packed[2] = struct.pack(f"{order}HHII", 258, 3, 3, 8)  # the three numbers are at 8
    rows = sorted(packed + entries, key=lambda entry: struct.unpack(f"{order}H", entry[:2]))
    at = 14 + len(pixels)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    directory = struct.pack(f"{order}H", len(rows)) + b"".join(rows) + bytes(4)
    return head + struct.pack(f"{order}3H", 8, 8, 8) + pixels + directory


def xmp(orientation: int, by: str = "attribute") -> bytes:
    said = (
        f'<x tiff:Orientation="{orientation}"/>'
        if by == "attribute"
        else f"<tiff:Orientation>{orientation}</tiff:Orientation>"
    )
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{said}</x:xmpmeta>'.encode()


@pytest.mark.parametrize("by", ["attribute", "element"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "packed PNG", "WEBP", "TIFF"])
def test_xmp_turns_where_exif_says_nothing(kind: str, by: str) -> None:
    def made(image: Image.Image, exif: bytes, text: bytes) -> bytes:
        if kind == "JPEG":
            return with_segment(FILES["JPEG"](image, exif), 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text)
        if "PNG" in kind:
            body = b"\0\0\0\0" + text if kind == "PNG" else b"\1\0\0\0" + zlib.compress(text)
            return with_chunk(FILES["PNG"](image, exif), b"iTXt", b"XML:com.adobe.xmp\0" + body)
        if kind == "TIFF":
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[700] = text
            if exif:
                tags[0x112] = 1
            return encoded(image, "TIFF", tiffinfo=tags)
        return encoded(image, "WEBP", lossless=True, exif=exif, xmp=text)

    assert away(decode(made(stored(6), b"", xmp(6, by)), SMALL), COLORS) <= 4
    assert (
        away(
            evaluation_image(made(stored(6), b"", xmp(6, by)), SMALL), evaluation_image(encoded(UPRIGHT, "PNG"), SMALL)
        )
        <= 4
    )
    assert away(decode(made(UPRIGHT, turned(1), xmp(6, by)), SMALL), COLORS) <= 4
    assert away(decode(made(UPRIGHT, b"", xmp(9, by)), SMALL), COLORS) <= 4


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_exif_does_not_turn_what_has_boxes_for_it(kind: str) -> None:
    other, turn = struct.pack("<HH", 0x100, 3), struct.pack("<HH", 0x112, 3)
    data = FILES[kind](UPRIGHT, turned(6).replace(turn, other))
    assert data.count(other) == 1
    assert away(decode(data.replace(other, turn), SMALL), COLORS) <= 6


# Metadata


JPEG, PNG = FILES["JPEG"](UPRIGHT, b""), FILES["PNG"](UPRIGHT, b"")
WEBP = encoded(UPRIGHT, "WEBP", lossless=True, exif=turned(1), icc_profile=b"profile ", xmp=b"<x/>")
AVIF = FILES["AVIF"](UPRIGHT, exif_of((0x11A, 2, 3, b"72\0\0")))
HEIC = FILES["HEIC"](UPRIGHT, turned(1))
GIF = encoded(UPRIGHT.quantize(64), "GIF", comment=b"a comment")


def in_webp(kind: bytes, body: bytes) -> bytes:
    """A WebP with a damaged chunk of metadata at its end."""
    at = WEBP.index(kind)
    return WEBP[:at] + kind + body + WEBP[at + 4 + len(body) :]


SIDE = {
    "JPEG: no more than the word JFIF": with_segment(JPEG, 0xE0, b"JFIF\0"),
    "JPEG: resolution cut": with_segment(JPEG, 0xE0, b"JFIF\0\1\1\1"),
    "JPEG: profile cut": with_segment(JPEG, 0xE2, b"ICC_PROFILE\0"),
    "JPEG: profile 3 of 2": with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\3\2rest"),
    "JPEG: images of MPO": with_segment(JPEG, 0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\2\0\0\0"),
    "JPEG: images of MPO, noise": with_segment(JPEG, 0xE2, b"MPF\0" + random.Random(1).randbytes(90)),
    "JPEG: Photoshop": with_segment(JPEG, 0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
    "JPEG: Photoshop, short": with_segment(JPEG, 0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\1\0"),
    "JPEG: Adobe, short": with_segment(JPEG, 0xEE, b"Adobe"),
    "JPEG: comment": with_segment(JPEG, 0xFE, b"\xff" * 65000),
    "JPEG: comment of no length": with_segment(JPEG, 0xFE, b"")[:4] + b"\0\0" + JPEG[2:],
    "JPEG: XMP": with_segment(JPEG, 0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<tiff:Orientation"),
    "JPEG: filling": JPEG[:2] + b"\xff" * 7 + JPEG[2:],
    "JPEG: what follows": JPEG + b"Exif\0\0" * 999,
    "JPEG: EXIF with a bad resolution": with_segment(
        JPEG, 0xE1, exif_of((0x11A, 2, 3, b"72\0\0"), (0x112, 3, 1, struct.pack("<HH", 1, 0)))
    ),
    "PNG: 2 MiB of text": with_chunk(PNG, b"tEXt", b"Comment\0" + b"x" * 2**21),
    "PNG: 2 MiB of packed text": with_chunk(PNG, b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2**21)),
    "PNG: 2 MiB of international text": with_chunk(PNG, b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 2**21)),
    "PNG: a profile of 2 MiB": with_chunk(PNG, b"iCCP", b"profile\0\0" + zlib.compress(bytes(2**21))),
    "PNG: a bomb where EXIF could be": with_chunk(
        PNG, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**26))
    ),
    "PNG: 1 MiB of text": with_chunk(PNG, b"tEXt", b"Comment\0" + b"x" * 2**20),
    "PNG: profile packed in a way that is not": with_chunk(PNG, b"iCCP", b"profile\0\7rest"),
    "PNG: profile without an end": with_chunk(PNG, b"iCCP", b"profile"),
    "PNG: text packed in a way that is not": with_chunk(PNG, b"zTXt", b"Comment\0\7rest"),
    "PNG: text without a word": with_chunk(PNG, b"tEXt", b""),
    "PNG: gamma": with_chunk(PNG, b"gAMA", b"\0"),
    "PNG: colors": with_chunk(PNG, b"cHRM", b"\0"),
    "PNG: intent": with_chunk(PNG, b"sRGB", b""),
    "PNG: resolution": with_chunk(PNG, b"pHYs", b"\0\0\0"),
    "PNG: animation": with_chunk(PNG, b"acTL", b"\0\0"),
    "PNG: animation of many": with_chunk(PNG, b"acTL", b"\0\0\1\0\0\0\0\0"),
    "PNG: frame": with_chunk(PNG, b"fcTL", b"\0" * 7),
    "PNG: frame outside": with_chunk(PNG, b"fcTL", struct.pack(">5I", 0, 900, 900, 9, 9) + bytes(6)),
    "PNG: transparency": with_chunk(PNG, b"tRNS", b"\0\0\0"),
    "PNG: no chunk that is known": with_chunk(PNG, b"qqQq", b"\0" * 99),
    "PNG: wrong check of a comment": with_chunk(PNG, b"tEXt", b"Comment\0hello").replace(b"hello", b"hallo"),
    "PNG: palette that is not needed": with_chunk(PNG, b"PLTE", b"\0" * 5),
    "PNG: comment cut off at the end": PNG[:-12] + png_chunk(b"tEXt", b"Comment\0" + bytes(99))[:50],
    "PNG: no end": PNG[:-12],
    "PNG: what follows": PNG + b"\0" * 999,
    "WebP: EXIF": in_webp(b"EXIF", b"\xff" * 3),
    "WebP: EXIF longer than the file": in_webp(b"EXIF", b"\xff\xff\xff\x7f"),
    "WebP: profile": WEBP.replace(b"profile ", b"\0" * 8),
    "WebP: cut in XMP": WEBP[:-3],
    "WebP: what follows": WEBP + b"\0" * 999,
    "AVIF: EXIF": AVIF.replace(b"II*\0", b"????"),
    "AVIF: EXIF with a bad resolution": AVIF,
    "HEIC: EXIF": HEIC.replace(b"II*\0", b"????"),
    "HEIC: EXIF, cut": HEIC.replace(turned(1)[6:], b"\xff" * len(turned(1)[6:])),
    "JPEG XL: EXIF": FILES["JPEG XL"](UPRIGHT, b"Exif\0\0" + b"\xff" * 40),
    "JPEG XL: a box that unpacks": FILES["JPEG XL"](UPRIGHT, b"") + struct.pack(">I", 99) + b"brobxml " + b"\xff" * 87,
    "JPEG XL: what follows": FILES["JPEG XL"](UPRIGHT, b"") + b"\0" * 99,
    "TIFF: resolution in words": tiff_with(
        UPRIGHT, [struct.pack("<HHI4s", 282, 2, 3, b"72\0\0"), struct.pack("<HHIHH", 296, 3, 1, 3, 0)]
    ),
    "TIFF: Photoshop": tiff_with(UPRIGHT, [struct.pack("<HHII", 34377, 1, 2**31, 2**31)]),
    "TIFF: IPTC": tiff_with(UPRIGHT, [struct.pack("<HHII", 33723, 4, 99, 2**31)]),
    "TIFF: EXIF in a circle": tiff_with(UPRIGHT, [struct.pack("<HHII", 34665, 4, 1, 8)]),
    "TIFF: EXIF beyond the end": tiff_with(UPRIGHT, [struct.pack("<HHII", 34665, 4, 1, 2**32 - 1)]),
    "TIFF: EXIF in words": tiff_with(UPRIGHT, [struct.pack("<HHI4s", 34665, 2, 3, b"no\0\0")]),
    "TIFF: XMP as numbers": tiff_with(UPRIGHT, [struct.pack("<HHII", 700, 4, 1, 7)]),
    "TIFF: a turn as text": tiff_with(UPRIGHT, [struct.pack("<HHI4s", 274, 2, 2, b"6\0\0\0")]),
    "TIFF: profile": tiff_with(UPRIGHT, [struct.pack("<HHII", 34675, 7, 2**32 - 1, 2)]),
    "TIFF: what follows": tiff_with(UPRIGHT, []) + b"\0" * 999,
}
"""Sound pixels with metadata that is not."""


@pytest.mark.parametrize("way", SIDE)
def test_what_the_pixels_do_not_need_cannot_cost_the_image(way: str) -> None:
    assert away(decode(SIDE[way], SMALL), COLORS) <= 6


@pytest.mark.parametrize(
    "extension",
    [
        b"\xf9\1\0\0",
        b"\xf9\0",
        b"\xff\x0bNETSCAPE2.0\0",
        b"\xff\x0bXMP DataXMP\0",
        b"\xfe\0",
        b"\1\0",
        b"\xf9\3\1\0\0\0",
    ],
)
def test_an_odd_extension_does_not_cost_a_gif(extension: bytes) -> None:
    at = GIF.index(b"!")
    data = GIF[:at] + b"!" + extension + GIF[at:]
    expected = np.asarray(UPRIGHT.quantize(64).convert("RGB"))
    assert away(decode(data, SMALL), expected) == 0
    assert away(decode(GIF + b"\0" * 99, SMALL), expected) == 0


def test_text_that_could_hold_exif_is_unpacked_up_to_a_limit() -> None:
    tracemalloc.start()
    try:
        assert needed(SIDE["PNG: a bomb where EXIF could be"], "PNG").orientation == 1
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_metadata_costs_no_time() -> None:
    data = PNG[:33] + png_chunk(b"tEXt", b"Comment\0" + b"x" * 2**20) * 80 + PNG[33:]
    assert away(evaluation_image(data, SMALL, seconds=0.5), evaluation_image(PNG, SMALL)) == 0


# Values


def raw_tiff(values: NDArray[np.generic], photometric: int = 1, bits: int | None = None) -> bytes:
    """A gray TIFF of these values, each as it is in memory; `bits` where they are packed."""
    pixels, kind = values.tobytes(), {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        pixels = (
            np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
            .astype(np.uint8)
            .tobytes()
        )
    tags = {
        256: values.shape[1],
        257: values.shape[0],
        258: bits or 8 * values.itemsize,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
    }
    tags |= {278: values.shape[0], 279: len(pixels), 339: kind}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if value > 65535 or tag == 279 else 3, 1, value) for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


WIDE = GRAY.astype(np.uint16) << 8 | 77
VALUES: dict[str, tuple[bytes, NDArray[np.uint8]]] = {
    "floats to 1": (raw_tiff((GRAY / 255).astype(np.float32)), GRAY),
    "floats to 255": (raw_tiff(GRAY.astype(np.float32)), GRAY),
    "floats to 1, white is zero": (raw_tiff((GRAY / 255).astype(np.float32), 0), 255 - GRAY),
    "floats, a black image": (raw_tiff(np.zeros((9, 9), np.float32)), np.zeros((9, 9), np.uint8)),
    "32 bits to 255": (raw_tiff(GRAY.astype(np.int32)), GRAY),
    "32 bits to 65535": (raw_tiff(WIDE.astype(np.int32)), GRAY),
    "32 bits, no sign": (raw_tiff(WIDE.astype(np.uint32)), GRAY),
    "16 bits with a sign, to 255": (raw_tiff(GRAY.astype(np.int16)), GRAY),
    "16 bits": (raw_tiff(WIDE), GRAY),
    "16 bits, dark": (raw_tiff(np.full((9, 9), 200, np.uint16)), np.zeros((9, 9), np.uint8)),
    "16 bits, white is zero": (raw_tiff(WIDE, 0), 255 - GRAY),
    "12 bits": (raw_tiff(GRAY.astype(np.uint16) << 4 | 7, bits=12), GRAY),
    "16 bits, Motorola's": (encoded(Image.fromarray(WIDE.astype(">u2")), "TIFF"), GRAY),
    "16 bits, packed TIFF": (encoded(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"), GRAY),
    "16 bits, PNG": (encoded(Image.fromarray(WIDE), "PNG"), GRAY),
    "16 bits, PPM": (b"P5 90 60 65535\n" + WIDE.astype(">u2").tobytes(), GRAY),
    "16 bits, dark PPM": (b"P5 9 9 65535\n" + bytes((0, 200)) * 81, np.zeros((9, 9), np.uint8)),
    "floats, PFM": (b"Pf\n90 60\n-1.0\n" + (GRAY[::-1] / 255).astype("<f4").tobytes(), GRAY),
    "16 bits, JPEG XL": (encoded(Image.fromarray(WIDE), "JXL", lossless=True), GRAY),
    "floats, JPEG XL": (encoded(Image.fromarray((GRAY / 255).astype(np.float32)), "JXL", lossless=True), GRAY),
    "16 bits, HEIC": (encoded(Image.fromarray(WIDE), "HEIF", quality=-1), GRAY),
}


@pytest.mark.parametrize("way", VALUES)
def test_values_become_8_bits_by_the_rule(way: str) -> None:
    data, gray = VALUES[way]
    got = decode(data, SMALL)
    assert away(got, np.repeat(gray[..., None], 3, 2)) <= (1 if "HEIC" in way else 0)


def test_floats_of_a_lossy_jpeg_xl_are_not_taken_for_a_dark_image() -> None:
    data = encoded(Image.fromarray(np.where(GRAY > 99, 1, 0).astype(np.float32)), "JXL")
    assert decode(data, SMALL).max() == 255


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (-0.01, "-0.01"), (255.5, "255.5"), (1e30, r"1e\+30")],
)
@pytest.mark.parametrize("whole", [1.0, 255.0])
def test_floats_out_of_range_are_rejected_and_the_range_is_said(value: float, said: str, whole: float) -> None:
    values = (GRAY / 255 * whole).astype(np.float32)
    values[3, 5] = value
    with pytest.raises(
        UndecodableImage, match=rf"^decode_error: gray values from .*{said}.*, where 0 to 1, or 0 to over 2"
    ):
        decode(raw_tiff(values), SMALL)


def test_floats_a_little_over_1_are_not_taken_for_a_dark_image() -> None:
    values = (GRAY / 255).astype(np.float32)
    values[3, 5] = 1.02
    with pytest.raises(UndecodableImage, match=r"^decode_error: gray values from .* to 1\.02, where 0 to 1, or"):
        decode(raw_tiff(values), SMALL)


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1, -(2**31)])
def test_whole_numbers_out_of_range_are_rejected_and_the_range_is_said(value: int) -> None:
    values = GRAY.astype(np.int32)
    values[3, 5] = value
    with pytest.raises(UndecodableImage, match=r"^decode_error: gray values from .*, where 0 to 255 or 0 to 65535 are"):
        decode(raw_tiff(values), SMALL)


CMYK = np.stack([255 - COLORS[..., 0], 255 - COLORS[..., 1], 255 - COLORS[..., 2], np.zeros_like(GRAY)], -1)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_four_inks_come_out_right(kind: str) -> None:
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    assert away(decode(encoded(Image.fromarray(CMYK, "CMYK"), kind, **options), SMALL), COLORS) <= 8


def test_lab_comes_out_right() -> None:
    from PIL import ImageCms

    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(UPRIGHT, to_lab)
    assert lab is not None
    got = decode(encoded(lab, "TIFF"), SMALL)
    assert np.abs(got.astype(int) - COLORS).mean() < 4


def gray_png(depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG 4 pixels wide and 1 high."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + png_chunk(b"IDAT", zlib.compress(b"\0" + rows))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("depth", "color", "rows", "clear", "expected"),
    [
        (1, 0, b"\x50", b"\0\1", [0, 255, 0, 255]),
        (2, 0, b"\x1b", b"\0\1", [0, 255, 170, 255]),
        (4, 0, b"\x0f\x37", b"\0\3", [0, 255, 255, 119]),
        (8, 0, bytes((0, 9, 7, 200)), b"\0\7", [0, 9, 255, 200]),
        (16, 0, bytes((0, 1, 9, 1, 9, 2, 7, 7)), b"\x09\1", [0, 255, 9, 7]),
        (8, 2, bytes((1, 1, 1, 9, 9, 9, 3, 3, 3, 7, 7, 7)), b"\0\3\0\3\0\3", [1, 9, 255, 7]),
        (16, 2, bytes((1, 0) * 3 + (9, 0) * 3 + (3, 5) * 3 + (7, 0) * 3), b"\3\5\3\5\3\5", [1, 9, 255, 7]),
    ],
)
def test_a_transparent_color_is_shown_on_white(
    depth: int, color: int, rows: bytes, clear: bytes, expected: list[int]
) -> None:
    data = gray_png(depth, color, rows, png_chunk(b"tRNS", clear))
    assert decode(data, SMALL)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("clear", [b"\xff\0", b"\xff\0\xff\xff", b"\x80" * 4, b"\xff" * 300])
def test_a_transparent_palette_is_shown_on_white(clear: bytes) -> None:
    palette = bytes((9, 9, 9, 50, 60, 70, 80, 80, 80, 200, 100, 0))
    data = gray_png(8, 3, bytes(range(4)), png_chunk(b"PLTE", palette), png_chunk(b"tRNS", clear))
    alpha = [clear[at] if at < len(clear) <= 256 else 255 for at in range(4)]
    expected = [[round(c * a / 255 + 255 - a) for c in palette[3 * at : 3 * at + 3]] for at, a in enumerate(alpha)]
    assert np.abs(np.subtract(decode(data, SMALL)[0].astype(int), expected)).max() <= 1


# HEIC and JPEG XL


def brands(major: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + major + bytes(4) + b"".join(others)
    return struct.pack(">I", len(body) + 4) + body


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *((brands(brand, b"mif1"), "HEIF") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")),
        (brands(b"mif1", b"mif1", b"heic"), "HEIF"),
        (brands(b"msf1", b"hevc"), "HEIF"),
        (brands(b"mif1", b"avif", b"miaf"), "AVIF"),
        (brands(b"msf1", b"avis"), "AVIF"),
        (brands(b"avif", b"mif1", b"heic"), "AVIF"),
        (brands(b"heic", b"mif1", b"avif"), "HEIF"),
        (brands(b"mif1") + b"....av01", "AVIF"),
        (brands(b"mif1"), "HEIF"),
        (brands(b"isom", b"mp42"), None),
        (b"\xff\x0a....", "JXL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n....", "JXL"),
        (b"\xff", None),
        (b"\0\0\0\x18ftyp", None),
    ],
)
def test_signatures_tell_formats(data: bytes, name: str | None) -> None:
    assert known(data) == name


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["HEIF", "JXL"])
def test_heic_and_jpeg_xl_are_decoded(kind: str, mode: str) -> None:
    data = encoded(UPRIGHT.convert(mode), kind, **({"quality": 98} if kind == "HEIF" else {"lossless": True}))
    expected = np.asarray(UPRIGHT.convert(mode).convert("RGB"))
    assert away(decode(data, SMALL), expected) <= 8
    apart = Decoder(partial(evaluation_image, transform=SMALL), 5.0)
    assert np.array_equal(apart(data), evaluation_image(data, SMALL))


@pytest.mark.parametrize(
    "size", [(60, 60), (120, 100), (80, 60), (90, 60), (160, 90), (100, 80), (120, 60), (256, 256), (1000, 7)]
)
def test_the_size_of_a_jpeg_xl_is_read_before_it_is_decoded(size: tuple[int, int]) -> None:
    data = encoded(UPRIGHT.resize(size), "JXL", lossless=True)
    assert decode(data, SMALL).shape == (size[1], size[0], 3)
    few = Transform(size=28, resize=32, max_pixels=1000)
    with pytest.raises(UndecodableImage, match=rf"^too_large: {size[0]} x {size[1]} pixels"):
        decode(data[:40], few)  # no decoder could tell from these


def test_a_heic_of_too_many_pixels_is_not_decoded() -> None:
    data = encoded(UPRIGHT.resize((300, 200)), "HEIF")
    with pytest.raises(UndecodableImage, match=r"^too_large: 300 x 200 pixels"):
        decode(data, Transform(size=28, resize=32, max_pixels=59_999))


@pytest.mark.parametrize("kind", ["HEIF", "JXL", "JXL in boxes"])
def test_damaged_heic_and_jpeg_xl_end_nothing(kind: str) -> None:
    options = {"use_container": True} if kind == "JXL in boxes" else {}
    whole, rng = encoded(UPRIGHT, kind[:4].strip(), **options), random.Random(0)
    decoder, seen = Decoder(partial(evaluation_image, transform=SMALL), 2.0), set()
    for turn in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 12)):
            damaged[rng.randrange(4, len(damaged))] = rng.randrange(256)
        if turn % 4 == 0:
            damaged = damaged[: rng.randrange(16, len(damaged))]
        try:
            assert decoder(bytes(damaged)).shape == (3, 28, 28)
            seen.add("decoded")
        except UndecodableImage as error:
            seen.add(error.reason)
    assert seen <= {"decoded", *REASONS}
    assert "decode_error" in seen or "truncated" in seen
    assert decoder(whole).shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("kind", "plugin", "said"), [("HEIF", "pillow_heif", "HEIC"), ("JXL", "pillow_jxl", "JPEG XL")]
)
def test_without_the_plugin_a_file_says_what_to_install(kind: str, plugin: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(encoded(UPRIGHT, kind))
    code = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from models.config import Transform; from models.inputs.image import UndecodableImage, evaluation_image\n"
        "try: evaluation_image(open(sys.argv[2], 'rb').read(), Transform(size=28, resize=32))\n"
        "except UndecodableImage as error: print(error)"
    )
    done = in_a_process(code, plugin, str(tmp_path / "image"))
    assert done.stdout == f"needs_plugin: {said}, which needs a plug-in: pip install 'tophat[formats]'\n"
    assert done.stderr == ""


def in_a_process(code: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """A program in a process of its own, that has imported nothing yet."""
    command = [sys.executable, "-c", code, *words]
    folder = Path(__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=folder)


def test_plugins_are_imported_by_the_first_image_that_needs_them(tmp_path: Path) -> None:
    code = (
        "import sys; from models.config import Transform; from models.inputs.image import evaluation_image\n"
        "evaluation_image(open(sys.argv[1], 'rb').read(), Transform(size=28, resize=32))\n"
        "print([name for name in ('pillow_heif', 'pillow_jxl') if name in sys.modules])"
    )
    (tmp_path / "image").write_bytes(JPEG)
    assert in_a_process(code, str(tmp_path / "image")).stdout == "[]\n"


def test_decoders_say_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    damaged = bytearray(FILES["TIFF, LZW"](UPRIGHT, b""))
    damaged[100:900] = random.Random(0).randbytes(800)
    decoder = Decoder(partial(evaluation_image, transform=SMALL), 2.0)
    with pytest.raises(UndecodableImage, match=r"^decode_error"):
        decoder(bytes(damaged))
    assert capfd.readouterr() == ("", "")


def test_planes_that_pillow_takes_for_others_are_refused() -> None:
    """A TIFF of 16 bits whose channels are one after the other, not compressed: 9 x 7 pixels."""
    width, height = 9, 7
    plane = width * height * 2
    at = 8 + 2 + 10 * 12 + 4
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 3, at + 6), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 3, at + 18), (284, 3, 1, 2)]
    head = struct.pack("<2sHIH", b"II", 42, 8, 10) + b"".join(struct.pack("<HHII", *one) for one in entries) + bytes(4)
    first = at + 30
    places = struct.pack("<3H3I3I", 16, 16, 16, *(first + i * plane for i in range(3)), *[plane] * 3)
    with pytest.raises(UndecodableImage, match="separate planes of 16 bits that are not compressed"):
        decode(head + places + bytes(3 * plane), SMALL)


def test_a_bmp_whose_alpha_nobody_set_is_not_white() -> None:
    pixels = bytes([10, 40, 200, 0]) * 63
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    header = struct.pack("<IiiHHIIiiII", 108, 9, 7, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    file = struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels
    assert decode(file, SMALL)[0, 0].tolist() == [200, 40, 10]
