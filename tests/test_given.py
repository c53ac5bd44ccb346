"""Runs that begin with what exists: a score table, or a selection."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tiny
from cluster import storage
from cluster.errors import InputError, RecipeError, StageError
from cluster.store import RunStore
from pipeline.plan import plan
from pipeline.recipe.reading import load, validate
from pipeline.recipe.sections import Recipe
from pipeline.scoring import beside
from pipeline.selection.record import read_record
from runs import Finished, execute, fresh

Answer = tuple[int, str, str]


def recipe_of(root: Path, section: str, **fields: Any) -> Recipe:
    """The tiny recipe without a teacher, and with these fields in one of its sections."""
    document = tiny.recipe(str(root), **{section: fields})
    del document["teacher"]
    return validate(document)


def planned(recipe: Recipe, uri: str = "/nowhere") -> list[str]:
    return [one.name for one in plan(recipe, RunStore(uri)).planned]


def refusal(recipe: Recipe, uri: str = "/nowhere") -> str:
    with pytest.raises(InputError) as error:
        plan(recipe, RunStore(uri))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def scores(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run's scores, with what lies beside them."""
    folder = tmp_path / "scores"
    shutil.copytree(Path(finished.stages["scores"].uri), folder)
    return folder


@pytest.fixture
def selected(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run's selection."""
    folder = tmp_path / "selected"
    shutil.copytree(Path(finished.stages["selection"].uri), folder)
    return folder


# Recipes


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"score": {"table": "t"}, "select": {"selection": "s"}},
            "score.table and select.selection exclude each other: a selection needs no scores",
        ),
        ({"score": {"table": "t"}, "rounds": 2}, "rounds = 2 must be 1 with score.table, which is of one round"),
        (
            {"select": {"selection": "s"}, "deduplicate": {"copies": True}},
            "deduplicate must be off with select.selection: images are left out before one is made",
        ),
        (
            {"score": {"table": "t", "embedding": True}, "deduplicate": {"nearest": 3, "model": "teacher"}},
            "deduplicate.model = teacher is not known with score.table: name its model directory, or resnet18",
        ),
    ],
)
def test_what_exists_fits_into_a_recipe(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecipeError, match=rule):
        validate(tiny.recipe("x", **changes))


def test_a_recipe_from_scores_needs_no_teacher(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "score", table="somewhere/")
    assert (recipe.given, recipe.taught, recipe.score.table) == ("score.table", None, "somewhere")
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load(str(tmp_path / "resolved.yaml")) == recipe
    recipe.check_class_count(2)  # P is the table's own
    assert validate(tiny.recipe("x", score={"table": "somewhere"})).taught is None  # nor makes one that it has


# Refusals, before any work


@pytest.mark.usefixtures("ray_local")
def test_scores_of_other_images(finished: Finished, folders: Path, scores: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "other")
    (tmp_path / "other" / "unlabeled" / "000.png").unlink()
    line = refusal(recipe_of(tmp_path / "other", "score", table=str(scores)))
    its = beside.find(str(scores)).record()
    assert its is not None
    assert line.startswith(
        f"score.table = '{scores}': is of '{folders}/unlabeled' (listing {its.source}), not of unlabeled = "
    )
    assert line.endswith("; score unlabeled with `tophat score`, or let unlabeled be what this is of")


