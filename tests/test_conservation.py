"""Nothing is lost: every object under a source, and every member of a tar, is an image, a part of a sample, or counted, exactly once."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import secrets
import socket
import string
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import killing
from cluster import storage
from cluster.errors import SourceError
from pipeline.data.ingest import ingest
from pipeline.data.shards import NO_IMAGE, Row, ShardError
from pipeline.data.sources import ImageSource, open_source
from pipeline.data.tar import label_of
from pipeline.recipe.images import Source

KEYS = ("a", "b", "clip", "ü", "x y", "%2e", "+", "#1", "..a")
MIDDLES = ("", ".000001", ".000002", ".left", ".mask")
ENDS = (".png", ".JPG", ".jpeg?size=large", ".heic", "", ".1", ".cls", ".json", ".txt", ".mov", ".tar.gz.part", ".npy")
FOLDERS = ("", "f/", "g/h/", "./", "..b/")
NAMES = st.builds("{}{}{}{}".format, *map(st.sampled_from, (FOLDERS, KEYS, MIDDLES, ENDS)))
HIDDEN = st.sampled_from([".DS_Store", "._a.png", "f/.a.png", "__MACOSX/._b.jpg", ".git/x.png"])


def opened(uri: str, **fields: str) -> ImageSource:
    return open_source("unlabeled", Source.model_validate({"uri": uri, **fields}))


def rows_of(source: ImageSource) -> list[Row]:
    return [row for shard in source.shards() for row in source.reader.read(shard)]


# Tars


def packed(members: list[tuple[str, str]], first: int = 0) -> bytes:
    """A tar of (name, kind); the content of member `i` is `first + i`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number, (name, kind) in enumerate(members, first):
            member = tarfile.TarInfo(name)
            member.type = {
                "file": tarfile.REGTYPE,
                "link": tarfile.SYMTYPE,
                "pipe": tarfile.FIFOTYPE,
                "folder": tarfile.DIRTYPE,
            }[kind]
            content = str(number).encode() if kind == "file" else b""
            member.size, member.linkname = len(content), "elsewhere" if kind == "link" else ""
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


