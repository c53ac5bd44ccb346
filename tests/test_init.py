"""`tophat init`: what it finds in images, and the command; and what a run holds out of D."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny
from cluster.errors import RecipeError, SourceError
from models.config import ModelConfig
from pipeline.data.labeled import REJECTED, load_labels
from pipeline.data.sources import open_source
from pipeline.guide import look
from pipeline.guide.findings import Look, repeats
from pipeline.recipe.reading import load, source_settings, validate
from runs import execute

Answer = tuple[int, str, str]


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
    assert len(repeats(found, None, replace(found, content={})).contradicting) == 1
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
