"""Tops: the K best candidates of each class, and how they merge. Pure NumPy and PyArrow.

`merge` keeps the first K of each class, by the total order (score descending, shard ascending by UTF-8 bytes, index
ascending), of whatever it is given: so it is associative and commutative, ties at the K-th place included.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

MAX_CLASSES = 1 << 24  # thresholds are a dense array over the classes
PENDING = 1 << 20  # candidates that wait for a merge, at least


@dataclass(frozen=True)
class Top:
    """Candidates as flat arrays of equal length N, and the account of those that were left out.

    What `merge` returns is sorted by class and then by the total order, holds at most K candidates of each class, and
    names no shard that it does not use.

    Attributes:
        class_id: int32 [N], at least 0.
        score: float32 [N], finite, without negative zero.
        shard: int32 [N], ordinals in `shards`.
        index: uint32 [N], the image's row in its shard.
        shards: pyarrow string array.
        images: rows of the score table that were scanned for this.
        candidates: (image, class, score) among them, those that were left out included.
        nonfinite: of `candidates`, those whose score is NaN or infinite.
        unselected: of `candidates`, those that lost to others of their class, or are below the minimum score.
    """

    class_id: Int32
    score: Float32
    shard: Int32
    index: UInt32
    shards: pa.StringArray
    images: int = 0
    candidates: int = 0
    nonfinite: int = 0
    unselected: int = 0

    def __len__(self) -> int:
        return len(self.class_id)


def merge(tops: Sequence[Top], images_per_class: int) -> Top:
    """The first K of each class among all of `tops` together, by the total order.

    Args:
        tops: at least one; sorted or not.
        images_per_class: K.
    """
    shards, ordinals = _unify([top.shards for top in tops])
    bases = np.cumsum([0] + [len(top.shards) for top in tops[:-1]])
    class_id = np.concatenate([top.class_id for top in tops])
    score = np.concatenate([top.score for top in tops])
    index = np.concatenate([top.index for top in tops])
    shard = ordinals[np.concatenate([top.shard + base for top, base in zip(tops, bases, strict=True)])]
    kept = _first(class_id, score, shard, index, images_per_class)
    shard = shard[kept]
    used = np.bincount(shard, minlength=len(shards)) > 0
    return Top(
        class_id[kept],
        score[kept],
        (np.cumsum(used, dtype=np.int32) - np.int32(1))[shard],
        index[kept],
        shards.filter(pa.array(used)),
        images=sum(top.images for top in tops),
        candidates=sum(top.candidates for top in tops),
        nonfinite=sum(top.nonfinite for top in tops),
        unselected=sum(top.unselected for top in tops) + len(class_id) - len(kept),
    )


def _unify(dictionaries: Sequence[pa.StringArray]) -> tuple[pa.StringArray, Int32]:
    """The distinct strings of all, in the order of their UTF-8 bytes, and the place in them of every given string."""
    every = pa.concat_arrays(dictionaries)
    distinct = every.unique()
    distinct = distinct.take(pc.sort_indices(distinct))  # Arrow compares strings by their bytes
    return distinct, pc.index_in(every, distinct).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)


def _first(class_id: Int32, score: Float32, shard: Int32, index: UInt32, images_per_class: int) -> NDArray[np.int64]:
    """Where the first K candidates of each class are (int64), by class and then by the total order."""
    key = (class_id.astype(np.uint64) << np.uint64(32)) | _descending(score)
    order = np.argsort(key)
    key = key[order]
    equal = key[1:] == key[:-1]
    if equal.any():
        tied = np.zeros(len(key), np.bool_)
        tied[1:] |= equal
        tied[:-1] |= equal
        places = np.flatnonzero(tied)
        rows = order[places]
        order[places] = rows[np.lexsort((image_key(shard[rows], index[rows]), key[places]))]
    return order[ranks(key >> np.uint64(32)) < images_per_class]


def _descending(score: Float32) -> UInt64:
    """A number that falls as `score` rises: the bits of an IEEE float, ordered (finite scores, no negative zero)."""
    bits = score.view(np.uint32)
    negative = (bits >> np.uint32(31)).astype(np.bool_)
    return np.where(negative, bits, ~bits & np.uint32(0x7FFFFFFF)).astype(np.uint64)


def image_key(shard: Int32, index: UInt32) -> UInt64:
    """One number for (shard, index), in their order."""
    return (shard.astype(np.uint64) << np.uint64(32)) | index


def ranks(classes: NDArray[Any]) -> NDArray[np.int64]:
    """The 0-based place of every element in its run of equal `classes`."""
    starts = np.flatnonzero(np.concatenate([[True], classes[1:] != classes[:-1]])[: len(classes)])
    lengths = np.diff(starts, append=len(classes))
    return np.arange(len(classes)) - np.repeat(starts, lengths)


@dataclass(frozen=True)
class Scored:
    """Some rows of a score table: N images with their P best classes.

    Attributes:
        shard: dictionary array of strings [N].
        index: uint32 [N].
        class_ids: int32 [N, P].
        scores: float32 [N, P].
    """

    shard: pa.DictionaryArray
    index: UInt32
    class_ids: Int32
    scores: Float32


def top_of(
    batches: Iterable[Scored], images_per_class: int, *, num_classes: int | None = None, min_score: float | None = None
) -> Top:
    """The first K candidates of each class among `batches`, in memory bounded by classes x K.

    A candidate passes if it reaches its class's threshold: the score of the K-th best so far. Candidates equal to it
    pass, because their shard and index decide. What passes waits until a merge cuts it back and raises the thresholds.

    Args:
        batches: drawn from one at a time.
        images_per_class: K.
        num_classes: how many classes there are; unknown, as many as are seen.
        min_score: candidates below it (as float32) are never selected.

    Raises:
        ValueError: a class id is negative, not below `num_classes`, or above 2**24.
    """
    floor = np.float32(-np.inf if min_score is None else min_score)
    thresholds = np.full(num_classes or 0, floor, np.float32)
    top, pending, waiting = _nothing(), [], 0
    for batch in batches:
        thresholds = _cover(thresholds, batch.class_ids, num_classes, floor)
        passed = _pass(batch, thresholds)
        pending.append(passed)
        waiting += len(passed)
        if waiting > max(PENDING, len(top)):
            top = merge([top, *pending], images_per_class)
            pending, waiting = [], 0
            thresholds = _raised(thresholds, top, images_per_class)
    return merge([top, *pending], images_per_class)


def _nothing() -> Top:
    no: Any = np.zeros(0, np.int32)
    return Top(no, no.astype(np.float32), no, no.astype(np.uint32), pa.array([], pa.string()))


def _cover(thresholds: Float32, class_ids: Int32, num_classes: int | None, floor: np.float32) -> Float32:
    """`thresholds` with a place for every class in `class_ids`."""
    if not class_ids.size:
        return thresholds
    least, most = int(class_ids.min()), int(class_ids.max())
    limit = MAX_CLASSES if num_classes is None else num_classes
    if least < 0 or most >= limit:
        raise ValueError(f"holds class id {least if least < 0 else most}, and ids must be from 0 to {limit - 1}")
    if most < len(thresholds):
        return thresholds
    return np.concatenate([thresholds, np.full(most + 1 - len(thresholds), floor, np.float32)])


def _pass(batch: Scored, thresholds: Float32) -> Top:
    """The candidates of `batch` that reach their class's threshold, in no order."""
    images, per_image = batch.scores.shape
    score, class_id = batch.scores.ravel(), batch.class_ids.ravel()
    passing = score >= thresholds[class_id]  # never true of NaN
    finite = np.isfinite(score)
    nonfinite = score.size - int(np.count_nonzero(finite))
    if nonfinite:
        passing &= finite
    chosen = np.flatnonzero(passing)
    rows = chosen // max(per_image, 1)
    local = batch.shard.indices.to_numpy(zero_copy_only=False)[rows]
    names, local = np.unique(local, return_inverse=True)
    shards = batch.shard.dictionary.take(pa.array(names)).cast(pa.string())
    shards.validate(full=True)  # that it is UTF-8, which its order rests on
    return Top(
        class_id[chosen],
        score[chosen] + np.float32(0),  # no negative zero: it equals zero, and its bits do not
        local.astype(np.int32),
        batch.index[rows],
        shards,
        images=images,
        candidates=score.size,
        nonfinite=nonfinite,
        unselected=score.size - nonfinite - len(chosen),
    )


def _raised(thresholds: Float32, top: Top, images_per_class: int) -> Float32:
    """`thresholds`, raised to the K-th score of every class that has K candidates in the sorted `top`."""
    last = np.flatnonzero(ranks(top.class_id) == images_per_class - 1)
    raised = thresholds.copy()
    raised[top.class_id[last]] = top.score[last]
    return raised
