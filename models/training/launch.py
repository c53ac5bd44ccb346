"""The one training: of the teacher, the student on D-hat, its fine-tuning, and the supervised baseline.

`fit` starts a group of workers with Ray Train and waits; what they do is `models.training.loop`.
"""

import os
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cluster import storage
from cluster.errors import StageError, TophatError, one_line
from models.card import read_card
from models.training.job import Fitted, Row, TrainingJob

if TYPE_CHECKING:
    from models.training.traces import Failure

T = TypeVar("T")

RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # between two polls, of which each takes in at most one report
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # an autoscaled cluster takes minutes to start a node
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def fit(job: TrainingJob, work: str, on_report: Any = None) -> Fitted:
    """Trains a model by synchronous SGD on `training.workers` workers (section 4.1) and publishes it.

    A lost worker restarts the group from the last checkpoint, and the run continues at the same image: its result is
    the one of an undisturbed run. So does a `fit` called again with the same name and `work` after its driver died.
    A worker that was lost twice at the same step would be lost there again, and is not restarted.

    Args:
        job: what to train.
        work: folder of the checkpoints while the run lasts; emptied when the model is published.
        on_report: a `ray.train.UserCallback`, given a history row at each validation (`TuneReportCallback()`).

    Raises:
        ModelError: the architecture or `initial` cannot be used.
        StageError: the loss is not finite, or the workers failed twice at the same step, or more than
            `training.max_failures` times.
    """
    return fit_all(job.name, [job], work, on_report)[0]


def fit_all(name: str, jobs: Sequence[TrainingJob], work: str, on_report: Any = None) -> list[Fitted]:
    """The same for several jobs, one after another on one group of workers, whose start takes longer than a short training.

    Args:
        name: of all of them, for checkpoints and messages; a file name.
        jobs: at least one; they agree in the workers that they need.
        work: as in `fit`.
        on_report: as in `fit`.

    Raises:
        ModelError, StageError: as in `fit`, of the first job that fails.
    """
    work = storage.absolute(work)
    jobs = [_located(job) for job in jobs]
    for variable, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    returned = _restarted(name, jobs, work, on_report)
    if error := returned.get("error"):
        raise error
    storage.delete_tree(storage.join(work, name))
    histories: list[list[Row]] = returned["histories"]
    return [Fitted(job.out, history[-1], history) for job, history in zip(jobs, histories, strict=True)]


def _located(job: TrainingJob) -> TrainingJob:
    """The same job with absolute locations; the model that it begins with is there."""
    initial = job.initial and storage.absolute(job.initial)
    if initial is not None:
        read_card(initial)
    return replace(job, out=storage.absolute(job.out), initial=initial)


def _restarted(name: str, jobs: Sequence[TrainingJob], work: str, on_report: Any) -> dict[str, Any]:
    """What the worker of rank 0 returned, after as many restarts as it took.

    Ray Train would restart the workers itself, but cannot say where they died, nor stop when they die at the same step again. It still
    restarts those that a preemption of their node ends, which are no failures.
    """
    from ray.train import WorkerGroupError

    from models.training.traces import Failure, collect, failure_of

    failures: list[Failure] = []
    most = jobs[0].training.max_failures
    while True:
        key = f"{name}-{uuid.uuid4().hex}"
        try:
            return _run_workers(name, jobs, work, key, on_report)
        except WorkerGroupError as error:
            failures.append(failure_of(error.worker_failures, collect(key)))
            again = len(failures) > 1 and failures[-1].repeats(failures[-2])
            if again or len(failures) > most:
                raise _reported(name, failures, most, storage.join(work, name), error) from error


def _reported(name: str, failures: "Sequence[Failure]", most: int, folder: str, error: Exception) -> TophatError:
    """The worker's own error if it is one of ours, else one line about it; the rest goes into a file in `folder`."""
    from models.training.traces import described

    last = failures[-1]
    if isinstance(last.cause, TophatError):
        return last.cause
    log = storage.join(folder, f"worker-{last.rank}.txt")
    stack = last.trace.stack if last.trace else ""
    storage.publish(log, f"{stack}\n{error}\n".encode())
    return StageError(f"training {name}: {described(failures, most, log)}")


def _run_workers(name: str, jobs: Sequence[TrainingJob], work: str, key: str, on_report: Any) -> dict[str, Any]:
    """What the worker of rank 0 returned."""
    from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    training = jobs[0].training
    filesystem, path = storage.ray_filesystem(work)
    resources: dict[str, float] = {"CPU": training.cpus_per_worker}
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker
    work_of_each: Any = partial(_worker, jobs, key, on_report is not None)
    trainer = TorchTrainer(
        work_of_each,
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=training.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[on_report] if on_report is not None else [],
        ),
    )
    try:
        result: Any = _beside_main_thread(trainer.fit)
        returned: dict[str, Any] = result.return_value
    except ControllerError as error:  # not a worker but Ray Train itself
        why = getattr(error.controller_failure, "cause", error.controller_failure)
        raise StageError(one_line(f"training {name} could not be run: {type(why).__name__}: {why}")) from error
    return returned


def _beside_main_thread(work: Callable[[], T]) -> T:
    """Calls `work` in another thread, and waits. In the main one, Ray Train takes Ctrl-C for itself, for good, and waits for its workers then."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result()


def _worker(jobs: Sequence[TrainingJob], key: str, reports: bool) -> dict[str, Any]:
    """Runs in every worker."""
    from models.training.loop import train

    return train(jobs, key, reports)
