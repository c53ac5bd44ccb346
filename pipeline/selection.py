"""Selection: for each class, the K best-scored images of all (section 3.2; what Table 9 counts).

Ray tasks stream the files of a score table, each keeping at most K candidates of each class (`pipeline.top`), and the
tops merge in a tree. The selection is the same bytes under any split, order, number of workers and retry.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from cluster import storage
from cluster.errors import InputError, SourceError, StageError, StorageError, one_line
from cluster.progress import SILENT, Progress
from cluster.reduction import cpus, run_task, tree_reduce
from pipeline.top import Int32, Scored, Top, image_key, merge, ranks, top_of

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ["shard", "index", "class_ids", "scores"]
SCHEMA = pa.schema(
    [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.uint32(), nullable=False),
    ]
)
METADATA = b"tophat.selection"
CLASSES_METADATA = b"tophat.num_classes"

BATCH_ROWS = 1 << 16
ROW_GROUP_ROWS = 1 << 18
PART_ROWS = 1 << 22
TASK_BYTES = (32 << 20, 1 << 30)  # of score files that one task reads, at least and at most


# Score tables in


@dataclass(frozen=True)
class Layout:
    """What every file of one score table shares, and how much of it is used.

    Attributes:
        stored: classes per image in the files; None when files may differ, because `classes_per_image` was asked for.
        classes_per_image: how many of them are candidates, the best first.
        num_classes: how many classes the teacher has; None when neither the files nor the caller say.
    """

    stored: int | None
    classes_per_image: int
    num_classes: int | None


@dataclass(frozen=True)
class Slice:
    """The `part`-th of `parts` equal ranges of the row groups of one score file."""

    uri: str
    part: int
    parts: int


def _layout(uri: str, classes_per_image: int | None, num_classes: int | None) -> Layout:
    """The layout of the table whose first file is `uri`."""
    with storage.open_input(uri) as file, _blamed(lambda: uri):
        schema = pq.read_schema(file)
    stored = _check(uri, schema, None)
    if classes_per_image is not None and classes_per_image > stored:
        raise SourceError(
            "classes_per_image",
            classes_per_image,
            f"must be at most {stored}, the classes stored per image in {uri}",
            "lower it",
        )
    said = int((schema.metadata or {}).get(CLASSES_METADATA, 0)) or num_classes
    if num_classes is not None and said != num_classes:
        raise SourceError("scores", uri, f"has {said} classes, and {num_classes} are expected", "score with this model")
    wanted = stored if classes_per_image is None else classes_per_image
    return Layout(stored if classes_per_image is None else None, wanted, said)


def _check(uri: str, schema: pa.Schema, layout: Layout | None) -> int:
    """Classes per image in a score file, after its schema was compared with the contract and with `layout`.

    Raises:
        SourceError: naming the file and the column.
    """
    fix = "write shard string, index uint32, class_ids fixed_size_list<int32> and scores fixed_size_list<float32>"
    for name in COLUMNS:
        if len(schema.get_all_field_indices(name)) != 1:
            raise SourceError("scores", uri, f"must have one column `{name}`", fix)
    shard, index, class_ids, scores = (schema.field(name).type for name in COLUMNS)
    text = shard.value_type if pa.types.is_dictionary(shard) else shard
    wrong = {
        "shard": not (pa.types.is_string(text) or pa.types.is_large_string(text)),
        "index": index != pa.uint32(),
        "class_ids": not pa.types.is_fixed_size_list(class_ids) or class_ids.value_type != pa.int32(),
        "scores": not pa.types.is_fixed_size_list(scores) or scores.value_type != pa.float32(),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise SourceError("scores", uri, f"has a column `{name}` of type {schema.field(name).type}", fix)
    stored = int(class_ids.list_size)
    if scores.list_size != stored or stored < 1:
        raise SourceError("scores", uri, f"has {stored} class_ids and {scores.list_size} scores in a row", fix)
    if layout is None:
        return stored
    if stored < layout.classes_per_image or layout.stored not in (None, stored):
        rule = f"stores {stored} classes per image, and {layout.stored or layout.classes_per_image} are needed"
        raise SourceError("scores", uri, rule, "lower classes_per_image, or score this part again")
    said = (schema.metadata or {}).get(CLASSES_METADATA)
    if said is not None and layout.num_classes is not None and int(said) != layout.num_classes:
        rule = f"has {int(said)} classes, and other files of the table have {layout.num_classes}"
        raise SourceError("scores", uri, rule, "select from the scores of one teacher")
    return stored


@contextmanager
def _blamed(current: Callable[[], str]) -> Iterator[None]:
    """Names the score file that is being read in what reading it raises. An OSError may pass, so it stays one."""
    try:
        yield
    except ValueError as error:  # Arrow's are among them
        raise SourceError(
            "scores", current(), f"cannot be used ({one_line(str(error))})", "score this part again"
        ) from None
    except OSError as error:
        raise OSError(f"{current()}: {one_line(str(error))}") from None


def _read(piece: Slice, layout: Layout) -> Iterator[Scored]:
    """The rows of `piece`, in batches, with the best `layout.classes_per_image` classes of each.

    Raises:
        SourceError, ValueError: the file is not what the contract says.
    """
    with storage.open_input(piece.uri) as file:
        table = pq.ParquetFile(file, read_dictionary=["shard"], pre_buffer=storage.is_remote(piece.uri))
        stored = _check(piece.uri, table.schema_arrow, layout)
        groups = table.num_row_groups
        for group in range(piece.part * groups // piece.parts, (piece.part + 1) * groups // piece.parts):
            for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=COLUMNS, use_threads=False):
                yield _scored(batch, stored, layout.classes_per_image)


def _scored(batch: pa.RecordBatch, stored: int, classes_per_image: int) -> Scored:
    shard, index, class_ids, scores = (batch.column(name) for name in COLUMNS)
    flat_ids, flat_scores = class_ids.flatten(), scores.flatten()
    if any(column.null_count for column in (shard, index, class_ids, scores, flat_ids, flat_scores)):
        raise ValueError("has null values")
    ids = flat_ids.to_numpy().reshape(-1, stored)[:, :classes_per_image]
    values = flat_scores.to_numpy().reshape(-1, stored)
    if classes_per_image < stored and (values[:, 1:] > values[:, :-1]).any():
        raise ValueError("has rows whose scores are not in descending order")
    return Scored(shard, index.to_numpy(), ids, values[:, :classes_per_image])


def _scan(
    pieces: Sequence[Slice], layout: Layout, images_per_class: int, min_score: float | None, progress: Progress
) -> Top:
    """The top of `pieces`; runs in a Ray task."""
    reading = pieces[0].uri

    def batches() -> Iterator[Scored]:
        nonlocal reading
        done, told = 0, time.monotonic()
        for piece in pieces:
            reading = piece.uri
            for batch in _read(piece, layout):
                yield batch
                done += len(batch.index)
                if time.monotonic() - told > 0.5:
                    progress.add(done=done)
                    done, told = 0, time.monotonic()
        progress.add(done=done)

    with _blamed(lambda: reading):
        return top_of(batches(), images_per_class, num_classes=layout.num_classes, min_score=min_score)


def _deal(scores_uri: str, tasks: int | None) -> list[list[Slice]]:
    """The score files, large ones sliced, as the work of `tasks` tasks of about equal bytes."""
    # Readers of Parquet folders pass over names with an underscore: the rejects lie there.
    files = [file for file in storage.list_files(scores_uri, ".parquet") if not file.path.startswith("_")]
    if not files:
        raise SourceError("scores", scores_uri, "holds no Parquet files", "give the folder of a score table")
    total = sum(file.size for file in files)
    if tasks is None:
        share = total / cpus()
        tasks = max(1, round(total / min(max(share, TASK_BYTES[0]), TASK_BYTES[1])))
    share = max(1.0, total / tasks)
    dealt: list[list[Slice]] = [[] for _ in range(tasks)]
    before = 0
    for file in files:
        parts = max(1, round(file.size / share))
        for part in range(parts):
            middle = before + file.size * (part + 0.5) / parts
            dealt[min(int(middle / share), tasks - 1)].append(Slice(storage.join(scores_uri, file.path), part, parts))
        before += file.size
    return [pieces for pieces in dealt if pieces]


# The selection out


@dataclass(frozen=True)
class Selected:
    """A finished selection and what Table 9 says of it.

    Attributes:
        uri: the folder of its Parquet files.
        images_per_class: K.
        classes_per_image: P, as selected with.
        num_classes: how many classes the teacher has (or were seen, where nothing says).
        images: rows of the score table.
        candidates: `images` x P = `selected` + `unselected` + `nonfinite`.
        selected: |D-hat|, an image counted once for each class that selected it.
        unselected: candidates that lost to others of their class, or are below the minimum score.
        nonfinite: candidates whose score is NaN or infinite; they are never selected.
        distinct_images: different images among `selected`.
        classes_short: classes with fewer than K images.
        counts: images selected for each class, by class id.
        lowest_scores: the lowest selected score of each class; None where a class has no image.
    """

    uri: str
    images_per_class: int
    classes_per_image: int
    num_classes: int
    images: int
    candidates: int
    selected: int
    unselected: int
    nonfinite: int
    distinct_images: int
    classes_short: int
    counts: tuple[int, ...]
    lowest_scores: tuple[float | None, ...]


def select(
    scores_uri: str,
    out_uri: str,
    *,
    images_per_class: int,
    classes_per_image: int | None = None,
    num_classes: int | None = None,
    min_score: float | None = None,
    progress: Progress = SILENT,
    tasks: int | None = None,
) -> Selected:
    """Selects the K best images of each class from a score table, exactly, on the Ray that is initialized.

    Writes `out_uri/part-00000.parquet` and so on, each a range of classes, with the columns class_id int32, rank int32
    (0-based), score float32, shard string, index uint32, sorted by (class_id, rank). A selection that was there before
    is replaced.

    Args:
        scores_uri: a folder with the Parquet files of a score table, at any depth.
        out_uri: a folder for the selection, not inside `scores_uri`.
        images_per_class: K, at least 1.
        classes_per_image: P to select with, at most what is stored; by default that.
        num_classes: what the score table must agree with, or lacks.
        min_score: candidates below it, as float32, are never selected.
        progress: counts images scanned.
        tasks: how many tasks scan; by default about one for each CPU, with not much more than 1 GiB to read each. The
            selection does not depend on it.

    Raises:
        SourceError: no score files, or one that is not by the contract; names the file.
        StorageError: a location that refuses, or an `out_uri` that holds other Parquet files.
    """
    for field, value in (("images_per_class", images_per_class), ("classes_per_image", classes_per_image)):
        if value is not None and value < 1:
            raise InputError(field, value, "must be at least 1", "raise it")
    scores_uri, out_uri = storage.absolute(scores_uri).rstrip("/"), storage.absolute(out_uri).rstrip("/")
    if f"{out_uri}/".startswith(f"{scores_uri}/"):
        raise StorageError("out", out_uri, "is inside the score table", "give a folder elsewhere")
    work = _deal(scores_uri, tasks)
    layout = _layout(work[0][0].uri, classes_per_image, num_classes)
    _former_parts(out_uri)
    scan = partial(_scan, layout=layout, images_per_class=images_per_class, min_score=min_score, progress=progress)
    try:
        top = tree_reduce(scan, work, partial(merge, images_per_class=images_per_class))
        return run_task(partial(_publish, out_uri, layout, images_per_class), top)
    except OSError as error:
        raise SourceError("scores", scores_uri, f"cannot be read ({error})", "check the store and the files") from None


def _publish(out_uri: str, layout: Layout, images_per_class: int, top: Top) -> Selected:
    """Writes the sorted `top` as the selection at `out_uri`, and accounts for it; runs in a Ray task."""
    selected = _account(out_uri, layout, images_per_class, top)
    rank = ranks(top.class_id).astype(np.int32)
    cuts = _cuts(top.class_id)
    names = [f"part-{part:05d}.parquet" for part in range(len(cuts) - 1)]
    for former in _former_parts(out_uri):
        if former not in names:
            storage.delete_file(storage.join(out_uri, former))
    metadata = {
        "parts": len(names),
        "rows": len(top),
        "images_per_class": images_per_class,
        "classes_per_image": layout.classes_per_image,
    }
    schema = SCHEMA.with_metadata({METADATA: json.dumps(metadata), CLASSES_METADATA: str(selected.num_classes)})
    for name, start, stop in zip(names, cuts[:-1], cuts[1:], strict=True):
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=["shard"]) as writer:
            for first in range(start, max(stop, start + 1), ROW_GROUP_ROWS):
                rows = slice(first, min(first + ROW_GROUP_ROWS, stop))
                shard = top.shards.take(pa.array(top.shard[rows]))
                arrays = [top.class_id[rows], rank[rows], top.score[rows], shard, top.index[rows]]
                writer.write_table(pa.table([pa.array(a) for a in arrays[:3]] + [shard, pa.array(arrays[4])], schema))
        storage.publish(storage.join(out_uri, name), sink.getvalue().to_pybytes())
    return selected


def _cuts(class_id: Int32) -> list[int]:
    """Where parts begin and end: between classes, at most PART_ROWS apart unless a single class is larger."""
    edges = [*np.flatnonzero(class_id[1:] != class_id[:-1]) + 1, len(class_id)]
    cuts = [0]
    for edge, following in zip(edges, [*edges[1:], None], strict=True):
        if following is None or following - cuts[-1] > PART_ROWS:
            cuts.append(int(edge))
    return cuts


def _account(out_uri: str, layout: Layout, images_per_class: int, top: Top) -> Selected:
    image = image_key(top.shard, top.index)
    order = np.argsort(image, kind="stable")  # by image, then by class
    same = image[order[1:]] == image[order[:-1]]
    twice = np.flatnonzero(same & (top.class_id[order[1:]] == top.class_id[order[:-1]]))
    if len(twice):
        row = order[twice[0]]
        name = f"{top.shards[int(top.shard[row])].as_py()}, index {top.index[row]}"
        rule = f"has two scores for class {top.class_id[row]}"
        raise SourceError("scores", name, rule, "remove the score file that repeats another's rows")
    if (
        top.candidates != len(top) + top.unselected + top.nonfinite
        or top.candidates != top.images * layout.classes_per_image
    ):
        raise StageError(
            f"selection lost candidates: {top.candidates} are not {len(top)} + {top.unselected} + {top.nonfinite}"
        )
    num_classes = layout.num_classes or (int(top.class_id[-1]) + 1 if len(top) else 0)
    counts = np.bincount(top.class_id, minlength=num_classes)
    ends = np.cumsum(counts)
    return Selected(
        uri=out_uri,
        images_per_class=images_per_class,
        classes_per_image=layout.classes_per_image,
        num_classes=num_classes,
        images=top.images,
        candidates=top.candidates,
        selected=len(top),
        unselected=top.unselected,
        nonfinite=top.nonfinite,
        distinct_images=len(top) - int(np.count_nonzero(same)),
        classes_short=int(np.count_nonzero(counts < images_per_class)),
        counts=tuple(counts.tolist()),
        lowest_scores=tuple(float(top.score[e - 1]) if n else None for e, n in zip(ends, counts, strict=True)),
    )


def _former_parts(out_uri: str) -> list[str]:
    """The files of the selection that is at `out_uri`, if one is.

    Raises:
        StorageError: there are Parquet files that are no selection.
    """
    names = [file.path for file in storage.list_files(out_uri, ".parquet")]
    for name in names:
        if METADATA not in _metadata(storage.join(out_uri, name)):
            raise StorageError("out", out_uri, f"holds {name}, which is not of a selection", "give another folder")
    return names


def _metadata(uri: str) -> dict[bytes, bytes]:
    with storage.open_input(uri) as file:
        try:
            return dict(pq.read_schema(file).metadata or {})
        except (pa.ArrowInvalid, OSError):
            return {}


def read_selection(uri: str) -> pa.Table:
    """The selection at `uri`, sorted by (class_id, rank), `shard` dictionary-encoded.

    Raises:
        SourceError: there is none, or it is incomplete or not by the contract.
    """
    fix = "select again"
    tables = []
    for file in storage.list_files(uri, ".parquet"):
        with storage.open_input(storage.join(uri, file.path)) as source:
            try:
                table = pq.ParquetFile(source, read_dictionary=["shard"]).read()
            except ValueError as error:
                raise SourceError("selection", uri, f"holds {file.path}, which cannot be read ({error})", fix) from None
        if not table.schema.equals(SCHEMA.set(3, SCHEMA.field(3).with_type(pa.dictionary(pa.int32(), pa.string())))):
            raise SourceError("selection", uri, f"holds {file.path}, which has other columns", fix)
        tables.append(table)
    said = json.loads((tables[0].schema.metadata or {}).get(METADATA, b"{}")) if tables else {}
    if not tables or said.get("parts") != len(tables) or said.get("rows") != sum(map(len, tables)):
        raise SourceError("selection", uri, "is not a complete selection", fix)
    return pa.concat_tables(tables).unify_dictionaries()
