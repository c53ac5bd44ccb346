"""Tables on the terminal: what a run came to, what was selected, what scoring will take."""

from collections.abc import Mapping, Sequence

from rich import box, filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from models.inputs.formats import NEEDS_PLUGIN
from pipeline.choosing import ChosenK
from pipeline.context import Stages, begun, rounds_of, teacher_of
from pipeline.data.rejects import counted, some_rejects
from pipeline.data.sources import ImageSource
from pipeline.evaluation import Measured, Trained
from pipeline.measuring import BASELINE, Evaluated
from pipeline.report import text
from pipeline.scoring.forecast import Forecast
from pipeline.scoring.score import Scored
from pipeline.selection.select import Selected
from pipeline.selection.tags import Matched
from pipeline.stages import Surveyed, rejects_of

EXAMPLES = 20
FEW = 3
"""Rejects that are named on the terminal."""


def table(title: str, *columns: str) -> Table:
    """An empty table; every column but the first is right-aligned."""
    made = Table(title=Text(text.plain(title)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right")
    return made


def print_closing(console: Console, stages: Stages) -> None:
    """The closing tables: accuracies as in Table 2, a row for each round; then what became of every image."""
    if "evaluation" in stages:
        print_accuracies(console, stages)
    for name, made in stages.items():
        if made.key.stage == "chosen-k":
            print_choice(console, made.outputs, name.rpartition("/")[0])
    tagged = {made.fingerprint: made for name, made in stages.items() if made.key.stage in ("weak-tags", "tags")}
    for made in tagged.values():
        print_tags(console, made.outputs, stages["labeled-train"].outputs.class_names)
    for line in conservation_lines(stages):
        console.print(line, markup=False, highlight=False)


def print_accuracies(console: Console, stages: Stages) -> None:
    """Table 2 with the intervals of top-1, for the models that the run has; then the students against the baseline, in words."""
    evaluated: Evaluated = stages["evaluation"].outputs
    models = evaluated.models
    baseline = models.get(BASELINE)
    columns = ("", "Pre-trained", "Fine-tuned", "Fully supervised", *(["Gain"] if baseline is not None else []))
    title = f"Top-1 (95% interval) / top-5 on {text.thousands(evaluated.images)} test images"
    accuracy = table(title, *columns)
    for prefix in rounds_of(stages):
        student = models.get(f"{prefix}student")
        if student is None:
            continue
        cells = [_accuracy(one) for one in (models.get(f"{prefix}pretrained"), student, baseline)]
        name = f"student {_network(stages[f'{prefix}student'].outputs)}"
        name += f", {prefix.strip('/').replace('-', ' ')}" if prefix else ""
        accuracy.add_row(name, *cells, *([text.points(student.top1 - baseline.top1)] if baseline is not None else []))
    teacher = teacher_of(stages)
    if teacher is not None and "teacher" in models:
        accuracy.add_row(f"teacher {_network(teacher.outputs)}", "", "", _accuracy(models["teacher"]))
    console.print(accuracy)
    for name, found in evaluated.against.items():
        prefix = name.rpartition("/")[0].replace("-", " ")
        of_round = f" of {prefix}" if prefix else ""
        console.print(f"student{of_round} against baseline: {text.comparison(found)}", highlight=False)


def _accuracy(measured: Measured | None) -> str:
    if measured is None:
        return text.DASH
    return f"{text.percent(measured.top1)} ({text.interval(measured.interval)}) / {text.percent(measured.top5)}"


def print_choice(console: Console, chosen: ChosenK, prefix: str = "") -> None:
    """The values of K that were tried, and what each came to."""
    values = chosen.by_value()
    if not values:
        console.print(f"K: {chosen.images_per_class:,}, as there was no other value to try", highlight=False)
        return
    lengths = [f"{max(one.images_seen for one in rung):,} seen" for rung in chosen.rungs]
    where = f"{prefix.replace('-', ' ')}, " if prefix else ""
    title = f"K: {where}top-1 on {text.thousands(chosen.judged)} images of D after short pre-trainings"
    made = table(title, "K", "|D-hat|", *lengths, "")
    for one, entered in values:
        cells = ["" if found is None else f"{text.percent(found.top1)} ± {100 * found.error:.1f}" for found in entered]
        k = one.images_per_class
        said = "taken" if k == chosen.images_per_class else "within a standard error" if k in chosen.close else ""
        made.add_row(f"{k:,}", f"{one.dhat:,}", *cells, said)
    console.print(made)


def _network(outputs: Trained) -> str:
    return f"{escape(text.plain(outputs.architecture))} ({text.parameters(outputs.parameters)} parameters)"


def print_tags(console: Console, matched: Matched, names: Sequence[str]) -> None:
    """How many tagged images each class got, the fewest first, and which classes got none."""
    order = sorted(range(len(names)), key=lambda number: (matched.per_class[number], number))
    few = f" (the {EXAMPLES} with the fewest, of {len(names):,})" if len(names) > EXAMPLES else ""
    made = table(f"Images by their tags{few}", "class", "images")
    for number in order[:EXAMPLES]:
        made.add_row(escape(text.plain(names[number])), f"{matched.per_class[number]:,}")
    console.print(made)
    none = sum(not count for count in matched.per_class)
    console.print(
        f"tags: {matched.tagged:,} of {matched.images:,} images have a class; {none:,} of {len(names):,} classes got none",
        highlight=False,
    )


def print_warnings(console: Console, sources: Mapping[str, ImageSource]) -> None:
    """Says before any work of which sources much is passed over."""
    for field, source in sources.items():
        if source.lacks_much:
            fix = "if those are images that you want, name the layout, or mend the source"
            console.print(f"warning: {field}: {source.told()}; {fix}", markup=False)


def print_passed_over(console: Console, sources: Mapping[str, ImageSource]) -> None:
    """A line for each source of which something is passed over."""
    for field, source in sources.items():
        if (told := source.told()) is not None:
            console.print(f"{field}: {told}", markup=False, highlight=False)


def conservation_lines(stages: Stages) -> list[str]:
    """One line for images and one for candidates, of each round."""
    lines = []
    for name in ("train", "validation", "test"):
        if f"labeled-{name}" in stages:
            counts: Surveyed = stages[f"labeled-{name}"].outputs
            rejected = f", {counts.rejected:,} rejected" if counts.rejected else ""
            held = f", {counts.held_out:,} held out for validation" if counts.held_out else ""
            held += f", {counts.held_for_test:,} for the test set" if counts.held_for_test else ""
            lines.append(f"labeled.{name}: {counts.images:,} used{held}{rejected}")
    for prefix in begun(stages):
        said = f"{prefix.strip('/')}: " if prefix else ""
        if f"{prefix}scores" in stages:
            scores: Scored = stages[f"{prefix}scores"].outputs
            lines.append(
                f"{said}images: {scores.listed:,} listed = {scores.scored:,} scored + {scores.rejected:,} rejected"
            )
            lines += rejects_lines(scores, rejects_of(stages[f"{prefix}scores"]))
        if f"{prefix}selection" in stages:
            lines += [said + line for line in selection_lines(stages[f"{prefix}selection"].outputs)]
    return lines


def rejects_lines(scores: Scored, uri: str) -> list[str]:
    """Why images have no scores, and the names of some of them; `uri`: of the rejects."""
    lines = []
    if scores.rejects:
        lines.append(f"  rejects: {counted(scores.rejects)}; which ones and why: {uri}")
        some = some_rejects(uri, FEW)
        lines += [text.short(f"    {one.where}: {one.reason}", 150) for one in some]
        if sum(scores.rejects.values()) > len(some):
            lines.append("    ...")
    if scores.rejects.get(NEEDS_PLUGIN):
        lines.append(f"  {plugin_note(scores.rejects[NEEDS_PLUGIN])}")
    if scores.unreadable_shards:
        lines.append(f"  {scores.unreadable_shards:,} shards could not be read, or not to their end: see the rejects")
    return lines


def plugin_note(images: int) -> str:
    """What to do about images that a plug-in would decode."""
    return (
        f"{images:,} images are HEIC or JPEG XL: pip install 'tophat[formats]' on every node, then score in a new place"
    )


def selection_lines(selection: Selected) -> list[str]:
    """What was selected, in words."""
    candidates, selected = selection.candidates, selection.selected
    lines = [f"candidates: {candidates:,} = {selected:,} selected + {selection.unselected:,} unselected"]
    if selection.excluded:
        lines[0] += f" + {selection.excluded:,} of excluded images"
    if selection.nonfinite:
        lines[0] += f" + {selection.nonfinite:,} with a score that is no number"
    short, classes = selection.classes_short, selection.num_classes
    least, most = min(selection.quotas, default=0), max(selection.quotas, default=0)
    k = f"K = {most:,}" if least == most else f"their quotas of {least:,} to {most:,} images"
    lines.append(f"classes short of {k}: {short:,} of {classes:,}" + ("; they keep what they have" if short else ""))
    return lines


def print_stages(console: Console, stages: Stages) -> None:
    """What each stage did and how long it took."""
    made = table("Stages", "stage", "", "seconds", "images", "folder")
    for name, stage in stages.items():
        made.add_row(
            escape(name),
            "done" if stage.fresh else "found finished",
            f"{stage.seconds:,.1f}",
            "" if stage.images is None else f"{stage.images:,}",
            escape(stage.uri),
        )
    console.print(made)


def print_selections(
    console: Console, selections: Sequence[Selected], class_names: Sequence[str] | None = None
) -> None:
    """Table 9's columns, a row for each selection; of several, also the lowest scores of few classes."""
    columns = ("P", "K", "|U|", "|D-hat|", "classes short of K", "lowest score: least", "median", "greatest")
    made = table("Selection", *columns)
    for selection in selections:
        lowest = sorted(score for score in selection.lowest_scores if score is not None)
        spread = [f"{lowest[i]:.4f}" for i in (0, len(lowest) // 2, -1)] if lowest else ["–"] * 3
        numbers = (
            selection.classes_per_image,
            selection.images_per_class,
            selection.images,
            selection.selected,
            selection.classes_short,
        )
        made.add_row(*("–" if number is None else f"{number:,}" for number in numbers), *spread)
    console.print(made)
    classes = selections[0].num_classes
    if len(selections) > 1 and classes <= EXAMPLES:
        heads = [
            f"K = {one.images_per_class:,}" + (f", P = {one.classes_per_image}" if one.classes_per_image else "")
            for one in selections
        ]
        lows = table("Lowest score of each class", "class", *heads)
        for number in range(classes):
            cells = [text.score(one.lowest_scores[number]) for one in selections]
            lows.add_row(_class_name(number, class_names), *cells)
        console.print(lows)


def _class_name(number: int, class_names: Sequence[str] | None) -> str:
    return str(number) if class_names is None else escape(text.short(class_names[number]))


def print_selection(console: Console, selection: Selected, class_names: Sequence[str] | None = None) -> None:
    """Table 9's columns for one selection, and its classes: all of few, else those that are short of K."""
    print_selections(console, [selection])
    counts = list(zip(selection.counts, selection.lowest_scores, strict=True))
    shown, title = list(range(len(counts))), "Classes"
    if len(counts) > EXAMPLES:
        shown = [n for n, (count, _) in enumerate(counts) if count < selection.quotas[n]]
        title = "Classes short of K" + (f" (first {EXAMPLES} of {len(shown):,})" if len(shown) > EXAMPLES else "")
    if shown:
        made = table(title, "class", "images", "lowest score")
        for number in shown[:EXAMPLES]:
            count, low = counts[number]
            short = f" of {selection.quotas[number]:,}" if count < selection.quotas[number] else ""
            made.add_row(_class_name(number, class_names), f"{count:,}{short}", text.score(low))
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
