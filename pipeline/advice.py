"""What to do next, in words, out of what a run has measured and nothing else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from cluster import storage
from cluster.store import Made
from pipeline.choosing import ChosenK
from pipeline.context import Stages, rounds_of
from pipeline.evaluation import Trained, right
from pipeline.measuring import BASELINE, Evaluated, held_out_predictions
from pipeline.report import text
from pipeline.report.page import Advice
from pipeline.selection.select import Selected
from pipeline.stages import Surveyed
from tuning.sweep import METRIC, Trial

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FEW_LABELS = 10
"""Images of a class in D, below which it is said to have few."""
IMBALANCE = 5.0
"""How many times as many images the largest class of D has as the smallest, from where on that is said."""
TIED = 0.1
"""The share of a class's images in D-hat with exactly the score at the cut, from where on that is said."""
PURE = 0.8
"""The share of D-hat that is right, below which that is said."""
LEAST_HELD_OUT = 5
"""Held-out images at the scores of D-hat, below which nothing is said of its purity."""
NAMED = 5
"""Classes that are named, at most."""
MOST_ROWS = 20_000_000
"""Of a selection, up to which equal scores are looked for."""


def advise(stages: Stages) -> list[Advice]:
    """What the stages of a run that are made give reason to say, the most important first."""
    survey: Surveyed | None = stages["labeled-train"].outputs if "labeled-train" in stages else None
    if survey is None:
        return []
    names = [text.short(name, 40) for name in survey.class_names]
    rounds = rounds_of(stages)
    last = rounds[-1] if rounds else ""
    found: list[Advice] = []
    evaluation: Made[Evaluated] | None = stages.get("evaluation")
    selection: Made[Selected] | None = stages.get(f"{last}selection")
    student: Made[Trained] | None = stages.get(f"{last}student")
    if evaluation is not None:
        found += of_gain(evaluation.outputs) + of_teacher(evaluation.outputs) + of_classes(evaluation.outputs, names)
    if evaluation is not None and selection is not None and "teacher" in evaluation.outputs.held_out:
        told = purity(held_out_predictions(evaluation, "teacher"), selection.outputs)
        found += of_purity(told, names, tried=f"{last}chosen-k" in stages)
    if f"{last}chosen-k" in stages:
        found += of_choice(stages[f"{last}chosen-k"].outputs)
    if student is not None:
        found += of_sweep(student.outputs.trials, student.outputs.learning_rate, held_out_images(stages))
    if selection is not None:
        found += of_cut(selection.outputs, names)
    return of_copies(stages) + found + of_labels(survey, names)


def of_copies(stages: Stages) -> list[Advice]:
    """Whether images that models are measured or chosen on were trained on."""
    found = []
    for name in ("test", "validation"):
        made: Made[Surveyed] | None = stages.get(f"labeled-{name}")
        if made is not None and made.outputs.copies:
            copies, images = made.outputs.copies, made.outputs.images
            found.append(
                Advice(
                    f"{copies:,} of {images:,} {name} images are copies of images that are trained on, which flatters every model",
                    f"take them out of labeled.{name}, or out of labeled.train",
                )
            )
    return found


def held_out_images(stages: Stages) -> int:
    """Labeled images that settings are chosen on."""
    own = stages.get("labeled-validation")
    return int(stages["labeled-train"].outputs.held_out if own is None else own.outputs.images)


def of_gain(evaluated: Evaluated) -> list[Advice]:
    """Whether the student is better than the baseline by more than chance."""
    found = []
    for name, compared in evaluated.against.items():
        if compared.p >= 0.05:
            of_round = f" of {name.rpartition('/')[0].replace('-', ' ')}" if "/" in name else ""
            low, high = compared.interval
            found.append(
                Advice(
                    f"the student{of_round} differs from the baseline by {text.points(compared.difference)} points, which is within "
                    f"the noise of {compared.images:,} test images (95% interval {text.points(low)} to {text.points(high)})",
                    "repeat with other seeds (--set seed=1), or measure on more test images, before you believe it",
                )
            )
        elif compared.difference < 0:
            found.append(
                Advice(
                    f"the student is worse than the baseline by {text.points(-compared.difference)} points",
                    "look at the gallery for wrong images, and try a smaller K (select.images_per_class: auto)",
                )
            )
    return found


