"""Last layers for models that exist: by logistic regression, by a class map, by training them alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import tiny
from cluster.errors import ModelError, RecipeError
from models.architectures import build
from models.card import read_card
from models.config import ModelConfig, Transform
from models.directory import load, save
from models.inference import Inference, Predictor
from models.linear import FOLDS, STRENGTHS, fit_head, with_head
from pipeline.evaluation import load_predictions, right
from pipeline.ready import class_outputs, read_class_map
from pipeline.recipe.reading import validate
from runs import Finished, execute, fresh

QUICK = {**tiny.TRAINING, "epochs": 2}


def digits(classes: int) -> tuple[Any, Any]:
    """Real digits of 8 x 8 pixels as features, float32 [N, 64], and their numbers, int64 [N]."""
    images, numbers = load_digits(return_X_y=True)
    chosen = numbers < classes
    return images[chosen].astype(np.float32), numbers[chosen].astype(np.int64)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_head_says_what_scikit_learn_says(classes: int) -> None:
    features, labels = digits(classes)
    features, labels = features[:300], labels[:300]
    head = fit_head(features, labels, classes, seed=0)
    center, scale = features.mean(axis=0), np.sqrt(features.var(axis=0).mean())
    inputs = ((features - center) / scale).astype(np.float64)
    wanted = LogisticRegression(C=head.strength, max_iter=2000).fit(inputs, labels).predict_proba(inputs)
    logits = torch.from_numpy(features @ head.weight.T + head.bias)
    assert np.abs(logits.softmax(dim=1).numpy() - wanted).max() < 1e-4
    assert head.strength in STRENGTHS
    assert head.losses[STRENGTHS.index(head.strength)] == min(head.losses)
    assert head.held_out.shape == (len(labels), classes)
    assert (head.held_out.argmax(axis=1) == labels).mean() > 0.8


def test_what_is_held_out_was_not_seen() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 200)).astype(
        np.float32
    )  # more features than images: any labels can be learned by heart
    labels = np.tile(np.arange(3), 20)
    head = fit_head(features, labels, 3, seed=0)
    assert (head.held_out.argmax(axis=1) == labels).mean() < 0.6
    assert min(head.losses) > 1.0  # no better than a guess among three
    assert head.strength < 0.1


def test_two_images_a_class_are_enough() -> None:
    features, labels = digits(4)
    few = np.concatenate([np.flatnonzero(labels == number)[:2] for number in range(4)])
    head = fit_head(features[few], labels[few], 4, seed=0)
    assert head.weight.shape == (4, 64)
    assert FOLDS > 2


def test_the_last_layer_of_a_network_is_replaced(tmp_path: Path) -> None:
    uri = tiny.save_teacher(str(tmp_path / "model"))
    width = len(load(uri).model.state_dict()["fc.weight"][0])
    random = np.random.default_rng(0)
    features = random.normal(size=(40, width)).astype(np.float32)
    head = fit_head(features, np.tile(np.arange(5), 8), 5, seed=0)
    network, config = with_head(uri, head, list("abcde"))
    save(str(tmp_path / "other"), network, config=config, class_names=list("abcde"), metrics={}, provenance={})
    before, after = load(uri).model.state_dict(), load(str(tmp_path / "other")).model.state_dict()
    assert torch.equal(after["fc.weight"], torch.from_numpy(head.weight))
    assert torch.equal(after["fc.bias"], torch.from_numpy(head.bias))
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("fc."))


class Convolutional(torch.nn.Module):
    """A network whose last layer is no linear one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.last = torch.nn.Conv2d(3, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x).mean(dim=(2, 3))  # type: ignore[no-any-return]


def test_a_network_without_a_linear_last_layer(tmp_path: Path) -> None:
    config = ModelConfig.model_validate({**tiny.MODEL, "architecture": "test_heads:Convolutional", "options": {}})
    save(str(tmp_path), build(config, 3), config=config, class_names=list("abc"), metrics={}, provenance={})
    head = fit_head(*digits(3), 3, seed=0)
    with pytest.raises(ModelError, match="does not end in a linear layer"):
        with_head(str(tmp_path), head, list("abc"))


# Class maps


