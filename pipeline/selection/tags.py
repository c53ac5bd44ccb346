"""Weakly labeled data W (section 3.3): images whose classes come from tags, by the rule of supplement 4.1.

A tag, such as a hashtag or a word of a caption, means a class when it is the words of the class's name, each in its original or its stemmed
form, joined in any order: "playing the guitar" is meant by #playingtheguitar, #playguitar, #playingguitar and #guitarplaying.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from snowballstemmer.english_stemmer import EnglishStemmer

from cluster import storage
from cluster.errors import SourceError, StorageError, one_line, shown
from cluster.progress import SILENT, Progress
from cluster.tasks import scatter
from pipeline.data.labeled import undecodable
from pipeline.data.rejects import Reject, publish_rejects
from pipeline.data.shards import ShardError
from pipeline.data.sources import ImageSource
from pipeline.data.words import split_tags
from pipeline.selection.table import BATCH_ROWS, CLASSES_METADATA, Slice, blamed, deal

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

FUNCTION_WORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "into", "of", "on", "or", "the", "to", "with")
)
"""A tag may leave these out of a class's name, where a word that is none of them stays (supplement 4.1: "playguitar")."""
SCHEMA = pa.schema([("shard", pa.string()), ("index", pa.uint32()), ("class_ids", pa.list_(pa.int32()))])
MATCHED_METADATA = b"tophat.matched"
TASK_BYTES = 512 << 20  # of Parquet files of tags that one task reads
PARTS = 512  # output files, at most
EXAMPLES = 5
CACHED_TAGS = 1 << 18
TABLE_FIX = "write shard string, index uint32 and tags list<string>, or class_ids list<int32> in place of tags"

Pairs = NDArray[np.uint32]
"""uint32 [N, 3]: the ordinal of a shard in the source's listing, the row in it, and a class that the image there has."""


@dataclass(frozen=True, slots=True)
class _Name:
    """One name of a class: the forms of each of its words; the empty form is of a word that may be left out."""

    class_id: int
    words: tuple[tuple[str, ...], ...]

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of the shortest and of the longest tag that means it, or fewer and more."""
        lengths = [[len(form) for form in forms] for forms in self.words]
        return sum(map(min, lengths)), sum(map(max, lengths))

    def means(self, tag: str) -> bool:
        """Whether `tag` is every word once, in one of its forms, in some order."""
        shortest, longest = self.lengths
        if not shortest <= len(tag) <= longest:
            return False
        failed: set[tuple[int, tuple[tuple[str, ...], ...]]] = set()

        def ends_well(start: int, left: tuple[tuple[str, ...], ...]) -> bool:
            if start == len(tag):
                return all("" in forms for forms in left)
            if (start, left) in failed:
                return False
            for place, forms in enumerate(left):
                rest = (*left[:place], *left[place + 1 :])
                if any(form and tag.startswith(form, start) and ends_well(start + len(form), rest) for form in forms):
                    return True
            failed.add((start, left))
            return False

        return ends_well(0, self.words)


class Matcher:
    """Says which classes a tag means (supplement 4.1). It holds each form of each word, and no orders, so names may have any number of words.

    Args:
        class_names: by class id. Commas separate synonyms ("great white shark, white shark"); case, punctuation, underscores and white
            space separate words and mean nothing else. A name without letters or digits is meant by no tag.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        stem = EnglishStemmer().stemWord
        self._by_form: dict[str, list[_Name]] = {}
        self._known: dict[str, tuple[int, ...]] = {}
        self._longest = 0
        for class_id, synonyms in enumerate(class_names):
            for words in {tuple(_words(name)) for name in _folded(synonyms).split(",")}:
                optional = FUNCTION_WORDS if set(words) - FUNCTION_WORDS else frozenset()
                forms = (dict.fromkeys((word, stem(word), *([""] if word in optional else []))) for word in words)
                name = _Name(class_id, tuple(sorted(tuple(each) for each in forms)))
                self._longest = max(self._longest, name.lengths[1])
                for form in {form for each in name.words for form in each if form}:
                    self._by_form.setdefault(form, []).append(name)

    def classes(self, tag: str) -> tuple[int, ...]:
        """The ids of the classes that a tag means, ascending. Its case and punctuation, `#` among it, and white space mean nothing."""
        letters = "".join(_words(_folded(tag)))
        if len(letters) > self._longest:
            return ()
        found = self._known.get(letters)
        if found is None:
            if len(self._known) >= CACHED_TAGS:
                self._known.clear()
            # A tag that means a name begins with a form of one of its words.
            names = [name for end in range(len(letters)) for name in self._by_form.get(letters[: end + 1], ())]
            found = self._known[letters] = tuple(sorted({name.class_id for name in names if name.means(letters)}))
        return found


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(folded: str) -> list[str]:
    return re.findall(r"[^\W_]+", folded)


