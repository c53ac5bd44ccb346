"""Models on labeled images: what is kept of each image, what is measured from it, and `tophat evaluate`."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import tiny
from cluster import storage
from cluster.errors import ModelError, RecipeError, ResourceError
from cluster.progress import SILENT, Display
from cluster.session import Session
from cluster.store import Made, RunStore
from models.architectures import build
from models.config import ModelConfig, Transform
from models.directory import load, save
from models.inputs.image import evaluation_image, normalize
from models.judging import confusion
from pipeline.cli import tables
from pipeline.content import report_content
from pipeline.context import Run
from pipeline.data import labeled
from pipeline.data.loading import TrainingSet
from pipeline.data.sources import open_source
from pipeline.evaluation import Candidate, measured
from pipeline.measuring import Evaluated, evaluate, held_out_predictions, predictions
from pipeline.plan import sources_of
from pipeline.recipe.images import Source
from pipeline.recipe.reading import validate
from pipeline.recipe.sections import Score
from pipeline.report.page import write_report
from pipeline.scoring.judging import judge
from pipeline.stages import survey_labeled
from runs import Finished

pytestmark = pytest.mark.usefixtures("ray_local")

Answer = tuple[int, str, str]
NAMES = ("one", "two", "zero")
SETTINGS = Score(classes_per_image=1, batch_size=7, actors=1, range_mib=1)


def network(uri: Path, seed: int, size: int = 28, classes: tuple[str, ...] = NAMES, **transform: Any) -> Candidate:
    """A network that has learned nothing."""
    torch.manual_seed(seed)
    pixels = Transform(size=size, resize=size, crop="pad", padding=2, flip=False, **transform)
    config = ModelConfig(architecture="resnet8", options={"width": 4}, transform=pixels)
    save(str(uri), build(config, len(classes)), config=config, class_names=list(classes), metrics={}, provenance={})
    return Candidate(str(uri))


def surveyed(uri: Path) -> TrainingSet:
    source = open_source("set", Source(uri=str(uri)), labeled=True)
    found = labeled.survey("set", source, SILENT)
    return labeled.training_set(source, labeled.number_labels("set", found, NAMES, complete=False), NAMES)


def test_each_image_is_judged_as_the_plain_network_does(folders: Path, tmp_path: Path) -> None:
    """Models of two sizes, two normalizations and another order of classes; two sets, of which one has a single judge. The images of a
    shard travel in parts of seven, as a MiB holds no more of 224 pixels."""
    seven = ("seven", "two", "zero", "one", "nine", "ten", "four")
    models = {
        "a": network(tmp_path / "a", 1),
        "b": network(tmp_path / "b", 2, mean=(0.2, 0.2, 0.2)),
        "c": network(tmp_path / "c", 3, size=224),
        "d": Candidate(network(tmp_path / "d", 4, classes=seven).uri, (3, 1, 2)),
    }
    sets = {"test": surveyed(folders / "test"), "validation": surveyed(folders / "validation")}
    wanted = {"test": (sets["test"], ["c", "a", "b", "d"]), "validation": (sets["validation"], ["b"])}
    found = judge(models, wanted, NAMES, SETTINGS)
    assert {name: list(tables) for name, tables in found.items()} == {"test": ["c", "a", "b", "d"], "validation": ["b"]}
    for folder, by_model in found.items():
        for name, table in by_model.items():
            rows = table.to_pylist()
            assert sorted(row["file"] for row in rows) == sorted(
                f"{path.parent.name}/{path.name}" for path in (folders / folder).rglob("*.png")
            )
            loaded = load(models[name].uri)
            transform = loaded.config.transform
            pixels = [evaluation_image((folders / folder / row["file"]).read_bytes(), transform) for row in rows]
            with torch.inference_mode():
                images = normalize(torch.from_numpy(np.stack(pixels)), transform, torch.device("cpu"))
                scores = loaded.model(images).softmax(1)[:, list(models[name].outputs or (0, 1, 2))].numpy()
            label = np.array([NAMES.index(row["file"].split("/")[0]) for row in rows])
            best = np.argsort(-scores, axis=1)
            assert [row["label"] for row in rows] == label.tolist()
            assert [row["label_name"] for row in rows] == [NAMES[number] for number in label]
            assert [row["predicted"] for row in rows] == best[:, 0].tolist()
            assert [row["predicted_name"] for row in rows] == [NAMES[number] for number in best[:, 0]]
            assert [row["rank"] for row in rows] == (best == label[:, None]).argmax(1).tolist()
            np.testing.assert_allclose([row["score"] for row in rows], scores.max(1), atol=1e-5)
            np.testing.assert_allclose(
                [row["label_score"] for row in rows], scores[np.arange(len(rows)), label], atol=1e-5
            )


def test_a_label_beyond_the_best_five_has_no_rank(tmp_path: Path) -> None:
    names = tuple("abcdefgh")
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        for number, image in enumerate(tiny.digits()["two"][:4]):
            (tmp_path / "set" / name / f"{number}.png").write_bytes(image)
    source = open_source("set", Source(uri=str(tmp_path / "set")), labeled=True)
    found = labeled.survey("set", source, SILENT)
    data = labeled.training_set(source, labeled.number_labels("set", found, names, complete=False), names)
    models = {"a": network(tmp_path / "a", 1, classes=names)}
    table = judge(models, {"set": (data, ["a"])}, names, SETTINGS)["set"]["a"]
    one = measured(table, 8)
    # The same four images in every class: of each image's eight copies, five have a label among the best five, and one the best.
    assert table["rank"].null_count == 12
    assert (one.images, one.top1, one.top5) == (32, 1 / 8, 5 / 8)
    assert one.support == (4,) * 8


def test_what_cannot_be_judged_is_told(folders: Path, tmp_path: Path) -> None:
    data = surveyed(folders / "test")
    models = {"a": network(tmp_path / "a", 1)}
    with pytest.raises(RecipeError, match=r"score\.views = 'five': has no corners"):
        judge(models, {"test": (data, ["a"])}, NAMES, SETTINGS.model_copy(update={"views": "five"}))
    if not torch.cuda.is_available():  # the Ray of the tests takes this machine to have one: the actors ask for it
        with pytest.raises(ResourceError, match=r"score\.gpus_per_actor = 1.*finds no GPU"):
            judge(models, {"test": (data, ["a"])}, NAMES, SETTINGS.model_copy(update={"gpus_per_actor": 1.0}))
    (tmp_path / "a" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="of 7 bytes where its card says"):
        judge(models, {"test": (data, ["a"])}, NAMES, SETTINGS)


def test_the_stage_keeps_every_image_and_adds_up(finished: Finished, folders: Path) -> None:
    made: Made[Evaluated] = finished.stages["evaluation"]
    found = made.outputs
    assert set(found.models) == {"teacher", "pretrained", "student", "supervised"}
    for name, one in found.models.items():
        table = pq.read_table(Path(finished.uri, "predictions", f"{name}.parquet"))  # by the link that people see
        assert table.equals(predictions(made, name))
        label, predicted = table["label"].to_numpy(), table["predicted"].to_numpy()
        assert confusion(label, predicted).counts.sum() == one.images == found.images == table.num_rows == 60
        assert one.top1 == np.mean(label == predicted)
        assert one.top5 == 1.0  # of three classes
        assert one.interval[0] <= one.top1 <= one.interval[1]
        assert one.support == (20, 20, 20)
        assert np.nanmean([np.nan if value is None else value for value in one.recall]) == pytest.approx(one.top1)
    against = found.against["student"]
    both, student, baseline = against.both, found.models["student"], found.models["supervised"]
    assert (both + against.only_first, both + against.only_second) == (60 * student.top1, 60 * baseline.top1)
    assert found.subject == "student"
    table = predictions(made, "student").to_pylist()
    wrong = sorted((row for row in table if row["label"] != row["predicted"]), key=lambda row: -row["score"])
    assert [one.score for one in found.mistakes] == [row["score"] for row in wrong[:24]]
    for mistake in found.mistakes:
        assert (folders / "test" / mistake.name).is_file()
        assert NAMES[mistake.label] == mistake.name.split("/")[0] != NAMES[mistake.predicted]


def test_what_the_teacher_says_of_held_out_images(finished: Finished, folders: Path) -> None:
    made: Made[Evaluated] = finished.stages["evaluation"]
    assert list(made.outputs.held_out) == ["teacher"]
    rows = held_out_predictions(made, "teacher").to_pylist()
    assert len(rows) == made.outputs.held_out["teacher"].images == 24
    assert {row["file"] for row in rows} == {
        f"{path.parent.name}/{path.name}" for path in (folders / "validation").rglob("*.png")
    }


def closing(stages: dict[str, Made[Any]]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    tables.print_closing(console, stages)
    return console.export_text()


def test_the_closing_table_has_intervals_and_the_comparison(finished: Finished) -> None:
    found: Evaluated = finished.stages["evaluation"].outputs
    said = closing(finished.stages)
    low, high = (f"{100 * bound:.1f}" for bound in found.models["student"].interval)
    assert f"{100 * found.models['student'].top1:.1f}% ({low}\u2013{high}) / 100.0%" in said
    assert "student against baseline: " in said
    page = Path(finished.uri, "report", "index.html").read_text()
    assert f"Student, fine-tuned on 60 test images: {100 * found.models['student'].top1:.1f}% right" in page
    assert Path(finished.uri, "report", "assets", "mistakes.jpg").is_file() == bool(found.mistakes)


@pytest.mark.parametrize("names", [("supervised",), ("pretrained", "student"), ("teacher",)])
def test_any_of_the_models_may_be_missing(
    names: tuple[str, ...], finished: Finished, folders: Path, tmp_path: Path
) -> None:
    recipe = validate(tiny.recipe(str(folders)))
    store = RunStore(finished.copy(tmp_path / "run"))
    with Session(recipe.cluster) as session:
        quiet = Display(Console(quiet=True), enabled=False)
        this = Run(recipe.name, recipe.to_yaml(), store, sources_of(recipe), session, quiet)
        data = survey_labeled(this, recipe)
        made = evaluate(this, recipe.score, data, {name: finished.stages[name] for name in names})
    assert made.fresh
    assert tuple(made.outputs.models) == names
    assert made.outputs.subject == names[-1]
    assert made.outputs.against == {}
    assert tuple(made.outputs.held_out) == tuple(name for name in names if name == "teacher")
    stages = {**finished.stages, "evaluation": made}
    assert "against" not in closing(stages)
    content = report_content(this, stages)
    assert (content.fine_tuned is None) == ("student" not in names)
    write_report(str(tmp_path / "report"), content)


def test_evaluate_a_model_against_another(
    tophat: Callable[..., Answer], finished: Finished, folders: Path, tmp_path: Path
) -> None:
    """The other one is the same network, whose classes stand in another order among one more: they agree on every image."""
    teacher, source = finished.stages["teacher"].uri, str(folders / "test")
    loaded = load(teacher)
    state = loaded.model.state_dict()
    for name, extra in (("fc.weight", 0.0), ("fc.bias", -1e4)):
        state[name] = torch.cat([state[name][[2, 0]], torch.full_like(state[name][:1], extra), state[name][[1]]])
    other = build(loaded.config, 4)
    other.load_state_dict(state)
    uri, out = str(tmp_path / "other"), str(tmp_path / "out")
    save(uri, other, config=loaded.config, class_names=["zero", "one", "x", "two"], metrics={}, provenance={})
    code, output, errors = tophat(
        *("evaluate", teacher, "--source", source, "--against", uri, "--out", out, "--set", "score.actors=1")
    )
    assert code == 0, errors
    assert "model against the other: +0.0 points (95% interval +0.0 to +0.0), p = 1: within the noise" in output
    one = finished.stages["evaluation"].outputs.models["teacher"]
    low, high = (f"{100 * bound:.1f}" for bound in one.interval)
    cells = ["60", "0", f"{100 * one.top1:.1f}%", f"{low}\u2013{high}", "100.0%"]
    rows = [line.split() for line in output.splitlines()]
    assert [row[1:6] for row in rows if row[:1] in (["model"], ["against"]) and row[1:2] == ["60"]] == [cells, cells]
    worst = [row for row in rows if row[:1] in (["one"], ["two"], ["zero"])]
    assert [row[1] for row in worst] == ["20"] * 3
    recalls = [float(row[2].rstrip("%")) for row in worst]
    assert recalls == sorted(recalls)
    assert [entry.path for entry in storage.list_files(out)] == ["against.parquet", "model.parquet"]
    columns = ["shard", "index", "file", "label", "predicted", "rank"]
    first, second = (pq.read_table(f"{out}/{name}.parquet", columns=columns) for name in ("model", "against"))
    assert first.equals(second)


def test_evaluate_tells_what_is_wrong_in_one_line(tophat: Callable[..., Answer], folders: Path, tmp_path: Path) -> None:
    def refused(*words: str, said: str) -> None:
        code, _, errors = tophat("evaluate", *words)
        assert code == 2
        assert errors.startswith("error: ")
        assert said in errors
        assert errors.count("\n") == 1

    model, source = network(tmp_path / "model", 1).uri, ("--source", str(folders / "test"))
    other = network(tmp_path / "other", 1, classes=("one", "two", "three")).uri
    refused(model, *source, "--against", other, said="has no output for 1 of the 3 classes of MODEL ('zero')")
    refused(model, *source, "--against", str(tmp_path), said=f"--against = '{tmp_path}': has no model.json")
    refused(str(tmp_path), *source, said=f"MODEL = '{tmp_path}': has no model.json")
    refused(other, *source, said="--source = ")
    refused(model, *source, "--out", str(folders), said="--out = ")
    refused(model, *source, "--out", model, said="is not empty")
    refused(model, *source, "--set", "score.views=five", said="--set score.views = 'five': has no corners")
    refused(model, *source, "--set", "score.nothing=1", said="is not a field")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    renamed = network(tmp_path / "damaged", 1).uri
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"short")
    refused(model, *source, "--against", renamed, said=f"--against = '{renamed}': has a model.safetensors of 5 bytes")


def test_the_documents_queries_run(finished: Finished) -> None:
    """What docs/evaluation.md has people type, on a run of theirs."""
    import duckdb

    document = Path(__file__).parent.parent.joinpath("docs", "evaluation.md").read_text()
    python, sql = (
        document.split(f"```{language}\n")[1].split("```")[0].replace("runs/demo", finished.uri).strip().splitlines()
        for language in ("python", "sql")
    )
    known: dict[str, Any] = {}
    exec("\n".join(python[:-2]), known)
    recalls, mistakes = (eval(line, known) for line in python[-2:])
    found: Evaluated = finished.stages["evaluation"].outputs
    expected = dict(zip(NAMES, found.models["student"].recall, strict=True))
    assert recalls.to_dict() == pytest.approx(expected)
    wrong = round(60 * (1 - found.models["student"].top1))
    assert len(mistakes) == min(20, wrong)
    confused, purity = (duckdb.execute(query).fetchall() for query in sql)
    assert sum(count for _, _, count in confused) == wrong
    teacher = held_out_predictions(finished.stages["evaluation"], "teacher").to_pandas()
    assert sum(count for _, _, count in purity) == (teacher.score > 0.9).sum()
