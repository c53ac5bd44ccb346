"""What of an image file its pixels need, and nothing else.

A file's metadata (comments, color profiles, resolutions, thumbnails, positions) can be damaged, odd or as large as a bomb while its
pixels are sound. So a decoder gets a file without them: they cannot cost the image, take time or memory, or turn the pixels
behind our back. One thing is read from them, by the code here alone: the orientation.

How a photograph is turned: as the EXIF orientation says, if it is one whole number (SHORT or LONG) from 1 to 8. Where EXIF gives
none, XMP's `tiff:Orientation` counts. AVIF and HEIC are turned as their own boxes say, as their standards want it, whatever
EXIF says; so is JPEG XL, and by EXIF where its codestream does not turn it. Whatever cannot be read turns nothing.
"""

import re
import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

PROFILE = 2**18
"""Bytes that are unpacked, at most, of a compressed text that may hold an orientation: EXIF has at most 64 KiB, twice that in hex."""

TIFF_TAGS = {
    256,
    257,
    258,
    259,
    262,
    266,
    273,
    277,
    278,
    279,
    284,
    292,
    293,
    317,
    320,
    322,
    323,
    324,
    325,
    332,
    338,
    339,
    347,
    50674,
}
TIFF_TAGS |= {*range(512, 522), *range(529, 533)}
"""The tags of a TIFF that say where its pixels are and how they are stored."""


EXIF_STARTS = (b"II*\0", b"MM\0*")


class Needed(NamedTuple):
    """What a decoder gets.

    Args:
        data: the file without its metadata; the file itself where there was nothing to leave out or its structure is damaged.
        orientation: 1 to 8, as in EXIF: how the pixels are to be turned once they are decoded.
        size: width and height as decoded, for formats whose decoder cannot tell them before it decodes; else None.
    """

    data: bytes
    orientation: int = 1
    size: tuple[int, int] | None = None


def needed(data: bytes, name: str | None) -> Needed:
    """What the pixels of a file need; takes time in proportion to the file's size, whatever is in it.

    Args:
        data: the file.
        name: its format, as `formats.known` tells it.
    """
    return READERS[name](data) if name in READERS else Needed(data)


def exif_orientation(exif: bytes) -> int | None:
    """The orientation that a block of EXIF gives, 1 to 8; None where it gives none or cannot be read."""
    for _ in range(2):
        exif = exif.removeprefix(b"Exif\0\0")
    found = None
    if exif[:4] in EXIF_STARTS:
        directory = Directory(exif)
        for entry in directory.entries:
            if directory.tag(entry) == 274:
                found = directory.number(entry)
    return found if found in range(1, 9) else None


def _orientation(exif: bytes, xmp: bytes) -> int:
    turned = re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])\b", xmp)
    return exif_orientation(exif) or (int(turned[1]) if turned else 1)


