"""The review of near-duplicates: a static page with the ranked pairs side by side, and the decision file that it saves.

What came from outside (shard names, image bytes) is hostile: text is escaped, images are decoded here and written anew as
thumbnails. A decision file comes from a user's browser, so it is checked as any input.
"""

import io
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from cluster import storage
from cluster.errors import InputError, SourceError, StorageError
from cluster.progress import SILENT, Progress
from cluster.section import Section
from cluster.tasks import parallel_map
from models.config import Transform
from models.inputs.image import UndecodableImage, decode
from pipeline.data.reader import Reader
from pipeline.data.shards import Shard, ShardError
from pipeline.data.sources import ImageSource
from pipeline.report import templating as pages
from pipeline.report.text import short

# isort: split
# After cluster.storage: pyarrow loads pyarrow.fs, which reads the environment that cluster.storage sets.
import pyarrow as pa

TILE = 128
"""Longest side of a thumbnail, in pixels."""
PER_PAGE = 50
SHOWN = 10_000
"""Pairs on the page, at most."""
MAX_PIXELS = 64_000_000
MAX_DECISION_BYTES = 256 << 20


# The page


@dataclass(frozen=True)
class Review:
    """What the page shows.

    Attributes:
        pairs: ranked pairs, as `pipeline.duplicates.nearest.PAIRS` says.
        proposed: bool [pairs], those whose image is left out unless the review says otherwise.
        finding: the hash of the pairs, which a decision file must name.
        unlabeled: U.
        sets: the labeled images' sources, by the name of their set.
    """

    pairs: pa.Table
    proposed: NDArray[np.bool_]
    finding: str
    unlabeled: ImageSource
    sets: Mapping[str, ImageSource]


def write_review(out_uri: str, review: Review, progress: Progress = SILENT) -> str:
    """Publishes the page into the folder `out_uri`: thumbnails made by Ray tasks, `index.html` last.

    Returns:
        The URI of index.html.
    """
    pairs = review.pairs.slice(0, SHOWN).to_pylist()
    labeled = {key: number for number, key in enumerate(dict.fromkeys(map(_labeled, pairs)))}
    wanted: dict[tuple[str | None, str], dict[int, list[str]]] = {}
    for pair in pairs:
        files = wanted.setdefault((None, pair["shard"]), {})
        files.setdefault(pair["index"], []).append(f"u-{pair['rank']:05d}.jpg")
    for (name, shard, index), number in labeled.items():
        wanted.setdefault((name, shard), {}).setdefault(index, []).append(f"l-{number:05d}.jpg")
    shown: set[str] = set()
    files_of: dict[str, str] = {}  # the images' own names, by the files of their thumbnails
    sources: dict[str | None, ImageSource] = {None: review.unlabeled}
    sources.update(review.sets.items())
    shards = {name: {shard.name: shard for shard in source.shards()} for name, source in sources.items()}
    jobs = []
    for (owner, shard), files in wanted.items():
        if shard not in shards[owner]:
            rule = f"has no shard {shard}, which the pairs name"
            raise SourceError("source", sources[owner].reader.root, rule, "give the source that was embedded")
        jobs.append(_Job(sources[owner].reader, shards[owner][shard], files))
    for made in parallel_map(partial(_thumbnails, storage.join(out_uri, "assets")), jobs):
        shown.update(thumbnail for thumbnail, _, is_shown in made if is_shown)
        files_of |= {thumbnail: name for thumbnail, name, _ in made if name is not None}
        progress.add(done=len(made))
    for file, content in _render(review, pairs, labeled, shown, files_of).items():
        storage.publish(storage.join(out_uri, file), content.encode())
    return storage.join(out_uri, "index.html")


def _labeled(pair: Mapping[str, Any]) -> tuple[str, str, int]:
    return pair["labeled_set"], pair["labeled_shard"], pair["labeled_index"]


@dataclass(frozen=True)
class _Job:
    """Thumbnails out of one shard: the files of each wanted row."""

    reader: Reader
    shard: Shard
    files: dict[int, list[str]]


def _thumbnails(out_uri: str, job: _Job) -> list[tuple[str, str | None, bool]]:
    """Publishes the thumbnails of one shard; runs in a Ray task. Returns their files, each with its image's own name, and whether it is
    there: whether the image could be decoded."""
    made: list[tuple[str, str | None, bool]] = []
    left = set(job.files)
    with suppress(
        ShardError
    ):  # of a damaged shard the page shows what can be read, and says of the rest that it is missing
        for row in job.reader.read(job.shard, job.files):
            left.discard(row.index)
            thumbnail = _thumbnail(row.data)
            for file in job.files[row.index]:
                if thumbnail is not None:
                    storage.publish(storage.join(out_uri, file), thumbnail)
                made.append((file, row.file, thumbnail is not None))
            if not left:
                break
    return made


