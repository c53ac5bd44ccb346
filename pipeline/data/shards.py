"""Shards of images and how they are read: WebDataset tars, Parquet with an image column, groups of image files."""

import io
import json
import random
import re
import tarfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from cluster import storage
from cluster.errors import SourceError, StorageError, TophatError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

Layout = Literal["webdataset", "parquet", "folder"]
Label = int | str | None
T = TypeVar("T")

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jpe",
    ".jfif",
    ".avif",
)
RETRY_SECONDS = (0.5, 2.0, 8.0)
READ_BYTES = 4 * 2**20
"""Of one request to an object store, at most: large, because each takes tens of milliseconds whatever its size."""
MAX_IMAGE_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_SIDECAR_BYTES = 2**20
TAG_FIELDS = ("tags", "caption")
"""Columns of a Parquet source, and keys of a JSON sidecar, that hold tags; both are read where there are both."""
_LONG_HEADERS = (b"g", b"x", b"X", b"L", b"K")


class ShardError(TophatError):
    """A shard whose content is damaged: it cannot be read any further; the rows before the damage are good.

    Attributes:
        reason: of the reject of a whole shard.
    """

    reason = "unreadable_shard"


class MissingShardError(ShardError):
    """A shard that is not there, or cannot be had now; reading it again later may go better."""

    reason = "missing_shard"


class ChangedShardError(MissingShardError):
    """A shard whose content is not what was listed: nothing of it can be told by its name."""

    reason = "changed_shard"


