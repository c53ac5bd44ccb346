"""A model directory's card, `model.json`: what the weights beside it are. Reading it needs no torch."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from cluster import storage
from cluster.errors import MissingError, ModelError
from cluster.section import Section
from cluster.store import fingerprint
from models.config import ModelConfig

CARD = "model.json"
WEIGHTS = "model.safetensors"


class Weights(Section):
    """The file of weights that a card speaks of."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole file."""
    size: Annotated[int, Field(ge=0)]
    """In bytes."""


class Origin(Section):
    """Where a network that exists was found, in its source's own words."""

    spec: str
    """What was asked for, such as `timm:resnet18`."""
    license: str | None = None
    """Of the weights (of a factory: of its package), where it is stated."""
    revision: str | None = None
    """Which weights of that name: a tag, a version, a commit."""
    url: str | None = None
    """Where they are published."""

    def __str__(self) -> str:
        revision = f" ({self.revision})" if self.revision else ""
        return f"{self.spec}{revision}, license {self.license or 'not stated'}"


class ModelCard(Section):
    """The content of `model.json`."""

    format: Literal[1] = 1
    """Version of this format."""
    model: ModelConfig
    """Architecture, its options and the input transform."""
    class_names: Annotated[list[str], Field(min_length=1)]
    """Class i of the output is class_names[i]."""
    parameters: Annotated[int, Field(ge=0)]
    """How many numbers are trained."""
    metrics: Annotated[dict[str, float | None], Field(default_factory=dict)]
    """What was measured, such as top1 in [0, 1]; none where a figure is not finite."""
    provenance: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Where it comes from: run, stage, data, seed."""
    source: Origin | None = None
    """Where it was found, of a network that others trained."""
    weights: Weights
    """The file beside the card."""

    @property
    def fingerprint(self) -> str:
        """Of all that decides what the model says of an image: network, input, classes and weights."""
        return fingerprint([self.model.deciding(), self.class_names, self.weights.sha256])


def read_card(uri: str) -> ModelCard:
    """The card of the model directory `uri`.

    Raises:
        ModelError: the directory has no card (it is missing or was never finished), or one that cannot be read.
        StorageError: the store refuses.
    """
    location = storage.join(uri, CARD)
    try:
        data = storage.read_bytes(location)
    except MissingError:
        raise ModelError("model", uri, f"has no {CARD}", "name a finished model directory") from None
    try:
        return ModelCard.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ModelError("model", uri, f"has a {CARD} with a bad {place} ({first['msg']})", "save it again") from None
    except ValueError as error:
        raise ModelError("model", uri, f"has a {CARD} that is not JSON ({error})", "save it again") from None


def read_weights(uri: str, card: ModelCard) -> bytes:
    """The content of the file of weights, checked against the card.

    Raises:
        ModelError: it is missing, or another one.
        StorageError: the store refuses.
    """
    try:
        content = storage.read_bytes(storage.join(uri, WEIGHTS))
    except MissingError:
        raise ModelError("model", uri, f"has a {CARD} and no {WEIGHTS}", "copy or save it again") from None
    if len(content) != card.weights.size:
        rule = f"has a {WEIGHTS} of {len(content)} bytes where its card says {card.weights.size}"
        raise ModelError("model", uri, rule, "copy or save it again")
    if hashlib.sha256(content).hexdigest() != card.weights.sha256:
        raise ModelError("model", uri, f"has a {WEIGHTS} whose hash is not its card's", "copy or save it again")
    return content
