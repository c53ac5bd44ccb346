"""D-hat materialized: the selected images, copied once into shuffled shards with their labels (section 3.2).

Two phases, each of bounded Ray tasks. *Gather*: every source shard that has selected images is read once, and its images go into a piece,
an Arrow file whose record batches are one for each output shard. *Assemble*: every output shard takes its batches out of the pieces, puts
the images in their places, and is published. Pieces and shards are published whole, so whatever exists for the same request is kept when
the work starts again. Which place an image gets is decided beforehand, by sorting random keys: it depends on the selection and the seed alone.
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from cluster import storage
from cluster.errors import InputError, SourceError, StageError, StorageError, TophatError, one_line, shown
from cluster.progress import SILENT, Progress
from cluster.tasks import parallel_map
from pipeline.selection.places import Plan, plan
from pipeline.selection.select import read_selection

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.uint32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("file", pa.string()),
    ]
)
PIECE_SCHEMA = pa.schema(
    [pa.field("place", pa.int64()), pa.field("image", pa.large_binary()), pa.field("file", pa.string())]
)
METADATA = b"tophat.dhat"
PIECES = "pieces"
ROW_GROUP_ROWS = 256
GATHER_BYTES = 256 << 20  # of images that one task holds before it writes them down


class Images(Protocol):
    """What is needed of an image source (`pipeline.data.sources.ImageSource`); picklable."""

    def shards(self) -> Sequence[Any]:
        """Its shards: objects with a `name`, a `size` and an `etag`."""
        ...

    def read(self, shard_name: str, rows: Collection[int] | None = None) -> Iterator[Any]:
        """The images of one shard, in row order: objects with an `index`, `data`, the encoded bytes, and `file`, their names."""
        ...


@dataclass(frozen=True)
class Dhat:
    """D-hat's own copies.

    Attributes:
        uri: the folder of its Parquet shards.
        images: rows; an image counts once for each class that selected it.
        distinct_images: different images among them.
        bytes: of the encoded images in all rows.
        shards: how many Parquet files.
        counts: rows of each class, by class id.
    """

    uri: str
    images: int
    distinct_images: int
    bytes: int
    shards: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """What one gather task copies: the rows (n) of one source shard or of several.

    Attributes:
        piece: the name of the file that they go to.
        shards: names of the source shards.
        shard: int32 [n], ordinals in `shards`, ascending.
        index: uint32 [n], ascending within a shard; twice where two classes selected the image.
        place: int64 [n], in D-hat as a whole.
    """

    piece: str
    shards: tuple[str, ...]
    shard: NDArray[np.int32]
    index: NDArray[np.uint32]
    place: NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What an output shard holds: its number, the place of its first row, and its columns without the images."""

    output: int
    start: int
    columns: pa.Table


