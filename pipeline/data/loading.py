"""Training data: labeled images of a source, in an order that is a pure function of the seed and the position.

Every epoch visits each image once. The shards are permuted and laid on a ring that is cut into one arc per worker; a worker reads its arc
sequentially, in windows whose images are permuted in memory. So a training that was interrupted goes on at the exact image by skipping
whole windows without reading them.
"""

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from cluster import storage
from cluster.errors import StageError, one_line
from models.config import Transform
from pipeline.data.reader import Reader
from pipeline.data.shards import Label, Row, Shard, ShardError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Integers = npt.NDArray[np.int64]

WINDOW_IMAGES = 4096
CACHE_BYTES = 256 * 2**20
AHEAD_BATCHES = 4


@dataclass(frozen=True)
class Piece:
    """A run of consecutive positions of one shard: `[start, stop)` among its usable images."""

    shard: int
    start: int
    stop: int


def arc(counts: Integers, *, seed: int, epoch: int, rank: int, world: int) -> list[Piece]:
    """What one worker reads in one epoch, in order.

    Args:
        counts: int64 [shards], usable images of each shard.
        seed: of the whole training.
        epoch: 0-based.
        rank: the worker, from 0 to `world` - 1.
        world: the number of workers.

    Returns:
        Pieces that hold `sum(counts) // world` images. Over the ranks they are disjoint; the `sum(counts) % world` images that are left
        over differ from epoch to epoch.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(counts))
    total = int(counts.sum())
    share = total // world
    # The ring is turned by a random offset, so that a worker's arc is not always the same part of a single shard.
    first = (int(draw.integers(total)) + rank * share) % total
    return _cut(order, counts, first, min(first + share, total)) + _cut(order, counts, 0, max(0, first + share - total))


def _cut(order: npt.NDArray[Any], counts: Integers, begin: int, end: int) -> list[Piece]:
    """The pieces between two positions of the shards laid end to end in `order`."""
    ends = np.cumsum(counts[order])
    slot = int(np.searchsorted(ends, begin, side="right"))
    pieces = []
    while begin < end:
        base = int(ends[slot]) - int(counts[order[slot]])
        stop = min(end, int(ends[slot]))
        if stop > begin:
            pieces.append(Piece(int(order[slot]), begin - base, stop - base))
        begin, slot = stop, slot + 1
    return pieces


def windows(pieces: Sequence[Piece], size: int) -> list[list[Piece]]:
    """The pieces cut into groups of `size` images; the last may be smaller."""
    groups: list[list[Piece]] = [[]]
    room = size
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + room)
            groups[-1].append(Piece(piece.shard, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                groups.append([])
                room = size
    return groups if groups[-1] else groups[:-1]


@dataclass(frozen=True)
class TrainingSet:
    """Labeled images, as `models.training.launch` reads them.

    Attributes:
        reader: of the source.
        shards: those that hold usable images.
        rows: per shard, int64 [n], ascending indices of its usable images; one that repeats counts as often.
        class_ids: the network's output for each label, of the source or of `labels`.
        labels: per shard, int64 [n], the label of each of `rows`, in place of the source's own; None where those are used.
    """

    reader: Reader
    shards: tuple[Shard, ...]
    rows: tuple[Integers, ...]
    class_ids: dict[Label, int]
    labels: tuple[Integers, ...] | None = None

    @property
    def images(self) -> int:
        """Images in one epoch; one that has several labels counts once for each."""
        return sum(len(rows) for rows in self.rows)

    def training_batches(
        self, transform: Transform, *, batch_size: int, rank: int, world: int, seed: int, start: int
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Endless batches, epoch after epoch.

        Args:
            transform: of the network.
            batch_size: images per batch.
            rank: this worker.
            world: the number of workers.
            seed: of order and augmentation.
            start: images already seen over all workers; the first batch is the one that would come next.

        Returns:
            Iterator of uint8 [N, 3, size, size] and int64 [N].

        Raises:
            StageError: there are fewer images than workers, or an image that was good before is not.
        """
        from models.inputs.image import training_image

        def decode(item: tuple[Row, Shard, int]) -> npt.NDArray[np.uint8]:
            row, shard, image_seed = item
            return _decoded(row, shard, lambda data: training_image(data, transform, random.Random(image_seed)))

        items = self._training_items(rank, world, seed, start // world)
        return self._batches(items, batch_size, decode)

    def evaluation_batches(
        self, transform: Transform, *, batch_size: int, rank: int, world: int
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Each image once over all workers, undistorted, in order.

        Returns:
            Iterator of uint8 [N, 3, size, size] and int64 [N]; the last batch may be smaller.
        """
        from models.inputs.image import evaluation_image

        def decode(item: tuple[Row, Shard, int]) -> npt.NDArray[np.uint8]:
            row, shard, _ = item
            return _decoded(row, shard, lambda data: evaluation_image(data, transform))

        bounds = np.linspace(0, self.images, world + 1).round().astype(np.int64)
        pieces = _cut(np.arange(len(self.rows)), self._counts, int(bounds[rank]), int(bounds[rank + 1]))
        items = ((row, shard, 0) for piece in pieces for row, shard in self._read(piece, None))
        return self._batches(items, batch_size, decode)

    def decoded(
        self, shard: int, transforms: Sequence[Transform]
    ) -> Iterator[tuple[int, int, list[npt.NDArray[np.uint8]]]]:
        """The images of a shard, undistorted, in order.

        Args:
            shard: its place in `shards`.
            transforms: the ways to decode.

        Returns:
            Iterator of an image's index in the shard, its class, and uint8 [3, size, size] for each of the transforms.

        Raises:
            StageError: an image that was good before is not.
        """
        from models.inputs.image import evaluation_image

        for row in self._rows_of(shard, 0, len(self.rows[shard])):
            images = [
                _decoded(row, self.shards[shard], partial(evaluation_image, transform=transform))
                for transform in transforms
            ]
            yield row.index, self.class_ids[row.label], images

    @property
    def _counts(self) -> Integers:
        return np.array([len(rows) for rows in self.rows], np.int64)

    def _training_items(self, rank: int, world: int, seed: int, position: int) -> Iterator[tuple[Row, Shard, int]]:
        share = self.images // world
        if share == 0:
            raise StageError(f"{self.images} labeled images are too few for {world} workers")
        cache: dict[int, list[Row]] | None = {} if sum(s.size for s in self.shards) <= CACHE_BYTES else None
        epoch, offset = divmod(position, share)
        while True:
            groups = windows(arc(self._counts, seed=seed, epoch=epoch, rank=rank, world=world), WINDOW_IMAGES)
            for number, group in enumerate(groups):
                size = sum(piece.stop - piece.start for piece in group)
                if offset >= size:
                    offset -= size
                    continue
                draw = np.random.default_rng([seed, epoch, rank, number])
                order, seeds = draw.permutation(size), draw.integers(2**31, size=size)
                rows = [item for piece in group for item in self._read(piece, cache)]
                for place in order[offset:]:
                    # An image's augmentation has a seed of its own, so that it does not depend on where a training resumed.
                    yield *rows[place], int(seeds[place])
                offset = 0
            epoch += 1

    def _read(self, piece: Piece, cache: dict[int, list[Row]] | None) -> Iterator[tuple[Row, Shard]]:
        shard = self.shards[piece.shard]
        if cache is not None:
            if piece.shard not in cache:
                cache[piece.shard] = list(self._rows_of(piece.shard, 0, len(self.rows[piece.shard])))
            rows: Iterable[Row] = cache[piece.shard][piece.start : piece.stop]
        else:
            rows = self._rows_of(piece.shard, piece.start, piece.stop)
        for row in rows:
            yield row, shard

    def _rows_of(self, number: int, start: int, stop: int) -> Iterator[Row]:
        shard, wanted = self.shards[number], self.rows[number][start:stop]
        labels = None if self.labels is None else self.labels[number][start:stop].tolist()
        count = 0
        try:
            for row in self.reader.read(shard, wanted.tolist()):
                first, last = np.searchsorted(wanted, [row.index, row.index + 1])
                for place in range(first, last):
                    count += 1
                    yield row if labels is None else replace(row, label=labels[place])
        except ShardError as error:
            raise StageError(f"shard {shard.name} of {self.reader.root} cannot be read any more: {error}") from None
        if count != len(wanted):
            raise StageError(
                f"shard {shard.name} of {self.reader.root} changed: it has {count} of {len(wanted)} images"
            )

    def _batches(
        self,
        items: Iterator[tuple[Row, Shard, int]],
        batch_size: int,
        decode: Callable[[tuple[Row, Shard, int]], npt.NDArray[np.uint8]],
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        import torch

        def batches() -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
            while chunk := list(islice(items, batch_size)):
                labels = [self.class_ids[row.label] for row, _, _ in chunk]
                yield torch.from_numpy(np.stack([decode(item) for item in chunk])), torch.tensor(labels)

        # Where the network computes on the cores that decode, a thread of its own would only make the two wait for each other.
        return ahead(batches(), AHEAD_BATCHES) if torch.cuda.is_available() else batches()


def dhat_training_set(uri: str, classes: int, quotas: Sequence[int] | None = None) -> TrainingSet:
    """D-hat as training data: every image of its shards, labeled by class number (section 3.2).

    Args:
        uri: the folder of D-hat's Parquet shards.
        classes: how many there are.
        quotas: only so many of each class, the best-ranked ones [classes]: the D-hat of a smaller K.
    """
    import pyarrow.parquet as pq

    most = None if quotas is None else np.array(quotas, np.int64)

    def rows(entry: storage.FileEntry) -> Integers:
        with storage.open_input(storage.join(uri, entry.path)) as file:
            if most is None:
                return np.arange(pq.read_metadata(file).num_rows)
            table = pq.read_table(file, columns=["label", "rank"])
            return np.flatnonzero(table["rank"].to_numpy() < most[table["label"].to_numpy()])

    files = storage.list_files(uri, ".parquet")
    with ThreadPoolExecutor(max_workers=16) as pool:
        counts = tuple(pool.map(rows, files))
    shards = tuple(Shard(f.path, f.size, f.etag) for f in files)
    return TrainingSet(Reader(uri, "parquet"), shards, counts, {number: number for number in range(classes)})


def _decoded(row: Row, shard: Shard, decode: Callable[[bytes], npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    from models.inputs.image import UndecodableImage

    try:
        return decode(row.image)
    except UndecodableImage as error:
        raise StageError(
            one_line(f"image {row.index} of {shard.name} could be decoded before and cannot now: {error}")
        ) from None


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made by a thread that keeps up to `depth` of them ready."""
    ready: Queue[tuple[str, Any]] = Queue(maxsize=depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.2)
                return True
            except Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
