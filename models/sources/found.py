"""What a source says of a network, and the reading of files of weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.errors import ModelError, one_line
from models.weights import state_of_bytes


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