@pytest.mark.usefixtures("ray_local")
def test_scores_of_images_that_have_changed(scores: Path, folders: Path) -> None:
    said = json.loads((scores / beside.OWNER).read_text())
    (scores / beside.OWNER).write_text(json.dumps({**said, "source": "0123456789abcdef"}))
    line = refusal(recipe_of(folders, "score", table=str(scores)))
    assert "as it was before: its listing was 0123456789abcdef, and is " in line


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("classes", "rule"),
    [
        (["zero", "one", "two"], "has the classes of D in another order; set labeled.classes to [zero, one, two]"),
        (["one", "two", "<b>"], "has other classes than D: of 3 it lacks 'zero' and has '<b>' beside them; "),
        (["one", "two"], "has other classes than D: of 3 it lacks 'zero'; "),
    ],
)
def test_scores_of_other_classes(
    classes: list[str], rule: str, finished: Finished, scores: Path, folders: Path
) -> None:
    said = json.loads((scores / beside.OWNER).read_text())
    (scores / beside.OWNER).write_text(json.dumps({**said, "classes": classes}))
    assert rule in refusal(recipe_of(folders, "score", table=str(scores)), finished.uri)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("section", "fields", "line"),
    [
        (
            "score",
            {"views": "ten"},
            "score.views = 'ten': cannot be with score.table, which was made with 'center'; leave it out",
        ),
        (
            "score",
            {"logits": True},
            "score.logits = True: cannot be with score.table, which was made with False; leave it out",
        ),
        (
            "score",
            {"classes_per_image": 3},
            "score.classes_per_image = 3: cannot be with score.table, which was made with 2; leave it out",
        ),
        (
            "select",
            {"classes_per_image": 3},
            "select.classes_per_image = 3: must be at most 2, the classes that score.table stores of each image; "
            "lower it",
        ),
    ],
)
def test_settings_that_the_scores_do_not_have(
    section: str, fields: dict[str, Any], line: str, scores: Path, folders: Path
) -> None:
    document = tiny.recipe(str(folders), score={"table": str(scores)})
    document[section] = {**document[section], **fields}
    assert refusal(validate(document)) == line


@pytest.mark.usefixtures("ray_local")
def test_scores_alone(finished: Finished, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(finished.stages["scores"].uri, "table"), tmp_path / "alone")
    line = refusal(recipe_of(folders, "score", table=str(tmp_path / "alone")))
    assert "has no record of its source and its classes beside it" in line


@pytest.mark.usefixtures("ray_local")
def test_a_selection_that_does_not_fit(finished: Finished, folders: Path, selected: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folders, "select", selection=str(selected), images_per_class=29)
    assert refusal(recipe) == (
        "select.images_per_class = 29: cannot be with select.selection, which was made with 30; leave it out"
    )
    shutil.copytree(folders, tmp_path / "other")
    (tmp_path / "other" / "unlabeled" / "000.png").unlink()
    line = refusal(recipe_of(tmp_path / "other", "select", selection=str(selected)))
    assert f"is of '{folders}/unlabeled' (listing " in line
    said = json.loads((selected / "_selection.json").read_text())
    (selected / "_selection.json").write_text(json.dumps({**said, "classes": None}))
    assert "was selected from scores that do not say of which" in refusal(
        recipe_of(folders, "select", selection=str(selected))
    )
    (selected / "_selection.json").write_text("{}")
    assert "has a _selection.json that is none" in refusal(recipe_of(folders, "select", selection=str(selected)))
    (selected / "_selection.json").unlink()
    assert "holds no selection that says what it was made of" in refusal(
        recipe_of(folders, "select", selection=str(selected))
    )


@pytest.mark.usefixtures("ray_local")
def test_nothing_is_left_to_estimate(tophat: Callable[..., Answer], folders: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe_of(folders, "score", table="t").to_yaml())
    code, _, errors = tophat("estimate", str(tmp_path / "r.yaml"))
    assert (code, "score.table = 't': leaves nothing to score" in errors) == (2, True)


# Runs


@pytest.mark.usefixtures("ray_local")
def test_a_run_from_scores(finished: Finished, folders: Path, tmp_path: Path) -> None:
    """It comes to the same selection, also by the run's readable name, and has no teacher."""
    recipe = recipe_of(folders, "score", table=f"{finished.uri}/scores")
    done = execute(recipe, str(tmp_path / "run"))
    assert "teacher" not in done
    assert [*done][4:7] == ["scores", "selection", "dhat"]
    before, own = finished.stages["scores"].outputs, done["scores"].outputs
    assert (own.listed, own.scored, own.rejected, own.rejects) == (153, 150, 3, before.rejects)
    for part in ("selection", "dhat"):
        assert pq.read_table(done[part].uri).equals(pq.read_table(finished.stages[part].uri))
    assert set(done["evaluation"].outputs.models) == {"pretrained", "student", "supervised"}
    assert planned(recipe, str(tmp_path / "run")) == [*done]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Teacher" not in page
    assert "not_an_image" in page  # the rejects of the table


