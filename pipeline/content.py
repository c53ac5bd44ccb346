"""The content of a run's report, out of what its stages say."""

import importlib.metadata
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.store import Key, Made
from models.judging import calibration, confusion
from pipeline.advice import advise
from pipeline.choosing import ChosenK
from pipeline.context import Run, Stages, rounds_of, teacher_of
from pipeline.data.rejects import read_rejects
from pipeline.evaluation import Measured, Trained, right
from pipeline.measuring import BASELINE, MISTAKES, Evaluated, predictions
from pipeline.report import gallery
from pipeline.report import page as report
from pipeline.report.judgment import Judged, Judgment, Tile
from pipeline.scoring.score import Scored
from pipeline.selection.select import Selected
from pipeline.stages import rejects_of

EXAMPLES = 20
"""Rejects that the report shows, at most."""
WORDS = {
    "teacher": "teacher",
    "pretrained": "student, pre-trained",
    "student": "student, fine-tuned",
    "supervised": "student, supervised",
}
"""The models of a run, by their names in it without the round."""


@dataclass(frozen=True)
class Reported:
    """Where the report begins."""

    index: str


def write_run_report(this: Run) -> Made[Reported]:
    """The report of the stages that are made: a stage itself, so that the same result has the same report."""
    stages = this.stages()

    def work(place: str) -> Reported:
        report.write_report(place, report_content(this, stages))
        return Reported("index.html")

    inputs = {name: made.fingerprint for name, made in stages.items()}
    return this.once(Key("report", {"recipe": this.recipe}, inputs), Reported, work, needs_ray=False)


def report_content(this: Run, stages: Stages) -> report.ReportContent:
    """Everything that the report shows, out of the stages' outputs."""
    fields: dict[str, Any] = {}
    rounds = rounds_of(stages)
    last = rounds[-1] if rounds else ""
    if "evaluation" in stages:
        fields |= _accuracies(stages, rounds)
        fields["judgment"] = _judgment(stages)
    if (teacher := teacher_of(stages)) is not None:
        fields["teacher"] = _facts(teacher)
        fields["teacher_data"] = _teacher_data(stages)
    if f"{last}student" in stages:
        fields["student"] = _facts(stages[f"{last}student"])
    if f"{last}scores" in stages:
        reasons, examples = read_rejects(rejects_of(stages[f"{last}scores"]), limit=EXAMPLES)
        fields["rejects_by_reason"] = reasons
        fields["reject_examples"] = examples
    if f"{last}chosen-k" in stages:
        fields["choice"] = _choice(stages[f"{last}chosen-k"].outputs)
    if f"{last}selection" in stages:
        fields |= _selection_fields(this, stages, last)
    for matched in (made.outputs for made in stages.values() if made.key.stage in ("tags", "weak-tags")):
        counts = zip(stages["labeled-train"].outputs.class_names, matched.per_class, strict=True)
        fields["tags"] = report.Tags(matched.images, matched.tagged, tuple(counts))
    return report.ReportContent(
        run=this.name,
        recipe_yaml=this.recipe,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        advice=advise(stages),
        curves=_curves(stages),
        sweep=_sweep(stages, last),
        stages=[report.StageRow(name, "done", made.seconds, made.images) for name, made in stages.items()],
        environment=environment(),
        **fields,
    )


def _accuracies(stages: Stages, rounds: list[str]) -> dict[str, Any]:
    evaluated = stages["evaluation"].outputs
    many = len(stages["labeled-train"].outputs.class_names) > 5

    def accuracy(name: str) -> report.Accuracy | None:
        measured: Measured | None = evaluated.models.get(name)
        if measured is None:
            return None
        return report.Accuracy(measured.top1, measured.top5 if many else None, measured.interval)

    pairs = [(accuracy(f"{prefix}pretrained"), accuracy(f"{prefix}student")) for prefix in rounds]
    pretrained, fine_tuned = pairs[-1] if pairs else (None, None)
    return {
        "test_images": evaluated.images,
        "teacher_accuracy": accuracy("teacher"),
        "supervised": accuracy(BASELINE),
        "pretrained": pretrained,
        "fine_tuned": fine_tuned,
        "earlier_rounds": pairs[:-1],
    }


