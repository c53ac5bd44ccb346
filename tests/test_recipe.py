"""Recipes: the shipped ones, the paper's numbers, and what a user reads about a mistake."""

import json
import pickle
import time
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.errors import InputError, RecipeError, RecipeErrors
from cluster.store import RunStore
from models.config import ModelConfig, Training
from models.usual import usual_training
from pipeline.plan import plan
from pipeline.recipe.document import parse
from pipeline.recipe.reading import _override, load, load_text, shipped, validate
from pipeline.recipe.sections import Recipe


def network(recipe: Recipe) -> ModelConfig:
    """The student's."""
    assert recipe.student.model is not None
    return recipe.student.model


def message(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_shipped_recipes() -> None:
    assert set(shipped()) == {"demo", "drawings", "fashion-mnist", "paper"}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_loads(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert recipe.name == name
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load(str(resolved)) == recipe
    assert recipe.teacher is not None
    if isinstance(recipe.teacher.model, ModelConfig):
        assert recipe.teacher.model.transform.size == network(recipe).transform.size


@pytest.mark.parametrize(("name", "classes"), [("demo", 10), ("drawings", 8), ("fashion-mnist", 10)])
def test_laptop_recipes_need_no_gpu_and_two_cores(name: str, classes: int) -> None:
    recipe = load(name)
    assert recipe.teacher is not None
    trainings = [recipe.teacher.training, recipe.pretrain, recipe.fine_tune.training, recipe.supervised]
    assert (trainings[0] is None) == (name == "drawings")
    for training in filter(None, trainings):
        assert training.gpus_per_worker == 0
        assert training.workers * training.cpus_per_worker <= 2
    assert recipe.score.gpus_per_actor == 0
    recipe.check_class_count(classes)


def test_paper_states_section_4_1() -> None:
    recipe = load("paper")
    pretrain, fine_tune = recipe.pretrain, recipe.fine_tune.training
    assert recipe.teacher is not None
    assert isinstance(recipe.teacher.model, ModelConfig)
    assert recipe.teacher.training is not None
    assert recipe.teacher.model.architecture == "resnext101_32x48d"
    assert network(recipe).architecture == "resnet50"
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
    assert network(recipe).options == {"width": 6, "slope": 0.001}
    assert recipe.unlabeled.uri == "s3://bucket/a=b"
    assert recipe.dhat.images_per_shard == 100


def test_a_minimum_score_of_logits_may_be_any_number() -> None:
    assert load("demo", ["score.logits=true", "select.min_score=-2.5"]).select.min_score == -2.5


def test_an_override_changes_its_own_section_alone() -> None:
    """The shipped recipes share sections by YAML anchors."""
    demo, changed = load("demo"), load("demo", ["student.model.transform.padding=1"])
    assert network(changed).transform.padding == 1
    assert changed.teacher == demo.teacher
    paper, changed = load("paper"), load("paper", ["supervised.epochs=7"])
    assert changed.supervised.epochs == 7
    assert changed.teacher == paper.teacher


def lengths(training: Training) -> tuple[int | None, int | None]:
    return training.epochs, training.images_seen


def test_images_seen_and_epochs_take_each_others_place() -> None:
    assert lengths(load("demo", ["pretrain.epochs=3"]).pretrain) == (3, None)
    assert lengths(load("demo", ["supervised.images_seen=3"]).supervised) == (None, 3)
    for overrides in (["pretrain.epochs=3", "pretrain.images_seen=5"], ["pretrain.images_seen=5", "pretrain.epochs=3"]):
        assert lengths(load("demo", overrides).pretrain) == (3, 5)
    assert lengths(load("demo", ["pretrain.epochs=3", "supervised.images_seen=5"]).pretrain) == (3, None)
    usual = load("demo", ["pretrain={}"])
    assert lengths(usual.pretrain) == (90, 60_000)
    document = usual.model_dump(mode="json")
    _override(document, "pretrain.epochs=3")
    assert lengths(validate(document).pretrain) == (3, None)


MINIMAL = """
labeled:
  train: {uri: data/birds/train}
  test: {uri: data/birds/test}
unlabeled: {uri: data/birds/unlabeled}
"""


def written(path: Path, text: str, *overrides: str) -> Recipe:
    path.write_text(text)
    return load(str(path), overrides)


def test_the_least_recipe_and_what_it_comes_to(tmp_path: Path) -> None:
    recipe = written(tmp_path / "birds.yaml", MINIMAL)
    assert recipe.name == "birds"
    assert isinstance(recipe.teacher.model, ModelConfig)
    assert recipe.teacher.model.architecture == network(recipe).architecture == "resnet50"
    assert recipe.teacher.training is not None
    for training in (recipe.teacher.training, recipe.pretrain, recipe.supervised):
        assert (*lengths(training), training.learning_rate) == (90, 60_000, 0.1)
    assert lengths(recipe.fine_tune.training) == (30, 8_000)
    assert recipe.fine_tune.sweep.learning_rates == (0.001, 0.004, 0.016, 0.064)
    assert [recipe.score.kept_of(classes) for classes in (2, 10, 1000)] == [2, 10, 10]
    assert load_text("RUN", "recipe.yaml", recipe.to_yaml().encode()) == recipe
    recipe.check_class_count(2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pretrain: {}", (90, 60_000, 2.0)),
        ("pretrain:", (90, 60_000, 2.0)),
        ("pretrain: {momentum: 0.5}", (90, 60_000, 2.0)),
        ("pretrain: {epochs: 3}", (3, None, 2.0)),
        ("pretrain: {epochs: null, images_seen: 7}", (None, 7, 2.0)),
        ("pretrain: {epochs: 3, images_seen: 7, learning_rate: 0.5}", (3, 7, 0.5)),
    ],
)
def test_what_a_training_leaves_out_is_usual(given: str, expected: tuple[int, int, float], tmp_path: Path) -> None:
    recipe = written(tmp_path / "r.yaml", MINIMAL + given, "student.model.architecture=resnet8")
    assert (*lengths(recipe.pretrain), recipe.pretrain.learning_rate) == expected


def test_what_is_usual_depends_on_the_network(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    small = written(file, MINIMAL + "student: {model: {architecture: resnet20}}\nfine_tune: {sweep: {concurrent: 2}}")
    assert (small.supervised.learning_rate, small.pretrain.learning_rate) == (2.0, 2.0)
    assert small.fine_tune.sweep.learning_rates == (0.02, 0.1, 0.5, 2.0)
    assert small.fine_tune.sweep.concurrent == 2
    assert small.teacher.training is not None
    assert small.teacher.training.learning_rate == 0.1  # it is the teacher's network that counts there
    assert written(file, MINIMAL, "student.model.architecture=my.net:make").supervised.learning_rate == 0.1
    ready = written(file, MINIMAL, "teacher.model=models/teacher")
    assert ready.teacher.training is None
    tuned = written(file, MINIMAL, "teacher.model=models/teacher", "teacher.training={}").teacher.training
    assert tuned is not None
    assert (*lengths(tuned), tuned.learning_rate) == (30, 8_000, 0.1)
    taught = written(file, MINIMAL, "teacher.model.architecture=resnet8", "teacher.self_training={}").teacher
    assert taught.self_training is not None
    assert (*lengths(taught.self_training.pretrain), taught.self_training.pretrain.learning_rate) == (90, 60_000, 2.0)
    assert taught.self_training.fine_tune.sweep.learning_rates == (0.02, 0.1, 0.5, 2.0)
    weak = written(file, MINIMAL, "teacher.model.architecture=resnet8", "teacher.weak.images.uri=w").teacher.weak
    assert weak is not None
    assert (*lengths(weak.training), weak.training.learning_rate) == (90, 60_000, 2.0)


@pytest.mark.parametrize(
    ("architecture", "trained", "expected"),
    [
        ("resnet14", False, (90, 60_000, 2.0)),
        ("resnet14", True, (30, 8_000, 0.1)),
        ("resnet18", False, (90, 60_000, 0.1)),
        ("resnet18", True, (30, 8_000, 0.1)),
    ],
)
def test_the_usual_training(architecture: str, trained: bool, expected: tuple[int, int, float]) -> None:
    found = usual_training(None, ModelConfig(architecture=architecture), trained=trained)
    assert (found["epochs"], found["images_seen"], found["learning_rate"]) == expected


def test_a_mistake_is_told_without_what_is_usual(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MINIMAL)
    assert message(str(tmp_path / "r.yaml"), "pretrain={drops: 30, warmup: 0.5}").startswith(
        "pretrain = {'drops': 30, 'warmup': 0.5}: warmup = 0.5 must end"
    )
    assert "teacher.training = 5: must be a section" in message(str(tmp_path / "r.yaml"), "teacher.training=5")
    assert "fine_tune.sweep = 5: must be a section" in message(str(tmp_path / "r.yaml"), "fine_tune.sweep=5")


def test_the_usual_p_is_what_it_was_when_it_was_a_number(tmp_path: Path) -> None:
    """Scores that were made with P = 10 are found again."""
    usual, ten, nine = (written(tmp_path / "r.yaml", MINIMAL, f"score.classes_per_image={p}") for p in ("null", 10, 9))
    assert usual.score.deciding() == ten.score.deciding() == {}
    assert nine.score.deciding() == {"classes_per_image": 9}
    with pytest.raises(
        RecipeError, match=r"^select\.classes_per_image = 4: must be at most 3, the number of classes of D"
    ):
        written(tmp_path / "r.yaml", MINIMAL, "select.classes_per_image=4").check_class_count(3)
    assert "must be at most score.classes_per_image = 10" in message(
        str(tmp_path / "r.yaml"), "select.classes_per_image=11"
    )


FINGERPRINTS = {
    "demo": {"student": "c83f7c60cc607203", "supervised": "2daf593429d54415"},
    "fashion-mnist": {"student": "e29db4bf7882acc3", "supervised": "2001351467a78601"},
    "paper": {"student": "b36340e9320a3927", "supervised": "d2ce1027192cc714"},
}
"""Of the last stages, which depend on those before, as they were when every field was given."""


@pytest.mark.parametrize("name", sorted(FINGERPRINTS))
def test_new_defaults_leave_the_stages_of_old_recipes_what_they_were(name: str) -> None:
    found = {one.name: one.made.fingerprint for one in plan(load(name), RunStore("/nowhere")).planned}
    assert {stage: found[stage] for stage in FINGERPRINTS[name]} == FINGERPRINTS[name]


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
            "select.images_per_class = 0: must be a whole number from 1 to 1,000,000,000, or auto; "
            "correct it in the recipe, or --set select.images_per_class=...",
        ),
        ("score.batch_size=many", "score.batch_size = 'many': must be a whole number"),
        (
            "fine_tune.sweep.learning_rates=[0.1, -1]",
            "fine_tune.sweep.learning_rates.1 = -1: must be greater than 0",
        ),
        (
            "fine_tune.sweep.learning_rates=[]",
            "fine_tune.sweep.learning_rates = []: must have 1 or more entries; correct it",
        ),
        (
            "supervised.learning_rate=200",
            "supervised.learning_rate = 200: must be less than or equal to 100, per 256 images; correct it",
        ),
        (
            "student.model.transform.size=4",
            "student.model.transform.size = 4: must be greater than or equal to 8, in pixels; correct it",
        ),
        ("unlabeled.layout=zip", "'webdataset', 'parquet' or 'folder'"),
        ("name=../x", "name = '../x': "),
        (
            "labeled.classes=[b, a, a]",
            "labeled.classes = ['b', 'a', 'a']: must be distinct names: those at 1 and 2 are the same text",
        ),
        ('labeled.classes=["\\u00e9", "e\\u0301"]', "those at 0 and 1 are the same text"),
        (
            "select.classes_per_image=4",
            "select.classes_per_image = 4 must be at most score.classes_per_image = 3: only the stored classes",
        ),
        ("select.min_score=-2", "select.min_score = -2 must be from 0 to 1, as softmax scores are"),
        ("select.min_score=.nan", "select.min_score = nan: must be a finite number"),
        ("pretrain.precision=float16", "precision = float16 needs gpus_per_worker = 1"),
        (
            "seed",
            "--set = 'seed': must have the form section.field=value; write e.g. select.images_per_class=200",
        ),
        ("=5", "must have the form section.field=value"),
        ("select..x=5", "must have the form section.field=value"),
        ("seed.x=5", "--set seed.x = '5': goes into seed, which is no section; check the field's name"),
        (
            "labeled.classes=[a",
            "--set labeled.classes = '[a': is not valid YAML (expected ',' or ']', but got '<stream end>', line 1, column 3); "
            "correct it, or quote a text as YAML does",
        ),
        ("labeled.train=x", "labeled.train = 'x': must be a section; "),
        ("select.exclude=x", "select.exclude = 'x': must be a list, as [a, b]; "),
        ("student.model.architecture=null", "student.model.architecture = None: must be a text"),
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
        (b"\xff\xfe\xfa", "is not a text in UTF-8; give a YAML file, saved as UTF-8"),
        ("name: demo".encode("utf-16"), "is not a text in UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00", "is not valid YAML (it has the character '\\x7f')"),
        (
            b"name: demo\nseed:\n\t- 1",
            "is not valid YAML (found character '\\t' that cannot start any token, line 3, column 1)",
        ),
        (b"a: " + b"[" * 500, "is nested too deeply"),
        (b"a: &a [*a]", "is nested too deeply, or in itself"),
        (b"a: &a\n  <<: *a", "is nested too deeply, or in itself"),
        (b"name: demo\n---\nname: demo", "is not valid YAML (but found another document, line 2, column 1)"),
        (
            b"name: !!python/object/apply:os.system [ls]",
            "has the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        (b"name: !!binary aGk=", "which no recipe has (line 1, column 7)"),
        (b"seed: 1\nname: demo\nseed: 2", "has 'seed' twice, in line 1, column 1, and in line 3, column 1; correct it"),
        (b"select:\n  tags: x\n  'tags': y", "has 'tags' twice, in line 2, column 3, and in line 3, column 3"),
        (b"select: {<<: {a: 1}, <<: {a: 2}}", "has '<<' twice"),
        (b"select: {<<: [1]}", "merges with << what is no mapping (line 1, column 14)"),
        (b"{a: 1}: 2", "has a key that is no text (line 1, column 1)"),
        (b'name: "a\\0b"', "has a character that no text has (line 1, column 7)"),
        (b'"\\ud800": 1', "has a character that no text has (line 1, column 1)"),
        (b'name: "\\U00110000"', "is not valid YAML (it has the number of a character that there is not)"),
        (b"#" * 5 * 2**20, "has over 2 MiB, as no recipe has"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    assert expected in message(str(file))
    assert len(message(str(file))) < 500 + len(str(file))


def several(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeErrors) as error:
        load(path, overrides)
    assert error.value.mistakes[0].field == error.value.field
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    return str(error.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        """
        name: demo
        labeled: {test: {url: x}, classes: [a, a]}
        unlabelled: {uri: x}
        images_per_class: 3
        uri: x
        zzz: 1
        teacher: {model: {options: {width: .nan}}, training: {epochs: 0}, images: 3}
        score: {actors: many, classes_per_image: 3}
        deduplicate: {nearest: 3, model: teacher}
        select: {classes_per_image: 4, zipf_exponent: -1}
        pretrain: {epochs: 3, drops: 30, warmup: 0.5}
        fine_tune: {training: {epochs: 3}, sweep: {learning_rates: [0.1, -1, x]}}
        supervised: {epochs: 3, learning_rate: true, momentum: 7}
        """
    )
    correct = "correct it in the recipe, or --set"
    known = ", ".join(Recipe.model_fields)
    assert several(str(file)).splitlines() == [
        "17 mistakes:",
        "  labeled.test.url = 'x': is not a field of a recipe; did you mean uri?",
        "  teacher.images = 3: is not a field of a recipe; did you mean teacher.weak.images?",
        "  unlabelled = {'uri': 'x'}: is not a field of a recipe; did you mean unlabeled?",
        "  images_per_class = 3: is not a field of a recipe; did you mean select.images_per_class?",
        "  uri = 'x': is not a field of a recipe; did you mean labeled.train.uri, labeled.validation.uri or labeled.test.uri?",
        f"  zzz = 1: is not a field of a recipe; use one of {known}",
        f"  labeled.classes = ['a', 'a']: must be distinct names: those at 0 and 1 are the same text; {correct} labeled.classes=...",
        "  teacher.model.options.width = nan: must be true, false, a finite number or a text; "
        f"{correct} teacher.model.options.width=...",
        f"  teacher.training.epochs = 0: must be greater than or equal to 1; {correct} teacher.training.epochs=...",
        f"  score.actors = 'many': must be a whole number; {correct} score.actors=...",
        f"  select.zipf_exponent = -1: must be greater than or equal to 0; {correct} select.zipf_exponent=...",
        "  pretrain = {'epochs': 3, 'drops': 30, 'warmup': 0.5}: warmup = 0.5 must end before the first drop: "
        f"at most 0.0323 with drops = 30; {correct} pretrain=...",
        "  fine_tune.sweep.learning_rates.1 = -1: must be greater than 0, per 256 images; "
        f"{correct} fine_tune.sweep.learning_rates.1=...",
        "  fine_tune.sweep.learning_rates.2 = 'x': must be a number, per 256 images; "
        f"{correct} fine_tune.sweep.learning_rates.2=...",
        "  supervised.learning_rate = 'true': must be a number, per 256 images; "
        f"{correct} supervised.learning_rate=...",
        f"  supervised.momentum = 7: must be less than 1; {correct} supervised.momentum=...",
        "  labeled.train = 'nothing': must be given; add labeled.train to the recipe, or --set labeled.train=...",
    ]


def test_a_rule_between_sections_is_told_beside_mistakes_in_others() -> None:
    wrong = ["pretrain.drops=-1", "select.classes_per_image=4", "deduplicate.nearest=3", "deduplicate.model=teacher"]
    assert [line.partition(":")[0].partition(" = ")[0] for line in several("demo", *wrong).splitlines()] == [
        "3 mistakes",
        "  deduplicate",
        "  select",
        "  pretrain.drops",
    ]


def test_of_very_many_mistakes_twenty_are_told(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("".join(f"{'k' * 500}{number}: 1\n" for number in range(2000)))
    lines = several(str(file)).splitlines()
    assert len(lines) == 22
    assert lines[0] == "2,002 mistakes:"
    assert lines[-1] == "  and 1,982 more"
    assert all("k…" in line and len(line) < 500 for line in lines[1:-1])


def test_a_recipe_without_a_name_has_its_files(tmp_path: Path) -> None:
    document = yaml.safe_load(shipped()["demo"].read_text())
    del document["name"]
    for file, name in {
        "birds.yaml": "birds",
        "my birds (2).yml": "my-birds-2",
        "...": "recipe",
        "\u00e9.x": "recipe",
    }.items():
        (tmp_path / file).write_text(yaml.safe_dump(document))
        assert load(str(tmp_path / file)).name == name


def test_aliases_that_repeat_billions_of_values_end_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    merges = ["b0: &b0 {x: 1}", *(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 10)}]}}" for n in range(1, 12))]
    for number, text in enumerate((lines, merges)):
        file = tmp_path / f"{number}.yaml"
        file.write_text("\n".join(text))
        began = time.monotonic()
        assert "has over 500,000 values, with what its aliases repeat" in message(str(file))
        assert time.monotonic() - began < 60


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert message(str(tmp_path)) == f"RECIPE = '{tmp_path}': cannot be read (Is a directory); give a YAML file"


def test_a_recipe_may_begin_with_a_byte_order_mark_and_merge_sections(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + shipped()["demo"].read_bytes())
    assert load(str(file)) == load("demo")
    text = "a: &a {x: 1, y: 2}\nb: {<<: [*a, {y: 3, z: 4}], x: 5}\nc: *a"
    assert parse(text) == {"a": {"x": "1", "y": "2"}, "b": {"x": "5", "y": "2", "z": "4"}, "c": {"x": "1", "y": "2"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("007", 7),
        ("-010", -10),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("1e3", 1000.0),
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("yes", True),
        ("Off", False),
        ("TRUE", True),
        ("yEs", "yEs"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("nan", "nan"),
        ("=", "="),
        ("<<", "<<"),
        ("\u0661", "\u0661"),
        ("9" * 5000, "9" * 5000),
        ('"1e3"', "1e3"),
        ("'yes'", "yes"),
        ("!!str 7", "7"),
    ],
)
def test_a_value_without_quotes_is_what_its_field_is(text: str, said: object) -> None:
    """A text where the field is a text; else, and where the field may be anything, what it says."""
    quoted = text[0] in "\"'!"
    found = load("demo", [f"labeled.classes=[{text}]", f"student.model.options={{x: {text}}}"])
    assert found.labeled.classes == (said if quoted else text,)
    option = network(found).options["x"]
    assert (option, type(option)) == (said, type(said))
    assert load_text("RUN", "recipe.yaml", found.to_yaml().encode()) == found


@pytest.mark.parametrize("text", ["007", '"007"', "7", "7.0", "0x7", "7e0"])
def test_a_number_is_read_as_people_write_it(text: str) -> None:
    assert load("demo", [f"seed={text}"]).seed == 7


def test_a_name_may_look_like_a_number() -> None:
    assert load("demo", ["name=007"]).name == "007"
    assert load("demo", ["unlabeled.uri=2024-01-31"]).unlabeled.uri == "2024-01-31"
    teacher = load("demo", ["teacher.model=010", "teacher.training=null"]).teacher
    assert teacher is not None
    assert teacher.ready == "010"


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
) | st.from_regex(r"[-+]?[0-9_.:oxeE]{1,6}|(yes|no|null|true|\.nan|~|<<)", fullmatch=True)


@settings(max_examples=50)
@example(["\x85", "\u2028", "a\nb", "1_0"], {"\x85": "0o17", "yes": "1e5"})
@given(
    st.lists(TEXTS, min_size=1, unique_by=lambda name: normalize("NFC", name)),
    st.dictionaries(
        TEXTS, st.one_of(TEXTS, st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
    ),
)
def test_a_resolved_recipe_is_read_as_the_same(classes: list[str], options: dict[str, Any]) -> None:
    document = load("demo").model_dump(mode="json")
    document["labeled"]["classes"] = classes
    document["student"]["model"]["options"] = options
    recipe = validate(document)
    again = load_text("RUN", "recipe.yaml", recipe.to_yaml().encode())
    assert again == recipe
    kinds = [(name, type(value)) for name, value in network(recipe).options.items()]
    assert [(name, type(value)) for name, value in network(again).options.items()] == kinds


def test_json_is_a_recipe() -> None:
    name = "\U0001f426 \u00e9 \ufeff"
    recipe = load("demo", [f"labeled.classes={json.dumps([name])}"])
    assert recipe.labeled.classes == (name,)
    assert load_text("RUN", "recipe.yaml", json.dumps(recipe.model_dump(mode="json")).encode()) == recipe


def test_parts_of_lists_are_set_by_their_place() -> None:
    recipe = load(
        "demo",
        [
            "labeled.classes=[a, b]",
            "labeled.classes.1=007",
            "fine_tune.sweep.learning_rates.2=1",
            "student.model.transform.mean.0=0",
        ],
    )
    assert recipe.labeled.classes == ("a", "007")
    assert recipe.fine_tune.sweep.learning_rates == (0.1, 0.5, 1.0)
    assert network(recipe).transform.mean == (0.0, 0.5, 0.5)
    assert load("demo").fine_tune.sweep.learning_rates == (0.1, 0.5, 2.0)
    for place in ("3", "-1", "01", "x", "\u0661"):
        said = message("demo", f"fine_tune.sweep.learning_rates.{place}=1")
        assert f"has {place!r} for the place in a list; use a number from 0 to 2" in said
    assert "set the whole list" in message("demo", "select.exclude=[]", "select.exclude.0=x")


def test_a_message_names_what_set_takes() -> None:
    """The field that a message names, into a list or a mapping, is one that --set can correct."""
    wrong = {
        "fine_tune.sweep.learning_rates": ("[0.1, -1]", "0.2"),
        "select.class_weights": ("[1, .inf]", "2"),
        "labeled.classes": ("[a, '']", "b"),
        "student.model.options": ("{width: .nan}", "3"),
        "student.model.transform.mean": ("[0, 0, 7]", "1"),
    }
    for field, (bad, good) in wrong.items():
        named = message("demo", f"{field}={bad}").partition(" = ")[0]
        assert named.startswith(f"{field}.")
        load("demo", [f"{field}={bad}", f"{named}={good}"])


def test_one_path_is_one_however_it_is_spelled() -> None:
    for one, other in (
        ("a/b", ".//a/./b//"),
        ("/a", "//a/"),
        ("s3://b/a//c", "s3://b/a//c/"),
        (".", "./"),
        ("/", "//"),
    ):
        assert load("demo", [f"unlabeled.uri={one}"]) == load("demo", [f"unlabeled.uri={other}"])
    assert load("demo", ["unlabeled.uri=s3://b/a//c"]) != load("demo", ["unlabeled.uri=s3://b/a/c"])
    for word in ("resnet18", "teacher"):  # words, but not where they are spelled as paths
        kept = load("demo", [f"deduplicate.model=./{word}"]).deduplicate.model
        assert (
            kept == f"./{word}" != load("demo", [f"deduplicate.model={word}", "score.embedding=true"]).deduplicate.model
        )
    assert load("demo", ["unlabeled.uri=a/../b"]).unlabeled.uri == "a/../b"  # a may be a link


def test_weights_are_held_against_the_classes_of_d() -> None:
    with pytest.raises(RecipeError) as error:
        load("demo", ["select.class_weights=[1, 2]"]).check_class_count(10)
    assert str(error.value) == (
        "select.class_weights = [1.0, 2.0]: has 2 weights for the 10 classes of D; give one for each, in the order of the classes"
    )


def test_what_follows_from_a_mistake_is_none() -> None:
    text = message("demo", "student.model=null", "student.start=x", "student.transform={size: 4}")
    assert text.count("must be") == 1
    assert text.startswith("student.transform.size = 4: must be greater than or equal to 8, in pixels")


def test_no_file() -> None:
    assert message("dmeo") == "RECIPE = 'dmeo': is not a file; did you mean demo?"
    text = message("birds.yaml")
    assert (
        text == "RECIPE = 'birds.yaml': is not a file; give a YAML file, or one of demo, drawings, fashion-mnist, paper"
    )


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
        ("seed=!!int abc", "seed = 'abc': must be a whole number"),
        ("seed=2024-01-31", "seed = '2024-01-31': must be a whole number"),
        ("seed=1:30", "seed = '1:30': must be a whole number"),
        ("seed=yes", "seed = 'yes': must be a whole number"),
        ("seed=1e999", "seed = inf: must be a finite number"),
        ("seed=99999999999999999999999", "must be less than or equal to 2147483647"),
        ("pretrain.learning_rate=true", "pretrain.learning_rate = 'true': must be a number"),
        ("pretrain.learning_rate=1e999", "pretrain.learning_rate = inf: must be a finite number"),
        ("pretrain.learning_rate=nan", "must be a finite number"),
        ("pretrain.learning_rate=-0.0", "must be greater than 0"),
        ("pretrain.images_seen=1e30", "pretrain.images_seen = 1e+30: "),
        ("select.class_weights=[1, [.nan]]", "select.class_weights.1 = [nan]: "),
        (
            "select.class_weights=[1e308, 1]",
            "select.class_weights.0 = 1e+308: must be less than or equal to ",
        ),
        ("teacher.model.options.x={y: .inf}", "must be true, false, a finite number or a text"),
        (
            "teacher.model.options.x=1e999",
            "teacher.model.options.x = inf: must be true, false, a finite number or a text",
        ),
        ("student.model.options={a: 1, a: 2}", "has 'a' twice, in line 1, column 2, and in line 1, column 8"),
        ('cluster.address=""', "cluster.address = '': "),
        ("select.class_weights=[.inf, 1]", "finite number"),
        (
            "teacher.model.options.width=.nan",
            "teacher.model.options.width = nan: must be true, false, a finite number or a text",
        ),
        ("select.class_weights=[0, 0]", "class_weights must have one above 0"),
        ("labeled.classes=[]", "1 or more entries"),
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


def test_an_exclusion_list_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of another input of the selection, which it does not replace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "a.parquet").write_bytes(b"x")
    planned = {one.name: one.made for one in plan(load("demo", ["select.exclude=[scores]"]), RunStore("run")).planned}
    inputs = planned["selection"].key.plain()["inputs"]
    assert inputs["scores"] == planned["scores"].fingerprint
    assert set(inputs) == {"scores", "labeled.train", "select.exclude scores"}


def test_zero_is_one_number() -> None:
    zero, minus = (load("demo", [f"pretrain.weight_decay={text}"]).pretrain.deciding() for text in ("0.0", "-0.0"))
    assert json.dumps(zero) == json.dumps(minus)
    weights = (load("demo", [f"select.class_weights=[1, {text}]"]).select.deciding() for text in ("0", "-0.0"))
    assert len({json.dumps(each) for each in weights}) == 1


def test_numbers_are_one_however_they_are_written() -> None:
    texts = ("0.1", "1e-1", ".1", "0.10000000000000001", "1_0e-2")
    assert len({json.dumps(load("demo", [f"pretrain.learning_rate={text}"]).deciding()) for text in texts}) == 1
    assert json.dumps(load("demo", ["pretrain.learning_rate=0.1000001"]).deciding()) != json.dumps(
        load("demo", ["pretrain.learning_rate=0.1"]).deciding()
    )
    rates = load("demo", ["fine_tune.sweep.learning_rates=[1, 1.0, 1e0, 0.1, 0.1000001]"])
    trials = plan(rates, RunStore("/nowhere")).planned
    student = next(one.made.key for one in trials if one.name == "student")
    assert set(student.inputs) == {"lr-1.0", "lr-0.1", "lr-0.1000001"}