def of_teacher(evaluated: Evaluated) -> list[Advice]:
    """Whether the teacher knows more than the student would by itself."""
    teacher, baseline = evaluated.models.get("teacher"), evaluated.models.get(BASELINE)
    if teacher is None or baseline is None or teacher.top1 >= baseline.top1:
        return []
    return [
        Advice(
            f"the teacher ({text.percent(teacher.top1)}) is below the student that saw D alone ({text.percent(baseline.top1)})",
            "it has little to teach: use a larger network, or one that exists (teacher.model with head: linear)",
        )
    ]


def of_classes(evaluated: Evaluated, names: Sequence[str]) -> list[Advice]:
    """Classes that the student does not find at all."""
    student = evaluated.models[evaluated.subject]
    lost = [names[n] for n, recall in enumerate(student.recall) if recall == 0 and student.support[n] > 0]
    if not lost:
        return []
    return [
        Advice(
            f"{evaluated.subject} finds no test image of {_few(lost)}",
            "look at their rows in the gallery; label more of them, or join them with the class they are taken for",
        )
    ]


@dataclass(frozen=True)
class Purity:
    """How much of a class's part of D-hat is right, as far as held-out images tell.

    Attributes:
        right: held-out images that the teacher takes for the class with at least the lowest selected score, and that are of it.
        images: such held-out images.
        selected: images of the class in D-hat.
    """

    right: int
    images: int
    selected: int

    @property
    def share(self) -> float:
        """Of held-out images, in [0, 1]."""
        return self.right / max(1, self.images)


def purity(predictions: pa.Table, selection: Selected) -> list[Purity]:
    """D-hat's purity, class by class, from what the teacher says of held-out images (`pipeline.evaluation.prediction_table`).

    U may hold images of no class, of which held-out images say nothing: D-hat is at most so pure.
    """
    predicted, scores = predictions["predicted"].to_numpy(), predictions["score"].to_numpy()
    hits = right(predictions)
    found = []
    for number, (count, low) in enumerate(zip(selection.counts, selection.lowest_scores, strict=True)):
        chosen = (predicted == number) & (scores >= (np.inf if low is None else low))
        found.append(Purity(int(hits[chosen].sum()), int(chosen.sum()), count))
    return found


def of_purity(found: Sequence[Purity], names: Sequence[str], *, tried: bool = False) -> list[Advice]:
    """Whether much of D-hat is wrong; `tried` tells that K was found by trying."""
    told = [one for one in found if one.images and one.selected]
    images, selected = sum(one.images for one in told), sum(one.selected for one in told)
    if images < LEAST_HELD_OUT or not selected:
        return []
    share = sum(one.share * one.selected for one in told) / selected
    if share >= PURE:
        return []
    worst = sorted((one.share, number) for number, one in enumerate(found) if one.images >= LEAST_HELD_OUT)
    low = ", ".join(f"{names[number]} {text.percent(share)}" for share, number in worst[:NAMED] if share < PURE)
    return [
        Advice(
            f"at most {text.percent(share)} of D-hat is right, by {images:,} held-out images at the same scores"
            + (f" (lowest: {low})" if low else ""),
            f"try a smaller K (select.images_per_class{'' if tried else ': auto'}), select.min_score, or a better teacher",
        )
    ]


def of_choice(chosen: ChosenK) -> list[Advice]:
    """Whether the short trainings could tell the values of K apart."""
    if len(chosen.close) < 2:
        return []
    values = ", ".join(f"{value:,}" for value in chosen.close)
    return [
        Advice(
            f"K = {chosen.images_per_class:,} was taken among {values}, which are within a standard error of each other on "
            f"{chosen.judged:,} images of D",
            "try the others in full (--set select.images_per_class=...): the teacher and the scores are kept",
        )
    ]


