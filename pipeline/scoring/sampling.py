"""Scoring a sample of U: how many images there are, and what one of them takes."""

import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from cluster import storage
from cluster.errors import StageError
from cluster.progress import Progress
from cluster.resources import ClusterShape
from pipeline.data.reader import Reader
from pipeline.data.rejects import read_rejects
from pipeline.data.shards import Row, Shard, ShardError
from pipeline.data.sources import ImageSource
from pipeline.recipe.sections import Score
from pipeline.scoring.actors import Scoring
from pipeline.scoring.ledger import Unfinished
from pipeline.scoring.score import check_views, default_actors, stream

ROWS_PER_SHARD = 64
"""Images of one shard in a sample: few, so that it comes from many shards."""
LOOKED_AT = 16, 32
"""Shards, and images of each, from whose size the number of images is told."""
TAR_END = 5_632
"""Bytes of the end of a tar: two blocks, and zeros up to a multiple of 10,240 bytes, on average."""


@dataclass(frozen=True)
class SampleReader(Reader):
    """Reads the first rows of each shard."""

    first_rows: int = ROWS_PER_SHARD

    def read(self, shard: Shard, *arguments: Any, **options: Any) -> Iterator[Row]:
        """As `Reader.read`."""
        return itertools.islice(super().read(shard, *arguments, **options), self.first_rows)


@dataclass(frozen=True)
class Cost:
    """What one image takes, in seconds: of a reader and of an actor, as time that passes and as CPU time."""

    read_seconds: float
    read_cpu_seconds: float
    model_seconds: float
    model_cpu_seconds: float


@dataclass(frozen=True)
class Sample:
    """What scoring a sample showed.

    Attributes:
        images: that were scored.
        rejected: that could not be.
        rejects: how many there are of each reason.
        cost: of one image.
        rate: images/s, all in all; None where the sample was too small to tell.
        start_seconds: until the first images were scored.
        table_bytes: of the score table, for each image.
        actors: that scored.
    """

    images: int
    rejected: int
    rejects: dict[str, int]
    cost: Cost
    rate: float | None
    start_seconds: float
    table_bytes: float
    actors: int


def count_images(source: ImageSource, seed: int = 0) -> tuple[int, float]:
    """How many images a source has, without reading it: from the size of some.

    Returns:
        The number, and its standard error as a share of it; 0 where the listing says it.
    """
    if source.reader.layout == "folder":
        return sum(len(shard.files) for shard in source.listing), 0.0
    shards, rows = LOOKED_AT
    chosen = random.Random(seed).sample(source.listing, min(shards, len(source.listing)))
    with ThreadPoolExecutor(len(chosen)) as pool:
        found = [one for shard in pool.map(lambda shard: _sizes(source.reader, shard, rows), chosen) for one in shard]
    seen, images = sum(size for size, _ in found), sum(count for _, count in found)
    if not images or not seen:
        raise StageError(f"no image could be read from {len(chosen)} of the shards of {source.reader.root}")
    if source.reader.layout == "parquet" and len(found) == len(source.listing):
        return images, 0.0
    squares = sum((size - count * seen / images) ** 2 for size, count in found)  # of a ratio of two sums
    error = math.sqrt(squares * len(found) / (len(found) - 1)) / seen if len(found) > 1 else 1.0
    content = source.bytes - sum(TAR_END for shard in source.listing if shard.name.endswith(".tar"))
    return max(1, round(content * images / seen)), error


