"""Ranges: their files, the ledger that those are, how shards are dealt to tasks, and what the readers make of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from models.config import ModelConfig, Transform
from pipeline.data.shards import Shard
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Score
from pipeline.scoring.ledger import (
    MAX_TASKS,
    MIN_TASK_BYTES,
    TASK_BYTES,
    TASKS_PER_READER,
    Range,
    RangeReader,
    Unfinished,
    complete,
    finished,
    ledger,
    range_rows,
    surplus,
)

CONFIG = ModelConfig(architecture="resnet8", options={"width": 4}, transform=Transform(size=28, resize=28, flip=False))


@given(
    st.text(min_size=1, max_size=30).filter(lambda s: "/" not in s),
    st.integers(0, 10**9),
    st.integers(0, 10**6),
    st.booleans(),
    st.integers(1, 10**6),
)
def test_a_range_is_read_back_from_its_file_name(name: str, start: int, length: int, last: bool, shards: int) -> None:
    one = Range(f"folder/{name}.tar", start, start + length, last)
    assert Range.of_file(one.file) == one
    several = Range(f"folder/{name}.tar", 0, length, True, shards)
    assert Range.of_file(several.file) == several


def test_other_files_are_no_ranges() -> None:
    assert Range.of_file("manifest.json") is None
    assert Range.of_file("part-00000.parquet") is None


@pytest.mark.parametrize(
    ("spans", "whole"),
    [
        ([(0, 5, True)], True),
        ([(0, 0, True)], True),
        ([(0, 5, False), (5, 9, True)], True),
        ([], False),
        ([(0, 5, False)], False),
        ([(5, 9, True)], False),
        ([(0, 5, False), (6, 9, True)], False),
        ([(0, 5, False), (4, 9, True)], False),
        ([(0, 5, True), (5, 9, True)], False),
    ],
)
def test_a_shard_is_complete_when_its_ranges_cover_it(spans: Sequence[tuple[int, int, bool]], whole: bool) -> None:
    assert complete([Range("a", *span) for span in spans]) is whole


LISTING = tuple(Shard(name, 1, "e") for name in "abcdef")


def test_a_range_of_several_shards_finishes_all_of_them() -> None:
    done = {"b": [Range("b", 0, 9, True, 3)], "e": [Range("e", 0, 2, False), Range("e", 2, 4, True)]}
    assert finished(LISTING, done) == [False, True, True, True, True, False]
    assert surplus(LISTING, done) == []
    unfinished = Unfinished.of(LISTING, done)
    assert unfinished.shards.select(["shard", "ordinal"]).to_pylist() == [
        {"shard": "a", "ordinal": 0},
        {"shard": "f", "ordinal": 5},
    ]


@pytest.mark.parametrize(
    ("ranges", "extra"),
    [
        ([Range("a", 0, 9, True, 3), Range("b", 0, 3, True)], [1]),
        ([Range("a", 0, 9, True, 3), Range("c", 0, 7, True, 2), Range("d", 0, 3, True)], [1]),
        ([Range("a", 0, 3, True), Range("a", 0, 9, True, 3)], [1]),
        ([Range("a", 0, 6, True, 2), Range("a", 0, 9, True, 3)], [1]),
        ([Range("a", 0, 4, False), Range("a", 3, 6, True), Range("a", 4, 6, True)], [1]),
        ([Range("a", 0, 4, True), Range("a", 4, 6, True)], [1]),
        ([Range("a", 2, 4, False), Range("a", 6, 6, True)], []),
    ],
)
def test_what_is_scored_twice_is_found(ranges: list[Range], extra: list[int]) -> None:
    done: dict[str, list[Range]] = {}
    for one in ranges:
        done.setdefault(one.shard, []).append(one)
    assert surplus(LISTING, done) == [ranges[number] for number in extra]


@given(st.integers(8, 1024), st.integers(1, 4096), st.integers(1, 8192))
def test_a_range_is_whole_batches(size: int, mib: int, batch: int) -> None:
    rows = range_rows(Transform(size=size, resize=size), mib * 2**20, batch)
    assert rows % batch == 0
    assert rows == batch or 3 * size**2 * rows <= mib * 2**20
    assert 3 * size**2 * (rows + batch) > mib * 2**20


def test_ranges_of_the_defaults() -> None:
    assert range_rows(Transform(), Score().range_bytes, Score().batch) == 32
    assert range_rows(Transform(), Score(gpus_per_actor=1).range_bytes, Score(gpus_per_actor=1).batch) == 768


@given(st.lists(st.integers(0, 200 * 2**20), min_size=1, max_size=50), st.integers(1, 64))
def test_every_shard_is_dealt_to_one_task(sizes: list[int], readers: int) -> None:
    shards = [Shard(f"{number:03d}.tar", size, "e") for number, size in enumerate(sizes)]
    tasks = Unfinished.of(shards, {}).tasks(readers)
    assert [task["start"] for task in tasks] == [0, *(task["stop"] for task in tasks[:-1])]
    assert tasks[-1]["stop"] == len(sizes)
    share = max(sum(sizes) / TASKS_PER_READER / readers, MIN_TASK_BYTES)
    for task in tasks:  # its last shard may be of any size
        assert sum(sizes[task["start"] : task["stop"] - 1]) < min(share, 2 * TASK_BYTES)
    for task in tasks[:-1]:
        assert sum(sizes[task["start"] : task["stop"]]) >= min(share, TASK_BYTES)


def test_a_hundred_thousand_shards_make_few_tasks() -> None:
    shards = [Shard(f"{number:06d}.tar", 10**7, "e") for number in range(100_000)]
    assert MAX_TASKS / 2 < len(Unfinished.of(shards, {}).tasks(4)) <= MAX_TASKS


def test_many_readers_share_what_one_would_read() -> None:
    shards = [Shard(f"{number:03d}.tar", 25 * 10**6, "e") for number in range(40)]
    alone, together = (Unfinished.of(shards, {}).tasks(readers) for readers in (1, 15))
    assert len(alone) <= 20
    assert len(together) == 40


def test_ledger_of_nothing(tmp_path: Path) -> None:
    assert ledger(str(tmp_path / "none")) == {}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """A tar of 50 digits."""
    root = tmp_path_factory.mktemp("tars")
    tiny.write_tar(root / "a.tar", tiny.digits()["two"][:50])
    return open_source("U", Source(uri=str(root)))


def test_a_large_shard_is_scored_in_ranges_and_resumes_inside(source: ImageSource) -> None:
    """The reader alone: whatever ranges are done, the others complete the shard."""
    shard = source.shards()[0]

    def ranges(rows: int, *done: Range) -> list[Range]:
        reader = RangeReader(source.reader, CONFIG.transform, rows=rows, decode_seconds=10)
        return of_tables(reader.ranges([(0, shard)], {shard.name: done}))

    assert ranges(1000) == [Range("a.tar", 0, 50, True)]
    assert ranges(50) == [Range("a.tar", 0, 50, True)]
    assert ranges(1) == [Range("a.tar", n, n + 1, n == 49) for n in range(50)]
    assert ranges(16) == [Range("a.tar", n, min(n + 16, 50), n == 48) for n in (0, 16, 32, 48)]
    assert ranges(16, Range("a.tar", 10, 20, False)) == [
        Range("a.tar", 0, 10, False),
        Range("a.tar", 20, 36, False),
        Range("a.tar", 36, 50, True),
    ]
    for rows in (3, 16, 1000):
        for done in (
            [Range("a.tar", 0, 10, False)],
            [Range("a.tar", 40, 50, True)],
            [Range("a.tar", 10, 20, False), Range("a.tar", 30, 31, False)],
            [Range("a.tar", 0, 20, False), Range("a.tar", 30, 50, True)],
            [Range("a.tar", 0, 50, False)],
        ):
            together = sorted([*done, *ranges(rows, *done)], key=lambda r: (r.start, r.stop))
            assert complete(together), (rows, done, together)


def of_tables(tables: Iterable[pa.Table]) -> list[Range]:
    rows = [row for table in tables for row in table.to_pylist()]
    return [Range(row["shards"][0], row["start"], row["stop"], row["last"], len(row["shards"])) for row in rows]


def small_shards(folder: Path, images: Sequence[bytes], each: int) -> tuple[ImageSource, list[tuple[int, Shard]]]:
    """Tars of so many images each, and their ordinals in the listing."""
    for number, start in enumerate(range(0, len(images), each)):
        tiny.write_tar(folder / f"{number}.tar", images[start : start + each])
    source = open_source("U", Source(uri=str(folder)))
    return source, list(enumerate(source.shards()))


def test_small_shards_share_a_range(tmp_path: Path) -> None:
    """The reader alone: neighbors in the listing only, whole ones only, and no more than a range may hold."""
    source, shards = small_shards(tmp_path, tiny.digits()["two"][:32], 4)
    (tmp_path / "3.tar").unlink()

    def ranges(rows: int = 100, skip: int | None = None, **done: Range) -> list[Range]:
        reader = RangeReader(source.reader, CONFIG.transform, rows=rows, decode_seconds=10)
        given = [(ordinal, shard) for ordinal, shard in shards if ordinal != skip]
        return of_tables(reader.ranges(given, {one.shard: [one] for one in done.values()}))

    missing = Range("3.tar", 0, 0, False)
    assert ranges() == [Range("0.tar", 0, 12, True, 3), missing, Range("4.tar", 0, 16, True, 4)]
    assert ranges(skip=5) == [
        Range("0.tar", 0, 12, True, 3),
        missing,
        Range("4.tar", 0, 4, True),
        Range("6.tar", 0, 8, True, 2),
    ]
    assert ranges(rows=8, skip=3) == [
        Range("0.tar", 0, 8, True, 2),
        Range("2.tar", 0, 4, True),
        Range("4.tar", 0, 8, True, 2),
        Range("6.tar", 0, 8, True, 2),
    ]
    assert ranges(rows=11, skip=3)[:2] == [Range("0.tar", 0, 8, True, 2), Range("2.tar", 0, 4, True)]
    assert ranges(rows=4, skip=3) == [Range(f"{n}.tar", 0, 4, True) for n in (0, 1, 2, 4, 5, 6, 7)]
    assert ranges(rows=3, skip=3)[:3] == [
        Range("0.tar", 0, 3, False),
        Range("0.tar", 3, 4, True),
        Range("1.tar", 0, 3, False),
    ]
    assert ranges(skip=3, done=Range("1.tar", 0, 1, False))[:3] == [
        Range("0.tar", 0, 4, True),
        Range("1.tar", 1, 4, True),
        Range("2.tar", 0, 4, True),
    ]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_whatever_files_are_lost_what_they_had_is_unfinished(counts: list[int], data: st.DataObject) -> None:
    shards = [Shard(f"{number:02d}.tar", count, "e") for number, count in enumerate(counts)]
    expected: list[bool] = []
    done: dict[str, list[Range]] = {}
    while len(expected) < len(shards):
        first = len(expected)
        several = data.draw(st.integers(1, len(shards) - first))
        is_kept = data.draw(st.booleans())
        if is_kept:
            images = sum(counts[first : first + several])
            done[shards[first].name] = [Range(shards[first].name, 0, images, True, several)]
        expected += [is_kept] * several
    assert finished(shards, done) == expected
    assert surplus(shards, done) == []
    unfinished = Unfinished.of(shards, done).shards["ordinal"].to_pylist()
    assert unfinished == [number for number, is_finished in enumerate(expected) if not is_finished]
