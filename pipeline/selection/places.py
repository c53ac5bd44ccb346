"""Which place in D-hat each selected image gets: decided beforehand, by sorting random keys."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Plan:
    """Which rows of the selection go where.

    Rows (N) are in the order of shard, index, class, so that what is read from one source shard is a range of rows.

    Attributes:
        label, rank: int32 [N].
        score: float32 [N].
        shard: int32 [N], ordinals in `shards`.
        index: uint32 [N].
        row_at: int64 [N], the row at each place of D-hat as a whole, a permutation.
        place: int64 [N], its inverse: the place of each row.
        shards: names of the source's shards, in the order of their bytes.
        edges: int64 [outputs + 1]; output shard o holds the places from edges[o] up to edges[o + 1].
        request: a hash of all that decides the content of the output.
    """

    label: NDArray[np.int32]
    rank: NDArray[np.int32]
    score: NDArray[np.float32]
    shard: NDArray[np.int32]
    index: NDArray[np.uint32]
    row_at: NDArray[np.int64]
    place: NDArray[np.int64]
    shards: pa.StringArray
    edges: NDArray[np.int64]
    request: str

    def __len__(self) -> int:
        return len(self.label)


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A random permutation of 0 to count - 1 (int64 [count]), the same in every version of NumPy.

    It sorts raw 64-bit draws, because NumPy promises the streams of its bit generators and not those of its methods.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def plan(selection: pa.Table, images_per_shard: int, seed: int, salt: str = "") -> Plan:
    """Places for the rows of a selection, in as few output shards of nearly equal size as hold them.

    Args:
        selection: as `read_selection` gives it; at least one row.
        images_per_shard: rows in an output shard, at most.
        seed: of the permutation.
        salt: enters the request's hash; for what else decides the content.
    """
    coded = selection["shard"].combine_chunks()
    shards = coded.dictionary.take(pc.sort_indices(coded.dictionary))
    ordinal = pc.index_in(coded.dictionary, shards).to_numpy(zero_copy_only=False).astype(np.int32)
    shard = ordinal[coded.indices.to_numpy(zero_copy_only=False)]
    columns = [selection[name].to_numpy() for name in ("class_id", "rank", "score", "index")]
    order = np.lexsort((columns[0], columns[3], shard))
    label, rank, score, index = (np.ascontiguousarray(column[order]) for column in columns)
    shard = shard[order]
    count = len(order)
    row_at = permutation(count, seed)
    place = np.empty_like(row_at)
    place[row_at] = np.arange(count)
    outputs = -(-count // images_per_shard)
    digest = hashlib.sha256(repr((images_per_shard, seed, salt, shards.to_pylist())).encode("utf-8", "surrogatepass"))
    for array in (label, rank, score, shard, index):
        digest.update(array.tobytes())
    return Plan(
        label=label,
        rank=rank,
        score=score,
        shard=shard,
        index=index,
        row_at=row_at,
        place=place,
        shards=shards,
        edges=np.arange(outputs + 1, dtype=np.int64) * count // outputs,
        request=digest.hexdigest()[:32],
    )
