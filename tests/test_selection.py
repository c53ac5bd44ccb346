"""Selection against a plain sort and against DuckDB, and its invariants under any split, order and grouping."""

import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import storage
from cluster.errors import InputError, SourceError, StorageError
from cluster.tasks import scatter
from pipeline.selection import select as selection
from pipeline.selection import topk as top_module
from pipeline.selection.quotas import quotas
from pipeline.selection.select import SCHEMA, Selected, Wanted, read_selection, select, select_several
from pipeline.selection.topk import Candidates, Int64, Sieve, Top, merge

Row = tuple[str, int, list[int], list[float]]  # shard, index, class ids, scores
Chosen = tuple[int, int, float, str, int]  # class, rank, score, shard, index

HOSTILE = [
    "b.tar",
    "a.tar",
    "a\n.tar",
    "é.tar",
    "z.tar",
    "Z.tar",
    "日本.tar",
    "\U0001f600.tar",
    "\uffff.tar",
    "a/b.tar",
    "",
]


def table_of(rows: Sequence[Row], num_classes: int | None = None) -> pa.Table:
    """A score table by the contract."""
    P = len(rows[0][2]) if rows else 1
    fields = [
        pa.field("shard", pa.dictionary(pa.int32(), pa.string())),
        pa.field("index", pa.uint32()),
        pa.field("class_ids", pa.list_(pa.int32(), P)),
        pa.field("scores", pa.list_(pa.float32(), P)),
    ]
    arrays = [pa.array([row[i] for row in rows], field.type) for i, field in enumerate(fields)]
    metadata = {"tophat.num_classes": str(num_classes)} if num_classes else None
    return pa.table(arrays, pa.schema(fields, metadata))


def scored(rows: Sequence[Row], classes_per_image: int | None = None) -> Candidates:
    table = table_of(rows).combine_chunks()
    P = len(rows[0][2])
    ids = np.array([row[2] for row in rows], np.int32).reshape(-1, P)[:, :classes_per_image]
    scores = np.array([row[3] for row in rows], np.float32).reshape(-1, P)[:, :classes_per_image]
    shard = table["shard"].chunk(0)
    return Candidates(shard, table["index"].to_numpy(), ids, scores, images=len(rows))


def quota(K: int, classes: int = 6) -> Int64:
    return np.full(classes, K, np.int64)


def top_of(batches: Sequence[Candidates], quotas: Int64, min_score: float | None = None, thresholds: Any = None) -> Top:
    floor = np.full(len(quotas), -np.inf if min_score is None else min_score, np.float32)
    sieve = Sieve(quotas, floor if thresholds is None else thresholds)
    for batch in batches:
        sieve.add(batch)
    return merge([sieve.top()], quotas)


def brute_force(rows: Sequence[Row], K: int, P: int | None = None, min_score: float | None = None) -> list[Chosen]:
    """Sorts everything, in plain Python."""
    by_class: dict[int, list[tuple[float, bytes, int, str]]] = {}
    for shard, index, class_ids, scores in rows:
        for class_id, score in list(zip(class_ids, scores, strict=True))[:P]:
            value = float(np.float32(score))
            if np.isfinite(value) and (min_score is None or value >= np.float32(min_score)):
                by_class.setdefault(class_id, []).append((-value, shard.encode(), index, shard))
    return [
        (class_id, rank, -negative + 0.0, shard, index)
        for class_id in sorted(by_class)
        for rank, (negative, _, index, shard) in enumerate(sorted(by_class[class_id])[:K])
    ]


def chosen(top: Top) -> list[Chosen]:
    shards = top.shards.to_pylist()
    ranks = top_module.ranks(top.class_id).tolist()
    return [
        (c, rank, s, shards[o], i)
        for c, rank, s, o, i in zip(
            top.class_id.tolist(), ranks, top.score.tolist(), top.shard.tolist(), top.index.tolist(), strict=True
        )
    ]


