"""Rejects: one row per image, or whole shard, that could not be used. Nothing is dropped silently."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster import storage


@dataclass(frozen=True, slots=True)
class Reject:
    """Why an image is not used.

    Attributes:
        shard: the image's shard.
        index: its row; None when the shard itself cannot be read from some row on.
        reason: a short word of a closed set (`truncated`, `not_an_image`, `unreadable_shard`, ...).
        error: what the decoder or the store said, in one line.
    """

    shard: str
    index: int | None
    reason: str
    error: str


def publish_rejects(uri: str, rejects: Sequence[Reject]) -> None:
    """Writes rejects as one Parquet file: columns shard, index (uint32, nullable), reason, error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "shard": pa.array([r.shard for r in rejects], pa.string()),
            "index": pa.array([r.index for r in rejects], pa.uint32()),
            "reason": pa.array([r.reason for r in rejects], pa.string()),
            "error": pa.array([r.error for r in rejects], pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.publish(uri, sink.getvalue().to_pybytes())


def read_rejects(uri: str, limit: int | None = None) -> tuple[Counter[str], list[Reject]]:
    """All rejects under a folder.

    Args:
        uri: a folder of files that `publish_rejects` wrote.
        limit: how many rows to return; the counts are of all.

    Returns:
        How many there are of each reason, and the first rows.
    """
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    rows: list[Reject] = []
    for entry in storage.list_files(uri, ".parquet"):
        with storage.open_input(storage.join(uri, entry.path)) as file:
            table = pq.read_table(file)
        counts.update(table["reason"].to_pylist())
        room = table.num_rows if limit is None else max(0, limit - len(rows))
        content: list[dict[str, Any]] = table.slice(0, room).to_pylist()
        rows.extend(Reject(**row) for row in content)
    return counts, rows
