"""How the shards of a source are read, wherever they are, and again where a store fails for a moment."""

import io
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from cluster import storage
from cluster.errors import SourceError, StorageError, one_line
from cluster.filesystems import RangedFile
from pipeline.data import kinds
from pipeline.data.shards import (
    ChangedShardError,
    Label,
    Layout,
    MissingShardError,
    Row,
    Shard,
    ShardError,
    UnfitShardError,
)
from pipeline.data.tar import DAMAGE, number_of, read_tar
from pipeline.data.words import MAX_SIDECAR_BYTES, sidecar_words

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

RETRY_SECONDS = (0.5, 2.0, 8.0)
READ_BYTES = 4 * 2**20
"""Of one request to an object store, at most: large, because each takes tens of milliseconds whatever its size."""


@dataclass(frozen=True)
class Reader:
    """How to read the shards of one source; small and picklable, so that it travels to workers.

    Attributes:
        root: the source's URI.
        layout: of its shards.
        image_column: Parquet: the column of encoded images.
        label_column: Parquet: the column of labels, which a file may lack; None where nobody wants them.
        class_names: names of numeric labels, where the source knows them.
        tags: whether `Row.words` is filled: in a tar from the sample's `.txt` and `.json`, in a folder from the `.txt` beside the image,
            in Parquet from the columns of `TAG_FIELDS`. An image without any of these has no words.
    """

    root: str
    layout: Layout
    image_column: str = "image"
    label_column: str | None = "label"
    class_names: tuple[str, ...] | None = None
    tags: bool = False

    def read(self, shard: Shard, rows: Collection[int] | None = None) -> Iterator[Row]:
        """The images of a shard in row order, of the content that was listed: an image of a virtual shard that changed since is a row with a
        problem. A store that fails for a moment is asked again, from the byte that came last.

        Args:
            shard: of this source.
            rows: only these indices, when given.

        Raises:
            ShardError: the shard is damaged; rows that came before are good.
            UnfitShardError: it is a Parquet file without the source's columns.
            ChangedShardError: its content changed since it was listed, and the rows that came may be of either.
            MissingShardError: it vanished, or the disk fails.
            StorageError: the store is out of reach, or refuses; nothing is known about the shard.
        """
        import pyarrow as pa

        wanted = None if rows is None else frozenset(rows)
        reads: dict[str, Callable[[Shard, frozenset[int] | None], Iterator[Row]]] = {
            "webdataset": self._read_tar,
            "parquet": self._read_parquet,
            "folder": self._read_files,
        }
        read = reads[self.layout]
        try:
            for row in read(shard, wanted):
                label = self._named(row.label)
                yield row if label is row.label else replace(row, label=label)
            self.check(shard)
        except FileNotFoundError:
            raise MissingShardError("the shard vanished since it was listed") from None
        except SourceError as error:
            raise UnfitShardError(one_line(str(error)), error) from None
        except (*DAMAGE, pa.ArrowException) as error:
            raise ShardError(one_line(f"{type(error).__name__}: {error}")) from None
        except OSError as error:
            # Arrow speaks of damaged content without a number.
            kind = ShardError if error.errno is None else MissingShardError
            raise kind(one_line(f"{type(error).__name__}: {error}")) from None

    def check(self, shard: Shard) -> None:
        """Makes sure that a shard is still what was listed; the images of a virtual one are checked when they are read.

        Raises:
            ChangedShardError: it is not.
            MissingShardError: it is not there.
            StorageError: the store is out of reach, or refuses.
        """
        if shard.files:
            return
        uri = storage.inside(self.root, shard.name)
        try:
            now = _asked(uri, lambda: storage.etag(uri))
        except FileNotFoundError:
            raise MissingShardError("the shard vanished since it was listed") from None
        except OSError as error:
            raise MissingShardError(one_line(f"{type(error).__name__}: {error}")) from None
        if now != shard.etag:
            raise ChangedShardError("the shard changed since it was listed")

    def gone(self, shard: Shard) -> MissingShardError | None:
        """What `check` says about a shard that could not be read, if anything: that it is damaged is then of no interest."""
        try:
            self.check(shard)
        except MissingShardError as error:
            return error
        return None

    def _open(self, name: str) -> "pa.NativeFile | _RemoteFile":
        uri = storage.inside(self.root, name)
        file = _asked(uri, lambda: storage.open_object(uri))
        return _RemoteFile(uri, file) if storage.is_remote(uri) else file

    def _named(self, label: Label) -> Label:
        if isinstance(label, int) and self.class_names is not None and 0 <= label < len(self.class_names):
            return self.class_names[label]
        return label

    def _read_tar(self, shard: Shard, wanted: frozenset[int] | None) -> Iterator[Row]:
        with self._open(shard.name) as file, _buffered(file) as content:
            yield from read_tar(shard.name, shard.size, content, wanted, self.tags)

    def _read_parquet(self, shard: Shard, wanted: frozenset[int] | None) -> Iterator[Row]:
        from pipeline.data.parquet import read_parquet

        with self._open(shard.name) as file:
            yield from read_parquet(
                shard.name,
                file,
                wanted,
                self.tags,
                images=self.image_column,
                labels=self.label_column,
                buffer_size=READ_BYTES,
            )

    def _read_files(self, shard: Shard, wanted: frozenset[int] | None) -> Iterator[Row]:
        for index, path in enumerate(shard.files):
            if wanted is None or index in wanted:
                label: Label = path.partition("/")[0] if "/" in path else None
                if shard.labels:
                    text = shard.labels[index]
                    number = number_of(text)
                    label = text if number is None else number
                try:
                    with self._open(path) as file:
                        data, problem = file.read(), None
                        if shard.etags:
                            native = file.native if isinstance(file, _RemoteFile) else file
                            now = storage.etag(storage.inside(self.root, path), native)
                            if now != shard.etags[index]:
                                data, problem = b"", "the file changed since it was listed"
                except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                    data, problem = b"", one_line(f"{type(error).__name__}: {error.strerror or error}")
                words = self._words_beside(path) if self.tags else ()
                yield Row(index, data, label, problem, words=words, file=path)

    def _words_beside(self, path: str) -> tuple[str, ...]:
        try:
            with self._open(f"{kinds.stem(path)}.txt") as file:
                return sidecar_words("txt", file.read(MAX_SIDECAR_BYTES))
        except FileNotFoundError:
            return ()


