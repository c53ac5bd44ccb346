"""Rejects: one row per image, or whole shard, that could not be used. Nothing is dropped silently."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster import storage

if TYPE_CHECKING:
    import pyarrow as pa

REJECTS = "rejects"
"""Folder of the rejects, beside the table of those that are none."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Why an image is not used.

    Attributes:
        shard: the image's shard.
        index: its row; None when the shard itself cannot be read from some row on.
        reason: a short word of a closed set (`truncated`, `not_an_image`, `unreadable_shard`, ...).
        error: what the decoder or the store said, in one line.
        file: the image's own name, as in `pipeline.data.shards.Row`.
    """

    shard: str
    index: int | None
    reason: str
    error: str
    file: str | None = None

    @property
    def where(self) -> str:
        """What to look at: the image's own name, else its place in its shard."""
        return self.file or (self.shard if self.index is None else f"{self.shard} [{self.index}]")


def counted(reasons: Mapping[str, int]) -> str:
    """Reasons and how many there are of each, most of them first: `truncated 3, empty 1`."""
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    )


def publish_rejects(uri: str, rejects: Sequence[Reject]) -> None:
    """Writes rejects as one Parquet file: columns shard, index (uint32, nullable), reason, error, file (nullable)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "shard": pa.array([r.shard for r in rejects], pa.string()),
            "index": pa.array([r.index for r in rejects], pa.uint32()),
            "reason": pa.array([r.reason for r in rejects], pa.string()),
            "error": pa.array([r.error for r in rejects], pa.string()),
            "file": pa.array([r.file for r in rejects], pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.publish(uri, sink.getvalue().to_pybytes())


def read_rejects(uri: str, *, limit: int = 0, wholes: bool = False) -> tuple[Counter[str], list[Reject]]:
    """All rejects under a folder.

    Args:
        uri: a folder of files that `publish_rejects` wrote.
        limit: how many rows to return; the counts are of all.
        wholes: return instead the rows about whole shards, which have no index, and all of those.

    Returns:
        How many there are of each reason, and the rows.
    """
    import pyarrow.compute as pc

    counts: Counter[str] = Counter()
    rows: list[Reject] = []
    for _, table in _tables(uri):
        counts.update({c["values"]: c["counts"] for c in pc.value_counts(table["reason"]).to_pylist()})
        chosen = table.filter(pc.is_null(table["index"])) if wholes else table.slice(0, max(0, limit - len(rows)))
        content: list[dict[str, Any]] = chosen.to_pylist()
        rows.extend(Reject(**row) for row in content)
    return counts, rows


def some_rejects(uri: str, limit: int) -> list[Reject]:
    """The first rejects under a folder; no more files are read than that takes."""
    import pyarrow.parquet as pq

    rows: list[Reject] = []
    for entry in storage.list_files(uri, ".parquet"):
        if len(rows) < limit:
            with storage.open_input(storage.join(uri, entry.path)) as file:
                content: list[dict[str, Any]] = pq.read_table(file).slice(0, limit - len(rows)).to_pylist()
            rows.extend(Reject(**row) for row in content)
    return rows


def count_rejected(uri: str) -> Counter[str]:
    """How many images each file under a folder of rejects has; rows about whole shards are none."""
    return Counter({path: len(table) - table["index"].null_count for path, table in _tables(uri)})


def _tables(uri: str) -> "Iterator[tuple[str, pa.Table]]":
    """The files under a folder of rejects, and what they hold."""
    import pyarrow.parquet as pq

    def read(entry: storage.FileEntry) -> "tuple[str, pa.Table]":
        with storage.open_input(storage.join(uri, entry.path)) as file:
            return entry.path, pq.read_table(file)

    with ThreadPoolExecutor(max_workers=16) as pool:
        yield from pool.map(read, storage.list_files(uri, ".parquet"))
