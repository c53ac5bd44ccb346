"""D-hat: every selected image once for each class, in an order that the seed decides, whatever was interrupted."""

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.errors import SourceError, StageError, StorageError
from pipeline.data.shards import Row, Shard
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source
from pipeline.selection import dhat
from pipeline.selection.dhat import Dhat, materialize
from pipeline.selection.places import permutation
from pipeline.selection.select import SCHEMA, read_selection, select

SHARDS = {"b/one.parquet": 40, "a two.parquet": 25, "é.parquet": 3, "unused.parquet": 5}
NAMES = [f"class <{i}>" for i in range(6)]


def image_of(shard: str, index: int) -> bytes:
    return f"{shard}#{index}".encode() * (1 + index % 3)


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Four Parquet shards of different sizes."""
    for name, count in SHARDS.items():
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [image_of(name, i) for i in range(count)]}), file)
    return open_source("unlabeled", Source(uri=str(tmp_path / "images")))


def scores_to(folder: str, seed: int = 0, drop: str = "unused.parquet") -> None:
    """Every image but the last shard's with three of six classes."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(SHARDS.items()):
        if name == drop:
            continue
        ids = np.argsort(rng.random((count, 6)), axis=1)[:, :3].astype(np.int32)
        scores = -np.sort(-rng.random((count, 3), np.float32), axis=1)
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 3) for values in (ids, scores)]
        index = pa.array(np.arange(count, dtype=np.uint32))
        table = pa.table([pa.array([name] * count), index, *lists], ["shard", "index", "class_ids", "scores"])
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.publish(storage.join(folder, f"{number}.parquet"), sink.getvalue().to_pybytes())


@pytest.fixture
def selection(tmp_path: Path, ray_local: None) -> str:
    scores_to(str(tmp_path / "scores"))
    return select(str(tmp_path / "scores"), str(tmp_path / "selection"), images_per_class=17).uri


def rows_of(uri: str) -> list[dict[str, Any]]:
    rows = []
    for file in storage.list_files(uri, ".parquet"):
        with storage.open_input(storage.join(uri, file.path)) as opened:
            rows += pq.ParquetFile(opened).read().to_pylist()
    return rows


def bytes_of(uri: str) -> dict[str, bytes]:
    return {file.path: storage.read_bytes(storage.join(uri, file.path)) for file in storage.list_files(uri)}


def test_every_selected_image_is_there_once_for_each_class(selection: str, source: ImageSource, tmp_path: Path) -> None:
    made = materialize(selection, source, str(tmp_path / "dhat"), images_per_shard=20, seed=7, class_names=NAMES)
    chosen = read_selection(selection).to_pylist()
    rows = rows_of(made.uri)
    assert [*rows[0]] == ["image", "label", "shard", "index", "rank", "score", "file"]
    assert all(row["image"] == image_of(row["shard"], row["index"]) for row in rows)
    key = ("label", "rank", "score", "shard", "index")
    assert sorted(tuple(row[name] for name in key) for row in rows) == [
        (row["class_id"], row["rank"], row["score"], row["shard"], row["index"]) for row in chosen
    ]
    distinct = {(row["shard"], row["index"]) for row in chosen}
    assert len(distinct) < len(chosen), "the test should have an image of two classes"
    assert made == Dhat(
        uri=str(tmp_path / "dhat"),
        images=102,
        distinct_images=len(distinct),
        bytes=sum(len(row["image"]) for row in rows),
        shards=6,
        counts=(17,) * 6,
    )
    assert sorted(storage.list_files(made.uri), key=lambda f: f.path)[-1].path == "part-00005.parquet"
    assert [pq.ParquetFile(f).metadata.num_rows for f in sorted((tmp_path / "dhat").glob("*"))] == [17] * 6


