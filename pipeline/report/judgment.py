"""What the report shows of the evaluation: each class, what is taken for what, whether scores are what they claim, the worst mistakes.

Nothing here grows without bounds with the number of classes: a chart has at most `CHARTED` classes, a matrix `MATRIX` and a table `PAIRS` rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from models.judging import Calibration, Comparison, Confusion
from pipeline.evaluation import Measured
from pipeline.report.charts import MANY_CLASSES, NAME_LETTERS, Chart, chart, trace
from pipeline.report.text import percent, plotly_text, short

CHARTED = 300
"""Classes of the chart of recalls, at most: those of the lowest recall."""
MATRIX = 20
"""Up to so many classes, the confusion is shown as a matrix too."""
PAIRS = 20
"""Pairs of classes that are most often confused, at most."""


@dataclass(frozen=True)
class Tile:
    """An image that the model has wrong: its file, or its shard and row; its class, and what it was taken for, with what probability."""

    name: str
    label: int
    predicted: int
    score: float
    shown: bool


@dataclass(frozen=True)
class Judged:
    """One model on the test images."""

    name: str
    """Such as "student"."""
    measured: Measured
    calibration: Calibration


@dataclass(frozen=True)
class Judgment:
    """The models that are compared, and the mistakes of the first one."""

    class_names: Sequence[str]
    models: Sequence[Judged]
    """The one that the run is about, and the baseline beside it where there is one."""
    confusion: Confusion
    """Of the first model."""
    against: Comparison | None = None
    """The first one against the second."""
    tiles: Sequence[Tile] = ()
    strip: str = ""
    """URI of the tiles' contact strip, which is copied."""

    @property
    def subject(self) -> Judged:
        """The model that the run is about."""
        return self.models[0]

    @property
    def images(self) -> int:
        """Test images, as the confusion counts them."""
        return int(self.confusion.counts.sum())


class Cell(NamedTuple):
    """A cell of the confusion matrix: images, and how dark it is, from 0 to 9."""

    images: int
    shade: int


def matrix(judgment: Judgment) -> list[list[Cell]]:
    """The confusion, a row for each true class, shaded by the share of its images; empty where there are too many classes."""
    classes = len(judgment.class_names)
    if classes > MATRIX:
        return []
    counts = judgment.confusion.matrix(classes)
    shades = np.ceil(9 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))).astype(int)
    return [
        [Cell(*pair) for pair in zip(row, shade, strict=True)]
        for row, shade in zip(counts.tolist(), shades.tolist(), strict=True)
    ]


class Pair(NamedTuple):
    """Images of a class that were taken for another one, and how many the class has."""

    label: int
    predicted: int
    mistaken: int
    images: int


def pairs(judgment: Judgment) -> list[Pair]:
    """The pairs of classes that are most often confused, the most frequent first."""
    labels, predicted, counts = (each[:PAIRS].tolist() for each in judgment.confusion.mistakes())
    support = judgment.subject.measured.support
    rows = zip(labels, predicted, counts, strict=True)
    return [Pair(label, other, mistaken, support[label]) for label, other, mistaken in rows]


def charts(judgment: Judgment) -> list[Chart]:
    """Recall of each class, and calibration."""
    return [made for made in (_recalls(judgment), _reliability(judgment)) if made]


def _recalls(judgment: Judgment) -> Chart | None:
    """The recall of each class: by name where there are few, else those of the lowest recall, ascending."""
    recall = judgment.subject.measured.recall
    known = [(value, number) for number, value in enumerate(recall) if value is not None]
    many = len(recall) > MANY_CLASSES
    shown = [number for _, number in (sorted(known)[:CHARTED] if many else known)]
    if not shown:
        return None
    places = list(range(len(shown)))
    x: dict[str, Any] = {"title": {"text": "classes, the lowest recall first"}}
    if not many:
        names = [plotly_text(short(judgment.class_names[number], NAME_LETTERS)) for number in shown]
        x = {"tickmode": "array", "tickvals": places, "ticktext": names}
    traces = []
    for place, model in enumerate(judgment.models):
        style = {"type": "bar"} if not many or not place else {"mode": "markers", "marker": {"size": 3}}
        values = [model.measured.recall[number] for number in shown]
        y = [None if value is None else round(value, 3) for value in values]
        hover = f"%{{customdata}}: {plotly_text(model.name)} %{{y:.1%}}<extra></extra>"
        traces.append(trace(model.name, places, y, customdata=shown, hovertemplate=hover, **style))
    none = sum(value == 0 for value, _ in known)
    summary = f"from {percent(min(known)[0])} to {percent(max(known)[0])}; {none:,} classes at zero"
    return chart(
        "recall",
        "Recall of each class"
        if len(shown) == len(known)
        else f"Recall, the {len(shown):,} lowest of {len(known):,} classes",
        summary,
        traces,
        xaxis=x,
        yaxis={"range": [0, 1.02], "tickformat": ".0%"},
        barmode="group",
        bargap=0 if many else 0.2,
    )


def _reliability(judgment: Judgment) -> Chart:
    """Accuracy over the score: on the diagonal, a score is the share that is right."""
    traces = []
    for model in judgment.models:
        counts, scores, accuracies = (each.tolist() for each in model.calibration)
        hover = f"{plotly_text(model.name)}: score %{{x:.2f}}, %{{y:.1%}} right of %{{text}} images<extra></extra>"
        x, y = ([round(value, 4) for value in values] for values in (scores, accuracies))
        texts = [f"{count:,}" for count in counts]
        traces.append(trace(model.name, x, y, mode="lines+markers", text=texts, hovertemplate=hover))
    line = {"dash": "dot", "width": 1}
    traces.append(trace("as claimed", [0, 1], [0, 1], mode="lines", line=line, hoverinfo="skip"))  # in no model's color
    summary = "; ".join(f"{model.name}: calibration error {percent(model.measured.ece)}" for model in judgment.models)
    axis = {"range": [0, 1.02], "tickformat": ".0%"}
    return chart(
        "calibration",
        "Share that is right, by score",
        summary,
        traces,
        xaxis={**axis, "title": {"text": "score of the predicted class"}},
        yaxis=axis,
    )
