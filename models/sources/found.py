"""What a source says of a network, and the reading of files of weights."""

import contextlib
import io
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from torch import Tensor

from cluster.errors import ModelError, one_line

SILENCE = 60.0
"""Seconds after which a server that says nothing is given up."""


@dataclass(frozen=True)
class Found:
    """A network, as its source has it.

    Attributes:
        architecture: by which `models.architectures.build` builds it again.
        options: of the architecture.
        transform: fields of `Transform`, as the source states them.
        class_names: none where the source has none.
        state: the weights; None are those that a factory gives its network.
        headless: whether the weights lack the layer of classes.
        license: where stated.
        revision: which weights of that name.
        url: where they are published.
    """

    architecture: str
    transform: Mapping[str, Any]
    class_names: list[str]
    state: Mapping[str, Tensor] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    headless: bool = False
    license: str | None = None
    revision: str | None = None
    url: str | None = None


def said(error: BaseException) -> str:
    """What an error of a library says, short, on one line."""
    return f"{type(error).__name__}: {one_line(str(error))[:200]}".rstrip(": ")


def read_state(field: str, path: str) -> dict[str, Tensor]:
    """The state dict in a file: safetensors, or torch's own, read by the unpickler that makes tensors and runs nothing.

    Raises:
        ModelError: the file is missing, or holds no state dict, or code.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(field, path, f"cannot be read ({error.strerror})", "name a file of weights") from None
    try:
        return state_of_bytes(content)
    except Exception as error:  # unpickling hostile bytes has many ways to fail
        rule = f"holds no weights alone ({said(error)})"
        raise ModelError(field, path, rule, "save the state dict again, as safetensors") from None


def state_of_bytes(content: bytes) -> dict[str, Tensor]:
    """The state dict in the bytes of a file; training scripts keep it at `state_dict` or `model`, and as of a `module`.

    Raises:
        Exception: they hold none.
    """
    try:
        state: Any = deserialize(content)
    except SafetensorError:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
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
