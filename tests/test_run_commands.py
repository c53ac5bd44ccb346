"""The commands about a run: run, status, prune, and what they refuse before anything begins."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from cluster.store import RunStore
from pipeline.plan import plan
from pipeline.recipe.reading import validate
from runs import Finished, execute

Answer = tuple[int, str, str]
pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def run_dir(finished: Finished, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run until D-hat, of a K of its own."""
    uri = finished.copy(tmp_path_factory.mktemp("runs") / "tiny")
    execute(validate(tiny.recipe(str(folders), select={"images_per_class": 20})), uri, "dhat")
    return uri


@pytest.fixture
def recipe(folders: Path, tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tiny.recipe(str(folders), **changes)))
        return str(path)

    return write


def states(text: str) -> dict[str, str]:
    rows = (
        re.fullmatch(r"  ([\w/-]+) +(done|not started|started.*?|under way.*?)(  .*)?", line)
        for line in text.split("\n")
    )
    return {row[1]: row[2] for row in rows if row}


def test_status_says_what_is_made_and_where(run_dir: str, tophat: Callable[..., Answer]) -> None:
    code, text, errors = tophat("status", run_dir)
    assert code == 0, errors
    found = states(text)
    assert list(found)[:6] == ["labeled-train", "labeled-validation", "labeled-test", "unlabeled", "teacher", "scores"]
    assert (found["teacher"], found["dhat"], found["evaluation"]) == ("done", "done", "not started")
    (folder,) = Path(run_dir, "store").glob("teacher-*")
    assert str(folder) in text
    assert "labeled.train: 36 used" in text


def test_a_network_that_cannot_be_built_costs_nothing(
    run_dir: str, recipe: Callable[..., str], tophat: Callable[..., Answer]
) -> None:
    before = sorted(Path(run_dir, "store").iterdir())
    for field in ("teacher", "student"):
        code, _, errors = tophat("run", recipe(), "--run-dir", run_dir, "--set", f"{field}.model.options.depth=3")
        assert code == 2
        (line,) = errors.strip().splitlines()
        assert line.startswith(
            f"error: {field}.model.architecture = 'resnet8': could not be built with num_classes = 3"
        )
    assert sorted(Path(run_dir, "store").iterdir()) == before
    assert RunStore(run_dir).result()["teacher"].startswith("teacher-")


def test_pruning_shows_first_and_removes_when_told(
    finished: Finished, tmp_path: Path, recipe: Callable[..., str], tophat: Callable[..., Answer]
) -> None:
    run_dir = finished.copy(tmp_path / "run")
    code, _, errors = tophat(
        "run", recipe(), "--run-dir", run_dir, "--set", "select.images_per_class=20", "--until", "selection"
    )
    assert code == 0, errors
    named = RunStore(run_dir).result()["selection"]
    selections = sorted(path.name for path in Path(run_dir, "store").glob("selection-*"))
    assert len(selections) == 2
    (left_over,) = set(selections) - {named}
    code, text, _ = tophat("prune", run_dir)
    assert code == 0
    assert left_over in text
    assert named not in text
    assert "--yes removes these folders" in text
    assert Path(run_dir, "store", left_over).exists()
    with RunStore(run_dir).in_use():
        code, _, errors = tophat("prune", run_dir, "--yes")
        assert code == 2
        assert "is in use by process" in errors
    code, text, _ = tophat("prune", run_dir, "--yes")
    assert code == 0
    assert not Path(run_dir, "store", left_over).exists()
    assert Path(run_dir, "teacher", "model.safetensors").exists()
    code, text, _ = tophat("prune", run_dir)
    assert "0 folders" in text


def test_a_run_of_an_earlier_version(tmp_path: Path, recipe: Callable[..., str], tophat: Callable[..., Answer]) -> None:
    run = tmp_path / "old"
    run.mkdir()
    (run / "run.json").write_text('{"recipe": "tiny", "format": 1}')
    for words in (("run", recipe(), "--run-dir", str(run)), ("status", str(run)), ("prune", str(run), "--yes")):
        code, _, errors = tophat(*words)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert "was made by an earlier version of tophat (format 1)" in errors
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_until_names_a_stage_of_the_recipe(
    recipe: Callable[..., str], tmp_path: Path, tophat: Callable[..., Answer]
) -> None:
    run = tmp_path / "run"
    code, _, errors = tophat("run", recipe(rounds=2), "--run-dir", str(run), "--until", "dhat")
    assert code == 2
    assert "--until = 'dhat': is not a stage; use one of labeled-train" in errors
    assert "round-2/dhat" in errors
    assert not run.exists()


def test_status_of_a_run_whose_recipe_cannot_be_read(run_dir: str, tophat: Callable[..., Answer]) -> None:
    file = Path(run_dir, "recipe.yaml")
    before = file.read_bytes()
    try:
        for text in (b"name: [", b"\xff", b"name: tiny\nsed: 3\n"):
            file.write_bytes(text)
            code, output, errors = tophat("status", run_dir)
            assert (code, errors) == (0, "")
            assert "what is still to be done cannot be told" in output
            assert re.search(r"teacher +done", output)
            code, _, errors = tophat("prune", run_dir, "--yes")
            assert code == 2
            assert errors.startswith("error: ")
            assert "Traceback" not in errors
    finally:
        file.write_bytes(before)


def test_what_the_recipe_has_begun_is_not_pruned(run_dir: str, tophat: Callable[..., Answer], folders: Path) -> None:
    begun = next(
        one for one in plan(validate(tiny.recipe(str(folders))), RunStore(run_dir)).planned if one.name == "dhat"
    )
    place = Path(run_dir, "store", begun.made.key.folder)
    (place / "work").mkdir(parents=True)
    (place / "work" / "piece").write_bytes(b"hours")
    execute(validate(tiny.recipe(str(folders))), run_dir, "labeled-test")
    code, _, errors = tophat("prune", run_dir, "--yes")
    assert code == 0, errors
    assert (place / "work" / "piece").exists()
    shutil.rmtree(place)


def test_a_run_beside_a_source_is_not_inside_it(
    folders: Path, recipe: Callable[..., str], tophat: Callable[..., Answer]
) -> None:
    beside = folders / "unlabeled-runs"
    code, _, errors = tophat("run", recipe(), "--run-dir", str(beside), "--until", "unlabeled")
    assert code == 0, errors
