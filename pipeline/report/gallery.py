"""The gallery of D-hat (Figure 2): for each class a row of images at chosen ranks, as a static site.

Two phases of Ray tasks. *Gather*: of every file of D-hat the wanted rows become thumbnails. *Publish*: each group of pages
gets its thumbnails, makes a contact strip of every class and writes its pages. Thumbnails pass from task to task in Ray's
object store; this process sees none. The lists of classes are written last, `index.html` after all else.

Class and file names are hostile text, which the templates escape; images are hostile bytes, decoded and written anew.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from cluster import storage
from cluster.errors import StageError
from cluster.progress import SILENT, Progress
from cluster.tasks import scatter
from models.config import Transform
from models.inputs.image import UndecodableImage, evaluation_image
from pipeline.report import templating as pages
from pipeline.report.text import finite, short

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

PER_PAGE = 20
"""Classes on a page of images."""
LISTED = 500
"""Classes on a page of the list: it stays under 200 kB whatever their names are."""
GROUPS = 64
"""Tasks that publish pages, at most."""
TILE = 128
"""Side of a thumbnail, in pixels."""
MAX_PIXELS = 64_000_000
"""An image of more pixels than this is not decoded for its thumbnail."""


@dataclass(frozen=True)
class ClassCount:
    """What D-hat holds of one class."""

    class_id: int
    name: str
    count: int
    lowest_score: float | None
    """The score of the last selected image; None when there is none."""


@dataclass(frozen=True)
class RankedImage:
    """A selected image: where it stands in its class, where it came from, and whether it can be shown."""

    rank: int
    score: float
    shard: str
    index: int
    shown: bool
    """False: it could not be decoded, and its tile is blank."""
    file: str | None = None
    """Its own name, where it has one and D-hat says it."""


@dataclass(frozen=True)
class ClassRow:
    """Images of one class at chosen ranks (see `figure_ranks`), by ascending rank."""

    class_id: int
    name: str
    count: int
    """Images of the class in D-hat."""
    strip: str
    """Its contact strip, in the gallery's folder: a JPEG of len(images) * TILE x TILE pixels, the thumbnails side by side."""
    images: Sequence[RankedImage]


@dataclass(frozen=True)
class Gallery:
    """A published gallery.

    Attributes:
        images: how many it shows, those with a blank tile among them.
        blank: images that could not be decoded.
        rows: of the classes that the caller asked for, by class id.
    """

    images: int
    blank: int
    rows: tuple[ClassRow, ...]


