"""Parquet files with a column of encoded images, as Hugging Face's `datasets`, img2dataset and others write them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import SourceError
from pipeline.data.kinds import IMAGE_COLUMN
from pipeline.data.shards import Label, Row
from pipeline.data.words import TAG_FIELDS, split_tags

READ_ROWS, READ_BYTES = 256, 128 * 2**20
"""That are taken into memory at once, at most; Arrow has no structs of more than 2 GiB."""


def image_column(field: str, uri: str, schema: pa.Schema, given: str | None) -> str:
    """The column of images.

    Args:
        field: the recipe's field that names it, for messages.
        uri: of the file, for messages.
        schema: of the file.
        given: the column's name; None: `image`, or else the only column that holds encoded images.

    Raises:
        SourceError: there is none, there are several, or it holds something else.
    """
    usable = [column.name for column in schema if _holds_images(column.type)]
    name = given or (IMAGE_COLUMN if IMAGE_COLUMN in schema.names else None)
    if name is None:
        if len(usable) == 1:
            return str(usable[0])
        columns = ", ".join(usable or [f"{column.name} {column.type}" for column in schema])
        rule = f"has {'several columns' if usable else 'no column'} of encoded images ({columns}) in {uri}"
        fix = f"name one with {field}" if usable else "give Parquet with the images' bytes, or the folder of the images"
        raise SourceError(field, "nothing", rule, fix)
    if schema.names.count(name) != 1:
        raise SourceError(field, name, f"is not one column of {uri}", f"use one of {', '.join(schema.names)}")
    if name not in usable:
        fix = f"use {' or '.join(usable)}" if usable else "write it as binary: the bytes of image files"
        rule = f"holds {schema.field(name).type} in {uri}, which are no encoded images"
        raise SourceError(field, name, rule, fix)
    return name


def check_labels(field: str, uri: str, schema: pa.Schema, column: str) -> None:
    """Raises a SourceError where the column of labels, if there is one, can hold none; the rest as in `image_column`."""
    if schema.names.count(column) > 1:
        raise SourceError(field, column, f"is several columns of {uri}", "name one that is there once")
    if column in schema.names and not _holds_labels(schema.field(column).type):
        rule = f"holds {schema.field(column).type} in {uri}"
        raise SourceError(field, column, rule, "name a column of class numbers or class names, one for each image")


def has_images(schema: pa.Schema) -> bool:
    """Whether a file has a column of encoded images at all."""
    return any(_holds_images(column.type) for column in schema)


def class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Names of a `ClassLabel` column, which Hugging Face's `datasets` keeps in the file's metadata."""
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    try:
        features: Any = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) else None


def read_parquet(
    name: str,
    file: Any,
    wanted: frozenset[int] | None,
    tags: bool,
    *,
    images: str,
    labels: str | None,
    buffer_size: int,
) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        name: of the file, for messages.
        file: it, opened.
        wanted: indices of the rows that are yielded; None for all.
        tags: whether `Row.words` is filled.
        images: the column of encoded images.
        labels: the column of labels, which a file may lack; None where nobody wants them.
        buffer_size: bytes of one read.

    Raises:
        SourceError: its columns are not these.
        pyarrow.ArrowException, OSError: it is damaged.
    """
    with pq.ParquetFile(file, buffer_size=buffer_size) as parquet:
        schema = parquet.schema_arrow
        image_column("image_column", name, schema, images)
        labels = labels if labels in schema.names else None
        if labels is not None:
            check_labels("label_column", name, schema, labels)
        words = [field for field in TAG_FIELDS if tags and schema.names.count(field) == 1]
        columns = list(dict.fromkeys([images, *([labels] if labels else []), *words]))
        start = 0
        rows = _rows_at_once(parquet.metadata)
        for batch in parquet.iter_batches(batch_size=rows, columns=columns):
            column = batch.column(images)
            paths: pa.Array | None = None
            if pa.types.is_struct(column.type):
                fields = {column.type.field(i).name: values for i, values in enumerate(column.flatten())}
                column, paths = fields["bytes"], fields.get("path")
            classes = labels_of(name, labels, batch.column(labels)) if labels else None
            for offset in range(batch.num_rows):
                if wanted is None or start + offset in wanted:
                    data = column[offset].as_py()
                    path = paths[offset].as_py() if paths is not None else None
                    problem = None if data is not None else _no_bytes(path)
                    label = None if classes is None else classes[offset]
                    found = tuple(word for field in words for word in split_tags(batch.column(field)[offset].as_py()))
                    file = f"{name}/{path}" if isinstance(path, str) else None
                    yield Row(start + offset, data or b"", label, problem, "empty", words=found, file=file)
            start += batch.num_rows


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    size: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    rows: int = metadata.num_rows
    return max(1, min(READ_ROWS, READ_BYTES * max(1, rows) // max(1, size)))


def _no_bytes(path: object) -> str:
    return f"no bytes, only the path {path}" if isinstance(path, str) else "no bytes"


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_images(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    tests = ("integer", "floating", "decimal", "boolean", "string", "large_string", "string_view", "binary", "null")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests) or bool(pa.types.is_large_binary(kind))


def labels_of(name: str, field: str, column: pa.Array | pa.ChunkedArray) -> list[Label]:
    """Labels as numbers and texts: a number without a fraction is that number, whatever its type, NaN is no label, bytes are UTF-8.

    Raises:
        SourceError: a number with a fraction.
    """
    values: Sequence[Any] = column.to_pylist()
    found: list[Label] = []
    for value in values:
        if value is None or value != value:
            found.append(None)
        elif isinstance(value, str):
            found.append(value)
        elif isinstance(value, bytes):
            found.append(value.decode("utf-8", "backslashreplace"))
        else:
            try:
                number = int(value)
            except (ValueError, OverflowError):  # infinity
                number = None
            if number is None or number != value:
                raise SourceError(field, value, f"is no class number, in {name}", "correct it, or name another column")
            found.append(number)
    return found
