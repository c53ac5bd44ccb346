"""What `tophat init` decides from what it has found, how long that takes, and the recipe that it writes: pure functions."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.config import ModelConfig
from pipeline.data.labeled import REJECTED, hold_out
from pipeline.guide import budget, decide, writing
from pipeline.guide.budget import Costs
from pipeline.guide.findings import Findings, Look, Machine, Place, Ready, repeats
from pipeline.recipe.reading import load
from pipeline.recipe.sections import Recipe

CPUS, GPUS = Machine(2, 24.0), Machine(16, 128.0, 4, "H200")
COSTS = Costs(64, 0.008, 0.004, 0.002, 0.001, 0.001, 0.001)


# Decisions


def seen(images: int = 1_000, per_class: Mapping[str, int] | None = None, **changes: Any) -> Look:
    """A look that found nothing special."""
    usual: dict[str, Any] = {
        "images": images, "seen": images, "decoded": images, "unusable": {}, "examples": (), "per_class": per_class or {},
        "shorter": 200, "elongation": 1.2, "gray": 0.0, "content": {}, "some": (),
    }  # fmt: skip
    return Look(**usual | changes)


def ready(uri: str, parameters: int = 4_000_000, **changes: Any) -> Ready:
    """A model that exists, for 224 pixels."""
    return Ready(uri, ModelConfig(), parameters, **changes)


def findings(per_class: Mapping[str, int] | None = None, pool: int = 7_000, **changes: Any) -> Findings:
    """Eight classes of 30 labels, on CPUs, if nothing else is said."""
    per_class = per_class or {f"class {number}": 30 for number in range(8)}
    labeled = seen(sum(per_class.values()), per_class)
    usual: dict[str, Any] = {"labeled": labeled, "unlabeled": seen(pool), "test": seen(500, per_class), "machine": CPUS}
    usual |= changes
    copies = repeats(usual["labeled"], usual["test"], usual["unlabeled"])
    return Findings(**{"copies": copies, **usual})


@pytest.mark.parametrize(
    ("shorter", "gpus", "size"),
    [(20, 0, 20), (3, 0, 8), (28, 0, 28), (63, 0, 32), (64, 0, 64), (500, 0, 64), (500, 1, 224), (150, 1, 128)],
)
def test_the_input_is_no_larger_than_the_images_and_than_cpus_bear(shorter: int, gpus: int, size: int) -> None:
    assert decide.input_size(shorter, gpus).value == size


def test_the_smaller_images_decide() -> None:
    assert decide.decide(findings(unlabeled=seen(7_000, shorter=40))).size.value == 32


def test_long_images_are_padded_and_the_recipe_says_so() -> None:
    assert decide.fit(1.4).value == "crop"
    assert decide.fit(1.8).value == "pad"
    plan = decide.decide(findings(unlabeled=seen(7_000, elongation=3.0)))
    assert decide.transform_of(plan)["fit"] == "pad"
    assert "fit" not in decide.transform_of(decide.decide(findings()))


def test_digits_and_letters_are_not_mirrored() -> None:
    assert not decide.flip(map(str, range(10))).value
    assert not decide.flip(["zero", "One", "two"]).value
    assert decide.flip(["cat", "dog", "x"]).value


@pytest.mark.parametrize("per_class", [[10], [2, 2], [1, 3, 50], [40] * 8, [7] * 1_000])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.33])
def test_as_many_are_said_to_be_held_out_as_are(per_class: list[int], share: float) -> None:
    labels = np.repeat(np.arange(len(per_class)), per_class)
    _, held = hold_out([labels], share, seed=3)
    counts = np.bincount(held[0][held[0] != REJECTED], minlength=len(per_class))
    assert decide.held_out(per_class, share) == counts.tolist()


def test_shares_are_as_large_as_errors_ask_and_no_larger_than_d_bears() -> None:
    assert decide.share_for_validation([30] * 8).value == 0.33  # 80 of 240 images
    assert (
        "80 images: the standard error of an accuracy is up to 5.6 points" in decide.share_for_validation([30] * 8).why
    )
    assert decide.share_for_validation([500] * 10).value == 0.1
    assert sum(decide.held_out([1_000] * 1_000, decide.share_for_validation([1_000] * 1_000).value)) == 5_000
    assert decide.share_for_test([30] * 8).value == 0.25
    assert decide.share_for_test([1_000] * 10).value == 0.04


def test_fewer_rates_where_fewer_images_judge() -> None:
    assert [len(decide.rates(images, decide.SMALL).value) for images in (10, 50, 80, 5_000)] == [1, 2, 3, 3]
    assert set(decide.rates(50, decide.SMALL).value) < set(decide.rates(80, decide.SMALL).value)
    assert max(decide.rates(80, decide.LARGE).value) < min(decide.rates(10, decide.SMALL).value)


def test_networks_fit_the_machine() -> None:
    def chosen(*arguments: int) -> tuple[str, str]:
        teacher, student = decide.networks(*arguments)
        return teacher.value.shown, student.value.shown

    assert chosen(64, 8, 200, 0) == ("resnet14, width 16", "resnet8, width 8")
    assert chosen(64, 1_000, 9_000, 0) == ("resnet14, width 32", "resnet8, width 16")
    assert chosen(32, 10, 50_000, 1) == ("resnet56, width 32", "resnet20, width 16")
    assert chosen(224, 10, 500, 1) == ("resnet50", "resnet18")
    assert chosen(224, 1_000, 10**6, 8) == ("resnext101_32x4d", "resnet50")


def test_the_head_of_a_teacher_that_exists() -> None:
    names = {"cat": 5, "caf\u00e9": 5}
    other = ready("models/t", class_names=("dog", "cafe\u0301", "cat"))
    assert decide.head_of(other, names).value == "native"
    assert decide.head_of(replace(other, class_names=("cat", "cat", "caf\u00e9")), names).value == "linear"
    assert decide.head_of(replace(other, class_names=("cat",)), names).value == "linear"
    clip = ready("open_clip:ViT-B-32/openai", library="open_clip")
    assert decide.head_of(clip, names).value == "zero-shot"
    assert decide.head_of(clip, {"cat": 50, "dog": 60}).value == "linear"
    assert decide.head_of(ready("timm:resnet50", library="timm"), names).value == "linear"


LITE = ready("timm:lite", library="timm")


def test_what_the_student_begins_with() -> None:
    plan = decide.decide(findings(teacher=LITE))
    assert (plan.start, plan.head, plan.size.value) == (LITE, "linear", 64)
    seen_by = plan.lengths.value
    assert seen_by.supervised == pytest.approx(seen_by.pretrain + seen_by.fine_tune, rel=0.05)
    assert decide.trainings_of(plan)["pretrain"]["learning_rate"] == 0.05
    alone = decide.decide(findings(student=LITE))
    assert (alone.start, alone.head, alone.teacher.value) == (LITE, "linear", None)
    for found in (
        findings(teacher=replace(LITE, parameters=25_000_000)),  # CPUs would take hours
        findings(teacher=replace(LITE, resizable=False)),
        findings(teacher=LITE, unlabeled=seen(7_000, shorter=28)),
        findings({"a": 5_000, "b": 5_000}, 10**6, teacher=LITE),
        findings(teacher=replace(LITE, library="")),  # one's own model, which a student is smaller than
    ):
        assert decide.decide(found).start is None
    large = replace(LITE, parameters=25_000_000, resizable=False)
    gpu = decide.decide(findings(teacher=large, machine=GPUS))
    assert (gpu.start, gpu.size.value) == (large, 224)
    plan = decide.decide(findings(student=large))
    assert (plan.start, plan.size.value) == (large, 224)
    assert budget.in_time(plan, COSTS, findings(student=large), 0.1).size.value == 224
    plan = decide.decide(findings(student=LITE))
    assert budget.in_time(plan, COSTS, findings(student=LITE), 0.1).size.value == 64


def test_p_and_k() -> None:
    assert [decide.selected_classes(classes).value for classes in (2, 20, 100, 1_000, 10_000)] == [1, 1, 2, 10, 10]
    assert decide.images_per_class(7_000, 8, 30).value == 175
    assert decide.images_per_class(200, 8, 30).value == 25  # no more than U has for each
    assert decide.images_per_class(5, 8, 30).value == 1
    assert decide.images_per_class(10**9, 1_000, 1_000).value == 16_000


def test_the_baseline_sees_what_the_student_sees() -> None:
    for labeled in (50, 200, 5_000):
        seen_by = decide.lengths(labeled, 1_000, 0, decide.SMALL).value
        assert seen_by.supervised == pytest.approx(seen_by.pretrain + seen_by.fine_tune, rel=0.05)
        assert seen_by.teacher >= 15_000


# Time


def test_a_plan_is_shortened_until_it_is_in_time() -> None:
    found = findings()
    plan = decide.decide(found)
    whole = sum(budget.estimate(plan, COSTS, found).values()) / 60
    assert budget.in_time(plan, COSTS, found, whole + 1) == plan
    shorter = budget.in_time(plan, COSTS, found, 0.6 * whole)
    assert sum(budget.estimate(shorter, COSTS, found).values()) / 60 == pytest.approx(0.6 * whole, rel=0.03)
    assert shorter.size == plan.size
    assert shorter.lengths.value.pretrain < plan.lengths.value.pretrain
    assert len(shorter.notes) == 1
    smaller = budget.in_time(plan, COSTS, found, 0.45 * whole)
    assert smaller.size.value < plan.size.value
    assert "smaller" in smaller.notes[0]
    impossible = budget.in_time(plan, COSTS, found, 0.1)
    assert impossible.lengths.value.pretrain >= plan.lengths.value.pretrain / 3.1
    assert "that is still" in impossible.notes[-1]


def test_time_follows_the_machine_and_the_pool() -> None:
    found = findings()
    plan = decide.decide(found)
    took = budget.estimate(plan, COSTS, found)
    assert took["pretrained"] == pytest.approx(budget.TRAINING_START + plan.lengths.value.pretrain * 0.005 / 2)
    assert took["scores"] == pytest.approx(budget.SCORING_START + 7_000 * 0.003 / 2)
    more = findings(pool=70_000)
    assert budget.estimate(decide.decide(more), COSTS, more)["scores"] > 4 * took["scores"]
    few = findings(pool=8)
    assert "choice of K" in took
    assert "choice of K" not in budget.estimate(decide.decide(few), COSTS, few)  # there is nothing to choose from
    given = findings(teacher=ready("models/t"))
    assert budget.estimate(decide.decide(given), COSTS, given)["teacher"] < took["teacher"]


def test_slow_decoding_is_said() -> None:
    plan = decide.decide(findings())
    assert budget.slow_images(plan, COSTS) is None
    assert "--resize 128" in (budget.slow_images(plan, replace(COSTS, pool_decode=0.02)) or "")


# Copies and warnings


def content(*images: tuple[str, str, str]) -> dict[bytes, tuple[Place, ...]]:
    """Images by content: what they show, file, label."""
    found: dict[bytes, tuple[Place, ...]] = {}
    for number, (shows, file, label) in enumerate(images):
        key = hashlib.sha256(shows.encode()).digest()
        found[key] = (*found.get(key, ()), Place("files-000000", number, file, label))
    return found


def test_copies_are_found_wherever_they_are() -> None:
    labeled = seen(content=content(("x", "a/1", "a"), ("x", "a/2", "a"), ("x", "b/3", "b"), ("y", "b/4", "b")))
    test = seen(content=content(("y", "b/t", "b"), ("z", "b/u", "b")))
    pool = seen(content=content(("q", "1", ""), ("q", "2", ""), ("z", "3", ""), ("x", "4", ""), ("x", "5", "")))
    found = repeats(labeled, test, pool)
    assert (found.inside, found.pool_inside, found.pool_test) == (2, 2, 1)
    assert [(one.shown, other.shown) for one, other in found.contradicting] == [("a/1", "b/3")]
    assert [(one.shown, other.shown) for one, other in found.test] == [("b/t", "b/4")]
    assert [(one.index, one.shown) for one, _ in found.pool] == [(2, "3"), (3, "4"), (4, "5")]


def test_warnings_are_said_in_plain_words() -> None:
    assert writing.warnings_of(findings({"a": 100, "b": 200})) == []
    (only,) = writing.warnings_of(findings())
    assert "--teacher timm:NAME" in only
    assert writing.warnings_of(findings(student=LITE)) == writing.warnings_of(findings(teacher=LITE)) == []
    labeled = seen(
        105,
        {"few": 5, "many": 100},
        unusable={"truncated": 2},
        examples=(Place("s", 1, "few/cut.png"),),
        content=content(("x", "few/1", "few"), ("x", "many/2", "many")),
    )
    test = seen(40, {"few": 20, "many": 20}, content=content(("x", "few/9", "few")))
    said = "\n".join(
        writing.warnings_of(
            findings(labeled.per_class, 300, labeled=labeled, test=test, inside=("--labeled", "--test"))
        )
    )
    for part in (
        "--labeled lies inside --unlabeled: the student would learn twice from labeled images",
        "--test lies inside --unlabeled: the student would learn from test images",
        "1 test images are copies of labeled ones (few/9 = few/1)",
        "1 labeled images are in two classes (few/1 is many/2)",
        "1 of 2 classes have fewer than 10 labels (few 5)",
        "from 5 to 100 labels",
        "--labeled: 2 images cannot be used (2 truncated), such as few/cut.png",
        "U is small beside D",
        "the test set has 40 images: differences below 16 points say nothing",
    ):
        assert part in said


def test_ten_thousand_classes_are_summed_up() -> None:
    found = findings({f"class {number:05d}": 2 + number % 50 for number in range(10_000)}, 10**6)
    plan = decide.decide(found)
    said = [
        *writing.found_lines(found),
        *writing.warnings_of(found),
        *(" ".join(row) for row in writing.decided_lines(plan, found)),
    ]
    assert len(said) < 20
    assert max(map(len, said)) < 300


# The recipe


def written(folder: Path, found: Findings, **changes: Any) -> tuple[str, Recipe]:
    usual: dict[str, Any] = {"name": "mine", "labeled": {"uri": "d"}, "unlabeled": {"uri": "u"}}
    usual |= {"test": {"uri": "t"}} if found.test is not None else {}
    text = writing.recipe_text(decide.decide(found), found, writing.Sources(**usual | changes), 3.0)
    (folder / "mine.yaml").write_text(text)
    return text, load(str(folder / "mine.yaml"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"test": None},
        {"machine": GPUS},
        {"machine": replace(GPUS, gpus=1), "unlabeled": seen(10**7, shorter=40)},
        {"machine": Machine(1, 2.0), "test": None},
        {"machine": Machine(64, 500.0)},
        {"teacher": ready("timm:resnet50", 25_557_032, library="timm")},
        {"teacher": LITE},
        {"student": replace(LITE, resizable=False), "test": None},
        {"teacher": ready("open_clip:ViT-B-32/x", library="open_clip"), "per_class": {"a": 3, "b": 3}},
        {"teacher": ready("models/t", class_names=("a", "b")), "per_class": {"a": 3, "b": 9}},
        {"unlabeled": seen(3, elongation=9.0, shorter=2)},
        {"per_class": {"a": 5, "b": 50}},
        {"per_class": {f"class {number}": 3 for number in range(2_000)}},
    ],
)
def test_what_is_written_is_a_recipe(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = findings(**changes)
    text, recipe = written(tmp_path, found, excluded="d.copies.parquet")
    assert len(text.splitlines()) < 40
    plan = decide.decide(found)
    recipe.check_class_count(found.classes)
    assert recipe.select.images_per_class == ("auto" if plan.tries else plan.images_per_class.value)
    assert (
        recipe.labeled.balance == plan.balance == ("a" in found.labeled.per_class and found.labeled.per_class["b"] > 9)
    )
    assert recipe.labeled.validation_fraction == plan.validation_fraction.value
    assert (recipe.labeled.test is None) == (found.test is None)
    assert recipe.select.exclude == ("d.copies.parquet",)
    network = recipe.student.model
    transform = recipe.student.transform if network is None else network.transform
    assert transform is not None
    assert transform.size == plan.size.value
    assert recipe.student.start == (plan.start and plan.start.uri)
    assert recipe.pretrain.global_batch <= 64 * max(1, found.machine.gpus)
    if found.given_teacher is None:
        assert isinstance(recipe.teacher.model, ModelConfig)
        assert recipe.teacher.model.transform == transform
        assert recipe.teacher.training is not None
        assert recipe.teacher.training.images_seen == plan.lengths.value.teacher
    else:
        assert (recipe.teacher.model, recipe.teacher.head) == (found.given_teacher.uri, plan.head)


HOSTILE = "x: {y} # 'z' \"q\" \u2028- [1] &a *b ${HOME} %d"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = {f"{HOSTILE}\nselect: {number}": 3 + number for number in range(3)}
    teacher, machine = ready(HOSTILE, class_names=tuple(names)), replace(GPUS, gpu=f"{HOSTILE}\nx: 1")
    text, recipe = written(
        tmp_path, findings(names, teacher=teacher, machine=machine), labeled={"uri": HOSTILE}, excluded=HOSTILE
    )
    assert recipe.labeled.train.uri == recipe.teacher.model == recipe.select.exclude[0] == HOSTILE
    assert all(line.isprintable() for line in text.split("\n"))
    labeled = seen(9, names, unusable={"empty": 1}, examples=(Place("s", 0, f"{HOSTILE}\n"),))
    assert all(line.isprintable() for line in writing.found_lines(findings(names, labeled=labeled)))
