"""timm's networks with their weights: from its hub, its cache or a local folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ModelError
from models.libraries import library, unknown
from models.sources.found import Found, read_state, said
from models.sources.spec import SourceSpec
from models.weights import hub

FITS = {"center": "crop", "squash": "squash", "border": "pad"}
"""What each `crop_mode` of timm is called here."""


def find(wanted: SourceSpec, name: str, field: str) -> Found:
    """The network `name`: of timm's list, or `local-dir:PATH`, or `hf-hub:NAME`."""
    timm = library(field, wanted.spec, "timm")
    place, _, folder = name.partition(":")
    if place == "local-dir" and not Path(folder, "config.json").is_file():
        fix = "name a folder as timm's save_for_hf writes it: config.json and model.safetensors"
        raise ModelError(field, wanted.spec, "is no folder with a config.json", fix)
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise unknown(field, wanted.spec, name, timm.list_models())
    try:
        with hub():
            network = timm.create_model(name, pretrained=wanted.weights is None)
    except Exception as error:  # a network, a file and a folder have many ways to fail
        fix = "put the files into the cache, or give timm:local-dir:PATH, or a file of weights (--weights)"
        raise ModelError(field, wanted.spec, f"cannot be had from timm ({said(error)})", fix) from None
    stated, data = network.pretrained_cfg, timm.data.resolve_model_data_config(network)
    arguments = json.loads(Path(folder, "config.json").read_text()).get("model_args", {}) if folder else {}
    arguments.pop("num_classes", None)
    kept = timm.models.filter_pretrained_cfg(stated, remove_source=True)
    kept = {key: value for key, value in kept.items() if key not in ("label_names", "label_descriptions")}
    place = stated.get("hf_hub_id")
    return Found(
        f"timm:{stated['architecture']}",
        _transform(wanted.spec, field, data),
        _class_names(timm, stated, network.num_classes),
        read_state("weights", wanted.weights) if wanted.weights else network.state_dict(),
        {"config": json.dumps({**arguments, "pretrained_cfg": kept})},
        headless=network.num_classes == 0,
        license=stated.get("license"),
        revision=None if wanted.weights else stated.get("tag") or None,
        url=None if wanted.weights else stated.get("url") or (place and f"https://huggingface.co/{place}") or None,
    )


def _transform(spec: str, field: str, data: Mapping[str, Any]) -> dict[str, Any]:
    channels, height, width = data["input_size"]
    fit, share = FITS.get(data["crop_mode"]), data["crop_pct"]
    if channels != 3 or height != width or fit is None or (fit != "crop" and share != 1):
        rule = f"takes an input that is none of ours: {data}"
        raise ModelError(field, spec, rule, "use another model")
    return {
        "size": width,
        "resize": math.floor(width / share),
        "fit": fit,
        "interpolation": data["interpolation"],
        "mean": data["mean"],
        "std": data["std"],
    }


def _class_names(timm: Any, stated: Mapping[str, Any], classes: int) -> list[str]:
    """Those of the configuration, or of the ImageNet of that many classes."""
    names, texts = stated.get("label_names"), stated.get("label_descriptions") or {}
    if names and len(names) == classes:
        return [str(texts.get(name, name)) for name in names]
    subset = timm.data.infer_imagenet_subset(stated) if classes and stated.get("num_classes") == classes else None
    return list(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else []
