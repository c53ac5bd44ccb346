"""Shards of encoded images: WebDataset tars and Hugging Face Parquet, byte-identical for the same samples."""

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster import storage
from cluster.errors import RunError, SourceError
from models.inputs.formats import known
from pipeline.data import kinds
from pipeline.data.shards import Label
from pipeline.data.sources import CLASSES_FILE, INGEST_FILE

ShardLayout = Literal["webdataset", "parquet"]

SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "TIFF": "tif",
    "WEBP": "webp",
    "AVIF": "avif",
    "HEIF": "heic",
    "JXL": "jxl",
}
"""By the format that a file's first bytes tell."""


GROUP_ROWS, GROUP_BYTES = 256, 2**29
"""Of a row group of Parquet, at most."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image on its way into a shard.

    Attributes:
        data: the encoded image, copied as it is; may be empty or no image at all.
        label: the class's number in `class_names`, or whatever label the source gave; None where there is none.
        path: where the image was, relative to its source's root.
        index: its row there, where `path` is a shard.
    """

    data: bytes
    label: Label = None
    path: str | None = None
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What was published: counts, and the size of the shards in bytes."""

    images: int
    shards: int
    bytes: int


def write_shards(
    uri: str,
    samples: Iterable[Sample],
    *,
    layout: ShardLayout,
    images_per_shard: int,
    class_names: Sequence[str] | None = None,
) -> Written:
    """Publishes `shard-000000`, `shard-000001`, ... under `uri`, each whole or absent. One shard is held in memory.

    Args:
        uri: the folder.
        samples: in the order in which they are stored.
        layout: `webdataset`: the image, `.cls` (number or text) and `.json` (path, index); `parquet`: columns image
            struct<bytes: binary, path: string> and, where the first sample has a label, label int64 or string.
        images_per_shard: images in each shard but the last.
        class_names: names of numeric labels: `classes.json` (webdataset) or Hugging Face's `ClassLabel` (parquet).

    Raises:
        SourceError: labels that do not fit one column of Parquet.
        StorageError: the store refuses.
    """
    if layout == "webdataset" and class_names is not None:
        names = json.dumps(list(class_names), ensure_ascii=False, indent=0)
        storage.publish(storage.join(uri, CLASSES_FILE), names.encode("utf-8", "backslashreplace"))
    images = shards = size = 0
    remaining, schema = iter(samples), None
    while batch := list(itertools.islice(remaining, images_per_shard)):
        if layout == "webdataset":
            content, suffix = tar_bytes(batch, images), "tar"
        else:
            schema = schema or parquet_schema(batch, class_names)
            content, suffix = parquet_bytes(batch, schema), "parquet"
        storage.publish(storage.join(uri, f"shard-{shards:06d}.{suffix}"), content)
        images, shards, size = images + len(batch), shards + 1, size + len(content)
    return Written(images, shards, size)


def tar_bytes(samples: Iterable[Sample], first: int = 0) -> bytes:
    """A WebDataset tar: members sorted, owned by nobody, of no date; sample `i` is named by the number `first + i`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number, sample in enumerate(samples, first):
            for suffix, content in sorted(_members(sample).items()):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _members(sample: Sample) -> dict[str, bytes]:
    members = {_suffix(sample): sample.data}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode("utf-8", "backslashreplace")
    origin = {"path": sample.path, "index": sample.index}
    origin = {key: value for key, value in origin.items() if value is not None}
    if origin:
        members["json"] = json.dumps(origin, sort_keys=True).encode()
    return members


def _suffix(sample: Sample) -> str:
    """By content, else by the file's old name; content that is no image gets one too, so that it is scored and recorded."""
    found = SUFFIXES.get(known(sample.data) or "")
    return found or (kinds.image_suffix(sample.path or "") or ".jpg")[1:]


