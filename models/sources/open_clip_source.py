"""CLIP's image towers, with the texts' features of the classes as their last layer (zero-shot)."""

import json
from typing import Any

import torch
from torch import Tensor

from cluster.errors import ModelError
from models.libraries import library, unknown
from models.sources.found import Found, said
from models.sources.spec import SourceSpec
from models.weights import hub

FITS = {"shortest": "crop", "squash": "squash"}
"""What each `resize_mode` of open_clip is called here; its `longest` pads with black, which none here does."""


def find(wanted: SourceSpec, name: str, field: str) -> Found:
    """The network `NAME/TAG`, or `NAME` with a file of weights."""
    clip = library(field, wanted.spec, "open_clip")
    name, _, tag = name.partition("/")
    config = clip.get_model_config(name)
    if config is None:
        raise unknown(field, wanted.spec, name, clip.list_models())
    tags = clip.list_pretrained_tags_by_model(name)
    if not wanted.weights and tag not in tags:
        fix = f"use open_clip:{name}/TAG, TAG one of {', '.join(tags) or 'none'}, or give a file of weights (--weights)"
        raise ModelError(field, wanted.spec, f"has no weights {tag!r}" if tag else "needs weights", fix)
    if not wanted.class_names:
        raise ModelError(field, wanted.spec, "has no classes of its own", "give their names (--classes FILE)")
    try:
        with hub():
            model = clip.create_model(name, pretrained=wanted.weights or tag, weights_only=True)
            layer = _zero_shot(clip, model, name, wanted) if wanted.templates else {}
    except Exception as error:  # a network and a file have many ways to fail
        fix = "put the files into the cache, or give a file of weights without code (--weights)"
        raise ModelError(field, wanted.spec, f"cannot be had from open_clip ({said(error)})", fix) from None
    seen, published = model.visual.preprocess_cfg, clip.get_pretrained_cfg(name, tag) if tag else {}
    size = seen["size"] if isinstance(seen["size"], int) else seen["size"][0]
    if seen["resize_mode"] not in FITS or (not isinstance(seen["size"], int) and len(set(seen["size"])) != 1):
        raise ModelError(field, wanted.spec, f"takes an input that is none of ours: {seen}", "use another model")
    tower = {f"visual.{key}": value for key, value in model.visual.state_dict().items()}
    kept = {"embed_dim": config["embed_dim"], "vision_cfg": config["vision_cfg"]}
    place = published.get("hf_hub", "").rstrip("/")
    return Found(
        f"open_clip:{name}",
        {
            "size": size,
            "resize": size,
            "fit": FITS[seen["resize_mode"]],
            "interpolation": seen["interpolation"],
            "mean": seen["mean"],
            "std": seen["std"],
        },
        list(wanted.class_names),
        {**tower, **layer},
        {"config": json.dumps({**kept, "quick_gelu": config.get("quick_gelu", False)})},
        headless=not layer,
        revision=None if wanted.weights else tag,
        url=None if wanted.weights else published.get("url") or (f"https://huggingface.co/{place}" if place else None),
    )


def _zero_shot(clip: Any, model: Any, name: str, wanted: SourceSpec) -> dict[str, Tensor]:
    """The last layer: what the texts of each class have in common, times the temperature, so that the softmax is the library's."""
    model.eval()
    tokenizer = clip.get_tokenizer(name)
    texts = clip.build_zero_shot_classifier(model, tokenizer, list(wanted.class_names), list(wanted.templates))
    with torch.no_grad():
        weight = (model.logit_scale.exp() * texts).T.contiguous()
        offset = 0.0 if model.logit_bias is None else float(model.logit_bias)
    return {"fc.weight": weight, "fc.bias": torch.full((len(wanted.class_names),), offset)}