KIND = st.sampled_from(["file"] * 8 + ["link", "pipe", "folder"])
MEMBERS = st.lists(st.tuples(NAMES | HIDDEN, KIND), max_size=25)
FEW_KEYS = st.lists(
    st.tuples(st.builds("{}{}{}".format, *map(st.sampled_from, (("a", "b"), MIDDLES, ENDS))), KIND), max_size=25
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    members=MEMBERS | FEW_KEYS,
    end=st.sampled_from([".tar", ".TAR", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"]),
    wanted=st.sets(st.integers(0, 25)),
    parts=st.integers(1, 3),
)
@example([("a.png", "link"), ("a.000001.png", "file"), ("a.000001.png", "file")], ".tar", set(), 1)
def test_every_member_of_a_tar(members: list[tuple[str, str]], end: str, wanted: set[int], parts: int) -> None:
    pack: dict[str, Any] = {"gz": gzip.compress, "xz": lzma.compress, "z2": bz2.compress}
    how = pack.get(end[-2:], bytes)
    content = b"".join(how(packed(members, part * len(members))) for part in range(parts))  # one file after the other
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"x{end}").write_bytes(content)
        source = opened(folder)
        rows = rows_of(source)
        assert [row.index for row in rows] == list(range(len(rows)))
        assert list(source.read(f"x{end}", wanted)) == [row for row in rows if row.index in wanted]
    members = members * parts
    images = Counter(int(row.data) for row in rows if row.data)
    assert set(images.values()) <= {1}
    told = [row.problem or "" for row in rows if row.reason == NO_IMAGE]
    for number, (name, kind) in enumerate(members):
        where, _, base = name.rpartition("/")
        hidden = base.startswith(".") or where.startswith(".git") or "..b" in where
        if kind == "folder":
            assert number not in images
        elif hidden:
            assert f"a hidden file: {name}" in told
        elif number not in images and kind == "file":
            # A part of a sample that has an image, or of one that is told to have none.
            sample = sample_around(members, number)
            in_rows = [i for i in sample if i in images]
            problems = [i for i in sample if members[i][1] in ("link", "pipe")]
            named = any(f"a sample without an image: {members[i][0]}" in told for i in sample)
            assert in_rows or problems or named
            if in_rows:
                assert rank(name) > min(rank(members[i][0]) for i in (*in_rows, *problems))
    links = sum(row.reason != NO_IMAGE and row.problem is not None for row in rows)
    assert len(images) + len(told) + links == len(rows)


def sample_around(members: list[tuple[str, str]], number: int) -> list[int]:
    """The members that stand with one in a row, of the same folder and name up to the first dot; hidden files and folders stand nowhere."""

    def key(name: str) -> tuple[str, str]:
        where, _, base = name.rpartition("/")
        return where, base.partition(".")[0]

    seen = [i for i, (name, kind) in enumerate(members) if kind != "folder" and not is_hidden(name)]
    place = seen.index(number)
    first = last = place
    while first > 0 and key(members[seen[first - 1]][0]) == key(members[number][0]):
        first -= 1
    while last + 1 < len(seen) and key(members[seen[last + 1]][0]) == key(members[number][0]):
        last += 1
    return seen[first : last + 1]


def is_hidden(name: str) -> bool:
    where, _, base = name.rpartition("/")
    return base.startswith(".") or any(p.startswith(".") and p not in (".", "..") for p in where.split("/"))


def rank(name: str) -> int:
    """How much a name looks like the image of its sample, by the rules of `pipeline.data.tar`; 3 for other files."""
    base = name.rpartition("/")[2]
    for end in (".png", ".JPG", ".jpeg?size=large", ".heic"):
        if base.endswith(end):
            return int("." in base.removesuffix(end))
    return 3 if base.endswith((".cls", ".json", ".txt", ".mov", ".part", ".npy", ".left", ".mask")) else 2


def test_a_tar_with_many_images_of_one_name_is_read_in_little_memory(tmp_path: Path) -> None:
    members = [(f"clip.{i:06d}.{end}", "file") for i in range(300) for end in ("png", "cls")]
    (tmp_path / "x.tar").write_bytes(packed(members))
    rows = rows_of(opened(str(tmp_path)))
    assert [(int(row.data), row.label) for row in rows] == [(2 * i, 2 * i + 1) for i in range(300)]
    some = list(opened(str(tmp_path)).read("x.tar", [0, 63, 64, 65, 299]))
    assert some == [rows[i] for i in (0, 63, 64, 65, 299)]


def test_labels_are_of_the_nearest_name(tmp_path: Path) -> None:
    names = ["b.cls", "b.left.cls", "b.left.png", "b.right.png", "c.png", "c.jpg", "c.cls", "d.001", "d.cls"]
    names += ["e.png", "e.png.cls", "f.png", "f.label.cls", "g.0001", "g.0001.cls", "g.0002", "g.0002.cls"]
    (tmp_path / "x.tar").write_bytes(packed([(name, "file") for name in names]))
    rows = rows_of(opened(str(tmp_path)))
    found = [(int(row.data), row.label) for row in rows]
    assert found == [(2, 1), (3, 0), (4, 6), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)]


def test_a_name_that_comes_again_begins_the_next_sample(tmp_path: Path) -> None:
    names = ["image.png", "image.cls"] * 3 + ["image.cls", "image.png"] * 2
    (tmp_path / "x.tar").write_bytes(packed([(name, "file") for name in names]))
    rows = rows_of(opened(str(tmp_path)))
    images = [(int(row.data), row.label) for row in rows if row.data]
    assert images == [(0, 1), (2, 3), (4, 5), (7, 6), (9, 8)]


def test_a_label_before_several_images_is_known_to_each_row_that_is_read_alone(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(packed([(name, "file") for name in ("a.cls", "a.0.png", "a.1.png", "a.2.png")]))
    source = opened(str(tmp_path))
    for number in range(3):
        (row,) = source.read("x.tar", [number])
        assert (row.index, int(row.data), row.label) == (number, number + 1, 0)


def test_a_label_after_more_images_than_are_held_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.tar.HELD", 4)
    names = [*(f"clip.{i:03d}.png" for i in range(6)), "clip.cls"]
    (tmp_path / "x.tar").write_bytes(packed([(name, "file") for name in names]))
    rows = rows_of(opened(str(tmp_path)))
    assert [(row.data, row.label) for row in rows] == [(str(i).encode(), None) for i in range(6)] + [(b"", None)]
    assert rows[-1].problem == "a label after the images that it is for: clip.cls"


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"3\n", 3),
        (b"\xef\xbb\xbf3", 3),
        (b"007", "007"),
        (b" cat\r\n", " cat"),
        (b"cat", "cat"),
        (b"p\xeache", "p\\xeache"),
        (b"p\xe9che", "p\\xe9che"),
        (b" \n", None),
        (b"", None),
        (b"-7", -7),
        (b"x" * 20_000, "x" * 20_000),
    ],
)
def test_what_a_cls_file_says(content: bytes, label: object) -> None:
    assert label_of(content) == label