@st.composite
def score_rows(draw: st.DrawFn) -> list[Row]:
    """Rows with many equal scores, odd floats, and shards whose byte order is not obvious."""
    P = draw(st.integers(1, 3))
    classes = draw(st.integers(P, 5))
    floats = st.sampled_from(
        [0.5, 0.25, 1.0, 0.0, -0.0, -1.5, 1e-45, 3.4e38, float("nan"), float("inf"), -float("inf")]
    )
    images = draw(st.lists(st.tuples(st.sampled_from(HOSTILE), st.integers(0, 2**32 - 1)), unique=True, max_size=40))
    rows = []
    for shard, index in images:
        ids = draw(st.permutations(range(classes)))[:P]
        scores = sorted(draw(st.lists(floats, min_size=P, max_size=P)), key=lambda s: -s if s == s else 0)
        rows.append((shard, index, list(ids), scores))
    return rows


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(rows=score_rows(), K=st.integers(1, 12), data=st.data())
def test_any_split_and_any_merge_tree_equal_a_sort(rows: list[Row], K: int, data: st.DataObject) -> None:
    P = data.draw(st.integers(1, len(rows[0][2]))) if rows else 1
    floor = data.draw(st.sampled_from([None, 0.25, 0.3]))
    shuffled = data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    tops = [top_of([scored(part, P)] if part else [], quota(K), floor) for part in parts]
    while len(tops) > 1:
        taken = data.draw(st.integers(2, len(tops)))
        order = data.draw(st.permutations(range(len(tops))))
        tops = [merge([tops[i] for i in order[:taken]], quota(K)), *(tops[i] for i in order[taken:])]
    expected = brute_force(rows, K, P, floor)
    assert chosen(tops[0]) == expected
    assert not np.signbit(tops[0].score[tops[0].score == 0]).any()
    assert tops[0].account.images == len(rows)
    assert tops[0].account.candidates == len(rows) * P
    assert tops[0].account.nonfinite == sum(not np.isfinite(score) for row in rows for score in row[3][:P])
    assert tops[0].account.candidates == len(expected) + tops[0].account.unselected + tops[0].account.nonfinite


@given(st.lists(st.sets(st.tuples(st.sampled_from(HOSTILE), st.integers(0, 2**32 - 1)), max_size=9), min_size=1))
def test_images_of_several_ranges_are_counted_once(several: list[set[tuple[str, int]]]) -> None:
    tops = [
        top_of([scored([(*image, [0], [0.5]) for image in images], 1)] if images else [], quota(9))
        for images in several
    ]
    count = selection._count_images(*(selection._images(merge([top], quota(9))) for top in tops))
    assert count == len(set().union(*several))


