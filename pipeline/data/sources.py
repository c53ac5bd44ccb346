"""Sources of images: WebDataset tars, Parquet with an image column, folders of image files; on a disk or in an object store.

An image's identity is `(shard, index)`: the shard's path relative to the source's root, and the 0-based row in it. Many small files are
grouped into virtual shards named `files-000000`, `files-000001`, ..., mixed over folders so that a shard holds many classes.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster import storage
from cluster.errors import SourceError, TophatError, one_line
from cluster.storage import FileEntry
from pipeline.data.shards import IMAGE_SUFFIXES, Layout, Reader, Row, Shard, ShardError, shard_table, shards_of
from pipeline.recipe import sections as recipe

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
FILES_PER_SHARD = 256
CLASSES_FILE = "classes.json"
INGEST_FILE = "ingest.json"


@dataclass(frozen=True)
class ImageSource:
    """A source and the list of its shards, sorted by the bytes of their names."""

    reader: Reader
    listing: tuple[Shard, ...]

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
        digest = hashlib.sha256(repr((self.reader.layout, self.reader.class_names)).encode())
        for shard in self.listing:
            digest.update(f"{shard.name}\0{shard.size}\0{shard.etag}\0".encode())
        return digest.hexdigest()[:16]

    def save(self, uri: str) -> None:
        """Publishes the listing as one Parquet file: `shard_table`, with the reader in its metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        reader = {"tophat.reader": json.dumps(self.reader.__dict__)}
        sink = pa.BufferOutputStream()
        pq.write_table(shard_table(self.listing).replace_schema_metadata(reader), sink)
        storage.publish(uri, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, uri: str) -> "ImageSource":
        """Reads what `save` wrote."""
        import pyarrow.parquet as pq

        with storage.open_input(uri) as file:
            table = pq.read_table(file)
        fields = json.loads(table.schema.metadata[b"tophat.reader"])
        fields["class_names"] = tuple(fields["class_names"]) if fields["class_names"] is not None else None
        return cls(Reader(**fields), tuple(shards_of(table)))


def open_source(field: str, source: recipe.Source) -> ImageSource:
    """Lists a source once.

    Args:
        field: the recipe's field or the option that names it, for messages.
        source: where and of what layout.

    Raises:
        SourceError: nothing is there, or nothing of that layout.
        StorageError: the store refuses.
    """
    root = storage.absolute(source.uri)
    try:
        files = storage.list_files(root)
    except TophatError as error:
        rule, fix = getattr(error, "rule", str(error)), getattr(error, "fix", "check it")
        raise SourceError(f"{field}.uri", source.uri, rule, fix) from None
    if not files:
        raise SourceError(
            f"{field}.uri",
            source.uri,
            "does not exist or holds no files",
            "check the path, or make shards with `tophat ingest`",
        )
    if any(f.path == INGEST_FILE for f in files) and not _complete(storage.join(root, INGEST_FILE)):
        raise SourceError(
            f"{field}.uri", source.uri, "holds an ingest that did not finish", "run the same `tophat ingest` again"
        )
    found = {
        "webdataset": [f for f in files if f.path.endswith(TAR_SUFFIXES)],
        "parquet": [f for f in files if f.path.endswith(".parquet")],
        "folder": [f for f in files if f.path.lower().endswith(IMAGE_SUFFIXES)],
    }
    layouts: tuple[Layout, ...] = ("webdataset", "parquet", "folder")
    layout = next((name for name in layouts if found[name]), None) if source.layout == "auto" else source.layout
    if layout is None or not found[layout]:
        wanted = "tar shards, Parquet files or images" if layout is None else f"files of the layout {layout}"
        raise SourceError(f"{field}.uri", source.uri, f"holds no {wanted}", "check uri and layout")
    shards = (
        _virtual_shards(found["folder"])
        if layout == "folder"
        else [Shard(f.path, f.size, f.etag) for f in found[layout]]
    )
    names = _class_names(field, root, layout, files, found[layout], source)
    return ImageSource(Reader(root, layout, source.image_column, source.label_column, names), tuple(shards))


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


def _class_names(
    field: str, root: str, layout: Layout, files: list[FileEntry], shards: list[FileEntry], source: recipe.Source
) -> tuple[str, ...] | None:
    if any(f.path == CLASSES_FILE for f in files):
        uri = storage.join(root, CLASSES_FILE)
        try:
            names = json.loads(storage.read_bytes(uri))
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SourceError(f"{field}.uri", uri, "must be a JSON list of class names", "correct or remove the file")
        return tuple(names)
    if layout == "folder":
        # A folder without images is a class without images, which a labeled set must not have.
        folders = {f.path.partition("/")[0] for f in files if "/" in f.path} | set(storage.list_folders(root))
        return tuple(sorted(folders)) or None
    if layout == "parquet":
        return _parquet_names(field, storage.join(root, shards[0].path), source)
    return None


def _parquet_names(field: str, uri: str, source: recipe.Source) -> tuple[str, ...] | None:
    """Names of a `ClassLabel` column, which Hugging Face's `datasets` keeps in the file's metadata.

    Raises:
        SourceError: the file has no such image column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_input(uri) as file:
            schema = pq.read_schema(file)
    except (OSError, pa.ArrowException):
        return None  # this shard is corrupt, others may be good: reading says so
    if source.image_column not in schema.names:
        rule, fix = f"is not a column of {uri}", f"use one of {', '.join(schema.names)}"
        raise SourceError(f"{field}.image_column", source.image_column, rule, fix)
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    try:
        features: Any = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[source.label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names)