def figure_ranks(count: int, first: int, strided: int) -> list[int]:
    """The ranks to show of a class, as in Figure 2: its first ones, then evenly strided ones down to its last.

    Args:
        count: how many images the class has, ranks 0 to count - 1.
        first: how many of the first ranks.
        strided: how many more, the last of which is rank count - 1.

    Returns:
        min(count, first + strided) distinct ranks, ascending.

    Raises:
        ValueError: an argument is negative.
    """
    if min(count, first, strided) < 0:
        raise ValueError(f"figure_ranks({count}, {first}, {strided}): counts must not be negative")
    first = min(first, count)
    rest = count - first
    strided = min(strided, rest)
    return [*range(first), *(first + (i + 1) * rest // strided - 1 for i in range(strided))]


def write_gallery(
    out_uri: str,
    dhat_uri: str,
    classes: Sequence[ClassCount],
    *,
    title: str,
    first_ranks: int,
    strided_ranks: int,
    rows_of: Sequence[int] = (),
    progress: Progress = SILENT,
) -> Gallery:
    """Publishes the gallery into the folder `out_uri` (local or object store), with Ray; it begins at `index.html`.

    A file of D-hat is read by one task, a row group at a time, and of the images only the row groups that hold a rank
    which is shown. A thousand classes of 16 images make some 50 pages and 1,000 strips.

    Args:
        out_uri: the folder.
        dhat_uri: the folder of D-hat's Parquet files (`pipeline.selection.dhat.materialize`).
        classes: all classes, by class id from 0.
        title: of the pages, the run's name; hostile, as all text.
        first_ranks, strided_ranks: which ranks, see `figure_ranks`.
        rows_of: classes whose rows are returned.
        progress: counts thumbnails.

    Raises:
        StageError: D-hat does not hold what `classes` says.
        StorageError: a location that refuses.
    """
    site = _Site(out_uri, dhat_uri, title, tuple(classes), first_ranks, strided_ranks, frozenset(rows_of))
    wanted = places_of(site.classes, first_ranks, strided_ranks)
    found, gathered = 0, []
    files = [(file.path,) for file in storage.list_files(dhat_uri, ".parquet")]
    for made, shares in scatter(partial(_gather, site, wanted), files, values=site.groups):
        gathered.append(shares)
        found += made
        progress.update(found)
    if found != len(wanted):
        raise StageError(f"D-hat at {dhat_uri} holds {found} of the {len(wanted)} images of the gallery: make it again")
    storage.publish(storage.join(out_uri, "assets", "report.css"), pages.style(first_ranks + strided_ranks).encode())
    work = ((group, *(shares[group] for shares in gathered)) for group in range(site.groups))
    rows: list[ClassRow] = []
    blank = 0
    for (kept, lost), _ in scatter(partial(_publish, site), work, values=0):
        rows += kept
        blank += lost
    for name, content in _lists(site).items():
        storage.publish(storage.join(out_uri, name), content.encode())
    ordered = tuple(sorted(rows, key=lambda row: row.class_id))
    return Gallery(found, blank, ordered)


# Thumbnails


class Tile(NamedTuple):
    """A thumbnail on its way from the task that made it to the one that shows it."""

    class_id: int
    image: RankedImage
    thumbnail: bytes | None


def _gather(site: "_Site", wanted: NDArray[np.int64], file: str) -> tuple[Any, ...]:
    """Of one file of D-hat, how many tiles there are and those of each group of pages; runs in a Ray task."""
    shares: list[list[Tile]] = [[] for _ in range(site.groups)]
    uri = storage.join(site.dhat_uri, file)
    with storage.open_input(uri) as source, pq.ParquetFile(source) as parquet:
        for group in range(parquet.num_row_groups):
            places = parquet.read_row_group(group, columns=["label", "rank"])
            hits = np.flatnonzero(np.isin(place(places["label"].to_numpy(), places["rank"].to_numpy()), wanted))
            if not len(hits):
                continue
            for row in parquet.read_row_group(group).take(hits).to_pylist():
                made = thumbnail(row["image"])
                names = row["rank"], row["score"], row["shard"], row["index"], made is not None, row.get("file")
                image = RankedImage(*names)
                shares[site.group_of(row["label"])].append(Tile(row["label"], image, made))
    return sum(map(len, shares)), *shares


def place(class_id: NDArray[np.int32], rank: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64: class << 32 | rank."""
    return class_id.astype(np.int64) << 32 | rank


def thumbnail(image: bytes) -> bytes | None:
    """The central square of `image` (encoded, hostile), upright, on white, as a JPEG of TILE x TILE; None if it cannot be decoded."""
    from PIL import Image

    try:
        pixels = evaluation_image(image, Transform(size=TILE, resize=TILE, max_pixels=MAX_PIXELS))
    except UndecodableImage:
        return None
    out = io.BytesIO()
    # Almost without loss, because the strip encodes it once more.
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def contact_strip(thumbnails: Sequence[bytes | None]) -> bytes:
    """Thumbnails side by side in one JPEG of TILE x len(thumbnails) * TILE pixels; a gray tile for None."""
    from PIL import Image

    strip = Image.new("RGB", (TILE * max(1, len(thumbnails)), TILE), (128, 128, 128))
    for column, data in enumerate(thumbnails):
        if data is not None:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                strip.paste(image, (column * TILE, 0))
    out = io.BytesIO()
    strip.save(out, "JPEG", quality=85)
    return out.getvalue()


# Pages


@dataclass(frozen=True)
class _Site:
    """What every task knows of the gallery."""

    out_uri: str
    dhat_uri: str
    title: str
    classes: tuple[ClassCount, ...]
    first_ranks: int
    strided_ranks: int
    rows_of: frozenset[int]

    @property
    def pages(self) -> int:
        return max(1, -(-len(self.classes) // PER_PAGE))

    @property
    def groups(self) -> int:
        return min(self.pages, GROUPS)

    def group_of(self, class_id: int) -> int:
        return class_id // PER_PAGE % self.groups


def places_of(classes: Sequence[ClassCount], first: int, strided: int) -> NDArray[np.int64]:
    """The `place` of every image that a gallery shows; see `figure_ranks`."""
    ranks = [figure_ranks(one.count, first, strided) for one in classes]
    ids = np.repeat(np.arange(len(ranks), dtype=np.int32), [len(each) for each in ranks])
    return place(ids, np.fromiter(chain.from_iterable(ranks), np.int32, len(ids)))


def page_name(page: int) -> str:
    """The file of a page of images, numbered from 0."""
    return f"page-{page + 1:04d}.html"


def _list_name(page: int) -> str:
    return "index.html" if page == 0 else f"classes-{page + 1:04d}.html"


def _publish(site: _Site, group: int, *shares: list[Tile]) -> tuple[Any, ...]:
    """Publishes the pages of one group; returns the rows that the caller asked for and the number of blank tiles.

    Runs in a Ray task.
    """
    tiles: dict[int, list[Tile]] = {}
    for tile in chain.from_iterable(shares):
        tiles.setdefault(tile.class_id, []).append(tile)
    template = pages.environment().get_template("gallery-page.html")
    kept: list[ClassRow] = []
    for page in range(group, site.pages, site.groups):
        on_page = site.classes[page * PER_PAGE : (page + 1) * PER_PAGE]
        rows = [_publish_row(site, one, tiles.get(one.class_id, [])) for one in on_page]
        nearby = {"back": page_name(page - 1) if page else "", "list": _list_name(page * PER_PAGE // LISTED)}
        nearby["next"] = page_name(page + 1) if page + 1 < site.pages else ""
        content = template.render(site=site, rows=rows, page=page, per_page=PER_PAGE, **nearby)
        storage.publish(storage.join(site.out_uri, page_name(page)), content.encode())
        kept += [row for row in rows if row.class_id in site.rows_of]
    return ((kept, sum(tile.thumbnail is None for tile in chain.from_iterable(shares))),)


def _publish_row(site: _Site, one: ClassCount, tiles: list[Tile]) -> ClassRow:
    tiles = sorted(tiles, key=lambda tile: tile.image.rank)
    strip = f"strips/class-{one.class_id:05d}.jpg"
    if tiles:
        storage.publish(storage.join(site.out_uri, strip), contact_strip([tile.thumbnail for tile in tiles]))
    return ClassRow(one.class_id, one.name, one.count, strip, [tile.image for tile in tiles])


def _lists(site: _Site) -> dict[str, str]:
    """The pages that list the classes, and what their search needs, by path; `index.html` last."""
    names = [[short(one.name), one.count, finite(one.lowest_score)] for one in site.classes]
    made = {
        "assets/gallery.js": pages.asset("gallery.js"),
        "assets/classes.js": f"globalThis.tophatClasses = {json.dumps({'perPage': PER_PAGE, 'classes': names})};\n",
    }
    template = pages.environment().get_template("gallery.html")
    lists = max(1, -(-len(site.classes) // LISTED))
    for page in reversed(range(lists)):
        listed = [
            (one, page_name(one.class_id // PER_PAGE)) for one in site.classes[page * LISTED : (page + 1) * LISTED]
        ]
        others = [
            (_list_name(other), other * LISTED, min((other + 1) * LISTED, len(site.classes)) - 1)
            for other in range(lists)
        ]
        made[_list_name(page)] = template.render(site=site, listed=listed, lists=others, page=page)
    return made