@pytest.mark.parametrize(("levels", "K"), [(8, 15), (1 << 20, 15), (1 << 20, 2)])
def test_thresholds_prune_and_keep_ties(levels: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many compactions in a row: the buffer is small, and with few levels ties straddle the threshold."""
    monkeypatch.setattr(top_module, "PENDING", 50)
    rng = random.Random(3)
    rows: list[Row] = [
        (
            f"s{rng.randrange(20)}.tar",
            index,
            rng.sample(range(6), 2),
            [rng.randrange(levels) / levels + 1, rng.randrange(levels) / levels],
        )
        for index in range(4000)
    ]
    batches = [scored(rows[start : start + 100]) for start in range(0, len(rows), 100)]
    seen: list[int] = []
    real = top_module.merge

    def counted(tops: Sequence[Top], quotas: Int64) -> Top:
        seen.append(sum(map(len, tops)))
        return real(tops, quotas)

    monkeypatch.setattr(top_module, "merge", counted)
    result = top_of(batches, quota(K))
    assert chosen(result) == brute_force(rows, K)
    assert len(seen) > 1
    assert max(seen) < 2 * 6 * K + 200 + 50  # bounded by classes x K, a batch and the buffer, not by 8000 candidates


def test_shards_are_ordered_by_bytes_not_by_locale_or_code_unit() -> None:
    rows: list[Row] = [(name, 0, [0], [0.5]) for name in reversed(HOSTILE)]
    result = top_of([scored(rows)], quota(len(rows)))
    assert [row[3] for row in chosen(result)] == sorted(HOSTILE, key=lambda name: name.encode())
    assert [row[3] for row in chosen(top_of([scored(rows)], quota(3)))] == sorted(
        HOSTILE, key=lambda name: name.encode()
    )[:3]


# On Ray


def generated(images: int, P: int, C: int, seed: int, levels: int = 50) -> list[Row]:
    rng = random.Random(seed)
    return [
        (
            f"images/{rng.choice('abcé')}-{number % 7:03d}.tar",
            number,
            rng.sample(range(C), P),
            sorted((rng.randrange(levels) / levels for _ in range(P)), reverse=True),
        )
        for number in range(images)
    ]


def write_scores(folder: str, rows: Sequence[Row], files: int, num_classes: int | None = None, seed: int = 0) -> None:
    rows = random.Random(seed).sample(rows, len(rows))
    for number in range(files):
        sink = pa.BufferOutputStream()
        pq.write_table(table_of(rows[number::files], num_classes), sink, row_group_size=97)
        uri = storage.join(folder, f"{number % 2}", f"scores-{number:03d}.parquet")
        storage.publish(uri, sink.getvalue().to_pybytes())


def bytes_of(uri: str) -> dict[str, bytes]:
    return {file.path: storage.read_bytes(storage.join(uri, file.path)) for file in storage.list_files(uri)}


def rows_of(uri: str) -> list[Chosen]:
    table = read_selection(uri)
    names = ("class_id", "rank", "score", "shard", "index")
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def in_process(fn: Any, items: Any, *, values: int) -> Any:
    """`scatter` here, so that what a test changes in a module is in force."""
    import ray

    def value(item: Any) -> Any:
        return ray.get(item) if isinstance(item, ray.ObjectRef) else item

    for item in items:
        note, *rest = fn(*map(value, item))
        assert len(rest) == values
        yield note, [ray.put(one) for one in rest]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return generated(1200, 4, 9, seed=1)


@pytest.mark.usefixtures("ray_local")
class TestSelect:
    def test_equals_a_sort_and_duckdb(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 5, num_classes=9)
        selected = select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=40, min_score=0.3)
        expected = brute_force(rows, 40, min_score=0.3)
        assert rows_of(selected.uri) == expected
        assert selected.distinct_images == len({(row[3], row[4]) for row in expected}) < len(expected)
        assert pq.read_table(selected.uri).schema.equals(SCHEMA)  # to whoever reads it otherwise, shards are strings
        query = f"""
            select class_id, rank - 1, score, shard, index from (
                select *, row_number() over (partition by class_id order by score desc, shard, index) as rank
                from (select shard, index, unnest(class_ids) as class_id, unnest(scores) as score
                      from read_parquet('{tmp_path}/scores/*/*.parquet'))
                where score >= 0.3::float
            ) where rank <= 40 order by class_id, rank"""
        assert duckdb.execute(query).fetchall() == expected
        assert duckdb.execute(f"select * from '{tmp_path}/out/*.parquet'").fetchall() == expected

    def test_bytes_do_not_depend_on_files_order_or_tasks(self, rows: list[Row], tmp_path: Path) -> None:
        found = []
        for number, (files, tasks) in enumerate([(1, 1), (1, 6), (7, 3), (7, None), (12, 12)]):
            scores, out = str(tmp_path / f"scores-{number}"), str(tmp_path / f"out-{number}")
            write_scores(scores, rows, files, num_classes=9, seed=number)
            selected = select(scores, out, images_per_class=25, tasks=tasks)
            found.append((bytes_of(out), {**asdict(selected), "uri": ""}))
        assert all(other == found[0] for other in found[1:])
        assert list(found[0][0]) == ["part-00000.parquet"]

    def test_fewer_classes_per_image_can_be_selected_later(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 3)
        selected = select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=30, classes_per_image=2)
        assert rows_of(selected.uri) == brute_force(rows, 30, P=2)
        assert (selected.classes_per_image, selected.candidates) == (2, 2400)

    def test_statistics(self, tmp_path: Path) -> None:
        rows: list[Row] = [
            ("a", 0, [0, 2], [0.9, 0.1]),
            ("a", 1, [0, 2], [0.8, 0.2]),
            ("b", 0, [0, 2], [0.7, float("nan")]),
            ("b", 1, [2, 0], [float("inf"), 0.5]),
        ]
        write_scores(str(tmp_path / "scores"), rows, 2, num_classes=4)
        selected = select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=2)
        assert selected == Selected(
            uri=str(tmp_path / "out"),
            images_per_class=2,
            classes_per_image=2,
            num_classes=4,
            images=4,
            candidates=8,
            selected=4,
            unselected=2,
            excluded=0,
            nonfinite=2,
            distinct_images=2,
            classes_short=2,
            quotas=(2, 2, 2, 2),
            counts=(2, 0, 2, 0),
            lowest_scores=(float(np.float32(0.8)), None, float(np.float32(0.1)), None),
        )
        assert json.loads(json.dumps(asdict(selected)))["counts"] == [2, 0, 2, 0]

    def test_k_above_the_count_keeps_what_there_is(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 3)
        selected = select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=10**9)
        assert rows_of(selected.uri) == brute_force(rows, 10**9)
        assert (selected.selected, selected.unselected, selected.classes_short) == (4800, 0, 9)

    def test_no_candidate_is_an_empty_selection(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 3, num_classes=9)
        selected = select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=3, min_score=2.0)
        assert rows_of(selected.uri) == []
        assert (selected.selected, selected.unselected, selected.counts) == (0, 4800, (0,) * 9)

    def test_in_an_object_store_the_bytes_are_the_same(self, rows: list[Row], tmp_path: Path, s3: str) -> None:
        for place in (s3, str(tmp_path)):
            write_scores(f"{place}/scores", rows, 4, num_classes=9)
            select(f"{place}/scores", f"{place}/out", images_per_class=25)
        assert bytes_of(f"{s3}/out") == bytes_of(str(tmp_path / "out"))

    def test_large_selections_are_split_between_classes_and_stale_parts_go(
        self, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pipeline.selection import reducer

        write_scores(str(tmp_path / "scores"), rows, 3, num_classes=9)
        monkeypatch.setattr(reducer, "scatter", in_process)  # where parts are small
        monkeypatch.setattr(selection, "PART_ROWS", 100)
        monkeypatch.setattr(selection, "ROW_GROUP_ROWS", 30)
        out = str(tmp_path / "out")
        select(str(tmp_path / "scores"), out, images_per_class=40)
        parts = sorted((tmp_path / "out").glob("*.parquet"))
        assert [pq.ParquetFile(part).metadata.num_rows for part in parts] == [120, 80, 80, 80]
        assert rows_of(out) == brute_force(rows, 40)
        parts[2].unlink()
        with pytest.raises(SourceError, match="is not a complete selection; select again"):
            read_selection(out)
        select(str(tmp_path / "scores"), out, images_per_class=10)
        assert [part.name for part in (tmp_path / "out").iterdir()] == ["part-00000.parquet"]
        assert rows_of(out) == brute_force(rows, 10)


def change(name: str, column: pa.Array) -> Any:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, column)


BAD_TABLES = {
    "missing column": (lambda table: table.drop_columns(["index"]), "must have one column `index`"),
    "wrong index": (change("index", pa.array([0, 1], pa.int64())), "has a column `index` of type int64"),
    "wrong shard": (change("shard", pa.array([1, 2])), "has a column `shard` of type"),
    "float64 scores": (
        change("scores", pa.array([[0.5, 0.1]] * 2, pa.list_(pa.float64(), 2))),
        "has a column `scores` of type fixed_size_list",
    ),
    "variable lists": (change("class_ids", pa.array([[0, 1], [0]])), "has a column `class_ids` of type list"),
    "fewer scores": (
        change("scores", pa.array([[0.5]] * 2, pa.list_(pa.float32(), 1))),
        "has 2 class_ids and 1 scores in a row",
    ),
    "nulls": (change("index", pa.array([None, 1], pa.uint32())), "has null values"),
    "nulls in lists": (
        change("scores", pa.array([[0.5, None], [0.5, 0.1]], pa.list_(pa.float32(), 2))),
        "has null values",
    ),
    "class id": (change("class_ids", pa.array([[0, 9]] * 2, pa.list_(pa.int32(), 2))), "holds class id 9"),
    "other P": (lambda _: table_of([("a", 7, [0], [0.5])], 9), "stores 1 classes per image, and 2 are needed"),
    "other C": (lambda table: table.replace_schema_metadata({"tophat.num_classes": "8"}), "has 8 classes, and other"),
    "repeated rows": (lambda _: table_of([("a", 1, [0, 1], [0.5, 0.1])], 9), "has two scores for class 0"),
}


@pytest.mark.usefixtures("ray_local")
class TestBadInput:
    @pytest.mark.parametrize("name", BAD_TABLES)
    def test_a_bad_score_file_is_named_in_one_line(self, name: str, tmp_path: Path) -> None:
        spoil, rule = BAD_TABLES[name]
        write_scores(str(tmp_path / "scores"), [("a", 0, [0, 1], [0.5, 0.1]), ("a", 1, [1, 0], [0.5, 0.1])], 1, 9)
        bad = spoil(table_of([("a", 2, [0, 1], [0.5, 0.1]), ("a", 3, [1, 0], [0.5, 0.1])], 9))
        pq.write_table(bad, tmp_path / "scores" / "z-bad.parquet")
        with pytest.raises(SourceError) as caught:
            select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=3, tasks=2)
        assert rule in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "z-bad.parquet" in str(caught.value) or name == "repeated rows"
        assert not (tmp_path / "out").exists()

    def test_a_file_that_is_not_parquet(self, tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), [("a", 0, [0, 1], [0.5, 0.1])], 1)
        (tmp_path / "scores" / "z.parquet").write_bytes(b"not Parquet at all, by any means")
        with pytest.raises(SourceError, match=r"z\.parquet': cannot be used"):
            select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=2)

    def test_unsorted_scores_are_refused_when_some_are_left_out(self, tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), [("a", 0, [0, 1], [0.1, 0.5])], 1)
        with pytest.raises(SourceError, match="not in descending order"):
            select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=2, classes_per_image=1)

    def test_invalid_utf8_in_a_shard_name(self, tmp_path: Path) -> None:
        table = table_of([("a", 0, [0], [0.5])])
        bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
        pq.write_table(table.set_column(0, "shard", bad), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match="UTF8"):
            select(str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}-out"), images_per_class=2)


class TestBadRequest:
    """What is refused before any task starts."""

    def test_more_classes_per_image_than_stored(self, tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), [("a", 0, [0, 1], [0.5, 0.1])], 1)
        with pytest.raises(SourceError, match="classes_per_image = 3: must be at most 2, the classes stored per image"):
            select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=2, classes_per_image=3)

    def test_scores_of_another_teacher(self, tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), [("a", 0, [0, 1], [0.5, 0.1])], 1, num_classes=9)
        with pytest.raises(SourceError, match="has 9 classes, and 10 are expected"):
            select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=2, num_classes=10)

    def test_no_scores(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="holds no Parquet files"):
            select(str(tmp_path), str(tmp_path.parent / "out"), images_per_class=2)

    @pytest.mark.parametrize("field", ["images_per_class", "classes_per_image"])
    def test_nothing_to_select(self, field: str, tmp_path: Path) -> None:
        numbers: dict[str, Any] = {"images_per_class": 1, field: 0}
        with pytest.raises(InputError, match=f"{field} = 0: must be at least 1"):
            select(str(tmp_path), str(tmp_path / "out"), **numbers)

    def test_a_minimum_score_that_is_no_number(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="min_score = nan: must be a finite number; leave it out"):
            select(str(tmp_path), str(tmp_path / "out"), images_per_class=1, min_score=float("nan"))

    def test_files_of_others_are_left_alone(self, tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), [("a", 0, [0, 1], [0.5, 0.1])], 1)
        (tmp_path / "out").mkdir()
        pq.write_table(pa.table({"mine": [1]}), tmp_path / "out" / "part-00000.parquet")
        with pytest.raises(StorageError, match="which is not of a selection"):
            select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=2)
        assert pq.read_table(tmp_path / "out" / "part-00000.parquet").column_names == ["mine"]

    def test_a_selection_does_not_go_into_its_scores(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="is inside the score table"):
            select(str(tmp_path), str(tmp_path / "selection"), images_per_class=2)


def test_no_selection_to_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a complete selection"):
        read_selection(str(tmp_path))


def test_a_sieve_and_its_supplement_together_lose_nothing() -> None:
    rows = generated(400, 3, 6, seed=5)
    first = Sieve(quota(30), guess := np.full(6, 0.9, np.float32))
    rest = Sieve(quota(30), np.full(6, -np.inf, np.float32), below=guess, supplement=True)
    for sieve in (first, rest):
        sieve.add(scored(rows))
    found = merge([first.top(), rest.top()], quota(30))
    assert chosen(found) == brute_force(rows, 30)
    assert found.account.candidates == 1200 == len(found) + found.account.unselected


class TestQuotas:
    def test_equal_without_a_distribution(self) -> None:
        assert quotas(7, 4).tolist() == [7] * 4

    @pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 2.0])
    def test_zipf_keeps_the_total_and_its_law(self, exponent: float) -> None:
        found = quotas(1000, 50, zipf_exponent=exponent, seed=3)
        assert found.sum() == 50_000
        falling = np.sort(found)[::-1]
        expected = np.arange(1, 51) ** -exponent
        np.testing.assert_allclose(falling, expected / expected.sum() * 50_000, atol=1)
        assert quotas(1000, 50, zipf_exponent=exponent, seed=3).tolist() == found.tolist()

    def test_weights_are_shares_of_the_total(self) -> None:
        assert quotas(10, 3, class_weights=[3, 0, 1]).tolist() == [23, 0, 7]  # 22.5 and 7.5: the first gets the rest

    @pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
    def test_bad_weights_are_refused(self, weights: list[float]) -> None:
        with pytest.raises(InputError, match="class_weights"):
            quotas(10, 2, class_weights=weights)


def by_quota(rows: Sequence[Row], K: Int64) -> list[Chosen]:
    return [row for row in brute_force(rows, int(K.max())) if row[1] < K[row[0]]]


def busy_workers() -> list[int]:
    """Process ids of this session's Ray workers that run a task: grandchildren of ours, which Ray names by it."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (folder / "cmdline").read_bytes()
    ours = [pid for pid, parent in parents.items() if parents.get(parent) == os.getpid()]
    return [pid for pid in ours if names[pid].startswith(b"ray::_run")]


@pytest.mark.usefixtures("ray_local")
class TestVariants:
    def test_several_selections_in_one_pass_equal_single_ones(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 4, num_classes=9)
        wanted = [Wanted(str(tmp_path / f"{P}-{K}"), K, P) for P in (1, 3, None) for K in (5, 60)]
        for one, selected in zip(wanted, select_several(str(tmp_path / "scores"), wanted), strict=True):
            assert rows_of(one.out_uri) == brute_force(rows, one.images_per_class, one.classes_per_image)
            assert selected.candidates == 1200 * (one.classes_per_image or 4)
            assert selected.candidates == selected.selected + selected.unselected

    def test_unbalanced_quotas(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 4, num_classes=9)
        out = str(tmp_path / "out")
        selected = select(str(tmp_path / "scores"), out, images_per_class=40, zipf_exponent=1.0, seed=2)
        K = quotas(40, 9, zipf_exponent=1.0, seed=2)
        assert selected.quotas == tuple(K.tolist())
        assert selected.counts == selected.quotas
        assert selected.selected == 360
        assert rows_of(out) == by_quota(rows, K)

    def test_excluded_images_are_passed_over_and_counted(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 4, num_classes=9)
        vetoed = [(shard, index) for shard, index, _, _ in rows[::3]]
        listed = [*vetoed, ("elsewhere.tar", 1), vetoed[0]]
        columns = {"shard": [s for s, _ in listed], "index": pa.array([i for _, i in listed], pa.int64())}
        pq.write_table(pa.table(columns), tmp_path / "near.parquet")
        out = str(tmp_path / "out")
        selected = select(str(tmp_path / "scores"), out, images_per_class=50, exclude=[str(tmp_path / "near.parquet")])
        assert rows_of(out) == brute_force([row for row in rows if row[:2] not in set(vetoed)], 50)
        assert selected.excluded == 400 * 4
        assert selected.candidates == selected.selected + selected.unselected + selected.excluded

    def test_no_exclusion_list(self, rows: list[Row], tmp_path: Path) -> None:
        write_scores(str(tmp_path / "scores"), rows, 1)
        with pytest.raises(SourceError, match=r"exclude = .*holds no Parquet files"):
            select(str(tmp_path / "scores"), str(tmp_path / "o"), images_per_class=1, exclude=[str(tmp_path / "no")])

    def test_tags_at_random_whatever_the_split(self, tmp_path: Path) -> None:
        rng = random.Random(0)
        tagged = [("a.tar" if n % 2 else "é.tar", n, rng.choices(range(5), k=rng.randrange(4))) for n in range(3000)]
        found = []
        for number, files in enumerate((1, 3)):
            (tmp_path / f"tags-{number}").mkdir()
            for file in range(files):
                part = tagged[file::files]
                kind = pa.list_(pa.int32())
                columns = [
                    pa.array(c, k) for c, k in zip(zip(*part, strict=True), [None, pa.uint32(), kind], strict=True)
                ]
                pq.write_table(
                    pa.table(columns, ["shard", "index", "class_ids"]), tmp_path / f"tags-{number}/{file}.parquet"
                )
            out = str(tmp_path / f"out-{number}")
            selected = select(
                str(tmp_path / f"tags-{number}"), out, images_per_class=100, tags=True, seed=7, tasks=files
            )
            found.append(bytes_of(out))
        assert found[0] == found[1]
        assert selected.images == 3000
        assert selected.candidates == sum(len(set(tags)) for _, _, tags in tagged)
        has = {(shard, index): set(tags) for shard, index, tags in tagged}
        picked = rows_of(out)
        assert len(picked) == 500
        assert all(class_id in has[shard, index] for class_id, _, _, shard, index in picked)
        assert 1200 < np.mean([row[4] for row in picked]) < 1800  # from everywhere, not the first or the last
        select(str(tmp_path / "tags-0"), str(tmp_path / "other"), images_per_class=100, tags=True, seed=8)
        assert rows_of(str(tmp_path / "other")) != picked

    @pytest.mark.parametrize("fair", [True, False])
    def test_a_sample_decides_nothing(self, fair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its thresholds are guesses; here one is right, and one is far too high because the sample is of the best."""
        from pipeline.selection import reducer

        rows = generated(4000, 3, 6, seed=9, levels=1000)
        if not fair:
            rows.sort(key=lambda row: -row[3][0])
        passed: list[int] = []
        real = scatter

        def counted(*args: Any, **options: Any) -> Any:
            for note, rest in real(*args, **options):
                if isinstance(note, list):
                    passed.append(int(note[0].counts.sum()))
                yield note, rest

        monkeypatch.setattr(reducer, "scatter", counted)
        monkeypatch.setattr(reducer, "SAMPLE_ROWS", (200, 200))
        monkeypatch.setattr(reducer, "SAMPLE_SLICES", 4 if fair else 1)
        (tmp_path / "scores").mkdir()
        for number in range(8):
            part = rows[number::8] if fair else rows[number * 500 : number * 500 + 500]
            pq.write_table(table_of(part, 6), tmp_path / f"scores/{number}.parquet", row_group_size=50)
        selected = select(str(tmp_path / "scores"), str(tmp_path / "out"), images_per_class=300, tasks=8)
        assert rows_of(str(tmp_path / "out")) == brute_force(rows, 300)
        assert selected.candidates == 12_000 == selected.selected + selected.unselected
        assert (len(passed) > 10) is not fair  # a second scan
        if fair:
            assert sum(passed[2:]) < 6000

    def test_a_memory_limit_takes_several_passes_and_gives_the_same_bytes(
        self, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pipeline.selection import reducer

        monkeypatch.setattr(reducer, "scatter", in_process)
        monkeypatch.setattr(selection, "PART_ROWS", 100)
        write_scores(str(tmp_path / "scores"), rows, 3, num_classes=9)
        found = []
        for number, unit in enumerate((1, 64 << 20)):  # bytes of a candidate
            monkeypatch.setattr(reducer, "BYTES_PER_CANDIDATE", unit)
            select(str(tmp_path / "scores"), out := str(tmp_path / f"{number}"), images_per_class=40, memory_mib=4096)
            found.append(bytes_of(out))
        assert found[0] == found[1]
        assert rows_of(out) == brute_force(rows, 40)

    @pytest.mark.slow
    def test_workers_killed_in_mid_reduction_change_nothing(self, tmp_path: Path) -> None:
        rows = generated(20_000, 4, 9, seed=4)
        write_scores(str(tmp_path / "scores"), rows, 16, num_classes=9)
        scores, out = str(tmp_path / "scores"), str(tmp_path / "out")
        select(scores, out, images_per_class=300, tasks=16)
        expected, killed = bytes_of(out), 0
        stop = threading.Event()

        def kill() -> None:
            nonlocal killed
            while not stop.wait(0.02) and killed < 3:
                for worker in busy_workers()[:1]:
                    os.kill(worker, signal.SIGKILL)
                    killed += 1

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            select(scores, str(tmp_path / "again"), images_per_class=300, tasks=16)
        finally:
            stop.set()
            killer.join()
        assert killed > 0
        assert bytes_of(str(tmp_path / "again")) == expected
