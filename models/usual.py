"""What a training is like where a recipe does not say: how long it is, and at which rates. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import SMALL_RESNETS, ModelConfig


@dataclass(frozen=True)
class Length:
    """How long a training is: so many passes over its data, and at least so many images.

    Attributes:
        epochs: passes.
        images_seen: images processed forward and backward, over all workers.
    """

    epochs: int
    images_seen: int


FROM_RANDOM_WEIGHTS = Length(90, 60_000)
"""Of a network that has learned nothing: the usual 90 epochs of ImageNet. A set of some hundred images has few of them in 90 epochs, and a
network takes some thousand steps to learn anything: so it sees at least 60,000."""
FROM_TRAINED_WEIGHTS = Length(30, 8_000)
"""Of a network that begins with trained weights, as in fine-tuning: the paper's 30 epochs (section 4.1), and at least 8,000 images."""

RATE = 0.1
"""Learning rate per 256 images of any network: "the standard" of section 4.1."""
SMALL_RATE = 2.0
"""That of the small ResNets from random weights: at the small minibatches that they are trained with, they learn too slowly with 0.1 (the
shipped recipes take 2 to 4)."""

SWEPT_RATES = (0.001, 0.004, 0.016, 0.064)
"""Learning rates per 256 images that fine-tuning tries: from four times the paper's 0.00025, as labeled sets smaller than ImageNet have fewer
steps, to near that of a training from random weights."""
SMALL_SWEPT_RATES = (0.02, 0.1, 0.5, 2.0)
"""Those of the small ResNets: what the sweeps of the shipped recipes cover."""


def usual_training(given: Any, model: ModelConfig | None, *, trained: bool = False) -> Any:
    """A training as a recipe gives it, with its length and its learning rate where they are left out.

    A length that is given in part is left as it is: one of `epochs` and `images_seen` alone is the whole length.

    Args:
        given: the section; None is an empty one, and what is no mapping is left as it is.
        model: the network; None where it is not known.
        trained: whether it begins with trained weights.
    """
    if not isinstance(given, Mapping | None):
        return given
    section = dict(given or {})
    if section.get("epochs") is None and section.get("images_seen") is None:
        length = FROM_TRAINED_WEIGHTS if trained else FROM_RANDOM_WEIGHTS
        section |= {"epochs": length.epochs, "images_seen": length.images_seen}
    section.setdefault("learning_rate", SMALL_RATE if _is_small(model) and not trained else RATE)
    return section


def usual_fine_tuning(given: Any, model: ModelConfig | None) -> Any:
    """A fine-tuning as a recipe gives it, with what is left out of its training and of its sweep.

    Args:
        given: the section; None is an empty one, and what is no mapping is left as it is.
        model: the network; None where it is not known.
    """
    if not isinstance(given, Mapping | None):
        return given
    section = dict(given or {})
    sweep = section.get("sweep")
    if isinstance(sweep, Mapping | None):
        section["sweep"] = {"learning_rates": SMALL_SWEPT_RATES if _is_small(model) else SWEPT_RATES, **(sweep or {})}
    return section | {"training": usual_training(section.get("training"), model, trained=True)}


def _is_small(model: ModelConfig | None) -> bool:
    return model is not None and model.architecture in SMALL_RESNETS