def test_dots_in_the_names_of_images(tmp_path: Path) -> None:
    names = ["a.jpg.jpg", "a.left.jpg", "a.right.jpg", "b.png.png", "b.png"]
    (tmp_path / "x.tar").write_bytes(packed([(name, "file") for name in names]))
    assert [row.data for row in rows_of(opened(str(tmp_path)))] == [b"0", b"1", b"2", b"4"]


def test_a_member_that_is_said_to_end_behind_the_tar_does_not_stop_the_others(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("good.png"), io.BytesIO())
        huge = tarfile.TarInfo("huge.png")
        huge.pax_headers = {"size": "9" * 24}
        archive.addfile(huge, io.BytesIO())
    for name, content in {"x.tar": buffer.getvalue(), "x.tar.gz": gzip.compress(buffer.getvalue())}.items():
        (tmp_path / name).write_bytes(content)
    source = opened(str(tmp_path))
    for shard in source.shards():
        with pytest.raises(ShardError, match="a member that ends at byte"):
            list(source.reader.read(shard))


def test_headers_in_headers_are_a_damaged_shard(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    block = header.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(block * 3000)
    source = opened(str(tmp_path))
    with pytest.raises(ShardError, match="RecursionError"):
        list(source.reader.read(source.shards()[0]))


def test_a_tar_sorted_by_suffix_says_what_is_wrong(tmp_path: Path) -> None:
    names = [*(f"{i}.jpg" for i in range(3)), *(f"{i}.cls" for i in range(3))]
    (tmp_path / "x.tar").write_bytes(packed([(name, "file") for name in names]))
    rows = rows_of(opened(str(tmp_path)))
    assert [row.data for row in rows] == [b"0", b"1", b"2", b"", b"", b""]
    assert [row.problem for row in rows[3:]] == [f"a sample without an image: {i}.cls" for i in range(3)]


@pytest.mark.parametrize("end", [".tar.xz", ".tar.bz2", ".tar.gz"])
def test_a_packed_tar_that_is_cut_or_damaged_is_a_damaged_shard(tmp_path: Path, end: str) -> None:
    whole = packed([(f"{i}.png", "file") for i in range(400)])
    pack: dict[str, Any] = {".tar.xz": lzma.compress, ".tar.bz2": bz2.compress, ".tar.gz": gzip.compress}
    data = pack[end](whole)
    for name, content in {"cut": data[:-30], "odd": data[:200] + b"\xff" * 40 + data[240:], "no": b"no"}.items():
        (tmp_path / f"{name}{end}").write_bytes(content)
    source = opened(str(tmp_path))
    for shard in source.shards():
        with pytest.raises(ShardError):
            list(source.reader.read(shard))


def test_an_xz_that_asks_for_much_memory_is_a_damaged_shard(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}]
    (tmp_path / "x.tar.xz").write_bytes(lzma.compress(packed([("a.png", "file")]), filters=filters))
    source = opened(str(tmp_path))
    with pytest.raises(ShardError, match="Memory usage limit"):
        list(source.reader.read(source.shards()[0]))


def test_what_follows_the_end_of_a_tar_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(packed([("a.png", "file")]) + b"no tar" * 1000)
    source = opened(str(tmp_path))
    rows = source.reader.read(source.shards()[0])
    assert next(rows).data == b"0"
    with pytest.raises(ShardError, match="no valid header"):
        next(rows)


# Trees of files


