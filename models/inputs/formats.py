"""The formats that are decoded, what their files begin with, and the plug-ins of Pillow that some of them need."""

from functools import cache

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What Pillow decodes by itself. Its other formats run programs, read other files or are no images of the web."""

PLUGINS = {"HEIF": "HEIC", "JXL": "JPEG XL"}
"""What is decoded where `pip install 'tophat[formats]'` brought the plug-in: the format's name in Pillow, and the one that people know."""

NEEDS_PLUGIN = "needs_plugin"
"""The reason of an image that such a plug-in would decode."""

SIGNATURES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"MM\0+",
        b"II\0*",
        b"MM*\0",
    ),  # the last two are wrong, and read all the same
    "JXL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
}
"""What files of these formats begin with."""

AVIF_BRANDS = {b"avif", b"avis"}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
EITHER_BRANDS = {b"mif1", b"msf1"}
"""The brands of files that are HEIC or AVIF, as their other brands say."""


def known(data: bytes) -> str | None:
    """The format whose signature the bytes begin with, by Pillow's name, as far as a signature alone tells one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _of_brands(data)
    return next((name for name, starts in SIGNATURES.items() if data.startswith(starts)), None)


def _of_brands(data: bytes) -> str | None:
    major, size = data[8:12], min(int.from_bytes(data[:4], "big"), 512)
    others = {data[at : at + 4] for at in range(16, size, 4)}
    for brands in ({major}, others if major in EITHER_BRANDS else set[bytes]()):
        if brands & AVIF_BRANDS:
            return "AVIF"
        if brands & HEIC_BRANDS:
            return "HEIF"
    if major not in EITHER_BRANDS:
        return None
    return "AVIF" if b"av01" in data[:4096] else "HEIF"


@cache
def ready(name: str) -> bool:
    """Whether Pillow can decode `name`. A plug-in is imported (30 ms) at the first question for it: most runs never meet such an image.

    The plug-ins decode by one thread, as each image has a thread already, and give the image itself, never the small preview inside.
    """
    try:
        if name == "HEIF":
            from pillow_heif import register_heif_opener

            register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
        elif name == "JXL":
            from pillow_jxl import JpegXLImagePlugin

            JpegXLImagePlugin.DECODE_THREADS = 0
    except ImportError:
        return False
    return True
