"""Near-duplicates of evaluation images in U (supplement 5, "Deduplication of images").

An image's embedding is its L2-normalized features, from a score table's column `embedding`. Ray tasks stream the embeddings of U
through a search over those of the labeled validation and test images and keep the pairs with the smallest Euclidean distance, and what
they keep is merged. The ranked pairs are the same under any split of U into files, any number of tasks, and any retry.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from cluster import storage
from cluster.errors import RecipeError, SourceError, one_line
from cluster.progress import SILENT, Progress
from cluster.tasks import cpus, parallel_map, run_task
from pipeline.data.sources import ImageSource
from pipeline.recipe.deduplicate import Deduplicate

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
UInt32 = NDArray[np.uint32]

PAIRS = pa.schema(
    [
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("distance", pa.float32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.uint32(), nullable=False),
        pa.field("labeled_set", pa.string(), nullable=False),
        pa.field("labeled_shard", pa.string(), nullable=False),
        pa.field("labeled_index", pa.uint32(), nullable=False),
    ]
)
"""Columns of `pairs.parquet`: an image of U and the nearest labeled image, by (distance, shard, index)."""

BATCH_ROWS = 4096
PENDING_ROWS = 1 << 16
TASK_BYTES = 256 << 20
CANDIDATES = 8
"""Nearest vectors that a search proposes for each image; the exact distance decides among them."""
SLACK = 1e-4
"""More than the rounding of a squared distance of unit vectors in Faiss, which uses float32 and |x|^2 + |y|^2 - 2xy."""


# Embeddings


@dataclass(frozen=True)
class LabeledSet:
    """Labeled images that must not be in U.

    Attributes:
        name: as it is shown ("validation", "test", a URI).
        rows: per shard, the indices of its images; every image when None.
    """

    name: str
    source: ImageSource
    rows: tuple[NDArray[np.int64], ...] | None = None


@dataclass(frozen=True)
class Embedded:
    """N images and their embeddings.

    Attributes:
        shard: pyarrow string array [N].
        index: uint32 [N].
        vectors: float32 [N, d], of length 1 (0 where the features are all zero).
        nonfinite: images that were left out, because a feature is NaN or infinite.
    """

    shard: pa.StringArray
    index: UInt32
    vectors: Float32
    nonfinite: int = 0


def normalized(features: NDArray[Any]) -> Float32:
    """The rows of `features` [N, d], each divided by its Euclidean length."""
    wide = features.astype(np.float64)
    length = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return (wide / np.where(length > 0, length, 1)[:, None]).astype(np.float32)


def _files(uri: str) -> list[storage.FileEntry]:
    files = [entry for entry in storage.list_files(uri, ".parquet") if not entry.path.startswith("_")]
    if not files:
        raise SourceError("embeddings", uri, "holds no Parquet files", "give the folder of a score table")
    return files


def read_embeddings(uri: str) -> Iterator[Embedded]:
    """The images of one file of a score table, in batches.

    Raises:
        SourceError: it is not readable, or has no column `embedding` of fixed-size lists of float16 or float32.
    """
    columns = ["shard", "index", "embedding"]
    try:
        with storage.open_input(uri) as file, pq.ParquetFile(file, pre_buffer=storage.is_remote(uri)) as table:
            schema = table.schema_arrow
            kind: Any = schema.field("embedding").type if "embedding" in schema.names else pa.null()
            if not pa.types.is_fixed_size_list(kind) or kind.value_type not in (pa.float16(), pa.float32()):
                fix = "score with score.embedding = true, or give a model to embed with"
                raise SourceError("embeddings", uri, "has no column `embedding` of float16 or float32 lists", fix)
            for batch in table.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                shard, index, lists = (batch.column(name) for name in columns)
                flat = lists.flatten()
                if shard.null_count or index.null_count or lists.null_count or flat.null_count:
                    raise ValueError("has null values")
                features = flat.to_numpy().reshape(-1, kind.list_size)
                finite = np.isfinite(features).all(axis=1)
                kept = pa.array(finite)
                yield Embedded(
                    shard.cast(pa.string()).filter(kept),
                    index.cast(pa.uint32()).filter(kept).to_numpy(),
                    normalized(features[finite]),
                    int(len(finite) - finite.sum()),
                )
    except ValueError as error:  # Arrow's are among them
        raise SourceError("embeddings", uri, f"cannot be read ({one_line(str(error))})", "score it again") from None


# The side that is searched: labeled images


@dataclass(frozen=True)
class Side:
    """The distinct embeddings of the labeled images.

    Attributes:
        vectors: float32 [M, d], M at least 1, of length 1, all different.
        index: a serialized Faiss index over them; None to compare with every one.
    """

    vectors: Float32
    index: NDArray[np.uint8] | None = None


def labeled_side(tables: Sequence[tuple[LabeledSet, str]]) -> tuple[Side, pa.Table]:
    """The embeddings of labeled images, and whose they are.

    Args:
        tables: each set with the score table that has its embeddings.

    Returns:
        The side, and a table of M rows with the columns labeled_set, labeled_shard, labeled_index. Of images with the same
        embedding only the first is there, in the order of the sets, then shard, then index.

    Raises:
        SourceError: there are none, or their widths differ.
    """
    vectors: list[Float32] = []
    origins: list[pa.Table] = []
    for number, (labeled, uri) in enumerate(tables):
        rows = None
        if labeled.rows is not None:
            rows = {shard.name: used for shard, used in zip(labeled.source.shards(), labeled.rows, strict=True)}
        for entry in _files(uri):
            for batch in read_embeddings(storage.join(uri, entry.path)):
                kept = np.ones(len(batch.index), np.bool_) if rows is None else _named(batch, rows)
                vectors.append(batch.vectors[kept])
                columns = [np.full(kept.sum(), number, np.int32), batch.shard.filter(pa.array(kept)), batch.index[kept]]
                origins.append(pa.table(columns, ["set", "labeled_shard", "labeled_index"]))
    if len(widths := {part.shape[1] for part in vectors}) > 1:
        raise SourceError("embeddings", sorted(widths), "are of different widths", "embed all sets with one model")
    origin = pa.concat_tables(origins) if origins else pa.table({"set": []})
    if not len(origin):
        names = ", ".join(labeled.name for labeled, _ in tables)
        raise SourceError("labeled images", names, "hold no image to compare with", "look at the files")
    order = pc.sort_indices(
        origin, [("set", "ascending"), ("labeled_shard", "ascending"), ("labeled_index", "ascending")]
    ).to_numpy()
    stacked = np.concatenate(vectors)[order]
    _, first = np.unique(stacked, axis=0, return_index=True)
    first.sort()
    origin = origin.take(order[first])
    names = pa.array([labeled.name for labeled, _ in tables], pa.string())
    return Side(stacked[first]), origin.set_column(0, "labeled_set", names.take(origin["set"]))


def _named(batch: Embedded, rows: Mapping[str, NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Which of the batch are among the `rows` of their shard."""
    encoded = batch.shard.dictionary_encode()
    codes, kept = encoded.indices.to_numpy(), np.zeros(len(batch.index), np.bool_)
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        here = codes == code
        kept[here] = np.isin(batch.index[here], rows.get(name, ()))
    return kept


