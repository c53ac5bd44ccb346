"""Networks of other libraries by name, built with fresh weights and without a network: `torchvision:`, `timm:`, `open_clip:`, `hf:`.

Names in their state dicts are the library's own. What a library would look up elsewhere (a hub's configuration) stands in the options: `config`
is that configuration as JSON.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn

from cluster.errors import ModelError

Options = Mapping[str, Any]
PACKAGES = {"torchvision": "torchvision", "timm": "timm", "open_clip": "open_clip_torch", "hf": "transformers"}
"""What is installed for each library."""


def library(field: str, value: str, name: str) -> Any:
    """The module of the library `name`.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return importlib.import_module("transformers" if name == "hf" else name)
    except ImportError as error:
        rule = f"needs the package {PACKAGES[name]} ({error})"
        raise ModelError(field, value, rule, "pip install 'tophat[teachers]'") from None


def unknown(field: str, value: str, name: str, names: Iterable[str]) -> ModelError:
    """What is said of a name that a library does not have, with the nearest that it has."""
    near = get_close_matches(name, list(names), n=3, cutoff=0.4)
    fix = f"use one of {', '.join(near)}" if near else "look it up in the library's list of models"
    return ModelError(field, value, f"has no model {name!r}", fix)


def build_named(architecture: str, num_classes: int, options: Options) -> nn.Module:
    """The network `LIBRARY:NAME`, float32, with a fresh last layer.

    Raises:
        ModelError: the library is missing, or does not know the name.
    """
    kind, _, name = architecture.partition(":")
    module = library("architecture", architecture, kind)
    config = json.loads(options["config"]) if "config" in options else {}
    rest = {key: value for key, value in options.items() if key != "config"}
    return _BUILDERS[kind](module, architecture, name, num_classes, config, rest)


def _torchvision(
    module: Any, architecture: str, name: str, num_classes: int, config: Options, options: Options
) -> nn.Module:
    names = module.models.list_models(module=module.models)
    if name not in names:
        raise unknown("architecture", architecture, name, names)
    # Those two have a second output in training, which no loss of ours knows.
    alone = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = module.models.get_model(name, weights=None, num_classes=num_classes, **{**alone, **options})
    return network


def _timm(module: Any, architecture: str, name: str, num_classes: int, config: Options, options: Options) -> nn.Module:
    if not module.is_model(name.partition(".")[0]):
        raise unknown("architecture", architecture, name, module.list_models())
    network: nn.Module = module.create_model(name, pretrained=False, num_classes=num_classes, **config, **options)
    return network


def _open_clip(
    module: Any, architecture: str, name: str, num_classes: int, config: Options, options: Options
) -> nn.Module:
    found = config or module.get_model_config(name)
    if found is None:
        raise unknown("architecture", architecture, name, module.list_models())
    return ImageTower(module, {**found, **options}, num_classes)


def _hf(module: Any, architecture: str, name: str, num_classes: int, config: Options, options: Options) -> nn.Module:
    if name not in module.CONFIG_MAPPING:
        rule = f"is no model type of transformers ({name!r}), such as vit or resnet"
        raise ModelError("architecture", architecture, rule, f"name a type, or use `tophat teacher {architecture}`")
    made = module.AutoConfig.for_model(name, **{**config, **options, "num_labels": num_classes})
    network: nn.Module = module.AutoModelForImageClassification.from_config(made)
    network.register_forward_hook(_logits)
    return network.float()


def _logits(module: nn.Module, inputs: object, output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


_BUILDERS: dict[str, Callable[[Any, str, str, int, Options, Options], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "open_clip": _open_clip,
    "hf": _hf,
}


class ImageTower(nn.Module):
    """CLIP's image tower, `visual`, and a linear layer over its normalized features, `fc`: zero-shot, its weights are the texts' features
    times the temperature (logit scale).

    Args:
        open_clip: the library.
        config: of the model, as `open_clip.get_model_config` gives it; its `text_cfg` does not matter.
        num_classes: outputs.
    """

    def __init__(self, open_clip: Any, config: Options, num_classes: int) -> None:
        super().__init__()
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        no_text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
        whole = open_clip.CLIP(config["embed_dim"], vision, no_text, quick_gelu=config.get("quick_gelu", False))
        self.visual = whole.visual
        self.fc = nn.Linear(config["embed_dim"], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, 3, H, W] to logits [N, num_classes]."""
        seen = self.visual(x)
        features = seen[0] if isinstance(seen, tuple) else seen
        logits: Tensor = self.fc(functional.normalize(features, dim=-1))
        return logits
