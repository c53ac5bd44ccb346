"""What a network that exists is called: SPEC. Imports nothing heavy: recipes are checked with it."""

from dataclasses import dataclass, field
from typing import Any

from models.config import IMPORT_PATH, LIBRARIES


@dataclass(frozen=True)
class SourceSpec:
    """A network that exists, and what its source does not say of it.

    Attributes:
        spec: `torchvision:NAME`, `timm:NAME`, `timm:local-dir:PATH`, `open_clip:NAME/TAG`, `hf:NAME`, `hf:PATH` or `package.module:factory`.
        weights: a file of weights: safetensors, or of torch without code. None takes what the library downloads or the factory returns.
        class_names: instead of those that the source states; CLIP and trunks without a layer of classes have none.
        templates: of texts for zero-shot, with `{}` for a class name. Without them, CLIP's last layer is zeros, to be trained.
        transform: fields of `Transform` that are set instead of what the source states.
    """

    spec: str
    weights: str | None = None
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    transform: dict[str, Any] = field(default_factory=dict)


def is_spec(text: str) -> bool:
    """Whether that is a SPEC, and not the URI of a model directory."""
    library, colon, _ = text.partition(":")
    return (library in LIBRARIES and bool(colon)) or IMPORT_PATH.fullmatch(text) is not None