@dataclass(frozen=True)
class Matched:
    """What `match_tags` found.

    Attributes:
        images: whose tags were read; of a table, its rows.
        tagged: images that can be decoded and have a class: the rows of the table that was written.
        rejected: images with a class that cannot be decoded, and rests of shards that cannot be read.
        per_class: images of each class; an image with several classes counts for each.
    """

    images: int
    tagged: int
    rejected: int
    per_class: tuple[int, ...]

    def without_images(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """The names of the classes that no image got."""
        return tuple(name for name, count in zip(class_names, self.per_class, strict=True) if not count)


@dataclass(frozen=True)
class _Work:
    """What every task of one matching knows.

    Attributes:
        field: of the recipe, for messages.
        where: the table of tags, or the source that has them in itself.
        edges: int64 [parts + 1], the ordinals of the shards at which the output files begin, and the number of shards.
    """

    field: str
    where: str
    source: ImageSource
    matcher: Matcher
    classes: int
    out_uri: str
    rejects_uri: str
    edges: NDArray[np.int64]


@dataclass(frozen=True)
class _Note:
    """What a task says: what it read, some of the tags, and what it wrote; `number` tells tasks apart."""

    number: int
    images: int = 0
    tags: int = 0
    examples: tuple[str, ...] = ()
    tagged: int = 0
    rejected: int = 0
    per_class: tuple[int, ...] = ()


def match_tags(
    field: str,
    source: ImageSource,
    class_names: Sequence[str],
    out_uri: str,
    rejects_uri: str,
    *,
    tags_uri: str | None = None,
    progress: Progress = SILENT,
) -> Matched:
    """Finds the images of a source that tags give a class, on the Ray that is initialized.

    Writes `out_uri/part-00000.parquet` and so on, each for a range of shards, with the columns shard string, index uint32 and class_ids
    list<int32> (ascending, distinct), in the order of shard and index; an image without a class has no row. The bytes do not depend on the
    number of workers. The folder is what `select.tags` and `weak_training_set` read; one that was there before is replaced.

    Every image that has a class is decoded once, so that none ends a training hours in; one that cannot be is a reject.

    Args:
        field: the recipe's field or the option that names the tags, for messages.
        source: the images.
        class_names: by class id; see `Matcher`.
        out_uri, rejects_uri: folders; that of the rejects is emptied first.
        tags_uri: a Parquet file, or a folder of them, with the columns shard string, index uint32 and `tags` (list<string>, each text a tag;
            or string, split by `split_tags`); or, in place of `tags`, `class_ids` list<int32>, which need no matching. Rows of one image are
            united. None: the tags are in the source itself (see `Reader.tags`).
        progress: counts images with a class, and rejects.

    Raises:
        SourceError: a table without these columns, or of another source; no tag that gives a usable image a class; or an `out_uri` of others.
        StorageError: a location that refuses, or an `out_uri` inside the table of tags.
    """
    out_uri = storage.absolute(out_uri).rstrip("/")
    where = source.reader.root if tags_uri is None else storage.absolute(tags_uri).rstrip("/")
    if tags_uri is not None and f"{out_uri}/".startswith(f"{where}/"):
        raise StorageError("out", out_uri, "is inside the table of tags", "give a folder elsewhere")
    files = None if tags_uri is None else _tag_files(field, where)
    parts = min(PARTS, len(source.listing))
    edges = np.arange(parts + 1, dtype=np.int64) * len(source.listing) // parts
    work = _Work(field, where, source, Matcher(class_names), len(class_names), out_uri, rejects_uri, edges)
    try:
        _clear(out_uri)
        storage.delete_tree(rejects_uri)
        jobs = [] if files is None else deal(files, 1 + sum(size for _, size in files) // TASK_BYTES)
        tables = list(scatter(partial(_read_table, work), enumerate(jobs), values=parts))
        notes = [note for note, _ in tables]
        items = ((part, *(shares[part] for _, shares in tables)) for part in range(parts))
        for note, _ in scatter(partial(_write_part, work), items, values=0):
            notes.append(note)
            progress.add(note.tagged, note.rejected)
    except OSError as error:
        rule = f"cannot be read ({one_line(str(error))})"
        raise SourceError(field, where, rule, "check the store and the files") from None
    return _matched(work, notes)


def _matched(work: _Work, notes: Sequence[_Note]) -> Matched:
    images, tags = sum(note.images for note in notes), sum(note.tags for note in notes)
    tagged, rejected = sum(note.tagged for note in notes), sum(note.rejected for note in notes)
    lost = f"; {rejected:,} rejects, see {work.rejects_uri}" if rejected else ""
    if not tags:
        rule = f"has no tags: none of {images:,} images has one{lost}"
        raise SourceError(work.field, work.where, rule, "give a Parquet file of tags, or a text beside each image")
    if not tagged:
        seen = dict.fromkeys(tag for note in sorted(notes, key=lambda n: n.number) for tag in note.examples)
        few = ", ".join(shown(tag, 40) for tag in list(seen)[:EXAMPLES])
        rule = f"gives no usable image a class: {images:,} images have {tags:,} tags ({few}, ...){lost}"
        raise SourceError(work.field, work.where, rule, "compare the tags with the names of the classes")
    per_class = zip(*(note.per_class for note in notes if note.per_class), strict=True)
    return Matched(images, tagged, rejected, tuple(map(sum, per_class)))


def is_matched(field: str, uri: str) -> bool:
    """Whether a table of tags has numbers of classes, which need no matching.

    Raises:
        SourceError: it is none; names `field`.
    """
    files = _tag_files(field, storage.absolute(uri).rstrip("/"))
    with storage.open_input(files[0][0]) as file, blamed(field, lambda: files[0][0], TABLE_FIX):
        return "class_ids" in pq.read_schema(file).names


def _tag_files(field: str, uri: str) -> list[tuple[str, int]]:
    if uri.endswith(".parquet"):
        if not storage.exists(uri):
            raise SourceError(field, uri, "does not exist", "check the path")
        with storage.open_input(uri) as file:
            return [(uri, file.size())]
    found = [f for f in storage.list_files(uri, ".parquet") if not f.path.startswith("_")]
    if not found:
        raise SourceError(field, uri, "holds no Parquet files", "give a Parquet file of tags, or a folder")
    return [(storage.join(uri, f.path), f.size) for f in found]


def _clear(out_uri: str) -> None:
    """Removes the matched tags that are at `out_uri`.

    Raises:
        SourceError: there are other Parquet files.
    """
    former = [storage.join(out_uri, file.path) for file in storage.list_files(out_uri, ".parquet")]
    for uri in former:
        with storage.open_input(uri) as file, blamed("out", lambda uri=uri: uri, "give another folder"):  # type: ignore[misc]
            if MATCHED_METADATA not in (pq.read_schema(file).metadata or {}):
                raise ValueError("not of matched tags")
    for uri in former:
        storage.delete_file(uri)


def _read_table(work: _Work, number: int, slices: Sequence[Slice]) -> tuple[Any, ...]:
    """Matches the tags of some slices of the table: a note, and the pairs of each part; runs in a Ray task."""
    names = pa.array([shard.name for shard in work.source.listing], pa.string())
    found: list[Pairs] = [np.empty((0, 3), np.uint32)]
    images = tags = 0
    examples: tuple[str, ...] = ()
    for piece in slices:
        with (
            storage.open_input(piece.uri) as file,
            blamed(work.field, lambda piece=piece: piece.uri, TABLE_FIX),  # type: ignore[misc]
            pq.ParquetFile(file) as table,
        ):
            columns = _columns(work.field, piece.uri, table.schema_arrow)
            groups = table.num_row_groups
            wanted = range(piece.part * groups // piece.parts, (piece.part + 1) * groups // piece.parts)
            for batch in table.iter_batches(BATCH_ROWS, row_groups=list(wanted), columns=columns, use_threads=False):
                shard, index, values = (batch.column(name) for name in columns)
                ordinal = _ordinals(work.field, piece.uri, shard, names)
                if index.null_count:
                    raise ValueError("has null values in `index`")
                if _is_text(values.type):
                    values = pa.array([split_tags(text) for text in values.to_pylist()], pa.list_(pa.string()))
                row, flat = pc.list_parent_indices(values).to_numpy(), values.flatten()
                if columns[2] == "tags":
                    place, class_ids, some = _match(work.matcher, flat)
                    row, examples = row[place], (*examples, *some)[:EXAMPLES]
                else:
                    class_ids = _valid_ids(flat, work.classes)
                images, tags = images + len(batch), tags + len(flat) - flat.null_count
                rows = index.cast(pa.uint32()).to_numpy()
                found.append(np.stack([ordinal[row], rows[row], class_ids], axis=1).astype(np.uint32))
    pairs = np.concatenate(found)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    shares = [pairs[start:stop] for start, stop in pairwise(np.searchsorted(pairs[:, 0], work.edges).tolist())]
    return _Note(number, images, tags, examples), *shares


def _columns(field: str, uri: str, schema: pa.Schema) -> tuple[str, str, str]:
    """The names of the columns of a table of tags, after their types were checked."""
    third = "class_ids" if "class_ids" in schema.names else "tags"
    fits = {
        "shard": _is_text,
        "index": pa.types.is_integer,
        "class_ids": lambda kind: _is_list(kind) and pa.types.is_integer(kind.value_type),
        "tags": lambda kind: _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type)),
    }
    for name in ("shard", "index", third):
        if schema.names.count(name) != 1:
            rule = f"must have one column `{name}`, and has {', '.join(schema.names)}"
            raise SourceError(field, uri, rule, TABLE_FIX)
        if not fits[name](schema.field(name).type):
            raise SourceError(field, uri, f"has a column `{name}` of type {schema.field(name).type}", TABLE_FIX)
    return "shard", "index", third


def _is_text(kind: pa.DataType) -> bool:
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(text) or pa.types.is_large_string(text))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _ordinals(field: str, uri: str, shard: pa.Array, names: pa.StringArray) -> NDArray[np.int64]:
    """The places of shards in `names`, int64 [N]."""
    text = shard.cast(pa.string())
    found = pc.index_in(text, names).fill_null(-1).to_numpy().astype(np.int64)
    if (found < 0).any():
        rule = f"names the shard {shown(text[int(found.argmin())].as_py())}, which the source does not have"
        raise SourceError(field, uri, rule, "give the tags of this source")
    return np.asarray(found)