@pytest.mark.usefixtures("ray_local")
def test_a_run_from_a_selection(
    tophat: Callable[..., Answer], finished: Finished, folders: Path, tmp_path: Path
) -> None:
    picked, run = str(tmp_path / "picked"), str(tmp_path / "run")
    words = ("select", "--scores", f"{finished.uri}/scores", "--out", picked, "--images-per-class", "20")
    code, output, errors = tophat(*words)
    assert code == 0, errors
    record = read_record("--", picked)
    assert record.selected.selected == 60
    (tmp_path / "r.yaml").write_text(recipe_of(folders, "select", selection=picked).to_yaml())
    code, output, errors = tophat("run", str(tmp_path / "r.yaml"), "--run-dir", run)
    assert code == 0, errors
    assert "candidates: 300 = 60 selected + 240 unselected" in output
    assert "listed =" not in output
    stages = RunStore(run).result()
    assert {"teacher", "scores"}.isdisjoint(stages)
    assert {"selection", "dhat", "student", "evaluation"} <= set(stages)
    page = Path(run, "report", "index.html").read_text()
    assert "images listed" not in page
    assert "Images of D̂ per class" in page
    code, output, _ = tophat("status", run)
    assert (code, "not started" in output) == (0, False)


@pytest.mark.usefixtures("ray_local")
def test_runs_on_s3_from_scores_and_from_a_selection(
    finished: Finished, folders: Path, s3: str, tmp_path: Path
) -> None:
    for name in ("scores", "selection"):
        root = Path(finished.stages[name].uri)
        for path in root.rglob("*"):
            if path.is_file():
                storage.publish(f"{s3}/{name}/{path.relative_to(root)}", path.read_bytes())
    done = execute(recipe_of(folders, "score", table=f"{s3}/scores"), f"{s3}/a", "dhat")
    assert done["dhat"].outputs.images == 90
    again = execute(recipe_of(folders, "select", selection=f"{s3}/selection"), f"{s3}/b", "dhat")
    assert pq.read_table(finished.stages["dhat"].uri).num_rows == again["dhat"].outputs.images == 90


@pytest.mark.usefixtures("ray_local")
def test_scores_that_are_not_finished(folders: Path, scores: Path, tmp_path: Path) -> None:
    (file,) = scores.rglob("table/**/*.parquet")
    whole = file.rename(file.with_name("00000000-00000153.parquet"))  # rows of a shard that goes on
    with pytest.raises(RecipeError, match=r"is not the whole of a scoring: .* is not scored completely"):
        execute(recipe_of(folders, "score", table=str(scores)), str(tmp_path / "run"), "scores")
    whole.unlink()
    assert "holds no Parquet files" in refusal(recipe_of(folders, "score", table=str(scores)))


@pytest.mark.usefixtures("ray_local")
def test_what_exists_is_watched(
    folders: Path, scores: Path, selected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that changes while images are selected from it, and a selection that does while they are copied, leave nothing behind."""
    run = str(tmp_path / "run")
    recipe = recipe_of(folders, "score", table=str(scores))
    execute(recipe, run, "scores")
    from pipeline.selection import dhat, pick, select

    def touched(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            found = function(*given, **named)
            (folder / "more.parquet").write_bytes(b"x")
            return found

        return call

    with monkeypatch.context() as patch:
        patch.setattr(pick, "select", touched(select.select, scores / "table"))
        with pytest.raises(StageError, match=r"score.table = .*has changed since selection began with it"):
            execute(recipe, run, "selection")
    (scores / "table" / "more.parquet").unlink()
    assert fresh(execute(recipe, run, "selection")) == ["selection"]
    of_selection = recipe_of(folders, "select", selection=str(selected))
    other = str(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(dhat, "materialize", touched(dhat.materialize, selected))
        with pytest.raises(StageError, match=r"select.selection = .*has changed since dhat began with it"):
            execute(of_selection, other, "dhat")
