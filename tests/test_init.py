"""`tophat init`: what it finds in images, what it decides from that, and the recipe that it writes."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny
from cluster.errors import RecipeError, SourceError
from models.config import ModelConfig
from pipeline.data.labeled import REJECTED, hold_out, load_labels
from pipeline.data.sources import open_source
from pipeline.guide import budget, decide, look, writing
from pipeline.guide.budget import Costs
from pipeline.guide.findings import Findings, Look, Machine, Place, Ready, repeats
from pipeline.recipe.reading import load, source_settings, validate
from pipeline.recipe.sections import Recipe
from runs import execute

Answer = tuple[int, str, str]
CPUS, GPUS = Machine(2, 24.0), Machine(16, 128.0, 4, "H200")
COSTS = Costs(64, 0.008, 0.004, 0.002, 0.001, 0.001, 0.001)


# What is held out


def drawn(stage: str) -> dict[str, np.ndarray]:
    """The labels of D's three parts, in one array each."""
    return {name: np.concatenate(load_labels(f"{stage}/{name}")[1]) for name in ("train", "validation", "test")}


def test_without_a_test_set_a_part_of_d_is_held_out_for_it(ray_local: None, tmp_path: Path) -> None:
    tiny.write_folders(tmp_path)
    recipe = tiny.recipe(str(tmp_path))
    recipe["labeled"] = {"train": {"uri": str(tmp_path / "train")}, "test_fraction": 0.25, "validation_fraction": 0.34}
    made = execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")["labeled-train"]
    parts = drawn(made.uri)
    used = np.stack([part != REJECTED for part in parts.values()])
    assert (used.sum(axis=0) == 1).all()  # each image in one part
    assert {name: np.bincount(part[part != REJECTED]).tolist() for name, part in parts.items()} == {
        "train": [6, 6, 6],
        "validation": [3, 3, 3],  # of the 9 that the test set leaves
        "test": [3, 3, 3],
    }
    assert (made.outputs.images, made.outputs.held_out, made.outputs.held_for_test) == (18, 9, 9)

    recipe["labeled"]["validation_fraction"] = 0.6
    other = execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")["labeled-train"]
    assert (drawn(other.uri)["test"] == parts["test"]).all()
    assert (drawn(other.uri)["validation"] != parts["validation"]).any()
    recipe["labeled"]["test_fraction"] = 0.5
    assert execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")["labeled-train"].fresh


def test_two_images_a_class_cannot_be_split_in_three(ray_local: None, tmp_path: Path) -> None:
    tiny.write_folders(tmp_path, share=0.17)
    recipe = tiny.recipe(str(tmp_path))
    recipe["labeled"] = {"train": {"uri": str(tmp_path / "train")}}
    with pytest.raises(
        RecipeError, match=r"^labeled\.validation_fraction = 0\.1: can hold out no image, as every class"
    ):
        execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")


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


# The look


def looked(folder: Path, *, labeled: bool = False, most: int = look.MOST) -> Look:
    source = open_source("--labeled", source_settings("--labeled", str(folder)), labeled=labeled)
    return look.look("--labeled", source, labeled=labeled, most=most)


def save(path: Path, width: int, height: int, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def test_a_look_at_labeled_images(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / "cat" / f"{number}.png", 40, 60 + number)
    for number in range(3):
        save(tmp_path / "dog" / f"{number}.jpg", 50, 50, number, "L")
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "dog" / "same.png")
    (tmp_path / "dog" / "broken.png").write_bytes(b"nothing")
    found = looked(tmp_path, labeled=True)
    assert (found.images, found.seen, found.whole, found.labeled) == (11, 11, True, 10)
    assert dict(found.per_class) == {"cat": 6, "dog": 4}
    assert dict(found.unusable) == {"not_an_image": 1}
    assert found.examples[0].shown == "dog/broken.png"
    assert found.shorter == 40
    assert 1.5 < found.elongation < 1.65
    assert found.gray == pytest.approx(0.3)
    assert [sorted(place.shown for place in places) for places in found.content.values() if len(places) > 1] == [
        ["cat/0.png", "dog/same.png"]
    ]
    assert len(repeats(found, None, seen()).contradicting) == 1
    save(tmp_path / "0.png", 40, 40)
    with pytest.raises(SourceError, match=r"^--labeled = .*: has no label for '0.png'; put the images into one folder"):
        looked(tmp_path, labeled=True)


def test_a_large_pool_is_read_in_part(tmp_path: Path) -> None:
    save(tmp_path / "0.png", 8, 8)
    data = (tmp_path / "0.png").read_bytes()
    for number in range(1, 300):
        (tmp_path / f"{number}.png").write_bytes(data)
    found = looked(tmp_path, most=128)
    assert (found.images, found.whole) == (300, False)
    assert 64 <= found.seen <= 128
    assert sum(map(len, found.content.values())) == found.seen
    everything = looked(tmp_path)
    assert (everything.seen, everything.whole) == (300, True)
    tiny.write_tar(tmp_path / "tar" / "a.tar", tiny.digits()["one"][:40])
    tiny.write_tar(tmp_path / "tar" / "b.tar", tiny.digits()["two"][:40])
    assert looked(tmp_path / "tar").whole
    part = looked(tmp_path / "tar", most=20)
    assert not part.whole
    assert part.seen == 40
    assert 70 < part.images < 95


# The command


@pytest.fixture
def images(tmp_path: Path) -> Path:
    tiny.write_folders(tmp_path / "images")
    return tmp_path / "images"


