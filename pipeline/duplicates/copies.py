"""Copies inside U: images with the same encoded bytes, of which the first by (shard, index) stays.

A distributed group-by on the SHA-256 of the bytes. Tasks hash shards and publish the hashes in 64 row groups, one for each range of
hashes; further tasks take one range of all files each. The published files of hashes are the record of what is done.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster import storage
from cluster.progress import SILENT, Progress
from cluster.tasks import parallel_map
from pipeline.data.reader import Reader
from pipeline.data.shards import Shard, ShardError
from pipeline.data.sources import ImageSource

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RANGES = 64
"""Ranges of hashes, by the first byte: of a billion images, each holds 16 million (0.7 GB)."""
GROUPS = 4096
"""Files of hashes at most, about; below it, one for each 64 MiB of shards."""
_HASHES = pa.schema([("hash", pa.binary(32)), ("shard", pa.int32()), ("index", pa.uint32())])
_UNREADABLE = b"tophat.unreadable"


@dataclass(frozen=True)
class _Group:
    """Consecutive shards, hashed by one task; `first` is the place of the first in the listing."""

    number: int
    first: int
    shards: tuple[Shard, ...]

    @property
    def file(self) -> str:
        return f"{self.number:05d}.parquet"


def find_copies(source: ImageSource, out_uri: str, progress: Progress = SILENT) -> dict[str, Any]:
    """Finds copies in a source, on the Ray that is initialized. Goes on where it stopped.

    Publishes under `out_uri` up to 64 Parquet files with the columns shard string, index uint32 (an image that is a copy),
    first_shard string, first_index uint32 (the image that it is a copy of). Images without bytes are no copies of each other.

    Args:
        source: U.
        out_uri: a folder.
        progress: counts images hashed.

    Returns:
        images (hashed), copies, and unreadable_shards, of which the rows up to the damage are hashed.
    """
    work = storage.join(out_uri, "work")
    groups = _groups(source.shards())
    done = {entry.path for entry in storage.list_files(work, ".parquet")}
    missing = [group for group in groups if group.file not in done]
    for images in parallel_map(partial(_hash, source.reader, work), missing):
        progress.add(done=images)
    names = pa.array([shard.name for shard in source.shards()], pa.string())
    files = [storage.join(work, group.file) for group in groups]
    counts = {"images": 0, "copies": 0, "unreadable_shards": 0}
    for images, copies, unreadable in parallel_map(partial(_copies, files, names, out_uri), range(RANGES)):
        counts["images"] += images
        counts["copies"] += copies
        counts["unreadable_shards"] = unreadable  # every task sees them all
    storage.delete_tree(work)
    return counts


def _groups(shards: Sequence[Shard]) -> list[_Group]:
    share = max(64 << 20, sum(shard.size for shard in shards) // GROUPS)
    groups: list[_Group] = []
    first, size = 0, 0
    for place, shard in enumerate(shards):
        size += shard.size
        if size >= share or place == len(shards) - 1:
            groups.append(_Group(len(groups), first, tuple(shards[first : place + 1])))
            first, size = place + 1, 0
    return groups


def _hash(reader: Reader, work: str, group: _Group) -> int:
    """Publishes the hashes of a group; runs in a Ray task. Returns how many there are."""
    digests, places, indices, unreadable = bytearray(), [], [], 0
    for place, shard in enumerate(group.shards, group.first):
        try:
            for row in reader.read(shard):
                if row.data:
                    digests += hashlib.sha256(row.data).digest()
                    places.append(place)
                    indices.append(row.index)
        except ShardError:  # the rows before it are good; scoring records it in the rejects
            unreadable += 1
    hashes = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 32)
    ranges = hashes[:, 0] // (256 // RANGES)
    sink = pa.BufferOutputStream()
    schema = _HASHES.with_metadata({_UNREADABLE: json.dumps(unreadable)})
    with pq.ParquetWriter(sink, schema, compression="none", use_dictionary=False) as writer:
        for number in range(RANGES):
            rows = np.flatnonzero(ranges == number)
            binary = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), len(rows), [None, pa.py_buffer(hashes[rows].tobytes())]
            )
            columns = [binary, np.array(places, np.int32)[rows], np.array(indices, np.uint32)[rows]]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(1, len(rows)))
    storage.publish(storage.join(work, group.file), sink.getvalue().to_pybytes())
    return len(places)


def _copies(files: Sequence[str], names: pa.StringArray, out_uri: str, number: int) -> tuple[int, int, int]:
    """Publishes the copies in one range of hashes; runs in a Ray task. Returns images, copies, unreadable shards."""
    tables, unreadable = [], 0
    for uri in files:
        with storage.open_input(uri) as file, pq.ParquetFile(file) as table:
            unreadable += json.loads(table.schema_arrow.metadata[_UNREADABLE])
            tables.append(table.read_row_group(number, use_threads=False))
    table = pa.concat_tables([_HASHES.empty_table(), *tables]).combine_chunks()
    shard, index = table["shard"].to_numpy(), table["index"].to_numpy()
    hashes = np.frombuffer(b"".join(value for value in _bytes(table["hash"])), np.uint64).reshape(-1, 4)
    order = np.lexsort((index, shard, *hashes.T))
    same = np.zeros(len(order), np.bool_)
    same[1:] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    copies, first = order[same], first[same]
    listed = np.lexsort((index[copies], shard[copies]))
    copies, first = copies[listed], first[listed]
    if len(copies):
        found = pa.table(
            {
                "shard": names.take(pa.array(shard[copies])),
                "index": index[copies],
                "first_shard": names.take(pa.array(shard[first])),
                "first_index": index[first],
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(found, sink, compression="zstd")
        storage.publish(storage.join(out_uri, f"copies-{number:05d}.parquet"), sink.getvalue().to_pybytes())
    return len(order), len(copies), unreadable


def _bytes(column: pa.ChunkedArray) -> list[Any]:
    """The bytes of a column of fixed-size binary without nulls."""
    return [chunk.buffers()[1].slice(32 * chunk.offset, 32 * len(chunk)) for chunk in column.chunks if len(chunk)]
