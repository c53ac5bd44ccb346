"""The whole pipeline on tiny real data: on a local path with folders of files, and on S3 with shards."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

import tiny
from cluster import storage
from cluster.store import RunStore
from models.directory import load
from pipeline.cli import tables
from pipeline.data.ingest import ingest
from pipeline.data.rejects import read_rejects
from pipeline.data.sources import open_source
from pipeline.recipe.images import Source
from pipeline.recipe.reading import validate
from pipeline.report.gallery import TILE
from runs import Finished, execute

pytestmark = pytest.mark.usefixtures("ray_local")

STAGES = (
    "labeled-train",
    "labeled-validation",
    "labeled-test",
    "unlabeled",
    "teacher",
    "scores",
    "selection",
    "dhat",
    "gallery",
    "pretrained",
    "student",
    "supervised",
    "evaluation",
)


def test_every_stage_is_done_once_and_in_order(finished: Finished) -> None:
    done = finished.stages
    assert tuple(done) == STAGES
    assert all(stage.fresh for stage in done.values())


def test_every_image_is_accounted_for(finished: Finished) -> None:
    uri, done = finished.uri, finished.stages
    scores = done["scores"].outputs
    assert scores.listed == tiny.UNLABELED + len(tiny.BROKEN)
    assert scores.scored == tiny.UNLABELED
    reasons, rows = read_rejects(storage.join(uri, "rejects"), limit=9)
    assert sum(reasons.values()) == scores.rejected == len(tiny.BROKEN)
    assert {row.reason for row in rows} <= {"empty", "not_an_image", "truncated", "decode_error"}
    assert reasons["empty"] == 1
    selection = done["selection"].outputs
    assert selection.candidates == 2 * tiny.UNLABELED == selection.selected + selection.unselected


def test_dhat_holds_the_selected_images_with_their_labels(finished: Finished, folders: Path) -> None:
    done = finished.stages
    source = open_source("unlabeled", Source(uri=str(folders / "unlabeled")))
    selected = (
        pq.read_table(done["selection"].uri).sort_by([("class_id", "ascending"), ("rank", "ascending")]).to_pylist()
    )
    copies = pq.read_table(done["dhat"].uri).to_pylist()
    found = {(row["label"], row["rank"]): row for row in copies}
    assert len(found) == len(copies) == len(selected) == 90
    originals = {(shard.name, row.index): row.data for shard in source.shards() for row in source.read(shard.name)}
    for row in selected:
        copy = found[row["class_id"], row["rank"]]
        assert (copy["shard"], copy["index"]) == (row["shard"], row["index"])
        assert copy["image"] == originals[row["shard"], row["index"]]


def test_models_load_and_the_teacher_has_learned(finished: Finished) -> None:
    done = finished.stages
    for name in ("teacher", "pretrained", "student", "supervised"):
        assert load(done[name].uri).class_names == ["one", "two", "zero"]
    # 12 images of each of three easy classes: far above the third that chance gives.
    assert done["evaluation"].outputs.models["teacher"].top1 > 0.6


def test_nothing_of_the_work_is_left(finished: Finished) -> None:
    uri = finished.uri
    assert list(Path(uri).rglob("work")) == []


def test_the_sweep_takes_the_best_trial_on_validation(finished: Finished) -> None:
    done = finished.stages
    student = done["student"].outputs
    trials = {trial.learning_rate: trial.metrics["val_top1"] for trial in student.trials}
    assert set(trials) == {0.01, 0.1}
    assert trials[student.learning_rate] == max(trials.values())
    assert load(done["student"].uri).metrics["val_top1"] == pytest.approx(max(trials.values()))


def test_the_report_shows_the_run(finished: Finished) -> None:
    uri = finished.uri
    page = Path(uri, "report", "index.html").read_text()
    for text in ("ully supervised", "resnet8", "zero", "not_an_image", 'href="../gallery/index.html"'):
        assert text in page
    for number in range(3):
        strip = storage.read_bytes(storage.join(uri, "report", "assets", f"class-{number:05d}.jpg"))
        assert strip == storage.read_bytes(storage.join(uri, "gallery", "strips", f"class-{number:05d}.jpg"))
        with Image.open(io.BytesIO(strip)) as image:
            assert image.size == (16 * TILE, TILE)
    first = storage.read_bytes(storage.join(uri, "gallery", "index.html")).decode()
    assert [first.count(f"<bdi>{name}</bdi>") for name in tiny.CLASSES] == [1, 1, 1]


def test_the_closing_tables_add_up(finished: Finished) -> None:
    done = finished.stages
    console = Console(width=200, record=True, file=io.StringIO())
    tables.print_stages(console, done)
    tables.print_closing(console, done)
    text = console.export_text()
    assert "153 listed = 150 scored + 3 rejected" in text
    assert "300 = 90 selected + 210 unselected" in text
    student = done["evaluation"].outputs.models["student"]
    assert f"{100 * student.top1:.1f}% (" in text


@pytest.mark.parametrize("until", ["dhat", pytest.param(None, marks=pytest.mark.slow)])
def test_the_pipeline_on_s3(until: str | None, folders: Path, s3: str, ray_local: None) -> None:
    for part, layout in (
        ("train", "parquet"),
        ("validation", "parquet"),
        ("test", "webdataset"),
        ("unlabeled", "webdataset"),
    ):
        source = open_source(part, Source(uri=str(folders / part)))
        ingest(source, f"{s3}/{part}", layout=layout, images_per_shard=50)  # type: ignore[arg-type]
    short = {"fine_tune": {"training": {"epochs": 1, "batch_size": 12}, "sweep": {"learning_rates": [0.01]}}}
    done = execute(validate(tiny.recipe(s3, **short)), f"{s3}/run", until)
    assert tuple(done) == STAGES[: None if until is None else STAGES.index(until) + 1]
    scores = done["scores"].outputs
    assert (scores.listed, scores.scored, scores.rejected) == (153, 150, 3)
    assert load(done["teacher"].uri).class_names == ["one", "two", "zero"]
    assert done["dhat"].outputs.images == 90
    beside = {"report"}
    if until is None:
        assert load(done["student"].uri).class_names == ["one", "two", "zero"]
        assert done["evaluation"].outputs.models["student"].images == 60
        beside.add("trials/lr-0.01")
    assert set(RunStore(f"{s3}/run").result()) == {*done, *beside}
    left = [file.path for file in storage.list_files(f"{s3}/run") if "work" in file.path.split("/")]
    assert left == []
