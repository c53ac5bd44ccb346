"""Ranges: what is scored together and has one file, what their files are called, and how they are read and decoded.

A range holds a fixed number of rows (`range_rows`). A shard with more rows is cut into several ranges; smaller shards that follow each
other share one, whole, as long as they fit. The files that ranges have in a score table are the ledger of what is done. A range without
one is read again, and nothing else keeps track.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster import storage
from cluster.tasks import told_errors
from models.config import Transform
from pipeline.data.reader import Reader
from pipeline.data.rejects import Reject
from pipeline.data.shards import ChangedShardError, MissingShardError, Row, Shard, ShardError, shard_table, shards_of

if TYPE_CHECKING:
    import ray

    from models.inputs.decoding import Decoder

TASK_BYTES = 64 * 2**20
"""Encoded bytes that one task reads, at most, unless there would be more than `MAX_TASKS` of them."""
MIN_TASK_BYTES = 2**20
"""Encoded bytes that are worth a task."""
TASKS_PER_READER = 8
"""Tasks for each reader, at least, so that the readers end at about the same time."""
MAX_TASKS = 2_000
"""Enough for a thousand readers, and few enough to plan in a second."""
_RANGE_FILE = re.compile(
    r"(?P<shard>.+)/(?P<start>\d{8,})-(?P<stop>\d{8,})(?P<last>-last|-(?P<shards>\d+)-shards)?\.parquet", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive rows `[start, stop)` of a shard, or whole shards that follow each other in the source's listing.

    Attributes:
        shard: the first one, where there are several.
        start: 0, where there are several.
        stop: where there are several, how many images they hold together.
        last: whether the shard, or the last one, ends here.
        shards: how many there are.
    """

    shard: str
    start: int
    stop: int
    last: bool
    shards: int = 1

    @property
    def file(self) -> str:
        """Name of its file, under the folder of the score table."""
        end = f"-{self.shards}-shards" if self.shards > 1 else "-last" if self.last else ""
        return f"{_folder(self.shard)}/{self.start:08d}-{self.stop:08d}{end}.parquet"

    @classmethod
    def of_file(cls, path: str) -> "Range | None":
        """The range whose file has this name; None for other files."""
        match = _RANGE_FILE.fullmatch(path)
        if match is None:
            return None
        return cls(
            unquote(match["shard"], errors="surrogateescape"),
            int(match["start"]),
            int(match["stop"]),
            match["last"] is not None,
            int(match["shards"] or 1),
        )


def _folder(shard: str) -> str:
    """A folder's path for a shard's name: that name, with what a file system or a reader of folders would take amiss escaped."""
    printable = "".join(
        c if c.isprintable() and c != "%" else quote(c, safe="", errors="surrogateescape")
        for c in shard.replace("//", "/\0/")
    ).replace("/%00/", "/%2F")
    return f"%5F{printable[1:]}" if printable.startswith("_") else printable


def ledger(scores_uri: str) -> dict[str, list[Range]]:
    """The published ranges of every shard, in row order; of several shards, those of the first."""
    found: dict[str, list[Range]] = {}
    for entry in storage.list_files(scores_uri, ".parquet"):
        published = Range.of_file(entry.path)
        if published is not None:
            found.setdefault(published.shard, []).append(published)
    for ranges in found.values():
        ranges.sort(key=lambda r: (r.start, r.stop))
    return found


def complete(ranges: Sequence[Range]) -> bool:
    """Whether ranges in row order cover a whole shard: from row 0, without a gap or an overlap, to its last row."""
    starts = [r.start for r in ranges]
    return (
        bool(ranges)
        and starts == [0, *(r.stop for r in ranges[:-1])]
        and [r.last for r in ranges] == [False] * (len(ranges) - 1) + [True]
    )


