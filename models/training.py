"""The one training: of the teacher, the student on D-hat, its fine-tuning, and the supervised baseline.

`fit` starts a group of workers with Ray Train and waits; what they do is `models.loop`.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from cluster import storage
from cluster.errors import StageError, TophatError, one_line
from cluster.progress import Progress
from models.card import read_card
from models.config import ModelConfig, Training, Transform

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, float]
"""One row of a history: images_seen, learning_rate, loss, top1, images_per_second, and sometimes val_loss, val_top1, val_top5."""

RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # between two polls, of which each takes in at most one report
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # an autoscaled cluster takes minutes to start a node
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class TrainingData(Protocol):
    """Labeled images for training or validation: picklable, and the same on every worker."""

    @property
    def images(self) -> int:
        """Images in one epoch, over all workers; at least 1."""
        ...

    def training_batches(
        self, transform: Transform, *, batch_size: int, rank: int, world: int, seed: int, start: int
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        """Endless batches of exactly `batch_size`: uint8 [N, 3, size, size] and int64 [N].

        The order and the random crops are a pure function of (seed, position), so that a training that stops after
        `start` images, over all workers, goes on as if it had not.
        """
        ...

    def evaluation_batches(
        self, transform: Transform, *, batch_size: int, rank: int, world: int
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        """Batches of at most `batch_size` in which each image appears once over all workers; none on some is allowed."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a worker needs to know; see `fit`."""

    name: str
    model: ModelConfig
    class_names: list[str]
    training: Training
    data: TrainingData
    validation: TrainingData | None
    initial: str | None
    out: str
    seed: int
    provenance: dict[str, Any]
    progress: Progress
    reports: bool


@dataclass(frozen=True, slots=True)
class Fitted:
    """A finished training: the model directory, the last row of its history, and the history."""

    uri: str
    metrics: Row
    history: list[Row]


def fit(
    name: str,
    *,
    model: ModelConfig,
    class_names: list[str],
    training: Training,
    data: TrainingData,
    validation: TrainingData | None,
    initial: str | None,
    work: str,
    out: str,
    seed: int,
    provenance: dict[str, Any],
    progress: Progress,
    on_report: Any = None,
) -> Fitted:
    """Trains a model by synchronous SGD on `training.workers` workers (section 4.1) and publishes it.

    A lost worker restarts the group from the last checkpoint, and the run continues at the same image: its result is
    the one of an undisturbed run. So does a `fit` called again with the same `name` and `work` after its driver died.

    Args:
        name: of the run, for checkpoints and messages; a file name.
        model: what to train.
        class_names: class i of the labels is class_names[i].
        training: how.
        data: the labeled images to train on.
        validation: labeled images to evaluate on, at most 20 times in the run; none to do without.
        initial: model directory whose weights to start from (fine-tuning); the last layer is kept if the class names are
            the same, else it starts fresh. None starts from random weights.
        work: folder of the checkpoints while the run lasts; emptied when the model is published.
        out: the model directory.
        seed: of the initial weights, the order of the images and the random crops.
        provenance: JSON values for the model's card.
        progress: told of images seen, loss and accuracy.
        on_report: a `ray.train.UserCallback`, given a history row at each validation (`TuneReportCallback()`).

    Raises:
        ModelError: the architecture or `initial` cannot be used.
        StageError: the loss is not finite, or the workers failed more than `training.max_failures` times.
    """
    work, out = storage.absolute(work), storage.absolute(out)
    if initial is not None:
        initial = storage.absolute(initial)
        read_card(initial)
    job = Job(
        name,
        model,
        class_names,
        training,
        data,
        validation,
        initial,
        out,
        seed,
        provenance,
        progress,
        on_report is not None,
    )
    returned = _run_workers(job, work, on_report)
    if error := returned.get("error"):
        raise error
    storage.delete_tree(storage.join(work, name))
    history: list[Row] = returned["history"]
    return Fitted(out, history[-1], history)


def _run_workers(job: Job, work: str, on_report: Any) -> dict[str, Any]:
    """What the worker of rank 0 returned."""
    for variable, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)

    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    training = job.training
    filesystem, path = storage.ray_filesystem(work)
    resources: dict[str, float] = {"CPU": training.cpus_per_worker}
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker
    work_of_each: Any = partial(_worker, job)
    trainer = TorchTrainer(
        work_of_each,
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=training.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[on_report] if on_report is not None else [],
        ),
    )
    with _kept_interrupt_handler():
        try:
            result: Any = trainer.fit()
            returned: dict[str, Any] = result.return_value
        except TrainingFailedError as error:
            raise _reported(job, error) from error
        except SystemExit:  # what Ray Train makes of Ctrl-C
            raise KeyboardInterrupt from None
    return returned


@contextmanager
def _kept_interrupt_handler() -> Iterator[None]:
    """Puts back the handler of Ctrl-C that Ray Train replaces for good."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _reported(job: Job, error: Exception) -> TophatError:
    """The cause of a failed training: the worker's own error if it is one of ours, else one line about it."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())]
    for cause in causes:
        if isinstance(cause, TophatError):
            return cause
    if not causes:  # not a worker but Ray Train itself; the last line of its traceback says why
        why = [line for line in str(error).splitlines() if line.strip()][-1]
        return StageError(f"training {job.name} could not be run: {one_line(why)[:500]}")
    why = one_line(f"{type(causes[0]).__name__}: {causes[0]}")[:500]
    limit = job.training.max_failures
    return StageError(f"training {job.name} failed {limit + 1} times (max_failures = {limit}): {why}")


def _worker(job: Job) -> dict[str, Any]:
    """Runs in every worker."""
    from models.loop import train

    return train(job)
