"""The models of a run, and how they are measured on labeled images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.progress import SILENT, Progress
from cluster.tasks import cpus, parallel_map
from models.training.job import Row
from pipeline.data.loading import TrainingSet
from tuning.sweep import Trial

IMAGES_PER_TASK = 1000
BATCH = 100


@dataclass(frozen=True)
class Trained:
    """A model directory.

    Attributes:
        images: seen in training, over all trials; 0 of a model that was ready.
        architecture: its name.
        parameters: how many numbers are trained.
        metrics: the last row of its history.
        history: of its training, a row at each of some steps.
        learning_rate: the best of a sweep, per 256 images.
        trials: of that sweep.
        class_outputs: where its outputs are not the classes of D in their order: the output of each class.
        source: where it was found and its license, of a network that others trained.
    """

    images: int
    architecture: str
    parameters: int
    metrics: dict[str, float | None]
    history: list[Row]
    learning_rate: float | None = None
    trials: tuple[Trial, ...] = ()
    class_outputs: tuple[int, ...] | None = None
    source: str = ""


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        uri: its directory.
        outputs: where the model's outputs are not the classes of the labels in their order: the output of each class.
    """

    uri: str
    outputs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Measured:
    """What a model did: images, shares in [0, 1] of those whose class is the best-scored, and among the five best; mean cross-entropy, in nats."""

    images: int
    top1: float
    top5: float
    loss: float


def measure(models: Mapping[str, Candidate], data: TrainingSet, progress: Progress = SILENT) -> dict[str, Measured]:
    """Top-1, top-5 and loss of models, on Ray tasks that each take a part of the images.

    Args:
        models: by a name.
        data: labeled images.
        progress: gets images evaluated, over all models.
    """
    parts = max(1, min(int(cpus()), -(-data.images // IMAGES_PER_TASK)))
    jobs = [(name, model, data, part, parts) for name, model in models.items() for part in range(parts)]
    total: dict[str, Any] = {}
    for name, found in parallel_map(_measure_part, jobs):
        total[name] = found if name not in total else total[name] + found
        progress.add(found.images)
    return {name: Measured(**total[name].metrics()) for name in models}


def _measure_part(job: tuple[str, Candidate, TrainingSet, int, int]) -> tuple[str, Any]:
    from models.directory import load
    from models.evaluation import SomeOutputs, evaluate_batches

    name, candidate, data, part, parts = job
    loaded = load(candidate.uri)
    transform = loaded.config.transform
    batches = data.evaluation_batches(transform, batch_size=BATCH, rank=part, world=parts)
    network = loaded.model if candidate.outputs is None else SomeOutputs(loaded.model, candidate.outputs)
    return name, evaluate_batches(network, batches, transform)
