"""Every source layout on a disk and in an S3 store; hostile names and bytes."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.data.parquet
from cluster import storage
from cluster.errors import SourceError
from pipeline.data.labeled import Survey, class_ids, class_names
from pipeline.data.reader import Reader
from pipeline.data.shards import ChangedShardError, Label, Row, Shard, ShardError
from pipeline.data.sources import FILES_PER_SHARD, ImageSource, open_source
from pipeline.recipe.images import Source


def tar(members: Sequence[tuple[str, bytes]], trailer: bool = True) -> bytes:
    """A tar of these members; without `trailer`, cut off after the last one."""
    buffer = io.BytesIO()
    size = 0
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        size = archive.offset
    return buffer.getvalue() if trailer else buffer.getvalue()[:size]


def parquet(columns: dict[str, object], names: Sequence[str] | None = None, group: int = 1000) -> bytes:
    """A Parquet file, with Hugging Face's class names in its metadata when given."""
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=group)
    return bytes(sink.getvalue().to_pybytes())


def opened(uri: str, **fields: str) -> ImageSource:
    return open_source("unlabeled", Source.model_validate({"uri": uri, **fields}))


def everything(source: ImageSource) -> dict[tuple[str, int], tuple[bytes, Label]]:
    rows = {(s.name, row.index): (row.data, row.label) for s in source.shards() for row in source.read(s.name)}
    for shard in source.shards():
        assert [i for name, i in rows if name == shard.name] == sorted(i for name, i in rows if name == shard.name)
    return rows


def test_webdataset(place: str) -> None:
    one = [("000.jpg", b"a"), ("000.json", b"{}"), ("000.cls", b"1\n"), ("001.png", b"b"), ("001.cls", b"0")]
    storage.publish(storage.join(place, "00000.tar"), tar(one))
    storage.publish(storage.join(place, "deep/00001.tar.gz"), gzip.compress(tar([("x/9.JPEG", b"c")])))
    storage.publish(storage.join(place, "00000.parquet"), b"what img2dataset writes beside each tar")
    source = opened(place)
    assert source.reader.layout == "webdataset"
    assert [(s.name, s.size > 0) for s in source.shards()] == [("00000.tar", True), ("deep/00001.tar.gz", True)]
    assert everything(source) == {
        ("00000.tar", 0): (b"a", 1),
        ("00000.tar", 1): (b"b", 0),
        ("deep/00001.tar.gz", 0): (b"c", None),
    }


def test_webdataset_labels_become_names_with_classes_json(place: str) -> None:
    members = [("0.jpg", b"a"), ("0.cls", b"1"), ("1.jpg", b"b"), ("1.cls", "küchenuhr".encode()), ("2.jpg", b"c")]
    members += [("2.cls", b"7"), ("3.jpg", b"d"), ("3.cls", b"-1")]
    storage.publish(storage.join(place, "a.tar"), tar(members))
    storage.publish(storage.join(place, "classes.json"), b'["ant", "bee"]')
    source = opened(place)
    assert source.reader.class_names == ("ant", "bee")
    assert [row.label for row in source.read("a.tar")] == ["bee", "küchenuhr", 7, -1]


def test_webdataset_rows_that_are_odd_keep_their_numbers(tmp_path: object) -> None:
    members = [
        ("./a.jpg", b"a"),
        (".DS_Store", b"junk"),
        ("./._b.jpg", b"junk"),
        ("b.json", b"{}"),
        ("c.mask.png", b"mask"),
        ("c.png", b"c"),
        ("c.zz.png", b"zz"),
        ("d/c.png", b"same stem, another folder"),
        ("e.image.jpg", b"e"),
        ("f.jpg", b""),
    ]
    storage.publish(f"{tmp_path}/x.tar", tar(members))
    rows = list(opened(str(tmp_path)).read("x.tar"))
    assert [row.index for row in rows] == list(range(8))
    assert [row.data for row in rows] == [b"a", b"", b"", b"", b"c", b"same stem, another folder", b"e", b""]
    assert [row.problem for row in rows] == [
        None,
        "a hidden file: .DS_Store",
        "a hidden file: ./._b.jpg",
        "a sample without an image: b.json",
        *[None] * 4,
    ]
    assert {row.reason for row in rows if row.problem} == {"no_image"}


