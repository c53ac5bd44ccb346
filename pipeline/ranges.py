"""Ranges: consecutive rows of a shard that are scored together, what their files are called, and how they are read and decoded.

The files that ranges have in a score table are the ledger of what is done. A range without one is read again, and nothing else keeps track.
"""

import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster import storage
from models.config import Transform
from pipeline.rejects import REJECTS
from pipeline.shards import ChangedShardError, MissingShardError, Reader, Row, Shard, ShardError, shard_table, shards_of

if TYPE_CHECKING:
    import ray

    from models.decoding import Decoder

MAX_RANGE_ROWS, MAX_RANGE_BYTES = 65_536, 2**40
READ_TASKS = 2_000
"""Tasks, about at most, that the shards of a scoring are dealt to: enough for thousands of readers, few enough to plan in a second."""
TASK_BYTES, MIN_TASK_BYTES = 64 * 2**20, 2**20
FIRST_BYTES = 2**18
"""Encoded bytes of the first range of the tasks that start first: the first images are scored while others are still read."""
SHARES = 8
"""A task reads this share of what remains for each actor, within those bounds: the actors end together, and no task is tiny."""
_RANGE_FILE = re.compile(r"(?P<shard>.+)/(?P<start>\d{8,})-(?P<stop>\d{8,})(?P<last>-last)?\.parquet", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive rows `[start, stop)` of a shard, scored together.

    Attributes:
        last: whether the shard ends here.
    """

    shard: str
    start: int
    stop: int
    last: bool

    @property
    def file(self) -> str:
        """Name of its file, under the folder of the score table."""
        return f"{_folder(self.shard)}/{self.start:08d}-{self.stop:08d}{'-last' if self.last else ''}.parquet"

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
        )


def _folder(shard: str) -> str:
    """A folder's path for a shard's name: that name, with what a file system or a reader of folders would take amiss escaped."""
    printable = "".join(
        c if c.isprintable() and c != "%" else quote(c, safe="", errors="surrogateescape")
        for c in shard.replace("//", "/\0/")
    ).replace("/%00/", "/%2F")
    return f"%5F{printable[1:]}" if printable.startswith("_") else printable


def ledger(scores_uri: str) -> dict[str, list[Range]]:
    """The published ranges of every shard, in row order."""
    found: dict[str, list[Range]] = {}
    for entry in storage.list_files(scores_uri, ".parquet"):
        published = None if entry.path.startswith(f"{REJECTS}/") else Range.of_file(entry.path)
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


def range_rows(transform: Transform, range_bytes: int) -> int:
    """Rows of a range whose decoded images (uint8, 3 channels) take at most so many bytes."""
    return max(1, min(MAX_RANGE_ROWS, range_bytes // (3 * transform.size**2)))


@dataclass(frozen=True)
class Unfinished:
    """The shards that a scoring has to read: one object that every reader shares, so that a hundred thousand shards cost each task nothing.

    Attributes:
        shards: from `shard_table`.
        done: the published ranges of those that are scored in part.
    """

    shards: pa.Table
    done: Mapping[str, Sequence[Range]]

    @classmethod
    def of(cls, shards: Sequence[Shard], done: Mapping[str, Sequence[Range]]) -> "Unfinished":
        """Those of `shards` whose ranges do not cover them."""
        missing = [shard for shard in shards if not complete(done.get(shard.name, ()))]
        return cls(shard_table(missing), {s.name: tuple(done[s.name]) for s in missing if s.name in done})

    def parts(self, actors: int) -> list[dict[str, int]]:
        """The rows of the table, dealt to tasks: `start`, `stop`, and the encoded bytes after which a range ends, of the first range
        (`first_bytes`) and, growing twofold, at most (`range_bytes`).

        A task is a small share of what remains for each actor, so that it costs little to start and the last ones end together
        (guided self-scheduling, Polychronopoulos and Kuck 1987). Many small shards make one task, and their images go through the
        model together.
        """
        sizes: list[int] = self.shards["size"].to_pylist()
        remaining = total = sum(sizes)
        dealt: list[dict[str, int]] = []
        start = bytes_in_task = 0
        for stop, size in enumerate(sizes, 1):
            share = max(remaining // (SHARES * actors), MIN_TASK_BYTES)
            bytes_in_task += size
            if stop == len(sizes) or bytes_in_task >= max(total // READ_TASKS, min(share, TASK_BYTES)):
                first = FIRST_BYTES if len(dealt) < 2 * actors else share
                dealt.append({"start": start, "stop": stop, "first_bytes": first, "range_bytes": share})
                remaining -= bytes_in_task
                start, bytes_in_task = stop, 0
        return dealt


class RangeReader:
    """Reads and decodes shards: a row per range.

    Args:
        reader: of the source.
        transform: what the model takes in.
        range_bytes: decoded images of a range, in bytes.
        decode_seconds: CPU time that one image may take.
        unfinished: refers to an `Unfinished`.
    """

    def __init__(
        self,
        reader: Reader,
        transform: Transform,
        range_bytes: int,
        decode_seconds: float,
        unfinished: "ray.ObjectRef[Unfinished] | None" = None,
    ) -> None:
        self._reader = reader
        self._transform = transform
        self._rows = range_rows(transform, range_bytes)
        self._decode_seconds = decode_seconds
        self._unfinished = unfinished

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Every range of `Unfinished.parts`."""
        import ray

        assert self._unfinished is not None
        unfinished: Unfinished = ray.get(self._unfinished)
        for part in batch.to_pylist():
            sizes = _doubling(part["first_bytes"], part["range_bytes"])
            for shard in shards_of(unfinished.shards.slice(part["start"], part["stop"] - part["start"])):
                yield from _timed(self.ranges(shard, unfinished.done.get(shard.name, ()), sizes))

    @cached_property
    def _decoder(self) -> "Decoder":
        from models.decoding import Decoder
        from models.transforms import evaluation_image

        seconds = self._decode_seconds
        return Decoder(partial(evaluation_image, transform=self._transform, seconds=seconds), seconds)

    def ranges(self, shard: Shard, covered: Sequence[Range], sizes: Iterator[int] | None = None) -> Iterator[pa.Table]:
        """The ranges of a shard that have no file, each a table of one row.

        What comes last is marked so even when it is empty: only then the shard is complete. A shard that is missing or has changed is not:
        the next attempt reads it again.

        Args:
            shard: of the reader's source.
            covered: the ranges that have a file, in row order.
            sizes: for each range, the encoded bytes after which it ends; by default as many as its rows have.

        Raises:
            StorageError: the store is out of reach, or refuses.
        """
        pending: _Decoded | None = None
        sizes = sizes or itertools.repeat(MAX_RANGE_BYTES)
        position, problem, range_bytes = 0, None, 0
        try:
            for row in self._reader.read(shard, unchanged=True):
                position = row.index + 1
                if any(done.start <= row.index < done.stop for done in covered):
                    continue
                full = pending is not None and (pending.rows >= self._rows or pending.bytes >= range_bytes)
                if pending is not None and (full or pending.stop != row.index):
                    self._reader.check(shard)
                    yield pending.table(last=False)
                    pending = None
                if pending is None:
                    pending, range_bytes = _Decoded(shard, row.index), next(sizes)
                pending.add(row, self._decoder)
            self._reader.check(shard)
        except ShardError as error:
            problem = self._reader.gone(shard) or error
        if isinstance(problem, ChangedShardError):  # nobody knows which content these images are of
            position, pending = (position if pending is None else pending.start), None
        gone = isinstance(problem, MissingShardError)
        ended = any(done.last for done in covered)
        if pending is not None and (ended or gone or pending.stop != position):
            yield pending.table(last=False)
            pending = None
        if gone:
            yield _Decoded(shard, position).table(last=False, problem=problem)
        elif not ended:
            yield (pending or _Decoded(shard, position)).table(last=True, problem=problem)


def _doubling(first: int, last: int) -> Iterator[int]:
    size = min(first, last)
    while True:
        yield size
        size = min(2 * size, last)


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
    """A range under way: its images, and what could not be decoded."""

    def __init__(self, shard: Shard, start: int) -> None:
        self.shard = shard
        self.start = start
        self.stop = start
        self.bytes = 0
        self.indices: list[int] = []
        self.images: list[npt.NDArray[np.uint8]] = []
        self.rejects: list[dict[str, Any]] = []

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def add(self, row: Row, decoder: "Decoder") -> None:
        from models.transforms import UndecodableImage

        self.stop = row.index + 1
        self.bytes += len(row.data)
        try:
            if row.problem is not None:
                raise UndecodableImage("unreadable", row.problem)
            self.images.append(decoder(row.data))
            self.indices.append(row.index)
        except UndecodableImage as error:
            self.rejects.append({"index": row.index, "reason": error.reason, "error": error.detail})

    def table(self, *, last: bool, problem: ShardError | None = None) -> pa.Table:
        """One row. The images are one binary value, so that Ray never splits a range over blocks."""
        rejects = list(self.rejects)
        if problem is not None:
            rejects.append({"index": None, "reason": problem.reason, "error": str(problem)})
        content = np.stack(self.images).tobytes() if self.images else b""
        return pa.table(
            {
                "shard": pa.array([self.shard.name], pa.string()),
                "start": pa.array([self.start], pa.int64()),
                "stop": pa.array([self.stop], pa.int64()),
                "last": pa.array([last], pa.bool_()),
                "missing": pa.array([isinstance(problem, MissingShardError)], pa.bool_()),
                "indices": pa.array([self.indices], pa.list_(pa.uint32())),
                "images": pa.array([content], pa.large_binary()),
                "rejects": pa.array([rejects], pa.list_(_REJECT)),
            }
        )


_REJECT = pa.struct([("index", pa.uint32()), ("reason", pa.string()), ("error", pa.string())])
