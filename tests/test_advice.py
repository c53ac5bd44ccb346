"""What a run tells people to do next: each piece of advice out of facts that call for it, and none out of facts that do not."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from models.judging import Comparison
from pipeline.advice import (
    Purity,
    advise,
    of_choice,
    of_classes,
    of_copies,
    of_cut,
    of_gain,
    of_labels,
    of_purity,
    of_sweep,
    of_teacher,
    purity,
    ties,
)
from pipeline.choosing import ChosenK, Tried
from pipeline.evaluation import Measured
from pipeline.measuring import Evaluated
from pipeline.recipe.reading import validate
from pipeline.selection.select import Selected
from pipeline.stages import Surveyed
from runs import Finished, execute
from tuning.sweep import Trial

NAMES = ["cat", "dog", "owl"]


def measured(top1: float, recall: tuple[float | None, ...] = (0.5, 0.5, 0.5)) -> Measured:
    return Measured(100, top1, 1.0, 0.5, (top1 - 0.1, top1 + 0.1), 0.1, recall, (0.5, 0.5, 0.5), (40, 30, 30))


def evaluated(difference: float = 0.1, p: float = 0.01, **models: Measured) -> Evaluated:
    against = Comparison(100, 50, 20, 10, difference, (difference - 0.05, difference + 0.05), p)
    every = {"teacher": measured(0.8), "student": measured(0.7), "supervised": measured(0.6), **models}
    return Evaluated(100, every, {"student": against}, "student", (), {})


def test_copies_of_what_is_trained_on() -> None:
    def surveyed(copies: int) -> Any:
        outputs = Surveyed(tuple(NAMES), 60, 0, 1, (20, 20, 20), "", copies=copies)
        return SimpleNamespace(outputs=outputs)

    assert of_copies({"labeled-test": surveyed(0)}) == []
    (told,) = of_copies({"labeled-test": surveyed(3)})
    assert told.fact.startswith("3 of 60 test images are copies of images that are trained on")


def test_a_gain_is_called_one_only_beyond_chance() -> None:
    assert of_gain(evaluated()) == []
    (noise,) = of_gain(evaluated(0.02, 0.3))
    assert "differs from the baseline by +2.0 points, which is within the noise of 100 test images" in noise.fact
    (worse,) = of_gain(evaluated(-0.1, 0.01))
    assert worse.fact == "the student is worse than the baseline by +10.0 points"


def test_a_teacher_below_the_baseline() -> None:
    assert of_teacher(evaluated()) == []
    (told,) = of_teacher(evaluated(teacher=measured(0.55)))
    assert told.fact == "the teacher (55.0%) is below the student that saw D alone (60.0%)"


def test_classes_that_nobody_finds() -> None:
    assert of_classes(evaluated(), NAMES) == []
    (told,) = of_classes(evaluated(student=measured(0.5, (0.0, 0.9, None))), NAMES)
    assert told.fact == "student finds no test image of cat"


def trials(**found: float) -> list[Trial]:
    return [Trial(float(rate[1:].replace("_", ".")), {"val_top1": top1}) for rate, top1 in found.items()]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (0.1, ["0.1 per 256 images, is the lowest", "try 0.025 too (fine_tune.sweep.learning_rates)"]),
        (1.6, ["is the highest that was tried", "try 6.4 too"]),
        (0.4, []),
    ],
)
def test_the_best_rate_at_the_edge(chosen: float, words: list[str]) -> None:
    told = of_sweep(trials(_0_1=0.5, _0_4=0.7, _1_6=0.9), chosen, 10_000)
    assert all(word in str(told[0]) for word in words)
    assert len(told) == bool(words)


def test_rates_that_the_held_out_images_cannot_tell_apart() -> None:
    close = trials(_0_1=0.50, _0_4=0.54, _1_6=0.30)
    (told,) = of_sweep(close, 0.4, 54)
    assert told.fact == ("2 of 3 learning rates are within a standard error (6.8%) of each other on 54 held-out images")
    assert of_sweep(close, 0.4, 5400) == []
    assert of_sweep(trials(_0_1=0.5), 0.1, 54) == []  # one that was tried is no choice


def selection(uri: str, **changes: Any) -> Selected:
    made = Selected(uri, 4, 1, 3, 100, 100, 11, 89, 0, 0, 11, 1, (4, 4, 4), (4, 4, 3), (0.5, 1.0, 0.25))
    return replace(made, **changes)


def test_equal_scores_at_the_cut_and_classes_short_of_k(tmp_path: Path) -> None:
    scores = [0.9, 0.8, 0.7, 0.5, 1.0, 1.0, 1.0, 1.0, 0.25, 0.25, 0.25]
    table = pa.table(
        {"class_id": pa.array([0] * 4 + [1] * 4 + [2] * 3, pa.int32()), "score": pa.array(scores, pa.float32())}
    )
    pq.write_table(table, tmp_path / "part.parquet")
    assert ties(selection(str(tmp_path))) == {0: 1, 1: 4, 2: 3}
    tied, short = of_cut(selection(str(tmp_path)), NAMES)
    assert (
        tied.fact == "many images have exactly the score at the cut of dog"
    )  # owl has no cut: all its images are taken
    assert short.fact == "1 of 3 classes have fewer than K images (owl)"


def test_how_pure_d_hat_is_at_most(tmp_path: Path) -> None:
    predictions = pa.table(
        {
            "label": pa.array([0, 1, 0, 1, 2, 2], pa.int32()),
            "predicted": pa.array([0, 0, 0, 1, 1, 2], pa.int32()),
            "score": pa.array([0.9, 0.6, 0.4, 1.0, 0.9, 0.2], pa.float32()),
        }
    )
    found = purity(predictions, selection(str(tmp_path)))
    assert found == [Purity(1, 2, 4), Purity(1, 1, 4), Purity(0, 0, 3)]
    assert of_purity(found, NAMES) == []  # three images say nothing
    (told,) = of_purity([Purity(3, 10, 4), Purity(9, 10, 4), Purity(0, 0, 3)], NAMES)
    assert told.fact == "at most 60.0% of D-hat is right, by 20 held-out images at the same scores (lowest: cat 30.0%)"
    assert of_purity([Purity(9, 10, 4), Purity(9, 10, 4), Purity(9, 10, 3)], NAMES) == []


def test_values_of_k_that_cannot_be_told_apart() -> None:
    def rung(*tops: float) -> tuple[Tried, ...]:
        return tuple(Tried(k, 10 * k, 1000, top1, 1.0, 400) for k, top1 in zip((10, 20, 40), tops, strict=True))

    assert of_choice(ChosenK(40, 3000, (rung(0.3, 0.4, 0.6),))) == []
    (told,) = of_choice(ChosenK(40, 3000, (rung(0.3, 0.59, 0.6),)))
    assert told.fact.startswith("K = 40 was taken among 20, 40, which are within a standard error")


def test_few_labels_and_imbalance() -> None:
    assert of_labels(Surveyed(tuple(NAMES), 60, 0, 1, (20, 20, 20), ""), NAMES) == []
    few, imbalance = of_labels(Surveyed(tuple(NAMES), 60, 0, 1, (4, 20, 36), ""), NAMES)
    assert few.fact == "1 of 3 classes have fewer than 10 images to train on (cat)"
    assert imbalance.do == "let trainings see as many of each (labeled.balance: true)"


@pytest.mark.usefixtures("ray_local")
def test_the_advice_of_a_run_stands_in_its_report(finished: Finished) -> None:
    said = advise(finished.stages)
    assert np.all([one.fact and one.do for one in said])
    page = Path(finished.uri, "report", "index.html").read_text()
    assert said
    assert all(one.do in page for one in said)


@pytest.mark.usefixtures("ray_local")
def test_copies_are_counted_when_the_test_set_is_read(tmp_path: Path) -> None:
    tiny.write_folders(tmp_path / "data")
    for name in ("0.png", "1.png"):
        content = (tmp_path / "data" / "train" / "zero" / name).read_bytes()
        (tmp_path / "data" / "test" / "zero" / f"copy-{name}").write_bytes(content)
    recipe = validate(tiny.recipe(str(tmp_path / "data")))
    stages = execute(recipe, str(tmp_path / "run"), until="labeled-test")
    assert [stages[f"labeled-{name}"].outputs.copies for name in ("validation", "test")] == [0, 2]