def indexed(side: Side, settings: Deduplicate) -> Side:
    """`side` with the Faiss index that the recipe asks for: the same bytes for the same vectors."""
    if settings.index == "exact":
        return side
    import faiss

    faiss.omp_set_num_threads(1)  # a graph depends on the order in which threads insert
    count, width = side.vectors.shape
    index: Any
    if settings.index == "ivf":
        lists = max(1, min(int(4 * count**0.5), count // 39))  # Faiss wants 39 vectors to place one center
        index = faiss.index_factory(width, f"IVF{lists},Flat")
        index.nprobe = min(settings.probes, lists)
        index.train(side.vectors)
    else:
        index = faiss.index_factory(width, "HNSW32,Flat")
        index.hnsw.efSearch = max(settings.probes, CANDIDATES)
    index.add(side.vectors)
    return Side(side.vectors, faiss.serialize_index(index))


Search = Callable[[Float32, int], tuple[Float32, NDArray[np.int64]]]


def searcher(side: Side) -> Search:
    """A function of queries float32 [N, d] and k: squared distances, about, float32 [N, k], and rows of `side.vectors`, int64 [N, k], nearest
    first; row -1 where there is none."""
    import faiss

    faiss.omp_set_num_threads(1)
    if side.index is not None:
        index = faiss.deserialize_index(side.index)
        return lambda queries, k: index.search(queries, k)
    return lambda queries, k: faiss.knn(queries, side.vectors, k)  # IndexFlatL2's own search, without its copy


def nearest(queries: Float32, side: Side, search: Search, bound: float = np.inf) -> tuple[Float32, Int32]:
    """The nearest labeled image of each query, and how far it is.

    The search proposes; distances are computed again in float64 from the difference of the two vectors, so that they do not
    depend on what else is in the batch and equal vectors are at distance 0.

    Args:
        queries: float32 [N, d].
        side: M labeled images; ties go to the first.
        search: of that side.
        bound: larger distances are not wanted.

    Returns:
        float32 [N], Euclidean, infinite where none was found or `bound` is certainly exceeded; int32 [N], rows of `side`.
    """
    best = np.full(len(queries), np.inf)
    which = np.zeros(len(queries), np.int32)
    if not len(queries):
        return best.astype(np.float32), which
    squared, proposed = search(np.ascontiguousarray(queries), min(CANDIDATES, len(side.vectors)))
    rows = np.flatnonzero((proposed[:, 0] >= 0) & (squared[:, 0] <= bound**2 + SLACK))
    wide = queries[rows].astype(np.float64)
    for candidate in proposed[rows].T:
        apart = wide - side.vectors[candidate]  # row -1 is some vector, and not used
        distance = np.where(candidate >= 0, np.sqrt(np.einsum("ij,ij->i", apart, apart)), np.inf)
        better = (distance < best[rows]) | ((distance == best[rows]) & (candidate < which[rows]))
        best[rows[better]], which[rows[better]] = distance[better], candidate[better]
    return best.astype(np.float32), which


# All pairs, ranked


@dataclass(frozen=True)
class Ranked:
    """The nearest pairs among the images that were seen.

    Attributes:
        table: columns distance float32, shard string, index uint32, nearest int32 (a row of the side); by (distance, shard, index).
        images: how many images of U were compared.
        nonfinite: how many could not be.
    """

    table: pa.Table
    images: int = 0
    nonfinite: int = 0


def merge(parts: Sequence[Ranked], keep: int) -> Ranked:
    """The first `keep` pairs of all parts together; associative and commutative."""
    table = pa.concat_tables([part.table for part in parts])
    keys = [(name, "ascending") for name in ("distance", "shard", "index", "nearest")]
    table = table.take(pc.sort_indices(table, keys)[:keep]).combine_chunks()
    return Ranked(table, sum(part.images for part in parts), sum(part.nonfinite for part in parts))


def rank(batches: Iterator[Embedded], side: Side, keep: int) -> Ranked:
    """The `keep` nearest pairs of all images in `batches`, in memory bounded by `keep`."""
    search, bound = searcher(side), np.inf
    ranked = Ranked(_pairs_table(np.zeros(0, np.float32), [], np.zeros(0, np.uint32), np.zeros(0, np.int32)))
    pending: list[Ranked] = []
    waiting = 0
    for batch in batches:
        if batch.vectors.shape[1] != side.vectors.shape[1]:
            rule = f"must have {side.vectors.shape[1]} features, as those of the labeled images have"
            fix = "embed both with one model"
            raise SourceError("embeddings", f"{batch.vectors.shape[1]} features", rule, fix)
        distance, which = nearest(batch.vectors, side, search, bound)
        passing = np.isfinite(distance) & (distance <= bound)
        table = _pairs_table(
            distance[passing], batch.shard.filter(pa.array(passing)), batch.index[passing], which[passing]
        )
        pending.append(Ranked(table, len(batch.index), batch.nonfinite))
        waiting += len(table)
        if waiting > max(PENDING_ROWS, keep):
            ranked, pending, waiting = merge([ranked, *pending], keep), [], 0
            if len(ranked.table) == keep:
                bound = ranked.table["distance"][-1].as_py()
    return merge([ranked, *pending], keep)


def _pairs_table(distance: Float32, shard: Any, index: UInt32, which: Int32) -> pa.Table:
    return pa.table(
        {
            "distance": pa.array(distance),
            "shard": pa.array(shard, pa.string()),
            "index": pa.array(index),
            "nearest": pa.array(which),
        }
    )


def _rank_files(files: Sequence[str], side: Side, keep: int, progress: Progress) -> Ranked:
    """`rank` of files of a score table; runs in a Ray task."""

    def batches() -> Iterator[Embedded]:
        done, told = 0, time.monotonic()
        for uri in files:
            for batch in read_embeddings(uri):
                yield batch
                done += len(batch.index)
                if time.monotonic() - told > 0.5:
                    progress.add(done=done)
                    done, told = 0, time.monotonic()
        progress.add(done=done)

    return rank(batches(), side, keep)


def _deal(uri: str, tasks: int | None) -> list[list[str]]:
    """The files of a score table, in order, as the work of about `tasks` tasks of equal bytes."""
    files = _files(uri)
    ends = np.cumsum([max(1, entry.size) for entry in files])
    tasks = tasks or max(int(cpus()), int(ends[-1] // TASK_BYTES))
    numbers = (ends - 1) * tasks // ends[-1]
    return [
        [storage.join(uri, files[place].path) for place in np.flatnonzero(numbers == number)]
        for number in np.unique(numbers)
    ]


def find_pairs(
    out_uri: str,
    tables: Sequence[tuple[LabeledSet, str]],
    embeddings_uri: str,
    settings: Deduplicate,
    progress: Progress = SILENT,
    tasks: int | None = None,
) -> dict[str, Any]:
    """Publishes the ranked pairs as one Parquet file with the schema `PAIRS`, on the Ray that runs.

    Args:
        out_uri: the file.
        tables: the labeled sets, each with the score table of its embeddings.
        embeddings_uri: the score table of U's embeddings, by the same model.
        settings: how many pairs, which index, and what is left out.
        progress: counts images compared.
        tasks: how many tasks search; the result does not depend on it.

    Returns:
        images and nonfinite of U, labeled (images compared with), pairs, left_out, and finding, a hash of the pairs.

    Raises:
        SourceError: embeddings that are missing or do not fit.
        RecipeError: `within` reaches beyond the pairs that are kept.
    """
    side, origin = labeled_side(tables)
    if settings.index != "exact":
        side = run_task(partial(indexed, settings=settings), side)
    scan = partial(_rank_files, side=side, keep=settings.pairs, progress=progress)
    parts = parallel_map(scan, _deal(embeddings_uri, tasks))
    found = reduce(lambda so_far, part: merge([so_far, part], settings.pairs), parts)
    images = found.table.select(["shard", "index"])
    if len(images.group_by(["shard", "index"]).aggregate([])) != len(images):
        raise SourceError("embeddings", embeddings_uri, "has an image twice", "remove the file that repeats another's")
    last = found.table["distance"][-1].as_py() if len(found.table) else np.inf
    if settings.within is not None and found.images > len(found.table) == settings.pairs and last <= settings.within:
        rule = f"reaches beyond the {settings.pairs} nearest pairs that are kept (the last is {last:.4f} apart)"
        raise RecipeError("deduplicate.within", settings.within, rule, "raise deduplicate.pairs, or lower it")
    ranks = pa.array(np.arange(len(found.table), dtype=np.int32))
    columns = [ranks, *(found.table[name] for name in ("distance", "shard", "index"))]
    pairs = pa.table([*columns, *origin.take(found.table["nearest"]).columns], schema=PAIRS)
    finding = hashlib.sha256(json.dumps([column.to_pylist() for column in pairs.columns]).encode()).hexdigest()[:16]
    _publish(out_uri, pairs)
    return {
        "images": found.images,
        "nonfinite": found.nonfinite,
        "labeled": len(origin),
        "pairs": len(pairs),
        "left_out": int(left_out(pairs, settings.nearest, settings.within).sum()),
        "finding": finding,
    }


def left_out(pairs: pa.Table, nearest: int | None, within: float | None) -> NDArray[np.bool_]:
    """Which of the ranked pairs' images are left out: the first `nearest` and those at most `within` apart. bool [pairs]."""
    out: NDArray[np.bool_] = pairs["rank"].to_numpy() < (nearest or 0)
    return out if within is None else out | (pairs["distance"].to_numpy() <= np.float32(within))


def read_pairs(uri: str) -> pa.Table:
    """What `find_pairs` published."""
    with storage.open_input(uri) as file:
        return pq.read_table(file)


def _publish(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.publish(uri, sink.getvalue().to_pybytes())