def _match(matcher: Matcher, tags: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """The places in `tags` of those that mean a class, once for each class; these classes; and some of the tags."""
    coded = tags.cast(pa.string()).fill_null("").dictionary_encode()
    distinct = coded.dictionary.to_pylist()
    classes = [matcher.classes(tag) for tag in distinct]
    codes = coded.indices.to_numpy()
    counts = np.array([len(each) for each in classes], np.int64)[codes]
    class_ids = np.array([number for code in codes[counts > 0].tolist() for number in classes[code]], np.int64)
    return np.repeat(np.arange(len(codes)), counts), class_ids, [tag for tag in distinct if tag][:EXAMPLES]


def _valid_ids(values: pa.Array, classes: int) -> NDArray[np.int64]:
    if values.null_count:
        raise ValueError("has null values in `class_ids`")
    ids: NDArray[np.int64] = values.to_numpy().astype(np.int64)
    wrong = ids[(ids < 0) | (ids >= classes)]
    if len(wrong):
        raise ValueError(f"holds class id {wrong[0]}, and ids must be from 0 to {classes - 1}")
    return ids


def _write_part(work: _Work, number: int, *shares: Pairs) -> tuple[_Note]:
    """Checks the images of a range of shards and publishes those that have a class; runs in a Ray task.

    Args:
        number: of the part.
        shares: what each task that read the table found for this part; none where the tags are in the source itself.
    """
    pairs = np.unique(np.concatenate(shares), axis=0) if shares else None
    reader = replace(work.source.reader, tags=pairs is None)
    images = tags = 0
    examples: tuple[str, ...] = ()
    rejects: list[Reject] = []
    tables = [SCHEMA.empty_table()]
    for ordinal in range(work.edges[number], work.edges[number + 1]):
        shard = work.source.listing[ordinal]
        known = None if pairs is None else _class_ids_by_row(pairs, ordinal)
        if known == {}:
            continue
        index: list[int] = []
        class_ids: list[list[int]] = []
        try:
            for row in reader.read(shard, known):
                if known is None:
                    images, tags, examples = images + 1, tags + len(row.words), (*examples, *row.words)[:EXAMPLES]
                    found = sorted({n for word in row.words for n in work.matcher.classes(word)})
                else:
                    found = known.pop(row.index)
                if found and (problem := undecodable(shard, row)):
                    rejects.append(problem)
                elif found:
                    index.append(row.index)
                    class_ids.append(found)
        except ShardError as error:
            lost = [None] if known is None else list(known)
            rejects += [Reject(shard.name, place, error.reason, str(error)) for place in lost]
        else:
            if known:
                rule = f"has a tag for image {min(known)} of {shown(shard.name)}, which has fewer images"
                raise SourceError(work.field, work.where, rule, "give the tags of this source")
        tables.append(pa.table([[shard.name] * len(index), index, class_ids], SCHEMA))
    table = pa.concat_tables(tables).combine_chunks()
    counts = np.bincount(table["class_ids"].combine_chunks().flatten().to_numpy(), minlength=work.classes)
    name = f"part-{number:05d}.parquet"
    if rejects:
        publish_rejects(storage.join(work.rejects_uri, name), rejects)
    if len(table):
        sink = pa.BufferOutputStream()
        metadata = {CLASSES_METADATA: str(work.classes), MATCHED_METADATA: "1"}
        pq.write_table(table.replace_schema_metadata(metadata), sink, row_group_size=BATCH_ROWS)
        storage.publish(storage.join(work.out_uri, name), sink.getvalue().to_pybytes())
    return (_Note(number, images, tags, examples, len(table), len(rejects), tuple(counts.tolist())),)


def _class_ids_by_row(pairs: Pairs, ordinal: int) -> dict[int, list[int]]:
    """The classes of one shard's images. `pairs` are sorted and distinct."""
    start, stop = np.searchsorted(pairs[:, 0], [ordinal, ordinal + 1])
    rows: dict[int, list[int]] = {}
    for _, row, class_id in pairs[start:stop].tolist():
        rows.setdefault(row, []).append(class_id)
    return rows
