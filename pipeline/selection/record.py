"""What lies beside a selection: what it was made of, and the images' own names.

OUT/part-*.parquet    the selection
OUT/_selection.json   its classes, its source, its settings and counts: written last
OUT/_files.csv        of images that are files of their own: class, rank, score and file
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cluster import storage
from cluster.errors import MissingError, RunError, SourceError
from cluster.store import publish_json, read_json
from pipeline.data.shards import Shard
from pipeline.data.sources import ImageSource
from pipeline.selection.select import RECORD, Selected, read_selection

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

FILES = "_files.csv"
"""Readers of folders of Parquet files pass over names with an underscore."""


@dataclass(frozen=True)
class Record:
    """What a selection was made of, and came to.

    Attributes:
        selected: its counts.
        settings: the fields of a recipe's section `select` that decide it, those at their default left out.
        classes: class i is classes[i]; None where the scores do not tell.
        source: fingerprint of the listing of the images; None where the scores do not tell.
        root: where these were.
    """

    selected: Selected
    settings: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    source: str | None = None
    root: str | None = None


def publish(
    selected: Selected, settings: dict[str, Any], classes: Sequence[str] | None, source: ImageSource | None
) -> str | None:
    """Writes what lies beside a selection that has just been made.

    Args:
        selected: the selection.
        settings: as in `Record`.
        classes: as in `Record`.
        source: the images that it was made of, where they are known.

    Returns:
        The URI of the table of files; None where the images are not files of their own.
    """
    names = None if classes is None else tuple(classes)
    told = (None, None) if source is None else (source.fingerprint(), source.reader.root)
    storage.delete_file(storage.join(selected.uri, FILES))
    files = None
    if source is not None and source.reader.layout == "folder" and selected.selected:
        files = storage.join(selected.uri, FILES)
        table, sink = files_table(read_selection(selected.uri), source.shards(), names), pa.BufferOutputStream()
        pacsv.write_csv(table, sink)
        storage.publish(files, sink.getvalue().to_pybytes())
    publish_json(storage.join(selected.uri, RECORD), asdict(Record(selected, settings, names, *told)))
    return files


def files_table(selection: pa.Table, shards: Sequence[Shard], classes: Sequence[str] | None) -> pa.Table:
    """The files of the selected images: columns class (its name, or else its number), rank, score, file; in the selection's order.

    Args:
        selection: as `read_selection` gives it.
        shards: virtual ones, of the source that it was made of.
        classes: names, by class id.

    Raises:
        SourceError: an image is none of theirs.
    """
    coded = selection["shard"].combine_chunks()
    known = {shard.name: shard for shard in shards}
    used = [known.get(name) for name in coded.dictionary.to_pylist()]
    names = pa.array([file for shard in used for file in (shard.files if shard else ())], pa.string())
    counts = np.array([len(shard.files) if shard else 0 for shard in used], np.int64)
    starts = np.cumsum(counts) - counts
    code, index = coded.indices.to_numpy(zero_copy_only=False), selection["index"].to_numpy().astype(np.int64)
    if len(lost := np.flatnonzero(index >= counts[code])):
        where = f"{coded[int(lost[0])].as_py()} [{index[lost[0]]}]"
        raise SourceError("selection", where, "is not an image of the source", "give the source that was scored")
    labels = selection["class_id"].combine_chunks()
    named = labels.cast(pa.string()) if classes is None else pa.array(classes, pa.string()).take(labels)
    columns = [named, selection["rank"], selection["score"], names.take(pa.array(starts[code] + index))]
    return pa.table(columns, ["class", "rank", "score", "file"])


def check_folder(field: str, uri: str) -> None:
    """Makes sure that a selection can be put into a folder.

    Raises:
        RunError: it holds something else; names `field`.
    """
    names = [file.path.rpartition("/")[2] for file in storage.list_files(uri)]
    if RECORD not in names and not all(name.startswith(("part-", "_")) for name in names):
        raise RunError(field, uri, "holds files that are no selection", "give an empty or new folder")


def read_record(field: str, uri: str) -> Record:
    """The record of a finished selection; `field` names its folder in messages.

    Raises:
        RunError: there is no selection with a record.
    """
    fix = "give the --out of a `tophat select` that came to its end, or a run's selection"
    try:
        said = read_json(storage.join(uri, RECORD))
    except MissingError:
        raise RunError(field, uri, "holds no selection that says what it was made of", fix) from None
    try:
        return TypeAdapter(Record).validate_python(said)
    except ValidationError:
        raise RunError(field, uri, f"has a {RECORD} that is none", fix) from None


def check_whole(field: str, uri: str, record: Record) -> None:
    """Makes sure that the selection is what its record says.

    Raises:
        SourceError: it is not, or cannot be read.
    """
    table = read_selection(uri)
    counts = pc.value_counts(table["class_id"]).to_pylist()
    found = {one["values"]: one["counts"] for one in counts}
    if [found.get(number, 0) for number in range(len(record.selected.counts))] != list(record.selected.counts):
        raise SourceError(field, uri, f"is not what its {RECORD} says", "select again")
