"""Stage (2), first half: the teacher on every image of U (section 3.2, "Data selection and labeling").

Ray Data streams shards through two operators: readers decode shards into ranges of uint8 images, and actors that hold the teacher
score a range at a time and publish it as one Parquet file. The published files are the ledger of what is done: a range without a file is
scored again, and nothing else keeps track.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import RecipeError, StageError, shown
from cluster.progress import Progress
from cluster.resources import Bundle, Demand, check, cluster_shape
from cluster.tasks import original_errors, parallel_map
from models.config import Outputs, Transform
from pipeline.data.rejects import count_rejected, read_rejects
from pipeline.data.shards import ChangedShardError, MissingShardError
from pipeline.data.sources import ImageSource
from pipeline.recipe.sections import Score
from pipeline.scoring.actors import CALLS, KEPT_MEMORY, RangeScorer, Scoring
from pipeline.scoring.ledger import (
    MIN_TASK_BYTES,
    Range,
    RangeReader,
    Unfinished,
    finished,
    ledger,
    range_rows,
    surplus,
)

if TYPE_CHECKING:
    import ray.data

GONE = (MissingShardError.reason, ChangedShardError.reason)
"""Reasons of the rejects of shards that the next attempt reads again."""

FOOTER_BYTES, MAX_FOOTER_BYTES = 2**16, 2**28
"""Read of a score file's end at first; and the most that a footer is taken to have, which is less than a damaged length says."""

FILES_PER_COUNT = 4096
"""Score files whose rows one task counts; more of them are counted all over the cluster."""

CPU_AHEAD = 5
"""Decoded images for each actor on a CPU that are read and not scored yet, at most, in multiples of `range_bytes`."""

EARLY_CHECK = 10_000
"""Images after which too many rejects stop a scoring at once rather than at its end."""


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


def score(
    source: ImageSource,
    model_uri: str,
    scores_uri: str,
    rejects_uri: str,
    settings: Score,
    progress: Progress,
    outputs: Outputs | None = None,
) -> Scored:
    """Scores every image of a source that has no score yet, on the Ray that is running.

    Args:
        source: U.
        model_uri: the teacher's model directory.
        scores_uri: folder of the score table.
        rejects_uri: folder of the rejects.
        settings: batch size, actors, P.
        progress: gets images scored and rejected.
        outputs: of the teacher, those that count, in the order of the classes to report; None for all (see `models.inference.Inference`).

    Raises:
        StageError: too many rejects, or files that do not add up to the images listed.
    """
    from models.card import read_card

    card = read_card(model_uri)
    transform = card.model.transform
    check_views(transform, settings)
    shards = source.shards()
    done = ledger(scores_uri)
    for published in surplus(shards, done):
        storage.delete_file(storage.join(scores_uri, published.file))
        done[published.shard].remove(published)
    _forget_rejects(rejects_uri, done)
    unfinished = Unfinished.of(shards, done)
    if len(unfinished.shards):
        decoded = transform.seen_by(settings.views)
        classes = len(card.class_names if outputs is None else outputs)
        scoring = Scoring(source.reader, model_uri, scores_uri, rejects_uri, decoded, classes, settings, outputs)
        _follow(scoring, unfinished, done, progress)
    found = prove(source, scores_uri, rejects_uri)
    progress.update(found.scored, found.rejected, total=found.listed)
    _check_rejects(found, len(shards), settings)
    return found


def check_views(transform: Transform, settings: Score) -> None:
    """Makes sure that there is something to see in every view.

    Raises:
        RecipeError: there is not.
    """
    if settings.views not in ("five", "ten"):
        return
    if transform.fit != "crop":
        rule = (
            f"has no corners to see where the model's transform.fit is {transform.fit}: the center is the whole image"
        )
        raise RecipeError("score.views", settings.views, rule, "set it to center or mirrored")
    if transform.resize == transform.size:
        rule = f"has no corners to see where the model's transform.resize and size are both {transform.size}"
        raise RecipeError("score.views", settings.views, rule, "set it to center or mirrored")