def test_several_outputs_of_a_class_add_up(tmp_path: Path) -> None:
    uri = tiny.save_teacher(str(tmp_path / "model"))
    images = np.random.default_rng(0).integers(0, 255, (7, 3, 28, 28), np.uint8)

    def scores(**how: Any) -> Any:
        found = Predictor(uri, Inference(**how))(images)
        return np.take_along_axis(found.scores, found.classes.argsort(axis=1), axis=1)

    single, merged = scores(classes_per_image=3), scores(classes_per_image=2, outputs=(2, (0, 1)))
    assert np.abs(merged - np.stack([single[:, 2], single[:, 0] + single[:, 1]], axis=1)).max() < 1e-6
    logits = scores(classes_per_image=2, outputs=(2, (0, 1)), logits=True)
    each = scores(classes_per_image=3, logits=True)
    assert np.abs(logits[:, 1] - np.logaddexp(each[:, 0], each[:, 1])).max() < 1e-5
    with pytest.raises(ModelError, match="has 3 outputs, and output 3 is wanted"):
        scores(classes_per_image=1, outputs=((0, 3),))


def test_a_class_map(tmp_path: Path) -> None:
    file = tmp_path / "map.csv"
    file.write_bytes(b'\xef\xbb\xbftabby cat,cat\r\n"Egyptian, cat",cat\r\nbeagle,dog\r\n')
    assert read_class_map(str(file)) == {"tabby cat": "cat", "Egyptian, cat": "cat", "beagle": "dog"}
    known = ["cat", "dog", "", "cat"]
    assert class_outputs("m", known, ("dog", "cat"), merge=True) == (1, (0, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", "has in line 1 3 columns; give two columns"),
        ("a,\n", "has an empty name in line 1"),
        ("a,b\na,c\n", "has 'a' twice, for 'b' and 'c'"),
        ("\udcff", "is not a text in UTF-8"),
    ],
)
def test_a_class_map_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match=message):
        read_class_map(str(tmp_path / "map.csv"))


# Recipes


@pytest.mark.parametrize(
    ("teacher", "rule"),
    [
        ({"model": tiny.MODEL, "training": QUICK, "head": "linear"}, "head = linear is for a model that exists"),
        ({"model": "models/x", "head": "zero-shot"}, "head = zero-shot needs a model that knows words"),
        ({"model": "models/x", "head": "linear", "class_map": "map.csv"}, "class_map is for the own classes"),
        ({"model": "models/x", "templates": ["a {}"]}, "templates are for head = zero-shot"),
        ({"model": "open_clip:x", "head": "zero-shot", "templates": ["a photo"]}, "templates must have {}"),
        ({"model": "models/x", "head": "fresh"}, "head = fresh needs training"),
    ],
)
def test_heads_that_do_not_fit(teacher: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecipeError) as error:
        validate(tiny.recipe("x", teacher=teacher))
    assert rule in str(error.value)


@pytest.mark.usefixtures("ray_local")
def test_a_frozen_trunk_stays_as_it_is(finished: Finished, tmp_path: Path) -> None:
    teacher = finished.stages["teacher"].uri
    recipe = validate(
        finished_recipe(
            finished, {"model": teacher, "head": "fresh", "training": {**QUICK, "epochs": 30, "freeze": "trunk"}}
        )
    )
    stages = execute(recipe, finished.copy(tmp_path / "run"), until="teacher")
    before, after = load(teacher).model.state_dict(), load(stages["teacher"].uri).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert stages["teacher"].outputs.history[-1]["top1"] > 0.6  # by its last layer alone


