"""Score tables as selection reads them: the contract of their files, their division into tasks, and their rows.

A table of tags (weak labels) is read in the same way: `shard`, `index` and `class_ids`, a list of any length, whose
scores are random draws (supplement 2, "balanced-with-tags").
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cluster import storage
from cluster.errors import SourceError, one_line
from pipeline.selection.quotas import random_scores
from pipeline.selection.topk import Bool, Candidates, Int32, UInt32, UInt64

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

COLUMNS = ["shard", "index", "class_ids", "scores"]
CLASSES_METADATA = b"tophat.num_classes"
MAX_CLASSES = 1 << 24  # thresholds are a dense array over the classes
BATCH_ROWS = 1 << 15
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """What every file of one score table shares, and how much of it is used.

    Attributes:
        stored: classes per image in the files; None when files may differ, because not all are used, and in tags.
        classes_per_image: how many of them are candidates, the best first; the most that any selection takes.
        fewest: the least that any selection takes.
        num_classes: how many classes the teacher has; 0 as long as it is unknown.
        bytes_per_row: of the first file.
        seed: of the random draws that stand for the scores of tags; None in a table of scores.
    """

    stored: int | None
    classes_per_image: int
    fewest: int
    num_classes: int
    bytes_per_row: float
    seed: int | None = None


@dataclass(frozen=True)
class Slice:
    """The `part`-th of `parts` equal ranges of the row groups of one score file, or its first `rows` rows."""

    uri: str
    part: int
    parts: int
    rows: int | None = None


@dataclass(frozen=True)
class Exclusions:
    """Images that must not be selected.

    Attributes:
        shards: pyarrow string array, sorted.
        images: uint64 [N], ascending: the ordinal of the shard in the upper half, the index in the lower.
    """

    shards: pa.StringArray
    images: UInt64

    def among(self, shard: pa.DictionaryArray, index: UInt32) -> Bool | None:
        """Which images of a batch are excluded, bool [N]; None when none is."""
        known = pc.index_in(shard.dictionary.cast(pa.string()), self.shards).fill_null(-1).to_numpy()
        if not (known >= 0).any():
            return None
        ordinal = known[shard.indices.to_numpy(zero_copy_only=False)].astype(np.int64)
        image = (ordinal.astype(np.uint64) << np.uint64(32)) | index
        place = np.minimum(np.searchsorted(self.images, image), len(self.images) - 1)
        found = (self.images[place] == image) & (ordinal >= 0)
        return found if found.any() else None


def read_exclusions(uris: Sequence[str]) -> Exclusions | None:
    """The images that Parquet files list by their columns `shard` and `index`; None when there are none.

    Args:
        uris: files (their names end in .parquet), or folders of files.

    Raises:
        SourceError: one holds no Parquet file, or its columns are not these.
    """
    found: dict[str, list[Any]] = {}
    fix = "give files with the columns shard and index"
    for uri in map(storage.absolute, uris):
        single = uri.endswith(".parquet")
        names = [uri] if single else [storage.join(uri, f.path) for f in storage.list_files(uri, ".parquet")]
        if not names or (single and not storage.exists(uri)):
            raise SourceError("exclude", uri, "holds no Parquet files", fix)
        for name in names:
            with storage.open_input(name) as file, blamed("exclude", lambda name=name: name, fix):  # type: ignore[misc]
                table = pq.read_table(file, columns=["shard", "index"])
                if table["index"].null_count or table["shard"].null_count:
                    raise ValueError("has null values")
                shard = table["shard"].cast(pa.string()).combine_chunks()
                index = table["index"].cast(pa.uint32()).to_numpy()
            encoded = shard.dictionary_encode()
            codes = encoded.indices.to_numpy()
            for code, text in enumerate(encoded.dictionary.to_pylist()):
                found.setdefault(text, []).append(index[codes == code])
    if not found:
        return None
    order = sorted(found, key=str.encode)
    keys = [(np.uint64(n) << np.uint64(32)) | np.unique(np.concatenate(found[text])) for n, text in enumerate(order)]
    return Exclusions(pa.array(order, pa.string()), np.concatenate(keys))


def read_layout(
    uri: str, size: int, classes_per_image: Sequence[int | None], num_classes: int | None, seed: int | None = None
) -> Layout:
    """The layout of the table whose first file is `uri`, of `size` bytes.

    Args:
        classes_per_image: every P that is asked for; None is all that are stored.
        num_classes: what the table must agree with, or lacks.
        seed: makes it a table of tags.
    """
    with storage.open_input(uri) as file, blamed("scores", lambda: uri):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    per_row = size / max(metadata.num_rows, 1)
    stored = _check(uri, schema, Layout(None, 1, 1, 0, per_row, seed))
    asked = [number for number in classes_per_image if number is not None]
    if asked and max(asked) > stored:
        rule = f"must be at most {stored}, the classes stored per image in {uri}"
        raise SourceError("classes_per_image", max(asked), rule, "lower it")
    said = int((schema.metadata or {}).get(CLASSES_METADATA, 0)) or num_classes or 0
    if num_classes is not None and said != num_classes:
        raise SourceError("scores", uri, f"has {said} classes, and {num_classes} are expected", "score with this model")
    whole = len(asked) < len(classes_per_image)
    same = whole and seed is None
    most = stored if whole else max(asked)
    return Layout(stored if same else None, most, min([most, *asked]), said, per_row, seed)


def _check(uri: str, schema: pa.Schema, layout: Layout) -> int:
    """Classes per image in a score file (1 in tags), after its schema was compared with the contract and `layout`.

    Raises:
        SourceError: naming the file and the column.
    """
    fix = "write shard string, index uint32, class_ids fixed_size_list<int32> and scores fixed_size_list<float32>"
    tags = layout.seed is not None
    for name in COLUMNS[:3] if tags else COLUMNS:
        if len(schema.get_all_field_indices(name)) != 1:
            raise SourceError("scores", uri, f"must have one column `{name}`", fix)
    shard, index, class_ids = (schema.field(name).type for name in COLUMNS[:3])
    scores = class_ids if tags else schema.field("scores").type
    text = shard.value_type if pa.types.is_dictionary(shard) else shard
    lists = pa.types.is_fixed_size_list(class_ids) or (tags and pa.types.is_list(class_ids))
    wrong = {
        "shard": not (pa.types.is_string(text) or pa.types.is_large_string(text)),
        "index": index != pa.uint32(),
        "class_ids": not lists or class_ids.value_type != pa.int32(),
        "scores": not tags and (not pa.types.is_fixed_size_list(scores) or scores.value_type != pa.float32()),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise SourceError("scores", uri, f"has a column `{name}` of type {schema.field(name).type}", fix)
    stored = 1 if tags else int(class_ids.list_size)
    if not tags and (scores.list_size != stored or stored < 1):
        raise SourceError("scores", uri, f"has {stored} class_ids and {scores.list_size} scores in a row", fix)
    if stored < layout.classes_per_image or layout.stored not in (None, stored):
        rule = f"stores {stored} classes per image, and {layout.stored or layout.classes_per_image} are needed"
        raise SourceError("scores", uri, rule, "lower classes_per_image, or score this part again")
    said = (schema.metadata or {}).get(CLASSES_METADATA)
    if said is not None and layout.num_classes and int(said) != layout.num_classes:
        rule = f"has {int(said)} classes, and other files of the table have {layout.num_classes}"
        raise SourceError("scores", uri, rule, "select from the scores of one teacher")
    return stored


@contextmanager
def blamed(field: str, current: Callable[[], str], fix: str = "score this part again") -> Iterator[None]:
    """Names the file that is being read in what reading it raises. An OSError may pass, so it stays one."""
    try:
        yield
    except ValueError as error:  # Arrow's are among them
        raise SourceError(field, current(), f"cannot be used ({one_line(str(error))})", fix) from None
    except OSError as error:
        raise OSError(f"{current()}: {one_line(str(error))}") from None


def deal(files: Sequence[tuple[str, int]], tasks: int) -> list[list[Slice]]:
    """Score files (URI and size), large ones sliced, as the work of at most `tasks` tasks of about equal bytes."""
    share = max(1.0, sum(size for _, size in files) / tasks)
    dealt: list[list[Slice]] = [[] for _ in range(tasks)]
    before = 0
    for uri, size in files:
        parts = max(1, round(size / share))
        for part in range(parts):
            middle = before + size * (part + 0.5) / parts
            dealt[min(int(middle / share), tasks - 1)].append(Slice(uri, part, parts))
        before += size
    return [pieces for pieces in dealt if pieces]


def sample(files: Sequence[tuple[str, int]], slices: int, rows: int) -> list[Slice]:
    """About `rows` rows of the table, as the beginnings of at most `slices` slices that are spread evenly over it."""
    first = [pieces[0] for pieces in deal(files, slices)]
    return [replace(piece, rows=-(-rows // len(first))) for piece in first]


def most_class(uris: Sequence[str]) -> int:
    """The greatest class id in some files, from their statistics where they have them; -1 if they have no candidate."""
    most = -1
    for uri in uris:
        with storage.open_input(uri) as source, blamed("scores", lambda uri=uri: uri):  # type: ignore[misc]
            file = pq.ParquetFile(source)
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                columns = (group.column(i) for i in range(group.num_columns))
                column = next(c for c in columns if c.path_in_schema.startswith("class_ids."))
                if column.is_stats_set and column.statistics.has_min_max:
                    greatest = int(column.statistics.max)
                else:
                    values = file.read_row_group(number, columns=["class_ids"])["class_ids"].combine_chunks().flatten()
                    greatest = -1 if not len(values) else pc.max(values).as_py()
                most = max(most, -1 if greatest is None else greatest)
            if most >= MAX_CLASSES:
                raise ValueError(f"holds class id {most}, and ids must be from 0 to {MAX_CLASSES - 1}")
    return most


def read(piece: Slice, layout: Layout, exclusions: Exclusions | None = None) -> Iterator[Candidates]:
    """The rows of `piece`, in batches, with the best `layout.classes_per_image` classes of each.

    Raises:
        SourceError, ValueError: the file is not what the contract says.
    """
    tags = layout.seed is not None
    columns = COLUMNS[:3] if tags else COLUMNS
    with storage.open_input(piece.uri) as file:
        remote = storage.is_remote(piece.uri)
        buffer = 0 if remote else READ_BYTES
        table = pq.ParquetFile(file, read_dictionary=["shard"], pre_buffer=remote, buffer_size=buffer)
        stored = _check(piece.uri, table.schema_arrow, layout)
        groups = table.num_row_groups
        left = piece.rows
        for group in range(piece.part * groups // piece.parts, (piece.part + 1) * groups // piece.parts):
            size = BATCH_ROWS if left is None else max(1, min(left, BATCH_ROWS))
            for batch in table.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                candidates = _tagged(batch, layout) if tags else _candidates(batch, stored, layout)
                _check_ids(candidates.class_ids, layout.num_classes)
                if exclusions is not None:
                    candidates = replace(candidates, excluded=exclusions.among(candidates.shard, candidates.index))
                yield candidates
                if left is not None:
                    left -= batch.num_rows
                    if left <= 0:
                        return


def _check_ids(class_ids: Int32, num_classes: int) -> None:
    if class_ids.size and not ((least := int(class_ids.min())) >= 0 and (most := int(class_ids.max())) < num_classes):
        wrong = least if least < 0 else most
        raise ValueError(f"holds class id {wrong}, and ids must be from 0 to {num_classes - 1}")


def _candidates(batch: pa.RecordBatch, stored: int, layout: Layout) -> Candidates:
    shard, index, class_ids, scores = (batch.column(name) for name in COLUMNS)
    flat_ids, flat_scores = class_ids.flatten(), scores.flatten()
    _check_nulls(shard, index, class_ids, scores, flat_ids, flat_scores)
    used = layout.classes_per_image
    ids = flat_ids.to_numpy().reshape(-1, stored)[:, :used]
    values = flat_scores.to_numpy().reshape(-1, stored)
    if layout.fewest < stored and (values[:, 1:] > values[:, :-1]).any():
        raise ValueError("has rows whose scores are not in descending order")
    return Candidates(shard, index.to_numpy(), ids, values[:, :used], images=len(ids))


def _check_nulls(*columns: pa.Array) -> None:
    if any(column.null_count for column in columns):
        raise ValueError("has null values")


def _tagged(batch: pa.RecordBatch, layout: Layout) -> Candidates:
    """A row for each different tag of each image, with a random draw as its score."""
    assert layout.seed is not None
    shard, index, class_ids = (batch.column(name) for name in COLUMNS[:3])
    flat = class_ids.flatten()
    _check_nulls(shard, index, class_ids, flat)
    ids = flat.to_numpy()
    _check_ids(ids, layout.num_classes)
    row = pc.list_parent_indices(class_ids).to_numpy(zero_copy_only=False)
    tag = np.sort(row.astype(np.int64) * layout.num_classes + ids)
    tag = tag[np.concatenate([[True], tag[1:] != tag[:-1]])[: len(tag)]]  # two hashtags may mean one class
    row, class_id = tag // max(layout.num_classes, 1), (tag % max(layout.num_classes, 1)).astype(np.int32)
    codes = shard.indices.to_numpy(zero_copy_only=False)[row].astype(np.int32)
    images = index.to_numpy()[row]
    names = shard.dictionary.cast(pa.string())
    scores = random_scores(layout.seed, names.to_pylist(), codes, images, class_id)
    repeated = pa.DictionaryArray.from_arrays(pa.array(codes), names)
    return Candidates(repeated, images, class_id.reshape(-1, 1), scores.reshape(-1, 1), images=batch.num_rows)
