"""Sources of images: WebDataset tars, Parquet with an image column, folders of image files; on a disk or in an object store.

An image's identity is `(shard, index)`: the shard's path relative to the source's root, and the 0-based row in it. Many small files are
grouped into virtual shards named `files-000000`, `files-000001`, ..., mixed over folders so that a shard holds many classes.

Every object under a source is read, or a part of what is read, or passed over; what is passed over is counted by its reason:

- One layout is read, by default the one of most bytes: tars, Parquet files with a column of encoded images, or files that are images by their
  names or whose names say nothing (`0001`), of which reading tells those that are none. Suffixes count in any case.
- Parts are `classes.json`, `ingest.json`, the `.txt` and `.json` beside an image, and the `.parquet`, `.json`, `_stats.json` beside a tar.
- Hidden files, and what `cluster.listing` skips, are passed over, like everything else.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cluster import storage
from cluster.errors import RunError, SourceError, TophatError, one_line
from cluster.storage import FileEntry
from pipeline.data import kinds
from pipeline.data.labels import LabelFile, given_to, read_labels
from pipeline.data.reader import Reader
from pipeline.data.shards import Layout, Row, Shard, ShardError, shard_table, shards_of
from pipeline.recipe import images as recipe

if TYPE_CHECKING:
    import pyarrow as pa

FILES_PER_SHARD = 256
CLASSES_FILE = "classes.json"
INGEST_FILE = "ingest.json"
MUCH = 0.1
"""Share of a source's objects, or bytes, that is much to be passed over."""
FEW = 10
"""Objects that are never many."""
EXAMPLES = 3
"""Paths that are shown of each reason."""
SCHEMAS = 3
"""Parquet files that are opened until one can be read."""
REASONS = 8
"""Reasons that are told one by one; kinds of files beyond them are told together."""


