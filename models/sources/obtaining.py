"""A network that exists, as a model directory."""

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cluster.errors import ModelError
from models.architectures import build
from models.card import ModelCard, Origin
from models.config import LIBRARIES, ModelConfig, Transform
from models.directory import mismatch, save
from models.sources import factory_source, hf_source, open_clip_source, timm_source, torchvision_source
from models.sources.found import Found
from models.sources.spec import SourceSpec

_FIND = {
    "torchvision": torchvision_source.find,
    "timm": timm_source.find,
    "open_clip": open_clip_source.find,
    "hf": hf_source.find,
}


def obtain_model(wanted: SourceSpec, out: str, field: str) -> ModelCard:
    """As `models.sources.obtain`."""
    kind, _, name = wanted.spec.partition(":")
    found = _FIND[kind](wanted, name, field) if kind in LIBRARIES else factory_source.find(wanted, wanted.spec, field)
    class_names = list(wanted.class_names) or found.class_names
    if not class_names:
        raise ModelError(field, wanted.spec, "does not say its classes", "give their names (--classes FILE)")
    if not found.headless and found.class_names and len(class_names) != len(found.class_names):
        rule = f"are {len(class_names)} names, and {wanted.spec} has {len(found.class_names)} classes"
        raise ModelError("classes", class_names[0], rule, "give one name for each, in their order")
    config = ModelConfig(
        architecture=found.architecture, options=dict(found.options), transform=_transform(wanted, found, field)
    )
    model = build(config, len(class_names)).eval()
    state = _completed(found, model, len(class_names))
    if problem := mismatch(model, state):
        of = wanted.weights or wanted.spec
        fix = "give the weights of this network" + (", and a name for each class" if wanted.class_names else "")
        raise ModelError("weights", of, f"do not fit {found.architecture}: {problem}", fix)
    own = model.state_dict()
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()})
    source = Origin(spec=wanted.spec, license=found.license, revision=found.revision, url=found.url)
    return save(out, model, config=config, class_names=class_names, metrics={}, provenance={}, source=source)


def _transform(wanted: SourceSpec, found: Found, field: str) -> Transform:
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in found.transform.items()}
    try:
        return Transform.model_validate({"exact": True, **stated, **wanted.transform})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("transform", *map(str, first["loc"])))
        value = first["input"] if first["loc"] else wanted.transform
        raise ModelError(place, value, f"of {wanted.spec}: {first['msg']}", "set it with --set") from None


def _completed(found: Found, model: nn.Module, classes: int) -> dict[str, Tensor]:
    """The weights, with what files lack and nobody trained: counters that only training reads; and zeros for a layer of classes."""
    own = model.state_dict()
    if found.state is None:
        return own
    added = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    if found.headless:
        missing = own.keys() - found.state.keys()
        added |= {name: torch.zeros_like(own[name]) for name in missing if own[name].shape[:1] == (classes,)}
    return {**added, **found.state}
