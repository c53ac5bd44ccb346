"""Variants of a recipe in one run directory: each stage is made once, whatever else changes and whoever else is at work."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

import tiny
from cluster.errors import LastingError, StageError
from cluster.store import RunStore
from pipeline.cli import tables
from pipeline.plan import demands, plan, until_stage
from pipeline.recipe.reading import validate
from runs import Finished, execute, fresh


@pytest.fixture(scope="module")
def run_dir(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> str:
    return finished.copy(tmp_path_factory.mktemp("runs") / "tiny")


def rows(run: str) -> int:
    return int(pq.read_table(Path(run, "selection")).num_rows)


def test_a_changed_k_and_back_again_does_nothing_twice(run_dir: str, folders: Path) -> None:
    assert rows(run_dir) == 90
    changed = execute(validate(tiny.recipe(str(folders), select={"images_per_class": 20})), run_dir, until="dhat")
    assert fresh(changed) == ["selection", "dhat"]
    assert rows(run_dir) == 60
    assert "images_per_class: 20" in Path(run_dir, "recipe.yaml").read_text()
    assert not Path(run_dir, "student").exists()  # of this K, there is none yet
    back = execute(validate(tiny.recipe(str(folders))), run_dir)
    assert fresh(back) == []
    assert rows(run_dir) == 90
    assert Path(run_dir, "student", "model.safetensors").exists()


def test_one_more_learning_rate_trains_one_more_trial(run_dir: str, folders: Path) -> None:
    recipe = tiny.recipe(str(folders))
    recipe["fine_tune"]["sweep"] = {"learning_rates": [0.1, 0.03, 0.01]}
    before = set(os.listdir(Path(run_dir, "store")))
    wider = execute(validate(recipe), run_dir)
    assert fresh(wider) == ["student", "evaluation"]
    new = {name.partition("-")[0] for name in set(os.listdir(Path(run_dir, "store"))) - before}
    assert new == {"trial", "student", "evaluation", "report"}
    trials = sorted(path.name for path in Path(run_dir, "trials").iterdir())
    assert trials == ["lr-0.01", "lr-0.03", "lr-0.1"]
    assert [trial.learning_rate for trial in wider["student"].outputs.trials] == [0.1, 0.03, 0.01]


def test_a_trial_that_crashed_is_tried_again_and_one_that_diverged_is_a_result(
    run_dir: str, folders: Path, tmp_path: Path
) -> None:
    """Of the first trial the worker dies, once; the third has too high a learning rate, always."""
    note = tmp_path / "crashes"
    options = {"at": 33, "times": 1, "note": str(note), "limit": 3.0}  # 30 steps are of pre-training
    model = {"architecture": "failing:Fragile", "options": options, "transform": tiny.MODEL["transform"]}
    recipe = tiny.recipe(str(folders), student={"model": model})
    recipe["pretrain"]["learning_rate"] = 0.01
    recipe["fine_tune"] = {
        "training": {**tiny.TRAINING, "epochs": 2, "max_failures": 0},
        "sweep": {"learning_rates": [0.01, 0.02, 100.0]},
    }
    with pytest.raises(StageError) as error:
        execute(validate(recipe), run_dir, until="student")
    said = str(error.value)
    assert said.startswith(
        "1 of 3 trials failed: run the same command to try them again; the others are kept (lr-0.01: training lr-0.01: "
    )
    assert "the network, or a library under it" in said
    assert "\n" not in said
    unmade = [one.name for one in plan(validate(recipe), RunStore(run_dir)).planned if one.made.record is None]
    assert unmade[0] == "student"
    kept = {path: path.stat().st_mtime_ns for path in Path(run_dir, "store").glob("trial-*/_record.json")}
    stages = execute(validate(recipe), run_dir, until="student")
    assert (
        kept.items()
        < {path: path.stat().st_mtime_ns for path in Path(run_dir, "store").glob("trial-*/_record.json")}.items()
    )
    trials = stages["student"].outputs.trials
    assert [(trial.learning_rate, "val_top1" in trial.metrics, trial.lasting) for trial in trials] == [
        (0.01, True, False),
        (0.02, True, False),
        (100.0, False, True),
    ]
    assert "the learning rate is too high" in str(trials[2].error)
    recipe["fine_tune"]["sweep"] = {"learning_rates": [100.0]}
    with pytest.raises(LastingError, match=r"^every trial failed, and would again \(lr-100\.0: .*is too high"):
        execute(validate(recipe), run_dir, until="student")


def test_another_test_set_evaluates_again_and_nothing_else(run_dir: str, folders: Path) -> None:
    recipe = tiny.recipe(str(folders))
    recipe["labeled"]["test"] = {"uri": str(folders / "validation")}
    assert fresh(execute(validate(recipe), run_dir)) == ["labeled-test", "evaluation"]


def test_a_run_without_a_baseline(run_dir: str, folders: Path) -> None:
    stages = execute(validate(tiny.recipe(str(folders), baseline=False)), run_dir)
    assert fresh(stages) == ["evaluation"]
    assert "supervised" not in stages
    assert "supervised" not in RunStore(run_dir).result()
    assert set(stages["evaluation"].outputs.models) == {"teacher", "pretrained", "student"}
    console = Console(width=200, record=True, file=io.StringIO())
    tables.print_closing(console, stages)
    said = console.export_text()
    assert "Gain" not in said
    student, teacher = (
        next(line for line in said.splitlines() if line.strip().startswith(n)) for n in ("student", "teacher")
    )
    assert (student.count(") / "), teacher.count(") / ")) == (2, 1)
    page = Path(run_dir, "report", "index.html").read_text()
    assert "Student, fine-tuned" in page
    assert "ully supervised" not in page
    assert "The recipe has no baseline" in page


def test_p_is_every_class_where_there_are_few(run_dir: str, folders: Path) -> None:
    usual = execute(validate(tiny.recipe(str(folders), score={"batch_size": 32})), run_dir, until="selection")
    assert fresh(usual) == ["scores", "selection"]
    assert usual["selection"].outputs.candidates == 3 * tiny.UNLABELED


def test_seeds_vary_one_thing(run_dir: str, folders: Path) -> None:
    other = validate(tiny.recipe(str(folders), seeds={"student": 7}))
    changed = [one.name for one in plan(other, RunStore(run_dir)).planned if one.made.record is None]
    assert changed == ["pretrained", "student", "supervised", "evaluation"]
    other = validate(tiny.recipe(str(folders), seeds={"teacher": 7}))
    changed = [one.name for one in plan(other, RunStore(run_dir)).planned if one.made.record is None]
    assert "supervised" not in changed
    assert {"teacher", "scores", "student"} <= set(changed)


def test_what_decides_nothing_repeats_nothing(run_dir: str, folders: Path) -> None:
    recipe = tiny.recipe(str(folders), score={"classes_per_image": 2, "batch_size": 5, "actors": 1})
    recipe["teacher"]["training"] |= {"max_failures": 0}
    planned = plan(validate(recipe), RunStore(run_dir)).planned
    assert all(one.made.record is not None for one in planned)
    assert demands(planned) == []


def test_the_plan_is_the_run(folders: Path, tmp_path: Path) -> None:
    planned = plan(validate(tiny.recipe(str(folders))), RunStore(str(tmp_path))).planned
    assert [one.name for one in planned][-3:] == ["student", "supervised", "evaluation"]
    fields = [demand.field for demand in demands(planned)]
    assert "teacher.training.workers" in fields
    assert "score.actors" in fields
    whole = plan(validate(tiny.recipe(str(folders), rounds=2)), RunStore(str(tmp_path))).planned
    rounds = until_stage(whole, "round-2/dhat")
    assert rounds[-1].name == "round-2/dhat"
    assert "round-1/student" in [one.name for one in rounds]


# Whole commands


def command(recipe: dict[str, Any], folder: Path, run: Path, *words: str) -> list[str]:
    path = folder / f"recipe-{time.monotonic_ns()}.yaml"
    path.write_text(json.dumps(recipe))
    return [sys.executable, "-m", "pipeline", "run", str(path), "--run-dir", str(run), *words]


ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_commands_at_once_each_have_their_own(folders: Path, tmp_path: Path) -> None:
    """K = 30 and K = 20 in one directory, the second while the first is at work."""
    recipe = tiny.recipe(str(folders), cluster={"cpus": 1, "object_store_mib": 128})
    first = subprocess.Popen(
        command(recipe, tmp_path, tmp_path / "run", "--until", "pretrained"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not any(Path(tmp_path, "run", "store").glob("labeled-train-*")):
        assert first.poll() is None
        time.sleep(0.2)
    other = {**recipe, "select": {"images_per_class": 20}}
    second = subprocess.run(
        command(other, tmp_path, tmp_path / "run", "--until", "pretrained"), cwd=ROOT, capture_output=True, text=True
    )
    said, _ = first.communicate(timeout=200)
    assert (first.returncode, second.returncode) == (0, 0), said + second.stderr
    assert f"waits for process {first.pid} on " in second.stdout
    kinds = [path.name.rpartition("-")[0] for path in Path(tmp_path, "run", "store").iterdir()]
    assert {kind: kinds.count(kind) for kind in ("teacher", "scores", "selection", "dhat", "pretrained")} == {
        "teacher": 1,
        "scores": 1,
        "selection": 2,
        "dhat": 2,
        "pretrained": 2,
    }
    written = Path(tmp_path, "run", "recipe.yaml").read_text()
    k = 30 if "images_per_class: 30" in written else 20
    assert rows(str(tmp_path / "run")) == 3 * k


@pytest.mark.slow
def test_ctrl_c_in_a_sweep_is_one_line_and_the_trials_stay(run_dir: str, folders: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(str(folders))
    recipe["fine_tune"] = {
        "training": {"batch_size": 12, "learning_rate": 0.5, "epochs": 4000},
        "sweep": {"learning_rates": [0.02, 0.03]},
    }
    process = subprocess.Popen(
        command(recipe, tmp_path, Path(run_dir)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("student: ") and "loss" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    lines = [line for line in errors.splitlines() if line.strip()]
    assert lines == ["error: interrupted; what is finished is kept: run the same command to go on"]
    unmade = [one.name for one in plan(validate(recipe), RunStore(run_dir)).planned if one.made.record is None]
    assert unmade == ["student", "evaluation"]


@pytest.mark.slow
def test_a_second_run_starts_no_ray_and_is_quick(run_dir: str, folders: Path, tmp_path: Path) -> None:
    execute(validate(tiny.recipe(str(folders))), run_dir)
    ended = subprocess.run(
        command(tiny.recipe(str(folders)), tmp_path, Path(run_dir)), cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("found finished") == 13
    assert "core_worker" not in ended.stderr
