"""Model directories: `model.safetensors` + `model.json`. Nothing in them is a pickle.

Names in the state dict are the network's own, which for the named architectures are torchvision's. The card is published
last, so that a directory with a card is complete; it holds the size and hash of the weights, which loading checks.
"""

import hashlib
import math
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster import storage
from cluster.errors import ModelError
from models.architectures import build
from models.card import CARD, WEIGHTS, ModelCard, Origin, Weights, read_card, read_weights
from models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to use: `model` is float32, on the CPU, in evaluation mode."""

    model: nn.Module
    config: ModelConfig
    class_names: list[str]
    metrics: dict[str, float | None]
    provenance: dict[str, Any]


def save(
    uri: str,
    model: nn.Module,
    *,
    config: ModelConfig,
    class_names: list[str],
    metrics: dict[str, float],
    provenance: dict[str, Any],
    source: Origin | None = None,
) -> ModelCard:
    """Publishes a model directory: the weights, then the card.

    Args:
        uri: the directory; files of an earlier model there are replaced.
        model: the network, as `build(config, len(class_names))` gives it.
        config: how to build it again.
        class_names: class i of the output is class_names[i].
        metrics: figures of the model.
        provenance: JSON values that say where it comes from.
        source: where it was found, if others trained it.

    Raises:
        StorageError: the store refuses.
    """
    with tempfile.TemporaryDirectory(prefix="tophat-") as folder:
        path = Path(folder, WEIGHTS)
        save_file(state_of(model), path, metadata={"format": "pt"})
        weights = Weights(sha256=_sha256(path), size=path.stat().st_size)
        card = ModelCard(
            model=config,
            class_names=class_names,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            metrics={name: value if math.isfinite(value) else None for name, value in metrics.items()},
            provenance=provenance,
            source=source,
            weights=weights,
        )
        storage.publish(storage.join(uri, WEIGHTS), path)
    storage.publish(storage.join(uri, CARD), card.model_dump_json(indent=1).encode())
    return card


def load(uri: str, content: bytes | None = None) -> LoadedModel:
    """The model in the directory `uri`.

    Args:
        uri: the directory.
        content: of its file of weights, where `read_weights` has read it already.

    A card whose architecture is an import path makes this import and call it: load such directories from sources you
    would run code from.

    Raises:
        ModelError: missing, corrupt, or weights that do not fit the architecture.
        StorageError: the store refuses.
    """
    card = read_card(uri)
    try:
        state = deserialize(content or read_weights(uri, card))
    except SafetensorError as error:
        rule = f"has a {WEIGHTS} that is no safetensors file ({error})"
        raise ModelError("model", uri, rule, "save it again") from None
    named = ":" not in card.model.architecture  # a user's factory may do more than fill parameters
    with torch.device("meta") if named else nullcontext():
        model = build(card.model, len(card.class_names))
    if problem := mismatch(model, state):
        raise ModelError(
            "model", uri, f"has weights that do not fit {card.model.architecture}: {problem}", "save it again"
        )
    own = model.state_dict()
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()}, assign=named)
    return LoadedModel(model.eval(), card.model, card.class_names, card.metrics, card.provenance)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as tensors that can be written: on the CPU, contiguous, each with memory of its own."""
    return {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in model.state_dict().items()
    }


def mismatch(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Why `state` does not fit `model`, by the first name that differs; empty if it fits."""
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            return f"{name} is missing"
        if name not in own:
            return f"{name} is not in the network"
        if own[name].shape != state[name].shape:
            return f"{name} is {list(state[name].shape)} and should be {list(own[name].shape)}"
    return ""


def start_from(model: nn.Module, initial: str, class_names: list[str], *, fresh_head: bool = False) -> None:
    """Loads the weights of the model directory `initial` into `model`, for fine-tuning.

    If it knows all of `class_names`, in whatever order and beside whatever others, the last layer starts from what it has for them;
    else, and with `fresh_head`, the last layer stays as it is in `model`.

    Raises:
        ModelError: it cannot be loaded, or is of another architecture.
    """
    loaded = load(initial)
    state = loaded.model.state_dict()
    own = model.state_dict()
    if fresh_head or loaded.class_names != class_names:
        number = {name: i for i, name in enumerate(loaded.class_names)}
        known = not fresh_head and all(name in number for name in class_names)
        rows = torch.tensor([number.get(name, 0) for name in class_names])
        for name in _names_in(model, last_layer(model, len(class_names))):
            of_classes = name in state and state[name].ndim > 0 and len(state[name]) == len(loaded.class_names)
            state[name] = state[name][rows] if known and of_classes else own[name]
    if problem := mismatch(model, state):
        raise ModelError(
            "initial", initial, f"does not fit the network to train: {problem}", "use one of the same architecture"
        )
    model.load_state_dict(state)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_layer(model: nn.Module, outputs: int) -> nn.Module | None:
    """The last layer with `outputs` outputs; None where there is none."""
    layers = [
        module
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim > 1 and len(weight) == outputs
    ]
    return layers[-1] if layers else None


def _names_in(model: nn.Module, layer: nn.Module | None) -> list[str]:
    """Names, in the state dict of the model, of what a layer of it has."""
    if layer is None:
        return []
    prefix = next(name for name, module in model.named_modules() if module is layer)
    return [name for name in model.state_dict() if name.startswith(f"{prefix}." if prefix else "")]
