"""A trained network as a fast function from decoded images to their best classes, with the predictions of the plain network."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from cluster.errors import ModelError
from models.config import CPU_BATCH, GPU_BATCH, Outputs, Views
from models.directory import load
from models.features import Features
from models.inputs.image import normalize

Precision = Literal["float32", "bfloat16", "float16"]

TOLERANCE = 1e-5
"""By how much folding may move a softmax; a network that it moves more is used as it is."""


class Prediction(NamedTuple):
    """Of N images: the P best `classes`, int32 [N, P], with their `scores`, float32 [N, P], best first; `features` float16 [N, d]; the
    `label_scores`, float32 [N], of the classes that were asked for."""

    classes: NDArray[np.int32]
    scores: NDArray[np.float32]
    features: NDArray[np.float16] | None
    label_scores: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Inference:
    """How to predict.

    Attributes:
        classes_per_image: P.
        outputs: the network's outputs that count, in the order of the classes to report: class i is `outputs[i]`. The softmax
            is over all outputs. None takes every output as the class of its own number.
        batch_size: images of a forward pass; by default what suits the device.
        views: which crops of an image are scored; their softmax (or logits) is averaged, as the paper does over the clips of
            a video (section 4.3). `center`; `mirrored`: also its mirror image; `five`: the center and the four corners of a
            square of `Transform.resize`; `ten`: those and their mirror images.
        logits: scores are what enters the softmax and not what leaves it (section 3.2, "raw predictions before applying the
            softmax").
        precision: number format of the forward pass (autocast); the weights stay float32.
        compile: whether `torch.compile` makes the kernels, for batches of `batch_size`; smaller ones are filled up with zeros.
        features: whether the pooled features of the first view, the center, come with the prediction.
        threads: of a forward pass on CPUs.
        gpu: whether a GPU is used; there must be one.
    """

    classes_per_image: int
    outputs: Outputs | None = None
    batch_size: int | None = None
    views: Views = "center"
    logits: bool = False
    precision: Precision = "float32"
    compile: bool = False
    features: bool = False
    threads: int = 1
    gpu: bool = False


def folded(model: nn.Module, size: int) -> nn.Module:
    """The network with its batch normalizations in its convolutions, where that leaves its predictions as they are; else itself.

    Args:
        model: in evaluation mode.
        size: side of its images.
    """
    with suppress(Exception):  # a user's network may not be traceable, or be another one when it is traced
        candidate = fuse(model)
        if _agree(model, candidate, size):
            return candidate
    return model


def _agree(one: nn.Module, other: nn.Module, size: int) -> bool:
    """Whether two networks say the same of a few images of noise."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return bool((one(images).softmax(1) - other(images).softmax(1)).abs().max() <= TOLERANCE)


def _compiled(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network with kernels of its own, which are made at its first batch; on a CPU the weights are constants of the kernels, laid out
    for them once and not in each pass."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(model)
    if device.type != "cpu":
        return compiled
    import torch._inductor.config as inductor  # takes a second

    def frozen(batch: Tensor) -> Tensor:
        with inductor.patch(freezing=True):  # of the thread that makes the kernels; an option of `compile` does nothing
            return compiled(batch)

    return frozen


def _even(images: int, batch_size: int) -> int:
    """Images of each batch but the last, so that they differ little."""
    return -(-images // -(-images // batch_size))


def _few_sizes(batch_size: int) -> list[int]:
    """Batches of a GPU: full, and a half, a quarter and an eighth of it, ascending."""
    return sorted({max(1, batch_size // part) for part in (8, 4, 2, 1)})


class _Picked:
    """The scores of classes, out of those of a network's outputs."""

    def __init__(self, outputs: Outputs, device: torch.device) -> None:
        groups = [(one,) if isinstance(one, int) else one for one in outputs]
        self.numbers = torch.tensor([number for group in groups for number in group], device=device)
        places = [place for place, group in enumerate(groups) for _ in group]
        self._places = torch.tensor(places, device=device) if len(places) > len(groups) else None
        self._classes = len(groups)

    def of(self, scores: Tensor, logits: bool) -> Tensor:
        """float32 [N, outputs] to float32 [N, classes]."""
        picked = scores[:, self.numbers]
        if self._places is None:
            return picked
        most = picked.amax(dim=1, keepdim=True) if logits else None
        parts = picked if most is None else (picked - most).exp()
        summed = picked.new_zeros(len(picked), self._classes).index_add_(1, self._places, parts)
        return summed if most is None else summed.log() + most


class Predictor:
    """A model directory's network, ready for as many images as come.

    It sets the number of torch's threads, and that a GPU's convolutions of float32 are not of TF32, for the whole process. Several threads
    may call it: one passes the network at a time, but on a GPU each waits for its own answers, while the batches of
    the next one are copied and queued.

    Args:
        uri: of the model directory.
        how: what is wanted.
        content: of the file of weights, where it has been read already.

    Raises:
        ModelError: the directory cannot be used, has fewer outputs than are wanted, or features are wanted of a network whose last
            layer is not linear.
    """

    def __init__(self, uri: str, how: Inference, content: bytes | None = None) -> None:
        self._device = torch.device("cuda" if how.gpu else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(how.threads)
        loaded = load(uri, content)
        if self._device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # of convolutions, where torch has it on
        self.how, self.transform = how, loaded.config.transform
        self._outputs: _Picked | None = None
        if how.outputs is not None:
            self._outputs = _Picked(how.outputs, self._device)
            if missing := {*self._outputs.numbers.tolist()} - {*range(len(loaded.class_names))}:
                rule = f"has {len(loaded.class_names)} outputs, and output {max(missing)} is wanted"
                raise ModelError("model", uri, rule, "name outputs that it has")
        self.batch_size = how.batch_size or (CPU_BATCH if self._device.type == "cpu" else GPU_BATCH)
        model = folded(loaded.model, self.transform.size).requires_grad_(False)
        model = model.to(self._device).to(memory_format=torch.channels_last)
        self._features = Features(uri, model) if how.features else None
        self._model: Any = _compiled(model, self._device) if how.compile else model
        # A batch is filled up with zeros to one of these: compiled kernels are made for one, and cuDNN plans for each of them.
        self._sizes = [self.batch_size] if how.compile else _few_sizes(self.batch_size) if how.gpu else []
        self._passing = Lock()
        self._copying = torch.cuda.Stream(self._device) if how.gpu else None  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None) -> Prediction:
        """The best classes of decoded images.

        Args:
            images: uint8 [N, 3, side, side], `side` that of `Transform.seen_by`. Nothing is written to them.
            labels: int64 [N], classes of which the scores are wanted too, one for each image.
        """
        if not len(images):
            empty = None if self._features is None else np.empty((0, self._features.width), np.float16)
            size = (0, self.how.classes_per_image)
            of_labels = None if labels is None else np.empty(0, np.float32)
            return Prediction(np.empty(size, np.int32), np.empty(size, np.float32), empty, of_labels)
        with self._passing:
            passed = self._passed(images, labels)
            answers = [None if one is None else one.to("cpu", non_blocking=True) for one in passed]
            answered = None
            if self._copying is not None:
                answered = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                answered.record()
        if answered is not None:
            answered.synchronize()  # while other threads' images pass
        classes, scores, features, of_labels = (None if one is None else one.numpy() for one in answers)
        return Prediction(cast("NDArray[np.int32]", classes), cast("NDArray[np.float32]", scores), features, of_labels)

    def _passed(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Classes, scores, features and scores of labels, as in `Prediction`, on the device; on a GPU, nothing here waits for it."""
        tops, features, of_labels = [], [], []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Ray's memory is not
            every = torch.from_numpy(images)
        step = self.batch_size if self._sizes else _even(len(every), self.batch_size)
        for start in range(0, len(every), step):
            scores, seen = self._scores(every[start : start + step])
            tops.append(scores.topk(self.how.classes_per_image, dim=1))
            features.append(seen)
            if labels is not None:
                wanted = torch.tensor(labels[start : start + step], device=self._device)
                of_labels.append(scores.gather(1, wanted[:, None])[:, 0])
        kept = [seen for seen in features if seen is not None]
        classes = torch.cat([top.indices for top in tops]).int()
        values = torch.cat([top.values for top in tops])
        return classes, values, torch.cat(kept) if kept else None, torch.cat(of_labels) if of_labels else None

    def _scores(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of one batch: the score of every class that counts, float32 [N, C], and the features of the first view, float16 [N, d]; on the device."""
        batch = normalize(self._moved(images), self.transform, self._device)
        outputs, seen = [], []
        for view in _crops(batch, self.transform.size, self.how.views):
            logits = self._forward(view)
            outputs.append(logits if self.how.logits else logits.softmax(dim=1))
            if self._features is not None:
                seen.append(self._features.take()[: len(batch)])
        scores = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0)
        if self._outputs is not None:
            scores = self._outputs.of(scores, self.how.logits)
        return scores, seen[0] if seen else None

    def _moved(self, images: Tensor) -> Tensor:
        """Images as one batch on the device; a GPU copies them while it computes what was asked of it before."""
        if self._copying is None:
            return images
        with torch.cuda.stream(self._copying):
            moved = images.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copying)
        moved.record_stream(computing)
        return moved

    def _forward(self, batch: Tensor) -> Tensor:
        """Logits, float32 [N, C]."""
        rows = len(batch)
        size = next((size for size in self._sizes if size >= rows), rows)
        if rows < size:
            padding = batch.new_zeros((size - rows, *batch.shape[1:]))
            batch = torch.cat([batch, padding]).contiguous(memory_format=torch.channels_last)
        reduced = self.how.precision != "float32"
        with torch.autocast(
            self._device.type, getattr(torch, self.how.precision) if reduced else None, enabled=reduced
        ):
            logits: Tensor = self._model(batch)
        return logits[:rows].float()


def _crops(batch: Tensor, size: int, views: Views) -> list[Tensor]:
    """The views of [N, 3, side, side], each [N, 3, size, size] in channels_last, the center first."""
    if views in ("five", "ten"):
        far = batch.shape[-1] - size
        middle = round(far / 2)
        corners = [(middle, middle), (0, 0), (0, far), (far, 0), (far, far)]
        crops = [batch[:, :, top : top + size, left : left + size] for top, left in corners]
    else:
        crops = [batch]
    if views in ("mirrored", "ten"):
        crops += [crop.flip(3) for crop in crops]
    return [crop.contiguous(memory_format=torch.channels_last) for crop in crops]
