"""A look at images: read by threads of this process, without Ray, within a limit of images and of time."""

import hashlib
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import psutil

from cluster import storage
from cluster.errors import SourceError, shown
from models.config import Transform
from models.inputs.image import UndecodableImage, evaluation_image, upright_size
from pipeline.data.shards import Row, Shard, ShardError
from pipeline.data.sources import ImageSource
from pipeline.guide.findings import Look, Machine, Place
from pipeline.scoring.sampling import count_images

MOST = 20_000
"""Images of a source that are read."""
SECONDS, LABELED_SECONDS = 10.0, 60.0
"""After which no more are: U is known well enough by a part of it, and of labeled images every one counts."""
DECODED = 1_000
"""Images without labels that are decoded; of labeled ones, all that are read."""
KEPT, KEPT_BYTES = 48, 2**20
"""Images whose bytes are kept, and the most of one."""
AT_ONCE = 64
"""Files of a folder that a thread reads before it asks for others."""
EXAMPLES = 3
COLORLESS = 4
"""Channels of an image without colors differ by no more than this, of 255: lossy coding makes some."""
_SMALL = Transform(size=32, resize=32)


@dataclass(frozen=True)
class _Seen:
    """One image that was read; `size` is None where it was not decoded, or cannot be."""

    place: Place
    content: bytes
    decoded: bool
    problem: str | None = None
    size: tuple[int, int] | None = None
    gray: bool = False
    data: bytes = b""


def look(option: str, source: ImageSource, *, labeled: bool, most: int = MOST) -> Look:
    """Reads a source, or a random part of one that is large.

    Args:
        option: that gives it, for messages.
        source: listed.
        labeled: whether its images have labels.
        most: images that are read.

    Raises:
        SourceError: an image without a label where there should be one, or no image that can be used.
        StorageError: the store refuses.
    """
    images, _ = count_images(source)
    jobs, whole = _jobs(source, images, most)
    decoded = 1.0 if labeled else DECODED / max(1, min(images, most))
    until = time.monotonic() + (LABELED_SECONDS if labeled else SECONDS)

    def read(job: tuple[Shard, tuple[int, ...] | None, int]) -> tuple[list[_Seen], bool]:
        if time.monotonic() > until:
            return [], False
        found = []
        for row in _rows(source, *job):
            wanted = labeled or random.Random(f"{job[0].name}/{row.index}").random() < decoded
            found.append(_seen(job[0], row, decode=wanted))
            if time.monotonic() > until:
                return found, False
        return found, True

    with ThreadPoolExecutor(max(4, min(16, 2 * (os.cpu_count() or 1)))) as pool:
        parts = list(pool.map(read, jobs))
    every = [one for found, _ in parts for one in found]
    return _summed(option, source, every, images, labeled=labeled, whole=whole and all(ended for _, ended in parts))


def _jobs(source: ImageSource, images: int, most: int) -> tuple[list[tuple[Shard, tuple[int, ...] | None, int]], bool]:
    """What threads read: a shard, the rows in it (None for the first ones) and how many at most; and whether that is everything."""
    draw, limit = random.Random(0), most
    shards = draw.sample(source.listing, len(source.listing))
    if source.reader.layout == "folder":
        jobs: list[tuple[Shard, tuple[int, ...] | None, int]] = []
        for shard in shards:
            rows = range(len(shard.files))
            jobs += [(shard, tuple(rows[start : start + AT_ONCE]), AT_ONCE) for start in rows[::AT_ONCE]]
        return jobs[: -(-limit // AT_ONCE)], images <= limit
    if images <= limit:
        return [(shard, None, limit) for shard in shards], True
    each = max(AT_ONCE, -(-limit // len(shards)))
    return [(shard, None, each) for shard in shards[: -(-limit // each)]], False


def _rows(source: ImageSource, shard: Shard, rows: tuple[int, ...] | None, most: int) -> Iterator[Row]:
    try:
        yield from islice(source.reader.read(shard, rows), most)
    except ShardError:
        return  # a run tells which: its rejects have the shard


def _seen(shard: Shard, row: Row, *, decode: bool) -> _Seen:
    shown_as = shard.files[row.index] if shard.files else f"image {row.index} of {shard.name}"
    place = Place(shard.name, row.index, shown_as, "" if row.label is None else str(row.label))
    content = hashlib.sha256(row.data).digest()
    if not decode:
        return _Seen(place, content, decoded=False)
    try:
        size = upright_size(row.image, _SMALL)
        pixels = evaluation_image(row.image, _SMALL).astype(np.int16)
    except UndecodableImage as error:
        return _Seen(place, content, decoded=True, problem=error.reason)
    gray = bool((pixels.max(axis=0) - pixels.min(axis=0)).max() <= COLORLESS)
    return _Seen(place, content, True, None, size, gray, row.data if len(row.data) <= KEPT_BYTES else b"")


def _summed(option: str, source: ImageSource, every: list[_Seen], images: int, *, labeled: bool, whole: bool) -> Look:
    decoded = [one for one in every if one.decoded]
    good = [one for one in decoded if one.size is not None]
    bad = [one for one in decoded if one.size is None]
    unusable = Counter(one.problem for one in bad if one.problem is not None)
    if not good:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in unusable.most_common()) or "no image was read"
        raise SourceError(
            option, source.reader.root, f"holds no image that can be used ({reasons})", "look at the files"
        )
    if labeled and (bare := next((one.place for one in good if not one.place.label), None)) is not None:
        fix = "put the images into one folder per class, or labels beside them (docs/sources.md)"
        raise SourceError(option, source.reader.root, f"has no label for {shown(bare.shown)}", fix)
    sizes = np.array([one.size for one in good], np.float64)
    content: defaultdict[bytes, list[Place]] = defaultdict(list)
    for one in every:
        if one.problem is None:
            content[one.content].append(one.place)
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    return Look(
        images=len(every) if whole else max(images, len(every) + 1),
        seen=len(every),
        decoded=len(decoded),
        unusable=dict(unusable),
        examples=tuple(one.place for one in bad[:EXAMPLES]),
        per_class=dict(sorted(Counter(one.place.label for one in good if labeled).items())),
        shorter=int(np.median(shorter)),
        elongation=float(np.percentile(longer / shorter, 75)),
        gray=sum(one.gray for one in good) / len(good),
        content={
            key: tuple(sorted(places, key=lambda p: (p.shard.encode(), p.index))) for key, places in content.items()
        },
        some=tuple(one.data for one in random.Random(0).sample(good, min(KEPT, len(good))) if one.data),
    )


def machine() -> Machine:
    """This machine, as a run on it sees it."""
    import torch

    gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0))
    name = torch.cuda.get_device_name(0) if gpus else ""
    return Machine(cores, psutil.virtual_memory().total / 2**30, gpus, name)


def inside(pool: ImageSource, other: ImageSource) -> bool:
    """Whether a set lies in U's folder, or is it."""
    roots = [
        f"{root if storage.is_remote(root) else os.path.realpath(root)}/".replace("//", "/")
        for root in (other.reader.root, pool.reader.root)
    ]
    return roots[0].startswith(roots[1])