def _asked(uri: str, ask: Callable[[], T]) -> T:
    """What `ask` returns, after some attempts if the store fails for a moment.

    Raises:
        StorageError: it fails for longer.
    """
    for pause in RETRY_SECONDS:
        try:
            return ask()
        except OSError as error:
            if error.errno is not None:  # pyarrow numbers what lies with the file: it is not there, not permitted, ...
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))  # not all readers at once
    try:
        return ask()
    except OSError as error:
        if error.errno is not None:
            raise
        rule = f"could not be read in {len(RETRY_SECONDS) + 1} attempts ({error})"
        raise StorageError("source", uri, rule, "check the store, then go on") from None


class _RemoteFile(RangedFile):
    """An object that is read from where it is, and again from there if the store fails for a moment.

    Attributes:
        native: the opened object.
    """

    def __init__(self, uri: str, native: "pa.NativeFile") -> None:
        super().__init__(native.size())
        self.native = native
        self._uri = uri

    def read_at(self, size: int, offset: int) -> bytes:
        return bytes(_asked(self._uri, lambda: self.native.read_at(size, offset)))

    def close(self) -> None:
        self.native.close()
        super().close()


def _buffered(file: "pa.NativeFile | _RemoteFile") -> Any:
    """For reading from the beginning to the end, a little at a time."""
    return io.BufferedReader(file, READ_BYTES) if isinstance(file, _RemoteFile) else nullcontext(file)