def materialize(
    selection_uri: str,
    source: Images,
    out_uri: str,
    *,
    images_per_shard: int,
    seed: int,
    class_names: Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> Dhat:
    """Copies the selected images of `source` into shuffled, labeled Parquet shards, on the Ray that is initialized.

    Writes `out_uri/part-00000.parquet` and so on: columns image (binary, the original encoded bytes), label int32 (the
    class that selected it), shard, index, rank, score, file (the image's own name, where it has one); with class names
    also the metadata by which Hugging Face's `datasets` knows them. The bytes depend on the selection, source and
    arguments, not on the number of workers.

    Args:
        selection_uri: a selection (`pipeline.selection.select.select`).
        source: the images that it was selected from.
        out_uri: a folder for D-hat; what it holds of another request is replaced.
        images_per_shard: rows in an output shard, at most; a task holds one in memory.
        seed: of the order.
        class_names: by class id.
        progress: counts the rows that are in published shards; its fact `gathered` those that were read.

    Raises:
        SourceError: the selection cannot be read, or names shards that `source` has not.
        StageError: nothing is selected, or a selected image is not in `source` any more.
        StorageError: a location that refuses, or an `out_uri` that holds other Parquet files.
    """
    return copy_selected(
        read_selection(selection_uri),
        source,
        out_uri,
        images_per_shard=images_per_shard,
        seed=seed,
        class_names=class_names,
        progress=progress,
    )


def copy_selected(
    selection: pa.Table,
    source: Images,
    out_uri: str,
    *,
    images_per_shard: int,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> Dhat:
    """`materialize` of a selection, or of some rows of one, as `read_selection` gives it."""
    if not len(selection):
        raise StageError("D-hat is empty: no candidate was selected; lower min_score, or score more images")
    names = None if class_names is None else list(class_names)
    most = pc.max(selection["class_id"]).as_py()
    if names is not None and most >= len(names):
        raise StageError(f"the selection has class {most}, and only {len(names)} classes have names")
    work = plan(selection, images_per_shard, seed, salt=repr((_used_shards(selection, source), names, SCHEMA.names)))
    try:
        sizes = _copy(work, source, out_uri, images_per_shard, names, progress)
    except OSError as error:
        raise StageError(f"D-hat could not be copied: {one_line(str(error))}") from None
    new_image = (np.diff(work.shard) != 0) | (np.diff(work.index.astype(np.int64)) != 0)
    return Dhat(
        uri=out_uri,
        images=len(work),
        distinct_images=1 + int(np.count_nonzero(new_image)),
        bytes=sum(sizes.values()),
        shards=len(sizes),
        counts=tuple(np.bincount(work.label, minlength=len(names or ())).tolist()),
    )


def _copy(
    work: Plan, source: Images, out_uri: str, images_per_task: int, names: list[str] | None, progress: Progress
) -> dict[int, int]:
    """Makes the output shards that do not exist; returns the bytes of the images in each."""
    outputs = len(work.edges) - 1
    rows = np.diff(work.edges)
    sizes = _keep(out_uri, work)
    missing = [output for output in range(outputs) if output not in sizes]
    done = sum(int(rows[output]) for output in sizes)
    progress.update(done)
    if missing:
        pieces = storage.join(out_uri, PIECES, work.request)
        there = {file.path for file in storage.list_files(pieces)}
        orders = list(_orders(work, images_per_task))
        gather = partial(_gather, source, pieces, work.edges)
        gathered = 0
        for count in parallel_map(gather, (order for order in orders if order.piece not in there)):
            gathered += count
            progress.update(done, gathered=gathered)
        made = [order.piece for order in orders]
        assemble = partial(_assemble, out_uri, pieces, made, names, (work.request, outputs))
        for output, size in parallel_map(assemble, (_share(work, output) for output in missing)):
            sizes[output] = size
            done += int(rows[output])
            progress.update(done)
    storage.delete_tree(storage.join(out_uri, PIECES))
    return sizes


def _used_shards(selection: pa.Table, source: Images) -> list[tuple[str, int, str]]:
    """Name, size and etag of the source's shards that the selection names."""
    known = {shard.name: shard for shard in source.shards()}
    used = sorted(pc.unique(selection["shard"]).to_pylist())
    for name in used:
        if name not in known:
            raise SourceError("selection", name, "is not a shard of the source", "give the source that was scored")
    return [(name, known[name].size, known[name].etag) for name in used]


def _orders(work: Plan, images_per_task: int) -> Iterator[Order]:
    """The gather tasks: whole source shards, grouped while they have no more than `images_per_task` rows together."""
    starts = np.flatnonzero(np.diff(work.shard, prepend=-1))
    ends = [*starts[1:], len(work)]
    first = number = 0
    for position, end in enumerate(ends):
        following = ends[position + 1] if position + 1 < len(ends) else None
        if following is not None and following - first <= images_per_task:
            continue
        rows = slice(first, int(end))
        names = work.shards.slice(int(work.shard[first]), int(work.shard[end - 1] - work.shard[first]) + 1)
        yield Order(
            piece=f"{number:06d}.arrow",
            shards=tuple(names.to_pylist()),
            shard=work.shard[rows] - work.shard[first],
            index=work.index[rows],
            place=work.place[rows],
        )
        first, number = int(end), number + 1


def _gather(source: Images, pieces: str, edges: NDArray[np.int64], order: Order) -> int:
    """Copies the images of `order` into a piece and returns how many; runs in a Ray task.

    The piece has rounds of as many record batches as there are output shards, in their order.
    """
    count = 0
    with tempfile.TemporaryDirectory(prefix="tophat-") as folder:
        file = Path(folder, order.piece)
        with pa.ipc.new_file(str(file), PIECE_SCHEMA) as writer:
            held: list[tuple[int, bytes, str | None]] = []
            size = 0
            for rows, data, name in _images(source, order):
                held += [(int(place), data, name) for place in order.place[rows]]
                size += len(data)
                if size > GATHER_BYTES:
                    _write_round(writer, edges, held)
                    count, held, size = count + len(held), [], 0
            _write_round(writer, edges, held)
            count += len(held)
        storage.publish(storage.join(pieces, order.piece), file)
    return count


def _images(source: Images, order: Order) -> Iterator[tuple[slice, bytes, str | None]]:
    """Every image of `order` once: which of its rows want it, its bytes, and its name."""
    for number, name in enumerate(order.shards):
        start, end = np.searchsorted(order.shard, [number, number + 1])
        wanted, firsts = np.unique(order.index[start:end], return_index=True)
        bounds = [*(start + firsts).tolist(), int(end)]
        rows = {i: slice(*bound) for i, bound in zip(wanted.tolist(), pairwise(bounds), strict=True)}
        try:
            for image in source.read(name, frozenset(rows)):
                if image.data:
                    yield rows.pop(image.index), image.data, image.file
        except InputError:
            raise
        except TophatError as error:
            raise OSError(f"shard {shown(name)}: {error}") from None  # to be tried again
        if rows:
            lost = f"{len(rows)} selected images, index {min(rows)} among them"
            raise StageError(f"shard {shown(name)} of the source has lost {lost}; score it again")


def _write_round(
    writer: pa.ipc.RecordBatchFileWriter, edges: NDArray[np.int64], held: list[tuple[int, bytes, str | None]]
) -> None:
    held.sort(key=lambda item: item[0])
    places = np.array([place for place, _, _ in held], np.int64)
    for start, end in pairwise(np.searchsorted(places, edges).tolist()):
        images = pa.array([data for _, data, _ in held[start:end]], pa.large_binary())
        files = pa.array([name for _, _, name in held[start:end]], pa.string())
        writer.write_batch(pa.record_batch([pa.array(places[start:end]), images, files], schema=PIECE_SCHEMA))


def _share(work: Plan, output: int) -> Share:
    start, end = int(work.edges[output]), int(work.edges[output + 1])
    rows = work.row_at[start:end]
    columns = {
        "label": work.label[rows],
        "shard": work.shards.take(pa.array(work.shard[rows])),
        "index": work.index[rows],
        "rank": work.rank[rows],
        "score": work.score[rows],
    }
    return Share(output, start, pa.table(columns))


def _assemble(
    out_uri: str,
    pieces: str,
    made: Sequence[str],
    class_names: Sequence[str] | None,
    plan_of: tuple[str, int],
    share: Share,
) -> tuple[int, int]:
    """Publishes one output shard; returns its number and its images' bytes; runs in a Ray task."""
    request, outputs = plan_of
    batches = []
    for piece in made:
        with storage.open_input(storage.join(pieces, piece)) as file, pa.ipc.open_file(file) as reader:
            batches += [reader.get_batch(i) for i in range(share.output, reader.num_record_batches, outputs)]
    table = pa.Table.from_batches(batches, PIECE_SCHEMA)
    order = np.argsort(table["place"].to_numpy())
    count = len(share.columns)
    if not np.array_equal(table["place"].to_numpy()[order], np.arange(share.start, share.start + count)):
        raise StageError(f"output shard {share.output} of D-hat got {len(order)} images, and {count} were selected")
    image, files = table["image"].combine_chunks(), table["file"].combine_chunks().take(pa.array(order))
    columns = share.columns.append_column("file", files)
    size = int(pc.sum(pc.binary_length(image)).as_py())
    schema = SCHEMA.with_metadata(_metadata(class_names, request, count, size))
    sink = pa.BufferOutputStream()
    codecs = {name: "none" if name == "image" else "zstd" for name in SCHEMA.names}
    with pq.ParquetWriter(sink, schema, compression=codecs, use_dictionary=["shard"], write_statistics=False) as writer:
        for first in range(0, count, ROW_GROUP_ROWS):
            images = image.take(pa.array(order[first : first + ROW_GROUP_ROWS])).cast(pa.binary())
            others = columns.slice(first, ROW_GROUP_ROWS).combine_chunks()
            writer.write_table(others.add_column(0, "image", images).cast(schema))
    storage.publish(storage.join(out_uri, _name(share.output)), sink.getvalue().to_pybytes())
    return share.output, size


def _name(output: int) -> str:
    return f"part-{output:05d}.parquet"


def _metadata(class_names: Sequence[str] | None, request: str, rows: int, size: int) -> dict[bytes, str]:
    metadata = {METADATA: json.dumps({"request": request, "rows": rows, "bytes": size})}
    if class_names is not None:
        kinds = {"shard": "string", "index": "uint32", "rank": "int32", "score": "float32", "file": "string"}
        features: dict[str, Any] = {
            "image": {"_type": "Image"},
            "label": {"names": list(class_names), "_type": "ClassLabel"},
            **{name: {"dtype": kind, "_type": "Value"} for name, kind in kinds.items()},
        }
        metadata[b"huggingface"] = json.dumps({"info": {"features": features}})
    return metadata


def _keep(out_uri: str, work: Plan) -> dict[int, int]:
    """The output shards of this request that exist, with their images' bytes; those of others are removed.

    Raises:
        StorageError: there are Parquet files that are not of D-hat.
    """
    names = {_name(output): output for output in range(len(work.edges) - 1)}
    finished, stale = {}, []
    for file in storage.list_files(out_uri, ".parquet"):
        said = _said(storage.join(out_uri, file.path))
        if said is None:
            rule = f"holds {file.path}, which is not of D-hat"
            raise StorageError("out", out_uri, rule, "give another folder")
        if file.path in names and said["request"] == work.request:
            finished[names[file.path]] = int(said["bytes"])
        else:
            stale.append(file.path)
    for name in stale:
        storage.delete_file(storage.join(out_uri, name))
    return finished


def _said(uri: str) -> dict[str, Any] | None:
    """What the metadata of a shard of D-hat say; None of any other file."""
    with storage.open_input(uri) as file:
        try:
            metadata = pq.read_schema(file).metadata or {}
            said: dict[str, Any] = json.loads(metadata[METADATA])
        except (KeyError, ValueError, OSError):
            return None
    return said