def test_parquet_with_bytes(place: str) -> None:
    images = [bytes([i]) for i in range(7)]
    storage.publish(storage.join(place, "p.parquet"), parquet({"image": images, "label": [3, 1, 2, 0, 1, 1, None]}))
    source = opened(place)
    assert source.reader.layout == "parquet"
    rows = everything(source)
    assert [data for data, _ in rows.values()] == images
    assert [label for _, label in rows.values()] == [3, 1, 2, 0, 1, 1, None]


def test_parquet_of_hugging_face(place: str) -> None:
    images = [{"bytes": b"a", "path": "x.png"}, {"bytes": None, "path": "y.png"}, None]
    storage.publish(
        storage.join(place, "data/train-0.parquet"), parquet({"image": images, "label": [1, 0, 5]}, ["cat", "dog"])
    )
    source = opened(place)
    assert source.reader.class_names == ("cat", "dog")
    assert list(source.read("data/train-0.parquet")) == [
        Row(0, b"a", "dog", reason="empty", file="data/train-0.parquet/x.png"),
        Row(1, b"", "cat", "no bytes, only the path y.png", "empty", file="data/train-0.parquet/y.png"),
        Row(2, b"", 5, "no bytes", "empty"),
    ]


def test_parquet_columns_by_name(tmp_path: object) -> None:
    columns = {"jpeg": pa.array([b"a", b"b"], pa.large_binary()), "what": ["x", "y"], "url": ["u", "v"]}
    storage.publish(f"{tmp_path}/p.parquet", parquet(columns))
    source = opened(str(tmp_path), image_column="jpeg", label_column="what")
    assert [(row.data, row.label) for row in source.read("p.parquet")] == [(b"a", "x"), (b"b", "y")]
    with pytest.raises(SourceError) as error:
        opened(str(tmp_path), image_column="img")
    assert str(error.value).startswith("unlabeled.image_column = 'img': is not one column of ")
    assert str(error.value).endswith("p.parquet; use one of jpeg, what, url")


def test_the_column_of_images_is_found(tmp_path: object) -> None:
    storage.publish(f"{tmp_path}/one/p.parquet", parquet({"url": ["u"], "img": [b"a"]}))
    assert opened(f"{tmp_path}/one").reader.image_column == "img"
    storage.publish(f"{tmp_path}/usual/p.parquet", parquet({"mask": [b"m"], "image": [b"a"]}))
    assert opened(f"{tmp_path}/usual").reader.image_column == "image"
    storage.publish(f"{tmp_path}/two/p.parquet", parquet({"left": [b"a"], "right": [b"b"]}))
    with pytest.raises(
        SourceError, match=r"has several columns of encoded images \(left, right\) .*; name one with unl"
    ):
        opened(f"{tmp_path}/two")
    storage.publish(f"{tmp_path}/none/p.parquet", parquet({"url": ["u"], "n": [1]}))
    with pytest.raises(SourceError, match=r"has no column of encoded images \(url string, n int64\) in "):
        opened(f"{tmp_path}/none")


BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1]), "int64"),
        (pa.array(["/data/0.png"]), "string"),
        (pa.array([[b"a"]], pa.list_(pa.binary())), "list<element: binary>"),
        (pa.array([[{"bytes": b"a", "path": None}]], pa.list_(BYTES)), "list<element: struct<.*>>"),
        (pa.array([b"a"], pa.binary_view()), "binary_view"),
        (pa.array([{"path": "a"}]), "struct<path: string>"),
    ],
)
def test_a_column_that_holds_no_images(tmp_path: object, column: pa.Array, kind: str) -> None:
    storage.publish(f"{tmp_path}/p.parquet", parquet({"image": column}))
    with pytest.raises(SourceError, match=rf"^unlabeled.image_column = 'image': holds {kind} in .*write it as binary"):
        opened(str(tmp_path))


