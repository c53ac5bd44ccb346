"""What lies outside of the run store is swapped while a stage works with it: the stage is not published, and says what it was."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tiny
from cluster import storage
from cluster.errors import StageError
from cluster.store import Key, Outside, RunStore
from pipeline import ready, teaching
from pipeline.data import labeled
from pipeline.recipe.reading import validate
from pipeline.selection import pick
from pipeline.selection import select as selection
from runs import Finished, execute, fresh


def outside(uri: str) -> Outside:
    return Outside.at("select.exclude", uri, lambda: storage.read_bytes(uri).decode())


@pytest.mark.parametrize("change", [b"2", None])
def test_an_input_that_changes_meanwhile(place: str, change: bytes | None) -> None:
    """Nothing is published, nothing is left to go on with, and the next run takes what is there then."""
    given, store, calls = storage.join(place, "given"), RunStore(storage.join(place, "run")), []
    storage.publish(given, b"1")

    def work(folder: str) -> int:
        calls.append(storage.list_files(folder))
        storage.publish(storage.join(folder, "part"), b"x")
        if len(calls) == 1:
            storage.delete_file(given) if change is None else storage.publish(given, change)
        return len(calls)

    key = Key("selection", {}, {"list": outside(given)})
    assert key.fingerprint == Key("selection", {}, {"list": "1"}).fingerprint
    with pytest.raises(StageError) as error:
        store.once(key, int, work)
    assert str(error.value) == (
        f"select.exclude = {given!r}: has changed since selection began with it, so that nothing of it is kept; "
        "run the same command again to take what is there now"
    )
    assert store.find(key, int).record is None
    assert storage.list_files(store.find(key, int).uri) == []
    storage.publish(given, b"2")
    again = store.once(Key("selection", {}, {"list": outside(given)}), int, work)
    assert (again.outputs, again.fingerprint != key.fingerprint) == (2, True)
    storage.publish(given, b"1")
    assert store.once(Key("selection", {}, {"list": outside(given)}), int, work).outputs == 3
    assert calls == [[], [], []]


@pytest.fixture
def run_dir(finished: Finished, tmp_path: Path) -> str:
    return finished.copy(tmp_path / "run")


def during(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, swap: Callable[[], object]) -> None:
    """Has `swap` done, once, after a function of a stage's has begun with its inputs and before the stage ends."""
    real, done = getattr(module, name), list[object]()

    def swapped(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        if not done:
            done.append(swap())
        return made

    monkeypatch.setattr(module, name, swapped)


def test_an_exclusion_list_is_swapped_under_a_selection(
    run_dir: str, finished: Finished, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = pq.read_table(finished.stages["selection"].uri, columns=["shard", "index"])
    file = tmp_path / "exclude.parquet"
    pq.write_table(best.slice(0, 3), file)
    recipe = validate(tiny.recipe(str(folders), select={"images_per_class": 30, "exclude": [str(file)]}))
    during(monkeypatch, pick, "select", lambda: pq.write_table(best.slice(0, 9), file))
    with pytest.raises(StageError, match=rf"^select\.exclude = '{file}': has changed since selection began with it"):
        execute(recipe, run_dir, until="selection")
    again = execute(recipe, run_dir, until="selection")
    assert fresh(again) == ["selection"]
    chosen = pq.read_table(again["selection"].uri, columns=["shard", "index"]).to_pylist()
    assert not [image for image in best.slice(0, 9).to_pylist() if image in chosen]


def test_scores_are_swapped_under_a_selection_without_a_run(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tophat: Callable[..., tuple[int, str, str]]
) -> None:
    scores = tmp_path / "scores"
    shutil.copytree(storage.join(finished.stages["scores"].uri, "table"), scores)
    file = next(scores.rglob("*.parquet"))
    during(monkeypatch, selection, "select_several", file.touch)
    command = ("select", "--scores", str(scores), "--out", str(tmp_path / "out"), "--images-per-class", "5")
    code, _, errors = tophat(*command)
    assert (code, errors) == (
        1,
        f"error: --scores = '{scores}': has changed while images were selected: run the same command again\n",
    )
    assert tophat(*command)[0] == 0


def test_a_ready_teacher_is_swapped_while_it_is_copied(
    run_dir: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tiny.save_teacher(str(tmp_path / "model")), tmp_path / "other"
    shutil.copytree(run_dir + "/teacher", other)
    recipe = validate(tiny.recipe(str(folders), teacher={"model": model}))
    during(monkeypatch, ready, "copy_model", lambda: shutil.copytree(other, model, dirs_exist_ok=True))
    with pytest.raises(StageError, match=rf"^teacher\.model = '{model}': has changed since teacher began with it"):
        execute(recipe, run_dir, until="teacher")
    assert execute(recipe, run_dir, until="teacher")["teacher"].fresh


def test_labeled_images_are_swapped_under_a_training_and_before_it(
    run_dir: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run keeps what it listed, so that it cannot go on with anything else."""
    data = tmp_path / "data"
    shutil.copytree(folders, data)
    recipe = tiny.recipe(str(data))
    recipe["teacher"]["training"]["epochs"] = 1
    file = data / "train" / "one" / "0.png"
    was = file.read_bytes()
    during(monkeypatch, teaching, "fit", lambda: file.write_bytes(tiny.digits()["two"][0]))
    for _ in range(2):  # the second time, it is swapped when the training begins
        with pytest.raises(StageError) as error:
            execute(validate(recipe), run_dir, until="teacher")
        assert str(error.value) == (
            f"labeled.train = '{file}': has changed since teacher began with it, so that nothing of it is kept; "
            "put it back as it was, or give a new --run-dir to take what is there now"
        )
    (data / "train" / "one" / "later.png").write_bytes(was)  # what comes later is none of the run's
    shutil.copy2(folders / "train" / "one" / "0.png", file)
    assert execute(validate(recipe), run_dir, until="teacher")["teacher"].fresh


def test_labeled_images_are_swapped_while_they_are_surveyed(
    run_dir: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(folders, data)
    file = data / "test" / "one" / "20.png"
    recipe = tiny.recipe(str(folders))
    recipe["labeled"]["test"] = {"uri": str(data / "test")}
    during(monkeypatch, labeled, "survey", file.unlink)
    with pytest.raises(StageError, match=rf"^labeled\.test = '{file}': has changed since labeled-test began"):
        execute(validate(recipe), run_dir, until="labeled-test")
    assert execute(validate(recipe), run_dir, until="labeled-test")["labeled-test"].outputs.images == 59
