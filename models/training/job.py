"""What a training is given, and what comes of it. Importing it needs neither torch nor Ray."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cluster.progress import SILENT, Progress
from models.config import ModelConfig, Training, Transform

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, float]
"""One row of a history: images_seen, learning_rate, loss, top1, images_per_second, and sometimes val_loss, val_top1, val_top5."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One training: what every worker is told.

    Attributes:
        name: of the run, for checkpoints and messages; a file name.
        model: what to train.
        class_names: class i of the labels is class_names[i].
        training: how.
        data: the labeled images to train on.
        validation: labeled images to evaluate on, at most 20 times in the run; none to do without.
        fresh_head: whether the last layer starts with random weights even so.
        initial: model directory whose weights to start from (fine-tuning), as `models.directory.start_from` takes them; None
            starts from random weights.
        out: the model directory to publish.
        seed: of the initial weights, the order of the images and the random crops.
        provenance: JSON values for the model's card.
        progress: told of images seen, loss and accuracy.
    """

    name: str
    model: ModelConfig
    class_names: list[str]
    training: Training
    data: TrainingData
    validation: TrainingData | None = None
    initial: str | None = None
    fresh_head: bool = False
    out: str
    seed: int
    provenance: dict[str, Any] = field(default_factory=dict)
    progress: Progress = SILENT


@dataclass(frozen=True, slots=True)
class Fitted:
    """A finished training: the model directory, the last row of its history, and the history."""

    uri: str
    metrics: Row
    history: list[Row]