def test_a_file_of_other_columns_than_the_first_is_told_as_a_shard(tmp_path: object) -> None:
    storage.publish(f"{tmp_path}/a.parquet", parquet({"image": [b"a"]}))
    storage.publish(f"{tmp_path}/b.parquet", parquet({"image": [1]}))
    storage.publish(f"{tmp_path}/c.parquet", parquet({"image": [b"c"], "label": [0.5]}))
    source = opened(str(tmp_path))
    assert [row.data for row in source.read("a.parquet")] == [b"a"]
    with pytest.raises(ShardError, match=r"holds int64 in b\.parquet, which are no encoded images"):
        list(source.read("b.parquet"))
    with pytest.raises(ShardError, match=r"label = 0.5: is no class number, in c\.parquet"):
        list(source.read("c.parquet"))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([0.0, 10.0, float("nan"), None]), [0, 10, None, None]),
        (pa.array([1, 2**40]), [1, 2**40]),
        (pa.array([True, False]), [1, 0]),
        (pa.array([b"ant", "b\xfc".encode("latin-1")]), ["ant", "b\\xfc"]),
        (pa.array(["007", "7", "1.0"]), ["007", "7", "1.0"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([None, None]), [None, None]),
        (pa.array([3, 4], pa.decimal128(5, 2)), [3, 4]),
    ],
)
def test_labels_of_every_type(tmp_path: object, labels: pa.Array, expected: list[Label]) -> None:
    storage.publish(f"{tmp_path}/p.parquet", parquet({"image": [b"a"] * len(labels), "label": labels}))
    assert [row.label for row in opened(str(tmp_path)).read("p.parquet")] == expected


@pytest.mark.parametrize("labels", [[[1]], [{"id": 1}], [__import__("datetime").date(2026, 1, 1)]])
def test_labels_that_are_none(tmp_path: object, labels: list[object]) -> None:
    storage.publish(f"{tmp_path}/p.parquet", parquet({"image": [b"a"], "label": labels}))
    with pytest.raises(SourceError, match=r"^unlabeled.label_column = 'label': holds .* in .*; name a column of class"):
        opened(str(tmp_path))


def test_folder_with_hostile_names(place: str) -> None:
    names = ["cat/1.jpg", "cat/deep/2.JPG", "dog/a..b.png", "dog/'\"<b>&.gif", "dög/ü 日本.webp", "dog/%2e%2e.bmp"]
    if not storage.is_remote(place):
        names += ["cat/new\nline.jpg", "cat/\x1b[31mred\x07.jpg", "cat/back\\slash.jpg"]
    for name in names:
        storage.publish(storage.join(place, name), name.encode())
    storage.publish(storage.join(place, "cat/readme.txt"), b"no image")
    source = opened(place)
    assert source.reader.layout == "folder"
    assert source.reader.class_names == ("cat", "dog", "dög")
    rows = everything(source)
    assert {data.decode() for data, _ in rows.values()} == set(names)
    assert all(label == data.decode().partition("/")[0] for data, label in rows.values())


def test_a_flat_folder_has_no_labels(tmp_path: object) -> None:
    storage.publish(f"{tmp_path}/a.jpg", b"a")
    source = opened(str(tmp_path))
    assert source.reader.class_names is None
    assert list(source.read("files-000000")) == [Row(0, b"a", None, file="a.jpg")]


def test_many_files_become_mixed_virtual_shards(tmp_path: object) -> None:
    count = FILES_PER_SHARD + 40
    for i in range(count):
        storage.publish(f"{tmp_path}/{'ab'[i % 2]}/{i:04d}.png", f"{i}".encode())
    source = opened(str(tmp_path))
    assert [(s.name, len(s.files)) for s in source.shards()] == [
        ("files-000000", FILES_PER_SHARD),
        ("files-000001", 40),
    ]
    rows = everything(source)
    assert sorted(int(data) for data, _ in rows.values()) == list(range(count))
    small = [label for (shard, _), (_, label) in rows.items() if shard == "files-000001"]
    assert 5 < small.count("a") < 35
    assert everything(opened(str(tmp_path))) == rows


def test_a_file_that_vanished_is_a_row_without_bytes(tmp_path: object) -> None:
    for name in ("a.jpg", "b.jpg"):
        storage.publish(f"{tmp_path}/{name}", name.encode())
    source = opened(str(tmp_path))
    storage.delete_file(f"{tmp_path}/a.jpg")
    rows = list(source.read("files-000000"))
    assert sorted(row.data for row in rows) == [b"", b"b.jpg"]


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "folder"])
def test_single_rows(place: str, layout: str) -> None:
    contents = [f"image {i}".encode() for i in range(600)] if layout == "parquet" else [b"a", b"b", b"c", b"d", b"e"]
    if layout == "parquet":
        storage.publish(storage.join(place, "s.parquet"), parquet({"image": contents}, group=100))
    elif layout == "webdataset":
        storage.publish(storage.join(place, "s.tar"), tar([(f"{i}.jpg", c) for i, c in enumerate(contents)]))
    else:
        for i, content in enumerate(contents):
            storage.publish(storage.join(place, f"{i}.jpg"), content)
    source = opened(place)
    name = source.shards()[0].name
    whole = list(source.read(name))
    draw = random.Random(0)
    for _ in range(5):
        wanted = draw.sample(range(len(whole)), 3)
        assert list(source.read(name, wanted)) == [whole[i] for i in sorted(wanted)]
    assert list(source.read(name, [])) == []
    assert list(source.read(name, {0, 10**6})) == whole[:1]