def parquet_schema(samples: Sequence[Sample], class_names: Sequence[str] | None) -> Any:
    """The schema of a source's shards, by its first samples, with Hugging Face's description of the columns."""
    import pyarrow as pa

    features: dict[str, Any] = {"image": {"_type": "Image"}}
    fields = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    label = next((sample.label for sample in samples if sample.label is not None), None)
    if label is not None or class_names is not None:
        numeric = not isinstance(label, str)
        features["label"] = {"dtype": "int64" if numeric else "string", "_type": "Value"}
        if numeric and class_names is not None:
            features["label"] = {"names": [_utf8(name) for name in class_names], "_type": "ClassLabel"}
        fields.append(pa.field("label", pa.int64() if numeric else pa.string()))
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def parquet_bytes(samples: Sequence[Sample], schema: Any) -> bytes:
    """A Parquet file in row groups of 256 images, or fewer where these are large, so that single rows can be read without the rest.

    Raises:
        SourceError: labels that do not fit the schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="none") as writer:
        for group in _groups(samples):
            images = [{"bytes": s.data, "path": None if s.path is None else _utf8(s.path)} for s in group]
            columns = [pa.array(images, schema.field("image").type)]
            if "label" in schema.names:
                columns.append(_label_column(group, schema.field("label").type))
            elif (label := next((s.label for s in group if s.label is not None), None)) is not None:
                raise SourceError("label", label, "comes after a whole shard of images without labels", WEBDATASET)
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return bytes(sink.getvalue().to_pybytes())


WEBDATASET = "use --as webdataset"


def _groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    size = 0
    for sample in samples:
        if len(group) == GROUP_ROWS or (group and size + len(sample.data) > GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(sample)
        size += len(sample.data)
    if group:
        yield group


def _label_column(samples: Sequence[Sample], kind: Any) -> Any:
    import pyarrow as pa

    labels = [_utf8(s.label) if isinstance(s.label, str) else s.label for s in samples]
    for label in labels:
        if label is not None and isinstance(label, str) != pa.types.is_string(kind):
            raise SourceError("label", label, "is of another type than the labels before it", WEBDATASET)
        if isinstance(label, int) and not -(2**63) <= label < 2**63:
            raise SourceError("label", label, "does not fit into 64 bits", WEBDATASET)
    return pa.array(labels, kind)


def _utf8(text: str) -> str:
    """File names are bytes: what is not UTF-8 in them is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def completed(field: str, uri: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a complete writing of the same `identity` in this folder, or None where the writing may begin.

    What is written is a function of `identity`, so an unfinished writing is simply started again over its own files.

    Raises:
        RunError: the folder holds something else.
        StorageError: it cannot be read.
    """
    record = storage.join(uri, INGEST_FILE)
    if storage.exists(record):
        content = _record(record)
        if content.get("identity") != dict(identity):
            raise RunError(field, uri, "holds another ingest", "give another folder, or remove this one")
        return content if content.get("complete") else None
    if storage.list_files(uri):
        raise RunError(field, uri, "is not empty", "give another folder, or remove this one")
    return None


def begin(field: str, uri: str, identity: Mapping[str, Any]) -> None:
    """Marks the folder as unfinished, so that no source is read out of it before `finish`.

    Raises:
        StorageError: naming `field`, when it cannot be written.
    """
    storage.check_writable(field, uri)
    _publish_record(storage.join(uri, INGEST_FILE), {"complete": False, "identity": dict(identity)})


def abandon(uri: str) -> None:
    """Removes what an unfinished writing has left, so that another one may begin."""
    for file in storage.list_files(uri):
        if file.path in (CLASSES_FILE, INGEST_FILE) or re.fullmatch(r"shard-\d{6,}\.(tar|parquet)", file.path):
            storage.delete_file(storage.join(uri, file.path))


def finish(uri: str, identity: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Marks the folder complete; called last."""
    record = {"complete": True, "identity": dict(identity), **counts}
    _publish_record(storage.join(uri, INGEST_FILE), record)


def _record(uri: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read_bytes(uri))
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _publish_record(uri: str, content: Mapping[str, Any]) -> None:
    storage.publish(uri, (json.dumps(content, indent=2) + "\n").encode())