def _forget_rejects(rejects_uri: str, done: Mapping[str, Sequence[Range]]) -> None:
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
    gone = {reject.shard for reject in wholes if reject.reason in GONE}
    shards = source.shards()
    if twice := surplus(shards, done):
        raise StageError(f"{twice[0].file} holds images that another file holds too: run the same command again")
    ranges: list[Range] = []
    for shard, is_finished in zip(shards, finished(shards, done), strict=True):
        if not is_finished and shard.name not in gone:
            raise StageError(f"{shard.name} is not scored completely: run the same command again")
        ranges += done.get(shard.name, [])
    files = [storage.join(scores_uri, r.file) for r in ranges]
    groups = [files[start : start + FILES_PER_COUNT] for start in range(0, len(files), FILES_PER_COUNT)]
    found = parallel_map(_count_rows, groups) if len(groups) > 1 else map(_count_rows, groups)
    counts = dict(chain.from_iterable(found))
    rows = [counts[file] for file in files]
    listed, scored = sum(r.stop - r.start for r in ranges), sum(n for n in rows if n is not None)
    rejected = sum(reasons.values()) - len(wholes)
    if listed != scored + rejected or None in rows:
        with_reject = count_rejected(rejects_uri)
        wrong = [
            r.file
            for r, n in zip(ranges, rows, strict=True)
            if n is None or n + with_reject[r.file] != r.stop - r.start
        ]
        # Without one, there are rejects that belong to no file, and the next attempt forgets them.
        fix = f"remove {shown(', '.join(wrong), 1000)} from {scores_uri}, and " if wrong else ""
        raise StageError(
            f"{listed} images are listed, but {scored} are scored and {rejected} rejected: {fix}run the same command again"
        )
    unreadable = len({reject.shard for reject in wholes})
    return Scored(scores_uri, rejects_uri, listed, scored, rejected, unreadable, dict(sorted(reasons.items())))


def _count_rows(uris: Sequence[str]) -> list[tuple[str, int | None]]:
    """Some Parquet files and the rows of each, from their footers; None where the footer is damaged."""

    def rows(uri: str) -> tuple[str, int | None]:
        end = storage.read_end(uri, FOOTER_BYTES)
        footer = int.from_bytes(end[-8:-4], "little") + 8  # Parquet's format: the footer's length, then the magic
        if len(end) < footer < MAX_FOOTER_BYTES:
            end = storage.read_end(uri, footer)
        try:
            return uri, int(pq.read_metadata(pa.BufferReader(end[-footer:])).num_rows)
        except (pa.ArrowException, ValueError, OSError):  # nothing is read here: the footer is damaged
            return uri, None

    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(rows, uris))


def stream(scoring: Scoring, unfinished: Unfinished) -> Iterator[dict[str, Any]]:
    """Scores what is unfinished on the Ray that is running; closing the iterator stops it.

    Yields:
        For each range whose files are published: `shard`, the first; `last`, whether it ended; `size`, bytes of its shards; `scored` and
        `rejected` images; and what they took, `read_seconds` and `model_seconds`, with the CPU time of their processes,
        `read_cpu_seconds` and `model_cpu_seconds`.

    Raises:
        TophatError: what a reader or an actor raised.
    """
    return original_errors(_stream(scoring, unfinished))


def _stream(scoring: Scoring, unfinished: Unfinished) -> Iterator[dict[str, Any]]:
    import ray

    from models.card import read_card, read_weights

    settings = scoring.settings
    size = sum(unfinished.shards["size"].to_pylist())
    actors = settings.actors or min(default_actors(settings), max(len(unfinished.shards), size // MIN_TASK_BYTES))
    card = read_card(scoring.model_uri)
    weights = ray.remote(read_weights).options(num_cpus=settings.reader_cpus).remote(scoring.model_uri, card)
    tasks = unfinished.tasks(_readers(settings, actors))
    rows = range_rows(scoring.transform, settings.range_bytes, settings.batch)
    read = RangeReader(scoring.reader, scoring.transform, rows, settings.decode_seconds, ray.put(unfinished))
    for found in through_actors(tasks, read, RangeScorer, (scoring, [weights]), settings, actors):
        yield from found.to_pylist()


def through_actors(
    tasks: list[dict[str, int]],
    read: Callable[[pa.Table], Iterator[pa.Table]],
    actor: type,
    arguments: tuple[Any, ...],
    settings: Score,
    actors: int,
) -> "Iterator[pa.Table]":
    """What actors that hold models make of what tasks read, as it comes, on the Ray that is running.

    Args:
        tasks: a row for each task.
        read: gives the tables of a task, of one row each, which hold decoded images.
        actor: makes one table of one of those.
        arguments: that each actor is made with.
        settings: resources of both.
        actors: how many.
    """
    import ray

    with ray.data.DataContext.current(_context(settings, actors)):
        ranges = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            read,
            batch_size=1,
            num_cpus=settings.reader_cpus,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(settings.readers),
        )
        scored = ranges.map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=actors,
                max_concurrent_calls_per_actor=CALLS,
                max_tasks_in_flight_per_actor=2 * CALLS,
                enable_true_multi_threading=True,
            ),
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
            runtime_env=None if settings.gpus_per_actor else {"env_vars": KEPT_MEMORY},
        )
        # A single split runs in a process of Ray's, where what Ray says of its own actors goes to its log.
        (followed,) = scored.streaming_split(1)
    for batch in followed.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield cast("pa.Table", batch)


