"""Shards of images, their rows, and what can be wrong with them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from cluster.errors import SourceError, TophatError

if TYPE_CHECKING:
    import pyarrow as pa

    from models.inputs.image import Reason

Layout = Literal["webdataset", "parquet", "folder"]
Label = int | str | None
NO_IMAGE: Final = "no_image"
"""The reason of a row that is no image: a sample without one, or a hidden file in a tar."""


class ShardError(TophatError):
    """A shard whose content is damaged: it cannot be read any further; the rows before the damage are good.

    Attributes:
        reason: of the reject of a whole shard.
    """

    reason = "unreadable_shard"


class UnfitShardError(ShardError):
    """A Parquet file whose columns are not those of its source.

    Attributes:
        problem: which, in the words of an error of the user's.
    """

    def __init__(self, text: str, problem: SourceError) -> None:
        super().__init__(text)
        self.problem = problem


class MissingShardError(ShardError):
    """A shard that is not there, or cannot be had now; reading it again later may go better."""

    reason = "missing_shard"


class ChangedShardError(MissingShardError):
    """A shard whose content is not what was listed: nothing of it can be told by its name."""

    reason = "changed_shard"


@dataclass(frozen=True, slots=True)
class Row:
    """One image as it is stored.

    Attributes:
        index: 0-based row in its shard.
        data: the encoded image; empty where there is none.
        label: the class's name or number, where the source has labels.
        problem: why the image's bytes could not be had, although the shard is readable; None when they could.
        reason: in a word, where there is a problem: one of `models.inputs.image.REASONS`.
        offset: in a tar, the byte where its sample begins, or the image itself where the sample has others before it.
        words: its tags, and the words of its caption, where the reader is asked for them.
        file: its own name: the path of its file from the source's root on, which goes on inside a tar or a Parquet file (`a.tar/dog.1.png`);
            None where it has none.
    """

    index: int
    data: bytes
    label: Label = None
    problem: str | None = None
    reason: "Reason" = "unreadable"
    offset: int = 0
    words: tuple[str, ...] = ()
    file: str | None = None

    @property
    def image(self) -> bytes:
        """The encoded image.

        Raises:
            UndecodableImage: its bytes could not be had.
        """
        if self.problem is not None:
            from models.inputs.image import UndecodableImage

            raise UndecodableImage(self.reason, self.problem)
        return self.data


@dataclass(frozen=True, slots=True)
class Shard:
    """One object of a source.

    Attributes:
        name: path relative to the source's root, or the name of a virtual shard.
        size: bytes.
        etag: changes when the content does.
        files: of a virtual shard, the paths of its images, in row order.
        etags: of a virtual shard, those of its images, in row order.
        labels: of a virtual shard whose source has a file of labels, those of its images, in row order.
    """

    name: str
    size: int
    etag: str
    files: tuple[str, ...] = ()
    etags: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def shard_table(shards: Iterable[Shard]) -> "pa.Table":
    """Shards as columns: shard, size, etag, files, etags, and labels where there are any."""
    import pyarrow as pa

    rows = list(shards)
    labels = (
        {"labels": pa.array([s.labels for s in rows], pa.list_(pa.string()))} if any(s.labels for s in rows) else {}
    )
    return pa.table(
        {
            "shard": pa.array([s.name for s in rows], pa.string()),
            "size": pa.array([s.size for s in rows], pa.int64()),
            "etag": pa.array([s.etag for s in rows], pa.string()),
            "files": pa.array([s.files for s in rows], pa.list_(pa.string())),
            "etags": pa.array([s.etags for s in rows], pa.list_(pa.string())),
            **labels,
        }
    )


def shards_of(table: "pa.Table") -> Iterator[Shard]:
    """The shards of a `shard_table`, or of one without the etags of files."""
    columns = [table[name].to_pylist() for name in ("shard", "size", "etag", "files")]
    for name in ("etags", "labels"):
        columns.append(table[name].to_pylist() if name in table.column_names else [()] * len(table))
    for name, size, etag, files, etags, labels in zip(*columns, strict=True):
        yield Shard(name, size, etag, tuple(files), tuple(etags), tuple(labels))
