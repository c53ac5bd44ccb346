"""Selection: for each class, the K best-scored images of all (section 3.2; what Table 9 counts).

Ray tasks stream the files of a score table (`pipeline.selection.reducer`), and each range of classes is written by one of them. The
selection is the same bytes under any split, order, number of workers, memory limit and retry.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster import storage
from cluster.errors import InputError, MissingError, SourceError, StageError, StorageError
from cluster.progress import SILENT, Progress
from cluster.tasks import parallel_map, run_task
from pipeline.selection.quotas import quotas
from pipeline.selection.reducer import Files, Reduced, Reduction, Request
from pipeline.selection.table import CLASSES_METADATA, most_class, read_exclusions, read_layout
from pipeline.selection.topk import Int64, Top, UInt64, merge, ranks, sort_order, unify, used

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.uint32(), nullable=False),
    ]
)
ENCODED = SCHEMA.set(3, SCHEMA.field(3).with_type(pa.dictionary(pa.int32(), pa.string())))
"""The same, with the names of shards as they are held in memory."""
METADATA = b"tophat.selection"
RECORD = "_selection.json"
"""Beside the files: what they were made of; see `pipeline.selection.record`."""

ROW_GROUP_ROWS = 1 << 18
PART_ROWS = 1 << 19
BUCKETS = 256  # tasks that finish a selection, at most


@dataclass(frozen=True)
class Selected:
    """A finished selection and what Table 9 says of it.

    Attributes:
        uri: the folder of its Parquet files.
        images_per_class: K; with a class distribution, its mean.
        classes_per_image: P, as selected with; None of tags.
        num_classes: how many classes the teacher has (or were seen, where nothing says).
        images: rows of the score table.
        candidates: `images` x P = `selected` + `unselected` + `excluded` + `nonfinite`.
        selected: |D-hat|, an image counted once for each class that selected it.
        unselected: candidates that lost to others of their class, or are below the minimum score.
        excluded: candidates of images that are on an exclusion list.
        nonfinite: other candidates whose score is NaN or infinite; they are never selected.
        distinct_images: different images among `selected`.
        classes_short: classes with fewer images than their quota.
        quotas: K of each class.
        counts: images selected for each class, by class id.
        lowest_scores: the lowest selected score of each class; None where a class has no image.
    """

    uri: str
    images_per_class: int
    classes_per_image: int | None
    num_classes: int
    images: int
    candidates: int
    selected: int
    unselected: int
    excluded: int
    nonfinite: int
    distinct_images: int
    classes_short: int
    quotas: tuple[int, ...]
    counts: tuple[int, ...]
    lowest_scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Wanted:
    """One of several selections out of the same scores.

    Attributes:
        out_uri: a folder for it, not inside the score table.
        images_per_class: K, at least 1; with a class distribution, its mean.
        classes_per_image: P, at most what is stored; by default that.
    """

    out_uri: str
    images_per_class: int
    classes_per_image: int | None = None


def select(
    scores_uri: str,
    out_uri: str,
    *,
    images_per_class: int,
    classes_per_image: int | None = None,
    **settings: Any,
) -> Selected:
    """One selection; `settings` as in `select_several`."""
    wanted = Wanted(out_uri, images_per_class, classes_per_image)
    return select_several(scores_uri, [wanted], **settings)[0]


def select_several(
    scores_uri: str,
    wanted: Sequence[Wanted],
    *,
    num_classes: int | None = None,
    zipf_exponent: float | None = None,
    class_weights: Sequence[float] | None = None,
    min_score: float | None = None,
    exclude: Sequence[str] = (),
    tags: bool = False,
    seed: int = 0,
    memory_mib: int = 2048,
    progress: Progress = SILENT,
    tasks: int | None = None,
) -> list[Selected]:
    """Selects the K best images of each class from a score table, exactly, on the Ray that is initialized.

    Writes `out_uri/part-00000.parquet` and so on, each a range of classes, with the columns class_id int32, rank int32
    (0-based), score float32, shard string, index uint32, sorted by (class_id, rank). A selection that was there before
    is replaced. Several selections take one pass over the scores.

    Args:
        scores_uri: a folder with the Parquet files of a score table, at any depth.
        wanted: at least one.
        num_classes: what the score table must agree with, or lacks.
        zipf_exponent: quotas by Zipf's law instead of one K (see `quotas`).
        class_weights: quotas in proportion to these, one for each class, instead of one K.
        min_score: candidates below it, as float32, are never selected.
        exclude: Parquet files, or folders of them, with the columns `shard` and `index` of images that are not selected.
        tags: the table is one of tags: its `class_ids` are lists of any length and it has no scores. Instead of the
            best images, each class gets images at random (section 4.4, "balanced-with-tags").
        seed: of that choice, and of the places that classes have in Zipf's law.
        memory_mib: what one scanning task may hold; with more classes x K, the scores are read once for each range of
            classes that fits.
        progress: counts images scanned.
        tasks: how many tasks scan. The selection does not depend on it.

    Raises:
        SourceError: no score files, or one that is not by the contract; names the file.
        StorageError: a location that refuses, or an `out_uri` that holds other Parquet files.
        InputError: a K or P below 1, a minimum score that is no number, or weights that do not fit the classes.
    """
    if min_score is not None and not math.isfinite(min_score):
        raise InputError("min_score", min_score, "must be a finite number", "leave it out for no limit")
    scores_uri = storage.absolute(scores_uri).rstrip("/")
    outs = [_checked_out(scores_uri, one, tags) for one in wanted]
    files = _score_files(scores_uri)
    layout = read_layout(*files[0], [one.classes_per_image for one in wanted], num_classes, seed if tags else None)
    try:
        if not layout.num_classes:
            layout = replace(layout, num_classes=_seen_classes(files))
        each = [
            quotas(
                one.images_per_class,
                layout.num_classes,
                zipf_exponent=zipf_exponent,
                class_weights=class_weights,
                seed=seed,
            )
            for one in wanted
        ]
        plans = [
            _Plan(out, one.images_per_class, None if tags else one.classes_per_image or layout.classes_per_image, quota)
            for out, one, quota in zip(outs, wanted, each, strict=True)
        ]
        reduction = Reduction(files, layout, read_exclusions(exclude), min_score, memory_mib << 20, tasks, progress)

        def clear() -> None:
            for out in outs:
                for former in (RECORD, *_former_parts(out)):
                    storage.delete_file(storage.join(out, former))

        reduced = reduction.run([plan.request() for plan in plans], partial(_publish, plans), clear)
    except OSError as error:
        raise SourceError("scores", scores_uri, f"cannot be read ({error})", "check the store and the files") from None
    return [_selected(plan, found) for plan, found in zip(plans, reduced, strict=True)]


def _checked_out(scores_uri: str, one: Wanted, tags: bool) -> str:
    for field, value in (("images_per_class", one.images_per_class), ("classes_per_image", one.classes_per_image)):
        if value is not None and value < 1:
            raise InputError(field, value, "must be at least 1", "raise it")
    if tags and one.classes_per_image is not None:
        rule = "cannot be chosen with tags: all tags of an image are candidates"
        raise InputError("classes_per_image", one.classes_per_image, rule, "leave it out")
    out_uri = storage.absolute(one.out_uri).rstrip("/")
    if f"{out_uri}/".startswith(f"{scores_uri}/"):
        raise StorageError("out", out_uri, "is inside the score table", "give a folder elsewhere")
    _former_parts(out_uri)
    return out_uri


def listing(field: str, uri: str) -> str:
    """A fingerprint of a Parquet file, or of the names, sizes and etags of those in a folder.

    Raises:
        SourceError: nothing is there; names `field`.
    """
    try:
        content = storage.read_bytes(uri) if uri.endswith(".parquet") else repr(storage.list_files(uri)).encode()
    except MissingError:
        content = b""
    if content in (b"", b"[]"):
        raise SourceError(field, uri, "holds no Parquet files", "check the path")
    return hashlib.sha256(content).hexdigest()[:16]


def _score_files(scores_uri: str) -> Files:
    # Readers of Parquet folders pass over names with an underscore: the rejects lie there.
    found = [file for file in storage.list_files(scores_uri, ".parquet") if not file.path.startswith("_")]
    if not found:
        raise SourceError("scores", scores_uri, "holds no Parquet files", "give the folder of a score table")
    return [(storage.join(scores_uri, file.path), file.size) for file in found]


def _seen_classes(files: Files) -> int:
    """One more than the greatest class id of all."""
    uris = [uri for uri, _ in files]
    return 1 + max(parallel_map(most_class, (uris[i : i + 64] for i in range(0, len(uris), 64))))


# The selection out


@dataclass(frozen=True)
class _Plan:
    """One selection, and where its files and the tasks that write them begin: that depends on the quotas alone.

    Attributes:
        quotas: int64 [C].
    """

    out_uri: str
    images_per_class: int
    classes_per_image: int | None
    quotas: Int64

    def parts(self) -> list[int]:
        """Class ids where the files begin, and C: files of about equal rows, at most about PART_ROWS."""
        before = np.concatenate([[0.0], np.cumsum(self.quotas, dtype=np.float64)])
        files = min(max(1, math.ceil(before[-1] / PART_ROWS)), max(1, len(self.quotas)))
        edges = np.unique(np.searchsorted(before, before[-1] * np.arange(files) / files))
        return [*edges[edges < max(1, len(self.quotas))].tolist(), max(1, len(self.quotas))]

    def request(self) -> Request:
        edges = self.parts()
        step = -(-(len(edges) - 1) // BUCKETS)
        return Request(self.classes_per_image or 1, self.quotas, (*edges[:-1:step], edges[-1]))


@dataclass(frozen=True)
class _Range:
    """What was selected of a range of classes.

    Attributes:
        classes: class ids from the first to the one after the last.
        counts: by class.
        lowest_scores: by class.
        unselected: candidates that lost here, after they passed the sieves.
    """

    classes: range
    counts: list[int]
    lowest_scores: list[float | None]
    unselected: int


@dataclass(frozen=True)
class _Images:
    """Different images, in the order of their shards' names and then of their indices.

    Attributes:
        shards: pyarrow string array, sorted.
        images: uint64 [N]: the ordinal of the shard in the upper half, the index in the lower.
    """

    shards: pa.StringArray
    images: UInt64


def _publish(plans: Sequence[_Plan], number: int, bucket: int, *tops: Top) -> tuple[_Range, _Images]:
    """Writes the files of one bucket; returns what is in them, and their different images; runs in a Ray task."""
    plan = plans[number]
    edges = plan.request().edges
    first, last = edges[bucket], edges[bucket + 1]
    top = merge(tops, plan.quotas)
    images = _images(top)
    counts = np.bincount(top.class_id, minlength=last)[first:last]
    parts = plan.parts()
    for part in range(parts.index(first), parts.index(last)):
        start, stop = np.searchsorted(top.class_id, parts[part : part + 2]).tolist()
        _write(plan, part, len(parts) - 1, top, start, stop)
    ends = np.cumsum(counts).tolist()
    lowest = [float(top.score[e - 1]) if n else None for e, n in zip(ends, counts.tolist(), strict=True)]
    return _Range(range(first, last), counts.tolist(), lowest, top.account.unselected), images


def _write(plan: _Plan, part: int, parts: int, top: Top, start: int, stop: int) -> None:
    metadata = {
        "parts": parts,
        "images_per_class": plan.images_per_class,
        "classes_per_image": plan.classes_per_image,
    }
    rank = ranks(top.class_id[start:stop]).astype(np.int32)
    sink = pa.BufferOutputStream()
    plain = {"class_id": "DELTA_BINARY_PACKED", "rank": "DELTA_BINARY_PACKED"}
    with pq.ParquetWriter(
        sink,
        ENCODED,
        compression="zstd",
        use_dictionary=["shard"],
        column_encoding=plain,
        store_schema=False,  # which would tell readers that `shard` is a dictionary
    ) as writer:
        writer.add_key_value_metadata({METADATA: json.dumps(metadata), CLASSES_METADATA: str(len(plan.quotas))})
        for first in range(start, max(stop, start + 1), ROW_GROUP_ROWS):
            rows = slice(first, min(first + ROW_GROUP_ROWS, stop))
            shards, shard = used(top.shards, top.shard[rows])
            numbers = (top.class_id[rows], rank[rows.start - start : rows.stop - start], top.score[rows])
            names = pa.DictionaryArray.from_arrays(shard, shards)
            writer.write_table(pa.table([*map(pa.array, numbers), names, pa.array(top.index[rows])], schema=ENCODED))
    storage.publish(storage.join(plan.out_uri, _part(part)), sink.getvalue().to_pybytes())


def _part(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _images(top: Top) -> _Images:
    """The different images of the sorted `top`.

    Raises:
        SourceError: an image has two scores for a class.
    """
    order = sort_order(top.shard.view(np.uint32), top.index)
    image = (top.shard[order].astype(np.uint64) << np.uint64(32)) | top.index[order]
    is_same = image[1:] == image[:-1]
    twice = np.flatnonzero(is_same & (top.class_id[order[1:]] == top.class_id[order[:-1]]))
    if len(twice):
        row = order[twice[0]]
        name = f"{top.shards[int(top.shard[row])].as_py()}, index {top.index[row]}"
        rule = f"has two scores for class {top.class_id[row]}"
        raise SourceError("scores", name, rule, "remove the score file that repeats another's rows")
    return _Images(top.shards, image[np.concatenate([[True], ~is_same])[: len(image)]])


def _count_images(*several: _Images) -> int:
    """Different images among all; runs in a Ray task."""
    _, places = unify([one.shards for one in several])
    low = np.uint64(0xFFFFFFFF)
    runs = [
        (place.astype(np.uint64)[one.images >> np.uint64(32)] << np.uint64(32)) | (one.images & low)
        for one, place in zip(several, places, strict=True)
    ]
    every = np.concatenate(runs)
    del runs
    every.sort(kind="stable")  # a merge of runs that are sorted
    return len(every) - int(np.count_nonzero(every[1:] == every[:-1]))


def _selected(plan: _Plan, reduced: Reduced) -> Selected:
    ranges: list[_Range] = sorted(reduced.notes, key=lambda note: note.classes.start)
    counts = [count for one in ranges for count in one.counts][: len(plan.quotas)]
    lowest = [score for one in ranges for score in one.lowest_scores][: len(plan.quotas)]
    account = reduced.account
    selected, unselected = sum(counts), account.unselected + sum(one.unselected for one in ranges)
    left = account.candidates - selected - unselected - account.excluded - account.nonfinite
    if left or plan.classes_per_image not in (None, account.candidates // max(account.images, 1)):
        raise StageError(
            f"selection lost candidates: {account.candidates:,} of {account.images:,} images are not {selected:,} "
            f"selected + {unselected:,} unselected + {account.excluded:,} excluded + {account.nonfinite:,} not finite"
        )
    return Selected(
        uri=plan.out_uri,
        images_per_class=plan.images_per_class,
        classes_per_image=plan.classes_per_image,
        num_classes=len(plan.quotas),
        images=account.images,
        candidates=account.candidates,
        selected=selected,
        unselected=unselected,
        excluded=account.excluded,
        nonfinite=account.nonfinite,
        distinct_images=run_task(_count_images, *reduced.values),
        classes_short=int(np.count_nonzero(np.array(counts, np.int64) < plan.quotas)),
        quotas=tuple(plan.quotas.tolist()),
        counts=tuple(counts),
        lowest_scores=tuple(lowest),
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
        if not table.schema.equals(ENCODED):
            raise SourceError("selection", uri, f"holds {file.path}, which has other columns", fix)
        tables.append(table)
    said = json.loads((tables[0].schema.metadata or {}).get(METADATA, b"{}")) if tables else {}
    if not tables or said.get("parts") != len(tables):
        raise SourceError("selection", uri, "is not a complete selection", fix)
    return pa.concat_tables(tables).unify_dictionaries()
