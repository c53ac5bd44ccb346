"""A linear head on the features of a network that exists: logistic regression, its L2 chosen on held-out images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import from_numpy, nn

from cluster.errors import ModelError
from models.architectures import build
from models.config import ModelConfig
from models.directory import load, start_from

STRENGTHS = tuple(10.0**power for power in range(-6, 4))
"""Inverse strengths of L2 that are tried, as scikit-learn's `C`, for features whose variance is 1 on average."""
FOLDS = 5
"""Parts of D, each of which is held out once."""
ITERATIONS = 2000
"""Of L-BFGS, at most."""


@dataclass(frozen=True)
class Head:
    """A fitted head, and what it said of images that it had not seen.

    Attributes:
        weight: float32 [classes, d].
        bias: float32 [classes].
        strength: the inverse strength of L2 that was chosen, of `STRENGTHS`.
        losses: mean cross-entropy of held-out images, in nats, for each of `STRENGTHS`.
        held_out: float32 [N, classes], of each image the probabilities by a head that was fitted without it.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    strength: float
    losses: tuple[float, ...]
    held_out: NDArray[np.float32]


def fit_head(
    features: NDArray[np.float32], labels: NDArray[np.int64], classes: int, seed: int, *, balance: bool = False
) -> Head:
    """Logistic regression of the labels on the features, with the L2 whose cross-entropy on held-out images is least.

    Each image is held out once, in one of `FOLDS` parts of about the same classes (fewer where a class has fewer images). The head that is
    returned is fitted on all images.

    Args:
        features: float32 [N, d].
        labels: int64 [N], from 0 to `classes` - 1, each at least twice.
        classes: at least 2.
        seed: of the parts.
        balance: whether all classes count alike, however many images they have.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    center = features.mean(axis=0)
    scale = float(np.sqrt(features.var(axis=0).mean())) or 1.0
    inputs = ((features - center) / scale).astype(np.float64)
    folds = StratifiedKFold(min(FOLDS, int(np.bincount(labels).min())), shuffle=True, random_state=seed)
    weights = "balanced" if balance else None
    found = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=ITERATIONS, class_weight=weights)
        found.append(cross_val_predict(model, inputs, labels, cv=folds, method="predict_proba"))
    losses = [float(log_loss(labels, held_out, labels=range(classes))) for held_out in found]
    best = int(np.argmin(losses))
    fitted = LogisticRegression(C=STRENGTHS[best], max_iter=ITERATIONS, class_weight=weights).fit(inputs, labels)
    weight, bias = fitted.coef_, fitted.intercept_
    if classes == 2:  # scikit-learn fits one output, the second class's odds
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    bias = bias - weight @ center
    return Head(
        weight.astype(np.float32),
        bias.astype(np.float32),
        STRENGTHS[best],
        tuple(losses),
        found[best].astype(np.float32),
    )


def with_head(uri: str, head: Head, class_names: list[str]) -> tuple[nn.Module, ModelConfig]:
    """The network of a model directory with another last layer, and how to build it again.

    Raises:
        ModelError: the directory cannot be used, or its network does not end in a linear layer.
    """
    loaded = load(uri)
    model = build(loaded.config, len(class_names))
    start_from(model, uri, class_names, fresh_head=True)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].weight.shape != head.weight.shape:
        raise ModelError("model", uri, "does not end in a linear layer", "fine-tune it (head: fresh), or use another")
    last = linear[-1]
    last.weight.data, bias = from_numpy(head.weight), from_numpy(head.bias)
    if last.bias is None:
        raise ModelError("model", uri, "has a last layer without a bias", "fine-tune it (head: fresh), or use another")
    last.bias.data = bias
    return model.eval(), loaded.config
