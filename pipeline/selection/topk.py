"""Tops: the K best candidates of each class, and how they merge. Pure NumPy and PyArrow.

`merge` keeps the first K of each class, by the total order (score descending, shard ascending by UTF-8 bytes, index
ascending), of whatever it is given: so it is associative and commutative, ties at the K-th place included. K is a quota
of each class. A `Sieve` holds back what cannot be among them while candidates stream by.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

PENDING = 1 << 16  # candidates that wait for a merge, at least
BYTES_PER_CANDIDATE = 96  # of memory at most, for each of the first K: twice its 16 bytes, and a merge's temporaries


@dataclass(frozen=True)
class Account:
    """How many were scanned, and why candidates were left out.

    Attributes:
        images: rows of the score table.
        candidates: (image, class, score) among them, those that were left out included.
        excluded: of `candidates`, those of images that are excluded.
        nonfinite: of the other `candidates`, those whose score is NaN or infinite.
        unselected: of the other `candidates`, those that lost to others of their class, or are below the minimum score.
    """

    images: int = 0
    candidates: int = 0
    excluded: int = 0
    nonfinite: int = 0
    unselected: int = 0

    def __add__(self, other: "Account") -> "Account":
        return Account(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


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
        account: of the rows that were scanned for this.
    """

    class_id: Int32
    score: Float32
    shard: Int32
    index: UInt32
    shards: pa.StringArray
    account: Account = Account()

    def __len__(self) -> int:
        return len(self.class_id)


def merge(tops: Sequence[Top], quotas: Int64) -> Top:
    """The first K of each class among all of `tops` together, by the total order.

    Args:
        tops: at least one; sorted or not.
        quotas: int64 [C], K of each class.
    """
    every = _concatenate(tops)
    kept = _first(every, quotas)
    shards, shard = used(every.shards, every.shard[kept])
    return Top(
        every.class_id[kept],
        every.score[kept],
        shard,
        every.index[kept],
        shards,
        every.account + Account(unselected=len(every) - len(kept)),
    )


def used(strings: pa.Array, places: NDArray[Any]) -> tuple[pa.Array, Int32]:
    """Those of `strings` that are at some of `places`, in the same order, and where in them each place is now (int32 [N])."""
    wanted = np.bincount(places, minlength=len(strings)) > 0
    return strings.filter(pa.array(wanted)), (np.cumsum(wanted, dtype=np.int32) - np.int32(1))[places]


def _concatenate(tops: Sequence[Top]) -> Top:
    """All candidates of `tops`, at least one, as they stand; their shards in the order of their names."""
    shards, places = unify([top.shards for top in tops])
    return Top(
        np.concatenate([top.class_id for top in tops]),
        np.concatenate([top.score for top in tops]),
        np.concatenate([place[top.shard] for top, place in zip(tops, places, strict=True)]),
        np.concatenate([top.index for top in tops]),
        shards,
        sum((top.account for top in tops), Account()),
    )


def split(top: Top, edges: Sequence[int]) -> list[Top]:
    """The candidates of `top` by ranges of classes, without its account.

    Args:
        edges: at most 65,536 class ids, ascending: range i has the classes from edges[i] up to edges[i + 1].
    """
    ranges = np.searchsorted(edges, np.arange(edges[-1]), side="right").astype(np.uint16) - np.uint16(1)
    number = ranges[top.class_id]
    order = np.argsort(number, kind="stable")  # a radix sort
    ends = np.cumsum(np.bincount(number, minlength=len(edges) - 1)).tolist()
    class_id, score, shard, index = top.class_id[order], top.score[order], top.shard[order], top.index[order]
    places = [slice(start, end) for start, end in pairwise([0, *ends])]
    return [Top(class_id[i], score[i], shard[i], index[i], top.shards) for i in places]


def unify(dictionaries: Sequence[pa.StringArray]) -> tuple[pa.StringArray, list[Int32]]:
    """The distinct strings of all, at least one, in the order of their UTF-8 bytes, and the places in them of each one's."""
    every = pa.concat_arrays(dictionaries)
    distinct = every.unique()
    distinct = distinct.take(pc.sort_indices(distinct))  # Arrow compares strings by their bytes
    places = pc.index_in(every, distinct).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    return distinct, np.split(places, np.cumsum([len(one) for one in dictionaries[:-1]]))


def _first(top: Top, quotas: Int64) -> Int64:
    """Where the first K candidates of each class are (int64), by class and then by the total order."""
    falling = _descending(top.score)
    order = sort_order(top.class_id.view(np.uint32), falling)
    class_id, falling = top.class_id[order], falling[order]
    equal = (class_id[1:] == class_id[:-1]) & (falling[1:] == falling[:-1])
    if equal.any():
        tied = np.zeros(len(order), np.bool_)
        tied[1:] |= equal
        tied[:-1] |= equal
        places = np.flatnonzero(tied)
        rows = order[places]
        runs = np.cumsum(np.concatenate([[True], ~equal]), dtype=np.uint32)[places]
        order[places] = rows[sort_order(runs, top.shard[rows].view(np.uint32), top.index[rows])]
    return order[ranks(class_id) < quotas[class_id]]


def sort_order(*keys: UInt32) -> Int64:
    """The stable order of rows by `keys` (uint32 [N] each), the most significant first.

    By digits of 16 bits, which NumPy sorts by radix: about three times as fast as `argsort` of 64-bit keys.
    """
    digits: list[NDArray[np.uint16]] = []
    for key in reversed(keys):
        digits.append(key.astype(np.uint16))
        if len(key) and int(key.max()) >> 16:
            digits.append((key >> np.uint32(16)).astype(np.uint16))
    return np.lexsort(digits)