@dataclass(frozen=True)
class PassedOver:
    """Objects of a source that are not read.

    Attributes:
        reason: what they are, as a plural noun.
        count: how many.
        bytes: of all of them.
        examples: paths of the first ones.
    """

    reason: str
    count: int
    bytes: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class ImageSource:
    """A source and the list of its shards, sorted by the bytes of their names.

    Attributes:
        reader: of its shards.
        listing: every shard.
        parts: objects that are parts of what is read, such as the text beside an image.
        passed_over: the objects that are not read, by reason, most of them first.
        labels: the file that has the labels, as it was read; None where there is none, and in a listing that was saved.
    """

    reader: Reader
    listing: tuple[Shard, ...]
    parts: int = 0
    passed_over: tuple[PassedOver, ...] = ()
    labels: LabelFile | None = None

    def shards(self) -> tuple[Shard, ...]:
        """Every shard."""
        return self.listing

    @cached_property
    def _by_name(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in self.listing}

    def read(self, shard_name: str, rows: Collection[int] | None = None) -> Iterator[Row]:
        """The images of the shard of that name; see `Reader.read`.

        Raises:
            ShardError: there is no such shard, or it cannot be read.
        """
        if shard_name not in self._by_name:
            raise ShardError(one_line(f"{shard_name} is not a shard of {self.reader.root}"))
        return self.reader.read(self._by_name[shard_name], rows)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size for shard in self.listing)

    def fingerprint(self) -> str:
        """Changes when the content of any shard does."""
        reader = self.reader
        columns = (reader.image_column, reader.label_column) if reader.layout == "parquet" else ()
        digest = hashlib.sha256(repr((reader.layout, reader.class_names, *columns)).encode())
        for shard in self.listing:
            digest.update(f"{shard.name}\0{shard.size}\0{shard.etag}\0".encode())
        return digest.hexdigest()[:16]

    def save(self, uri: str) -> None:
        """Publishes the listing as one Parquet file: `shard_table`, with the reader in its metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        metadata = {
            "tophat.reader": json.dumps(asdict(self.reader)),
            "tophat.beside": json.dumps([self.parts, [asdict(one) for one in self.passed_over]]),
        }
        sink = pa.BufferOutputStream()
        pq.write_table(shard_table(self.listing).replace_schema_metadata(metadata), sink)
        storage.publish(uri, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, uri: str) -> "ImageSource":
        """Reads what `save` wrote."""
        import pyarrow.parquet as pq

        with storage.open_input(uri) as file:
            table = pq.read_table(file)
        fields = json.loads(table.schema.metadata[b"tophat.reader"])
        fields["class_names"] = tuple(fields["class_names"]) if fields["class_names"] is not None else None
        parts, passed = json.loads(table.schema.metadata[b"tophat.beside"])
        passed_over = tuple(PassedOver(**one | {"examples": tuple(one["examples"])}) for one in passed)
        return cls(Reader(**fields), tuple(shards_of(table)), parts, passed_over)

    def check_outside(self, field: str, uri: str) -> None:
        """Makes sure that what is written does not become a part of the source.

        Raises:
            RunError: naming `field`: `uri` is inside it.
        """
        if f"{storage.absolute(uri)}/".startswith(f"{self.reader.root.rstrip('/')}/"):
            raise RunError(field, uri, "lies inside the source", "give a folder outside of it")

    def told(self) -> str | None:
        """What is passed over, and what labels are of no image, in one line; None where nothing is."""
        of_none = None if self.labels is None else self.labels.told()
        if not self.passed_over:
            return of_none
        count = sum(one.count for one in self.passed_over)
        reasons = ", ".join(f"{one.count:,} {one.reason} ({_few(one)})" for one in self.passed_over)
        passed = f"passed over: {count:,} of {self.objects:,} objects: {reasons}"
        return f"{passed}; {of_none}" if of_none else passed

    @property
    def objects(self) -> int:
        """Everything under the source: what is read, parts of it, and what is passed over."""
        read = sum(len(shard.files) or 1 for shard in self.listing)
        return read + self.parts + sum(one.count for one in self.passed_over)

    @property
    def lacks_much(self) -> bool:
        """Whether so much is passed over, or a label is of no image, that someone should look before work starts."""
        if self.labels and self.labels.missing:
            return True
        count, size = sum(one.count for one in self.passed_over), sum(one.bytes for one in self.passed_over)
        return size > MUCH * (size + self.bytes) or count > max(FEW, MUCH * self.objects)


def _few(one: PassedOver) -> str:
    return ", ".join(one_line(path)[-60:] for path in one.examples) + (", ..." if one.count > len(one.examples) else "")


def open_source(field: str, source: recipe.Source, *, labeled: bool = True) -> ImageSource:
    """Lists a source once.

    Args:
        field: the recipe's field or the option that names it, for messages.
        source: where and of what layout.
        labeled: whether its labels are read; else a Parquet column of that name may hold anything.

    Raises:
        SourceError: nothing is there, or nothing of that layout.
        StorageError: the store refuses.
    """
    root = storage.absolute(source.uri)
    labels_uri = None if source.labels is None else storage.absolute(source.labels)
    if labels_uri is not None and not labeled:
        raise SourceError(f"{field}.labels", source.labels, "is for images that are labeled", "leave it out")
    if not storage.is_remote(root) and os.path.isfile(root):
        raise SourceError(f"{field}.uri", source.uri, "is a file", "give the folder that it is in")
    try:
        files, skipped = storage.walk(root)
    except TophatError as error:
        rule, fix = getattr(error, "rule", str(error)), getattr(error, "fix", "check it")
        raise SourceError(f"{field}.uri", source.uri, rule, fix) from None
    if not files:
        rule, fix = "does not exist or holds no files", "check the path, or make shards with `tophat ingest`"
        if skipped:
            rule = f"holds no files, only {skipped[0].reason} ({one_line(skipped[0].path)})"
        elif storage.exists(root) and storage.is_remote(root):
            rule, fix = "is one object", "give the folder that it is in"
        raise SourceError(f"{field}.uri", source.uri, rule, fix)
    if any(f.path == INGEST_FILE for f in files) and not _complete(storage.join(root, INGEST_FILE)):
        rule, fix = "holds an ingest that did not finish", "run the same `tophat ingest` again"
        raise SourceError(f"{field}.uri", source.uri, rule, fix)
    others = [file for file in files if storage.inside(root, file.path) != labels_uri]
    content = _Content.of(root, others)
    layout = content.layout(field, source)
    names = _names_of_file(field, root, files)
    image_column = source.image_column or kinds.IMAGE_COLUMN
    if layout == "parquet" and content.schema is not None:
        from pipeline.data import parquet

        uri = storage.inside(root, content.described)
        image_column = parquet.image_column(f"{field}.image_column", uri, content.schema, source.image_column)
        if labeled:
            parquet.check_labels(f"{field}.label_column", uri, content.schema, source.label_column)
        names = names or parquet.class_names(content.schema, source.label_column)
    read, label_file = content.of_layout[layout], None
    if labels_uri is not None:
        if layout != "folder":
            rule, fix = (
                f"is for image files, and the source is of the layout {layout}",
                "leave it out, or name the layout",
            )
            raise SourceError(f"{field}.labels", source.labels, rule, fix)
        label_file, labels = read_labels(f"{field}.labels", labels_uri, [f.path for f in read])
        reason = f"images without a label in {one_line(labels_uri.rpartition('/')[2])}"
        skipped = [*skipped, *(storage.Skipped(f.path, reason, f.size) for f in read if f.path not in labels)]
        shards = given_to(_virtual_shards(f for f in read if f.path in labels), labels)
    elif layout == "folder":
        shards = _virtual_shards(read)
        # A folder without images is a class without images, which a labeled set must not have.
        folders = {f.path.partition("/")[0] for f in read if "/" in f.path} | set(storage.list_folders(root))
        names = names or tuple(sorted(folders)) or None
    else:
        shards = [Shard(f.path, f.size, f.etag) for f in read]
    parts, passed_over = content.beside(layout, skipped)
    parts += len(files) - len(others)
    reader = Reader(root, layout, image_column, source.label_column if labeled else None, names)
    return ImageSource(reader, tuple(shards), parts, passed_over, label_file)


@dataclass(frozen=True)
class _Content:
    """What a source holds.

    Attributes:
        of_layout: the files that each layout would read.
        others: the files that none would.
        schema: of the first Parquet file that can be read; None where none can.
        described: that file's path.
    """

    of_layout: dict[Layout, list[FileEntry]]
    others: list[FileEntry]
    schema: "pa.Schema | None"
    described: str

    @classmethod
    def of(cls, root: str, files: Sequence[FileEntry]) -> "_Content":
        found: dict[Layout, list[FileEntry]] = {"webdataset": [], "parquet": [], "folder": []}
        others = []
        for file in files:
            if storage.is_hidden(file.path):
                others.append(file)
            elif kinds.is_tar(file.path):
                found["webdataset"].append(file)
            elif kinds.is_parquet(file.path):
                found["parquet"].append(file)
            elif kinds.image_suffix(file.path) or kinds.is_bare(file.path):
                found["folder"].append(file)
            else:
                others.append(file)
        described, schema = _first_schema(root, found["parquet"])
        return cls(found, others, schema, described)

    def layout(self, field: str, source: recipe.Source) -> Layout:
        """The layout that is read.

        Raises:
            SourceError: there is nothing of it.
        """
        if source.layout != "auto":
            if not self.of_layout[source.layout]:
                rule = f"holds no files of the layout {source.layout}"
                raise SourceError(f"{field}.uri", source.uri, rule, "check uri and layout")
            return source.layout
        sizes: dict[Layout, tuple[bool, int]] = {
            name: (bool(named := [f.size for f in found if not kinds.is_bare(f.path)]), sum(named))
            for name, found in self.of_layout.items()
            if found and not (name == "parquet" and self._is_metadata and source.image_column is None)
        }
        if not sizes:
            if self.of_layout["parquet"]:
                return "parquet"  # whose columns then tell what is wrong
            rule = "holds no tar shards, Parquet files or images"
            if self.others:
                kinds_there = ", ".join(dict.fromkeys(_kind(f.path) for f in self.others))
                rule += f", only {one_line(kinds_there)[:200]}"
            raise SourceError(f"{field}.uri", source.uri, rule, "check uri and layout")
        # Names that say nothing count only where nothing else is there: a README beside shards may be the larger.
        return max(sizes, key=lambda name: sizes[name])

    @cached_property
    def _is_metadata(self) -> bool:
        """Whether the Parquet files describe images that are elsewhere."""
        from pipeline.data import parquet

        return self.schema is not None and not parquet.has_images(self.schema)

    def beside(self, layout: Layout, skipped: Iterable[storage.Skipped]) -> tuple[int, tuple[PassedOver, ...]]:
        """How many objects are parts of what `layout` reads, and the others that are not read."""
        stems = {kinds.stem(f.path) if layout == "folder" else _tar_stem(f.path) for f in self.of_layout[layout]}
        found: dict[str, list[tuple[str, int]]] = {}
        parts = 0
        for other, files in self.of_layout.items():
            for file in files if other != layout else ():
                if (
                    layout == "webdataset"
                    and other == "parquet"
                    and self._is_metadata
                    and _tar_stem(file.path) in stems
                ):
                    parts += 1
                else:
                    found.setdefault(_of_another(other, file.path), []).append((file.path, file.size))
        for file in self.others:
            if file.path in (CLASSES_FILE, INGEST_FILE) or (
                layout != "parquet" and _is_sidecar(layout, file.path, stems)
            ):
                parts += 1
            else:
                found.setdefault(_kind(file.path), []).append((file.path, file.size))
        for one in skipped:
            found.setdefault(one.reason, []).append((one.path, one.size))
        ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
        told, rest = ordered[:REASONS], [file for _, files in ordered[REASONS:] for file in files]
        if rest:
            told.append((f"of {len(ordered) - REASONS} more kinds", rest))
        return parts, tuple(
            PassedOver(reason, len(files), sum(size for _, size in files), tuple(path for path, _ in files[:EXAMPLES]))
            for reason, files in told
        )


def _of_another(layout: Layout, path: str) -> str:
    """What a file is that another layout would read."""
    if layout == "folder":
        return "images beside shards" if kinds.image_suffix(path) else "files without a suffix"
    return f"{'tars' if layout == 'webdataset' else 'Parquet files'} beside another layout"


def _kind(path: str) -> str:
    return "hidden files" if storage.is_hidden(path) else f"files of the kind {kinds.suffix(path)}"


def _tar_stem(path: str) -> str:
    """The path without the suffix of a tar, or of what img2dataset writes beside it."""
    lower = path.lower()
    for suffix in (*kinds.TAR_SUFFIXES, kinds.PARQUET_SUFFIX, "_stats.json", ".json"):
        if lower.endswith(suffix):
            return path[: -len(suffix)]
    return path


def _is_sidecar(layout: Layout, path: str, stems: Collection[str]) -> bool:
    if layout == "folder":
        return path.lower().endswith((".txt", ".json")) and kinds.stem(path) in stems
    return path.lower().endswith(".json") and _tar_stem(path) in stems


def _first_schema(root: str, files: Iterable[FileEntry]) -> "tuple[str, pa.Schema | None]":
    """The path and schema of the first Parquet file that can be read: others may be corrupt, which reading tells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in itertools.islice(files, SCHEMAS):
        try:
            with storage.open_input(storage.inside(root, file.path)) as opened:
                return file.path, pq.read_schema(opened)
        except (OSError, TophatError, pa.ArrowException):
            continue
    return "", None


