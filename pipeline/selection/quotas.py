"""How many images each class gets: K of every class, or a class distribution with the same total (supplement 2)."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InputError


def quotas(
    images_per_class: int,
    num_classes: int,
    *,
    zipf_exponent: float | None = None,
    class_weights: Sequence[float] | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """K of each class, int64 [num_classes]; the sum is `images_per_class` x `num_classes` whatever the distribution.

    Args:
        images_per_class: the mean of K over the classes.
        num_classes: C.
        zipf_exponent: s of a Zipf distribution: the class in place r, counted from 1, gets a share in proportion to
            r^-s. Which class has which place is a draw from `seed`.
        class_weights: shares of the classes, in proportion to these [C].
        seed: of the draw.

    Raises:
        InputError: there is not one weight, finite and not negative, for each class, or their sum is zero.
    """
    if class_weights is not None:
        weights: NDArray[np.float64] = np.asarray(class_weights, np.float64)
        if len(weights) != num_classes:
            rule = f"has {len(weights)} weights, and there are {num_classes} classes"
            raise InputError(
                "class_weights", list(class_weights), rule, "give one for each class, in the order of the classes"
            )
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            rule = "must be finite, not negative, and not all zero"
            raise InputError("class_weights", list(class_weights), rule, "correct them")
    elif zipf_exponent is not None:
        places = np.argsort(np.argsort([_draw(seed, c) for c in range(num_classes)]))
        weights = np.power(places + 1.0, -zipf_exponent)
    else:
        return np.full(num_classes, images_per_class, np.int64)
    total = images_per_class * num_classes
    shares = weights / weights.sum() * total
    counts: NDArray[np.int64] = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: total - int(counts.sum())]] += 1  # largest remainders
    return counts


def _draw(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest())


def random_scores(
    seed: int,
    names: Sequence[str],
    shard: NDArray[np.int32],
    index: NDArray[np.uint32],
    class_id: NDArray[np.int32],
) -> NDArray[np.float32]:
    """A uniform draw from [0, 1) for each (image, class), float32 [N], that depends on nothing else but `seed`.

    Args:
        seed: of the draws.
        names: shard names.
        shard: int32 [N], ordinals in `names`.
        index: uint32 [N].
        class_id: int32 [N].
    """
    roots = np.array([_shard_draw(seed, name) for name in names], np.uint64)
    draws = _mixed(roots[shard] ^ _mixed(index | (class_id.astype(np.uint64) << np.uint64(32))))
    return (draws >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _shard_draw(seed: int, name: str) -> int:
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest())


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection in which every bit depends on all."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
