"""Near-duplicates: the search against brute force, planted duplicates, copies, decisions, a run."""

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser
from rich.console import Console

import tiny
from browsing import opened
from cluster import storage
from cluster.config import Cluster
from cluster.errors import ModelError, RecipeError, RunError, SourceError
from cluster.progress import SILENT, Display
from cluster.session import Session
from cluster.store import RunStore
from models.config import ModelConfig, Transform
from pipeline.context import Run, Sources
from pipeline.data.reader import Reader
from pipeline.data.shards import Shard
from pipeline.data.sources import ImageSource, open_source
from pipeline.duplicates import exclude as deduplication
from pipeline.duplicates.copies import find_copies
from pipeline.duplicates.exclude import Copies, Excluded, Pairs
from pipeline.duplicates.nearest import (
    CANDIDATES,
    PAIRS,
    Embedded,
    LabeledSet,
    Ranked,
    Side,
    find_pairs,
    indexed,
    labeled_side,
    left_out,
    merge,
    nearest,
    normalized,
    rank,
    read_pairs,
    searcher,
)
from pipeline.plan import plan
from pipeline.recipe.deduplicate import Deduplicate
from pipeline.recipe.images import Source
from pipeline.recipe.reading import deduplicate_settings, validate
from pipeline.recipe.sections import Score
from pipeline.scoring import beside
from pipeline.scoring import score as scoring
from pipeline.scoring.actors import score_table
from runs import execute, fresh

TRANSFORM = Transform(size=56, resize=56, flip=False)
CONFIG = ModelConfig(architecture="resnet8", options={"width": 16}, transform=TRANSFORM)
SCORE = Score(classes_per_image=2, batch_size=32, actors=1, cpus_per_actor=0.5)


# The search, against brute force


def vectors(count: int, width: int, seed: int, repeats: int = 0) -> np.ndarray[Any, Any]:
    """Random directions; the last `repeats` are copies of the first ones."""
    draw = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    draw[count - repeats :] = draw[:repeats]
    return draw


def brute_force(queries: np.ndarray[Any, Any], side: Side) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    apart = queries[:, None].astype(np.float64) - side.vectors[None].astype(np.float64)
    distances = np.sqrt((apart**2).sum(axis=2))
    return distances.min(axis=1), distances.argmin(axis=1)