class Directory:
    """The first directory of a TIFF file, or of EXIF, which has the same structure.

    Attributes:
        at: where it begins.
        entries: as many of its entries as are there.
        whole: whether these are all.
    """

    def __init__(self, tiff: bytes) -> None:
        self.order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
        big = 43 in tiff[2:4]  # BigTIFF
        self.word, size, self.counted = (8, 20, 8) if big else (4, 12, 2)
        self.at = self.read(tiff[self.word : 2 * self.word])
        start = self.at + self.counted
        count = self.read(tiff[self.at : start])
        there = min(count, max(0, len(tiff) - start) // size)
        self.entries = [tiff[at : at + size] for at in range(start, start + there * size, size)]
        self.whole = 0 < count == there

    def read(self, value: bytes) -> int:
        """A number as the file writes it."""
        return int.from_bytes(value, self.order)

    def tag(self, entry: bytes) -> int:
        """What an entry is about."""
        return self.read(entry[:2])

    def number(self, entry: bytes) -> int | None:
        """An entry's value, if it is one SHORT or LONG."""
        kind, count, value = self.read(entry[2:4]), self.read(entry[4 : 4 + self.word]), entry[4 + self.word :]
        return self.read(value[: 2 * (kind - 2)]) if kind in (3, 4) and count == 1 else None

    def outside(self, entry: bytes, tiff: bytes) -> bytes:
        """The bytes, elsewhere in the file, that an entry points to."""
        count, at = self.read(entry[4 : 4 + self.word]), self.read(entry[4 + self.word :])
        return tiff[at : at + count]

    def of(self, entries: list[bytes]) -> bytes:
        """A directory of these entries, after which there is no other."""
        return len(entries).to_bytes(self.counted, self.order) + b"".join(entries) + bytes(self.word)


def _tiff(data: bytes) -> Needed:
    directory = Directory(data)
    if not directory.whole:
        return Needed(data)
    values = {directory.tag(entry): entry for entry in directory.entries}
    turned = directory.number(values[274]) if 274 in values else None
    if turned is None or turned not in range(1, 9):
        turned = _orientation(b"", directory.outside(values[700], data) if 700 in values else b"")
    only = directory.of([entry for entry in directory.entries if directory.tag(entry) in TIFF_TAGS])
    return Needed(data[: directory.at] + only + data[directory.at + len(only) :], turned)


def _jpeg(data: bytes) -> Needed:
    """A JPEG up to its first scan without comments and application segments, but for those of JFIF and Adobe, which say its colors."""
    kept, exif, xmp, at = [data[:2]], b"", b"", 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 3:
        marker = data[at + 1]
        if marker in (0x00, 0xFF):  # what fills the space before a marker
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xD0 <= marker <= 0xDA or not at + 4 <= end <= len(data):
            break
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            if marker == 0xE1:
                if not exif and data.startswith(b"Exif\0\0", at + 4):
                    exif = data[at + 4 : end]
                elif data.startswith(b"http://ns.adobe.com/xap/1.0/\0", at + 4):
                    xmp = data[at + 4 : end]
            colors = (marker == 0xE0 and end - at >= 18 and data.startswith(b"JFIF\0", at + 4)) or (
                marker == 0xEE and end - at >= 16 and data.startswith(b"Adobe", at + 4)
            )
        else:
            colors = True
        if colors:
            kept.append(data[at:end])
        at = end
    if at < 0:
        return Needed(data)
    kept.append(data[at:])
    only = b"".join(kept)
    return Needed(data if len(only) == len(data) else only, _orientation(exif, xmp))


def _png(data: bytes) -> Needed:
    """A PNG's pixels, palette and transparency; of an animation, the still image."""
    kept, exif, profile, xmp, at = [data[:8]], b"", b"", b"", 8
    depth, color = data[24:25], data[25:26]
    while at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        spare = kind[:1].islower()  # a decoder may pass over it
        if not kind.isalpha() or (end > len(data) and not spare):
            break  # damaged, or cut off
        body = data[at + 8 : end - 4] if spare else b""
        if kind == b"tRNS":
            kept.append(_transparency(data[at:end], depth, color))
        elif kind == b"eXIf":
            exif = exif or body
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            word = body[:80].partition(b"\0")[0]
            if word == b"Raw profile type exif":
                profile = profile or _text(kind, body)
            elif word == b"XML:com.adobe.xmp":
                xmp = xmp or _text(kind, body)
        elif not spare and (kind != b"PLTE" or color == b"\3"):
            kept.append(data[at:end])
        at = len(data) if kind == b"IEND" else end  # what follows the end is no part of it
    kept.append(data[at:])
    return Needed(b"".join(kept), _orientation(exif or _profile(profile), xmp))


def _transparency(chunk: bytes, depth: bytes, color: bytes) -> bytes:
    """The chunk with a PNG's transparent colors, in values of the pixels as they are decoded; nothing, if it is damaged."""
    body, least = chunk[8:-4], {b"\0": 2, b"\2": 6, b"\3": 1}.get(color, 0)
    if (
        not least
        or len(body) < least
        or len(body) > 256
        or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big")
    ):
        return b""
    if color == b"\0" and depth in (b"\2", b"\4"):  # decoded to 8 bits
        body = (int.from_bytes(body[:2], "big") * 255 // (2 ** depth[0] - 1)).to_bytes(3, "big")[-2:]
    elif color == b"\2" and depth == b"\x10":  # decoded to the upper 8 bits
        body = bytes((0, body[0], 0, body[2], 0, body[4]))
    return len(body).to_bytes(4, "big") + b"tRNS" + body + zlib.crc32(b"tRNS" + body).to_bytes(4, "big")


def _text(kind: bytes, body: bytes) -> bytes:
    """The text of a PNG's chunk, as far as it is within the limit; empty if it cannot be unpacked."""
    text = body.partition(b"\0")[2]
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, text = text[:1] == b"\1", b"".join(text[2:].split(b"\0", 2)[2:])
    elif packed:
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, PROFILE) if packed else text[:PROFILE]
    except zlib.error:
        return b""


def _profile(text: bytes) -> bytes:
    """The block that ImageMagick writes as hexadecimal digits after a name and a length, each on a line of its own."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _webp(data: bytes) -> Needed:
    kept, exif, xmp, at = [], b"", b"", 12
    stop = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= stop:
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body, end = data[at + 8 : at + 8 + size], at + 8 + size + size % 2
        if kind == b"EXIF":
            exif = exif or body
        elif kind == b"XMP ":
            xmp = xmp or body
        elif kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            if len(body) < size:
                return Needed(data)  # cut off
            if kind == b"VP8X":  # whose first byte says what metadata there is
                body = bytes((body[0] & ~0x2C,)) + body[1:] if body else body
            kept.append(kind + data[at + 4 : at + 8] + body + bytes(size % 2))
        at = end
    only = b"WEBP" + b"".join(kept)
    return Needed(b"RIFF" + len(only).to_bytes(4, "little") + only, _orientation(exif, xmp))


def _gif(data: bytes) -> Needed:
    """A GIF whose first image follows its palette, with only what says how that image is shown between them."""
    if len(data) < 13:
        return Needed(data)
    at = 13 + (6 << (data[10] & 7) if data[10] & 0x80 else 0)
    kept = [data[:at]]
    while data[at : at + 1] == b"!":
        start, end = at, at + 2
        while size := int.from_bytes(data[end : end + 1]):
            end += size + 1
        if end >= len(data):
            return Needed(data)  # cut off
        at = end + 1
        if data[start + 1] == 0xF9 and data[start + 2] >= 4:
            kept.append(data[start:at])
    return Needed(b"".join((*kept, data[at:])))


def _heif(data: bytes) -> Needed:
    """An AVIF or HEIC file whose items of EXIF have a name that no decoder knows."""
    return Needed(re.sub(rb"(infe[\2\3]\0\0[\0\1].{4,6})Exif", rb"\1none", data, flags=re.DOTALL))


def _jxl(data: bytes) -> Needed:
    """The codestream of a JPEG XL file."""
    exif, found, at = b"", [data], 0
    if not data.startswith(b"\xff\x0a"):
        found = []
        while at + 8 <= len(data):
            length, kind, body = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
            if length == 1:
                length, body = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
            end = at + length if length else len(data)
            if end < body:
                break
            if kind == b"jxlc":
                found.append(data[body:end])
            elif kind == b"jxlp":
                found.append(data[body + 4 : end])
            elif kind == b"Exif":
                block = data[body:end]  # which begins with a number of 4 bytes, as the standard says, or does not
                exif = exif or (block if block[:4] in EXIF_STARTS else block[4:])
            at = end
    codestream = b"".join(found)
    size, turned = _jxl_header(codestream)
    return Needed(codestream, 1 if turned != 1 else _orientation(exif, b""), size)


def _jxl_header(codestream: bytes) -> tuple[tuple[int, int], int]:
    """Size as decoded, and the orientation that the decoder follows by itself."""
    bits = int.from_bytes(codestream[2:18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = take(3)
    across, down = ((0, 0), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    width = height * across // down if ratio else side()
    turned = 1 if take(1) or not take(1) else take(3) + 1  # everything by default, or no extra fields
    return ((height, width) if turned > 4 else (width, height)), turned


READERS: dict[str | None, Callable[[bytes], Needed]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "TIFF": _tiff,
    "AVIF": _heif,
    "HEIF": _heif,
    "JXL": _jxl,
}
