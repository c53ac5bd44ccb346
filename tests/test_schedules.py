"""The learning rate, against the paper's numbers (section 4.1) and torch's own schedulers."""

import pytest
import torch
from pydantic import ValidationError

from models.config import Training
from models.training.schedules import learning_rate

BILLION = 10**9
PRETRAINING = Training(
    images_seen=BILLION, batch_size=24, workers=64, learning_rate=0.1, warmup=0.0064, drops=13, drop_factor=0.5
)
FINE_TUNING = Training(epochs=30, batch_size=24, workers=64, learning_rate=0.00025, drops=3, drop_factor=0.1)


def test_pretraining_warms_up_from_a_tenth_to_the_papers_peak() -> None:
    assert PRETRAINING.global_batch == 1536
    assert learning_rate(PRETRAINING, 0, BILLION) == pytest.approx(0.1)
    assert learning_rate(PRETRAINING, 3_200_000, BILLION) == pytest.approx((0.1 + 0.6) / 2)
    assert learning_rate(PRETRAINING, 6_400_000, BILLION) == pytest.approx(0.1 / 256 * 1536)


def test_pretraining_halves_thirteen_times_at_equal_distances_and_every_drop_takes_effect() -> None:
    parts = [learning_rate(PRETRAINING, BILLION * part // 14 + 7_000_000, BILLION) for part in range(14)]
    assert parts == pytest.approx([0.6 / 2**k for k in range(14)])
    last = learning_rate(PRETRAINING, BILLION - 1536, BILLION)
    assert last == pytest.approx(0.6 / 2**13)


def test_fine_tuning_drops_three_times_in_thirty_epochs() -> None:
    epoch = 1_281_167
    total = FINE_TUNING.total_images(epoch)
    assert total == 30 * epoch
    peak = 0.00025 / 256 * 1536
    for epochs, drops in ((0, 0), (7.4, 0), (7.6, 1), (14.9, 1), (15.1, 2), (22.4, 2), (22.6, 3), (29.9, 3)):
        assert learning_rate(FINE_TUNING, int(epochs * epoch), total) == pytest.approx(peak * 0.1**drops)


@pytest.mark.parametrize("drops", [0, 1, 3, 13])
def test_drops_are_those_of_torchs_multi_step_schedule(drops: int) -> None:
    training = Training(epochs=1, batch_size=1, learning_rate=2.56, drops=drops, drop_factor=0.5)
    steps = 280
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.peak_learning_rate)
    milestones = [steps * k // (drops + 1) for k in range(1, drops + 1)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.5)
    for step in range(steps):
        assert learning_rate(training, step, steps) == pytest.approx(schedule.get_last_lr()[0]), step
        optimizer.step()
        schedule.step()


def test_warm_up_is_torchs_linear_one() -> None:
    training = Training(epochs=1, batch_size=1024, learning_rate=0.1, warmup=0.2, drops=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.peak_learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=20)
    for step in range(30):
        assert learning_rate(training, step * 1024, 100 * 1024) == pytest.approx(schedule.get_last_lr()[0]), step
        optimizer.step()
        schedule.step()


def test_a_small_minibatch_has_nothing_to_warm_up_to() -> None:
    training = Training(epochs=1, batch_size=32, learning_rate=0.1, warmup=0.1)
    assert [learning_rate(training, seen, 1000) for seen in (0, 50, 99, 100)] == pytest.approx([0.0125] * 4)


def test_a_rate_is_never_above_the_peak_or_below_the_last_part() -> None:
    for seen in range(0, 1000):
        rate = learning_rate(FINE_TUNING, seen, 1000)
        assert FINE_TUNING.peak_learning_rate * 0.1**3 * 0.999 <= rate <= FINE_TUNING.peak_learning_rate


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "state its length: images_seen, epochs, or both"),
        ({"epochs": 1, "warmup": 0.3, "drops": 3}, "at most 0.25"),
        ({"epochs": 1, "precision": "float16"}, "float16 needs gpus_per_worker = 1"),
        ({"epochs": 1, "momentum": 0.0, "nesterov": True}, "momentum above 0"),
        ({"epochs": 1, "learning_rate": 0.0}, "greater than 0"),
        ({"epochs": 1, "warm_up": 0.1}, "Extra inputs"),
    ],
)
def test_a_contradiction_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Training.model_validate(values)


def test_steps_complete_the_last_minibatch() -> None:
    assert Training(images_seen=100, batch_size=24, workers=2).steps(epoch_images=7) == 3
    assert Training(epochs=2, batch_size=24).steps(epoch_images=100) == 9
    assert Training(images_seen=1, batch_size=24).steps(epoch_images=7) == 1


def test_of_two_lengths_the_longer_counts() -> None:
    both = Training(epochs=3, images_seen=1000, batch_size=10)
    assert [both.total_images(epoch) for epoch in (100, 333, 334, 1000)] == [1000, 1000, 1002, 3000]
    assert both.steps(epoch_images=400) == 120
