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
from pipeline.context import Run, Stages, rounds_of, teacher_of
from pipeline.data.rejects import read_rejects
from pipeline.evaluation import Measured, Trained
from pipeline.report import gallery
from pipeline.report import page as report
from pipeline.scoring.score import Scored
from pipeline.selection.select import Selected
from pipeline.stages import REJECTS

EXAMPLES = 20
"""Rejects that the report shows, at most."""


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
    if (teacher := teacher_of(stages)) is not None:
        fields["teacher"] = _facts(teacher)
        fields["teacher_data"] = _teacher_data(stages)
    if f"{last}student" in stages:
        fields["student"] = _facts(stages[f"{last}student"])
    if f"{last}scores" in stages:
        rejects = storage.join(stages[f"{last}scores"].uri, REJECTS)
        reasons, examples = read_rejects(rejects, limit=EXAMPLES)
        fields["rejects_by_reason"] = reasons
        fields["reject_examples"] = examples
    if f"{last}selection" in stages:
        fields |= _selection_fields(this, stages, last)
    for matched in (made.outputs for made in stages.values() if made.key.stage in ("tags", "weak-tags")):
        counts = zip(stages["labeled-train"].outputs.class_names, matched.per_class, strict=True)
        fields["tags"] = report.Tags(matched.images, matched.tagged, tuple(counts))
    return report.ReportContent(
        run=this.name,
        recipe_yaml=this.recipe,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        curves=_curves(stages),
        sweep=_sweep(stages, last),
        stages=[report.StageRow(name, "done", made.seconds, made.images) for name, made in stages.items()],
        environment=environment(),
        **fields,
    )


def _accuracies(stages: Stages, rounds: list[str]) -> dict[str, Any]:
    evaluated = stages["evaluation"].outputs
    many = len(stages["labeled-train"].outputs.class_names) > 5

    def accuracy(name: str) -> report.Accuracy:
        measured: Measured = evaluated.models[name]
        return report.Accuracy(measured.top1, measured.top5 if many else None)

    pairs = [(accuracy(f"{prefix}pretrained"), accuracy(f"{prefix}student")) for prefix in rounds]
    return {
        "test_images": evaluated.images,
        "teacher_accuracy": accuracy("teacher"),
        "supervised": accuracy("supervised"),
        "pretrained": pairs[-1][0],
        "fine_tuned": pairs[-1][1],
        "earlier_rounds": pairs[:-1],
    }


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


def _selection_fields(this: Run, stages: Stages, last: str) -> dict[str, Any]:
    selection: Selected = stages[f"{last}selection"].outputs
    scores: Scored = stages[f"{last}scores"].outputs
    names = stages["labeled-train"].outputs.class_names
    fields: dict[str, Any] = {
        "conservation": report.Conservation(
            listed=scores.listed,
            scored=scores.scored,
            rejected=scores.rejected,
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
