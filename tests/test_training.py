"""The one training, on real Ray Train workers, interrupted by kill -9 and undisturbed."""

import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.errors import ModelError, StageError, StorageError
from models.card import read_card
from models.config import ModelConfig, Training, Transform
from models.training.job import Fitted, TrainingJob
from models.training.launch import fit, fit_all
from models.training.schedules import due

MODEL = ModelConfig(architecture="resnet8", options={"width": 4}, transform=Transform(size=16, resize=16, crop="none"))
CLASSES = ["upper left", "upper right", "lower left", "lower right"]


@dataclass(frozen=True)
class Corners:
    """Noise with one bright corner; the label says which. A pure function of (seed, position), as the contract wants.

    The first time that rank 1 comes to the image at position `kill_at`, its process kills itself.
    """

    images: int
    seed: int = 0
    kill_at: int = -1
    killed: str = ""
    asked: str = ""

    def _batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([i % 4 for i in indices])
        images = torch.empty(len(indices), 3, 16, 16, dtype=torch.uint8)
        for row, i in enumerate(indices):
            images[row].random_(0, 100, generator=torch.Generator().manual_seed(self.seed * 10_007 + i))
            y, x = divmod(i % 4, 2)
            images[row, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 120
        return images, labels

    def training_batches(
        self, transform: Transform, *, batch_size: int, rank: int, world: int, seed: int, start: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        torch.set_flush_denormal(False)
        if self.asked:
            Path(f"{self.asked}-{rank}-{start}").touch()
        while True:
            first = start + rank * batch_size
            indices = []
            for position in range(first, first + batch_size):
                if position == self.kill_at and rank == 1 and not Path(self.killed).exists():
                    Path(self.killed).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                epoch, place = divmod(position, self.images)
                order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed * 131 + epoch))
                indices.append(int(order[place]))
            yield self._batch(indices)
            start += batch_size * world

    def evaluation_batches(
        self, transform: Transform, *, batch_size: int, rank: int, world: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        own = list(range(rank, self.images, world))
        for first in range(0, len(own), batch_size):
            yield self._batch(own[first : first + batch_size])


def run(folder: Path, name: str, data: Corners, model: ModelConfig = MODEL, **changes: Any) -> Fitted:
    return fit(job(folder, name, data, model, **changes), str(folder / "work"))


def job(folder: Path, name: str, data: Corners, model: ModelConfig = MODEL, **changes: Any) -> TrainingJob:
    from ray import cloudpickle  # here, because the session's environment must be set before ray is imported

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]  # workers cannot import a test
    training = {
        "epochs": 3,
        "batch_size": 16,
        "workers": 2,
        "learning_rate": 1.6,
        "warmup": 0.1,
        "drops": 2,
        "checkpoint_every_images": 128,
        "max_failures": 1,
    }
    return TrainingJob(
        name=name,
        model=model,
        class_names=CLASSES,
        training=Training.model_validate(training | changes),
        data=data,
        validation=Corners(37, seed=9),
        out=str(folder / name),
        seed=4,
        provenance={"stage": name},
    )


