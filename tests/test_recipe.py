"""Recipes: the shipped ones, the paper's numbers, and what a user reads about a mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import InputError, RecipeError
from cluster.store import RunStore
from models.config import ModelConfig
from pipeline.plan import plan
from pipeline.recipe.reading import load, shipped, validate
from pipeline.recipe.sections import Recipe


def message(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_shipped_recipes() -> None:
    assert set(shipped()) == {"demo", "fashion-mnist", "paper"}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_loads(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert recipe.name == name
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load(str(resolved)) == recipe
    assert isinstance(recipe.teacher.model, ModelConfig)
    assert recipe.teacher.model.transform.size == recipe.student.model.transform.size


@pytest.mark.parametrize("name", ["demo", "fashion-mnist"])
def test_laptop_recipes_need_no_gpu_and_two_cores(name: str) -> None:
    recipe = load(name)
    assert recipe.teacher.training is not None
    for training in (recipe.teacher.training, recipe.pretrain, recipe.fine_tune.training, recipe.supervised):
        assert training.gpus_per_worker == 0
        assert training.workers * training.cpus_per_worker <= 2
    assert recipe.score.gpus_per_actor == 0
    recipe.check_class_count(10)


def test_paper_states_section_4_1() -> None:
    recipe = load("paper")
    pretrain, fine_tune = recipe.pretrain, recipe.fine_tune.training
    assert isinstance(recipe.teacher.model, ModelConfig)
    assert recipe.teacher.training is not None
    assert recipe.teacher.model.architecture == "resnext101_32x48d"
    assert recipe.student.model.architecture == "resnet50"
    assert recipe.score.classes_per_image == 10
    assert recipe.select.images_per_class == 16_000
    for training in (recipe.teacher.training, pretrain, fine_tune, recipe.supervised):
        assert (training.workers, training.batch_size, training.global_batch) == (64, 24, 1536)
        assert training.weight_decay == 0.0001
        assert training.gpus_per_worker == 1
    assert pretrain.images_seen == 10**9
    assert pretrain.learning_rate == 0.1
    assert pretrain.peak_learning_rate == pytest.approx(0.1 / 256 * 1536)
    assert pretrain.warmup > 0
    assert (pretrain.drops, pretrain.drop_factor) == (13, 0.5)
    assert (fine_tune.epochs, fine_tune.images_seen) == (30, None)
    assert fine_tune.peak_learning_rate == pytest.approx(0.00025 / 256 * 1536)
    assert (fine_tune.drops, fine_tune.drop_factor) == (3, 0.1)
    assert fine_tune.warmup == 0
    assert 0.00025 in recipe.fine_tune.sweep.learning_rates
    recipe.check_class_count(1000)


def test_overrides_take_yaml_values() -> None:
    recipe = load(
        "demo",
        [
            "seed=7",
            "pretrain.learning_rate=1e-3",
            "pretrain.warmup=.05",
            "fine_tune.sweep.learning_rates=[1e-3, 0.5, 2]",
            "labeled.validation=null",
            "labeled.classes=[a, 'b: c']",
            "select.min_score=0.25",
            "student.model.options={width: 6}",
            "student.model.options.slope=1e-3",
            "unlabeled.uri=s3://bucket/a=b",
            "dhat.images_per_shard=100",
        ],
    )
    assert recipe.seed == 7
    assert recipe.pretrain.learning_rate == 1e-3
    assert recipe.pretrain.warmup == 0.05
    assert recipe.fine_tune.sweep.learning_rates == (1e-3, 0.5, 2.0)
    assert recipe.labeled.validation is None
    assert recipe.labeled.classes == ("a", "b: c")
    assert recipe.select.min_score == 0.25
    assert recipe.student.model.options == {"width": 6, "slope": 0.001}
    assert recipe.unlabeled.uri == "s3://bucket/a=b"
    assert recipe.dhat.images_per_shard == 100


def test_a_minimum_score_of_logits_may_be_any_number() -> None:
    assert load("demo", ["score.logits=true", "select.min_score=-2.5"]).select.min_score == -2.5


def test_an_override_changes_its_own_section_alone() -> None:
    """The shipped recipes share sections by YAML anchors."""
    demo, changed = load("demo"), load("demo", ["student.model.transform.padding=1"])
    assert changed.student.model.transform.padding == 1
    assert changed.teacher == demo.teacher
    paper, changed = load("paper"), load("paper", ["supervised.epochs=7"])
    assert changed.supervised.epochs == 7
    assert changed.teacher == paper.teacher


def test_images_seen_and_epochs_take_each_others_place() -> None:
    assert load("demo", ["pretrain.epochs=3"]).pretrain.images_seen is None
    assert load("demo", ["supervised.images_seen=3"]).supervised.epochs is None
    both = load("demo").model_dump(mode="json")
    both["pretrain"] |= {"epochs": 3, "images_seen": 5}
    with pytest.raises(RecipeError, match=r"^pretrain = .*: state exactly one of images_seen and epochs, got both; "):
        validate(both)
    both["pretrain"] |= {"epochs": None, "images_seen": None}
    with pytest.raises(RecipeError, match="got neither"):
        validate(both)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "select.image_per_class=5",
            "select.image_per_class = 5: is not a field of a recipe; did you mean images_per_class?",
        ),
        ("slect.images_per_class=5", "did you mean select?"),
        ("labeled.validation.url=x", "labeled.validation.url = 'x': is not a field of a recipe; did you mean uri?"),
        ("fine_tune.training.momentun=0", "did you mean momentum?"),
        (
            "report.zzz=1",
            "report.zzz = 1: is not a field of a recipe; use one of classes, first_ranks, strided_ranks",
        ),
        (
            "select.images_per_class=0",
            "select.images_per_class = 0: Input should be greater than or equal to 1; "
            "correct it in the recipe, or --set select.images_per_class=...",
        ),
        ("score.batch_size=many", "score.batch_size = 'many': Input should be a valid integer"),
        (
            "fine_tune.sweep.learning_rates=[0.1, -1]",
            "fine_tune.sweep.learning_rates.1 = -1: Input should be greater than 0",
        ),
        ("fine_tune.sweep.learning_rates=[]", "fine_tune.sweep.learning_rates"),
        ("labeled.train=x", "labeled.train = 'x': "),
        ("unlabeled.layout=zip", "'webdataset', 'parquet' or 'folder'"),
        ("name=../x", "name = '../x': "),
        ("labeled.classes=[a, a]", "labeled = "),
        (
            "select.classes_per_image=4",
            "select.classes_per_image = 4 must be at most score.classes_per_image = 3: only the stored classes",
        ),
        ("select.min_score=-2", "select.min_score = -2 must be from 0 to 1, as softmax scores are"),
        ("select.min_score=.nan", "select.min_score = nan: Input should be a finite number"),
        ("pretrain.precision=float16", "precision = float16 needs gpus_per_worker = 1"),
        (
            "seed",
            "--set = 'seed': must have the form section.field=value; write e.g. select.images_per_class=200",
        ),
        ("=5", "must have the form section.field=value"),
        ("select..x=5", "must have the form section.field=value"),
        ("seed.x=5", "--set seed.x = '5': goes into seed, which is no section; check the field's name"),
        ("labeled.classes=[a", "--set labeled.classes = '[a': is not a YAML value; quote it"),
        ("student.model.architecture=null", "student.model.architecture = None: Input should be a valid string"),
    ],
)
def test_a_mistake_is_one_line_with_field_value_rule_and_fix(override: str, expected: str) -> None:
    assert expected in message("demo", override)


def test_a_missing_section(tmp_path: Path) -> None:
    document = yaml.safe_load(shipped()["demo"].read_text())
    del document["unlabeled"]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(document))
    assert message(str(file)) == (
        "unlabeled = 'nothing': must be given; add unlabeled to the recipe, or --set unlabeled=..."
    )


def test_an_unknown_key_says_more_than_the_missing_one() -> None:
    document: dict[str, Any] = load("demo").model_dump(mode="json")
    document["unlabelled"] = document.pop("unlabeled")
    with pytest.raises(RecipeError, match=r"^unlabelled = .*: is not a field of a recipe; did you mean unlabeled\?$"):
        validate(document)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [", "is not valid YAML"),
        (b"- a", "must be a mapping of sections"),
        (b"", "must be a mapping of sections"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    assert expected in message(str(file))


def test_no_file() -> None:
    text = message("dem")
    assert text == "RECIPE = 'dem': is not a file; give a YAML file, or one of demo, fashion-mnist, paper"


def test_p_above_the_class_count() -> None:
    with pytest.raises(RecipeError) as error:
        load("demo").check_class_count(2)
    assert str(error.value) == (
        "score.classes_per_image = 3: must be at most 2, the number of classes of D; set it to 2 or less"
    )


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load("demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5


def test_every_number_has_bounds() -> None:
    """No field of a recipe takes any number whatever."""

    def numbers(schema: dict[str, Any], place: str) -> list[str]:
        found = []
        for name, field in schema.get("properties", {}).items():
            for option in [field, *field.get("anyOf", [])]:
                if option.get("type") in ("integer", "number") and not (
                    {"minimum", "exclusiveMinimum"} & set(option) and {"maximum", "exclusiveMaximum"} & set(option)
                ):
                    found.append(f"{place}.{name}")
        return found

    schema = Recipe.model_json_schema()
    assert [n for title, d in [("Recipe", schema), *schema["$defs"].items()] for n in numbers(d, title)] == []


def test_every_field_is_described() -> None:
    schema = Recipe.model_json_schema()
    fields = [(t, n, f) for t, d in [("Recipe", schema), *schema["$defs"].items()] for n, f in d["properties"].items()]
    assert len(fields) > 50
    assert [f"{title}.{name}" for title, name, field in fields if not field.get("description")] == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name=2001-99-99", "is not a YAML value"),
        ("seed=!!int abc", "is not a YAML value"),
        ("select.class_weights=[.inf, 1]", "finite number"),
        (
            "teacher.model.options.width=.nan",
            "teacher.model.options.width = nan: must be true, false, a finite number or a text",
        ),
        ("select.class_weights=[0, 0]", "class_weights must have one above 0"),
        ("labeled.classes=[]", "at least 1 item"),
    ],
)
def test_values_that_are_none(override: str, said: str) -> None:
    assert said in message("demo", override)


def test_a_slash_at_the_end_changes_nothing() -> None:
    assert load("demo", ["unlabeled.uri=a/b/"]) == load("demo", ["unlabeled.uri=a/b"])


@pytest.mark.parametrize("name", ["nowhere", "nowhere.parquet"])
def test_lists_that_are_not_there_are_told_by_their_field(name: str, tmp_path: Path) -> None:
    given = [f'select.exclude=["{tmp_path}/{name}"]', f"select.tags={tmp_path}/{name}"]
    for override, field in zip(given, ("select.exclude", "select.tags"), strict=True):
        with pytest.raises(InputError) as error:
            plan(load("demo", [override]), RunStore(str(tmp_path / "run")))
        assert str(error.value).startswith(f"{field} = ")