def of_sweep(trials: Sequence[Trial], chosen: float | None, images: int) -> list[Advice]:
    """Whether the sweep of the learning rate found its best in the middle, and could tell its settings apart."""
    field = "fine_tune.sweep.learning_rates"
    known = {trial.learning_rate: trial.metrics[METRIC] for trial in trials if METRIC in trial.metrics}
    found = []
    if chosen is not None and len(known) > 1 and chosen in (least := min(known), most := max(known)):
        wider = least / 4 if chosen == least else most * 4
        found.append(
            Advice(
                f"the best learning rate, {chosen:g} per 256 images, is the {'lowest' if chosen == least else 'highest'} that was tried",
                f"try {wider:g} too ({field}); trials that are made are not repeated",
            )
        )
    if len(known) > 1 and images:
        top = max(known.values())
        error = sqrt(max(top * (1 - top), 1 / images) / images)
        close = sum(value >= top - error for value in known.values())
        if close > 1:
            found.append(
                Advice(
                    f"{close} of {len(known)} learning rates are within a standard error ({text.percent(error)}) of each other on "
                    f"{images:,} held-out images",
                    "the choice among them is chance: hold out more (labeled.validation_fraction), or label more",
                )
            )
    return found


def of_cut(selection: Selected, names: Sequence[str]) -> list[Advice]:
    """Classes that are cut among equal scores, or have too few candidates."""
    found = []
    tied = ties(selection)
    cut = [
        names[number]
        for number, (count, quota) in enumerate(zip(selection.counts, selection.quotas, strict=True))
        if count == quota and tied.get(number, 0) > max(1, TIED * count)
    ]
    if cut:
        found.append(
            Advice(
                f"many images have exactly the score at the cut of {_few(cut)}",
                "which of them are taken is decided by their names: rank by logits (score.logits: true), or score with more views",
            )
        )
    if selection.classes_short:
        short = [
            names[n]
            for n, (count, quota) in enumerate(zip(selection.counts, selection.quotas, strict=True))
            if count < quota
        ]
        found.append(
            Advice(
                f"{selection.classes_short:,} of {selection.num_classes:,} classes have fewer than K images ({_few(short)})",
                "lower K, or raise P (score.classes_per_image)",
            )
        )
    return found


def ties(selection: Selected) -> dict[int, int]:
    """Of each class that has some: its images in D-hat with exactly its lowest selected score."""
    if selection.selected > MOST_ROWS:
        return {}
    found: dict[int, int] = {}
    for entry in storage.list_files(selection.uri, ".parquet"):
        with storage.open_input(storage.join(selection.uri, entry.path)) as file:
            table = pq.read_table(file, columns=["class_id", "score"])
        for number in pc.unique(table["class_id"]).to_pylist():
            low = selection.lowest_scores[number]
            if low is not None:
                same = pc.and_(
                    pc.equal(table["class_id"], number), pc.equal(table["score"], pa.scalar(low, pa.float32()))
                )
                found[number] = found.get(number, 0) + (pc.sum(same).as_py() or 0)
    return found


def of_labels(survey: Surveyed, names: Sequence[str]) -> list[Advice]:
    """Whether D has few images of some classes, or far more of others."""
    found = []
    least, most = min(survey.per_class), max(survey.per_class)
    few = [names[number] for number, count in enumerate(survey.per_class) if count < FEW_LABELS]
    if few:
        found.append(
            Advice(
                f"{len(few):,} of {len(names):,} classes have fewer than {FEW_LABELS} images to train on ({_few(few)})",
                "label more of them first: that helps more than any setting",
            )
        )
    if least and most / least >= IMBALANCE:
        found.append(
            Advice(
                f"the largest class of D has {most / least:.0f} times as many images as the smallest",
                "let trainings see as many of each (labeled.balance: true)",
            )
        )
    return found


def _few(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - NAMED:,} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more
