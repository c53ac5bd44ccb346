"""torchvision's networks with the weights that it publishes."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import ModelError
from models.libraries import library, unknown
from models.sources.found import Found, patience, read_state, said, state_of_bytes
from models.sources.spec import SourceSpec


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
    if "aux_logits" not in options and name in ("googlenet", "inception_v3"):
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
    """The weights at `url`. Their hash, which the file's name ends in, is checked; the file stays in torch's own cache."""
    cache = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    start_of_hash = cache.stem.rpartition("-")[2]
    try:
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            with patience():
                torch.hub.download_url_to_file(url, str(cache), start_of_hash, progress=sys.stderr.isatty())
        content = cache.read_bytes()
        if not hashlib.sha256(content).hexdigest().startswith(start_of_hash):
            raise ValueError(f"invalid hash value of {cache}")
        return state_of_bytes(content)
    except Exception as error:  # a network and a file have many ways to fail
        fix = f"put that file at {cache} (if it is there, remove it), or give a file of weights (--weights)"
        raise ModelError(field, spec, f"cannot be had from {url} ({said(error)})", fix) from None