def read_until_broken(source: ImageSource, shard: str) -> list[Row]:
    rows: list[Row] = []
    with pytest.raises(ShardError) as error:
        rows.extend(source.read(shard))
    assert "\n" not in str(error.value)
    return rows


MEMBERS = [(f"{i}.jpg", bytes([i]) * 2000) for i in range(4)]


@pytest.mark.parametrize(
    ("content", "good"),
    [
        pytest.param(tar(MEMBERS)[: 3 * 2560 + 700], 3, id="inside an image"),
        pytest.param(tar(MEMBERS)[: 3 * 2560 + 100], 3, id="inside a header"),
        pytest.param(tar(MEMBERS, trailer=False)[: 3 * 2560], 3, id="between two images"),
        pytest.param(tar(MEMBERS)[: 2 * 2560] + b"\xff" * 20480, 2, id="garbage"),
        pytest.param(b"not a tar" * 1000, 0, id="no tar"),
        pytest.param(b"", 0, id="empty"),
    ],
)
def test_a_corrupt_tar_breaks_after_its_good_rows(tmp_path: object, content: bytes, good: int) -> None:
    storage.publish(f"{tmp_path}/x.tar", content)
    rows = read_until_broken(opened(str(tmp_path)), "x.tar")
    assert [row.data for row in rows] == [data for _, data in MEMBERS[:good]]


def test_a_corrupt_gzip(tmp_path: object) -> None:
    text = "".join(random.Random(0).choices("0123456789", k=100_000)).encode()
    images = [b"a" * 50_000, text, text[::-1], text]
    packed = gzip.compress(tar([(f"{i}.jpg", image) for i, image in enumerate(images)]))
    middle = len(packed) // 2
    storage.publish(f"{tmp_path}/cut.tar.gz", packed[:middle])
    storage.publish(f"{tmp_path}/junk.tar.gz", packed[:middle] + b"\xff" * 1000 + packed[middle + 1000 :])
    source = opened(str(tmp_path))
    assert [row.data for row in read_until_broken(source, "cut.tar.gz")] == images[:2]
    assert [row.data for row in read_until_broken(source, "junk.tar.gz")] == images[:2]


def test_a_corrupt_parquet(tmp_path: object) -> None:
    noise = random.Random(0)
    images = [noise.randbytes(2000) for _ in range(1024)]
    whole = parquet({"image": images}, group=256)
    page = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2).column(0).data_page_offset
    storage.publish(f"{tmp_path}/good.parquet", whole)
    storage.publish(f"{tmp_path}/cut.parquet", whole[:-1000])
    storage.publish(f"{tmp_path}/empty.parquet", b"")
    storage.publish(f"{tmp_path}/junk.parquet", whole[:page] + b"\xff" * 100 + whole[page + 100 :])
    source = opened(str(tmp_path))
    assert [row.data for row in source.read("good.parquet")] == images
    assert read_until_broken(source, "cut.parquet") == []
    assert read_until_broken(source, "empty.parquet") == []
    assert [row.data for row in read_until_broken(source, "junk.parquet")] == images[:512]


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "folder"])
def test_a_shard_that_changed_since_it_was_listed_gives_no_image_as_if_it_had_not(place: str, layout: str) -> None:
    content = {"webdataset": ("x.tar", tar(MEMBERS), tar([("a.jpg", b"new")])), "folder": ("x.jpg", b"a", b"new")}
    content["parquet"] = ("x.parquet", parquet({"image": [b"a"]}), parquet({"image": [b"new"]}))
    name, before, after = content[layout]
    storage.publish(storage.join(place, name), before)
    source = opened(place)
    storage.publish(storage.join(place, name), after)
    shard = source.shards()[0]
    if layout == "folder":
        (row,) = source.reader.read(shard)
        assert (row.data, row.problem) == (b"", "the file changed since it was listed")
    else:
        with pytest.raises(ChangedShardError, match="the shard changed since it was listed"):
            list(source.reader.read(shard))


