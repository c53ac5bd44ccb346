"""What a file's name says of its content. Reading has the last word: what is no image becomes a reject, and is counted."""

import re

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".apng",
    ".webp",
    ".gif",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".avif",
    ".heic",
    ".heif",
    ".hif",
    ".heics",
    ".heifs",
    ".jxl",
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
PARQUET_SUFFIX = ".parquet"
IMAGE_COLUMN = "image"
"""Parquet: the column of images where nobody names one and a file has it."""

_IMAGE = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?:[?:;&!].*)?", re.IGNORECASE | re.DOTALL)
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_]{0,15}", re.IGNORECASE)


def split_image(name: str) -> tuple[str, str] | None:
    """The name of an image without its suffix, and that suffix in lower case: `a` and `.jpg` of `a.JPG` and, as downloads leave it, of
    `a.jpg?size=large`; None of other files."""
    folder, slash, base = name.rpartition("/")
    for place in (i for i, c in enumerate(base) if c == "."):
        if found := _IMAGE.fullmatch(base, place):
            return folder + slash + base[:place], found[1].lower()
    return None


def image_suffix(name: str) -> str | None:
    """The second of what `split_image` returns."""
    found = split_image(name)
    return found and found[1]


def is_bare(name: str) -> bool:
    """Whether a name says nothing of its content: it has no suffix that begins with a letter (`0001`, `clip.000001`, `a.jpg.1`)."""
    return image_suffix(name) is None and not suffix(name)


def suffix(name: str) -> str:
    """What a name ends with from its last dot on, in lower case; empty where that is no suffix."""
    base = name.rpartition("/")[2]
    start = base.rfind(".")
    return base[start:].lower() if start > 0 and _SUFFIX.fullmatch(base, start) else ""


def stem(path: str) -> str:
    """A path up to the last dot of its name: what the files of one sample share."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def is_tar(name: str) -> bool:
    """Whether a name ends as those of the tars that are read do."""
    return name.lower().endswith(TAR_SUFFIXES)


def is_parquet(name: str) -> bool:
    """Whether a name ends as a Parquet file's does."""
    return name.lower().endswith(PARQUET_SUFFIX)
