"""The order of training data: invariants over epochs, workers and resumed positions, then real images."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cluster.errors import StageError
from models.config import Transform
from models.inputs.image import evaluation_image
from pipeline.data.labeled import REJECTED, class_ids, class_names, hold_out, times, training_set
from pipeline.data.loading import Piece, TrainingSet, ahead, arc, windows
from pipeline.data.reader import Reader
from pipeline.data.shards import Shard
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def positions(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.shard, row) for piece in pieces for row in range(piece.start, piece.stop)]


@given(COUNTS, st.integers(1, 5), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_visits_each_image_at_most_once_and_shares_them_equally(
    counts: list[int], world: int, seed: int, epoch: int
) -> None:
    total = sum(counts)
    arcs = [
        positions(arc(np.array(counts, np.int64), seed=seed, epoch=epoch, rank=rank, world=world))
        for rank in range(world)
    ]
    assert {len(a) for a in arcs} == {total // world}
    seen = [place for a in arcs for place in a]
    assert len(set(seen)) == len(seen)
    every = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    assert set(seen) <= every
    if world == 1:
        assert set(seen) == every


def test_the_order_depends_on_seed_and_epoch() -> None:
    counts = np.array([5, 7, 9, 4, 6, 8], np.int64)
    orders = {tuple(arc(counts, seed=s, epoch=e, rank=0, world=2)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@given(COUNTS, st.integers(1, 20))
def test_windows_cut_pieces_without_changing_them(counts: list[int], size: int) -> None:
    pieces = arc(np.array(counts, np.int64), seed=0, epoch=0, rank=0, world=1)
    groups = windows(pieces, size)
    assert [p for group in groups for p in positions(group)] == positions(pieces)
    assert all(len(positions(group)) == size for group in groups[:-1])


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    root = tmp_path_factory.mktemp("labeled")
    tiny.write_folders(root)
    source = open_source("train", Source(uri=str(root / "train")))
    labels = [np.zeros(len(shard.files), np.int64) for shard in source.shards()]
    return training_set(source, labels, sorted(tiny.CLASSES))


TRANSFORM = Transform(size=28, resize=28, crop="pad", padding=2, flip=True)


def taken(data: TrainingSet, start: int, count: int, rank: int = 0, world: int = 1) -> list[bytes]:
    batches = data.training_batches(TRANSFORM, batch_size=4, rank=rank, world=world, seed=3, start=start)
    found = []
    for _ in range(count):
        images, labels = next(batches)
        assert images.shape == (4, 3, 28, 28)
        found.append(images.numpy().tobytes() + labels.numpy().tobytes())
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_training_resumes_at_the_exact_image(
    labeled: TrainingSet, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.loading.WINDOW_IMAGES", 10)
    whole = taken(labeled, 0, 20, rank=world - 1, world=world)
    for done in (1, 5, 13):  # in the first epoch, and in later ones: it has 36 images
        assert taken(labeled, done * 4 * world, 7, rank=world - 1, world=world) == whole[done : done + 7]


def test_without_the_cache_the_images_are_the_same(labeled: TrainingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = taken(labeled, 0, 12)
    monkeypatch.setattr("pipeline.data.loading.CACHE_BYTES", 0)
    assert taken(labeled, 0, 12) == cached


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_sees_each_image_once(labeled: TrainingSet, world: int) -> None:
    labels = []
    for rank in range(world):
        for images, numbers in labeled.evaluation_batches(TRANSFORM, batch_size=7, rank=rank, world=world):
            assert len(images) == len(numbers) <= 7
            labels += numbers.tolist()
    assert sorted(labels) == [0] * 12 + [1] * 12 + [2] * 12


def test_too_few_images_for_the_workers(labeled: TrainingSet) -> None:
    with pytest.raises(StageError, match="36 labeled images are too few for 37 workers"):
        next(labeled.training_batches(TRANSFORM, batch_size=1, rank=0, world=37, seed=0, start=0))


def test_a_shard_that_vanished_stops_the_training(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(tiny.digits()["zero"][0])
    shards = (Shard("files-000000", 1, "x", ("a.png", "gone.png")),)
    data = TrainingSet(Reader(str(tmp_path), "folder"), shards, (np.arange(2),), {None: 0})
    with pytest.raises(
        StageError, match=r"image 1 of files-000000 could be decoded before and cannot now: unreadable: FileNotFound"
    ):
        list(data.evaluation_batches(TRANSFORM, batch_size=4, rank=0, world=1))


def given_labels(labeled: TrainingSet) -> TrainingSet:
    """Some images of `labeled` with other labels, and some with several: 20 and 21 of row 1, 22 of row 4, 23 to 25 of the last row."""
    last = len(labeled.rows[0]) - 1
    rows, labels = np.array([1, 1, 4, last, last, last]), np.array([20, 21, 22, 23, 24, 25])
    return TrainingSet(labeled.reader, labeled.shards[:1], (rows,), {number: number for number in range(30)}, (labels,))


def test_an_image_with_several_given_labels_comes_once_for_each(labeled: TrainingSet) -> None:
    data = given_labels(labeled)
    last = len(labeled.rows[0]) - 1
    assert data.images == 6
    every = {row.index: evaluation_image(row.data, TRANSFORM).tobytes() for row in data.reader.read(data.shards[0])}
    wanted = sorted(
        [(every[1], 20), (every[1], 21), (every[4], 22), *((every[last], number) for number in (23, 24, 25))]
    )
    for world in (1, 2, 5):  # cuts the images of one row apart
        found = [
            (image.numpy().tobytes(), label)
            for rank in range(world)
            for images, labels in data.evaluation_batches(TRANSFORM, batch_size=4, rank=rank, world=world)
            for image, label in zip(images, labels.tolist(), strict=True)
        ]
        assert sorted(found) == wanted


@pytest.mark.parametrize("cache_bytes", [0, 2**28])
def test_training_on_given_labels_resumes_at_the_exact_image(
    labeled: TrainingSet, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.loading.CACHE_BYTES", cache_bytes)
    monkeypatch.setattr("pipeline.data.loading.WINDOW_IMAGES", 4)
    data = given_labels(labeled)
    whole = taken(data, 0, 12)
    assert taken(data, 20, 7) == whole[5:]
    labels: list[int] = []
    for _, numbers in islice(data.training_batches(TRANSFORM, batch_size=3, rank=0, world=1, seed=3, start=0), 8):
        labels += numbers.tolist()
    assert [sorted(labels[n : n + 6]) for n in range(0, 24, 6)] == [[20, 21, 22, 23, 24, 25]] * 4


def test_an_image_that_is_gone_from_its_shard_stops_the_training(labeled: TrainingSet) -> None:
    size = len(labeled.shards[0].files)
    data = TrainingSet(
        labeled.reader, labeled.shards[:1], (np.array([1, size, size]),), {0: 0}, (np.zeros(3, np.int64),)
    )
    with pytest.raises(StageError, match="changed: it has 1 of 3 images"):
        list(data.evaluation_batches(TRANSFORM, batch_size=4, rank=0, world=1))


def test_ahead_passes_on_items_and_errors() -> None:
    assert list(ahead(iter(range(100)), 3)) == list(range(100))

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("late")

    items = ahead(broken(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="late"):
        next(items)


@given(
    st.lists(st.lists(st.integers(-1, 3), max_size=30).map(lambda x: np.array(x, np.int64)), min_size=1, max_size=4),
    st.floats(0.05, 0.9),
    st.integers(0, 5),
)
def test_holding_out_splits_every_class(
    labels: list[np.ndarray[tuple[int], np.dtype[np.int64]]], fraction: float, seed: int
) -> None:
    train, held = hold_out(labels, fraction, seed)
    for whole, kept, out in zip(labels, train, held, strict=True):
        assert ((kept == whole) | (out == whole)).all()
        assert ((kept == REJECTED) | (out == REJECTED)).all()
    flat, used, out = (np.concatenate(list(part)) for part in (labels, train, held))
    for number in range(4):
        members = int((flat == number).sum())
        assert int((out == number).sum()) == (min(max(1, round(fraction * members)), members - 1) if members else 0)
        assert int((used == number).sum()) + int((out == number).sum()) == members


def test_labels_find_their_outputs() -> None:
    numbered = Reader("x", "webdataset")
    assert class_ids(["3", "7"], numbered) == {"3": 0, "7": 1, 3: 0, 7: 1}
    assert class_ids(["cat", "dog"], numbered) == {"cat": 0, "dog": 1, 0: 0, 1: 1}
    named = Reader("x", "folder", class_names=("dog", "cat"))
    assert class_ids(["cat", "dog"], named) == {"cat": 0, "dog": 1}


def test_class_names_come_from_the_recipe_the_source_or_the_labels() -> None:
    from pipeline.data.labeled import Survey

    def surveyed(reader: Reader, *labels: int | str) -> Survey:
        return Survey(ImageSource(reader, (Shard("a", 1, "x"),)), (labels,), ())

    assert class_names(surveyed(Reader("x", "webdataset"), 10, 9), ["a", "b"]) == ("a", "b")
    assert class_names(surveyed(Reader("x", "folder", class_names=("z", "a")), "a"), None) == ("z", "a")
    assert class_names(surveyed(Reader("x", "webdataset"), 10, 9, 9), None) == ("9", "10")


def test_where_classes_count_alike_small_ones_repeat() -> None:
    labels = (np.array([0, 0, 1, REJECTED, 0]), np.array([2, 0, 1, 0]))
    often = times(labels, 3)
    assert [shard.tolist() for shard in often] == [[1, 1, 3, 0, 1], [5, 1, 2, 1]]
    assert times((np.array([REJECTED]),), 3)[0].tolist() == [0]


def test_a_balanced_epoch_has_as_many_of_each_class(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for name, count in (("a", 1), ("b", 3), ("c", 7)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(tiny.png(np.full((8, 8, 3), 30 * number, np.uint8)))
    source = open_source("labeled.train", Source(uri=str(folder)), labeled=True)
    labels = [
        np.array([{"a": 0, "b": 1, "c": 2}[file.partition("/")[0]] for file in shard.files])
        for shard in source.shards()
    ]
    data = training_set(source, labels, ("a", "b", "c"), balance=True)
    assert data.images == 21
    batches = data.training_batches(
        Transform(size=8, resize=8, crop="none"), batch_size=7, rank=0, world=1, seed=0, start=0
    )
    seen = np.concatenate([next(batches)[1].numpy() for _ in range(3)])
    assert np.bincount(seen).tolist() == [7, 7, 7]
