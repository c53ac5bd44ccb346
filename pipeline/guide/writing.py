"""A plan as a recipe with comments, and what was found and decided as lines for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import one_line
from pipeline.guide.decide import (
    FEW_LABELS,
    Network,
    Plan,
    described,
    few_labels,
    standard_error,
    trainings_of,
    transform_of,
    unequal,
)
from pipeline.guide.findings import Findings, Look, Ready, fewest
from pipeline.recipe.document import dump

LONGEST = 110
"""Of a comment."""
NAMED = 3
"""Classes that are named, at either end."""


@dataclass(frozen=True)
class Sources:
    """The recipe's sources, as plain data; `test` and `excluded` where there are some."""

    name: str
    labeled: Mapping[str, Any]
    unlabeled: Mapping[str, Any]
    test: Mapping[str, Any] | None = None
    excluded: str | None = None


def recipe_text(plan: Plan, found: Findings, sources: Sources, minutes: float) -> str:
    """A recipe that `pipeline.recipe.reading.load` takes.

    Args:
        plan: what was decided.
        found: from what.
        sources: where the images are.
        minutes: that a run takes, about.
    """
    trainings = trainings_of(plan)
    lines = [
        _comment(
            0,
            f"Written by `tophat init` for {found.classes:,} classes, {found.labeled.labeled:,} labeled images and "
            f"{found.unlabeled.images:,} unlabeled",
        ),
        _comment(0, f"ones, on {described(found.machine)}: about {minutes:.0f} minutes."),
        _comment(0, "Learning rates are per 256 images. `tophat recipe --explain FIELD` tells of a field."),
        _line(0, "name", sources.name),
        *_sources(plan, sources),
        *_teacher(plan, found.given_teacher, trainings["teacher"]),
        *_selection(plan, min(10, found.classes), sources.excluded),
        *_student(plan),
        _line(0, "pretrain", trainings["pretrain"]),
        "fine_tune:",
        _line(1, "training", trainings["fine_tune"]),
        _comment(1, plan.rates.why),
        _line(1, "sweep", {"learning_rates": list(plan.rates.value)}),
        _comment(0, plan.lengths.why),
        _line(0, "supervised", trainings["supervised"]),
    ]
    return "\n".join(lines) + "\n"


def _sources(plan: Plan, sources: Sources) -> list[str]:
    """D with what is held out of it, and U."""
    lines = ["labeled:", _line(1, "train", sources.labeled)]
    if sources.test is not None:
        lines.append(_line(1, "test", sources.test))
    if plan.test_fraction is not None:
        lines.append(_line(1, "test_fraction", plan.test_fraction.value, plan.test_fraction.why))
    lines.append(_line(1, "validation_fraction", plan.validation_fraction.value, plan.validation_fraction.why))
    if plan.balance:
        lines.append(_line(1, "balance", True, "the classes are unequal"))
    return [*lines, _line(0, "unlabeled", sources.unlabeled)]


def _teacher(plan: Plan, given: Ready | None, training: Mapping[str, Any]) -> list[str]:
    if given is not None:
        return ["teacher:", _line(1, "model", given.uri), _line(1, "head", plan.head, plan.teacher.why)]
    assert plan.teacher.value is not None
    network = _network(plan.teacher.value, plan.teacher.why)
    return ["teacher:", *network, *_input(plan, 2, anchor="&input "), _line(1, "training", training)]


def _selection(plan: Plan, classes: int, excluded: str | None) -> list[str]:
    """How U is scored, and what of it is selected."""
    score: dict[str, Any] = {"classes_per_image": classes}
    if plan.machine.gpus:
        score |= {"gpus_per_actor": 1, "precision": "bfloat16"}
    lines = [_line(0, "score", score)]
    if plan.drop_copies:
        lines.append(_line(0, "deduplicate", {"copies": True}, "U has images that are copies of others"))
    lines += [
        "select:",
        _line(1, "classes_per_image", min(plan.selected_classes.value, classes), plan.selected_classes.why),
        _line(1, "images_per_class", "auto" if plan.tries else plan.images_per_class.value, _why_k(plan)),
    ]
    if excluded is not None:
        lines.append(_line(1, "exclude", [excluded], "images of U that are copies of labeled or test images"))
    return lines