def range_rows(transform: Transform, range_bytes: int, batch: int) -> int:
    """Rows of a full range: as many whole batches as `range_bytes` of decoded images (uint8, 3 channels) hold, and at least one."""
    return batch * max(1, range_bytes // (3 * transform.size**2 * batch))


def finished(shards: Sequence[Shard], done: Mapping[str, Sequence[Range]]) -> list[bool]:
    """Of every shard, whether ranges cover it.

    Args:
        shards: the source's listing, all of it.
        done: the ledger.
    """
    found: list[bool] = []
    followers = 0  # shards to come that a range of several shards has
    for shard in shards:
        ranges = done.get(shard.name, ())
        found.append(followers > 0 or complete(ranges))
        followers = max([followers - 1, 0, *(r.shards - 1 for r in ranges)])
    return found


def surplus(shards: Sequence[Shard], done: Mapping[str, Sequence[Range]]) -> list[Range]:
    """Ranges with rows that ranges before them have too, or beyond the end that those saw: what a process that outlived its scoring
    published beside the next one's.

    Args:
        shards: the source's listing, all of it.
        done: the ledger.
    """
    found: list[Range] = []
    followers = 0
    for shard in shards:
        position = None if followers else 0  # where the shard goes on; None where it has ended
        followers = max(followers - 1, 0)
        for published in done.get(shard.name, ()):
            if position is None or published.start < position:
                found.append(published)
            else:
                position = None if published.last else published.stop
                followers = published.shards - 1
    return found


@dataclass(frozen=True)
class Unfinished:
    """The shards that a scoring has to read: one object that every reader shares, so that a hundred thousand shards cost each task nothing.

    Attributes:
        shards: from `shard_table`, with the `ordinal` of each in the source's listing.
        done: the published ranges of those that are scored in part.
    """

    shards: pa.Table
    done: Mapping[str, Sequence[Range]]

    @classmethod
    def of(cls, shards: Sequence[Shard], done: Mapping[str, Sequence[Range]]) -> "Unfinished":
        """Those of a listing, all of it, whose ranges do not cover them."""
        missing = [n for n, is_finished in enumerate(finished(shards, done)) if not is_finished]
        table = shard_table(shards[n] for n in missing).append_column("ordinal", pa.array(missing, pa.int64()))
        return cls(table, {shards[n].name: tuple(done[shards[n].name]) for n in missing if shards[n].name in done})

    def tasks(self, readers: int) -> list[dict[str, int]]:
        """The rows of the table, dealt to tasks of about equal encoded bytes: `start` and `stop` of each.

        Args:
            readers: tasks that run at once.
        """
        sizes: list[int] = self.shards["size"].to_pylist()
        total = sum(sizes)
        share = max(total / min(max(TASKS_PER_READER * readers, total // TASK_BYTES), MAX_TASKS), MIN_TASK_BYTES)
        dealt: list[dict[str, int]] = []
        start = bytes_in_task = 0
        for stop, size in enumerate(sizes, 1):
            bytes_in_task += size
            if bytes_in_task >= share or stop == len(sizes):
                dealt.append({"start": start, "stop": stop})
                start, bytes_in_task = stop, 0
        return dealt


class RangeReader:
    """Reads and decodes shards: a row per range.

    Args:
        reader: of the source.
        transform: what the model takes in.
        rows: of a full range.
        decode_seconds: CPU time that one image may take.
        unfinished: refers to an `Unfinished`.
    """

    def __init__(
        self,
        reader: Reader,
        transform: Transform,
        rows: int,
        decode_seconds: float,
        unfinished: "ray.ObjectRef[Unfinished] | None" = None,
    ) -> None:
        self._reader = reader
        self._transform = transform
        self._rows = rows
        self._decode_seconds = decode_seconds
        self._unfinished = unfinished

    def __call__(self, tasks: pa.Table) -> Iterator[pa.Table]:
        """Every range of some of `Unfinished.tasks`."""
        import ray

        assert self._unfinished is not None
        unfinished: Unfinished = ray.get(self._unfinished)
        for task in tasks.to_pylist():
            table = unfinished.shards.slice(task["start"], task["stop"] - task["start"])
            shards = zip(table["ordinal"].to_pylist(), shards_of(table), strict=True)
            with told_errors():
                yield from _timed(self.ranges(shards, unfinished.done))

    @cached_property
    def _decoder(self) -> "Decoder":
        from models.inputs.decoding import Decoder
        from models.inputs.image import evaluation_image

        seconds = self._decode_seconds
        return Decoder(partial(evaluation_image, transform=self._transform, seconds=seconds), seconds)

    def ranges(self, shards: Iterable[tuple[int, Shard]], done: Mapping[str, Sequence[Range]]) -> Iterator[pa.Table]:
        """The ranges of shards that have no file, each a table of one row.

        Args:
            shards: of the reader's source, with their ordinals in its listing, ascending.
            done: their published ranges, in row order.

        Raises:
            StorageError: the store is out of reach, or refuses.
        """
        held: list[_Decoded] = []  # whole shards that follow each other
        rows, before = 0, -1
        for ordinal, shard in shards:
            if held and ordinal != before + 1:
                yield _table(held)
            before = ordinal
            for one in self._decoded(shard, done.get(shard.name, ())):
                if held and not (one.whole and rows + one.rows <= self._rows):
                    yield _table(held)
                rows = rows + one.rows if held else one.rows
                held.append(one)
                if not one.whole:
                    yield _table(held)
                del one  # or its images would stay while the next ones are decoded
        if held:
            yield _table(held)

    def _decoded(self, shard: Shard, covered: Sequence[Range]) -> Iterator["_Decoded"]:
        """The rows of one shard that no range covers, in order, in runs of at most a full range.

        What comes last is marked so even when it is empty: only then the shard is complete. A shard that is missing or has changed is not:
        the next attempt reads it again.
        """
        pending: _Decoded | None = None
        position, problem = 0, None
        try:
            for row in self._reader.read(shard):
                position = row.index + 1
                if any(done.start <= row.index < done.stop for done in covered):
                    continue
                if pending is not None and (pending.rows == self._rows or pending.stop != row.index):
                    self._reader.check(shard)
                    yield pending
                    pending = None
                if pending is None:
                    pending = _Decoded(shard, row.index)
                pending.add(row, self._decoder)
        except ShardError as error:
            problem = self._reader.gone(shard) or error
        if isinstance(problem, ChangedShardError):  # nobody knows which content these images are of
            position, pending = (position if pending is None else pending.start), None
        gone = isinstance(problem, MissingShardError)
        ended = any(done.last for done in covered)
        if pending is not None and (ended or gone or pending.stop != position):
            yield pending
            pending = None
        if gone or not ended:
            yield (pending or _Decoded(shard, position)).end(problem)


def _timed(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, each with how long making it took: `read_seconds`, and CPU time of this process, `read_cpu_seconds`."""
    while True:
        began, cpu = time.monotonic(), time.process_time()
        table = next(tables, None)
        if table is None:
            return
        table = table.append_column("read_seconds", pa.array([time.monotonic() - began]))
        yield table.append_column("read_cpu_seconds", pa.array([time.process_time() - cpu]))


class _Decoded:
    """Consecutive rows of a shard: their images, and what could not be decoded."""

    def __init__(self, shard: Shard, start: int) -> None:
        self.shard = shard
        self.start = start
        self.stop = start
        self.last = False
        self.missing = False
        self.indices: list[int] = []
        self.images: list[npt.NDArray[np.uint8]] = []
        self.rejects: list[dict[str, Any]] = []

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether this is all of the shard."""
        return self.start == 0 and self.last

    def add(self, row: Row, decoder: "Decoder") -> None:
        from models.inputs.image import UndecodableImage

        self.stop = row.index + 1
        try:
            self.images.append(decoder(row.image))
            self.indices.append(row.index)
        except UndecodableImage as error:
            self._reject(row.index, error.reason, error.detail, row.file)

    def end(self, problem: ShardError | None) -> "_Decoded":
        """Nothing more of the shard is to come, because of a problem or because it ends here."""
        self.missing = isinstance(problem, MissingShardError)
        self.last = not self.missing
        if problem is not None:
            self._reject(None, problem.reason, str(problem))
        return self

    def _reject(self, index: int | None, reason: str, error: str, file: str | None = None) -> None:
        reject = Reject(self.shard.name, index, reason, error, file)
        self.rejects.append(asdict(reject))


def _table(held: list[_Decoded]) -> pa.Table:
    """A range, as one row: consecutive rows of a shard, or several whole shards; nothing is held from then on.

    The images are one binary value, so that Ray never splits a range over blocks.
    """
    parts = held.copy()
    held.clear()
    images = [image for part in parts for image in part.images]
    return pa.table(
        {
            "shards": pa.array([[part.shard.name for part in parts]], pa.list_(pa.string())),
            "start": pa.array([parts[0].start], pa.int64()),
            "stop": pa.array([parts[0].start + sum(part.rows for part in parts)], pa.int64()),
            "last": pa.array([parts[-1].last], pa.bool_()),
            "missing": pa.array([parts[0].missing], pa.bool_()),
            "size": pa.array([sum(part.shard.size for part in parts)], pa.int64()),
            "counts": pa.array([[len(part.indices) for part in parts]], pa.list_(pa.int32())),
            "indices": pa.array([[index for part in parts for index in part.indices]], pa.list_(pa.uint32())),
            "images": one_value(images),
            "rejects": pa.array([[reject for part in parts for reject in part.rejects]], pa.list_(_REJECT)),
        }
    )


def one_value(images: Sequence[npt.NDArray[np.uint8]]) -> pa.LargeBinaryArray:
    """Images of one size as one binary value, copied once."""
    size = sum(image.nbytes for image in images)
    value = pa.allocate_buffer(size)
    if images:
        np.stack(images, out=np.frombuffer(value, np.uint8).reshape(len(images), *images[0].shape))
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, size], np.int64)), value]
    )


_REJECT = pa.struct(
    [("index", pa.uint32()), *((name, pa.string()) for name in ("shard", "reason", "error", "file"))],
)