class _Member(tarfile.TarInfo):
    """A tar header that is not let go by: tarfile takes a damaged or missing one for the end of the archive, and reads
    whatever a header says is the next one's name, of any size, into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _LONG_HEADERS and member.size > MAX_HEADER_BYTES:
            raise tarfile.InvalidHeaderError(f"a header of {member.size} bytes")  # type: ignore[attr-defined]
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"no valid header at byte {tarfile_.offset} ({error})") from None


@dataclass(frozen=True, slots=True)
class Row:
    """One image as it is stored.

    Attributes:
        index: 0-based row in its shard.
        data: the encoded image; empty where there is none.
        label: the class's name or number, where the source has labels.
        problem: why the image's bytes could not be had, although the shard is readable; None when they could.
        offset: in a tar, the byte where its sample begins.
        words: its tags, and the words of its caption, where the reader is asked for them.
    """

    index: int
    data: bytes
    label: Label = None
    problem: str | None = None
    offset: int = 0
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """One object of a source.

    Attributes:
        name: path relative to the source's root, or the name of a virtual shard.
        size: bytes.
        etag: changes when the content does.
        files: of a virtual shard, the paths of its images, in row order.
        etags: of a virtual shard, those of its images, in row order.
    """

    name: str
    size: int
    etag: str
    files: tuple[str, ...] = ()
    etags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """How to read the shards of one source; small and picklable, so that it travels to workers.

    Attributes:
        class_names: names of numeric labels, where the source knows them.
        tags: whether `Row.words` is filled: in a tar from the sample's `.txt` and `.json`, in a folder from the `.txt` beside the image,
            in Parquet from the columns of `TAG_FIELDS`. An image without any of these has no words.
    """

    root: str
    layout: Layout
    image_column: str = "image"
    label_column: str = "label"
    class_names: tuple[str, ...] | None = None
    tags: bool = False

    def read(self, shard: Shard, rows: Collection[int] | None = None, *, unchanged: bool = False) -> Iterator[Row]:
        """The images of a shard in row order. A store that fails for a moment is asked again, from the byte that came last.

        Args:
            shard: of this source.
            rows: only these indices, when given.
            unchanged: whether an image of a virtual shard that changed since it was listed is withheld; of other shards, `check` tells.

        Raises:
            ShardError: the shard is damaged; rows that came before are good.
            MissingShardError: it vanished, or the disk fails.
            StorageError: the store is out of reach, or refuses; nothing is known about the shard.
        """
        wanted = None if rows is None else frozenset(rows)
        reads: dict[str, Callable[[Shard, frozenset[int] | None], Iterator[Row]]] = {
            "webdataset": self._read_tar,
            "parquet": self._read_parquet,
            "folder": partial(self._read_files, unchanged=unchanged),
        }
        read = reads[self.layout]
        try:
            for row in read(shard, wanted):
                label = self._named(row.label)
                yield row if label is row.label else replace(row, label=label)
        except FileNotFoundError:
            raise MissingShardError("the shard vanished since it was listed") from None
        except (tarfile.TarError, EOFError, ValueError, SourceError) as error:
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
        uri = storage.join(self.root, shard.name)
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
        uri = storage.join(self.root, name)
        filesystem, path = storage.filesystem(uri)
        file = _asked(uri, lambda: filesystem.open_input_file(path))
        return _RemoteFile(uri, file) if storage.is_remote(uri) else file

    def _named(self, label: Label) -> Label:
        if isinstance(label, int) and self.class_names is not None and 0 <= label < len(self.class_names):
            return self.class_names[label]
        return label

    def _read_tar(self, shard: Shard, wanted: frozenset[int] | None) -> Iterator[Row]:
        compressed = not shard.name.endswith(".tar")
        with (
            self._open(shard.name) as file,
            _buffered(file) as content,
            tarfile.open(fileobj=content, mode="r|gz" if compressed else "r|", tarinfo=_Member) as archive,
        ):
            index, key, data, label, problem, offset = -1, None, b"", None, None, 0
            words: tuple[str, ...] = ()
            certain = unlabeled = False  # `data` is no mask; samples here have no labels
            try:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    if not (member.isfile() or member.islnk() or member.issym()) or not stem:
                        continue
                    if (folder, stem) != key:
                        if key is not None and (wanted is None or index in wanted):
                            unlabeled = unlabeled or label is None
                            yield Row(index, data, label, problem, offset, words)
                        index, key, data, label, problem = index + 1, (folder, stem), b"", None, None
                        offset, words = member.offset, ()
                    if wanted is not None and index not in wanted:
                        continue
                    plain = extension.lower().rpartition(".")[2]
                    # `x.jpg` is the image; `x.mask.png` only where it is alone.
                    if f".{plain}" in IMAGE_SUFFIXES and (not data or plain == extension.lower()):
                        certain = plain == extension.lower()
                        if not member.isfile():
                            problem = "a link"
                        elif member.size > MAX_IMAGE_BYTES:
                            problem = f"a file of {member.size} bytes"
                        else:
                            data, problem = _content(archive, member), None
                    elif extension in ("cls", "cls.txt") and member.isfile() and member.size < 10_000:
                        label = _label(_content(archive, member).decode("utf-8", "replace"))
                    elif self.tags and plain == extension.lower() and plain in ("txt", "json"):
                        words += _sidecar_words(plain, _content(archive, member, MAX_SIDECAR_BYTES))
            except (tarfile.TarError, EOFError, ValueError):
                # Nothing of this sample is lost; what gzip gives just before damage may be damaged too.
                if data and certain and (unlabeled or label is not None) and not compressed:
                    yield Row(index, data, label, problem, offset, words)
                raise
            if key is not None and (wanted is None or index in wanted):
                yield Row(index, data, label, problem, offset, words)

    def _read_parquet(self, shard: Shard, wanted: frozenset[int] | None) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._open(shard.name) as file, pq.ParquetFile(file, buffer_size=READ_BYTES) as parquet:
            names = parquet.schema_arrow.names
            if self.image_column not in names:
                raise SourceError(
                    "image_column", self.image_column, f"is not in {shard.name}", f"use one of {', '.join(names)}"
                )
            tags = [name for name in TAG_FIELDS if self.tags and name in names]
            columns = [self.image_column, *([self.label_column] if self.label_column in names else []), *tags]
            start = 0
            for batch in parquet.iter_batches(batch_size=256, columns=columns):
                images, labels = batch.column(self.image_column), None
                if pa.types.is_struct(images.type):
                    images = images.field("bytes")
                if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
                    rule = f"holds {images.type} in {shard.name}"
                    raise SourceError("image_column", self.image_column, rule, "name a column of encoded images")
                if self.label_column in names:
                    labels = batch.column(self.label_column)
                for offset in range(batch.num_rows):
                    if wanted is None or start + offset in wanted:
                        label = None if labels is None else labels[offset].as_py()
                        words = tuple(word for name in tags for word in split_tags(batch.column(name)[offset].as_py()))
                        yield Row(start + offset, images[offset].as_py() or b"", label, words=words)
                start += batch.num_rows

    def _read_files(self, shard: Shard, wanted: frozenset[int] | None, unchanged: bool) -> Iterator[Row]:
        for index, path in enumerate(shard.files):
            if wanted is None or index in wanted:
                folder = path.partition("/")[0] if "/" in path else None
                try:
                    with self._open(path) as file:
                        data, problem = file.read(), None
                        if unchanged and shard.etags:
                            native = file.native if isinstance(file, _RemoteFile) else file
                            now = storage.etag(storage.join(self.root, path), native)
                            if now != shard.etags[index]:
                                data, problem = b"", "the file changed since it was listed"
                except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                    data, problem = b"", one_line(f"{type(error).__name__}: {error.strerror or error}")
                yield Row(index, data, folder, problem, words=self._words_beside(path) if self.tags else ())

    def _words_beside(self, path: str) -> tuple[str, ...]:
        try:
            with self._open(f"{path.rpartition('.')[0]}.txt") as file:
                return _sidecar_words("txt", file.read(MAX_SIDECAR_BYTES))
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


class _RemoteFile(io.RawIOBase):
    """An object that is read from where it is, and again from there if the store fails for a moment.

    Attributes:
        native: the opened object.
    """

    def __init__(self, uri: str, native: "pa.NativeFile") -> None:
        self.native = native
        self._uri = uri
        self._size: int = native.size()
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if size < 0 else min(size, left)
        content: bytes = _asked(self._uri, lambda: self.native.read_at(wanted, self._at)) if wanted else b""
        self._at += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.native.close()
        super().close()


def _buffered(file: "pa.NativeFile | _RemoteFile") -> Any:
    """For reading from the beginning to the end, a little at a time."""
    return io.BufferedReader(file, READ_BYTES) if isinstance(file, _RemoteFile) else nullcontext(file)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, size: int = -1) -> bytes:
    file = archive.extractfile(member) if member.isfile() else None
    return b"" if file is None else file.read(size)


def _label(text: str) -> Label:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


def split_tags(value: object) -> tuple[str, ...]:
    """The tags of one image.

    Args:
        value: a text, which is split at white space, commas and semicolons, and before each `#`; or a list, each text of which is a tag.
            Anything else has no tags.
    """
    if isinstance(value, str):
        return tuple(re.findall(r"#?[^\s,;#]+", value))
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _sidecar_words(suffix: str, content: bytes) -> tuple[str, ...]:
    """The words of a text, or those in the tags and the caption of a JSON object; none of what is no JSON object."""
    text = content.decode("utf-8-sig", "replace")
    if suffix == "txt":
        return split_tags(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return tuple(w for name in TAG_FIELDS for w in split_tags(found.get(name))) if isinstance(found, dict) else ()


def shard_table(shards: Iterable[Shard]) -> "pa.Table":
    """Shards as columns: shard, size, etag, files, etags."""
    import pyarrow as pa

    rows = list(shards)
    return pa.table(
        {
            "shard": pa.array([s.name for s in rows], pa.string()),
            "size": pa.array([s.size for s in rows], pa.int64()),
            "etag": pa.array([s.etag for s in rows], pa.string()),
            "files": pa.array([s.files for s in rows], pa.list_(pa.string())),
            "etags": pa.array([s.etags for s in rows], pa.list_(pa.string())),
        }
    )


def shards_of(table: "pa.Table") -> Iterator[Shard]:
    """The shards of a `shard_table`, or of one without the etags of files."""
    columns = [table[name].to_pylist() for name in ("shard", "size", "etag", "files")]
    etags = table["etags"].to_pylist() if "etags" in table.column_names else [()] * len(table)
    for name, size, etag, files, each in zip(*columns, etags, strict=True):
        yield Shard(name, size, etag, tuple(files), tuple(each))
