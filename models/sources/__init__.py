import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wanted:
    spec: str
    class_names: Sequence[str] | None = None
    templates: Sequence[str] = ()


def is_spec(text: str) -> bool:
    return re.fullmatch(r"(torchvision|timm|open_clip|hf):.+|\w+(\.\w+)*:\w+(\.\w+)*", text) is not None


def obtain(wanted: Wanted, out: str, field: str) -> Any:
    raise NotImplementedError