def finished_recipe(finished: Finished, teacher: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The recipe of the finished run, with another teacher."""
    import yaml

    document = yaml.safe_load(Path(finished.uri, "recipe.yaml").read_text())
    return {**document, "teacher": teacher, **changes}


@pytest.mark.usefixtures("ray_local")
def test_a_linear_head_teaches(finished: Finished, tmp_path: Path) -> None:
    model = finished.stages["teacher"].uri
    uri = finished.copy(tmp_path / "run")
    recipe = validate(finished_recipe(finished, {"model": model, "head": "linear"}))
    stages = execute(recipe, uri, until="scores")
    made = stages["teacher"].outputs
    assert made.metrics["val_top1"] > 0.8  # of images that were held out
    assert made.images == 36  # 12 of each of the three classes of D
    assert read_card(stages["teacher"].uri).class_names == ["one", "two", "zero"]
    held_out = load_predictions(f"{stages['teacher'].uri}/{made.held_out}")
    assert held_out.num_rows == 36
    assert right(held_out).mean() == pytest.approx(made.metrics["val_top1"])
    assert set(held_out["label_name"].to_pylist()) == {"one", "two", "zero"}
    assert [str(file).partition("/")[0] for file in held_out["file"]] == held_out["label_name"].to_pylist()
    again = execute(recipe, uri, until="scores")
    assert fresh(again) == []
    trained = validate(finished_recipe(finished, {"model": model, "head": "linear", "training": QUICK}))
    assert fresh(execute(trained, uri, until="teacher")) == ["teacher-head", "teacher"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_student_that_starts_from_a_model(finished: Finished, tmp_path: Path) -> None:
    start = finished.stages["teacher"].uri
    document = finished_recipe(finished, tiny.recipe("x")["teacher"])
    recipe = validate({**document, "student": {"start": start}})
    stages = execute(recipe, finished.copy(tmp_path / "run"))
    plain = finished.stages["supervised"].outputs.history[0]["top1"]
    assert {"pretrained", "student", "supervised"} <= set(fresh(stages))
    assert stages["supervised"].outputs.history[0]["top1"] > plain  # it begins with features
    assert stages["student"].outputs.architecture == "resnet8"
    assert "evaluation" in stages


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_student_that_starts_from_a_model_may_see_another_input(finished: Finished, tmp_path: Path) -> None:
    teacher = read_card(finished.stages["teacher"].uri).model.transform
    for start in (finished.stages["teacher"].uri, "test_heads:Pooled"):
        document = finished_recipe(finished, tiny.recipe("x")["teacher"])
        document["student"] = {"start": start, "transform": {"size": 40, "crop": "none"}}
        uri = finished.copy(tmp_path / ("directory" if "/" in start else "factory"))
        stages = execute(validate(document), uri, until="pretrained")
        made = read_card(stages["pretrained"].uri).model.transform
        assert (made.size, made.resize, made.crop) == (40, 46, "none")
        assert made.mean == (teacher.mean if "/" in start else Transform().mean)  # as it says of itself
        again = yaml.safe_load((Path(uri) / "recipe.yaml").read_text())
        assert again["student"]["transform"] == {"size": 40, "resize": 46, "crop": "none"}
        assert fresh(execute(validate(again), uri, until="pretrained")) == []
    document["student"] = {"start": finished.stages["teacher"].uri, "transform": {"crop": "pad", "padding": 100}}
    with pytest.raises(ModelError, match=r"^student\.transform = .*padding = 100 must be at most 14, half of size"):
        execute(validate(document), uri, until="pretrained")
    for student in ({"transform": {"size": 40}}, {"model": {}, "start": "x", "transform": {"size": 40}}):
        with pytest.raises(RecipeError, match=r"^student\.transform.*changes the input of student\.start"):
            validate({**document, "student": student})


class Pooled(torch.nn.Module):
    """A network for images of any size: means of a few convolutions, which learn nothing here, before its last layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)  # as one that comes with weights of its own
        self.features = torch.nn.Conv2d(3, 32, 9, stride=4)
        self.fc = torch.nn.Linear(32 * 49, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(self.features(x).relu(), 7)
        return self.fc(pooled.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_factory_is_a_teacher_with_a_linear_head(finished: Finished, tmp_path: Path) -> None:
    recipe = validate(finished_recipe(finished, {"model": "test_heads:Pooled", "head": "linear"}))
    uri = finished.copy(tmp_path / "run")
    stages = execute(recipe, uri, until="scores")
    assert fresh(stages) == ["teacher-source", "teacher", "scores"]
    assert stages["teacher"].outputs.metrics["val_top1"] > 0.7  # its features are random, and digits easy
    assert read_card(stages["teacher"].uri).class_names == ["one", "two", "zero"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_class_map_joins_outputs(finished: Finished, tmp_path: Path) -> None:
    teacher = load(finished.stages["teacher"].uri)
    state = teacher.model.state_dict()
    rows = [0, 1, 2, 2]  # two outputs for zero, of which each is as likely as it would be alone
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][rows]
    network = build(teacher.config, 4)
    network.load_state_dict(state)
    uri, names = str(tmp_path / "model"), ["uno", "due", "nil", "null"]
    save(uri, network, config=teacher.config, class_names=names, metrics={}, provenance={})
    (tmp_path / "map.csv").write_text("uno,one\ndue,two\nnil,zero\nnull,zero\n")
    recipe = finished_recipe(finished, {"model": uri, "class_map": str(tmp_path / "map.csv")})
    stages = execute(validate(recipe), finished.copy(tmp_path / "run"), until="scores")
    assert stages["teacher"].outputs.class_outputs == (0, 1, (2, 3))
    assert stages["scores"].outputs.scored == finished.stages["scores"].outputs.scored
    (tmp_path / "map.csv").write_text("uno,one\ndue,two\nnil,nought\n")
    with pytest.raises(RecipeError, match=r"names 1 classes that D does not have \('nought'\)"):
        execute(validate(recipe), finished.copy(tmp_path / "other"), until="teacher")