@pytest.mark.parametrize(("labeled", "width"), [(1, 3), (5, 8), (700, 64), (300, 512)])
def test_the_exact_search_finds_every_nearest_neighbor(labeled: int, width: int) -> None:
    side = Side(normalized(vectors(labeled, width, 1)))
    queries = normalized(np.concatenate([vectors(600, width, 2), side.vectors[: labeled // 2]]))
    distance, which = nearest(queries, side, searcher(side))
    expected, place = brute_force(queries, side)
    np.testing.assert_array_equal(which, place)  # recall 1.0
    np.testing.assert_allclose(distance, expected, rtol=1e-6, atol=1e-7)
    assert (distance[600:] == 0).all()


def test_distances_do_not_depend_on_the_batch() -> None:
    side = Side(normalized(vectors(400, 64, 1)))
    queries = normalized(side.vectors[np.arange(300) % 400] + 1e-4 * vectors(300, 64, 2))
    search = searcher(side)
    together = nearest(queries, side, search)
    for size in (1, 7, 19, 20, 21, 128):
        parts = [nearest(queries[start : start + size], side, search) for start in range(0, 300, size)]
        np.testing.assert_array_equal(np.concatenate([d for d, _ in parts]), together[0])
        np.testing.assert_array_equal(np.concatenate([w for _, w in parts]), together[1])


def test_what_is_beyond_the_bound_is_not_computed_and_nothing_else_is_lost() -> None:
    side = Side(normalized(vectors(50, 16, 1)))
    queries = normalized(vectors(500, 16, 2))
    free, _ = nearest(queries, side, searcher(side))
    bound = float(np.quantile(free, 0.3))
    bounded, _ = nearest(queries, side, searcher(side), bound)
    np.testing.assert_array_equal(bounded[free <= bound], free[free <= bound])
    assert np.isinf(bounded).sum() > 300


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_approximate_indexes(index: str) -> None:
    side = Side(normalized(vectors(3000, 32, 1)))
    queries = normalized(side.vectors[:1000] + 0.3 * normalized(vectors(1000, 32, 2)))
    expected, place = brute_force(queries, side)
    recalls = []
    for probes in (1, 10_000):
        chosen = Deduplicate(nearest=1, index=index, probes=probes)  # type: ignore[arg-type]
        made = indexed(side, chosen)
        assert made.index is not None
        np.testing.assert_array_equal(made.index, indexed(side, chosen).index)
        distance, which = nearest(queries, made, searcher(made))
        right = which == place
        recalls.append(right.mean())
        np.testing.assert_allclose(distance[right], expected[right], atol=1e-6)
        assert (distance[~right] > expected[~right]).all()
    assert recalls[0] < recalls[1] or recalls[0] == 1
    assert recalls[1] == 1


def test_an_index_that_finds_nothing() -> None:
    side = Side(normalized(vectors(4, 8, 1)))
    none = np.full((2, 4), -1, np.int64)
    distance, _ = nearest(side.vectors[:2], side, lambda q, k: (np.full((2, 4), np.inf, np.float32), none))
    assert np.isinf(distance).all()
    some = np.array([[2, -1, -1, -1], [1, 0, -1, -1]])
    distance, which = nearest(side.vectors[:2], side, lambda q, k: (np.zeros((2, 4), np.float32), some))
    assert which.tolist() == [2, 1]
    assert (distance[0] > 0, distance[1] == 0) == (True, True)
    assert CANDIDATES > 4


def test_lengths_of_normalized_features() -> None:
    features = np.array([[3, 4], [0, 0], [6e4, 6e4], [1e-7, 0]], np.float16)
    np.testing.assert_allclose(np.linalg.norm(normalized(features), axis=1), [1, 0, 1, 1], rtol=1e-6)


# Ranking: any split, any merge


def embedded(shard: Sequence[str], index: Sequence[int], rows: np.ndarray[Any, Any]) -> Embedded:
    return Embedded(pa.array(shard, pa.string()), np.array(index, np.uint32), rows)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 40), st.data())
def test_ranking_is_the_same_under_any_split_and_any_merge(
    seed: int, count: int, keep: int, data: st.DataObject
) -> None:
    draw = np.random.default_rng(seed)
    side = Side(normalized(vectors(6, 4, seed)))
    pool = normalized(np.concatenate([side.vectors[:2], vectors(5, 4, seed + 1)]))
    rows = pool[
        draw.integers(0, len(pool), count)
    ]  # few different distances, so that ties are decided by shard and index
    shards = [str(name) for name in np.array(["é.tar", "b/1.tar", "a.tar", "Z.tar"])[draw.integers(0, 4, count)]]
    expected = sorted(
        zip(
            brute_force(rows, side)[0].astype(np.float32).tolist(),
            [s.encode() for s in shards],
            range(count),
            strict=True,
        )
    )[:keep]
    order = draw.permutation(count)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    parts = []
    for piece in np.split(order, cuts):
        batches = [embedded([shards[i] for i in half], half.tolist(), rows[half]) for half in np.array_split(piece, 2)]
        parts.append(rank(iter(batches), side, keep))
    while len(parts) > 1:
        taken = [parts.pop(int(draw.integers(len(parts)))) for _ in range(min(len(parts), int(draw.integers(2, 4))))]
        parts.append(merge(taken, keep))
    found = parts[0]
    assert found.images == count
    table = found.table
    assert [(s.encode(), i) for s, i in zip(table["shard"].to_pylist(), table["index"].to_pylist(), strict=True)] == [
        (s, i) for _, s, i in expected
    ]
    np.testing.assert_allclose(table["distance"].to_numpy(), [d for d, _, _ in expected], atol=1e-6)


def test_memory_is_bounded_by_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging in between, with a bound that falls, loses nothing."""
    from pipeline.duplicates import nearest as duplicates

    monkeypatch.setattr(duplicates, "PENDING_ROWS", 100)
    sizes: list[int] = []

    def watched(parts: Sequence[Ranked], keep: int) -> Ranked:
        sizes.append(sum(len(part.table) for part in parts))
        return merge(parts, keep)

    monkeypatch.setattr(duplicates, "merge", watched)
    side = Side(normalized(vectors(20, 8, 1)))
    rows = normalized(vectors(20_000, 8, 2))
    batches = [embedded(["a"] * 50, range(s, s + 50), rows[s : s + 50]) for s in range(0, 20_000, 50)]
    found = rank(iter(batches), side, 30)
    assert max(sizes) <= 30 + 100 + 50
    assert len(sizes) < 20  # most images are passed over
    expected, _ = brute_force(rows, side)
    assert found.table["index"].to_pylist() == np.argsort(expected, kind="stable")[:30].tolist()


def table_of(rows: np.ndarray[Any, Any], start: int, shard: str = "u.tar") -> pa.Table:
    ids, scores = np.zeros((len(rows), 1), np.int32), np.ones((len(rows), 1), np.float32)
    names = pa.array([shard] * len(rows), pa.string()).dictionary_encode()
    return score_table(names, range(start, start + len(rows)), ids, scores, 1, rows.astype(np.float16))


def write_tables(uri: str, rows: np.ndarray[Any, Any], files: int) -> None:
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        sink = pa.BufferOutputStream()
        pq.write_table(table_of(rows[part], int(part[0])), sink, row_group_size=37)
        storage.publish(storage.join(uri, f"{number:03d}.parquet"), sink.getvalue().to_pybytes())


def nowhere(*shards: str) -> ImageSource:
    return ImageSource(Reader("/nowhere", "webdataset"), tuple(Shard(name, 1, "") for name in shards))


def test_pairs_are_the_same_bytes_under_any_split_and_any_number_of_tasks(ray_local: None, tmp_path: Path) -> None:
    evaluation, pool = vectors(120, 48, 1, repeats=5), vectors(3000, 48, 2)
    pool[:40] = evaluation[:40] + 0.05 * pool[:40]
    pool[1000:1010] = pool[:10]
    write_tables(str(tmp_path / "val"), evaluation, 3)
    labeled = [(LabeledSet("val", nowhere("u.tar")), str(tmp_path / "val"))]
    chosen = Deduplicate(nearest=40, pairs=60)
    results = []
    for number, (files, tasks) in enumerate([(1, 1), (7, 3), (30, 5), (12, None)]):
        write_tables(str(tmp_path / f"u{number}"), pool, files)
        out = str(tmp_path / f"pairs{number}.parquet")
        outputs = find_pairs(out, labeled, str(tmp_path / f"u{number}"), chosen, tasks=tasks)
        assert (outputs["images"], outputs["pairs"], outputs["left_out"]) == (3000, 60, 40)
        assert outputs["labeled"] == 115  # the five repeats are compared once
        results.append((outputs["finding"], storage.read_bytes(out)))
    assert len(set(results)) == 1
    pairs = read_pairs(str(tmp_path / "pairs0.parquet"))
    assert pairs.schema.equals(PAIRS)
    side, origin = labeled_side(labeled)
    expected, place = brute_force(normalized(pool.astype(np.float16)), side)
    order = np.argsort(expected.astype(np.float32), kind="stable")[:60]
    assert pairs["index"].to_pylist() == order.tolist()
    assert pairs["labeled_index"].to_pylist() == origin["labeled_index"].take(pa.array(place[order])).to_pylist()
    assert set(pairs["index"].to_pylist()[:50]) >= {*range(40), *range(1000, 1010)}


def test_only_the_given_rows_of_a_labeled_set_are_compared(tmp_path: Path) -> None:
    rows = vectors(30, 8, 1)
    write_tables(str(tmp_path / "d"), rows, 2)
    held_out = LabeledSet("validation", nowhere("other.tar", "u.tar"), (np.array([1]), np.array([3, 7, 29])))
    side, origin = labeled_side([(held_out, str(tmp_path / "d"))])
    assert origin["labeled_index"].to_pylist() == [3, 7, 29]
    np.testing.assert_array_equal(side.vectors, normalized(rows[[3, 7, 29]].astype(np.float16)))


def test_mistakes_are_named(ray_local: None, tmp_path: Path) -> None:
    rows = vectors(40, 8, 1)
    write_tables(str(tmp_path / "val"), rows, 1)
    labeled = [(LabeledSet("val", nowhere("u.tar")), str(tmp_path / "val"))]
    out = str(tmp_path / "pairs.parquet")
    write_tables(str(tmp_path / "wide"), vectors(10, 9, 1), 1)
    with pytest.raises(SourceError, match="= '9 features': must have 8 features"):
        find_pairs(out, labeled, str(tmp_path / "wide"), Deduplicate(nearest=1))
    names = pa.array(["u.tar"]).dictionary_encode()
    plain = score_table(names, [0], np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), 1)
    (tmp_path / "plain").mkdir()
    pq.write_table(plain, tmp_path / "plain" / "a.parquet")
    with pytest.raises(SourceError, match=r"has no column `embedding`.*score\.embedding = true"):
        find_pairs(out, labeled, str(tmp_path / "plain"), Deduplicate(nearest=1))
    with pytest.raises(SourceError, match="holds no Parquet files"):
        find_pairs(out, labeled, str(tmp_path / "none"), Deduplicate(nearest=1))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match="cannot be read"):
        find_pairs(out, labeled, str(tmp_path / "bad"), Deduplicate(nearest=1))
    with pytest.raises(RecipeError, match=r"reaches beyond the 10 nearest pairs.*raise deduplicate\.pairs"):
        find_pairs(out, labeled, str(tmp_path / "val"), Deduplicate(within=0.5, pairs=10))
    empty = replace(labeled[0][0], rows=(np.zeros(0, np.int64),))
    with pytest.raises(SourceError, match="hold no image to compare with"):
        find_pairs(out, [(empty, str(tmp_path / "val"))], str(tmp_path / "val"), Deduplicate(nearest=1))
    pq.write_table(table_of(rows, 0), tmp_path / "val" / "again.parquet")
    with pytest.raises(SourceError, match="has an image twice"):
        find_pairs(out, labeled, str(tmp_path / "val"), Deduplicate(nearest=1))


def test_features_that_are_no_numbers_are_counted_and_left_out(ray_local: None, tmp_path: Path) -> None:
    rows = vectors(20, 8, 1)
    write_tables(str(tmp_path / "val"), rows, 1)
    rows[3, 2], rows[9, 0] = np.nan, np.inf
    write_tables(str(tmp_path / "u"), rows, 2)
    labeled = [(LabeledSet("val", nowhere("u.tar")), str(tmp_path / "val"))]
    outputs = find_pairs(str(tmp_path / "p.parquet"), labeled, str(tmp_path / "u"), Deduplicate(nearest=1))
    assert (outputs["images"], outputs["nonfinite"], outputs["pairs"]) == (18, 2, 18)


def test_what_is_left_out() -> None:
    pairs = pa.table({"rank": pa.array([0, 1, 2], pa.int32()), "distance": pa.array([0, 0.1, 0.2], pa.float32())})
    assert left_out(pairs, 1, None).tolist() == [True, False, False]
    assert left_out(pairs, None, 0.1).tolist() == [True, True, False]
    assert left_out(pairs, 1, 0.2).tolist() == [True, True, True]


# Embeddings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    from models.architectures import build
    from models.directory import save

    torch.manual_seed(0)
    uri = str(tmp_path_factory.mktemp("model") / "resnet")
    save(uri, build(CONFIG, 4), config=CONFIG, class_names=list("abcd"), metrics={}, provenance={})
    return uri


def test_features_are_what_enters_the_last_linear_layer(model: str) -> None:
    import torch
    from torch import nn

    from models.directory import load
    from models.features import Features

    network: Any = load(model).model
    features = Features(model, network)
    images = torch.randn(5, 3, 56, 56)
    with torch.inference_mode():
        network(images)
        taken = features.take().numpy()
        pooled = network.layer3(network.layer2(network.layer1(network.relu(network.bn1(network.conv1(images))))))
    assert taken.dtype == np.float16
    assert features.width == 64
    np.testing.assert_array_equal(taken, pooled.mean((2, 3)).numpy().astype(np.float16))
    huge = nn.Linear(2, 1)
    features = Features("m", huge)
    huge(torch.tensor([[1e30, -1e30]]))
    assert features.take().tolist() == [[65504.0, -65504.0]]
    with pytest.raises(ModelError, match="has no linear layer"):
        Features("m", nn.Conv2d(3, 4, 1))
    with pytest.raises(ModelError, match="does not see one vector"):
        features.take()


def large(data: bytes) -> Image.Image:
    """A digit at 224 x 224 pixels."""
    return Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return out.getvalue()


def shifted(image: Image.Image) -> Image.Image:
    """By a pixel to the right."""
    return Image.fromarray(np.roll(np.asarray(image), 1, axis=1))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`test`: 40 digits. `u`: 260 other digits in two tars, and of the test images 8 copies, 8 JPEGs and 8 shifted by a pixel, in a
    third, with a name that is hostile."""
    root = tmp_path_factory.mktemp("planted")
    digits = [large(data) for name in ("zero", "two") for data in tiny.digits()[name][:150]]
    test, others = digits[::15][:20] + digits[1::15][:20], [d for i, d in enumerate(digits) if i % 15 > 1]
    (root / "test").mkdir()
    tiny.write_tar(root / "test" / "test.tar", [saved(image) for image in test])
    tiny.write_tar(root / "u" / "a.tar", [saved(image) for image in others[:130]])
    tiny.write_tar(root / "u" / "b.tar", [saved(image) for image in others[130:]])
    plants = [saved(image) for image in test[:8]] + [saved(image, "JPEG") for image in test[8:16]]
    plants += [saved(shifted(image)) for image in test[16:24]]
    tiny.write_tar(root / "u" / "<img src=x onerror=window.pwned=1>.tar", [*plants, plants[0], b"no image"])
    return root


@pytest.fixture(scope="module")
def found(planted: Path, model: str, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    """A finished `tophat duplicates` on the planted images."""
    out = str(tmp_path_factory.mktemp("found") / "duplicates")
    chosen, score = deduplicate_settings(
        ["pairs=100", "score.actors=1", "score.cpus_per_actor=0.5"], nearest=25, copies=True, model=model
    )
    unlabeled = open_source("U", Source(uri=str(planted / "u")))
    store = RunStore(out)
    subject = deduplication.prepare(store, unlabeled, [Source(uri=str(planted / "test"))], chosen, None)
    deduplication.find(in_folder(out), subject, chosen, score)
    return out


@pytest.fixture
def own(found: str, tmp_path: Path) -> str:
    """The same in a folder of its own, to go on with."""
    shutil.copytree(found, tmp_path / "own", symlinks=True)
    return str(tmp_path / "own")


def in_folder(out: str) -> Run:
    """A run of `tophat duplicates`."""
    session, quiet = Session(Cluster()), Display(Console(quiet=True), enabled=False)
    return Run(deduplication.CLAIM, "", RunStore(out), Sources({}), session, quiet)


HOSTILE = "<img src=x onerror=window.pwned=1>.tar"


def listed(out: str) -> list[tuple[str, int]]:
    tables = [
        pq.read_table(storage.join(out, "excluded", entry.path), columns=["shard", "index"])
        for entry in storage.list_files(storage.join(out, "excluded"), ".parquet")
    ]
    return [(row["shard"], row["index"]) for row in pa.concat_tables(tables).to_pylist()]


def test_planted_duplicates_come_first(found: str, planted: Path) -> None:
    pairs = read_pairs(f"{found}/pairs/pairs.parquet").to_pylist()
    assert len(pairs) == 100
    # The 24 plants and the copy of the first: copies at distance 0, then JPEGs and shifts, each beside its own original.
    first = pairs[:25]
    assert {(p["shard"], p["index"]) for p in first} == {(HOSTILE, index) for index in range(25)}
    assert [p["index"] for p in first[:9]] == [*range(8), 24]
    assert [p["distance"] for p in first[:9]] == [0.0] * 9
    assert all(p["labeled_index"] == p["index"] % 24 for p in first)
    assert all(0 < p["distance"] < 0.1 for p in first[9:])
    assert pairs[25]["distance"] > first[-1]["distance"]
    assert [p["distance"] for p in pairs] == sorted(p["distance"] for p in pairs)
    excluded = listed(found)
    assert sorted(excluded) == sorted([(HOSTILE, index) for index in range(25)] + [(HOSTILE, 24)])  # near; and a copy


def test_finding_again_does_nothing(
    own: str, planted: Path, model: str, tophat: Callable[..., tuple[int, str, str]]
) -> None:
    before = {entry.path: entry.etag for entry in storage.list_files(own)}
    words = ["--source", str(planted / "u"), "--against", str(planted / "test"), "--model", model, "--copies"]
    code, text, errors = tophat("duplicates", "--out", own, *words, "--nearest", "25", "--set", "pairs=100")
    assert code == 0, errors
    assert "compared: 285 images of U with 40; 100 pairs kept" in text
    after = {entry.path: entry.etag for entry in storage.list_files(own)}
    assert {path for path in after if after[path] != before.get(path) and not path.startswith("leases/")} == set()


def test_embeddings_of_a_score_table_give_the_same_pairs(
    found: str, planted: Path, model: str, tmp_path: Path, tophat: Callable[..., tuple[int, str, str]]
) -> None:
    source = open_source("U", Source(uri=str(planted / "u")))
    scores = str(tmp_path / "scores")
    with_embedding = SCORE.model_copy(update={"embedding": True, "batch_size": 64})
    beside.claim("--out", scores, model, source, with_embedding)
    scoring.score(source, model, f"{scores}/{beside.TABLE}", f"{scores}/rejects", with_embedding, SILENT)
    words = ["--source", str(planted / "u"), "--against", str(planted / "test"), "--model", model, "--scores", scores]
    words += ["--nearest", "25", "--set", "pairs=100"]
    code, _, errors = tophat("duplicates", "--out", str(tmp_path / "out"), *words)
    assert code == 0, errors
    assert storage.read_bytes(f"{tmp_path}/out/pairs/pairs.parquet") == storage.read_bytes(
        f"{found}/pairs/pairs.parquet"
    )
    assert storage.list_files(f"{tmp_path}/out/embeddings/unlabeled") == []
    with pytest.raises(RunError, match="holds scores made with another embedding"):
        beside.claim("--out", scores, model, source, SCORE.model_copy(update={"batch_size": 64}))
    without = str(tmp_path / "without")
    beside.claim("--out", without, model, source, SCORE)
    with pytest.raises(RunError, match="holds scores made with another embedding"):
        beside.claim("--out", without, model, source, with_embedding)


# Copies


def brute_force_copies(source: ImageSource) -> list[tuple[str, int, str, int]]:
    first: dict[bytes, tuple[str, int]] = {}
    copies = []
    for shard in source.shards():
        for row in source.read(shard.name):
            if row.data:
                here = first.setdefault(row.data, (shard.name, row.index))
                if here != (shard.name, row.index):
                    copies.append((shard.name, row.index, *here))
    return copies


def read_copies(uri: str) -> list[tuple[str, int, str, int]]:
    tables = [pq.read_table(storage.join(uri, entry.path)) for entry in storage.list_files(uri, ".parquet")]
    names = ("shard", "index", "first_shard", "first_index")
    return sorted(tuple(row[name] for name in names) for table in tables for row in table.to_pylist())


def test_copies_are_found_in_any_layout(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    images = [bytes([n, *b"content"]) for n in range(120)]
    shards = [[images[i] for i in draw.integers(0, 120, size)] for size in (70, 1, 90, 40)]
    shards[2][5:8] = [b"", b"", b""]  # images without bytes are no copies
    for number, shard in enumerate(shards):
        tiny.write_tar(tmp_path / "u" / f"{'ba'[number % 2]}{number}.tar", shard)
    damaged = tmp_path / "u" / "c.tar"
    tiny.write_tar(damaged, images[:30])
    damaged.write_bytes(damaged.read_bytes()[: 512 * 2 * 10 + 100])
    source = open_source("U", Source(uri=str(tmp_path / "u")))
    counts = find_copies(source, str(tmp_path / "out"))
    expected: list[tuple[str, int, str, int]] = []
    whole = replace(source, listing=source.listing[:-1])
    expected = brute_force_copies(whole)
    seen = {row.data for shard in whole.shards() for row in whole.read(shard.name)}
    found_copies = read_copies(str(tmp_path / "out"))
    assert [copy for copy in found_copies if copy[0] != "c.tar"] == sorted(expected)
    assert [copy[1] for copy in found_copies if copy[0] == "c.tar"] == [i for i in range(10) if images[i] in seen]
    assert counts == {"images": 70 + 1 + 87 + 40 + 10, "copies": len(found_copies), "unreadable_shards": 1}
    assert len(expected) > 50
    assert storage.list_files(str(tmp_path / "out" / "work")) == []


def test_hashing_goes_on_where_it_stopped(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose hashes are published is not read again: its shard may even be gone."""
    from pipeline.duplicates import copies

    images = [bytes([n, *b"content"]) for n in range(50)]
    tiny.write_tar(tmp_path / "u" / "a.tar", images)
    tiny.write_tar(tmp_path / "u" / "b.tar", images[20:] + images[:5])
    source = open_source("U", Source(uri=str(tmp_path / "u")))
    monkeypatch.setattr(
        copies, "_groups", lambda shards: [copies._Group(n, n, (shard,)) for n, shard in enumerate(shards)]
    )
    copies._hash(source.reader, str(tmp_path / "out" / "work"), copies._groups(source.shards())[0])
    (tmp_path / "u" / "a.tar").unlink()
    counts = find_copies(source, str(tmp_path / "out"))
    assert counts == {"images": 85, "copies": 35, "unreadable_shards": 0}
    assert {copy[0] for copy in read_copies(str(tmp_path / "out"))} == {"b.tar"}


def test_groups_of_shards_to_hash() -> None:
    from pipeline.duplicates.copies import GROUPS, _groups

    for sizes in ([1], [100 << 20] * 5, [1 << 10] * 9000, [1 << 30] * 9000):
        shards = [Shard(str(n), size, "") for n, size in enumerate(sizes)]
        groups = _groups(shards)
        assert [shard for group in groups for shard in group.shards] == shards
        assert [group.first for group in groups] == np.cumsum([0, *(len(g.shards) for g in groups[:-1])]).tolist()
        assert len(groups) <= GROUPS + 1
    assert _groups([]) == []


# Decisions, and the command line


def decisions_on(out: str) -> dict[str, Any]:
    """What a review saves that keeps rank 2, which is proposed, and removes rank 60, which is not."""
    pairs = read_pairs(f"{out}/pairs/pairs.parquet").to_pylist()
    removed = {*range(25), 60} - {2}
    made = RunStore(out).named("pairs", Pairs)
    assert made is not None
    return {
        "format": "tophat.duplicates.decisions/1",
        "finding": made.outputs.finding,
        "remove": [[pair["shard"], pair["index"]] for rank, pair in enumerate(pairs) if rank in removed],
        "keep": [[pair["shard"], pair["index"]] for rank, pair in enumerate(pairs) if rank not in removed],
    }


def test_decisions_are_saved(browser: Browser, found: str, tmp_path: Path) -> None:
    file = tmp_path / "decisions.json"
    with opened(browser, f"{found}/pairs/review/index.html") as page:
        assert page.locator("#marked").inner_text() == "25"
        cards = page.locator(".pair")
        cards.nth(2).get_by_label("Remove from U").uncheck()
        page.locator("#next").click()
        cards.nth(10).get_by_label("Remove from U").check()
        page.locator("#previous").click()
        assert not cards.nth(2).get_by_label("Remove from U").is_checked()
        assert cards.nth(2).get_attribute("class") == "pair"
        assert cards.nth(3).get_attribute("class") == "pair out"
        assert page.locator("#marked").inner_text() == "25"
        page.reload()
        assert not cards.nth(2).get_by_label("Remove from U").is_checked()  # the browser has kept it
        with page.expect_download() as download:
            page.locator("#save").click()
        download.value.save_as(file)
        assert download.value.suggested_filename.startswith("decisions-")
    assert json.loads(file.read_text()) == decisions_on(found)


def test_decisions_are_taken_in_and_back(own: str, tmp_path: Path, tophat: Callable[..., tuple[int, str, str]]) -> None:
    file, before = tmp_path / "decisions.json", listed(own)
    file.write_text(json.dumps(decisions_on(own)))
    code, text, errors = tophat("duplicates", "--out", own, "--decisions", str(file))
    assert code == 0, errors
    assert "decided in the review" in text
    near = [(shard, index) for shard, index in decisions_on(own)["remove"]]
    assert sorted(listed(own)) == sorted([*near, (HOSTILE, 24)])
    this = in_folder(own)
    deduplication.exclude(this, this.reuse("pairs", Pairs), this.reuse("copies", Copies), None, "--decisions")
    this.name_result()
    assert listed(own) == before


def test_mistakes_on_the_command_line(
    planted: Path, model: str, tmp_path: Path, tophat: Callable[..., tuple[int, str, str]]
) -> None:
    out, u, test = str(tmp_path / "out"), str(planted / "u"), str(planted / "test")
    for words, said in (
        ([], "--source = 'nothing': must be given"),
        (["--decisions", "x.json", "--nearest", "3"], "--source = 'nothing': must be given with the other options"),
        (["--decisions", "x.json", "--within", "0"], "--source = 'nothing': must be given with the other options"),
        (["--decisions", "x.json"], "--out = '{out}': holds no pairs to decide on"),
        (["--source", u], "--nearest = 'nothing': must be given"),
        (["--source", u, "--nearest", "3"], "--against = 'nothing'"),
        (["--source", u, "--nearest", "3", "--against", test, "--model", "teacher"], "--model = 'teacher'"),
        (["--source", u, "--nearest", "3", "--against", test, "--scores", out], "--scores = "),
        (["--source", u, "--nearest", "3", "--against", test, "--model", u], f"--model = '{u}': has no model.json"),
        (["--source", u, "--nearest", "0", "--against", test, "--model", model], "nearest"),
        (["--source", u, "--nearest", "3", "--set", "pairs=2"], "pairs = 2 must be at least nearest = 3"),
        (["--source", u, "--nearest", "3", "--set", "index=flat"], "index"),
        (["--source", u, "--nearest", "3", "--set", "score.bach_size=3"], "did you mean batch_size?"),
    ):
        code, _, errors = tophat("duplicates", "--out", out, *words)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (2, 1), errors
        assert said.format(out=out) in lines[0]
    assert not os.path.exists(out)


# In a run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set, with images of U that are to be found."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.write_folders(root)
    for number in range(5):  # five test images, and two copies of an image of U
        (root / "unlabeled" / f"leak-{number}.png").write_bytes(
            (root / "test" / "one" / f"{20 + number}.png").read_bytes()
        )
    for number in range(2):
        (root / "unlabeled" / f"copy-{number}.png").write_bytes((root / "unlabeled" / "010.png").read_bytes())
    return root


def test_a_run_makes_an_exclusion_list_before_selection(folders: Path, tmp_path: Path, ray_local: None) -> None:
    changes = {
        "score": {"classes_per_image": 2, "batch_size": 32, "embedding": True},
        "deduplicate": {"nearest": 5, "pairs": 20, "copies": True, "model": "teacher"},
        "teacher": {"model": tiny.save_teacher(str(tmp_path / "teacher"))},
    }
    del_validation = tiny.recipe(str(folders), **changes)
    del del_validation["labeled"]["validation"]  # held out of D: only those images of it are compared
    recipe = validate(del_validation)
    store = RunStore(str(tmp_path / "run"))
    names = [one.name for one in plan(recipe, store).planned]
    assert names[4:10] == ["scores", "embeddings", "pairs", "copies", "excluded", "selection"]

    def until_excluded(**deduplicate: Any) -> dict[str, Any]:
        changed = recipe.model_copy(update={"deduplicate": recipe.deduplicate.model_copy(update=deduplicate)})
        return execute(changed, store.uri, "excluded")

    done = until_excluded()
    assert list(done)[-4:] == ["embeddings", "pairs", "copies", "excluded"]
    source = open_source("U", Source(uri=str(folders / "unlabeled")))
    by_place = {(shard.name, index): path for shard in source.shards() for index, path in enumerate(shard.files)}
    excluded = [by_place[place] for place in listed(store.uri)]
    assert {path for path in excluded if path.startswith("leak")} == {f"leak-{n}.png" for n in range(5)}
    assert sum(path == "010.png" or path.startswith("copy") for path in excluded) == 2
    assert len(excluded) == 7
    pairs = read_pairs(storage.join(store.uri, "pairs", "pairs.parquet"))
    assert done["pairs"].outputs.labeled == 63  # 3 of the 36 images of D, and 60 test images
    decisions = {
        "format": "tophat.duplicates.decisions/1",
        "finding": done["pairs"].outputs.finding,
        "remove": [[pairs["shard"][9].as_py(), pairs["index"][9].as_py()]],
        "keep": [[pairs["shard"][0].as_py(), pairs["index"][0].as_py()]],
    }
    (tmp_path / "decisions.json").write_text(json.dumps(decisions))
    again = until_excluded(decisions=str(tmp_path / "decisions.json"))
    assert fresh(again) == ["excluded"]
    assert again["excluded"].outputs == Excluded(near=5, copies=2, decided=2)
    nothing = until_excluded(nearest=None, within=0.0, copies=False)
    assert fresh(nothing) == ["pairs", "excluded"]
    assert len(listed(store.uri)) == 5


def test_a_recipe_without_the_section_is_as_before(folders: Path, tmp_path: Path) -> None:
    recipe = validate(tiny.recipe(str(folders)))
    assert not recipe.deduplicate.on
    assert "embeddings" not in [one.name for one in plan(recipe, RunStore(str(tmp_path))).planned]
    with pytest.raises(RecipeError, match=r"score\.embedding = false does not keep"):
        validate(tiny.recipe(str(folders), deduplicate={"nearest": 5, "model": "teacher"}))
    assert validate(tiny.recipe(str(folders), deduplicate={"nearest": 5})).deduplicate.model == "resnet18"
    assert validate(tiny.recipe(str(folders), deduplicate={"model": None})).deduplicate.model == "teacher"
    with pytest.raises(RecipeError, match="decisions needs nearest or within"):
        validate(tiny.recipe(str(folders), deduplicate={"copies": True, "decisions": "d.json"}))
