"""`tophat ingest`: any source of images into shuffled shards, on a disk or in an object store.

Bytes are copied as they are, but for large images where smaller ones are asked for: what cannot be decoded is found, and recorded, by
scoring. What has no bytes is counted here.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cluster import storage
from cluster.errors import SourceError, one_line
from cluster.progress import SILENT, Progress
from models.inputs.decoding import Decoder
from models.inputs.image import DECODE_SECONDS, UndecodableImage, reduced
from pipeline.data import writers
from pipeline.data.rejects import counted
from pipeline.data.shards import Label, Row, Shard, ShardError
from pipeline.data.sources import ImageSource
from pipeline.data.writers import Sample, ShardLayout

LANES = 16
IMAGES_PER_SHARD = 1000
REPORT_SECONDS = 0.5
VERSION = 2


@dataclass(frozen=True)
class Ingested:
    """Shards that are complete.

    Attributes:
        uri: their folder.
        images: images in them.
        shards: how many there are.
        bytes: their size.
        labeled: images with a label.
        resized: images that were made smaller; None where nobody asked for that.
        broken: images that could not be decoded to make them smaller, and were copied as they are.
        left_out: rows of the source that are no image or could not be read, by reason.
        classes: class names, where the source knows them.
        unreadable: shards of the source that broke off, with the reason; their rows before that were copied.
        fresh: whether this call wrote them (False: they were there).
    """

    uri: str
    images: int
    shards: int
    bytes: int
    labeled: int
    resized: int | None
    broken: int
    left_out: dict[str, int]
    classes: tuple[str, ...] | None
    unreadable: tuple[tuple[str, str], ...]
    fresh: bool


def ingest(
    source: ImageSource,
    out_uri: str,
    *,
    layout: ShardLayout = "webdataset",
    images_per_shard: int = IMAGES_PER_SHARD,
    seed: int = 0,
    resize: int | None = None,
    progress: Progress = SILENT,
) -> Ingested:
    """Copies every image of a source, shuffled, into shards named `shard-000000`, `shard-000001`, ...

    The shuffle takes rows in turn from 16 shards at a time, drawn at random, and permutes each new shard: complete for image
    folders, whose virtual shards are mixed over all folders, and partial for a source in few large shards sorted by class.
    The result depends on the source and on these arguments alone. Memory: one new shard.

    Args:
        source: from `open_source`.
        out_uri: an empty or new folder, or one that an equal call has begun or completed.
        layout: of the new shards.
        images_per_shard: images in each new shard but the last.
        seed: of the shuffle.
        resize: pixels of the shorter side, which no image shall exceed: larger ones are decoded and encoded again (`models.inputs.image.reduced`).
            Those that cannot be decoded stay as they are.
        progress: gets the number of images that were read, and of all images, where each is a file of its own.

    Raises:
        RunError: the folder holds something else, or lies inside the source.
        SourceError: the source has no image, or labels that do not fit one column.
        StorageError: the store refuses.
    """
    out = storage.absolute(out_uri)
    source.check_outside("--out", out_uri)
    identity = {
        "version": VERSION,
        "source": source.fingerprint(),
        "layout": layout,
        "images_per_shard": images_per_shard,
        "seed": seed,
        **({} if resize is None else {"resize": resize}),
    }
    classes = source.reader.class_names
    record = writers.completed("--out", out, identity)
    fresh = record is None
    if record is None:
        writers.begin("--out", out, identity)
        broken: list[tuple[str, str]] = []
        files = [len(shard.files) for shard in source.shards()]
        counter = _Counter(progress, sum(files) if all(files) else None)
        resizer = None if resize is None else _Resizer(resize)
        samples = _shuffled(source, images_per_shard, np.random.default_rng(seed), broken, counter, resizer)
        try:
            done = writers.write_shards(
                out, samples, layout=layout, images_per_shard=images_per_shard, class_names=classes
            )
        except SourceError:  # another attempt will not go better, and one with other options may
            writers.abandon(out)
            raise
        record = {"images": done.images, "shards": done.shards, "bytes": done.bytes}
        if not done.images:
            writers.abandon(out)
            told = f"; {counted(counter.left_out)}" if counter.left_out else ""
            first = f"; {broken[0][0]}: {broken[0][1]}" if broken else ""
            rule = one_line(f"holds no image that can be copied{told}{first}")
            raise SourceError("SOURCE", source.reader.root, rule, "look at the files, or name another source")
        record |= {"labeled": counter.labeled, "left_out": counter.left_out, "unreadable": broken}
        record |= {} if resizer is None else {"resized": resizer.resized, "broken": resizer.broken}
        writers.finish(out, identity, record)
    return Ingested(
        out,
        images=record["images"],
        shards=record["shards"],
        bytes=record["bytes"],
        labeled=record["labeled"],
        resized=record.get("resized"),
        broken=record.get("broken", 0),
        left_out=record["left_out"],
        classes=classes,
        unreadable=tuple((shard, reason) for shard, reason in record["unreadable"]),
        fresh=fresh,
    )


class _Counter:
    """Counts rows as they are read, keeps those with an image, and tells the progress now and then; `total` is None where nobody knows it."""

    def __init__(self, progress: Progress, total: int | None) -> None:
        self.labeled = 0
        self.left_out: dict[str, int] = {}
        self._progress = progress
        self._total = total

    def count(self, rows: Iterator[tuple[Shard, Row]]) -> Iterator[tuple[Shard, Row]]:
        done, told = 0, 0.0
        for done, (shard, row) in enumerate(rows, 1):
            if time.monotonic() - told > REPORT_SECONDS:
                self._progress.update(done, total=self._total)
                told = time.monotonic()
            if row.problem is not None:
                self.left_out[row.reason] = self.left_out.get(row.reason, 0) + 1
                continue
            self.labeled += row.label is not None
            yield shard, row
        self._progress.update(done, total=done)


def _shuffled(
    source: ImageSource,
    images_per_shard: int,
    random: np.random.Generator,
    broken: list[tuple[str, str]],
    counter: _Counter,
    resizer: "_Resizer | None",
) -> Iterator[Sample]:
    shards = source.shards()
    order = (shards[i] for i in random.permutation(len(shards)))
    names = {name: number for number, name in enumerate(source.reader.class_names or ())}
    rows = counter.count(_in_turn(source, order, broken, resizer))
    while batch := list(itertools.islice(rows, images_per_shard)):
        for i in random.permutation(len(batch)):
            shard, row = batch[i]
            yield _sample(shard, row, names)


def _reduced(data: bytes, shorter: int) -> NDArray[np.uint8]:
    """The bytes of `reduced`, in the form that a `Decoder` gives."""
    return np.frombuffer(reduced(data, shorter), np.uint8)


class _Resizer:
    """Makes images smaller, for any number of threads at once, and counts those."""

    def __init__(self, shorter: int) -> None:
        self.resized = self.broken = 0
        self._reduce = partial(_reduced, shorter=shorter)
        self._lock = threading.Lock()
        self._own = threading.local()

    def __call__(self, row: Row) -> Row:
        if row.problem is not None:
            return row
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder(self._reduce, DECODE_SECONDS)
        try:
            data = self._own.decoder(row.data).tobytes()
        except UndecodableImage:  # copied as it is, for scoring to tell what is wrong with it
            with self._lock:
                self.broken += 1
            return row
        with self._lock:
            self.resized += data != row.data
        return replace(row, data=data)


def _in_turn(
    source: ImageSource, order: Iterator[Shard], broken: list[tuple[str, str]], resizer: _Resizer | None
) -> Iterator[tuple[Shard, Row]]:
    """One row of each of up to `LANES` open shards, again and again, read side by side; a finished one makes room for the next."""

    def advance(lane: tuple[Shard, Iterator[Row]]) -> Row | ShardError | None:
        try:
            row = next(lane[1], None)
            return row if row is None or resizer is None else resizer(row)
        except ShardError as error:
            return error

    with ThreadPoolExecutor(LANES) as pool:
        lanes: list[tuple[Shard, Iterator[Row]]] = []
        while True:
            lanes += [(shard, source.reader.read(shard)) for shard in itertools.islice(order, LANES - len(lanes))]
            if not lanes:
                return
            results = list(zip(lanes, pool.map(advance, lanes), strict=True))
            lanes = []
            for lane, result in results:
                if isinstance(result, Row):
                    yield lane[0], result
                    lanes.append(lane)
                elif isinstance(result, ShardError):
                    broken.append((lane[0].name, str(result)))


def _sample(shard: Shard, row: Row, names: dict[str, int]) -> Sample:
    label: Label = row.label if isinstance(row.label, int) or row.label is None else names.get(row.label, row.label)
    if shard.files:
        return Sample(row.data, label, shard.files[row.index])
    return Sample(row.data, label, shard.name, row.index)
