"""What per-image predictions say of a model, and of two models on the same images. NumPy alone: no network, no Ray, no files.

Images are rows of arrays of one length N: `labels` and `predicted`, int [N], class numbers; `scores`, float [N], the probability of the
predicted class; `right`, bool [N], whether that class is the image's. Rates of nothing are NaN.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

DRAWS = 2000
"""Bootstrap samples."""
BINS = 15
"""Of the scores, in calibration."""
LEAST = float(np.finfo(np.float32).tiny)
"""The probability that a smaller one counts as in the loss: an image adds 87.3 nats at most."""


def cross_entropy(label_scores: Floats) -> float:
    """Mean cross-entropy, in nats, from the probabilities of the images' own classes, float [N]."""
    return float(-np.log(np.maximum(np.asarray(label_scores, np.float64), LEAST)).mean())


class PerClass(NamedTuple):
    """Of each class, float [C] and int [C]: the share of its images that were found, the share of what was taken for it that is of it,
    and how many images it has."""

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    support: NDArray[np.int64]


def per_class(labels: Integers, predicted: Integers, classes: int) -> PerClass:
    """Recall, precision and support of each of the classes 0 to `classes` - 1. A class without images has a recall of NaN, one that no
    image was taken for a precision of NaN."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, _, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(classes), average=None, zero_division=np.nan
    )
    return PerClass(recall, precision, support.astype(np.int64))


class Confusion(NamedTuple):
    """How many images of a class were taken for a class, of the pairs that came up: int64 [pairs] each, by label and then predicted class.
    The counts add up to the images. With thousands of classes, a matrix of all pairs would be mostly zeros."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    counts: NDArray[np.int64]

    def mistakes(self) -> "Confusion":
        """The pairs of two classes, the most frequent first; equal ones by label and predicted class."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        order = wrong[np.argsort(-self.counts[wrong], kind="stable")]
        return Confusion(self.labels[order], self.predicted[order], self.counts[order])

    def matrix(self, classes: int) -> NDArray[np.int64]:
        """The counts as int64 [classes, classes]: a row for each label, a column for each predicted class."""
        made = np.zeros((classes, classes), np.int64)
        made[self.labels, self.predicted] = self.counts
        return made


def confusion(labels: Integers, predicted: Integers) -> Confusion:
    """Which classes the images of each class were taken for."""
    pairs, counts = np.unique(np.stack([labels, predicted]).astype(np.int64), axis=1, return_counts=True)
    return Confusion(pairs[0], pairs[1], counts.astype(np.int64))


class Calibration(NamedTuple):
    """Of the bins of the score that hold images, ascending: how many, int64 [bins], their mean score and the share that is right, float64
    [bins]. Where scores are what they claim to be, the two agree."""

    counts: NDArray[np.int64]
    scores: NDArray[np.float64]
    accuracies: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error: by how much the two differ, the mean over images."""
        return float(np.average(np.abs(self.scores - self.accuracies), weights=self.counts))


def calibration(scores: Floats, right: Bools, bins: int = BINS) -> Calibration:
    """Reliability of the top-1 score, in bins of equal width from 0 to 1. A score that is no number counts as 0: nothing was claimed."""
    known = np.clip(np.nan_to_num(np.asarray(scores, np.float64)), 0.0, 1.0)
    places = np.minimum((known * bins).astype(np.int64), bins - 1)
    counts = np.bincount(places, minlength=bins)
    held = counts > 0
    sums = (np.bincount(places, weights=values, minlength=bins)[held] for values in (known, right))
    mean_scores, accuracies = (each / counts[held] for each in sums)
    return Calibration(counts[held].astype(np.int64), mean_scores, accuracies)


def _percentiles(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def share_interval(hits: int, images: int, *, seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval (percentile) of a share of images.

    Drawing N images with replacement finds a binomial number of hits, so that is what is drawn. Where every image is a hit, or none,
    the bootstrap sees no doubt: the interval has no width.
    """
    draws = np.random.default_rng(seed).binomial(images, hits / images, DRAWS)
    return _percentiles(draws / images, confidence)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        images: how many.
        both: images that both have right.
        only_first: that the first alone has right.
        only_second: that the second alone has right.
        difference: top-1 of the first less that of the second.
        interval: of that difference, 95%, by a paired bootstrap (percentile).
        p: the exact McNemar test's: how likely so uneven a split of the images that one alone has right is, were the two equally good.
    """

    images: int
    both: int
    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p: float


def compare(first: Bools, second: Bools, *, seed: int = 0, confidence: float = 0.95) -> Comparison:
    """The paired comparison of two models, from which images each has right, bool [N] each.

    Drawing N images with replacement finds a multinomial number of each of the kinds (the first alone right, the second alone, neither or
    both), so that is what is drawn.
    """
    from scipy.stats import binomtest

    images, both = len(first), int((first & second).sum())
    only = int(first.sum()) - both, int(second.sum()) - both
    kinds = np.array([*only, images - sum(only)])
    drawn = np.random.default_rng(seed).multinomial(images, kinds / images, DRAWS)
    interval = _percentiles((drawn[:, 0] - drawn[:, 1]) / images, confidence)
    p = float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0
    return Comparison(images, both, *only, (only[0] - only[1]) / images, interval, p)
