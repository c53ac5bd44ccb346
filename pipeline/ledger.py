"""The ledger of a scoring: which row ranges of which shards have a published file. Nothing else keeps track."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from cluster import storage

REJECTS = "_rejects"
"""Where rejects go when a score table stands alone: a name that readers of a Parquet folder pass over, as they do the owner's."""
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