@pytest.fixture(scope="module")
def moto_server(private_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """moto's S3 server over HTTP, which has keys that rclone's has not: with slashes in a row, and `a` beside `a/b`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    names = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
    names |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.1)
        with killing.environment(**names):
            boto3.Session().client("s3").create_bucket(Bucket="odd")
        yield names
    finally:
        server.terminate()
        server.wait(10)
        log.close()


@pytest.fixture
def moto(moto_server: dict[str, str]) -> Iterator[str]:
    """A URI in that server; the environment points at it."""
    with killing.environment(**moto_server):
        yield "s3://odd"


SOME_TAR = packed([("a.png", "file"), ("b.png", "file")])


def table(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


CONTENTS = {
    ".tar": SOME_TAR,
    ".TAR": SOME_TAR,
    ".tgz": gzip.compress(SOME_TAR),
    ".tar.xz": lzma.compress(SOME_TAR),
    ".parquet": table(image=[b"x", b"y"]),
    ".metadata.parquet": table(url=["u"]),
    "_stats.json": b"{}",
}
OBJECTS = st.lists(
    st.tuples(
        st.sampled_from(["", "f/", "g/h/", "ü ü/", ".hidden/", "a b/c/", "%2F/", "new\nline/"]),
        st.sampled_from(["0", "1", "00000", "a.b", ".x", "LICENSE", "classes", "$&+,;=@", "it's", "\u202e"]),
        st.sampled_from(
            [".jpg", ".JPEG", ".png?w=3", ".heic", ".jxl", "", ".1", ".txt", ".json", ".mov", ".zip", *CONTENTS]
        ),
    ),
    max_size=12,
)


def check(uri: str, names: set[str], layout: str, objects: int, images: set[str]) -> None:
    """Objects found = those that are read + parts + passed over; what is read is what the layout says; rows are theirs."""
    try:
        source = opened(uri, layout=layout)
    except SourceError:
        assert layout != "folder" or not images
        return
    read = {file for shard in source.shards() for file in (shard.files or (shard.name,))}
    assert sum(len(shard.files) or 1 for shard in source.shards()) == len(read)
    assert read <= names
    passed = sum(one.count for one in source.passed_over)
    assert len(read) + source.parts + passed == objects == source.objects
    assert (source.told() is None) == (passed == 0)
    if layout == "folder":
        assert images <= read
        assert sorted(row.data.decode() for row in rows_of(source)) == sorted(read)
    elif layout == "webdataset":
        assert read == {name for name in names if ".tar" in name.lower() or ".tgz" in name} - hidden(names)
        assert len(rows_of(source)) == 2 * len(read)


def hidden(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(".") or "/." in name}


def written(tree: list[tuple[str, str, str]]) -> dict[str, bytes]:
    names = {f"{folder}{stem}{end}": CONTENTS.get(end) for folder, stem, end in tree}
    return {name: name.encode() if content is None else content for name, content in names.items()}


def images_in(names: set[str]) -> set[str]:
    ends = (".jpg", ".JPEG", ".png?w=3", ".heic", ".jxl")
    return {name for name in names if name.endswith(ends)} - hidden(names)


LAYOUTS = st.sampled_from(["auto", "webdataset", "folder"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=OBJECTS, layout=LAYOUTS, links=st.integers(0, 3), draw=st.randoms(use_true_random=False))
def test_every_object_on_a_disk(tree: list[tuple[str, str, str]], layout: str, links: int, draw: Any) -> None:
    content = written(tree)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "root")
        root.mkdir()
        for name, data in content.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        Path(os.fsdecode(os.fsencode(root) + b"/\xff.jpg")).write_bytes(b"x")
        targets = [root, root / "f", root / "nothing", root / "g"]
        for number in range(links):
            (root / f"link{number}").symlink_to(draw.choice(targets))
        check(str(root), set(content), layout, len(content) + 1 + links, images_in(set(content)))


@settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    tree=OBJECTS,
    layout=LAYOUTS,
    odd=st.lists(st.sampled_from(["sub//x.jpg", "/lead.png", "a///b.png", "f", "f/", "g/h//", "//"]), unique=True),
)
def test_every_object_in_a_store(moto: str, tree: list[tuple[str, str, str]], layout: str, odd: list[str]) -> None:
    client, prefix = boto3.Session().client("s3"), secrets.token_hex(4)
    tree = [(folder.replace("\n", " "), stem, end) for folder, stem, end in tree]  # moto has no line breaks in keys
    content = written(tree) | {name: name.encode() for name in odd}
    for name, data in content.items():
        client.put_object(Bucket="odd", Key=f"{prefix}/{name}", Body=data)
    check(f"{moto}/{prefix}", set(content), layout, len(content), images_in(set(content)))


def test_the_characters_of_keys(moto: str) -> None:
    client = boto3.Session().client("s3")
    names = [f"k{ord(c):03d}{c}x/{c}y.png" for c in string.printable if c.isprintable() and c != "/"] + [
        "./a.png",
        "b/./c.png",
        "d/../e.png",
        "../f.png",
    ]
    for name in names:
        client.put_object(Bucket="odd", Key=f"chars/{name}", Body=name.encode())
    source = opened(f"{moto}/chars")
    found = {row.data.decode() for row in rows_of(source) if row.problem is None}
    assert sorted(found) + sorted(p for p in names if "/." in f"/{p}") == sorted(
        names, key=lambda n: ("/." in f"/{n}", n)
    )


def test_a_listing_that_is_saved_keeps_what_was_passed_over(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.txt", "b.mov", "c.mov", ".d"):
        (tmp_path / "u" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "u" / name).write_bytes(name.encode())
    source = opened(f"{tmp_path}/u")
    assert source.told() == "passed over: 3 of 5 objects: 2 files of the kind .mov (b.mov, c.mov), 1 hidden files (.d)"
    assert source.lacks_much
    source.save(f"{tmp_path}/listing.parquet")
    assert ImageSource.load(f"{tmp_path}/listing.parquet") == source


def test_the_layout_of_most_bytes_is_read(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(1000))
    (tmp_path / "backup.tar").write_bytes(SOME_TAR)
    source = opened(str(tmp_path))
    assert source.reader.layout == "folder"
    assert source.told() == "passed over: 1 of 31 objects: 1 tars beside another layout (backup.tar)"
    assert not opened(str(tmp_path), layout="folder").lacks_much or len(SOME_TAR) > 3000
    tars = opened(str(tmp_path), layout="webdataset")
    assert tars.lacks_much
    assert "30 images beside shards (0.jpg, 1.jpg, 10.jpg, ...)" in str(tars.told())


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    for kind, image in (("webdataset", None), ("files", "00000/000000000.jpg")):
        folder = tmp_path / kind
        (folder / "00000").mkdir(parents=True)
        (folder / "00000.parquet").write_bytes(table(url=["u"], key=["000000000"], status=["success"]))
        (folder / "00000_stats.json").write_bytes(b"{}")
        if image is None:
            (folder / "00000.tar").write_bytes(SOME_TAR)
        else:
            for end in ("jpg", "txt", "json"):
                (folder / "00000" / f"000000000.{end}").write_bytes(b"x")
    source = opened(f"{tmp_path}/webdataset")
    assert (source.reader.layout, source.parts, source.passed_over) == ("webdataset", 2, ())
    source = opened(f"{tmp_path}/files")
    assert (source.reader.layout, source.parts) == ("folder", 2)
    assert [one.reason for one in source.passed_over] == [
        "Parquet files beside another layout",
        "files of the kind .json",
    ]


def test_a_name_like_a_tars_hides_no_images(tmp_path: Path) -> None:
    (tmp_path / "2023.tar").write_bytes(SOME_TAR)
    for number in range(3):
        (tmp_path / f"2023.07.{number}.png").write_bytes(b"x")
    (tmp_path / "2023.parquet").write_bytes(table(image=[b"x"]))
    source = opened(str(tmp_path), layout="webdataset")
    assert (source.parts, sum(one.count for one in source.passed_over)) == (0, 4)


def test_a_large_file_without_a_suffix_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(SOME_TAR)
    (tmp_path / "core").write_bytes(bytes(100_000))
    (tmp_path / "preview.png").write_bytes(b"x")
    assert opened(str(tmp_path)).reader.layout == "webdataset"


def test_a_link_to_itself_beside_folders_of_classes(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    source = opened(str(tmp_path))
    assert source.reader.class_names == ("cat",)
    assert source.told() == "passed over: 1 of 2 objects: 1 links to nothing (loop)"


def test_one_file_is_no_source(place: str) -> None:
    storage.publish(storage.join(place, "a.tar"), SOME_TAR)
    with pytest.raises(SourceError, match=r"is (a file|one object); give the folder that it is in"):
        opened(storage.join(place, "a.tar"))


@pytest.mark.parametrize(
    "columns", [["image", "x", "x"], ["x", "x", "image"], ["image", "image"], ["image", "label", "label"]]
)
def test_columns_of_one_name(tmp_path: Path, columns: list[str]) -> None:
    made = pa.Table.from_arrays([pa.array([b"a"]) if name == "image" else pa.array(["v"]) for name in columns], columns)
    pq.write_table(made, tmp_path / "a.parquet")
    if columns.count("image") + columns.count("label") < 2:
        assert [row.data for row in rows_of(opened(str(tmp_path)))] == [b"a"]
    else:
        with pytest.raises(SourceError, match=r"_column = '(image|label)': is "):
            opened(str(tmp_path))


# Ingest


def test_an_ingest_counts_what_it_leaves_out(tmp_path: Path) -> None:
    members = [("a.png", "file"), ("b.png", "link"), ("c.txt", "file"), (".d", "file")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(packed(members))
    done = ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out")
    assert (done.images, done.left_out) == (1, {"unreadable": 1, "no_image": 2})
    assert len(rows_of(opened(f"{tmp_path}/out"))) == 1


def test_an_ingest_of_nothing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(packed([("c.txt", "file")]))
    with pytest.raises(SourceError, match="holds no image that can be copied; no_image 1; look at the files"):
        ingest(opened(f"{tmp_path}/in"), f"{tmp_path}/out")
    assert storage.walk(f"{tmp_path}/out") == ([], [])