def _sizes(reader: Reader, shard: Shard, rows: int) -> list[tuple[int, int]]:
    """Bytes of a shard and how many images they hold: of each of the first images, or of all; nothing where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if reader.layout == "parquet":
            with storage.open_input(storage.join(reader.root, shard.name)) as file:
                count = pq.read_metadata(file).num_rows
            return [(shard.size, count)]
        found = list(itertools.islice(reader.read(shard), rows + 1))
    except (ShardError, OSError, pa.ArrowException):
        return []
    if not shard.name.endswith(".tar"):  # compressed, which images are themselves
        return [(len(row.data), 1) for row in found]
    if len(found) == 1:
        return [(max(1, shard.size - TAR_END), 1)]
    return [(after.offset - row.offset, 1) for row, after in itertools.pairwise(found)]


def score_sample(
    source: ImageSource,
    model_uri: str,
    place: str,
    settings: Score,
    *,
    images: int,
    image_bytes: float,
    seconds: float,
    shape: ClusterShape,
    progress: Progress,
    began: float,
    seed: int = 0,
) -> Sample:
    """Scores some images of a source, on as many actors as one node holds, on the Ray that is running.

    Args:
        source: U.
        model_uri: a model directory.
        place: a folder for what is written; the caller removes it.
        settings: as for all of U.
        images: how many, about; from random shards.
        image_bytes: that one takes in its shard, about.
        seconds: after the first scores, when it stops at the latest.
        shape: the cluster's.
        progress: gets images scored and rejected.
        began: when the scoring began, by `time.monotonic`.
        seed: of the choice.

    Raises:
        StageError: no image could be scored.
    """
    from models.card import read_card

    card = read_card(model_uri)
    check_views(card.model.transform, settings)
    each = max([actors_on(node.resources, settings) for node in shape.shapes], default=1)
    actors = settings.actors or max(1, min(each, default_actors(settings)))
    settings = settings.model_copy(update={"actors": min(actors, max(1, each))})
    reader, shards = _drawn(source, images, image_bytes, seed)
    scores, rejects = storage.join(place, "scores"), storage.join(place, "rejects")
    transform = card.model.transform.seen_by(settings.views)
    scoring = Scoring(reader, model_uri, scores, rejects, transform, len(card.class_names), settings)
    ranges, marks = list[dict[str, Any]](), list[float]()
    done = rejected = 0
    for one in stream(scoring, Unfinished.of(shards, {})):
        ranges.append(one)
        marks.append(time.monotonic())
        done, rejected = done + one["scored"], rejected + one["rejected"]
        progress.update(done, rejected)
        if marks[-1] - marks[0] > seconds:
            break
    reasons = dict(read_rejects(rejects)[0])
    if not done:
        raise StageError(f"no image of a sample could be scored: {reasons or 'the shards hold none'}")
    written = sum(file.size for file in storage.list_files(scores, ".parquet"))
    steady, rate = _steady(ranges, marks, settings.actors or 1)
    return Sample(
        images=done,
        rejected=rejected,
        rejects=reasons,
        cost=_cost(steady),
        rate=rate,
        start_seconds=marks[0] - began,
        table_bytes=written / done,
        actors=settings.actors or 1,
    )


def _drawn(source: ImageSource, images: int, image_bytes: float, seed: int) -> tuple[SampleReader, list[Shard]]:
    """Shards at random, as large as what is read of them, and a reader of the first rows of each: about `images` together."""
    in_shard = max(1, round(source.bytes / image_bytes / len(source.listing)))
    count = min(len(source.listing), -(-images // min(in_shard, ROWS_PER_SHARD)))
    rows = -(-images // count)
    chosen = sorted(random.Random(seed).sample(source.listing, count), key=lambda shard: shard.name)
    shards = [replace(shard, size=min(shard.size, round(rows * image_bytes))) for shard in chosen]
    return SampleReader(**source.reader.__dict__, first_rows=rows), shards


def _steady(
    ranges: Sequence[dict[str, Any]], marks: Sequence[float], actors: int
) -> tuple[Sequence[dict[str, Any]], float | None]:
    """The ranges without the first of each actor, in which much is done for the first time, and images/s between them but for the end,
    when some actors have nothing left to do."""
    first, last = 2 * actors, len(ranges) - 2 * actors
    if last - first < 2 or marks[last - 1] <= marks[first - 1]:
        return ranges[actors:] or ranges, None
    images = sum(one["scored"] + one["rejected"] for one in ranges[first:last])
    return ranges[first:], images / (marks[last - 1] - marks[first - 1])


def _cost(ranges: Sequence[dict[str, Any]]) -> Cost:
    images = max(1, sum(one["scored"] + one["rejected"] for one in ranges))
    names = ("read_seconds", "read_cpu_seconds", "model_seconds", "model_cpu_seconds")
    return Cost(**{name: sum(one[name] for one in ranges) / images for name in names})


def actors_on(resources: Mapping[str, float], settings: Score) -> int:
    """How many actors of a scoring one node holds: on CPUs each beside a reader, on GPUs all beside one."""
    cpus = resources.get("CPU", 0.0)
    if settings.gpus_per_actor > 0:
        beside_a_reader = int((cpus - settings.reader_cpus) / settings.cpus_per_actor)
        return max(0, min(beside_a_reader, int(resources.get("GPU", 0.0) / settings.gpus_per_actor)))
    return int(cpus / (settings.cpus_per_actor + settings.reader_cpus))
