"""torchvision's networks with the weights that it publishes."""

from typing import Any

from torch import Tensor

from cluster.errors import ModelError
from models.libraries import library, unknown
from models.sources.found import Found, read_state, said
from models.sources.spec import SourceSpec
from models.weights import cache_of, published


def find(wanted: SourceSpec, name: str, field: str) -> Found:
    """The network `name` with its default weights, or those of a file."""
    models = library(field, wanted.spec, "torchvision").models
    names = models.list_models(module=models)
    if name not in names:
        raise unknown(field, wanted.spec, name, names)
    default: Any = models.get_model_weights(name).DEFAULT
    seen, meta = default.transforms(), default.meta
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["transform_input"] = True
    if name.startswith("vit_"):
        options["image_size"] = meta["min_size"][0]
    state = read_state("weights", wanted.weights) if wanted.weights else _published(field, wanted.spec, default.url)
    if name in ("googlenet", "inception_v3"):  # built without their second output
        state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    return Found(
        f"torchvision:{name}",
        {
            "size": seen.crop_size[0],
            "resize": seen.resize_size[0],
            "interpolation": seen.interpolation.value,
            "mean": seen.mean,
            "std": seen.std,
        },
        list(meta["categories"]),
        state,
        options,
        license=meta.get("license"),
        revision=None if wanted.weights else default.name,
        url=None if wanted.weights else default.url,
    )


def _published(field: str, spec: str, url: str) -> dict[str, Tensor]:
    try:
        return published(url)
    except Exception as error:  # a network and a file have many ways to fail
        fix = f"put that file at {cache_of(url)} (if it is there, remove it), or give a file of weights (--weights)"
        raise ModelError(field, spec, f"cannot be had from {url} ({said(error)})", fix) from None
