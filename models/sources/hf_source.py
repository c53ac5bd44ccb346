"""Image classifiers of Hugging Face's transformers: from its hub, its cache or a local folder. Weights are safetensors alone."""

import json
from pathlib import Path
from typing import Any

from cluster.errors import ModelError
from models.libraries import library
from models.sources.found import Found, said
from models.sources.spec import SourceSpec
from models.weights import hub

INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Of Pillow's numbers."""

ELSEWHERE = ("id2label", "label2id", "model_type", "architectures", "transformers_version", "dtype", "problem_type")
"""Fields of a configuration that a card says elsewhere, or that do not shape the network."""

SEEN = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
"""Steps of an image processor that a transform has."""


def find(wanted: SourceSpec, name: str, field: str) -> Found:
    """The network `name`, of the hub or in a folder."""
    hf = library(field, wanted.spec, "hf")
    if wanted.weights:
        rule = f"is no option beside {wanted.spec}: its weights lie beside its configuration"
        raise ModelError("weights", wanted.weights, rule, "name a local folder, hf:PATH")
    try:
        with hub():
            network, loading = hf.AutoModelForImageClassification.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, dtype="float32"
            )
            processor = hf.AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # a network, a file and a folder have many ways to fail
        fix = "put the files into the hub's cache, or name a local folder with config.json, preprocessor_config.json and model.safetensors"
        raise ModelError(field, wanted.spec, f"cannot be had from transformers ({said(error)})", fix) from None
    config = network.config
    if config.model_type == "timm_wrapper":
        raise ModelError(field, wanted.spec, "is a network of timm", f"use timm:hf-hub:{name}")
    missing = sorted(loading["missing_keys"])
    state = {key: value for key, value in network.state_dict().items() if key not in missing}
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in ELSEWHERE}
    return Found(
        f"hf:{config.model_type}",
        _transform(wanted.spec, field, processor),
        [] if missing else [str(config.id2label[number]) for number in range(config.num_labels)],
        state,
        {"config": json.dumps(kept)},
        headless=bool(missing),
        license=_license(name),
        revision=_revision(name),
        url=None if Path(name).is_dir() else f"https://huggingface.co/{name}",
    )


def _transform(spec: str, field: str, processor: Any) -> dict[str, Any]:
    """Of an image processor.

    Raises:
        ModelError: it does what a transform does not.
    """
    stated = processor.to_dict()
    other = [key for key, value in stated.items() if key.startswith("do_") and value and key not in SEEN]
    other += [key for key in ("include_top", "rescale_offset") if stated.get(key)]
    if not (stated.get("do_resize") and stated.get("do_rescale") and abs(stated["rescale_factor"] * 255 - 1) < 1e-6):
        other.append("no resize, or another scale than 1/255")
    sides = {key: value for key, value in (stated.get("size") or {}).items() if value}
    crop = stated.get("crop_size") if stated.get("do_center_crop") else None
    made: dict[str, Any] = {}
    if set(sides) == {"shortest_edge"}:
        edge, share = sides["shortest_edge"], stated.get("crop_pct")
        if share and edge >= 384:
            made = {"size": edge, "fit": "squash"}
        elif share:
            made = {"size": edge, "resize": int(edge / share)}
        elif crop and crop["height"] == crop["width"]:
            made = {"size": crop["width"], "resize": edge}
    elif set(sides) == {"height", "width"} and sides["height"] == sides["width"]:
        made = {"size": sides["width"], "fit": "squash"}
        if crop and (crop["height"], crop["width"]) != (sides["height"], sides["width"]):
            made = {}
    if other or not made:
        rule = (
            f"has an image processor that is no transform of ours: {', '.join(other) or f'size {sides}, crop {crop}'}"
        )
        raise ModelError(field, spec, rule, "use another model")
    normalized = stated.get("do_normalize")
    return {
        **made,
        "interpolation": INTERPOLATION.get(int(stated["resample"]), str(stated["resample"])),
        "mean": tuple(stated["image_mean"]) if normalized else (0.0,) * 3,
        "std": tuple(stated["image_std"]) if normalized else (1.0,) * 3,
    }


def _license(name: str) -> str | None:
    """As the model's card states it, where that can be had."""
    from huggingface_hub import ModelCard

    place = Path(name, "README.md")
    if Path(name).is_dir() and not place.is_file():
        return None
    try:
        with hub():
            stated = ModelCard.load(str(place) if place.is_file() else name).data.to_dict().get("license")
    except Exception:  # a hub that is not reached; a card may be no YAML
        return None
    return None if stated is None else str(stated)


def _revision(name: str) -> str | None:
    """The commit in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return None
    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None
