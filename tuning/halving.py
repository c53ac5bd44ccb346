"""Successive halving, as arithmetic: how many settings are tried for how long (Jamieson and Talwalkar 2016)."""

from dataclasses import dataclass
from math import ceil

FINALISTS = 3
"""Settings of the last rung, at most."""
COST = 1.5
"""Of all trials together, in whole trainings."""


@dataclass(frozen=True)
class Rung:
    """Trials of one length.

    Attributes:
        settings: how many are tried; the best of them enter the next rung.
        share: length of each trial, as a share of the whole training.
    """

    settings: int
    share: float


def rungs(settings: int) -> list[Rung]:
    """The rungs for so many settings, at least 2: half of them enter the next, where a trial is twice as long or about that.

    Each rung costs the same, and all of them `COST` trainings. A trial begins anew in the next rung, as its learning rate follows its length.
    """
    counts = [settings]
    while counts[-1] > FINALISTS:
        counts.append(ceil(counts[-1] / 2))
    return [Rung(count, COST / len(counts) / count) for count in counts]