def _complete(uri: str) -> bool:
    try:
        record = json.loads(storage.read_bytes(uri))
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("complete") is True


def _virtual_shards(files: Iterable[FileEntry]) -> list[Shard]:
    mixed = sorted(files, key=lambda f: hashlib.sha256(f.path.encode()).digest())
    shards = []
    for start in range(0, len(mixed), FILES_PER_SHARD):
        group = mixed[start : start + FILES_PER_SHARD]
        etag = hashlib.sha256("\0".join(f"{f.path}\0{f.etag}" for f in group).encode()).hexdigest()[:16]
        name = f"files-{start // FILES_PER_SHARD:06d}"
        paths, etags = tuple(f.path for f in group), tuple(f.etag for f in group)
        shards.append(Shard(name, sum(f.size for f in group), etag, paths, etags))
    return shards


def _names_of_file(field: str, root: str, files: Iterable[FileEntry]) -> tuple[str, ...] | None:
    """The class names in `classes.json`; None where there is none.

    Raises:
        SourceError: it is no list of names.
    """
    if not any(f.path == CLASSES_FILE for f in files):
        return None
    uri = storage.join(root, CLASSES_FILE)
    try:
        names = json.loads(storage.read_bytes(uri))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{field}.uri", uri, "must be a JSON list of class names", "correct or remove the file")
    return tuple(names)
