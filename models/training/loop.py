"""What each worker of a training does: synchronous SGD, one gradient averaged over all workers per step (section 4.1)."""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import LastingError, ModelError, StageError
from models import directory as checkpoint
from models.architectures import build
from models.config import Training, Transform
from models.evaluation import Evaluation, evaluate_batches, evaluation_of, measure
from models.inputs.image import normalize
from models.training.job import Row, TrainingJob
from models.training.schedules import due, learning_rate
from models.training.traces import Tracer, traced

ROWS = 200
"""Rows of a history. `VALIDATIONS` divides it, so that each validation falls on a row."""
VALIDATIONS = 20

CHECKPOINT_SECONDS = 60.0
"""Where the recipe does not say: time between two checkpoints, and at least `CHECKPOINT_RATIO` times what one takes."""
CHECKPOINT_RATIO = 20.0

PROGRESS_SECONDS = 0.5

COUNTERS = "counters.json"
"""In a checkpoint: how far it goes. Of a job that is under way, the weights and the momentum lie beside it."""


def train(jobs: Sequence[TrainingJob], key: str, reports: bool) -> dict[str, Any]:
    """Trains one model after another, as rank `ray.train.get_context()` says; rank 0 publishes each.

    Args:
        jobs: what to train; at least one.
        key: of the workers' traces; see `models.training.traces`.
        reports: report each validation to Ray Train, where somebody listens.

    Returns:
        `histories`, of each job one, or `error`: one that every worker meets alike, which a restart would not mend.
    """
    try:
        with traced(key, ray.train.get_context().get_world_rank()) as tracer:
            return {"histories": _train_all(jobs, reports, tracer)}
    except (ModelError, StageError) as error:
        return {"error": error}


def _train_all(jobs: Sequence[TrainingJob], reports: bool, tracer: Tracer) -> list[list[Row]]:
    """The histories; a job that was finished before the workers were restarted is not repeated."""
    finished: list[list[Row]] = _counters().get("finished", [])
    for job in jobs[len(finished) :]:
        before = sum(each.training.steps(each.data.images) for each in jobs[: len(finished)])
        finished = [*finished, _Trainer(job, reports, finished).run(tracer, before)]
        if len(finished) < len(jobs):
            _keep_finished(finished)
    return finished


def _counters() -> dict[str, Any]:
    """What the last checkpoint of an interrupted run counts; nothing where there is none."""
    found = ray.train.get_checkpoint()
    if found is None:
        return {}
    with found.as_directory() as folder:
        counters: dict[str, Any] = json.loads(Path(folder, COUNTERS).read_text())
    return counters


def _keep_finished(finished: list[list[Row]]) -> None:
    """Checkpoints that some jobs are done, and the next has not begun; waits for all workers."""
    metrics: dict[str, Any] = dict(finished[-1][-1])
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="tophat-") as folder:
        Path(folder, COUNTERS).write_text(json.dumps({"finished": finished}))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def check_finite(name: str, loss: float, images_seen: int, training: Training) -> None:
    """Raises a LastingError when the mean loss since the last row is not a number."""
    if not math.isfinite(loss):
        raise LastingError(
            f"training {name}: the loss is {loss} after {images_seen} images; the learning rate is too high: "
            f"lower learning_rate = {training.learning_rate:g} (per 256 images) or raise warmup = {training.warmup:g}"
        )


def layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The memory layout in which `model` is trained: channels_last, but for networks that cannot be trained so on a CPU.

    With torch 2.14.1's oneDNN on a CPU with AVX-512, the backward pass of a strided 1x1 convolution of fewer than 16 channels writes beyond
    its memory in channels_last, and the process crashes, or does not. Contiguous tensors are fine, and cost the other networks: a training
    step of resnet8 (28 pixels), resnet20 (32), resnet18 and resnet50 (224) takes 0.73, 0.71, 0.88 and 0.80 of the CPU time in channels_last.
    """
    narrow = any(
        isinstance(m, nn.Conv2d) and m.in_channels < 16 and set(m.kernel_size) == {1} and max(m.stride) > 1
        for m in model.modules()
    )
    return torch.contiguous_format if narrow and device.type == "cpu" else torch.channels_last


def network_input(images: Tensor, transform: Transform, device: torch.device, layout: torch.memory_format) -> Tensor:
    """What a network is trained on: uint8 [N, 3, size, size] as normalized float32, on the device, in a memory layout."""
    return normalize(images, transform, device).contiguous(memory_format=layout)


class _Trainer:
    """The state of one worker in one job, after those whose histories are `finished`."""

    def __init__(self, job: TrainingJob, reports: bool, finished: list[list[Row]]) -> None:
        context = ray.train.get_context()
        self.job = job
        self.finished = finished
        self.reports = reports
        self.training = job.training
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = get_device() if job.training.gpus_per_worker else torch.device("cpu")
        torch.set_num_threads(job.training.cpus_per_worker)
        torch.manual_seed(job.seed)
        self.model = build(job.model, len(job.class_names))
        if job.initial is not None:
            checkpoint.start_from(self.model, job.initial, job.class_names, fresh_head=job.fresh_head)
        self.trained = self._freeze()
        self.layout = layout(self.model, self.device)
        self.model.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=self.training.peak_learning_rate,
            momentum=self.training.momentum,
            nesterov=self.training.nesterov,
            weight_decay=self.training.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.training.precision == "float16")
        self.history: list[Row] = []
        self.step = 0
        self.next_checkpoint = time.monotonic() + CHECKPOINT_SECONDS
        self._restore()

    def run(self, tracer: Tracer, before: int) -> list[Row]:
        """The steps that are left; `before` is how many the finished jobs had."""
        job, training = self.job, self.training
        steps = training.steps(job.data.images)
        batches = job.data.training_batches(
            job.model.transform,
            batch_size=training.batch_size,
            rank=self.rank,
            world=self.world,
            seed=job.seed,
            start=self.step * training.global_batch,
        )
        network = self._distributed()
        meter = _Meter(self.device)
        self._reseed()
        self.model.train(self.trained is self.model)
        self.trained.train()
        while self.step < steps:
            tracer.at(before + self.step + 1)
            images, labels = next(batches)
            self._learn(network, images, labels, steps, meter)
            self.step += 1
            self._show(meter)
            if due(self.step, steps, ROWS) or self._planned():
                self._close_row(meter, steps)
                meter.restart()
        if self.rank == 0:
            job.progress.update(self.step * training.global_batch)
            checkpoint.save(
                job.out,
                self.model,
                config=job.model,
                class_names=job.class_names,
                metrics=self.history[-1],
                provenance=job.provenance,
            )
        return self.history

    def _freeze(self) -> nn.Module:
        """The part that is trained; the others' parameters need no gradient."""
        if self.training.freeze == "none":
            return self.model
        last = checkpoint.last_layer(self.model, len(self.job.class_names)) or self.model
        self.model.requires_grad_(False)
        return last.requires_grad_(True)

    def _learn(self, network: nn.Module, images: Tensor, labels: Tensor, steps: int, meter: "_Meter") -> None:
        """One step of SGD."""
        batch = self.training.global_batch
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, self.step * batch, steps * batch)
        labels = labels.to(self.device, non_blocking=True)
        with self._autocast():
            logits = network(network_input(images, self.job.model.transform, self.device, self.layout))
        loss = functional.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        meter.add(logits.detach(), labels)

    def _autocast(self) -> AbstractContextManager[object]:
        kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        kind = kinds.get(self.training.precision)
        return torch.autocast(self.device.type, dtype=kind) if kind else nullcontext()

    def _planned(self) -> bool:
        """Whether the recipe wants a checkpoint at this step."""
        every, batch = self.training.checkpoint_every_images, self.training.global_batch
        return every is not None and self.step * batch // every != (self.step - 1) * batch // every

    def _close_row(self, meter: "_Meter", steps: int) -> None:
        """Adds a row to the history, the same on every worker; validates, reports and saves when that is due."""
        late = self.rank == 0 and time.monotonic() > self.next_checkpoint
        counts = self._summed(torch.cat([meter.counts, meter.counts.new_tensor([late])]))
        self._add_row(evaluation_of(counts[:4]), meter.seconds(), steps)
        validated = self.job.validation is not None and due(self.step, steps, VALIDATIONS)
        if validated:
            self.history[-1] |= self._validate()
        timed = self.training.checkpoint_every_images is None and bool(counts[4])
        save = (timed or self._planned()) and self.step < steps
        if save or (validated and self.reports):
            self._report(save)
        self._reseed()

    def _add_row(self, total: Evaluation, seconds: float, steps: int) -> None:
        batch = self.training.global_batch
        check_finite(self.job.name, total.loss, self.step * batch, self.training)
        self.history.append(
            {
                "images_seen": self.step * batch,
                "learning_rate": learning_rate(self.training, (self.step - 1) * batch, steps * batch),
                "loss": total.loss,
                "top1": total.top1,
                "images_per_second": total.images / seconds,
            }
        )

    def _validate(self) -> Row:
        job = self.job
        assert job.validation is not None
        if self.world > 1:  # batch statistics are each worker's own (section 4.1): judge, and keep, those of rank 0
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        batches = job.validation.evaluation_batches(
            job.model.transform, batch_size=2 * self.training.batch_size, rank=self.rank, world=self.world
        )
        with self._autocast():
            own = evaluate_batches(self.model, batches, job.model.transform, self.device)
        self.trained.train()
        counts = torch.tensor([own.images, own.hits1, own.hits5, own.loss_sum], dtype=torch.float64, device=self.device)
        found = evaluation_of(self._summed(counts))
        return {"val_loss": found.loss, "val_top1": found.top1, "val_top5": found.top5}

    def _summed(self, counts: Tensor) -> Tensor:
        """The sum over all workers."""
        if self.world > 1:
            dist.all_reduce(counts)
        return counts

    def _show(self, meter: "_Meter") -> None:
        if self.rank == 0 and meter.shown + PROGRESS_SECONDS < (now := time.monotonic()):
            meter.shown = now
            seen = self.step * self.training.global_batch
            if self.history:
                self.job.progress.update(seen, loss=self.history[-1]["loss"], top1=self.history[-1]["top1"])
            else:
                self.job.progress.update(seen)

    def _reseed(self) -> None:
        """Makes what is random inside the network (dropout) the same whether or not the run was interrupted here."""
        torch.manual_seed(hash((self.job.seed, self.rank, self.step)) & (2**63 - 1))

    def _report(self, save: bool) -> None:
        """Hands the last row to Ray Train, with a checkpoint of rank 0 if `save`; waits for all workers."""
        started = time.monotonic()
        if not save or self.rank != 0:
            ray.train.report(dict(self.history[-1]))
        else:
            with tempfile.TemporaryDirectory(prefix="tophat-") as folder:
                self._write(Path(folder))
                ray.train.report(dict(self.history[-1]), checkpoint=ray.train.Checkpoint.from_directory(folder))
        if save:
            now = time.monotonic()
            self.next_checkpoint = now + max(CHECKPOINT_SECONDS, CHECKPOINT_RATIO * (now - started))

    def _write(self, folder: Path) -> None:
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        state = self.optimizer.state_dict()["state"]
        momentum = {
            names[i]: entry["momentum_buffer"].cpu().contiguous()
            for i, entry in state.items()
            if entry.get("momentum_buffer") is not None
        }
        save_file(checkpoint.state_of(self.model), folder / "weights.safetensors")
        save_file(momentum, folder / "momentum.safetensors")
        counters = {
            "finished": self.finished,
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }
        (folder / COUNTERS).write_text(json.dumps(counters))

    def _restore(self) -> None:
        """Continues from the last checkpoint of an interrupted run, if there is one of this job."""
        found, counters = ray.train.get_checkpoint(), _counters()
        if found is None or "step" not in counters or len(counters.get("finished", [])) != len(self.finished):
            return
        with found.as_directory() as name:
            folder = Path(name)
            self.model.load_state_dict(load_file(folder / "weights.safetensors"))
            momentum = load_file(folder / "momentum.safetensors")
        for parameter_name, parameter in self.model.named_parameters():
            if parameter_name in momentum:
                buffer = torch.empty_like(parameter).copy_(momentum[parameter_name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.scaler.load_state_dict(counters["scaler"])
        self.step, self.history = counters["step"], counters["history"]

    def _distributed(self) -> nn.Module:
        if self.world == 1:
            return self.model
        return DistributedDataParallel(self.model, broadcast_buffers=False)


class _Meter:
    """Counts of this worker since the last row, on its device."""

    def __init__(self, device: torch.device) -> None:
        self.shown = 0.0
        self.counts = torch.zeros(4, dtype=torch.float64, device=device)
        self.restart()

    def restart(self) -> None:
        self.counts.zero_()
        self._since = time.monotonic()

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.counts += measure(logits, labels)

    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self._since)
