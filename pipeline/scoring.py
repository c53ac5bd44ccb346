"""Stage (2), first half: the teacher on every image of U (section 3.2, "Data selection and labeling").

Ray Data streams shards through two operators: readers decode a shard into row ranges of uint8 images, and actors that hold the teacher
score a range at a time and publish it as one Parquet file. The published files are the ledger of what is done: a range without a file is
scored again, and nothing else keeps track.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import RecipeError, RunError, StageError
from cluster.progress import Progress
from cluster.reduction import original_errors, run_task
from cluster.resources import cluster_shape
from models.config import Transform
from pipeline.ledger import Range, complete, ledger
from pipeline.recipe import Score
from pipeline.rejects import read_rejects
from pipeline.sources import ImageSource, MissingShardError, Reader, Row, Shard, ShardError
from pipeline.store import publish_json, read_json

OWNER = "_scoring.json"

MAX_RANGE_ROWS, MAX_RANGE_BYTES = 65_536, 2**40
READ_TASKS = 2_000
"""Tasks that read, about at most: the driver holds a record of each."""
TASK_BYTES, MIN_TASK_BYTES = 64 * 2**20, 2**20
SHARES = 8
"""A task reads this share of what remains for each actor, within those bounds: the actors end together, and no task is tiny."""
EARLY_CHECK = 10_000
"""Images after which too many rejects stop a scoring at once rather than at its end."""
UNREADABLE, MISSING = "unreadable_shard", "missing_shard"
"""Reasons of the rejects of whole shards: damaged from some row on, or not to be had. The rest are about images."""


@dataclass(frozen=True)
class Scored:
    """What a scoring made. `listed` = `scored` + `rejected` was counted in the published files.

    Attributes:
        uri: the score table.
        rejects_uri: the rejects.
        listed: images that the shards hold, as far as they could be read.
        scored: images with a row in the table.
        rejected: images with a row in the rejects.
        unreadable_shards: shards that could not be read, or not to their end; each has a row in the rejects.
        rejects: how many rejects there are of each reason.
    """

    uri: str
    rejects_uri: str
    listed: int
    scored: int
    rejected: int
    unreadable_shards: int
    rejects: dict[str, int]


def range_rows(transform: Transform, range_mib: int) -> int:
    """Rows of a range whose decoded images (uint8, 3 channels) take at most `range_mib` MiB."""
    return max(1, min(MAX_RANGE_ROWS, range_mib * 2**20 // (3 * transform.size**2)))


def claim(field: str, scores_uri: str, model_uri: str, source: ImageSource, settings: Score) -> None:
    """Makes a folder this scoring's, so that the same command goes on in it and another one is refused.

    Raises:
        RunError: it holds scores of another model or source, or that other settings made.
        StorageError: it cannot be written.
    """
    from models.card import read_card

    wanted = {
        "model": read_card(model_uri).weights.sha256,
        "source": source.fingerprint(),
        **settings.deciding,
    }
    storage.check_writable(field, scores_uri)
    owner = storage.join(scores_uri, OWNER)
    if storage.exists(owner):
        found = read_json(owner)
        for name in dict.fromkeys((*wanted, *found)):
            if wanted.get(name) != found.get(name):
                raise RunError(field, scores_uri, f"holds scores made with another {name}", "give another folder")
    elif storage.list_files(scores_uri):
        raise RunError(field, scores_uri, "is not empty and holds no scores", "give another folder")
    else:
        publish_json(owner, wanted)


def score(
    source: ImageSource, model_uri: str, scores_uri: str, rejects_uri: str, settings: Score, progress: Progress
) -> Scored:
    """Scores every image of a source that has no score yet, on the Ray that is running.

    Args:
        source: U.
        model_uri: the teacher's model directory.
        scores_uri: folder of the score table.
        rejects_uri: folder of the rejects.
        settings: batch size, actors, P.
        progress: gets images scored and rejected.

    Raises:
        StageError: too many rejects, or files that do not add up to the images listed.
    """
    from models.card import read_card

    card = read_card(model_uri)
    transform = card.model.transform
    if settings.views in ("five", "ten") and transform.resize == transform.size:
        rule = f"has no corners to see where the model's transform.resize and size are both {transform.size}"
        raise RecipeError("score.views", settings.views, rule, "set it to center or mirrored")
    done = ledger(scores_uri)
    missing = [shard for shard in source.shards() if not complete(done.get(shard.name, ()))]
    if missing:
        _forget_rejects(rejects_uri, done)
        decoded = transform.seen_by(settings.views)
        job = _Job(source.reader, model_uri, scores_uri, rejects_uri, decoded, len(card.class_names), settings)
        try:
            with original_errors():
                _stream(job, missing, done, progress)
        except StageError:
            run_task(
                _check_model, model_uri
            )  # where the model is at fault, its own error says more than a lost actor's
            raise
    found = prove(source, scores_uri, rejects_uri)
    progress.update(found.scored, found.rejected, total=found.listed)
    _check_rejects(found, len(source.shards()), settings)
    return found


def _check_model(uri: str) -> None:
    from models.checkpoint import load

    load(uri)


def _forget_rejects(rejects_uri: str, done: dict[str, list[Range]]) -> None:
    """Removes the rejects of ranges that have no scores: those are tried again."""
    kept = {published.file for ranges in done.values() for published in ranges}
    for entry in storage.list_files(rejects_uri, ".parquet"):
        if entry.path not in kept:
            storage.delete_file(storage.join(rejects_uri, entry.path))


def _check_rejects(found: Scored, shards: int, settings: Score) -> None:
    limit = settings.max_reject_fraction
    if found.rejected > limit * found.listed or found.unreadable_shards > limit * shards:
        raise StageError(
            f"{found.rejected} of {found.listed} images and {found.unreadable_shards} of {shards} shards could not be scored, "
            f"more than score.max_reject_fraction = {limit:g} allows: look at the rejects in {found.rejects_uri}, "
            "then raise it, or mend the source and score it in another folder"
        )
    if not found.scored:
        raise StageError(f"no image could be scored: look at the rejects in {found.rejects_uri}")


def prove(source: ImageSource, scores_uri: str, rejects_uri: str) -> Scored:
    """Counts the published files: every shard covered without gap or overlap, and listed = scored + rejected.

    Raises:
        StageError: they do not add up.
    """
    done = ledger(scores_uri)
    reasons, wholes = read_rejects(rejects_uri, wholes=True)
    gone = {reject.shard for reject in wholes if reject.reason == MISSING}
    listed, files = 0, []
    for shard in source.shards():
        ranges = done.get(shard.name, [])
        if not complete(ranges) and shard.name not in gone:
            raise StageError(f"{shard.name} is not scored completely: run the same command again")
        listed += sum(r.stop - r.start for r in ranges)
        files += [r.file for r in ranges]

    def rows(file: str) -> int:
        with storage.open_input(storage.join(scores_uri, file)) as source_file:
            return int(pq.read_metadata(source_file).num_rows)

    with ThreadPoolExecutor(max_workers=16) as pool:
        scored = sum(pool.map(rows, files))
    rejected = sum(reasons.values()) - len(wholes)
    if listed != scored + rejected:
        raise StageError(
            f"{listed} images are listed, but {scored} are scored and {rejected} rejected: remove {scores_uri} and score again"
        )
    shards = len({reject.shard for reject in wholes})
    return Scored(scores_uri, rejects_uri, listed, scored, rejected, shards, dict(sorted(reasons.items())))


@dataclass(frozen=True)
class _Job:
    """What every process of a scoring needs to know."""

    reader: Reader
    model_uri: str
    scores_uri: str
    rejects_uri: str
    transform: Transform
    classes: int
    settings: Score


def _stream(job: _Job, missing: Sequence[Shard], done: dict[str, list[Range]], progress: Progress) -> None:
    import ray

    from pipeline.scorer import CALLS, RangeScorer, prepared

    settings = job.settings
    actors = settings.actors or default_actors(settings)
    weights = ray.remote(prepared).options(num_cpus=settings.reader_cpus).remote(job.model_uri)
    groups = [
        {"shards": [(shard, tuple(done.get(shard.name, ()))) for shard in group], "range_bytes": share}
        for group, share in grouped(missing, actors)
    ]
    ranges = ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
        _RangeReader(job),
        batch_size=1,
        num_cpus=settings.reader_cpus,
        batch_format="pandas",
        compute=ray.data.TaskPoolStrategy(settings.readers),
    )
    scored = ranges.map_batches(
        RangeScorer,
        fn_constructor_args=(job, [weights]),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_concurrent_calls_per_actor=CALLS,
            max_tasks_in_flight_per_actor=2 * CALLS,
            enable_true_multi_threading=True,
        ),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )
    sizes = {shard.name: shard.size for shard in missing}
    before = sum(r.stop - r.start for ranges in done.values() for r in ranges)  # of earlier attempts
    images = rejects = ended_images = ended_bytes = 0
    waiting: dict[str, int] = {}  # images of shards that have not ended
    for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        rows: list[dict[str, Any]] = cast("pa.Table", batch).to_pylist()
        for row in rows:
            images, rejects = images + row["scored"], rejects + row["rejected"]
            waiting[row["shard"]] = waiting.get(row["shard"], 0) + row["scored"] + row["rejected"]
            if row["last"]:
                ended_images += waiting.pop(row["shard"])
                ended_bytes += sizes[row["shard"]]
        expected = before + ended_images * sum(sizes.values()) // ended_bytes if ended_bytes and ended_images else None
        progress.update(before + images, rejects, total=expected and max(expected, before + images + rejects))
        if images + rejects >= EARLY_CHECK and rejects > settings.max_reject_fraction * (images + rejects):
            raise StageError(
                f"{rejects} of the first {images + rejects} images could not be scored, more than score.max_reject_fraction = "
                f"{settings.max_reject_fraction:g} allows: look at the rejects in {job.rejects_uri}, "
                "then raise it, or mend the source and score it in another folder"
            )


def default_actors(settings: Score) -> int:
    """How many actors the cluster holds, at its largest: on CPUs, beside a reader for each."""
    shape = cluster_shape()
    if settings.gpus_per_actor > 0:
        return max(1, int(shape.total("GPU") / settings.gpus_per_actor))
    return max(1, int(shape.total("CPU") / (settings.cpus_per_actor + settings.reader_cpus)))


def grouped(shards: Sequence[Shard], actors: int) -> Iterator[tuple[list[Shard], int]]:
    """Consecutive shards that one task reads, with the encoded bytes after which it ends a range.

    A task is a small share of what remains for each actor, so that it costs little to start and the last ones end together
    (guided self-scheduling, Polychronopoulos and Kuck 1987). Many small shards make one task, and their images go through the
    model together.
    """
    remaining = total = sum(shard.size for shard in shards)
    group: list[Shard] = []
    size = 0
    for shard in shards:
        share = max(remaining // (SHARES * actors), MIN_TASK_BYTES)
        group.append(shard)
        size += shard.size
        if size >= max(total // READ_TASKS, min(share, TASK_BYTES)):
            yield group, share
            remaining -= size
            group, size = [], 0
    if group:
        yield group, MIN_TASK_BYTES


class _RangeReader:
    """Reads and decodes shards: a row per range."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def __call__(self, batch: Any) -> Iterator[pa.Table]:
        for shards, range_bytes in zip(batch["shards"], batch["range_bytes"], strict=True):
            for shard, covered in shards:
                yield from self._ranges(shard, covered, range_bytes)

    def _ranges(self, shard: Shard, covered: Sequence[Range], range_bytes: int = MAX_RANGE_BYTES) -> Iterator[pa.Table]:
        rows = range_rows(self._job.transform, self._job.settings.range_mib)
        pending: _Decoded | None = None
        position, problem, missing = 0, None, False
        try:
            for row in self._job.reader.read(shard):
                position = row.index + 1
                if any(done.start <= row.index < done.stop for done in covered):
                    continue
                full = pending is not None and (pending.stop - pending.start >= rows or pending.bytes >= range_bytes)
                if pending is not None and (full or pending.stop != row.index):
                    yield pending.table(last=False)
                    pending = None
                if pending is None:
                    pending = _Decoded(shard, row.index)
                pending.add(row, self._job.transform)
        except ShardError as error:
            problem, missing = str(error), isinstance(error, MissingShardError)
        # What comes last is published as such, even when it is empty: only then the shard is complete.
        # A shard that is missing is not: the next attempt reads it again.
        ended = any(done.last for done in covered)
        if pending is not None and (ended or missing or pending.stop != position):
            yield pending.table(last=False)
            pending = None
        if missing:
            yield _Decoded(shard, position).table(last=False, problem=problem, missing=True)
        elif not ended:
            yield (pending or _Decoded(shard, position)).table(last=True, problem=problem)


