"""What a run came to: the closing tables on the terminal, and the content of the report."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box, filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cluster import storage
from pipeline import gallery, report, text
from pipeline.estimate import Forecast
from pipeline.recipe import Recipe
from pipeline.rejects import read_rejects
from pipeline.store import Finished, RunStore

EXAMPLES = 20


def table(title: str, *columns: str) -> Table:
    """An empty table; every column but the first is right-aligned."""
    made = Table(title=Text(text.plain(title)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right")
    return made


def print_closing(console: Console, done: Mapping[str, Finished]) -> None:
    """The closing tables: accuracies as in Table 2, then what became of every image."""
    if "evaluation" in done:
        models = done["evaluation"].outputs["models"]
        columns = ("", "Pre-trained", "Fine-tuned", "Fully supervised", "Gain")
        accuracy = table(
            f"Top-1 / top-5 on {text.thousands(done['evaluation'].outputs['images'])} test images", *columns
        )
        student, teacher = done["student"].outputs, done["teacher"].outputs
        gain = models["student"]["top1"] - models["supervised"]["top1"]
        cells = [_accuracy(models[name]) for name in ("pretrained", "student", "supervised")]
        accuracy.add_row(f"student {_network(student)}", *cells, text.points(gain))
        accuracy.add_row(f"teacher {_network(teacher)}", "", "", _accuracy(models["teacher"]), "")
        console.print(accuracy)
    for line in conservation_lines(done):
        console.print(line, highlight=False)


def _accuracy(metrics: Mapping[str, float]) -> str:
    return f"{text.percent(metrics['top1'])} / {text.percent(metrics['top5'])}"


def _network(outputs: Mapping[str, Any]) -> str:
    return f"{escape(text.plain(outputs['architecture']))} ({text.parameters(outputs['parameters'])} parameters)"


def conservation_lines(done: Mapping[str, Finished]) -> list[str]:
    """One line for images and one for candidates."""
    lines = []
    if "labeled" in done:
        for name in ("train", "validation", "test"):
            counts = done["labeled"].outputs[name]
            lines.append(
                f"labeled.{name}: {counts['images']:,} used"
                + (f", {counts['rejected']:,} rejected" if counts["rejected"] else "")
            )
    if "scores" in done:
        scores = done["scores"].outputs
        lines.append(
            f"images: {scores['listed']:,} listed = {scores['scored']:,} scored + {scores['rejected']:,} rejected"
        )
        if scores["unreadable_shards"]:
            lines.append(
                f"  {scores['unreadable_shards']:,} shards could not be read, or not to their end: see the rejects"
            )
    if "selection" in done:
        lines += selection_lines(done["selection"].outputs)
    return lines


def selection_lines(selection: Mapping[str, Any]) -> list[str]:
    """What was selected, in words."""
    candidates, selected = selection["candidates"], selection["selected"]
    lines = [f"candidates: {candidates:,} = {selected:,} selected + {selection['unselected']:,} unselected"]
    if selection["excluded"]:
        lines[0] += f" + {selection['excluded']:,} of excluded images"
    if selection["nonfinite"]:
        lines[0] += f" + {selection['nonfinite']:,} with a score that is no number"
    short, classes = selection["classes_short"], selection["num_classes"]
    least, most = min(selection["quotas"], default=0), max(selection["quotas"], default=0)
    k = f"K = {most:,}" if least == most else f"their quotas of {least:,} to {most:,} images"
    lines.append(f"classes short of {k}: {short:,} of {classes:,}" + ("; they keep what they have" if short else ""))
    return lines


def print_stages(console: Console, done: Mapping[str, Finished]) -> None:
    """What each stage did and how long it took."""
    stages = table("Stages", "stage", "", "seconds", "images", "folder")
    for stage in done.values():
        images = stage.outputs.get("images")
        stages.add_row(
            stage.name,
            "done" if stage.fresh else "found finished",
            f"{stage.seconds:,.1f}",
            f"{images:,}" if isinstance(images, int) else "",
            escape(stage.uri),
        )
    console.print(stages)


def print_selections(console: Console, selections: Sequence[Mapping[str, Any]]) -> None:
    """Table 9's columns, a row for each selection."""
    columns = ("P", "K", "|U|", "|D-hat|", "classes short of K", "lowest score: least", "median", "greatest")
    made = table("Selection", *columns)
    for selection in selections:
        lowest = sorted(score for score in selection["lowest_scores"] if score is not None)
        spread = [f"{lowest[i]:.4f}" for i in (0, len(lowest) // 2, -1)] if lowest else ["–"] * 3
        numbers = ("classes_per_image", "images_per_class", "images", "selected", "classes_short")
        made.add_row(*("–" if selection[name] is None else f"{selection[name]:,}" for name in numbers), *spread)
    console.print(made)


def print_selection(console: Console, selection: Mapping[str, Any], class_names: tuple[str, ...] | None = None) -> None:
    """Table 9's columns for one selection, and the classes that are short of K."""
    print_selections(console, [selection])
    counts = list(zip(selection["counts"], selection["lowest_scores"], strict=True))
    short = [n for n, (count, _) in enumerate(counts) if count < selection["quotas"][n]]
    if short:
        made = table(
            f"Classes short of K (first {EXAMPLES} of {len(short):,})"
            if len(short) > EXAMPLES
            else "Classes short of K",
            "class",
            "images",
            "lowest score",
        )
        for number in short[:EXAMPLES]:
            count, low = counts[number]
            name = escape(text.plain(class_names[number])) if class_names else str(number)
            made.add_row(name, f"{count:,}", "–" if low is None else f"{low:.4f}")
        console.print(made)
    for line in selection_lines(selection):
        console.print(line, highlight=False)


def print_forecast(console: Console, name: str, found: Forecast) -> None:
    """What a sample showed, and what scoring all of U takes."""
    sample, cost = found.sample, found.sample.cost
    facts = table(f"Scoring U of {name}", "", "")
    about = "" if not found.images_error else f" (about; standard error {text.percent(found.images_error)})"
    facts.add_row("images", f"{found.images:,}{about}")
    facts.add_row("shards", f"{found.shards:,}")
    facts.add_row("bytes to read", filesize.decimal(found.source_bytes))
    facts.add_row("bytes of the score table", filesize.decimal(round(sample.table_bytes * found.images)))
    facts.add_row("teacher", found.teacher)
    facts.add_row("sample", f"{sample.images:,} scored, {sample.rejected:,} rejected, {sample.actors:,} actors")
    for reason, count in sorted(sample.rejects.items()):
        facts.add_row(f"  {reason}", f"{count:,}")
    rate = "too few to tell" if sample.rate is None else f"{sample.rate:,.1f} images/s"
    facts.add_row("measured rate", rate)
    read, model = ((cost.read_seconds, cost.read_cpu_seconds), (cost.model_seconds, cost.model_cpu_seconds))
    for part, (seconds, cpu) in (("reading", read), ("the model", model)):
        facts.add_row(f"an image takes of {part}", f"{1000 * seconds:,.2f} ms, {1000 * cpu:,.2f} ms of CPU")
    facts.add_row("until the first scores", text.duration(sample.start_seconds))
    console.print(facts)
    columns = ("nodes", "type", "CPU", "GPU", "actors", "images/s", "limit", "read/s", "time", "cost")
    title = "All of U" if found.deadline is None else f"All of U within {text.duration(found.deadline)}"
    plans = table(title, *columns)
    for plan in found.plans():
        amounts = plan.node.shape.resources
        per_image = found.source_bytes / found.images
        plans.add_row(
            f"{plan.nodes:,}{'' if plan.possible else '*'}",
            escape(text.plain(" ".join(filter(None, (plan.node.name, plan.node.instance))))),
            *(f"{amounts.get(resource, 0.0) * plan.nodes:,g}" for resource in ("CPU", "GPU")),
            f"{plan.actors:,}",
            f"{plan.rate:,.1f}",
            plan.limit,
            filesize.decimal(round(plan.rate * per_image)),
            text.duration(plan.seconds),
            text.DASH if plan.cost is None else f"{plan.cost:,.2f}",
        )
    console.print(plans)
    if any(not plan.possible for plan in found.plans()):
        console.print("* not possible: max_workers of the cluster file, or score.actors, does not allow it")
    if sample.rate is None:
        console.print("The sample was too small to tell a rate: what is above is rough. Raise --images.")
    if len(found.types) > 1:
        console.print("Other types are told from the CPU and GPU seconds of an image where the sample ran.")


def write_run_report(recipe: Recipe, store: RunStore, done: Mapping[str, Finished]) -> str:
    """Writes `report/index.html` of a run; returns its URI."""
    return report.write_report(storage.join(store.uri, "report"), report_content(recipe, store, done))


def report_content(recipe: Recipe, store: RunStore, done: Mapping[str, Finished]) -> report.ReportContent:
    """Everything that the report shows, out of the stages' outputs."""
    fields: dict[str, Any] = {}
    if "evaluation" in done:
        models = done["evaluation"].outputs["models"]
        many = len(done["labeled"].outputs["class_names"]) > 5
        places = {
            "teacher": "teacher_accuracy",
            "pretrained": "pretrained",
            "student": "fine_tuned",
            "supervised": "supervised",
        }
        for name, place in places.items():
            fields[place] = report.Accuracy(models[name]["top1"], models[name]["top5"] if many else None)
        fields["test_images"] = done["evaluation"].outputs["images"]
    for name in ("teacher", "student"):
        if name in done:
            fields[name] = report.ModelFacts(done[name].outputs["architecture"], done[name].outputs["parameters"])
    if "scores" in done:
        reasons, examples = read_rejects(store.place("rejects"), limit=EXAMPLES)
        fields["rejects_by_reason"] = reasons
        fields["reject_examples"] = examples
    if "selection" in done:
        fields |= _selection_fields(done)
    names = {
        "teacher": "teacher",
        "pretrained": "student, pre-training",
        "student": "student, fine-tuning",
        "supervised": "student, supervised",
    }
    curves = [report.Curve(names[n], done[n].outputs["history"]) for n in names if n in done]
    trials: list[report.Trial] = []
    if "student" in done:
        chosen = done["student"].outputs["learning_rate"]
        trials = [
            report.Trial(t["learning_rate"], t["metrics"]["val_top1"], t["learning_rate"] == chosen)
            for t in done["student"].outputs["trials"]
            if "val_top1" in t["metrics"]
        ]
    return report.ReportContent(
        run=recipe.name,
        recipe_yaml=recipe.to_yaml(),
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        curves=curves,
        sweep=trials,
        stages=[
            report.StageRow(s.name, "done" if s.fresh else "reused", s.seconds, s.outputs.get("images"))
            for s in done.values()
        ],
        environment=environment(),
        **fields,
    )


def _selection_fields(done: Mapping[str, Finished]) -> dict[str, Any]:
    selection, scores = done["selection"].outputs, done["scores"].outputs
    names = done["labeled"].outputs["class_names"]
    fields: dict[str, Any] = {
        "conservation": report.Conservation(
            listed=scores["listed"],
            scored=scores["scored"],
            rejected=scores["rejected"],
            candidates=selection["candidates"],
            selected=selection["selected"],
            unselected=selection["unselected"],
            excluded=selection["excluded"],
            nonfinite=selection["nonfinite"],
        ),
        "images_per_class": selection["images_per_class"],
        "classes": [
            gallery.ClassCount(number, names[number], count, low)
            for number, (count, low) in enumerate(zip(selection["counts"], selection["lowest_scores"], strict=True))
        ],
    }
    if "gallery" in done:
        made = done["gallery"]
        fields["rows"] = [
            gallery.ClassRow(
                row["class_id"],
                row["name"],
                row["count"],
                storage.join(made.uri, row["strip"]),
                [gallery.RankedImage(**image) for image in row["images"]],
            )
            for row in made.outputs["rows"]
        ]
        fields["gallery"] = "../gallery/index.html"
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