def test_a_shard_that_vanished(place: str) -> None:
    storage.publish(storage.join(place, "x.tar"), tar(MEMBERS))
    source = opened(place)
    storage.delete_file(storage.join(place, "x.tar"))
    assert read_until_broken(source, "x.tar") == []
    assert read_until_broken(source, "never\n.tar") == []


def test_a_saved_listing_is_the_same_source(place: str) -> None:
    storage.publish(storage.join(place, "images/ü/1.jpg"), b"1")
    storage.publish(storage.join(place, "images/b/'2'.jpg"), b"2")
    source = opened(storage.join(place, "images"))
    source.save(storage.join(place, "listing.parquet"))
    again = ImageSource.load(storage.join(place, "listing.parquet"))
    assert again == source
    assert again.fingerprint() == source.fingerprint()
    assert everything(again) == everything(source)


def test_the_fingerprint_follows_content_and_class_names(place: str) -> None:
    storage.publish(storage.join(place, "x.tar"), tar(MEMBERS))
    prints = {opened(place).fingerprint(), opened(place).fingerprint()}
    assert len(prints) == 1
    storage.publish(storage.join(place, "x.tar"), tar([(name, b"z" * 2000) for name, _ in MEMBERS]))
    prints.add(opened(place).fingerprint())
    storage.publish(storage.join(place, "classes.json"), b'["a"]')
    prints.add(opened(place).fingerprint())
    assert len(prints) == 3


def test_nothing_there(place: str) -> None:
    with pytest.raises(SourceError) as error:
        opened(place)
    assert str(error.value) == (
        f"unlabeled.uri = {place!r}: does not exist or holds no files; check the path, or make shards with `tophat ingest`"
    )


def test_nothing_of_that_layout(tmp_path: object) -> None:
    storage.publish(f"{tmp_path}/notes.txt", b"")
    rule = "holds no tar shards, Parquet files or images, only files of the kind .txt; check uri and layout"
    with pytest.raises(SourceError, match=rule):
        opened(str(tmp_path))
    storage.publish(f"{tmp_path}/x.jpg", b"")
    with pytest.raises(SourceError, match="holds no files of the layout parquet; check uri and layout"):
        opened(str(tmp_path), layout="parquet")


@pytest.mark.parametrize("content", [b'{"a": 1}', b"[1, 2]", b"no json", b"\xff"])
def test_a_wrong_classes_file(tmp_path: object, content: bytes) -> None:
    storage.publish(f"{tmp_path}/x.tar", tar(MEMBERS))
    storage.publish(f"{tmp_path}/classes.json", content)
    with pytest.raises(SourceError, match=r"classes\.json': must be a JSON list of class names; correct or remove"):
        opened(str(tmp_path))


def test_a_store_that_refuses_names_the_field(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SourceError, match=r"^unlabeled\.uri = .*: was refused by the store .*; check the credentials"):
        opened(s3)


def words(uri: str, **fields: str) -> list[tuple[str, ...]]:
    """The words of every row when the reader is asked for them; without asking, there are none."""
    source = opened(uri, **fields)
    assert {row.words for shard in source.shards() for row in source.read(shard.name)} == {()}
    reader = replace(source.reader, tags=True)
    found = [row for shard in source.shards() for row in reader.read(shard)]
    assert [replace(row, words=()) for row in found] == [r for s in source.shards() for r in source.read(s.name)]
    return [row.words for row in found]


