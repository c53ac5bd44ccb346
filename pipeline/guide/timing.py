"""How long this machine takes for one image: of the networks that were chosen, and of the images that were found."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from models.architectures import build
from models.config import ModelConfig, Transform
from models.directory import load
from models.inputs.image import UndecodableImage, evaluation_image, training_image
from models.training.loop import layout
from pipeline.guide.budget import Costs
from pipeline.guide.decide import Network, Plan, transform_of
from pipeline.guide.findings import Findings

SECONDS = 2.0
"""That measuring one thing takes, about."""
REPEATS = 4
SCORED_AT_ONCE = 16


def measure(plan: Plan, found: Findings, teacher: str | None) -> Costs:
    """Trains and scores a few images, as the plan says.

    Args:
        plan: the networks and their input.
        found: has some of the images.
        teacher: the model directory of the one that is given; None where it is trained.

    Raises:
        ModelError: the model that is given cannot be used.
    """
    transform = Transform.model_validate(transform_of(plan))
    device = torch.device("cuda" if plan.machine.gpus else "cpu")
    size, classes = plan.size.value, found.classes
    with _threads(plan.threads):
        scored, step = transform, 0.0
        if teacher is None:
            assert plan.teacher.value is not None
            network = _built(plan.teacher.value, transform, classes)
            step = _step(network, plan.batch, size, device)
        else:
            loaded = load(teacher)
            network, scored = loaded.model, loaded.config.transform
        return Costs(
            size=size,
            teacher_step=step,
            student_step=_step(_built(plan.student.value, transform, classes), plan.batch, size, device),
            teacher_forward=_forward(network, scored.size, device),
            decode=_decoding(found.labeled.some, lambda data: training_image(data, transform, random.Random(0))),
            pool_decode=_decoding(found.unlabeled.some, lambda data: training_image(data, transform, random.Random(0))),
            score_decode=_decoding(found.unlabeled.some, lambda data: evaluation_image(data, scored)),
        )


def takes(model: str, size: int) -> bool:
    """Whether the network of a model directory takes images of that side, too."""
    network = load(model).model.eval()
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError):  # each network says it in its own way
        return False
    return True


def _built(network: Network, transform: Transform, classes: int) -> nn.Module:
    config = ModelConfig(architecture=network.architecture, options=dict(network.options), transform=transform)
    return build(config, classes)


def _step(network: nn.Module, batch: int, size: int, device: torch.device) -> float:
    kind = layout(network, device)
    network = network.to(device).to(memory_format=kind).train()
    images = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=kind)
    outputs = network(images).shape[1]
    labels = torch.zeros(batch, dtype=torch.long, device=device) % outputs

    def once() -> None:
        functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]

    return _time(once, device) / batch


def _forward(network: nn.Module, size: int, device: torch.device) -> float:
    network = network.to(device).to(memory_format=torch.channels_last).eval()
    images = torch.rand(SCORED_AT_ONCE, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return _time(lambda: network(images), device) / SCORED_AT_ONCE


def _time(once: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, without the first: CPU time of each thread on CPUs, as other work on the machine comes and goes."""
    threads = torch.get_num_threads()
    clock = time.perf_counter if device.type == "cuda" else lambda: time.process_time() / threads
    once()
    took: list[float] = []
    until = time.monotonic() + SECONDS
    while len(took) < REPEATS and (time.monotonic() < until or not took):
        began = clock()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(clock() - began)
    return sum(took) / len(took)


def _decoding(some: Sequence[bytes], decode: Callable[[bytes], object]) -> float:
    """Seconds of CPU for one image."""
    took, until = [], time.monotonic() + SECONDS
    for data in some:
        began = time.thread_time()
        try:
            decode(data)
        except UndecodableImage:
            continue
        took.append(time.thread_time() - began)
        if time.monotonic() > until:
            break
    return sum(took) / max(1, len(took))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch with as many threads as a training worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