def test_a_recipe_for_real_images(tophat: Callable[..., Answer], images: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.yaml"
    copied = images / "unlabeled" / "seen.png"
    shutil.copy(images / "test" / "one" / "20.png", copied)
    words = ("init", "--labeled", str(images / "train"), "--unlabeled", str(images / "unlabeled"), "--out", str(out))
    code, said, errors = tophat(*words, "--test", str(images / "test"), "--name", "digits", "--minutes", "30")
    assert (code, errors) == (0, "")
    for part in (
        "labeled: 36 images, 3 classes (one 12, two 12, zero 12)",
        "test: 60 images",
        "unlabeled: 154 images, 3 of 154 unusable",
        "1 of D or test in U",
        "28 pixels, crop",
        f"next: tophat run {out}",
    ):
        assert part in said
    assert "minutes on " in said
    recipe = load(str(out))
    assert recipe.name == "digits"
    assert isinstance(recipe.teacher.model, ModelConfig)
    assert not recipe.teacher.model.transform.flip
    listed = pq.read_table(tmp_path / "digits.copies.parquet")
    assert recipe.select.exclude == (str(tmp_path / "digits.copies.parquet"),)
    source = open_source("unlabeled", recipe.unlabeled, labeled=False)
    shard = next(one for one in source.shards() if one.name == listed["shard"][0].as_py())
    assert shard.files[listed["index"][0].as_py()] == "seen.png"
    for wrong, rule in (
        ("", "names no file"),
        ("s3://bucket/x.yaml", "is in an object store"),
        (str(tmp_path), "is a folder"),
    ):
        code, _, errors = tophat(*words, "--out", wrong)
        assert (code, errors.startswith(f"error: --out = {wrong!r}: {rule}")) == (2, True)
    before = out.read_bytes()
    code, _, errors = tophat(*words)
    assert code == 2
    assert errors == f"error: --out = {str(out)!r}: exists already; give another --out, or --force to write over it\n"
    assert out.read_bytes() == before


def test_a_teacher_that_exists_answers_by_name(tophat: Callable[..., Answer], images: Path, tmp_path: Path) -> None:
    teacher = tiny.save_teacher(str(tmp_path / "teacher"))
    words = (
        "init",
        "--labeled",
        str(images / "train"),
        "--unlabeled",
        str(images / "unlabeled"),
        "--out",
        str(tmp_path / "r.yaml"),
    )
    code, said, _ = tophat(*words, "--teacher", teacher)
    assert code == 0
    assert "it knows every class of D by name" in said
    recipe = load(str(tmp_path / "r.yaml"))
    assert (recipe.teacher.model, recipe.teacher.head, recipe.teacher.training) == (teacher, "native", None)
    assert recipe.labeled.test is None
    assert recipe.labeled.test_fraction == 0.25
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"")
    code, _, errors = tophat(*words, "--teacher", teacher, "--force")
    assert code == 2
    assert errors.startswith(f"error: --teacher = {teacher!r}: has a model.safetensors of 0 bytes")
    code, _, errors = tophat(*words, "--teacher", "nowhere", "--force")
    assert code == 2
    assert errors.startswith("error: --teacher = 'nowhere': has no model.json")


def test_what_no_run_could_begin_with_is_refused(tophat: Callable[..., Answer], images: Path, tmp_path: Path) -> None:
    def refused(labeled: str, unlabeled: str = "unlabeled", *more: str) -> str:
        words = ("--labeled", str(images / labeled), "--unlabeled", str(images / unlabeled), *more)
        code, _, errors = tophat("init", *words, "--out", str(tmp_path / "r.yaml"))
        assert code == 2
        assert errors.count("\n") == 1
        assert not (tmp_path / "r.yaml").exists()
        return errors

    assert "does not exist or holds no files" in refused("nowhere")
    assert refused("train", "nothing").startswith("error: --unlabeled = ")
    shutil.copytree(images / "train" / "one", images / "single" / "one")
    assert "error: --name = 'a b': " in refused("train", "unlabeled", "--name", "a b")
    assert "has one class ('one'), and there is nothing to tell it from" in refused("single")
    for name in ("one", "two"):
        for number in (0, 1):
            (images / "few" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(images / "train" / name / f"{number}.png", images / "few" / name)
    assert "has 2 of each class, too few to hold out a test and a validation set" in refused("few")
    assert "--test = " in (said := refused("few", "unlabeled", "--test", str(images / "test")))
    assert "has 1 classes that --labeled does not have ('zero')" in said
    (images / "few" / "empty").mkdir()
    assert "has no usable images of 1 of its classes ('empty')" in refused("few")
    (images / "texts").mkdir()
    (images / "texts" / "a.txt").write_text("x")
    assert "holds no tar shards, Parquet files or images, only files of the kind .txt" in refused("texts")


def test_a_labeled_folder_inside_the_pool(tophat: Callable[..., Answer], images: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.yaml"
    code, said, _ = tophat("init", "--labeled", str(images / "train"), "--unlabeled", str(images), "--out", str(out))
    assert code == 0
    assert "warning: --labeled lies inside --unlabeled: the student would learn twice from labeled images" in said
    assert len(pq.read_table(tmp_path / "r.copies.parquet")) == 36


def test_labels_may_stand_in_a_file(tophat: Callable[..., Answer], images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    lines = ["path,label"]
    for number, name in enumerate(("one", "two") * 6):
        shutil.copy(images / "train" / name / f"{number // 2}.png", flat / f"{number}.png")
        lines.append(f"{number}.png,{name}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    words = ("--labeled", str(flat), "--labels", str(tmp_path / "labels.csv"), "--unlabeled", str(images / "unlabeled"))
    code, said, errors = tophat("init", *words, "--out", str(tmp_path / "r.yaml"))
    assert (code, errors) == (0, "")
    assert "labeled: 12 images, 2 classes (one 6, two 6)" in said
    assert load(str(tmp_path / "r.yaml")).labeled.train.labels == str(tmp_path / "labels.csv")
