"""The values of K that are tried where a recipe leaves K open: arithmetic alone."""

from collections.abc import Sequence
from math import floor, log, log10

from tuning.halving import FINALISTS, rungs

STEPS, RATIO = 6, 1.5
"""Values on a ladder, at most, and the least ratio of one to the next: what is nearer can hardly be told apart."""
FEW = 10
"""The lowest value, where a class has no more labels than that."""
PASSES = 4
"""How often the whole pre-training sees each image of the largest D-hat, at least: with fewer passes, more images are no more training data."""
LEAST_SEEN = 5_000
"""Images that a trial sees, at least, where that is up to the number of values: before a network has learned much, small and clean sets win."""
MOST_ROWS = 50_000_000
"""Of the largest D-hat: its order is drawn in the memory of one process."""


def ladder(labels: int, unlabeled: int, classes: int, images_seen: int) -> tuple[int, ...]:
    """Values of K at about equal ratios, rounded to two digits.

    The lowest is the labels that a class of D has, as fewer could add little to them. At the highest, an image of U is selected once on
    average: classes run out of images of their own there. It is lower where D-hat would have more images than pre-training can use.

    Args:
        labels: images of D.
        unlabeled: images of U that have scores.
        classes: C.
        images_seen: of the whole pre-training.

    Returns:
        1 to 6 values, ascending; 3 at most where the trials of 6 would be too short to tell anything, and a single one where U has no more
        to offer.
    """
    highest = max(1, min(unlabeled, images_seen // PASSES, MOST_ROWS) // classes)
    lowest = min(max(FEW, labels // classes), max(1, highest // 2))
    short = rungs(STEPS)[0].share * images_seen < LEAST_SEEN
    steps = min((FINALISTS if short else STEPS) - 1, floor(log(highest / lowest, RATIO)))
    found = {min(highest, _two_digits(lowest * (highest / lowest) ** (step / steps))) for step in range(steps)}
    return tuple(sorted(found | {highest}))


def _two_digits(value: float) -> int:
    unit: int = 10 ** max(0, floor(log10(value)) - 1)
    return max(1, round(value / unit) * unit)


def sizes(counts: Sequence[int], quotas: Sequence[Sequence[int]]) -> list[int]:
    """Images of D-hat under each of several quotas.

    Args:
        counts: of each class, under the largest quotas [C].
        quotas: [several, C].
    """
    return [sum(min(one, most) for one, most in zip(counts, each, strict=True)) for each in quotas]
