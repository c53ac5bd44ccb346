"""Every kind of teacher, and rounds, on tiny real data in one run directory: each run ends in its table, and shares what it can."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import tiny
from cluster.errors import ModelError
from cluster.store import Made, RunStore
from models.architectures import build
from models.card import read_card
from models.directory import load, save
from pipeline.cli import tables
from pipeline.data.sources import open_source
from pipeline.plan import plan
from pipeline.ready import class_outputs, copy_model
from pipeline.recipe.images import Source
from pipeline.recipe.reading import validate
from pipeline.selection.weak import weak_training_set
from pipeline.stages import images_of
from runs import Finished, execute, fresh

pytestmark = pytest.mark.usefixtures("ray_local")

QUICK = {**tiny.TRAINING, "epochs": 2}
FINE_TUNE = {"training": QUICK, "sweep": {"learning_rates": [0.1]}}


def recipe(folders: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe with one learning rate."""
    return tiny.recipe(str(folders), **{"fine_tune": FINE_TUNE, **changes})


@pytest.fixture(scope="module")
def run_dir(finished: Finished, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of the plain recipe: nothing is trained for it that is not there."""
    uri = finished.copy(tmp_path_factory.mktemp("runs") / "tiny")
    assert fresh(execute(validate(recipe(folders)), uri)) == ["student", "evaluation"]
    return uri


@pytest.fixture(scope="module")
def ready(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher of that run as somebody else's: its classes are in another order, among two that D lacks and no image resembles."""
    teacher = load(finished.stages["teacher"].uri)
    state = teacher.model.state_dict()
    order = [2, 0, 1]
    for name, extra in (
        ("fc.weight", torch.zeros(2, state["fc.weight"].shape[1])),
        ("fc.bias", torch.full((2,), -1e4)),
    ):
        rows = torch.cat([state[name], extra])
        state[name] = rows[[3, *order, 4]]
    names = ["seven", *(teacher.class_names[number] for number in order), "eight"]
    network = build(teacher.config, 5)
    network.load_state_dict(state)
    uri = str(tmp_path_factory.mktemp("models") / "ready")
    save(uri, network, config=teacher.config, class_names=names, metrics={}, provenance={})
    return uri


def test_classes_are_found_by_name_and_by_one_alone() -> None:
    assert class_outputs("m", ["e\u0301", "b", "b"], ("\u00e9",)) == (0,)  # one name, in two ways of writing it
    with pytest.raises(ModelError, match=r"has 2 outputs of the name 'b', a class of D; give its outputs names"):
        class_outputs("m", ["a", "b", "b"], ("a", "b"))
    with pytest.raises(ModelError, match=r"has no output for 1 of the 2 classes of D \('B'\)"):
        class_outputs("m", ["a", "b"], ("a", "B"))


def closing(stages: dict[str, Made[Any]]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    tables.print_closing(console, stages)
    return console.export_text()


def test_a_ready_teacher_is_used_as_it_is_and_its_classes_are_found_by_name(
    run_dir: str, finished: Finished, folders: Path, ready: str
) -> None:
    before = pq.read_table(finished.stages["selection"].uri)
    stages = execute(validate(recipe(folders, teacher={"model": ready})), run_dir)
    assert stages["teacher"].outputs.class_outputs == (2, 3, 1)  # one, two, zero
    assert stages["teacher"].outputs.images == 0
    assert "supervised" not in fresh(stages)
    after = pq.read_table(Path(run_dir, "selection"))
    for name in ("class_id", "rank", "shard", "index"):
        assert after[name] == before[name]
    evaluated = stages["evaluation"].outputs.models["teacher"]
    card = read_card(str(Path(run_dir, "teacher")))
    assert card.class_names == ["seven", "zero", "one", "two", "eight"]
    assert evaluated.top1 > 0.6  # as the first run's: three easy classes
    assert "found finished" not in closing(stages)


@pytest.mark.slow
def test_a_ready_teacher_can_be_fine_tuned(run_dir: str, folders: Path, ready: str) -> None:
    teacher = {"model": ready, "training": QUICK}
    stages = execute(validate(recipe(folders, teacher=teacher)), run_dir, until="teacher")
    assert fresh(stages) == ["teacher"]
    assert load(stages["teacher"].uri).class_names == ["one", "two", "zero"]
    started = stages["teacher"].outputs.history[0]["top1"]
    fresh_head = execute(validate(recipe(folders, teacher={**teacher, "head": "fresh"})), run_dir, until="teacher")
    assert fresh(fresh_head) == ["teacher"]
    assert fresh_head["teacher"].outputs.history[0]["top1"] < started  # it knew the classes, and forgot them


def test_a_ready_teacher_that_lacks_classes_is_refused(
    finished: Finished, folders: Path, tmp_path: Path, run_dir: str
) -> None:
    teacher = load(finished.stages["supervised"].uri)
    names = ["uno", "two", "nil"]
    save(str(tmp_path), teacher.model, config=teacher.config, class_names=names, metrics={}, provenance={})
    for extra in ({}, {"training": QUICK}):
        other = validate(recipe(folders, teacher={"model": str(tmp_path), **extra}))
        with pytest.raises(ModelError) as error:
            execute(other, run_dir, until="teacher")
        assert str(error.value) == (
            f"teacher.model = {str(tmp_path)!r}: has no output for 2 of the 3 classes of D ('one', 'zero'); its own 3 are "
            "'uno', 'two', 'nil'; rename the classes of D, give teacher.class_map, or have a new last layer with teacher.head: linear"
        )


def test_the_card_of_a_ready_model_decides_too(ready: str, folders: Path, tmp_path: Path, run_dir: str) -> None:
    def teacher(card: bytes | None = None) -> str:
        copy_model(ready, str(tmp_path / "model"))
        if card is not None:
            (tmp_path / "model" / "model.json").write_bytes(card)
        planned = plan(validate(recipe(folders, teacher={"model": str(tmp_path / "model")})), RunStore(run_dir)).planned
        return next(one.made.fingerprint for one in planned if one.name == "teacher")

    card = Path(ready, "model.json").read_bytes()
    before = teacher()
    assert teacher(card.replace(b'"one"', b'"1"')) != before
    assert teacher(card.replace(b'"padding":2', b'"padding":3').replace(b'"padding": 2', b'"padding": 3')) != before
    assert teacher(card) == before


def test_a_model_that_is_not_there_is_refused_before_anything(folders: Path, tmp_path: Path) -> None:
    other = validate(recipe(folders, teacher={"model": str(tmp_path / "nowhere")}))
    with pytest.raises(ModelError, match=r"^teacher\.model = .* has no model\.json"):
        plan(other, RunStore(str(tmp_path / "run")))


def test_a_teacher_that_is_pre_trained_on_weak_labels(run_dir: str, folders: Path, tmp_path: Path) -> None:
    images = tiny.digits()
    for number, (name, files) in enumerate(images.items()):
        for position, data in enumerate(files[200:210]):
            (tmp_path / f"{name}-{position}.png").write_bytes(data)
            tag = "#Zero" if name == "zero" else "one" if position % 2 else "other"
            (tmp_path / f"{name}-{position}.txt").write_text(f"a {tag} photo {number}")
    weak = {"images": {"uri": str(tmp_path)}, "training": QUICK}
    teacher = {**recipe(folders)["teacher"], "weak": weak}
    stages = execute(validate(recipe(folders, teacher=teacher)), run_dir)
    assert fresh(stages)[:3] == ["weak-tags", "weak-pretrained", "teacher"]
    matched = stages["weak-tags"].outputs
    assert (matched.images, matched.tagged, matched.per_class) == (30, 20, (10, 0, 10))  # one, two, zero
    assert stages["teacher"].key.inputs["start"] == stages["weak-pretrained"].fingerprint
    # Which image is which stays as it was listed, whatever comes into the folder.
    training = weak_training_set(f"{stages['weak-tags'].uri}/table", images_of(stages["weak-tags"]), 3)
    (tmp_path / "a.png").write_bytes(images["two"][0])
    again = weak_training_set(f"{stages['weak-tags'].uri}/table", images_of(stages["weak-tags"]), 3)
    assert again.shards == training.shards
    text = closing(stages)
    assert "tags: 20 of 30 images have a class; 1 of 3 classes got none" in text
    assert "Weak labels" in Path(run_dir, "report", "index.html").read_text()


def test_tags_that_select_are_matched_in_the_same_way(run_dir: str, folders: Path, tmp_path: Path) -> None:
    source = open_source("unlabeled", Source(uri=str(folders / "unlabeled")))
    words = {
        "shard": [shard.name for shard in source.shards() for _ in shard.files],
        "index": [number for shard in source.shards() for number, _ in enumerate(shard.files)],
        "tags": [
            [tiny.CLASSES[int(path[:3]) % 3]] if path[:3].isdigit() else ["broken"]
            for shard in source.shards()
            for path in shard.files
        ],
    }
    schema = pa.schema([("shard", pa.string()), ("index", pa.uint32()), ("tags", pa.list_(pa.string()))])
    pq.write_table(pa.table(words, schema=schema), tmp_path / "tags.parquet")
    select = {"images_per_class": 20, "tags": str(tmp_path / "tags.parquet")}
    stages = execute(validate(recipe(folders, select=select)), run_dir, until="selection")
    assert fresh(stages) == ["tags", "selection"]
    assert stages["tags"].outputs.per_class == (50, 50, 50)
    assert stages["selection"].outputs.counts == (20, 20, 20)


def test_a_teacher_that_was_taught_by_itself(run_dir: str, folders: Path) -> None:
    teacher = {
        **recipe(folders)["teacher"],
        "self_training": {"pretrain": recipe(folders)["pretrain"], "fine_tune": FINE_TUNE},
    }
    stages = execute(validate(recipe(folders, teacher=teacher)), run_dir)
    # The plain recipe's teacher is the first one: its scores, its selection and D-hat are there.
    again = ("teacher", "scores", "selection", "dhat", "gallery")
    assert not {f"self-training/{name}" for name in again} & set(fresh(stages))
    assert stages["scores"].key.inputs["teacher"] == stages["self-training/student"].fingerprint
    assert RunStore(run_dir).result()["teacher"] == stages["self-training/student"].key.folder
    assert "teacher resnet8" in closing(stages)
    evaluated = stages["evaluation"].outputs.models
    assert set(evaluated) == {"teacher", "pretrained", "student", "supervised"}


def test_the_student_of_a_round_teaches_the_next(run_dir: str, folders: Path) -> None:
    stages = execute(validate(recipe(folders, rounds=2)), run_dir)
    assert not {name for name in fresh(stages) if name.startswith("round-1/")}  # one round is the first of two
    assert stages["round-2/scores"].key.inputs["teacher"] == stages["round-1/student"].fingerprint
    text = closing(stages)
    rows = [line for line in text.splitlines() if line.strip().startswith("student resnet8 ")]
    assert [row.split("parameters), ")[1].split()[:2] for row in rows] == [["round", "1"], ["round", "2"]]
    assert "round-2: images: 153 listed = 150 scored + 3 rejected" in text
    page = Path(run_dir, "report", "index.html").read_text()
    assert "Student of round 1, fine-tuned" in page
    assert 'href="../round-2/gallery/index.html"' in page
    result = RunStore(run_dir).result()
    assert result["student"] == result["round-2/student"]
    assert Path(run_dir, "round-1", "rejects").is_dir()