def _judgment(stages: Stages) -> Judgment:
    """The model that the run is about beside the baseline, out of what each said of every test image."""
    made: Made[Evaluated] = stages["evaluation"]
    evaluated = made.outputs
    names = {evaluated.subject: WORDS[evaluated.subject.rpartition("/")[2]]}
    if BASELINE in evaluated.models:
        names.setdefault(BASELINE, WORDS[BASELINE])
    tables = {name: predictions(made, name) for name in names}

    def judged(name: str, word: str) -> Judged:
        of_score = calibration(tables[name]["score"].to_numpy(), right(tables[name]))
        return Judged(word, evaluated.models[name], of_score)

    subject = tables[evaluated.subject]
    return Judgment(
        class_names=stages["labeled-train"].outputs.class_names,
        models=[judged(name, word) for name, word in names.items()],
        confusion=confusion(subject["label"].to_numpy(), subject["predicted"].to_numpy()),
        against=evaluated.against.get(evaluated.subject),
        tiles=[Tile(**vars(mistake)) for mistake in evaluated.mistakes],
        strip=storage.join(made.uri, MISTAKES),
    )


def _facts(made: Made[Trained]) -> report.ModelFacts:
    return report.ModelFacts(made.outputs.architecture, made.outputs.parameters, made.outputs.source)


def _teacher_data(stages: Stages) -> str:
    """What the teacher was trained on, in the letters of the paper."""
    if "self-training/student" in stages:
        return "D̂ of its own, then D"
    if "weak-pretrained" in stages:
        return "W, then D"
    return "D" if stages["teacher"].outputs.images else "it was ready"


def _curves(stages: Stages) -> list[report.Curve]:
    words = {
        "teacher": "teacher",
        "weak-pretrained": "teacher, pre-training",
        "pretrained": "student, pre-training",
        "student": "student, fine-tuning",
        "supervised": "student, supervised",
    }
    curves = []
    for name, made in stages.items():
        prefix, _, stage = name.rpartition("/")
        if stage in words and made.outputs.history:
            where = f" ({prefix.replace('-', ' ')})" if prefix else ""
            curves.append(report.Curve(words[stage] + where, made.outputs.history))
    return curves


def _sweep(stages: Stages, last: str) -> list[report.Trial]:
    if f"{last}student" not in stages:
        return []
    student: Trained = stages[f"{last}student"].outputs
    return [
        report.Trial(
            trial.learning_rate, trial.metrics.get("val_top1", math.nan), trial.learning_rate == student.learning_rate
        )
        for trial in student.trials
    ]


def _choice(chosen: ChosenK) -> report.Choice | None:
    """None where there was one value alone."""
    rows = [
        report.TriedK(
            one.images_per_class,
            one.dhat,
            [found.top1 if found else None for found in entered],
            [found.error if found else None for found in entered],
            one.images_per_class in chosen.close,
            one.images_per_class == chosen.images_per_class,
        )
        for one, entered in chosen.by_value()
    ]
    return report.Choice(rows, chosen.judged, chosen.images) if rows else None


def _selection_fields(this: Run, stages: Stages, last: str) -> dict[str, Any]:
    selection: Selected = stages[f"{last}selection"].outputs
    scores: Scored | None = stages[f"{last}scores"].outputs if f"{last}scores" in stages else None
    names = stages["labeled-train"].outputs.class_names
    fields: dict[str, Any] = {
        "conservation": report.Conservation(
            listed=None if scores is None else scores.listed,
            scored=selection.images if scores is None else scores.scored,
            rejected=0 if scores is None else scores.rejected,
            candidates=selection.candidates,
            selected=selection.selected,
            unselected=selection.unselected,
            excluded=selection.excluded,
            nonfinite=selection.nonfinite,
        ),
        "images_per_class": selection.images_per_class,
        "classes": [
            gallery.ClassCount(number, names[number], count, low)
            for number, (count, low) in enumerate(zip(selection.counts, selection.lowest_scores, strict=True))
        ],
    }
    if f"{last}gallery" in stages:
        made: Made[gallery.Gallery] = stages[f"{last}gallery"]
        fields["rows"] = [
            gallery.ClassRow(row.class_id, row.name, row.count, storage.join(made.uri, row.strip), row.images)
            for row in made.outputs.rows
        ]
        # People open the report by its link, which stands beside the gallery's; an object store has no links.
        beside = made.key.folder if storage.is_remote(this.store.uri) else f"{last}gallery"
        fields["gallery"] = f"../{beside}/index.html"
    return fields


def environment() -> dict[str, str]:
    """Versions, machine and commit, for the report."""
    packages = ("tophat", "ray", "torch", "torchvision", "pyarrow", "numpy")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["python"] = platform.python_version()
    found["machine"] = f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}"
    try:
        root = Path(__file__).parent.parent
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        found["commit"] = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found
