"""Files of weights that others publish; and torchvision's ResNet-18, trained on ImageNet, as a model directory: what images are compared with by
default (supplement 5)."""

import contextlib
import hashlib
import io
import logging
import pickle
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
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
    fix = f"mend that (if {cache_of(URL)} is at fault, remove it), or name a model directory"
    try:
        state = published(URL)
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


def published(url: str) -> dict[str, Tensor]:
    """The state dict that torchvision publishes at `url`, in a file whose name ends in the beginning of its SHA-256, which is checked. The
    file stays in torch's own cache.

    Raises:
        Exception: a network and a file have many ways to fail.
    """
    cache = cache_of(url)
    start_of_hash = cache.stem.rpartition("-")[2]
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with patience():
            torch.hub.download_url_to_file(url, str(cache), start_of_hash, progress=sys.stderr.isatty())
    content = cache.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(start_of_hash):
        raise ValueError(f"invalid hash value of {cache}")
    return state_of_bytes(content)


def cache_of(url: str) -> Path:
    """Where torch keeps what it has from `url`."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(url).name)


def state_of_bytes(content: bytes) -> dict[str, Tensor]:
    """The state dict in the bytes of a file: safetensors, or torch's own, read by the unpickler that makes tensors and runs nothing. Scripts
    that train keep it at `state_dict` or `model`, and as of a `module`.

    Raises:
        Exception: they hold none.
    """
    try:
        state: Any = deserialize(content)
    except SafetensorError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about a file of another format than its own
            try:
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:  # whose words tell how to run the code
                raise ValueError("a pickle that holds more than tensors, which may be code") from None
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError("the file holds no state dict")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


@contextlib.contextmanager
def patience(seconds: float = SILENCE) -> Iterator[None]:
    """For what connects without a time limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


ANSWER = 5.0
"""Seconds in which a hub takes a connection, or is taken to be out of reach."""


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """For a library that asks Hugging Face's hub: in silence, and where the hub cannot be reached, of its cache alone. (Left to itself it
    tries for up to a minute.)"""
    from huggingface_hub import constants

    before, quiet = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = before or not _reached(constants.ENDPOINT)
    logging.disable(logging.CRITICAL)
    try:
        with patience():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.disable(quiet)


def _reached(url: str) -> bool:
    if getproxies():
        return True  # by another way than ours
    place = urlsplit(url)
    try:
        socket.create_connection((str(place.hostname), place.port or 443), ANSWER).close()
    except OSError:
        return False
    return True