def _descending(score: Float32) -> UInt32:
    """A number that falls as `score` rises: the bits of an IEEE float, ordered (finite scores, no negative zero)."""
    bits = score.view(np.uint32)
    return np.where(bits >> np.uint32(31), bits, ~bits & np.uint32(0x7FFFFFFF))


def ranks(classes: NDArray[Any]) -> Int64:
    """The 0-based place of every element in its run of equal `classes`."""
    starts = np.flatnonzero(np.concatenate([[True], classes[1:] != classes[:-1]])[: len(classes)])
    lengths = np.diff(starts, append=len(classes))
    return np.arange(len(classes)) - np.repeat(starts, lengths)


@dataclass(frozen=True)
class Candidates:
    """Some rows of a score table: N images with P classes each.

    Attributes:
        shard: dictionary array of strings [N].
        index: uint32 [N].
        class_ids: int32 [N, P].
        scores: float32 [N, P].
        excluded: bool [N], images that must not be selected; None if there are none.
        images: how many images the rows are of: N, but for rows that are single tags of images.
    """

    shard: pa.DictionaryArray
    index: UInt32
    class_ids: Int32
    scores: Float32
    images: int
    excluded: Bool | None = None


class Sieve:
    """Holds the candidates that can be among the first K of their class, in memory bounded by classes x K.

    A candidate passes if it reaches its class's threshold: where the caller starts it, later the score of the K-th best
    so far. Candidates equal to it pass, because their shard and index decide. What passes waits until a merge cuts it
    back and raises the thresholds.

    Args:
        quotas: int64 [C], K of each class.
        thresholds: float32 [C], what candidates must reach from the start; not NaN.
        below: float32 [C], what candidates must not reach; None for no such limit. With it this sieve takes what
            another, with these as thresholds, held back.
        supplement: whether the candidates were counted by another sieve, whose account this one corrects.
    """

    def __init__(
        self, quotas: Int64, thresholds: Float32, *, below: Float32 | None = None, supplement: bool = False
    ) -> None:
        self.thresholds = np.where(quotas > 0, thresholds, np.float32(np.inf))
        self._quotas = quotas
        self._below = below
        self._supplement = supplement
        self._top = _nothing()
        self._pending: list[Top] = []
        self._waiting = 0
        self._patience = max(PENDING, int(quotas.sum()))  # a merge of less would cut back little

    def add(self, batch: Candidates) -> None:
        """Passes the candidates of some rows, all of whose class ids are from 0 to C - 1."""
        passed = self._pass(batch)
        self._pending.append(passed)
        self._waiting += len(passed)
        if self._waiting > self._patience:
            self._top = merge([self._top, *self._pending], self._quotas)
            self._pending, self._waiting = [], 0
            self.thresholds = _raised(self.thresholds, self._top, self._quotas)

    def top(self) -> Top:
        """What passed so far, in no order; all of the first K of each class that reach the starting thresholds."""
        return _concatenate([self._top, *self._pending])

    def _pass(self, batch: Candidates) -> Top:
        per_image = batch.scores.shape[1]
        score, class_id = batch.scores.ravel(), batch.class_ids.ravel()
        chosen = np.flatnonzero(score >= self.thresholds.min(initial=np.inf))  # never true of NaN
        chosen = chosen[score[chosen] >= self.thresholds[class_id[chosen]]]
        if self._below is not None:
            chosen = chosen[score[chosen] < self._below[class_id[chosen]]]
        finite = np.isfinite(batch.scores)
        excluded, nonfinite = 0, score.size - int(np.count_nonzero(finite))
        if nonfinite:
            chosen = chosen[np.isfinite(score[chosen])]
        rows = chosen // max(per_image, 1)
        if batch.excluded is not None:
            excluded = int(np.count_nonzero(batch.excluded)) * per_image
            nonfinite -= int(np.count_nonzero(~finite[batch.excluded]))
            chosen = chosen[~batch.excluded[rows]]
            rows = chosen // max(per_image, 1)
        shards, codes = used(batch.shard.dictionary, batch.shard.indices.to_numpy(zero_copy_only=False)[rows])
        shards = shards.cast(pa.string())
        shards.validate(full=True)  # that it is UTF-8, which its order rests on
        held_back = score.size - excluded - nonfinite - len(chosen)
        account = Account(batch.images, score.size, excluded, nonfinite, held_back)
        return Top(
            class_id[chosen],
            score[chosen] + np.float32(0),  # no negative zero: it equals zero, and its bits do not
            codes,
            batch.index[rows],
            shards,
            Account(unselected=-len(chosen)) if self._supplement else account,
        )


def _nothing() -> Top:
    no: Any = np.zeros(0, np.int32)
    return Top(no, no.astype(np.float32), no, no.astype(np.uint32), pa.array([], pa.string()))


def kth_scores(top: Top, quotas: Int64, otherwise: Float32) -> Float32:
    """float32 [C]: the K-th score of every class of which the sorted `top` has K candidates, else `otherwise` [C]."""
    last = np.flatnonzero(ranks(top.class_id) == quotas[top.class_id] - 1)
    scores = otherwise.copy()
    scores[top.class_id[last]] = top.score[last]
    return scores


def _raised(thresholds: Float32, top: Top, quotas: Int64) -> Float32:
    return np.maximum(thresholds, kth_scores(top, quotas, thresholds))
