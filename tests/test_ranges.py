"""Ranges: their files, the ledger that those are, how shards are dealt to tasks, and what the readers make of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.ranges
import pipeline.scoring
import tiny
from models.config import ModelConfig, Transform
from pipeline.ranges import (
    FIRST_BYTES,
    MAX_RANGE_ROWS,
    TASK_BYTES,
    Range,
    RangeReader,
    RangeSize,
    Unfinished,
    complete,
    finished,
    ledger,
    range_rows,
    surplus,
)
from pipeline.recipe import Score, Source
from pipeline.shards import Shard
from pipeline.sources import ImageSource, open_source

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
def test_a_range_is_whole_batches_or_a_part_of_one(size: int, mib: int, batch: int) -> None:
    fitting = max(1, min(MAX_RANGE_ROWS, mib * 2**20 // (3 * size * size)))
    rows = range_rows(Transform(size=size, resize=size), mib * 2**20, batch)
    if fitting < batch:
        assert rows == fitting
    else:
        assert rows % batch == 0
        assert rows <= MAX_RANGE_ROWS
        assert abs(rows - fitting) <= batch / 2 or rows + batch > MAX_RANGE_ROWS


def test_ranges_of_the_defaults() -> None:
    assert range_rows(Transform(), Score().range_bytes, Score().batch) == 64
    assert range_rows(Transform(), Score(gpus_per_actor=1).range_bytes, Score(gpus_per_actor=1).batch) == 768


@given(st.lists(st.integers(0, 200 * 2**20), min_size=1, max_size=50), st.integers(1, 64), st.integers(1, 64))
def test_every_shard_is_dealt_to_one_task(sizes: list[int], actors: int, readers: int) -> None:
    shards = [Shard(f"{number:03d}.tar", size, "e") for number, size in enumerate(sizes)]
    parts = Unfinished.of(shards, {}).parts(actors, readers)
    assert [part["start"] for part in parts] == [0, *(part["stop"] for part in parts[:-1])]
    assert parts[-1]["stop"] == len(sizes)
    for number, part in enumerate(parts):
        assert sum(sizes[part["start"] : part["stop"] - 1]) < TASK_BYTES  # its last shard may be of any size
        assert (part["first_bytes"] == FIRST_BYTES) == (number < 2 * actors)
        assert part["first_bytes"] <= part["range_bytes"]


def test_a_hundred_thousand_shards_make_few_tasks() -> None:
    shards = [Shard(f"{number:06d}.tar", 10**6, "e") for number in range(100_000)]
    assert 1_000 < len(Unfinished.of(shards, {}).parts(4, 4)) < 4_000


def test_many_readers_beside_one_gpu_share_what_one_would_read() -> None:
    """In tasks, which are small; not in ranges, which are as large as ever."""
    shards = [Shard(f"{number:03d}.tar", 25 * 10**6, "e") for number in range(40)]
    alone, together = (Unfinished.of(shards, {}).parts(1, readers) for readers in (1, 15))
    assert len(alone) <= 20
    assert len(together) == 40
    assert together[4]["range_bytes"] > 100 * 10**6


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
    reader, shard = (
        RangeReader(source.reader, CONFIG.transform, rows=1000, batch=1, decode_seconds=10),
        source.shards()[0],
    )

    def ranges(done: Sequence[Range], size: RangeSize | None = None) -> list[Range]:
        return of_tables(reader.ranges([(0, shard)], {shard.name: done}, size))

    assert ranges([]) == [Range("a.tar", 0, 50, True)]
    assert ranges([], RangeSize(1, 1)) == [Range("a.tar", n, n + 1, n == 49) for n in range(50)]
    growing = ranges([], RangeSize(1, 2**20))
    assert complete(growing)
    assert 1 < len(growing) < 25
    assert max(one.stop - one.start for one in growing) > 10
    for done in (
        [Range("a.tar", 0, 10, False)],
        [Range("a.tar", 40, 50, True)],
        [Range("a.tar", 10, 20, False), Range("a.tar", 30, 31, False)],
        [Range("a.tar", 0, 20, False), Range("a.tar", 30, 50, True)],
        [Range("a.tar", 0, 50, False)],
    ):
        together = sorted([*done, *ranges(done)], key=lambda r: (r.start, r.stop))
        assert complete(together), (done, together)


@pytest.mark.parametrize("batch", [3, 8, 12])
def test_ranges_of_a_large_shard_are_whole_batches_or_a_part_of_one(source: ImageSource, batch: int) -> None:
    shard = source.shards()[0]
    reader = RangeReader(source.reader, CONFIG.transform, rows=32 // batch * batch, batch=batch, decode_seconds=10)

    def sizes(size: RangeSize) -> list[int]:
        return [one.stop - one.start for one in of_tables(reader.ranges([(0, shard)], {}, size))]

    growing = sizes(RangeSize(1, 2**20))
    assert sum(growing) == 50
    *firsts, _ = growing
    assert firsts[0] == 1
    assert any(rows >= batch for rows in firsts)
    assert all(rows < batch or rows % batch == 0 for rows in firsts)
    assert sizes(RangeSize(1, 1)) == [1] * 50
    encoded = [len(row.data) for row in source.reader.read(shard)]
    enough = sum(encoded[: batch + 1])  # one more than a batch: a range goes on to the next
    assert sizes(RangeSize(enough, enough))[0] == min(2 * batch, 32 // batch * batch)


def of_tables(tables: Iterable[pa.Table]) -> list[Range]:
    rows = [row for table in tables for row in table.to_pylist()]
    return [Range(row["shards"][0], row["start"], row["stop"], row["last"], len(row["shards"])) for row in rows]


def small_shards(folder: Path, images: list[bytes], each: int) -> tuple[ImageSource, list[tuple[int, Shard]]]:
    """Tars of so many images each, and their ordinals in the listing."""
    for number, start in enumerate(range(0, len(images), each)):
        tiny.write_tar(folder / f"{number}.tar", images[start : start + each])
    source = open_source("U", Source(uri=str(folder)))
    return source, list(enumerate(source.shards()))


def test_small_shards_share_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader alone: neighbours in the listing only, whole ones only, small ones only, and no more than a range may hold."""
    images = tiny.digits()["two"][:32]
    source, shards = small_shards(tmp_path, images, 4)
    (tmp_path / "3.tar").unlink()

    def ranges(rows: int = 100, size: RangeSize | None = None, skip: int | None = None, **done: Range) -> list[Range]:
        reader = RangeReader(source.reader, CONFIG.transform, rows=rows, batch=1, decode_seconds=10)
        given = [(ordinal, shard) for ordinal, shard in shards if ordinal != skip]
        return of_tables(reader.ranges(given, {one.shard: [one] for one in done.values()}, size))

    missing = Range("3.tar", 0, 0, False)
    assert ranges() == [Range("0.tar", 0, 12, True, 3), missing, Range("4.tar", 0, 16, True, 4)]
    assert ranges(skip=5) == [
        Range("0.tar", 0, 12, True, 3),
        missing,
        Range("4.tar", 0, 4, True),
        Range("6.tar", 0, 8, True, 2),
    ]
    assert ranges(rows=11, skip=3)[:2] == [Range("0.tar", 0, 8, True, 2), Range("2.tar", 0, 4, True)]
    assert ranges(size=RangeSize(1, 1), rows=9, skip=3)[0] == Range("0.tar", 0, 1, False)
    assert ranges(rows=3, skip=3)[0] == Range("0.tar", 0, 3, False)
    assert ranges(skip=3, done=Range("1.tar", 0, 1, False))[:3] == [
        Range("0.tar", 0, 4, True),
        Range("1.tar", 1, 4, True),
        Range("2.tar", 0, 4, True),
    ]
    encoded = sum(len(image) for image in images[:4])
    monkeypatch.setattr(pipeline.ranges, "SMALL_BYTES", 2**15)  # more than a tar
    assert encoded * 8 < 2**15
    assert ranges(size=RangeSize(encoded + 1, 2**20), skip=3)[:2] == [
        Range("0.tar", 0, 8, True, 2),
        Range("2.tar", 0, 4, True),
    ]
    monkeypatch.setattr(pipeline.ranges, "SMALL_BYTES", min(shard.size for _, shard in shards))
    assert ranges(skip=3) == [Range(f"{n}.tar", 0, 4, True) for n in (0, 1, 2, 4, 5, 6, 7)]


def test_small_shards_fill_a_range_as_large_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny.digits()["zero"][:54]
    source, shards = small_shards(tmp_path, images, 9)
    small, four = 1 + max(shard.size for _, shard in shards), sum(len(image) for image in images[:36])
    assert small < four  # together they are not small
    monkeypatch.setattr(pipeline.ranges, "SMALL_BYTES", small)
    reader = RangeReader(source.reader, CONFIG.transform, rows=100, batch=1, decode_seconds=10)
    assert of_tables(reader.ranges(shards, {})) == [Range("0.tar", 0, 54, True, 6)]
    assert of_tables(reader.ranges(shards, {}, RangeSize(four, four))) == [
        Range("0.tar", 0, 36, True, 4),
        Range("4.tar", 0, 18, True, 2),
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