def test_the_order_is_shuffled_and_follows_the_seed(selection: str, source: ImageSource, tmp_path: Path) -> None:
    orders = []
    for number, seed in enumerate((1, 1, 2)):
        made = materialize(selection, source, str(tmp_path / f"dhat-{number}"), images_per_shard=50, seed=seed)
        orders.append([(row["label"], row["rank"]) for row in rows_of(made.uri)])
    assert orders[0] == orders[1]
    assert bytes_of(str(tmp_path / "dhat-0")) == bytes_of(str(tmp_path / "dhat-1"))
    assert orders[0] != orders[2]
    changes = sum(a[0] != b[0] for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert changes > 60  # of 101; 5 if the classes lay one after the other


def test_rounds_and_group_sizes_do_not_change_the_order(
    selection: str, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pure steps of both phases, in this process, with a tiny memory bound, and pieces of one shard or of all."""
    whole = materialize(selection, source, str(tmp_path / "whole"), images_per_shard=30, seed=3)
    monkeypatch.setattr(dhat, "GATHER_BYTES", 200)
    monkeypatch.setattr(dhat, "parallel_map", lambda fn, items: map(fn, items))
    small = materialize(selection, source, str(tmp_path / "small"), images_per_shard=30, seed=3)
    monkeypatch.setattr(dhat, "_orders", lambda work, _: REAL_ORDERS(work, 10**6))
    grouped = materialize(selection, source, str(tmp_path / "grouped"), images_per_shard=30, seed=3)
    assert bytes_of(whole.uri) == bytes_of(small.uri) == bytes_of(grouped.uri)


REAL_ORDERS = dhat._orders


class Counting(ImageSource):
    """A source that notes what is read of it, and loses or breaks what it is told to."""

    log: str
    lose: tuple[str, int] | None = None
    broken: str | None = None

    def read(self, shard_name: str, rows: Collection[int] | None = None) -> Iterator[Row]:
        with open(self.log, "a") as file:
            file.write(f"{shard_name}\n")
        assert rows
        if shard_name == self.broken:
            raise StorageError("uri", shard_name, "is not permitted", "ask")
        return (row for row in super().read(shard_name, rows) if (shard_name, row.index) != self.lose)


def counting(source: ImageSource, log: Path, **options: Any) -> Counting:
    made = Counting(source.reader, source.listing)
    for name, value in {"log": str(log), **options}.items():
        object.__setattr__(made, name, value)
    return made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process, because workers cannot import this module."""
    monkeypatch.setattr(dhat, "parallel_map", lambda fn, items: map(fn, items))


@pytest.mark.usefixtures("here")
class TestResume:
    def test_each_used_shard_is_read_once(self, selection: str, source: ImageSource, tmp_path: Path) -> None:
        log = tmp_path / "log"
        materialize(selection, counting(source, log), str(tmp_path / "dhat"), images_per_shard=9, seed=7)
        assert sorted(log.read_text().splitlines()) == ["a two.parquet", "b/one.parquet", "é.parquet"]

    def test_what_is_finished_is_kept(
        self, selection: str, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log, out = tmp_path / "log", tmp_path / "dhat"
        seen = counting(source, log)
        real = dhat._assemble

        def stops(*args: Any) -> tuple[int, int]:
            if args[-1].output == 3:
                raise StageError("the power went")
            return real(*args)

        monkeypatch.setattr(dhat, "_assemble", stops)
        with pytest.raises(StageError, match="the power went"):
            materialize(selection, seen, str(out), images_per_shard=20, seed=7)
        monkeypatch.setattr(dhat, "_assemble", real)
        kept = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
        assert len(kept) == 3
        log.unlink()
        materialize(selection, seen, str(out), images_per_shard=20, seed=7)
        assert not log.exists(), "the pieces were there, so no image needed to be read again"
        assert {file: file.stat().st_mtime_ns for file in kept} == kept
        materialize(selection, source, str(tmp_path / "other"), images_per_shard=20, seed=7)
        assert bytes_of(str(out)) == bytes_of(str(tmp_path / "other"))

    def test_a_finished_one_is_not_made_again_and_another_request_is(
        self, selection: str, source: ImageSource, tmp_path: Path
    ) -> None:
        log, out = tmp_path / "log", str(tmp_path / "dhat")
        first = materialize(selection, counting(source, log), out, images_per_shard=20, seed=7)
        log.unlink()
        assert materialize(selection, counting(source, log), out, images_per_shard=20, seed=7) == first
        assert not log.exists()
        again = materialize(selection, counting(source, log), out, images_per_shard=60, seed=7)
        assert log.exists()
        assert [file.path for file in storage.list_files(out)] == ["part-00000.parquet", "part-00001.parquet"]
        assert (again.images, again.bytes, again.shards) == (first.images, first.bytes, 2)

    def test_a_vanished_image_is_an_error(self, selection: str, source: ImageSource, tmp_path: Path) -> None:
        row = read_selection(selection).to_pylist()[0]
        lossy = counting(source, tmp_path / "log", lose=(row["shard"], row["index"]))
        with pytest.raises(StageError, match=f"has lost 1 selected images, index {row['index']} among them"):
            materialize(selection, lossy, str(tmp_path / "dhat"), images_per_shard=20, seed=7)
        assert not list((tmp_path / "dhat").glob("*.parquet"))

    def test_a_refusal_of_the_store_stays_one(self, selection: str, source: ImageSource, tmp_path: Path) -> None:
        broken = counting(source, tmp_path / "log", broken="é.parquet")
        with pytest.raises(StorageError, match="is not permitted"):
            materialize(selection, broken, str(tmp_path / "dhat"), images_per_shard=20, seed=7)


def test_a_vanished_shard_is_an_error_in_one_line(selection: str, source: ImageSource, tmp_path: Path) -> None:
    (tmp_path / "images" / "é.parquet").unlink()
    with pytest.raises(StageError) as caught:
        materialize(selection, source, str(tmp_path / "dhat"), images_per_shard=20, seed=7)
    assert "D-hat could not be copied: shard 'é.parquet'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_in_an_object_store(selection: str, source: ImageSource, s3: str, tmp_path: Path) -> None:
    made = materialize(selection, source, f"{s3}/dhat", images_per_shard=40, seed=7)
    materialize(selection, source, str(tmp_path / "dhat"), images_per_shard=40, seed=7)
    assert bytes_of(made.uri) == bytes_of(str(tmp_path / "dhat"))


def test_hugging_face_metadata_names_the_classes(selection: str, source: ImageSource, tmp_path: Path) -> None:
    made = materialize(selection, source, str(tmp_path / "dhat"), images_per_shard=40, seed=7, class_names=NAMES)
    schema = pq.read_schema(tmp_path / "dhat" / "part-00000.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert [*features] == schema.names
    assert features["label"] == {"names": NAMES, "_type": "ClassLabel"}
    assert features["score"] == {"dtype": "float32", "_type": "Value"}
    back = open_source("dhat", Source(uri=made.uri))
    assert {row.label for row in back.read("part-00000.parquet")} <= set(NAMES)


def test_the_selection_of_another_source(selection: str, source: ImageSource, tmp_path: Path) -> None:
    other = ImageSource(source.reader, (Shard("b/one.parquet", 1, "x"),))
    with pytest.raises(SourceError, match=r"selection = 'a two\.parquet': is not a shard of the source"):
        materialize(selection, other, str(tmp_path / "dhat"), images_per_shard=20, seed=7)


def test_files_of_others_are_left_alone(selection: str, source: ImageSource, tmp_path: Path) -> None:
    shutil.copytree(selection, tmp_path / "dhat")
    with pytest.raises(StorageError, match="which is not of D-hat"):
        materialize(selection, source, str(tmp_path / "dhat"), images_per_shard=20, seed=7)
    assert pq.read_schema(tmp_path / "dhat" / "part-00000.parquet").names == SCHEMA.names


def test_too_few_names(selection: str, source: ImageSource, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has class 5, and only 2 classes have names"):
        materialize(selection, source, str(tmp_path / "dhat"), images_per_shard=20, seed=7, class_names=NAMES[:2])


def test_nothing_selected(source: ImageSource, tmp_path: Path, ray_local: None) -> None:
    scores_to(str(tmp_path / "scores"))
    empty = select(str(tmp_path / "scores"), str(tmp_path / "empty"), images_per_class=5, min_score=2.0)
    with pytest.raises(StageError, match="no candidate was selected"):
        materialize(empty.uri, source, str(tmp_path / "dhat"), images_per_shard=20, seed=7)


def test_the_permutation_is_one_and_is_pinned() -> None:
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(10_000, 5).tolist()) == list(range(10_000))
    assert permutation(10_000, 5).tolist() != permutation(10_000, 6).tolist()
