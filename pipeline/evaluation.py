"""Measuring models on labeled images."""

from collections.abc import Mapping
from typing import Any

from cluster.progress import SILENT, Progress
from cluster.reduction import cpus, parallel_map
from pipeline.loading import TrainingSet

IMAGES_PER_TASK = 1000
BATCH = 100


def evaluate(models: Mapping[str, str], data: TrainingSet, progress: Progress = SILENT) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and loss of models, on Ray tasks that each take a part of the images.

    Args:
        models: URIs of model directories, by a name.
        data: labeled images.
        progress: gets images evaluated, over all models.

    Returns:
        For each name: images, top1 and top5 (in [0, 1]) and loss (mean cross-entropy, in nats).
    """
    parts = max(1, min(int(cpus()), -(-data.images // IMAGES_PER_TASK)))
    jobs = [(name, uri, data, part, parts) for name, uri in models.items() for part in range(parts)]
    total: dict[str, Any] = {}
    for name, found in parallel_map(_evaluate_part, jobs):
        total[name] = found if name not in total else total[name] + found
        progress.add(found.images)
    return {name: total[name].metrics() for name in models}


def _evaluate_part(job: tuple[str, str, TrainingSet, int, int]) -> tuple[str, Any]:
    from models.checkpoint import load
    from models.evaluation import evaluate_batches

    name, uri, data, part, parts = job
    loaded = load(uri)
    transform = loaded.config.transform
    batches = data.evaluation_batches(transform, batch_size=BATCH, rank=part, world=parts)
    return name, evaluate_batches(loaded.model, batches, transform)