def test_words_of_webdataset(place: str) -> None:
    samples: list[list[tuple[str, bytes]]] = [
        [("txt", "\ufeffA cat, on#the #Hot_Roof;\n".encode()), ("jpg", b"a"), ("cls", b"1"), ("cls.txt", b"2")],
        [("jpg", b"b"), ("JSON", b'{"caption": "two dogs", "tags": ["#x", "hot dog", 7, null], "url": "u"}')],
        [("jpg", b"c"), ("json", b'{"tags": "a,b", "caption": null}'), ("txt", b"c")],
        [("jpg", b"d"), ("json", b"{broken"), ("mask.txt", b"no"), ("ocr.json", b'{"tags": ["no"]}')],
        [("jpg", b"e"), ("json", b"[" * 100_000)],
        [("jpg", b"f"), ("json", b'["tags"]'), ("txt", b"\xff\xfe")],
        [("jpg", b"g")],
    ]
    members = [(f"{n}.{suffix}", content) for n, sample in enumerate(samples) for suffix, content in sample]
    storage.publish(storage.join(place, "a.tar"), tar(members))
    wanted = [
        ("A", "cat", "on", "#the", "#Hot_Roof"),
        ("#x", "hot dog", "two", "dogs"),
        ("a", "b", "c"),
        (),
        (),
        ("\ufffd\ufffd",),
        (),
    ]
    assert words(place) == wanted


def test_words_of_damaged_tars_are_of_their_own_samples(tmp_path: Path) -> None:
    members = [
        ("0.txt", b"x"),
        ("0.jpg", b"a"),
        ("1.jpg", b"b"),
        ("1.txt", b"y"),
        ("2.txt", b"z"),
        ("2.jpg", b"c"),
        ("2.json", b"{}"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(members, trailer=False)[:-600])
    source = opened(str(tmp_path))
    rows = replace(source.reader, tags=True).read(source.shards()[0])
    found = [next(rows), next(rows), next(rows)]
    assert [(row.data, row.words) for row in found] == [(b"a", ("x",)), (b"b", ("y",)), (b"c", ("z",))]
    with pytest.raises(ShardError):
        next(rows)


def test_words_of_a_folder(place: str) -> None:
    files = {"x/a.jpg": b"a", "x/a.txt": b"#one two", "x/b.png": b"b", "c.jpg": b"c", "c.json": b'{"tags": ["no"]}'}
    for name, content in files.items():
        storage.publish(storage.join(place, name), content)
    assert sorted(words(place)) == [(), (), ("#one", "two")]


def test_words_of_parquet(place: str) -> None:
    columns = {
        "image": [b"a", b"b", b"c"],
        "caption": ["a cat", None, "c"],
        "tags": [["#x y"], None, []],
        "label": [1, 2, 3],
    }
    storage.publish(storage.join(place, "a.parquet"), parquet(columns))
    storage.publish(storage.join(place, "b.parquet"), parquet({"image": [b"d"], "tags": ["d,e"]}))
    storage.publish(storage.join(place, "c.parquet"), parquet({"image": [b"e"], "tags": [7]}))
    storage.publish(storage.join(place, "d.parquet"), parquet({"image": [b"f"]}))
    assert words(place) == [("#x y", "a", "cat"), (), ("c",), ("d", "e"), (), ()]


def test_large_images_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow has no structs of more than 2 GiB."""
    storage.publish(f"{tmp_path}/p.parquet", parquet({"image": [bytes(100_000)] * 20}))
    metadata = pq.read_metadata(f"{tmp_path}/p.parquet")
    assert pipeline.data.parquet._rows_at_once(metadata) == 256
    monkeypatch.setattr(pipeline.data.parquet, "READ_BYTES", metadata.row_group(0).total_byte_size // 4 + 1)
    assert pipeline.data.parquet._rows_at_once(metadata) == 5


def surveyed(*labels: Label) -> Survey:
    source = ImageSource(Reader("/d", "parquet"), (Shard("a.parquet", 1, "e"),))
    return Survey(source, (labels,), ())


def test_numbers_and_the_same_as_texts_are_told() -> None:
    assert class_names(surveyed(10, 9, "x"), None) == ("9", "10", "x")
    with pytest.raises(SourceError, match=r"has labels that are numbers, and the same as texts \(3\)"):
        class_names(surveyed(3, "3"), None)


def test_a_number_finds_its_class_by_name_before_its_place() -> None:
    plain, named = Reader("/d", "parquet"), Reader("/d", "parquet", class_names=("a", "b"))
    assert class_ids(("7", "cat"), plain) == {"7": 0, "cat": 1, 7: 0}
    assert class_ids(("007", "7"), plain) == {"007": 0, "7": 1, 7: 1}
    assert class_ids(("a", "b"), plain) == {"a": 0, "b": 1, 0: 0, 1: 1}
    assert class_ids(("a", "b"), named) == {"a": 0, "b": 1}