@pytest.fixture(scope="module")
def calm(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """An undisturbed training with two workers."""
    handler = signal.getsignal(signal.SIGINT)
    fitted = run(tmp_path_factory.mktemp("calm"), "calm", Corners(256))
    assert signal.getsignal(signal.SIGINT) is handler
    return fitted


def test_two_workers_train_one_network(calm: Fitted) -> None:
    assert calm.history[-1]["images_seen"] == 3 * 256
    assert [row["images_seen"] for row in calm.history] == [32 * step for step in range(1, 25)]
    assert calm.metrics["val_top1"] > 0.9
    assert calm.metrics["val_top5"] == 1.0
    assert calm.metrics["loss"] < calm.history[0]["loss"]
    assert len([row for row in calm.history if "val_top1" in row]) == 20
    card = read_card(calm.uri)
    assert (card.class_names, card.provenance) == (CLASSES, {"stage": "calm"})
    assert card.metrics == pytest.approx(calm.metrics)
    assert not list((Path(calm.uri).parent / "work").glob("*"))


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(calm: Fitted, tmp_path: Path) -> None:
    killed, asked = tmp_path / "killed", tmp_path / "asked"
    disturbed = run(tmp_path, "disturbed", Corners(256, kill_at=16 * 21, killed=str(killed), asked=str(asked)))

    assert killed.exists()
    starts = {tuple(path.name.split("-")[1:]) for path in tmp_path.glob("asked-*")}
    again = {start for _, start in starts} - {"0"}
    assert again in ({"128"}, {"256"})  # the last checkpoint may not have been taken in yet when the worker died
    assert len(starts) == 4
    first, second = (load_file(Path(fitted.uri) / "model.safetensors") for fitted in (calm, disturbed))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert timeless(calm) == timeless(disturbed)
    assert not list((tmp_path / "work").glob("*"))


def timeless(fitted: Fitted) -> list[dict[str, float]]:
    """Its history without what depends on the machine."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in fitted.history]


def crashing(folder: Path, times: int) -> ModelConfig:
    options = {"at": 21, "times": times, "note": str(folder / f"note-{times}")}
    return MODEL.model_copy(update={"architecture": "failing:Crashing", "options": options})


@pytest.mark.slow
def test_a_crash_at_the_same_step_is_not_repeated_and_says_where(ray_local: None, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        run(tmp_path, "crash", Corners(256), crashing(tmp_path, 99), workers=1, max_failures=3)
    assert (tmp_path / "note-99").read_text().count("\n") == 2
    log = tmp_path / "work" / "crash" / "worker-0.txt"
    assert str(caught.value) == (
        "training crash: worker 0 crashed at step 21 (Segmentation fault), twice at the same step; "
        f"{log} shows where; the network, or a library under it, cannot do that step: change its sizes or that library"
    )
    assert "failing.py" in log.read_text()
    assert not list(Path(tempfile.gettempdir()).glob("tophat-crash-*"))


@pytest.mark.slow
def test_a_crash_once_changes_nothing(ray_local: None, tmp_path: Path) -> None:
    calm, disturbed = (
        run(tmp_path, f"crashes-{times}", Corners(256), crashing(tmp_path, times), workers=1, max_failures=1)
        for times in (0, 1)
    )
    assert (tmp_path / "note-1").read_text().count("\n") == 1
    first, second = (load_file(Path(fitted.uri) / "model.safetensors") for fitted in (calm, disturbed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert [row["loss"] for row in calm.history] == [row["loss"] for row in disturbed.history]
    assert not list(Path(tempfile.gettempdir()).glob("tophat-crashes-*"))


@pytest.mark.slow
def test_jobs_that_follow_each_other_are_as_if_each_was_alone(calm: Fitted, tmp_path: Path) -> None:
    killed, asked = tmp_path / "killed", tmp_path / "asked"
    several = [
        job(tmp_path, "first", Corners(256, asked=str(asked))),
        job(tmp_path, "second", Corners(256, kill_at=16 * 21, killed=str(killed))),
    ]
    first, second = fit_all("both", several, str(tmp_path / "work"))
    assert killed.exists()
    assert timeless(first) == timeless(second) == timeless(calm)
    assert [path.name for path in tmp_path.glob("asked-0-*")] == ["asked-0-0"]  # it did not begin again
    assert [Path(one.uri).name for one in (first, second)] == ["first", "second"]


@pytest.mark.slow
def test_a_killed_worker_is_told_from_a_crash(ray_local: None, tmp_path: Path) -> None:
    killed = Corners(256, kill_at=16 * 21, killed=str(tmp_path / "killed"))
    with pytest.raises(StageError) as caught:
        run(tmp_path, "lost", killed, max_failures=0)
    assert str(caught.value) == (
        "training lost: worker 1 died at step 11 (it had no time to say why), failure 1 (max_failures = 0); "
        "it was killed, often for want of memory (lower batch_size), or its node was lost; "
        f"see {tmp_path}/work/lost/worker-1.txt"
    )


@pytest.mark.slow
def test_an_error_of_the_network_names_its_step(ray_local: None, tmp_path: Path) -> None:
    failing = MODEL.model_copy(update={"architecture": "failing:Failing", "options": {}})
    with pytest.raises(StageError) as caught:
        run(tmp_path, "error", Corners(256), failing, workers=1, max_failures=0)
    assert str(caught.value) == (
        "training error: worker 0 failed at step 1 (ValueError: nothing to see), failure 1 (max_failures = 0); "
        f"see {tmp_path}/work/error/worker-0.txt"
    )
    assert "failing.py" in (tmp_path / "work/error/worker-0.txt").read_text()


CRASH = "Fatal Python error: Segmentation fault\n\nCurrent thread ..."


@pytest.mark.parametrize(
    ("cause", "before", "now", "repeats"),
    [
        (ValueError("shapes"), (7, ""), (7, ""), True),
        (ValueError("shapes"), (6, ""), (7, ""), False),
        (ValueError("shapes"), (0, ""), (0, ""), False),
        (None, (7, CRASH), (7, CRASH), True),
        (None, (0, CRASH), (0, CRASH), True),
        (None, None, (7, ""), False),
        (None, (7, ""), None, False),
        (ConnectionResetError(), (7, ""), (7, ""), False),
        (StorageError("uri", "s3://x", "could not be reached", "check it"), (7, ""), (7, ""), False),
    ],
)
def test_which_failure_would_come_again(
    cause: Exception | None, before: tuple[int, str] | None, now: tuple[int, str] | None, repeats: bool
) -> None:
    from models.training.traces import Failure, Trace

    earlier, later = (Failure(1, cause, found and Trace(1, *found)) for found in (before, now))
    assert later.repeats(earlier) is repeats


def test_the_worker_that_crashed_is_named_and_not_those_that_lost_it() -> None:
    from ray.exceptions import ActorDiedError

    from models.training.traces import Trace, failure_of

    lost, ours = RuntimeError("Connection closed by peer"), ModelError("model", "x", "is bad", "mend it")
    traces = [Trace(0, 3, ""), Trace(1, 3, ""), Trace(2, 4, CRASH)]
    assert failure_of({0: lost, 1: ActorDiedError()}, traces).rank == 2
    assert failure_of({0: lost, 1: ActorDiedError()}, traces[:2]).rank == 1
    assert failure_of({0: lost, 1: ours}, traces[:2]).cause is ours
    assert failure_of({0: lost}, []).trace is None
    assert failure_of({0: lost}, traces[:2]).trace == traces[0]


def test_a_loss_that_is_no_number_is_one_line() -> None:
    from models.training.loop import check_finite

    check_finite("student", 2.3, 100, Training(epochs=1))
    with pytest.raises(StageError) as caught:
        check_finite("student", math.inf, 3000, Training(epochs=1, learning_rate=9.0))
    message = str(caught.value)
    assert message.startswith("training student: the loss is inf after 3000 images; the learning rate is too high")
    assert "lower learning_rate = 9 (per 256 images) or" in message


def test_a_missing_initial_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model\.json"):
        fit(
            TrainingJob(
                name="no-start",
                model=MODEL,
                class_names=CLASSES,
                training=Training(epochs=1),
                data=Corners(8),
                initial=str(tmp_path / "nothing"),
                out=str(tmp_path / "out"),
                seed=0,
            ),
            str(tmp_path / "work"),
        )


@pytest.mark.parametrize(("steps", "times"), [(24, 20), (20, 20), (7, 20), (1, 20), (1000, 200), (9999, 200)])
def test_due_comes_at_most_so_often_and_at_the_end(steps: int, times: int) -> None:
    at = [step for step in range(1, steps + 1) if due(step, steps, times)]
    assert len(at) == min(steps, times)
    assert at[-1] == steps
    rows = {step for step in range(1, steps + 1) if due(step, steps, 200)}
    assert set(at) <= rows
