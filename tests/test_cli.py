"""The command line as a user meets it: what it prints, and how it ends."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import tiny
from cluster import storage
from cluster.errors import ModelError
from cluster.store import RunStore
from models.config import ModelConfig
from pipeline.data.ingest import ingest
from pipeline.data.sources import open_source
from pipeline.plan import check_networks, plan, sources_of
from pipeline.recipe.images import Source
from pipeline.recipe.reading import load

Answer = tuple[int, str, str]


@pytest.fixture
def recipe(folders: Path, tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tiny.recipe(str(folders), **changes)))
        return str(path)

    return write


def refused(answer: Answer, *parts: str) -> None:
    """Exit code 2, and one line on standard error that holds the parts."""
    code, _, errors = answer
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2, errors
    assert len(lines) == 1
    assert "Traceback" not in errors
    for part in parts:
        assert part in lines[0]


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['tophat', '--help']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'pyarrow', 'numpy', 'boto3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ingest" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_a_missing_recipe(tophat: Callable[..., Answer]) -> None:
    refused(
        tophat("run", "no-such.yaml"), "RECIPE = 'no-such.yaml': is not a file", "demo, drawings, fashion-mnist, paper"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("runn", "demo"), "No such command 'runn'"),
        (("run",), "Missing argument 'RECIPE'; see"),
        (("run", "demo", "--sett"), "No such option: --sett"),
        (
            ("init", "--labeled", "x", "--unlabeled", "y", "--minutes", "0"),
            "'--minutes': must be greater than or equal to 1",
        ),
    ],
)
def test_a_command_that_is_called_wrongly(tophat: Callable[..., Answer], arguments: tuple[str, ...], said: str) -> None:
    refused(tophat(*arguments), said, "--help")


def test_unknown_and_wrong_fields(tophat: Callable[..., Answer], recipe: Callable[..., str], tmp_path: Path) -> None:
    path, run = recipe(), str(tmp_path / "run")
    refused(
        tophat("run", path, "--run-dir", run, "--set", "select.image_per_class=3"), "did you mean images_per_class?"
    )
    refused(
        tophat("run", path, "--run-dir", run, "--set", "select.images_per_class=0"),
        "select.images_per_class = 0",
        "must be a whole number from 1 to 1,000,000,000",
    )
    refused(tophat("run", path, "--run-dir", run, "--until", "the-end"), "--until = 'the-end'", "teacher")
    assert not Path(run).exists()


def test_all_mistakes_of_a_recipe_are_told_at_once(
    tophat: Callable[..., Answer], recipe: Callable[..., str], tmp_path: Path
) -> None:
    wrong = ("--set", "select.image_per_class=3", "--set", 'labeled.classes=["a\\nb", ""]', "--set", "seed=x")
    code, _, errors = tophat("run", recipe(), "--run-dir", str(tmp_path / "run"), *wrong)
    assert code == 2
    assert errors.splitlines()[-4:] == [
        "error: 3 mistakes:",
        "  select.image_per_class = 3: is not a field of a recipe; did you mean images_per_class?",
        "  seed = 'x': must be a whole number; correct it in the recipe, or --set seed=...",
        "  labeled.classes.1 = '': must have a length of 1 or more; "
        "correct it in the recipe, or --set labeled.classes.1=...",
    ]
    options = ("--image-column", "", "--label-column", "")
    code, _, errors = tophat("ingest", str(tmp_path), "--out", str(tmp_path / "out"), *options)
    assert (code, errors.splitlines()[-3:]) == (
        2,
        [
            "error: 2 mistakes:",
            "  --image-column = '': must have a length of 1 or more; correct it",
            "  --label-column = '': must have a length of 1 or more; correct it",
        ],
    )


def test_a_missing_source(tophat: Callable[..., Answer], recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe(unlabeled={"uri": str(tmp_path / "nowhere")})
    answer = tophat("run", path, "--run-dir", str(tmp_path / "run"), "--until", "unlabeled")
    refused(answer, f"unlabeled.uri = '{tmp_path}/nowhere': does not exist or holds no files")
    assert not (tmp_path / "run").exists()  # sources are looked at before anything is written


def test_a_run_inside_a_source(tophat: Callable[..., Answer], recipe: Callable[..., str], folders: Path) -> None:
    run = folders / "unlabeled" / "run"
    refused(tophat("run", recipe(), "--run-dir", str(run)), "--run-dir", "lies inside unlabeled; put it elsewhere")
    assert not run.exists()


def test_a_run_inside_a_source_behind_a_link(
    tophat: Callable[..., Answer], recipe: Callable[..., str], folders: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folders / "unlabeled")
    linked = recipe(unlabeled={"uri": str(tmp_path / "link")})
    run = folders / "unlabeled" / "run"
    refused(tophat("run", linked, "--run-dir", str(run)), "--run-dir", "lies inside unlabeled; put it elsewhere")
    refused(tophat("run", recipe(), "--run-dir", str(tmp_path / "link" / "run")), "lies inside unlabeled")


def test_a_class_folder_without_images(
    tophat: Callable[..., Answer], folders: Path, recipe: Callable[..., str], tmp_path: Path, ray_local: None
) -> None:
    shutil.copytree(folders / "train", tmp_path / "train")
    (tmp_path / "train" / "three").mkdir()
    labeled = {part: {"uri": str(folders / part)} for part in ("validation", "test")}
    labeled["train"] = {"uri": str(tmp_path / "train")}
    answer = tophat("run", recipe(labeled=labeled), "--run-dir", str(tmp_path / "run"))
    refused(answer, "labeled.train.uri", "no usable images of 1 of its 4 classes ('three')")


def test_a_class_without_images(
    tophat: Callable[..., Answer], folders: Path, recipe: Callable[..., str], tmp_path: Path, ray_local: None
) -> None:
    labeled = {part: {"uri": str(folders / part)} for part in ("train", "validation", "test")}
    path = recipe(labeled={**labeled, "classes": ["zero", "one", "two", "three"]})
    answer = tophat("run", path, "--run-dir", str(tmp_path / "run"))
    refused(answer, "labeled.train.uri", "no usable images of 1 of its 4 classes ('three')")


def test_p_above_the_class_count(tophat: Callable[..., Answer], recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe(score={"classes_per_image": 4})
    refused(tophat("run", path, "--run-dir", str(tmp_path / "run")), "score.classes_per_image = 4: must be at most 3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("architecture", "uncalled", "called"),
    [
        ("nowhere:make", "could not be imported (ModuleNotFoundError", ""),
        ("math:pi", "cannot be called; name a factory", ""),
        ("math:sqrt", "", "could not be built with num_classes = 3 "),
        ("builtins:dict", "", "returned a dict; return a torch.nn.Module"),
    ],
)
def test_networks_are_built_before_anything_is_started(
    architecture: str,
    uncalled: str,
    called: str,
    tophat: Callable[..., Answer],
    recipe: Callable[..., str],
    folders: Path,
    tmp_path: Path,
) -> None:
    """A factory is called with the number of classes; where D does not tell it before it is read, the factory is only looked up."""
    run = str(tmp_path / "run")
    path = recipe(student={"model": {**tiny.MODEL, "architecture": architecture, "options": {}}})
    expected = f"student.model.architecture = {architecture!r}: {uncalled or called}"
    refused(tophat("run", path, "--run-dir", run), expected)
    ingest(
        open_source("SOURCE", Source(uri=str(folders / "train"))),
        str(tmp_path / "train"),
        layout="webdataset",
        images_per_shard=50,
    )
    (tmp_path / "train" / "classes.json").unlink()
    path = recipe(
        student={"model": {**tiny.MODEL, "architecture": architecture, "options": {}}},
        labeled={part: {"uri": str((tmp_path if part == "train" else folders) / part)} for part in ("train", "test")},
    )
    given = load(path)
    sources = sources_of(given)
    planned = plan(given, RunStore(run)).planned
    if uncalled:
        with pytest.raises(ModelError) as error:
            check_networks(given, planned, sources)
        assert str(error.value).startswith(expected)
    else:
        check_networks(given, planned, sources)
    named = load(path, ["labeled.classes=[one, two, zero]"])
    with pytest.raises(ModelError) as error:
        check_networks(named, plan(named, RunStore(run)).planned, sources)
    assert str(error.value).startswith(expected)
    assert not Path(run).exists()


def test_more_than_the_cluster_has(
    tophat: Callable[..., Answer], recipe: Callable[..., str], tmp_path: Path, ray_local: None
) -> None:
    path, run = recipe(), str(tmp_path / "run")
    refused(
        tophat("run", path, "--run-dir", run, "--set", "pretrain.workers=64"), "pretrain.workers = 64", "at most 2 CPU"
    )
    two = ("--set", "score.gpus_per_actor=1", "--set", "score.actors=2")
    refused(tophat("run", path, "--run-dir", run, *two), "score.actors = 2", "at most 2 CPU + 1 GPU")


def test_a_run_of_another_recipe(tophat: Callable[..., Answer], recipe: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunStore(str(run)).claim("other", "name: other\n")
    refused(tophat("run", recipe(), "--run-dir", str(run)), "--run-dir", "belongs to the recipe 'other', not to 'tiny'")
    assert sorted(p.name for p in run.iterdir()) == ["recipe.yaml", "run.json"]


def test_the_demo_puts_its_images_where_it_is_told(tophat: Callable[..., Answer], tmp_path: Path) -> None:
    data, run = tmp_path / "a #b: c", tmp_path / "run"
    run.mkdir()
    (run / "file").write_text("")
    refused(tophat("demo", "--data", str(data), "--run-dir", str(run)), "--run-dir", "holds files that are no run")
    assert (data / "unlabeled").is_dir()


def test_a_stage_is_checked_before_a_job_is_submitted(tophat: Callable[..., Answer]) -> None:
    answer = tophat("submit", "demo", "--address", "http://127.0.0.1:1", "--until", "the-end")
    refused(answer, "--until = 'the-end': is not a stage")


def test_wrong_credentials(
    tophat: Callable[..., Answer], recipe: Callable[..., str], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused(tophat("run", recipe(), "--run-dir", f"{s3}/run"), "was refused by the store", "check the credentials")


def test_no_model_and_no_run(tophat: Callable[..., Answer], folders: Path, tmp_path: Path) -> None:
    source = str(folders / "test")
    refused(tophat("evaluate", str(tmp_path), "--source", source), "has no model.json")
    refused(
        tophat("score", "--model", str(tmp_path), "--source", source, "--out", str(tmp_path / "s")), "has no model.json"
    )
    refused(tophat("status", str(tmp_path)), "is not a run directory")
    refused(tophat("status", f"{tmp_path}[/red]"), "is not a run directory")


@pytest.fixture
def columns(tmp_path: Path) -> str:
    """Parquet with labeled images in the column `img`, and beside them other binary columns; and a stray tar that is none."""
    names, images = zip(*((name, files[0]) for name, files in tiny.digits().items()), strict=True)
    folder = tmp_path / "columns"
    folder.mkdir()
    columns = {"img": images, "thumb": images, "what": names, "label": [7, 7, 7], "tokens": [b"", b"x", b"y"]}
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "a.parquet")
    return str(folder)


def test_sources_of_other_columns(tophat: Callable[..., Answer], columns: str, tmp_path: Path, ray_local: None) -> None:
    """ingest, score and evaluate are told of a source what a recipe is told; what they ask for is what they take."""
    model, shards = tiny.save_teacher(str(tmp_path / "model")), str(tmp_path / "shards")
    ingest = ("ingest", columns, "--out", shards)
    score = ("score", "--model", model, "--source", columns, "--out", str(tmp_path / "scores"))
    evaluate = ("evaluate", model, "--source", columns)
    for command in (ingest, score, evaluate):
        refused(tophat(*command, "--image-column", "picture"), "--image-column = 'picture': ", "img, thumb")
        refused(tophat(*command, "--image-column", ""), "--image-column = '': ")
        refused(tophat(*command, "--layout", "zip"), "--layout = 'zip': must be 'auto', 'webdataset', ")
        option = command[1] if command is ingest else columns
        refused(
            tophat(*command, "--layout", "folder"), f"{'SOURCE' if command is ingest else '--source'} = {option!r}: "
        )
    refused(tophat(*ingest, "--as", "zip"), "--as = 'zip': is not a layout of shards; use webdataset or parquet")
    told = ("--layout", "parquet", "--image-column", "img")
    code, output, _ = tophat(*ingest, *told, "--label-column", "what", "--as", "parquet")
    assert code == 0, output
    assert pq.read_table(f"{shards}/shard-000000.parquet")["label"].to_pylist() != [7, 7, 7]
    code, output, _ = tophat(*score, *told, "--classes-per-image", "1")
    assert code == 0, output
    assert "images: 3 listed = 3 scored + 0 rejected" in output
    code, output, _ = tophat(*evaluate, *told, "--label-column", "what")
    assert code == 0, output
    refused(tophat(*evaluate, *told), "--source = ", "has the label 7")


def test_values_of_options_that_are_none(tophat: Callable[..., Answer], folders: Path, tmp_path: Path) -> None:
    """Each is told before any work, by the option that gave it."""
    select = ("select", "--scores", str(tmp_path / "scores"), "--out", str(tmp_path / "out"), "--images-per-class", "5")
    for option, value in (
        ("--min-score", "nan"),
        ("--min-score", "inf"),
        ("--zipf-exponent", "nan"),
        ("--zipf-exponent", "inf"),
        ("--zipf-exponent", "11.0"),
        ("--memory-mib", "9999999999"),
        ("--classes-per-image", "99999999999999999999"),
    ):
        refused(tophat(*select, option, value), f"{option} = {value}: must be ")
    refused(tophat(*select, "--images-per-class", "9" * 20), f"--images-per-class = {'9' * 20}: must be a whole number")
    refused(tophat(*select, "--exclude", ""), "--exclude.0 = ''")
    refused(tophat(*select, "--tags", "--min-score", "0.5"), "the options = ", "tags have no scores")
    duplicates = ("duplicates", "--source", str(folders / "unlabeled"), "--out", str(tmp_path / "out"))
    for option, value in (("--within", "nan"), ("--within", "3.0"), ("--nearest", "0")):
        refused(tophat(*duplicates, option, value), f"{option} = {value}: must be ")
    refused(tophat(*duplicates, "--copies", "--set", "probes=0"), "--set probes = 0: must be ")
    refused(tophat(*duplicates, "--copies", "--set", "score.batch_size=0"), "--set batch_size = 0: ")
    refused(
        tophat(*duplicates, "--copies", "--set", "prob=1"), "--set prob = 1: is not a field", "did you mean probes?"
    )
    refused(tophat("ingest", " ", "--out", str(tmp_path / "out")), "SOURCE = ' ': ")
    near = ("--nearest", "1", "--set", "model=teacher", "--against", str(tmp_path / "nowhere"))
    refused(tophat(*duplicates, *near), "--model = 'teacher': is known to a recipe's run only")
    refused(tophat(*duplicates, *near[:2], *near[4:]), "--against = ", "does not exist")
    assert not (tmp_path / "out").exists()


def test_ingest_score_select_evaluate_and_status(
    tophat: Callable[..., Answer], folders: Path, recipe: Callable[..., str], tmp_path: Path, ray_local: None
) -> None:
    import torch

    from models.architectures import build
    from models.directory import save

    config = ModelConfig.model_validate(tiny.MODEL)
    torch.manual_seed(0)
    model, shards, scores, picked = (str(tmp_path / name) for name in ("model", "shards", "scores", "picked"))
    save(model, build(config, 3), config=config, class_names=["one", "two", "zero"], metrics={}, provenance={})

    code, output, _ = tophat("ingest", str(folders / "unlabeled"), "--out", shards, "--images-per-shard", "60")
    assert (code, len(list(Path(shards).glob("*.tar")))) == (0, 3)
    assert "ingest: 153 of 153 images" in output
    assert re.search(r"images +153\b", output)

    refused(
        tophat("score", "--model", model, "--source", shards, "--out", scores, "--classes-per-image", "4"),
        "must be at most 3",
    )
    code, output, _ = tophat("score", "--model", model, "--source", shards, "--out", scores, "--classes-per-image", "2")
    assert code == 0
    assert "images: 153 listed = 150 scored + 3 rejected" in output

    refused(
        tophat("select", "--scores", scores, "--out", picked, "--images-per-class", "5", "--classes-per-image", "3"),
        "--classes-per-image = 3",
    )
    code, output, _ = tophat(
        "select", "--scores", scores, "--out", picked, "--images-per-class", "5", "--classes-per-image", "1"
    )
    assert code == 0
    table = pq.read_table(picked)
    assert table.column_names == ["class_id", "rank", "score", "shard", "index"]
    assert f"candidates: 150 = {table.num_rows} selected" in output

    code, output, _ = tophat("evaluate", model, "--source", str(folders / "test"))
    assert code == 0
    assert "60" in output

    run = str(tmp_path / "run")
    code, _, _ = tophat("run", recipe(), "--run-dir", run, "--until", "unlabeled")
    assert code == 0
    code, output, _ = tophat("status", run)
    assert code == 0
    states = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert "done" in states["unlabeled"]
    assert "not started" in states["teacher"]
    assert storage.exists(storage.join(run, "report", "index.html"))
