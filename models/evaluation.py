"""How good a model is: top-1, top-5 and loss, as counts that add."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import Outputs, Transform
from models.inputs.image import normalize


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model did on some images. Two of them add up, so that shards and workers can be summed.

    `hits1` and `hits5` count the images whose label is the best-scored class, or among the 5 best (all classes, where
    there are fewer than 5); `loss_sum` sums the cross-entropy, in nats.
    """

    images: int = 0
    hits1: int = 0
    hits5: int = 0
    loss_sum: float = 0.0

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(
            self.images + other.images,
            self.hits1 + other.hits1,
            self.hits5 + other.hits5,
            self.loss_sum + other.loss_sum,
        )

    @property
    def top1(self) -> float:
        """Share of the images, in [0, 1]; 0 without images."""
        return self.hits1 / max(1, self.images)

    @property
    def top5(self) -> float:
        """Share of the images, in [0, 1]; 0 without images."""
        return self.hits5 / max(1, self.images)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats; 0 without images."""
        return self.loss_sum / max(1, self.images)

    def metrics(self) -> dict[str, float]:
        """The figures for a model card: images, top1, top5, loss."""
        return {"images": self.images, "top1": self.top1, "top5": self.top5, "loss": self.loss}


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts of one batch, on its device, without waiting for it.

    Args:
        logits: float [N, classes].
        labels: int64 [N].

    Returns:
        float64 [4]: images, hits1, hits5, loss_sum. float32 where the device has no float64.
    """
    logits = logits.float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([logits.new_tensor(len(labels)), best[:, 0].sum(), best.sum(), loss]).double()


def evaluation_of(counts: Tensor) -> Evaluation:
    """An `Evaluation` from float [4], a sum of what `measure` returned."""
    images, hits1, hits5, loss_sum = counts.tolist()
    return Evaluation(round(images), round(hits1), round(hits5), loss_sum)


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    transform: Transform,
    device: torch.device | None = None,
) -> Evaluation:
    """Runs `model`, in evaluation mode, over labeled batches.

    Args:
        model: maps float32 [N, 3, size, size] to logits [N, classes]; left in the mode it was in.
        batches: pairs of uint8 [N, 3, size, size] and int64 [N].
        transform: whose mean and std normalize the images.
        device: where the model is; the CPU unless told.
    """
    device = device or torch.device("cpu")
    was_training = model.training
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in batches:
        counts += measure(model(normalize(images, transform, device)), labels.to(device))
    model.train(was_training)
    return evaluation_of(counts)


class SomeOutputs(nn.Module):
    """A network of which some outputs count, in an order of their own.

    Args:
        network: maps float32 [N, 3, size, size] to logits [N, outputs of the network].
        outputs: their numbers, one for each class, or several whose probabilities add up.
    """

    def __init__(self, network: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.network = network
        self.outputs = [[one] if isinstance(one, int) else list(one) for one in outputs]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        logits: Tensor = self.network(x)
        return torch.stack([logits[:, group].logsumexp(dim=1) for group in self.outputs], dim=1)
