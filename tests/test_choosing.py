"""K by trying: the ladder, the rungs and the choice, pure; then a small run that leaves K open, and one that is killed."""

import io
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import tiny
from browsing import text_of
from cluster.errors import RecipeError, StageError
from cluster.store import RunStore
from models.config import Training
from pipeline.choosing import ChosenK, Tried, close, shortened, with_k
from pipeline.cli import tables
from pipeline.data.loading import dhat_training_set
from pipeline.plan import plan
from pipeline.recipe.reading import validate
from pipeline.report.page import Choice, ReportContent, TriedK, write_report
from pipeline.selection import dhat
from pipeline.selection.ladder import MOST_ROWS, PASSES, RATIO, STEPS, ladder, sizes
from runs import execute, fresh
from tuning.halving import COST, FINALISTS, rungs

BILLION = 10**9


@given(st.integers(1, 10**6), st.integers(1, BILLION), st.integers(1, 10_000), st.integers(1, BILLION))
def test_a_ladder_ends_where_images_run_out_or_pre_training_does(
    labels: int, unlabeled: int, classes: int, seen: int
) -> None:
    values = ladder(labels, unlabeled, classes, seen)
    assert 1 <= len(values) <= STEPS
    assert values[-1] == max(1, min(unlabeled, seen // PASSES, MOST_ROWS) // classes)
    assert all(low < high for low, high in pairwise(values))
    assert all(
        high / low > 0.85 * RATIO for low, high in pairwise(values) if low > 20
    )  # rounding moves each by a twentieth at most


def test_ladders_of_the_demo_of_small_data_and_of_the_paper() -> None:
    assert ladder(100, 5200, 10, 60_000) == (10, 22, 49, 110, 240, 520)
    assert ladder(36, 150, 3, 360) == (12, 19, 30)
    assert ladder(160, 5_822, 8, 16_000) == (20, 100, 500)  # trials of six would see 2,000 images each
    assert ladder(36, 6, 3, 360) == (1, 2)
    assert ladder(36, 3, 3, 360) == (1,)
    assert ladder(1_281_167, BILLION, 1000, BILLION)[-1] == 50_000


@given(st.integers(2, 20))
def test_each_rung_halves_the_settings_and_all_cost_less_than_two_trainings(settings: int) -> None:
    steps = rungs(settings)
    assert steps[0].settings == settings
    assert 2 <= steps[-1].settings <= FINALISTS
    assert all(after.settings == -(-before.settings // 2) for before, after in pairwise(steps))
    assert all(after.share > before.share for before, after in pairwise(steps))
    assert sum(rung.settings * rung.share for rung in steps) == pytest.approx(COST)
    assert COST < 2


@given(st.integers(2, 20), st.integers(1, 512), st.integers(1, 10**7), st.integers(1, 10**5))
def test_all_trials_see_fewer_images_than_two_trainings(settings: int, batch: int, seen: int, rows: int) -> None:
    training = Training(images_seen=seen, batch_size=batch)
    trials = [rung.share for rung in rungs(settings) for _ in range(rung.settings)]
    lengths = [shortened(training, share, rows).steps(rows) * batch for share in trials]
    assert all(length % batch == 0 for length in lengths)
    # A trial has one step at least.
    assert all(length <= max(batch, share * seen) for length, share in zip(lengths, trials, strict=True))
    assert sum(lengths) < 2 * seen or batch > seen / 2 / len(trials)


def test_a_shortened_training_is_the_same_but_for_its_length() -> None:
    training = Training(epochs=8, batch_size=10, learning_rate=0.5, drops=2, warmup=0.1)
    short = shortened(training, 0.25, 1000)
    assert (short.images_seen, short.epochs) == (2000, None)
    assert short.model_copy(update={"images_seen": None, "epochs": 8}) == training


def tried(k: int, top1: float, loss: float = 1.0, judged: int = 400) -> Tried:
    return Tried(k, 10 * k, 1000, top1, loss, judged)


def test_the_greatest_k_within_a_standard_error_of_the_best_is_taken() -> None:
    # At 0.80 of 400 images, one standard error is 0.02.
    assert close([tried(100, 0.80), tried(200, 0.781), tried(400, 0.779)]) == (100, 200)
    assert close([tried(100, 0.80), tried(200, 0.77), tried(400, 0.70)]) == (100,)
    assert close([tried(100, 0.5), tried(200, 0.8)]) == (200,)
    assert tried(1, 0.8).error == pytest.approx(0.02)


def test_the_report_shows_every_value_and_what_was_taken(tmp_path: Path) -> None:
    values = [TriedK(100, 1000, (0.70, None), (0.02, None)), TriedK(200, 2000, (0.72, 0.8), (0.02, 0.015), True, True)]
    values.append(TriedK(400, 4000, (0.71, 0.79), (0.02, 0.015), True))
    page = text_of(write_report(str(tmp_path), ReportContent("run", "name: run", choice=Choice(values, 400, 8000))))
    assert "judged on 400 images of D" in page
    rows = page.partition("Top-1, rung 2")[2]
    for expected in (
        "1,000 70.0% ± 2.0 –",
        "72.0% ± 2.0 80.0% ± 1.5 taken",
        "79.0% ± 1.5 as good, within a standard error",
    ):
        assert expected.replace(" ", "") in "".join(rows.split()), expected


def test_the_table_shows_every_value_and_what_was_taken() -> None:
    first = (tried(50, 0.5), tried(100, 0.70), tried(200, 0.72), tried(400, 0.6))
    chosen = ChosenK(200, 8000, (first, (tried(100, 0.81), tried(200, 0.80))))
    console = Console(width=200, record=True, file=io.StringIO())
    tables.print_choice(console, chosen)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["50", "500", "50.0%", "±", "2.5"] in lines
    assert ["100", "1,000", "70.0%", "±", "2.3", "81.0%", "±", "2.0", "within", "a", "standard", "error"] in lines
    assert ["200", "2,000", "72.0%", "±", "2.2", "80.0%", "±", "2.0", "taken"] in lines


def test_the_images_of_a_smaller_k_are_the_first_ranks(tmp_path: Path) -> None:
    rows = [(label, rank) for rank in (3, 0, 2, 1) for label in (1, 0)]
    columns: dict[str, Any] = {
        "image": [b"image"] * 8,
        "label": [label for label, _ in rows],
        "shard": ["a"] * 8,
        "index": range(8),
        "rank": [rank for _, rank in rows],
        "score": [0.5] * 8,
        "file": ["a.png"] * 8,
    }
    for part in (0, 1):
        table = pa.table(
            {name: list(values)[4 * part : 4 * part + 4] for name, values in columns.items()}, schema=dhat.SCHEMA
        )
        pq.write_table(table, tmp_path / f"part-{part}.parquet")
    images = dhat_training_set(str(tmp_path), 2, quotas=(1, 3))
    found = {rows[4 * part + int(row)] for part, some in enumerate(images.rows) for row in some}
    assert found == {(0, 0), (1, 0), (1, 1), (1, 2)}
    assert images.images == 4 == sizes([4, 4], [(1, 3)])[0]
    assert dhat_training_set(str(tmp_path), 2).images == 8


@pytest.mark.parametrize(
    ("select", "said"),
    [
        (
            {"images_per_class": "many"},
            "select.images_per_class = 'many': must be a whole number from 1 to 1,000,000,000, or auto",
        ),
        (
            {"images_per_class": "auto", "tags": "sidecar"},
            "images_per_class = auto follows scores, which tags have not",
        ),
        ({"images_per_class": "auto", "tries": [5, 5]}, "tries has the one value 5"),
        ({"images_per_class": "auto", "tries": [5]}, "select.tries"),
        ({"images_per_class": 5, "tries": [5, 10]}, "tries is for images_per_class = auto, and K is 5"),
    ],
)
def test_a_mistake_is_told_in_one_line(select: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        validate(tiny.recipe("data", select=select))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_knows_the_stages_before_k_is_known(folders: Path, tmp_path: Path) -> None:
    names = [one.name for one in plan(open_k(folders), RunStore(str(tmp_path))).planned]
    assert names[names.index("scores") :][:3] == ["scores", "chosen-k", "selection"]


def open_k(folders: Path, **more: Any) -> Any:
    return validate(tiny.recipe(str(folders), select={"images_per_class": "auto", "tries": [8, 16, 24, 30]}, **more))


@pytest.mark.slow
def test_a_run_chooses_k_once_and_goes_on_with_it(folders: Path, ray_local: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "run")
    done = execute(open_k(folders), uri, "dhat")
    chosen = done["chosen-k"].outputs
    assert [one.images_per_class for one in chosen.rungs[0]] == [8, 16, 24, 30]
    assert [len(rung) for rung in chosen.rungs] == [4, 2]
    assert {one.judged for rung in chosen.rungs for one in rung} == {36 + 24}
    assert chosen.images == sum(one.images_seen for rung in chosen.rungs for one in rung) < 2 * 360
    assert done["selection"].outputs.quotas == (chosen.images_per_class,) * 3
    assert not list(Path(uri).rglob("work"))
    assert "Choice of K" in Path(uri, "report", "index.html").read_text()
    assert fresh(execute(open_k(folders), uri, "dhat")) == []
    fixed = validate(tiny.recipe(str(folders), select={"images_per_class": chosen.images_per_class}))
    assert fresh(execute(fixed, uri, "dhat")) == []
    assert with_k(open_k(folders), 5).select == validate(tiny.recipe("x", select={"images_per_class": 5})).select


@pytest.mark.slow
def test_a_rung_that_is_finished_is_not_repeated(folders: Path, ray_local: None, tmp_path: Path) -> None:
    uri, note = str(tmp_path / "run"), tmp_path / "note"
    model = {**tiny.MODEL, "architecture": "failing:Crashing", "options": {"at": 8, "times": 1, "note": str(note)}}
    training = {**tiny.TRAINING, "images_seen": 360, "max_failures": 0}  # 5 steps in the first rung, 11 in the second
    recipe = open_k(folders, student={"model": model}, pretrain=training)
    with pytest.raises(StageError, match="chosen-k-rung-2"):
        execute(recipe, uri, "chosen-k")
    (first,) = Path(uri).rglob("rung-1-k-8")
    shutil.copytree(first.with_name("rung-1-k-30"), first, dirs_exist_ok=True)
    tried = execute(recipe, uri, "chosen-k")["chosen-k"].outputs.rungs
    assert tried[0][0].loss == tried[0][-1].loss  # were it trained again, it would be a model of its own
    assert len({one.loss for one in tried[0]}) == 3
    assert len(tried[1]) == 2
