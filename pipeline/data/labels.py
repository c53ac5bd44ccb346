"""Labels in a file beside the images: CSV, TSV or Parquet, with a path and a label in each row.

Paths are relative to the source's root. A file names many images that are elsewhere only by mistake, so rows without an image are counted, and
refused where they are more than half.
"""

import csv
import hashlib
import io
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster import storage
from cluster.errors import InputError, SourceError, one_line, shown
from cluster.store import Outside
from pipeline.data.shards import Shard

PATHS = (
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "path",
    "image",
    "image_path",
    "image_file",
    "image_name",
    "image_id",
    "img",
    "name",
    "id",
)
"""Names of a column of paths, in any case; of several, the first of these counts."""
LABELS = ("label", "labels", "class", "class_name", "category", "target")
"""Names of a column of labels."""
DELIMITERS = ",\t;"
EXAMPLES = 3

Row = tuple[str, str, str]
"""Where it is in the file, in words; the path; the label."""


@dataclass(frozen=True)
class LabelFile:
    """A file of labels, as it was read.

    Attributes:
        uri: where it is.
        fingerprint: of its content.
        rows: with a label.
        missing: rows that name no image of the source.
        examples: paths in the first of these.
    """

    uri: str
    fingerprint: str
    rows: int
    missing: int
    examples: tuple[str, ...]

    def changed(self) -> bool:
        """Whether its content is not what was read."""
        try:
            return _fingerprint(storage.read_bytes(self.uri)) != self.fingerprint
        except InputError:  # it is gone
            return True

    def told(self) -> str | None:
        """What of it names no image, in one line; None where all do."""
        if not self.missing:
            return None
        return f"{self.missing:,} of {self.rows:,} rows of {one_line(self.uri)} name no image ({_few(self.examples, self.missing)})"


def _few(paths: Sequence[str], of: int) -> str:
    return ", ".join(one_line(path)[-60:] for path in paths[:EXAMPLES]) + (", ..." if of > EXAMPLES else "")


def label_file(field: str, uri: str | None) -> dict[str, str | Outside]:
    """A source's file of labels among the inputs of a stage: its content decides, as its name does not.

    Args:
        field: of the source.
        uri: of the file; None where there is none.

    Raises:
        SourceError: it cannot be read.
    """
    if uri is None:
        return {}
    name, place = f"{field}.labels", storage.absolute(uri)
    return {"labels": Outside.at(name, place, lambda: _fingerprint(_content(name, place)))}


def read_labels(field: str, uri: str, paths: Collection[str]) -> tuple[LabelFile, Mapping[str, str]]:
    """A file of labels, and the labels that it gives, by path.

    Args:
        field: the recipe's field or the option that names it, for messages.
        uri: of the file.
        paths: of the images, relative to their source's root.

    Raises:
        SourceError: it cannot be read or understood, gives an image two labels or none, or mostly names images that are not there.
    """
    content, there = _content(field, uri), frozenset(paths)
    rows = list((_of_parquet if content[:4] == b"PAR1" else _of_text)(field, uri, content, there))
    labels: dict[str, str] = {}
    places: dict[str, str] = {}
    missing: list[str] = []
    for place, path, label in rows:
        if not label:
            raise SourceError(field, uri, f"has no label for {shown(path)} in {place}", "write one, or remove the row")
        # A name may well have a backslash; else it is one that Windows wrote.
        found = path if path in there else posixpath.normpath(path.replace("\\", "/"))
        if found not in there:
            missing.append(path)
        elif labels.setdefault(found, label) != label:
            rule = f"gives {shown(found)} the label {shown(labels[found])} in {places[found]} and {shown(label)} in {place}"
            raise SourceError(field, uri, rule, "keep one of them")
        places.setdefault(found, place)
    if not rows:
        raise SourceError(field, uri, "has no rows", "write a path and a label in each")
    if 2 * len(missing) > len(rows):
        rule = f"names {len(missing):,} images, of {len(rows):,}, that are not in the source ({_few(missing, len(missing))})"
        raise SourceError(field, uri, rule, "write paths that are relative to its uri, with their suffixes")
    made = LabelFile(uri, _fingerprint(content), len(rows), len(missing), tuple(missing[:EXAMPLES]))
    return made, labels


def _content(field: str, uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except InputError as error:
        raise SourceError(field, uri, error.rule, error.fix) from None


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _columns(names: Sequence[str]) -> tuple[int | None, int | None]:
    """Which columns are of paths and of labels, by their names; of two columns, the one without a known name is the other."""
    plain = [name.strip().casefold() for name in names]
    path, label = (next((plain.index(name) for name in known if name in plain), None) for known in (PATHS, LABELS))
    if len(plain) == 2 and (path is None) != (label is None):
        path, label = (1 - label if label is not None else path), (1 - path if path is not None else label)
    return path, label


def _unnamed(field: str, uri: str, names: Sequence[str]) -> SourceError:
    rule = (
        f"has columns of which it is not clear which are the paths and the labels ({one_line(', '.join(names))[:200]})"
    )
    return SourceError(field, uri, rule, "call them file and label")


def _of_text(field: str, uri: str, content: bytes, there: Collection[str]) -> Iterator[Row]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SourceError(field, uri, f"is not UTF-8 in line {line}", "save it as CSV in UTF-8") from None
    first = text.lstrip().partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: tuple[int, int] | None = None
    try:
        for cells in reader:
            if not any(cells):
                continue
            place = f"line {reader.line_num}"
            if columns is None:
                path, label = _columns(cells)
                if path is None and label is None:
                    columns = (0, 1)
                elif path is None or label is None:
                    raise _unnamed(field, uri, cells)
                else:
                    columns = (path, label)
                    if cells[path] not in there:
                        continue  # a header, and no image of such a name
            if len(cells) <= max(columns):
                rule = f"has {len(cells)} columns in {place}, where a path and a label are needed"
                raise SourceError(field, uri, rule, "separate them by a comma, a tab or a semicolon")
            yield place, cells[columns[0]], cells[columns[1]].strip()
    except csv.Error as error:
        raise SourceError(field, uri, f"is no CSV in line {reader.line_num} ({error})", "correct the quotes") from None


def _of_parquet(field: str, uri: str, content: bytes, there: Collection[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.data import parquet

    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(field, uri, f"is damaged ({one_line(str(error))[:200]})", "write it again") from None
    names = table.column_names
    path, label = _columns(names)
    if path is None and label is None and len(names) == 2:
        path, label = 0, 1
    if path is None or label is None:
        raise _unnamed(field, uri, names)
    parquet.check_labels(field, uri, table.schema, names[label])
    labels = parquet.labels_of(uri, field, table.column(label))
    for number, (one, given) in enumerate(zip(table.column(path).to_pylist(), labels, strict=True)):
        if not isinstance(one, str):
            raise SourceError(field, uri, f"has {shown(one)} for a path in row {number}", "write paths as texts")
        yield f"row {number}", one, "" if given is None else str(given).strip()


def given_to(shards: Sequence[Shard], labels: Mapping[str, str]) -> list[Shard]:
    """The virtual shards with the labels of their images: another label makes another shard."""
    made = []
    for shard in shards:
        texts = tuple(labels[path] for path in shard.files)
        etag = hashlib.sha256("\0".join((shard.etag, *texts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        made.append(Shard(shard.name, shard.size, etag, shard.files, shard.etags, texts))
    return made