def _context(settings: Score, actors: int) -> "ray.data.DataContext":
    """How Ray Data streams: every range on its own, errors as they are raised and, on CPUs, few ranges ahead, as readers take from the
    actors what they read too early."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.raise_original_map_exception = True  # what Ray Data would wrap it in forgets it on its way to the driver
    context.target_max_block_size = 1
    if not settings.gpus_per_actor:
        ahead = actors * CPU_AHEAD * settings.range_bytes
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=ahead)
    return context


def _follow(scoring: Scoring, unfinished: Unfinished, done: Mapping[str, Sequence[Range]], progress: Progress) -> None:
    """Scores to the end and says how far it is, or stops where too much is rejected."""
    limit = scoring.settings.max_reject_fraction
    size = sum(unfinished.shards["size"].to_pylist())
    before = sum(r.stop - r.start for ranges in done.values() for r in ranges)  # of earlier attempts
    images = rejects = ended_images = ended_bytes = 0
    waiting: dict[str, int] = {}  # images of shards that have not ended
    for row in stream(scoring, unfinished):
        images, rejects = images + row["scored"], rejects + row["rejected"]
        waiting[row["shard"]] = waiting.get(row["shard"], 0) + row["scored"] + row["rejected"]
        if row["last"]:
            ended_images += waiting.pop(row["shard"])
            ended_bytes += row["size"]
        expected = before + ended_images * size // ended_bytes if ended_bytes and ended_images else None
        progress.update(before + images, rejects, total=expected and max(expected, before + images + rejects))
        if images + rejects >= EARLY_CHECK and rejects > limit * (images + rejects):
            raise StageError(
                f"{rejects} of the first {images + rejects} images could not be scored, more than score.max_reject_fraction = "
                f"{limit:g} allows: look at the rejects in {scoring.rejects_uri}, "
                "then raise it, or mend the source and score it in another folder"
            )


def check_cluster(settings: Score) -> None:
    """Makes sure that the cluster can hold what scoring needs.

    Raises:
        ResourceError: it cannot.
    """
    check([demand(settings)], cluster_shape())


def demand(settings: Score) -> Demand:
    """What scoring needs at once: its actors, or one, and a reader."""
    actors = Bundle(settings.actors or 1, settings.cpus_per_actor, settings.gpus_per_actor)
    return Demand("score.actors", settings.actors or 1, (actors, Bundle(1, settings.reader_cpus)))


def default_actors(settings: Score) -> int:
    """How many actors the cluster holds, at its largest: on CPUs beside a reader for each, on GPUs beside one."""
    shape = cluster_shape()
    cpus = shape.total("CPU")
    if settings.gpus_per_actor > 0:
        beside_a_reader = (cpus - settings.reader_cpus) / settings.cpus_per_actor
        return max(1, int(min(beside_a_reader, shape.total("GPU") / settings.gpus_per_actor)))
    return max(1, int(cpus / (settings.cpus_per_actor + settings.reader_cpus)))


def _readers(settings: Score, actors: int) -> int:
    """How many tasks read at once, about: on CPUs as many as actors, beside GPUs as many as there is room for."""
    if not settings.gpus_per_actor:
        return actors
    room = int((cluster_shape().total("CPU") - actors * settings.cpus_per_actor) / settings.reader_cpus)
    return max(1, min(room, settings.readers or room))
