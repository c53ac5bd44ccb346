"""Scoring: the ledger of published ranges, resuming, rejects, and agreement with the plain model."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import pipeline.scoring.score
import tiny
from cluster import storage
from cluster.errors import ModelError, ResourceError, RunError, StageError, StorageError
from cluster.progress import SILENT
from models.config import ModelConfig, Transform
from pipeline.data.rejects import Reject, count_rejected, publish_rejects, read_rejects
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Score
from pipeline.scoring.actors import compiler_error
from pipeline.scoring.beside import claim
from pipeline.scoring.ledger import Range
from pipeline.scoring.score import default_actors, prove, score

CONFIG = ModelConfig(architecture="resnet8", options={"width": 4}, transform=Transform(size=28, resize=28, flip=False))
SETTINGS = Score(classes_per_image=3, batch_size=16, actors=1, cpus_per_actor=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    from models.architectures import build
    from models.directory import save

    torch.manual_seed(0)
    uri = str(tmp_path_factory.mktemp("model") / "teacher")
    save(uri, build(CONFIG, 4), config=CONFIG, class_names=list("abcd"), metrics={}, provenance={})
    return uri


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """Three tars: 50 digits; 20 with two broken images; 30 of which the file's end is missing."""
    root = tmp_path_factory.mktemp("tars")
    images = tiny.digits()["two"]
    tiny.write_tar(root / "a.tar", images[:50])
    tiny.write_tar(root / "b.tar", [*images[50:55], b"", *images[55:60], b"no image", *images[60:68]])
    tiny.write_tar(root / "c.tar", images[70:100])
    whole = (root / "c.tar").read_bytes()
    (root / "c.tar").write_bytes(whole[: len(whole) // 2 + 700])
    return open_source("U", Source(uri=str(root)))


def read_scores(uri: str) -> pa.Table:
    tables = [pq.read_table(storage.join(uri, entry.path)) for entry in storage.list_files(uri, ".parquet")]
    return pa.concat_tables([t.set_column(0, "shard", t["shard"].cast(pa.string())) for t in tables]).sort_by(
        [("shard", "ascending"), ("index", "ascending")]
    )


@pytest.fixture(scope="module")
def scored(source: ImageSource, model: str, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    uri = str(tmp_path_factory.mktemp("scored") / "scores")
    found = score(source, model, uri, f"{uri}-rejects", SETTINGS, SILENT)
    assert found.listed == found.scored + found.rejected
    return uri


@pytest.fixture
def own(scored: str, tmp_path: Path) -> str:
    """The same, in a folder of its own, to be damaged."""
    for suffix in ("", "-rejects"):
        shutil.copytree(f"{scored}{suffix}", tmp_path / f"own{suffix}")
    return str(tmp_path / "own")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(source: ImageSource, model: str, tmp_path: Path, ray_local: None) -> None:
    """Which the actors find, on the way that scoring takes on GPUs."""
    settings = SETTINGS.model_copy(update={"gpus_per_actor": 1.0})
    with pytest.raises(ResourceError, match=r"score\.gpus_per_actor = 1\.0: torch .* finds no GPU on a node"):
        score(source, model, str(tmp_path / "s"), str(tmp_path / "r"), settings, SILENT)


def test_more_actors_than_the_cluster_holds(
    tophat: Callable[..., tuple[int, str, str]], source: ImageSource, model: str, tmp_path: Path, ray_local: None
) -> None:
    words = ["score", "--model", model, "--source", source.reader.root, "--out", str(tmp_path / "s")]
    code, _, errors = tophat(*words, "--set", "gpus_per_actor=1", "--set", "actors=2")
    assert code == 2
    assert "score.actors = 2: needs" in errors
    assert default_actors(Score(gpus_per_actor=0.1)) == 1  # of ten, as one has to leave a reader its CPU


def test_what_cannot_be_scored_is_in_the_rejects(scored: str) -> None:
    reasons, rows = read_rejects(f"{scored}-rejects", limit=9)
    assert reasons == {"empty": 1, "not_an_image": 1, "unreadable_shard": 1}
    assert {(r.shard, r.index) for r in rows} == {("b.tar", 5), ("b.tar", 11), ("c.tar", None)}
    table = read_scores(scored)
    assert [i for s, i in zip(table["shard"].to_pylist(), table["index"].to_pylist(), strict=True) if s == "b.tar"] == [
        i for i in range(20) if i not in (5, 11)
    ]


def test_scores_agree_with_the_plain_model(scored: str, source: ImageSource, model: str) -> None:
    import torch

    from models.directory import load
    from models.inputs.image import evaluation_image, normalize

    loaded = load(model).model
    rows = list(source.read("a.tar"))
    images = torch.from_numpy(np.stack([evaluation_image(row.data, CONFIG.transform) for row in rows]))
    with torch.inference_mode():
        expected = loaded(normalize(images, CONFIG.transform, torch.device("cpu"))).softmax(1)
    table = read_scores(scored).slice(0, 50)
    classes, scores = np.array(table["class_ids"].to_pylist()), np.array(table["scores"].to_pylist())
    assert (np.diff(scores, axis=1) <= 0).all()
    top = expected.topk(3, dim=1)
    np.testing.assert_array_equal(classes, top.indices.numpy())
    np.testing.assert_allclose(scores, top.values.numpy(), atol=1e-5)


def test_a_teacher_with_other_classes_reports_those_that_count(
    scored: str, source: ImageSource, model: str, tmp_path: Path, ray_local: None
) -> None:
    """Two of its four, in another order; the softmax is of all four."""
    uri, outputs = str(tmp_path / "scores"), (3, 1)
    settings = SETTINGS.model_copy(update={"classes_per_image": 2})
    score(source, model, uri, f"{uri}-rejects", settings, SILENT, outputs)
    table = read_scores(uri)
    assert table.schema.metadata == {b"tophat.num_classes": b"2"}
    of_image = {row["index"]: row for row in read_scores(scored).slice(0, 50).to_pylist()}
    for row in table.slice(0, 50).to_pylist():
        among_all = of_image[row["index"]]
        best = dict(zip(among_all["class_ids"], among_all["scores"], strict=True))  # three of four
        found = [outputs[class_id] for class_id in row["class_ids"]]
        assert sorted(found) == [1, 3]
        for output, value in zip(found, row["scores"], strict=True):
            assert value == pytest.approx(best.get(output, 1 - sum(best.values())), abs=1e-5)


@pytest.mark.slow
def test_ray_says_nothing_of_its_own(source: ImageSource, model: str, tmp_path: Path) -> None:
    """Ray Data restarts its actors, which Ray's core warns of on the standard error of the process that makes them."""
    words = ["--model", model, "--source", source.reader.root, "--out", str(tmp_path / "s"), "--classes-per-image", "3"]
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", "score", *words], capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r".*core_worker.*|.*\.cc:\d+.*", ended.stderr) == []


def test_what_never_repeats_has_no_dictionary(scored: str) -> None:
    for entry in storage.list_files(scored, ".parquet"):
        row_group = pq.read_metadata(storage.join(scored, entry.path)).row_group(0)
        columns = {c.path_in_schema: c for c in map(row_group.column, range(row_group.num_columns))}
        assert {name for name, c in columns.items() if c.has_dictionary_page} == {"shard", "class_ids.list.element"}
        assert "scores.list.element" in columns


def test_only_what_has_no_file_is_scored_again(own: str, source: ImageSource, model: str) -> None:
    before = {entry.path: entry.etag for entry in storage.list_files(own)}
    table = read_scores(own)
    (lost,) = before  # small shards share a file
    assert lost == "a.tar/00000000-00000090-3-shards.parquet"
    storage.delete_file(storage.join(own, lost))
    b = table.filter(pc.equal(table["shard"], "b.tar"))
    b_alone = storage.join(own, Range("b.tar", 0, 20, True).file)
    sink = pa.BufferOutputStream()
    pq.write_table(b, sink)
    storage.publish(b_alone, sink.getvalue().to_pybytes())
    rejects = [r for r in read_rejects(f"{own}-rejects", limit=9)[1] if r.shard == "b.tar" and r.index is not None]
    publish_rejects(storage.join(f"{own}-rejects", Range("b.tar", 0, 20, True).file), rejects)
    with pytest.raises(StageError, match=r"a\.tar is not scored completely"):
        prove(source, own, f"{own}-rejects")
    before = {entry.path: entry.etag for entry in storage.list_files(own)}
    score(source, model, own, f"{own}-rejects", SETTINGS, SILENT)
    after = {entry.path: entry.etag for entry in storage.list_files(own)}
    assert before.items() < after.items()
    assert {path.split("/")[0] for path in after} == {"a.tar", "b.tar", "c.tar"}
    assert read_scores(own).equals(table)


@pytest.mark.slow
def test_what_two_files_hold_is_scored_once(own: str, source: ImageSource, model: str) -> None:
    table = read_scores(own)
    rejects = read_rejects(f"{own}-rejects", limit=9)
    again = Range("b.tar", 2, 9, False)
    sink = pa.BufferOutputStream()
    pq.write_table(table.filter(pc.equal(table["shard"], "b.tar")).slice(2, 6), sink)
    publish_rejects(storage.join(f"{own}-rejects", again.file), [r for r in rejects[1] if r.index == 5])
    storage.publish(storage.join(own, again.file), sink.getvalue().to_pybytes())
    with pytest.raises(StageError, match=r"b\.tar/00000002-00000009\.parquet holds images that another file holds too"):
        prove(source, own, f"{own}-rejects")
    score(source, model, own, f"{own}-rejects", SETTINGS, SILENT)
    assert not storage.exists(storage.join(own, again.file))
    assert read_scores(own).equals(table)
    assert read_rejects(f"{own}-rejects", limit=9)[0] == rejects[0]


@pytest.mark.slow
def test_a_file_whose_rejects_are_lost_is_named(own: str, source: ImageSource, model: str) -> None:
    """As when a process that outlived its scoring publishes scores, and the next scoring has just forgotten their rejects."""
    table, rejects = read_scores(own), read_rejects(f"{own}-rejects", limit=9)
    (file,) = (file for file, images in count_rejected(f"{own}-rejects").items() if images)
    storage.delete_file(storage.join(f"{own}-rejects", file))
    what = "90 images are listed, but 88 are scored and 0 rejected"
    with pytest.raises(
        StageError, match=f"^{what}: remove '{re.escape(file)}' from {own}, and run the same command again$"
    ):
        prove(source, own, f"{own}-rejects")
    storage.delete_file(storage.join(own, file))
    score(source, model, own, f"{own}-rejects", SETTINGS, SILENT)
    assert read_scores(own).equals(table)
    assert read_rejects(f"{own}-rejects", limit=9) == rejects


def cut_off(content: bytes) -> bytes:
    return content[:-1]


def empty(content: bytes) -> bytes:
    return b""


def no_thrift(content: bytes) -> bytes:
    """The end of the file is as it was, and says that a footer of zeros is before it."""
    length = int.from_bytes(content[-8:-4], "little")
    return content[: -8 - length] + bytes(length) + content[-8:]


@pytest.mark.parametrize("damage", [cut_off, empty, no_thrift])
def test_a_damaged_file_is_named(
    damage: Callable[[bytes], bytes], source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a copy that failed; in whatever order the counts of its and the other files arrive."""
    scores, rejects = str(tmp_path / "scores"), str(tmp_path / "rejects")
    files = [Range(name, 0, rows, True).file for name, rows in (("a.tar", 50), ("b.tar", 20), ("c.tar", 30))]
    for file, rows in zip(files, (50, 18, 30), strict=True):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"index": pa.array(range(rows), pa.uint32())}), sink)
        storage.publish(f"{scores}/{file}", sink.getvalue().to_pybytes())
    publish_rejects(f"{rejects}/{files[1]}", [Reject("b.tar", n, "truncated", "") for n in (5, 11)])
    monkeypatch.setattr(pipeline.scoring.score, "FILES_PER_COUNT", 1)
    monkeypatch.setattr(pipeline.scoring.score, "parallel_map", lambda count, groups: map(count, reversed(groups)))
    assert prove(source, scores, rejects).scored == 98
    damaged = Path(scores, files[0])
    damaged.write_bytes(damage(damaged.read_bytes()))
    what = f"100 images are listed, but 48 are scored and 2 rejected: remove '{files[0]}' from {scores}"
    with pytest.raises(StageError, match=f"^{re.escape(what)}, and run the same command again$"):
        prove(source, scores, rejects)


def test_a_damaged_file_without_rows_is_named(source: ImageSource, tmp_path: Path) -> None:
    """Its images are all rejected, so the sums are right without it."""
    scores, rejects = str(tmp_path / "scores"), str(tmp_path / "rejects")
    for shard, images in (("a.tar", 50), ("b.tar", 20), ("c.tar", 20)):
        file = Range(shard, 0, images, True).file
        storage.publish(f"{scores}/{file}", b"")
        publish_rejects(f"{rejects}/{file}", [Reject(shard, n, "truncated", "") for n in range(images)])
    with pytest.raises(StageError, match=r"^90 images are listed, but 0 are scored and 90 rejected: remove 'a\.tar/"):
        prove(source, scores, rejects)


def test_rejects_of_no_file_are_forgotten_by_the_next_attempt(own: str, source: ImageSource, model: str) -> None:
    _, rows = read_rejects(f"{own}-rejects", limit=9)
    publish_rejects(storage.join(f"{own}-rejects", Range("b.tar", 2, 9, False).file), rows[:1])
    what = "90 images are listed, but 88 are scored and 3 rejected: run the same command again"
    with pytest.raises(StageError, match=f"^{what}$"):
        prove(source, own, f"{own}-rejects")
    assert score(source, model, own, f"{own}-rejects", SETTINGS, SILENT).rejected == 2


@pytest.mark.slow
def test_too_many_rejects_stop_the_run(source: ImageSource, model: str, tmp_path: Path, ray_local: None) -> None:
    strict = SETTINGS.model_copy(update={"max_reject_fraction": 0.001})
    with pytest.raises(StageError, match=r"could not be scored, more than score\.max_reject_fraction = 0\.001"):
        score(source, model, str(tmp_path / "s"), str(tmp_path / "r"), strict, SILENT)


def test_a_missing_shard_is_read_again_and_odd_names_are_kept(model: str, tmp_path: Path, ray_local: None) -> None:
    from pipeline.selection.select import select

    images = tiny.digits()["one"]
    names = ["_a.tar", "b c\nd.tar", f"{'猫' * 60}.tar", "sub/100%.tar"]
    (tmp_path / "u" / "sub").mkdir(parents=True)
    for number, name in enumerate(names):
        tiny.write_tar(tmp_path / "u" / name, images[10 * number : 10 * number + 10])
    source = open_source("U", Source(uri=str(tmp_path / "u")))
    scores, rejects = str(tmp_path / "scores"), str(tmp_path / "rejects")
    (tmp_path / "u" / "_a.tar").rename(tmp_path / "away")
    found = score(source, model, scores, rejects, SETTINGS, SILENT)
    assert (found.listed, found.scored, found.unreadable_shards, found.rejects) == (30, 30, 1, {"missing_shard": 1})
    strict = SETTINGS.model_copy(update={"max_reject_fraction": 0.1})
    # What was scored before does not get it around the limit.
    with pytest.raises(StageError, match="0 of 30 images and 1 of 4 shards could not be scored"):
        score(source, model, scores, rejects, strict, SILENT)
    (tmp_path / "away").rename(tmp_path / "u" / "_a.tar")
    found = score(source, model, scores, rejects, strict, SILENT)
    assert (found.listed, found.scored, found.unreadable_shards, found.rejects) == (40, 40, 0, {})
    assert set(read_scores(scores)["shard"].to_pylist()) == set(names)
    assert select(scores, str(tmp_path / "selection"), images_per_class=5).images == 40


def test_an_error_of_ours_comes_back_as_it_was(
    source: ImageSource, model: str, tmp_path: Path, ray_local: None
) -> None:
    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        score(source, str(tmp_path / "model"), str(tmp_path / "s"), str(tmp_path / "r"), SETTINGS, SILENT)


@pytest.mark.slow
def test_a_network_that_does_not_suit_the_settings_is_told(
    source: ImageSource, tmp_path: Path, ray_local: None
) -> None:
    from models.architectures import build
    from models.directory import save

    config = CONFIG.model_copy(update={"architecture": "torchvision.models:squeezenet1_1", "options": {}})
    uri = str(tmp_path / "model")
    save(uri, build(config, 4), config=config, class_names=list("abcd"), metrics={}, provenance={})
    settings = SETTINGS.model_copy(update={"embedding": True})
    with pytest.raises(ModelError, match=r"^model = '.*': has no linear layer, before which features are taken; use"):
        score(source, uri, str(tmp_path / "s"), str(tmp_path / "r"), settings, SILENT)


def test_an_error_of_ours_comes_back_from_an_actor(
    source: ImageSource, model: str, tmp_path: Path, ray_local: None
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.tar").touch()  # where the folder of its files has to be
    with pytest.raises(StorageError, match=r"a\.tar") as caught:
        score(source, model, str(tmp_path / "s"), str(tmp_path / "r"), SETTINGS, SILENT)
    assert "\n" not in str(caught.value)
    assert "Ray" not in str(caught.value)
    assert "ray.data" not in str(caught.value)


def _free_cpus() -> float:
    import ray

    resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return resources.get("CPU", 0.0)


def failing_network(name: str, uri: str) -> str:
    """A model directory of a network of `failing`."""
    import failing
    from models.directory import save

    config = CONFIG.model_copy(update={"architecture": f"failing:{name}", "options": {}})
    save(uri, getattr(failing, name)(4), config=config, class_names=list("abcd"), metrics={}, provenance={})
    return uri


def test_a_network_that_fails_ends_the_scoring_while_actors_hold_the_cpus(
    source: ImageSource, tmp_path: Path, ray_local: None
) -> None:
    uri = failing_network("Failing", str(tmp_path / "model"))
    settings = Score(classes_per_image=3, actors=2)  # with 1.5 of 2 CPUs
    with pytest.raises(StageError, match=r"^ValueError: nothing to see$"):
        score(source, uri, str(tmp_path / "s"), str(tmp_path / "r"), settings, SILENT)
    until = time.monotonic() + 30
    while _free_cpus() < 2 and time.monotonic() < until:
        time.sleep(0.5)
    assert _free_cpus() == 2


def test_actors_on_cpus_keep_their_memory(source: ImageSource, tmp_path: Path, ray_local: None) -> None:
    uri = failing_network("Telling", str(tmp_path / "model"))
    with pytest.raises(StageError) as told:
        score(source, uri, str(tmp_path / "s"), str(tmp_path / "r"), SETTINGS, SILENT)
    assert str(told.value) == ("ValueError: MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647")


@pytest.mark.slow
def test_kernels_that_cannot_be_made_are_told_in_one_line(source: ImageSource, model: str, tmp_path: Path) -> None:
    words = [
        "score",
        "--model",
        model,
        "--source",
        source.reader.root,
        "--out",
        str(tmp_path / "s"),
        "--set",
        "compile=true",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", *words, "--classes-per-image", "3"],
        env={**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(
        "error: --set score.compile = True: kernels for this model cannot be made here (InvalidCxxCompiler: "
    ), last
    assert last.endswith("; set it to false, or mend what fails on the nodes")
    assert "Traceback" not in ended.stdout + ended.stderr
    assert [entry.path for entry in storage.list_files(str(tmp_path / "s"))] == ["_scoring.json", "listing.parquet"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "CppCompileError: C++ compile error\n\nCommand:\ng++ " + "-D FLAG " * 90 + "\n\nOutput:\n"
            "x.cpp:1:10: fatal error: Python.h: No such file\n    1 | #include <Python.h>\n",
            "x.cpp:1:10: fatal error: Python.h: No such file",
        ),
        (
            "InvalidCxxCompiler: No working\n\x1b[1m compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for more\nx error: y",
            "InvalidCxxCompiler: No working [1m compiler",
        ),
    ],
)
def test_the_reason_why_kernels_cannot_be_made(text: str, reason: str) -> None:
    assert " ".join(compiler_error(text).split()) == reason


def test_a_folder_of_scores_belongs_to_one_scoring(source: ImageSource, model: str, tmp_path: Path) -> None:
    claim("--out", str(tmp_path / "s"), model, source, SETTINGS)
    claim("--out", str(tmp_path / "s"), model, source, SETTINGS)
    with pytest.raises(RunError, match="holds scores made with another classes_per_image; give another folder"):
        claim("--out", str(tmp_path / "s"), model, source, SETTINGS.model_copy(update={"classes_per_image": 2}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="is not empty and holds no scores"):
        claim("--out", str(tmp_path / "other"), model, source, SETTINGS)
