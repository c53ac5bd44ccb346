"""torchvision's ResNet-18, trained on ImageNet, as a model directory: what images are compared with by default (supplement 5)."""

import contextlib
import hashlib
import io
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from cluster.errors import ModelError, one_line
from models.architectures import build
from models.config import ModelConfig
from models.directory import mismatch, save

NAME = "resnet18"
URL = ResNet18_Weights.IMAGENET1K_V1.url
"""Of the weights. The file's name ends in the beginning of its SHA-256."""

SILENCE = 60.0
"""Seconds after which a server that says nothing is given up."""


def publish_resnet18(uri: str, field: str) -> None:
    """Makes the model directory `uri`.

    torchvision publishes a pickle. Its hash is checked, then torch reads it with the unpickler that makes tensors and runs nothing, and what
    is kept has none. The file stays in torch's own cache.

    Args:
        uri: the directory.
        field: what asked for it, for messages.

    Raises:
        ModelError: the weights cannot be had, or are no ResNet-18's.
        StorageError: the store refuses.
    """
    cache = Path(torch.hub.get_dir(), "checkpoints", Path(URL).name)
    fix = f"mend that (if {cache} is at fault, remove it), or name a model directory"
    try:
        state = _weights(cache)
    except Exception as error:  # a network and a file have many ways to fail
        rule = f"cannot be had from {URL} ({one_line(str(error))[:200]})"
        raise ModelError(field, NAME, rule, fix) from None
    config, categories = ModelConfig(architecture=NAME), ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    model = build(config, len(categories))
    # Files older than these counters, which only training reads, lack them.
    state = {name: own for name, own in model.state_dict().items() if name.endswith("num_batches_tracked")} | state
    if problem := mismatch(model, state):
        raise ModelError(field, NAME, f"is another network's at {URL}: {problem}", fix)
    model.load_state_dict(state)
    save(uri, model, config=config, class_names=list(categories), metrics={}, provenance={"weights": URL})


def _weights(cache: Path) -> dict[str, Tensor]:
    """The state dict in the file `cache`, which is downloaded where it is not there."""
    start_of_hash = cache.stem.rpartition("-")[2]
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _patience(SILENCE):
            torch.hub.download_url_to_file(URL, str(cache), start_of_hash, progress=sys.stderr.isatty())
    content = cache.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(start_of_hash):
        raise ValueError(f"invalid hash value of {cache}")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError("the file holds no state dict")
    return {str(name): value for name, value in state.items()}


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """For what connects without a time limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