class _Decoded:
    """A range under way: its images, and what could not be decoded."""

    def __init__(self, shard: Shard, start: int) -> None:
        self.shard = shard
        self.start = start
        self.stop = start
        self.bytes = 0
        self.indices: list[int] = []
        self.images: list[npt.NDArray[np.uint8]] = []
        self.rejects: list[dict[str, Any]] = []

    def add(self, row: Row, transform: Transform) -> None:
        from models.transforms import UndecodableImage, evaluation_image

        self.stop = row.index + 1
        self.bytes += len(row.data)
        try:
            if row.problem is not None:
                raise UndecodableImage("unreadable", row.problem)
            self.images.append(evaluation_image(row.data, transform))
            self.indices.append(row.index)
        except UndecodableImage as error:
            self.rejects.append({"index": row.index, "reason": error.reason, "error": error.detail})

    def table(self, *, last: bool, problem: str | None = None, missing: bool = False) -> pa.Table:
        """One row. The images are one binary value, so that Ray never splits a range over blocks."""
        rejects = list(self.rejects)
        if problem is not None:
            rejects.append({"index": None, "reason": MISSING if missing else UNREADABLE, "error": problem})
        content = np.stack(self.images).tobytes() if self.images else b""
        return pa.table(
            {
                "shard": pa.array([self.shard.name], pa.string()),
                "start": pa.array([self.start], pa.int64()),
                "stop": pa.array([self.stop], pa.int64()),
                "last": pa.array([last], pa.bool_()),
                "missing": pa.array([missing], pa.bool_()),
                "indices": pa.array([self.indices], pa.list_(pa.uint32())),
                "images": pa.array([content], pa.large_binary()),
                "rejects": pa.array([rejects], pa.list_(_REJECT)),
            }
        )


_REJECT = pa.struct([("index", pa.uint32()), ("reason", pa.string()), ("error", pa.string())])