def _thumbnail(data: bytes) -> bytes | None:
    """The whole image, upright, its longer side TILE pixels, as a JPEG; None if it cannot be decoded."""
    from PIL import Image

    try:
        image = Image.fromarray(decode(data, Transform(size=TILE, resize=TILE, max_pixels=MAX_PIXELS)))
    except UndecodableImage:
        return None
    scale = TILE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.BILINEAR).save(out, "JPEG", quality=88)
    return out.getvalue()


def _render(
    review: Review,
    pairs: list[dict[str, Any]],
    labeled: Mapping[tuple[str, str, int], int],
    shown: set[str],
    files_of: Mapping[str, str],
) -> dict[str, str]:
    """The page's text files by their path; `index.html` last."""
    names: dict[str, int] = {}

    def number(name: str) -> int:
        return names.setdefault(name, len(names))

    def image(shard: str, index: int, thumbnail: str) -> list[Any]:
        name = files_of.get(thumbnail)
        return [number(shard), index, thumbnail if thumbnail in shown else None, name and short(name)]

    rows = []
    for pair, proposed in zip(pairs, review.proposed.tolist(), strict=False):
        file, other = f"u-{pair['rank']:05d}.jpg", f"l-{labeled[_labeled(pair)]:05d}.jpg"
        rows.append(
            [
                round(pair["distance"], 4),
                int(proposed),
                image(pair["shard"], pair["index"], file),
                image(pair["labeled_shard"], pair["labeled_index"], other),
                number(pair["labeled_set"]),
            ]
        )
    data = {
        "finding": review.finding,
        "perPage": PER_PAGE,
        "names": [[name, short(name)] for name in names],
        "pairs": rows,
    }
    page = (
        pages.environment()
        .get_template("duplicates.html")
        .render(data=data, shown=len(rows), total=len(review.pairs), proposed=int(review.proposed[: len(rows)].sum()))
    )
    return {
        "assets/report.css": pages.style(),
        "assets/duplicates.css": pages.asset("duplicates.css"),
        "assets/duplicates.js": pages.asset("duplicates.js"),
        "index.html": page,
    }


# The decision file


Image = tuple[Annotated[str, Field(max_length=10_000)], Annotated[int, Field(ge=0, lt=2**32, strict=True)]]


class Decisions(Section):
    """What a review decided: the content of the file that the page saves."""

    format: Literal["tophat.duplicates.decisions/1"]
    """Of the file."""
    finding: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """Which ranked pairs were reviewed."""
    remove: tuple[Image, ...]
    """Images of U, (shard, index), that are left out."""
    keep: tuple[Image, ...]
    """Images of U that stay."""


def read_decisions(field: str, uri: str) -> Decisions:
    """Reads a decision file.

    Args:
        field: the recipe's field or the option that names it, for messages.
        uri: the file.

    Raises:
        InputError: it cannot be read or is no decision file.
    """
    fix = "give the file that the review page saved"
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        raise StorageError(field, uri, error.rule, fix) from None
    if len(data) > MAX_DECISION_BYTES:
        raise InputError(field, uri, f"is larger than {MAX_DECISION_BYTES >> 20} MiB", fix)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(field, uri, f"is not JSON ({error})", fix) from None
    try:
        return Decisions.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(field, uri, f"is no decision file: {place}: {first['msg']}", fix) from None


def decided(
    field: str, uri: str, decisions: Decisions, pairs: pa.Table, finding: str, proposed: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which of the ranked pairs' images are left out: bool [pairs], `proposed` where the review says nothing.

    Raises:
        InputError: it was made on other pairs, names an image that is in none, or says two things of one.
    """
    fix = "review the page of this run, and give the file that it saves"
    if decisions.finding != finding:
        raise InputError(field, uri, f"was made on other pairs ({decisions.finding}, these are {finding})", fix)
    keys = zip(pairs["shard"].to_pylist(), pairs["index"].to_pylist(), strict=True)
    places = {key: place for place, key in enumerate(keys)}
    out, said = proposed.copy(), set()
    for images, value in ((decisions.remove, True), (decisions.keep, False)):
        for image in images:
            if image not in places:
                raise InputError(field, uri, f"names an image that is in no pair: {image[0]} [{image[1]}]", fix)
            if image in said:
                raise InputError(field, uri, f"names an image twice: {image[0]} [{image[1]}]", fix)
            said.add(image)
            out[places[image]] = value
    return out