def _student(plan: Plan) -> list[str]:
    if plan.start is not None:
        return ["student:", _line(1, "start", plan.start.uri, plan.student.why), *_input(plan, 1)]
    network = _network(plan.student.value, plan.student.why)
    return ["student:", *network, *(_input(plan, 2) if plan.teacher.value is None else ["    transform: *input"])]


def _network(network: Network, why: str) -> list[str]:
    options = [_line(2, "options", dict(network.options))] if network.options else []
    return ["  model:", _line(2, "architecture", network.architecture, why), *options]


def _input(plan: Plan, level: int, anchor: str = "") -> list[str]:
    why = f"{plan.size.why}; flip: {plan.flip.why}"
    return [_comment(level, why), _line(level, "transform", transform_of(plan), anchor=anchor)]


def _line(level: int, key: str, value: Any, why: str = "", anchor: str = "") -> str:
    """One field, on one line, with its comment before it where the line would be too long."""
    text = dump({key: value}, one_line=True).strip()[1:-1]  # without the braces of the mapping
    text = "  " * level + (text.replace(": ", f": {anchor}", 1) if anchor else text)
    if not why:
        return text
    if len(text) + len(why) < LONGEST:
        return f"{text}  # {one_line(why)}"
    return f"{_comment(level, why)}\n{text}"


def _comment(level: int, text: str) -> str:
    return "  " * level + f"# {one_line(text)}"


def found_lines(found: Findings) -> list[str]:
    """What was found, in a few lines."""
    said = [f"labeled: {_images(found.labeled)}, {_classes(found.labeled.per_class)}"]
    if found.test is not None:
        said.append(f"test: {_images(found.test)}")
    said.append(f"unlabeled: {_images(found.unlabeled)}")
    colors = "gray" if found.labeled.gray > 0.9 else "in color" if found.labeled.gray < 0.1 else "partly gray"
    said.append(f"images: {colors}, shorter side {found.labeled.shorter:,} pixels (U: {found.unlabeled.shorter:,})")
    copies = found.copies
    some = "" if found.unlabeled.whole else f" (of {found.unlabeled.seen:,} that were read)"
    said.append(
        f"copies: {copies.inside:,} inside D, {len(copies.test):,} in the test set, {len(copies.pool):,} of D or test in U, "
        f"{copies.pool_inside:,} inside U{some}"
    )
    said.append(f"machine: {described(found.machine)}")
    return [one_line(line) for line in said]


def decided_lines(plan: Plan, found: Findings) -> list[tuple[str, str, str]]:
    """What was decided: the setting, its value, and why."""
    said = [
        ("input", f"{plan.size.value} pixels, {plan.fit.value}", f"{plan.size.why}; {plan.fit.why}"),
    ]
    if plan.teacher.value is None:
        assert found.given_teacher is not None
        said.append(("teacher", f"{found.given_teacher.uri}, {plan.head}", plan.teacher.why))
    else:
        said.append(("teacher", plan.teacher.value.shown, plan.teacher.why))
    said.append(("student", plan.student.value.shown, plan.student.why))
    if plan.test_fraction is not None:
        said.append(("test set", f"{plan.test_fraction.value:.0%} of D", plan.test_fraction.why))
    said.append(("validation", f"{plan.validation_fraction.value:.0%} of D", plan.validation_fraction.why))
    said.append(("P", f"{plan.selected_classes.value}", plan.selected_classes.why))
    said.append(("K", "auto" if plan.tries else f"{plan.images_per_class.value:,}", _why_k(plan)))
    rates = ", ".join(f"{rate:g}" for rate in plan.rates.value)
    said.append(("rates", rates, plan.rates.why))
    return [(name, one_line(value), one_line(why)) for name, value, why in said]


