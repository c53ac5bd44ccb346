"""What per-image predictions say, held against scikit-learn, SciPy and brute force."""

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

from models.judging import (
    BINS,
    LEAST,
    calibration,
    compare,
    confusion,
    cross_entropy,
    per_class,
    share_interval,
)


def drawn(classes: int, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=images)
    return labels, np.where(draw.random(images) < 0.7, labels, draw.integers(classes, size=images))


def test_loss_is_the_mean_cross_entropy_and_finite() -> None:
    draw = np.random.default_rng(1)
    scores = draw.dirichlet(np.ones(4), 50)
    labels = draw.integers(4, size=50)
    assert cross_entropy(scores[np.arange(50), labels]) == pytest.approx(log_loss(labels, scores, labels=range(4)))
    assert cross_entropy(np.array([0.0, 1.0], np.float32)) == pytest.approx(-np.log(LEAST) / 2)


def test_classes_one_by_one() -> None:
    labels = np.array([0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 1, 1, 0, 1])
    found = per_class(labels, predicted, 5)
    np.testing.assert_array_equal(found.recall, [2 / 3, 1 / 2, np.nan, 0, np.nan])
    np.testing.assert_array_equal(found.precision, [2 / 3, 1 / 3, np.nan, np.nan, np.nan])
    assert found.support.tolist() == [3, 2, 0, 1, 0]


@pytest.mark.parametrize(("classes", "images"), [(2, 30), (7, 400), (300, 500)])
def test_confusion_is_the_matrix_and_adds_up(classes: int, images: int) -> None:
    labels, predicted = drawn(classes, images, 2)
    found = confusion(labels, predicted)
    assert found.counts.sum() == images
    expected = confusion_matrix(labels, predicted, labels=range(classes))
    np.testing.assert_array_equal(found.matrix(classes), expected)
    assert len(found.counts) == np.count_nonzero(expected)
    wrong = found.mistakes()
    assert wrong.counts.sum() == (labels != predicted).sum()
    assert np.all(wrong.labels != wrong.predicted)
    assert np.all(np.diff(wrong.counts) <= 0)
    _, recall, _, support = precision_recall_fscore_support(
        labels, predicted, labels=range(classes), zero_division=np.nan
    )
    np.testing.assert_allclose(np.diag(found.matrix(classes)) / np.maximum(1, support), np.nan_to_num(recall))


def test_calibration() -> None:
    draw = np.random.default_rng(3)
    scores = draw.beta(4, 1, 500).astype(np.float32)
    right = draw.random(500) < scores**2
    found = calibration(scores, right)
    accuracies, means = calibration_curve(right, scores, n_bins=BINS)
    np.testing.assert_allclose(found.accuracies, accuracies)
    np.testing.assert_allclose(found.scores, means, rtol=1e-6)
    assert found.counts.sum() == 500
    assert found.error == pytest.approx(np.abs(means - accuracies) @ found.counts / 500)
    # The edge belongs to the last bin; what is no number claimed nothing.
    assert calibration(np.array([1.0, 0.99, np.nan]), np.array([True, False, True])).counts.tolist() == [1, 2]
    assert calibration(np.array([1.0, 1.0]), np.array([True, True])).error == 0.0


def test_the_interval_is_the_bootstraps() -> None:
    right = np.random.default_rng(4).random(150) < 0.8
    low, high = share_interval(int(right.sum()), 150)
    expected = stats.bootstrap((right,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.015)
    assert share_interval(int(right.sum()), 150) == (low, high)
    assert share_interval(7, 7) == (1.0, 1.0)
    assert share_interval(int(right.sum()), 150, confidence=0.5)[0] > low


def test_two_models_on_the_same_images() -> None:
    draw = np.random.default_rng(5)
    first, second = draw.random(200) < 0.85, draw.random(200) < 0.75
    found = compare(first, second)
    alone, other = int((first & ~second).sum()), int((~first & second).sum())
    assert (found.only_first, found.only_second, found.both) == (alone, other, int((first & second).sum()))
    assert found.difference == pytest.approx(first.mean() - second.mean())
    # McNemar's exact test by its definition: twice the smaller tail of a fair coin.
    assert found.p == pytest.approx(min(1.0, 2 * stats.binom.cdf(min(alone, other), alone + other, 0.5)))
    expected = stats.bootstrap(
        (first.astype(float), second.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=9999,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.015)
    swapped = compare(second, first)
    assert swapped.p == found.p
    assert swapped.difference == -found.difference
    same = compare(first, first)
    assert (same.p, same.difference, same.interval) == (1.0, 0.0, (0.0, 0.0))