def _why_k(plan: Plan) -> str:
    if not plan.tries:
        return plan.images_per_class.why
    return f"the run tries {', '.join(f'{k:,}' for k in plan.tries)}: too large a K hurts, and U alone does not tell it"


def warnings_of(found: Findings) -> list[str]:
    """What a person should know before a run, in plain words, the gravest first."""
    said = []
    labeled, copies = found.labeled, found.copies
    for option in found.inside:
        learnt = "would learn from test images" if option == "--test" else "would learn twice from labeled images"
        said.append(
            f"{option} lies inside --unlabeled: the student {learnt}, were those of them that were read not left out"
        )
    if copies.test:
        names = ", ".join(f"{one.shown} = {other.shown}" for one, other in copies.test[:3])
        said.append(
            f"{len(copies.test):,} test images are copies of labeled ones ({names}): the accuracy would be too good; remove them"
        )
    if copies.contradicting:
        one, other = copies.contradicting[0]
        said.append(
            f"{len(copies.contradicting):,} labeled images are in two classes ({one.shown} is {other.shown}): remove the wrong ones"
        )
    if copies.inside > len(copies.contradicting):
        said.append(
            f"{copies.inside:,} labeled images are copies of others: what is held out is less new than it seems"
        )
    if copies.pool and not found.unlabeled.whole:
        share = found.unlabeled.seen / found.unlabeled.images
        said.append(
            f"only {share:.0%} of U was read for copies: the rest may have more (deduplicate in the recipe finds them)"
        )
    few = fewest(labeled.per_class, FEW_LABELS - 1)
    if few:
        names = ", ".join(f"{name} {count:,}" for name, count in few[:3])
        said.append(
            f"{len(few):,} of {found.classes:,} classes have fewer than {FEW_LABELS} labels ({names}): more of these would help most"
        )
    most, least = max(labeled.per_class.values()), min(labeled.per_class.values())
    if unequal(labeled.per_class):
        said.append(
            f"the classes are unequal, from {least:,} to {most:,} labels: trainings see as many images of each (balance)"
        )
    for option, seen in (("--labeled", labeled), ("--test", found.test), ("--unlabeled", found.unlabeled)):
        if seen is not None and seen.unusable:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(seen.unusable.items()))
            of = f" of the {seen.decoded:,} looked at" if seen.decoded < seen.images else ""
            said.append(
                f"{option}: {sum(seen.unusable.values()):,} images{of} cannot be used ({reasons}), such as {seen.examples[0].shown}"
            )
    if found.given_teacher is None and few_labels(labeled.per_class):
        said.append(
            "no network learns much from so few labels alone: give one that has learned from other images as the teacher "
            "(--teacher timm:NAME or torchvision:NAME; docs/models.md)"
        )
    if found.unlabeled.images < 5 * labeled.labeled:
        said.append(f"U is small beside D ({found.unlabeled.images:,} and {labeled.labeled:,} images): expect little")
    if found.test is not None and found.test.labeled < 100:
        error = standard_error(found.test.labeled)
        said.append(
            f"the test set has {found.test.labeled:,} images: differences below {2 * error:.0f} points say nothing"
        )
    return said


def time_line(seconds: Mapping[str, float], found: Findings) -> str:
    """How long a run takes, and what of it."""
    stages = ", ".join(f"{name} {_minutes(took)}" for name, took in seconds.items())
    return f"about {_minutes(sum(seconds.values()))} minutes on {described(found.machine)}: {stages}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 570 else f"{seconds / 60:.1f}"


def _images(one: Look) -> str:
    bad = sum(one.unusable.values())
    about = "" if one.whole else "about "
    return f"{about}{one.images:,} images" + (f", {bad:,} of {one.decoded:,} unusable" if bad else "")


def _classes(per_class: Mapping[str, int]) -> str:
    few = fewest(per_class, max(per_class.values()))
    ends = few if len(few) <= 2 * NAMED else [*few[:NAMED], *few[-1:]]
    shown = ", ".join(f"{name[:40]} {count:,}" for name, count in ends)
    return f"{len(per_class):,} classes ({shown})"
