"""Locations: atomic publishing, listing, and what a user reads when a store refuses."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import MissingError, StorageError
from faulty_proxy import faulty_proxy
from killing import environment

KILLED = """
import os, sys, time
from pathlib import Path
from cluster import storage

fsync = os.fsync
def stop_before_rename(fd):
    fsync(fd)
    print("written", flush=True)
    time.sleep(60)

os.fsync = stop_before_rename
storage.publish(sys.argv[1], b"new" * 1000)
"""


def test_published_content_is_read_back(place: str, tmp_path: Path) -> None:
    target = storage.join(place, "a", "b.bin")
    assert not storage.exists(target)
    storage.publish(target, b"one")
    assert storage.exists(target)
    assert storage.read_bytes(target) == b"one"
    file = tmp_path / "two"
    file.write_bytes(b"two" * 1000)
    storage.publish(target, file)
    assert storage.read_bytes(target) == b"two" * 1000
    with storage.open_input(target) as handle:
        handle.seek(3)
        assert handle.read(3) == b"two"
    with storage.local_copy(target) as path:
        assert path.read_bytes() == b"two" * 1000


def test_a_multipart_upload_of_a_file(s3: str, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2**20) * 18)
    storage.publish(storage.join(s3, "large"), file)
    assert storage.read_bytes(storage.join(s3, "large")) == file.read_bytes()


def test_listing_is_sorted_by_bytes_relative_and_without_hidden_files(place: str) -> None:
    names = ["b.txt", "a/z.txt", "a/é.txt", "a/Z.txt", "a b/'\"<i>.txt", "a/two.bin", ".hidden/x.txt", "a/.x.tmp"]
    for name in names:
        storage.publish(storage.join(place, name), name.encode())
    listed = storage.list_files(place, ".txt")
    assert [f.path for f in listed] == ["a b/'\"<i>.txt", "a/Z.txt", "a/z.txt", "a/é.txt", "b.txt"]
    assert [f.size for f in listed] == [len(f.path.encode()) for f in listed]
    assert all(storage.read_bytes(storage.join(place, f.path)) == f.path.encode() for f in listed)


def test_the_listing_of_nothing_is_empty(place: str) -> None:
    assert storage.list_files(storage.join(place, "absent")) == []


def test_an_etag_changes_with_the_content(place: str) -> None:
    target = storage.join(place, "x")
    storage.publish(target, b"one")
    before = storage.list_files(place)[0]
    storage.publish(target, b"two")
    after = storage.list_files(place)[0]
    assert before.size == after.size
    assert before.etag != after.etag


def test_deleting(place: str) -> None:
    for name in ("a/1", "a/b/2", "a/.hidden", "c"):
        storage.publish(storage.join(place, name), b"x")
    storage.delete_file(storage.join(place, "a/1"))
    storage.delete_file(storage.join(place, "never"))
    assert [f.path for f in storage.list_files(place)] == ["a/b/2", "c"]
    storage.delete_tree(storage.join(place, "a"))
    storage.delete_tree(storage.join(place, "never"))
    assert [f.path for f in storage.list_files(place)] == ["c"]
    assert not storage.exists(storage.join(place, "a/.hidden"))


def test_a_writer_killed_before_the_rename_leaves_the_old_content_whole(tmp_path: Path) -> None:
    target = tmp_path / "x"
    storage.publish(str(target), b"old")
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
    assert target.read_bytes() == b"old"
    assert [f.path for f in storage.list_files(str(tmp_path))] == ["x"]


def test_readers_never_see_a_part(place: str) -> None:
    target = storage.join(place, "x")
    contents = {bytes([value]) * 200_000 for value in range(4)}
    storage.publish(target, next(iter(contents)))
    stop, seen, errors = threading.Event(), set[bytes](), list[Exception]()

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(storage.read_bytes(target))
            except Exception as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 0.7
    while time.monotonic() < deadline:
        for content in contents:
            storage.publish(target, content)
    stop.set()
    reader.join()
    assert errors == []
    assert len(seen) > 1
    assert seen <= contents


def test_only_the_first_creates(place: str) -> None:
    target = storage.join(place, "a", "lease")
    assert storage.create(target, b"one")
    assert not storage.create(target, b"two")
    assert storage.read_bytes(target) == b"one"
    assert [f.path for f in storage.list_files(place)] == ["a/lease"]


def race(target: str, contenders: int = 12) -> None:
    """Exactly one of many who create an object at the same moment does so, and it is theirs."""
    start = threading.Barrier(contenders)

    def attempt(number: int) -> bool:
        start.wait()
        return storage.create(target, str(number).encode() * 1000)

    with ThreadPoolExecutor(contenders) as pool:
        won = [number for number, created in enumerate(pool.map(attempt, range(contenders))) if created]
    assert len(won) == 1
    assert storage.read_bytes(target) == str(won[0]).encode() * 1000


def test_one_of_many_creates_on_a_local_disk(tmp_path: Path) -> None:
    assert storage.conditional(str(tmp_path / "new" / "folder"))
    assert not list((tmp_path / "new" / "folder").iterdir())
    for name in "abc":
        race(str(tmp_path / name))


def test_one_of_many_creates_in_an_object_store(s3: str) -> None:
    server = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with faulty_proxy(server, 0.0, conditional=True) as proxy, environment(AWS_ENDPOINT_URL=proxy.url):
        assert storage.conditional(s3)
        assert storage.list_files(s3) == []
        for name in "abc":
            race(storage.join(s3, name))


@pytest.mark.slow
def test_a_lost_answer_does_not_make_the_writer_another_one(s3: str) -> None:
    server = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with (
        faulty_proxy(server, 0.4, seed=1, stall=1.2, conditional=True) as proxy,
        environment(AWS_ENDPOINT_URL=proxy.url, TOPHAT_S3_TIMEOUT="1"),
    ):
        for number in range(8):
            assert storage.create(storage.join(s3, str(number)), b"one")
            assert not storage.create(storage.join(s3, str(number)), b"one")
        assert proxy.injected["reset"] + proxy.injected["stall"] > 0


def test_a_store_that_ignores_conditions_is_found_out(s3: str) -> None:
    assert not storage.conditional(s3)
    assert not storage.exists(s3)
    assert storage.list_files(s3) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://x/y", "uri = 'ftp://x/y': has a scheme that is not supported; use a local path, s3:// or gs://"),
        ("s3://", "uri = 's3://': names no bucket; write s3://BUCKET/KEY"),
    ],
)
def test_a_uri_that_cannot_be(uri: str, message: str) -> None:
    with pytest.raises(StorageError) as error:
        storage.read_bytes(uri)
    assert str(error.value) == message


def test_nothing_there(place: str) -> None:
    storage.publish(storage.join(place, "other"), b"")
    absent = storage.join(place, "absent")
    for read in (storage.read_bytes, lambda uri: storage.read_end(uri, 3), lambda uri: copied(uri)):
        with pytest.raises(MissingError, match=r"absent': does not exist; check the path$") as caught:
            read(absent)
    assert type(pickle.loads(pickle.dumps(caught.value))) is MissingError


def copied(uri: str) -> bytes:
    with storage.local_copy(uri) as path:
        return path.read_bytes()


def test_the_end_of_an_object(place: str) -> None:
    target = storage.join(place, "x")
    storage.publish(target, b"0123456789")
    assert storage.read_end(target, 4) == b"6789"
    assert storage.read_end(target, 100) == b"0123456789"


@pytest.mark.parametrize("operation", ["publish", "list", "read", "exists"])
def test_wrong_credentials_are_one_line(s3: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish(storage.join(s3, "x"), b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    attempts: dict[str, Callable[[], object]] = {
        "publish": lambda: storage.publish(storage.join(s3, "x"), b"y"),
        "list": lambda: storage.list_files(s3),
        "read": lambda: storage.read_bytes(storage.join(s3, "x")),
        "exists": lambda: storage.exists(storage.join(s3, "x")),
    }
    with pytest.raises(StorageError, match=r"was refused by the store .*; check the credentials") as error:
        attempts[operation]()
    assert "\n" not in str(error.value)


def test_a_wrong_secret_for_a_known_key(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish(storage.join(s3, "x"), b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="check the credentials"):
        storage.check_writable("--run-dir", s3)


def test_a_bucket_that_does_not_exist(s3: str) -> None:
    with pytest.raises(StorageError, match="is in a bucket that does not exist; create the bucket"):
        storage.list_files("s3://no-such-bucket/x")
    with pytest.raises(
        StorageError, match=r"^--run-dir = 's3://no-such-bucket/run': is in a bucket that does not exist"
    ):
        storage.check_writable("--run-dir", "s3://no-such-bucket/run")
    for read in (storage.read_bytes, storage.open_input, copied):
        with pytest.raises(StorageError, match="is in a bucket that does not exist; create the bucket") as caught:
            read("s3://no-such-bucket/x")
        assert not isinstance(caught.value, MissingError)


def test_a_read_without_a_server_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("cluster.filesystems.ATTEMPTS", 1)
    with pytest.raises(StorageError, match="could not be reached") as caught:
        storage.read_bytes(storage.join(s3, "x"))
    assert "AWS_ENDPOINT_URL" in caught.value.fix


def test_no_server_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="could not be reached") as error:
        storage.exists(storage.join(s3, "x"))
    assert "AWS_ENDPOINT_URL" in error.value.fix


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(StorageError, match=r"^--out = "):
        storage.check_writable("--out", str(blocked / "run"))


def test_a_name_that_is_not_utf8_is_told_in_letters(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jpg")).write_bytes(b"x")
    assert storage.walk(str(tmp_path)) == ([], [storage.Skipped("\\xff\\xfe.jpg", "names that are not UTF-8")])


def test_links_are_followed_and_never_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "x").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y").write_bytes(b"yy")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "real")
    (root / "b").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "real" / "back").symlink_to(root)
    (root / "file").symlink_to(tmp_path / "elsewhere" / "y")
    (root / "nothing").symlink_to(tmp_path / "gone")
    (root / "itself").symlink_to(root / "itself")
    os.mkfifo(root / "pipe")
    files, skipped = storage.walk(str(root))
    assert [(file.path, file.size) for file in files] == [("a/deep/x", 1), ("file", 2)]
    assert [(one.path, one.reason) for one in skipped] == [
        ("a/back", "links to folders that are listed by another name"),
        ("b", "links to folders that are listed by another name"),
        ("itself", "links to nothing"),
        ("nothing", "links to nothing"),
        ("pipe", "devices, sockets and pipes"),
    ]


def test_joining() -> None:
    assert storage.join("s3://b/k/", "/x/", "", "y.txt") == "s3://b/k/x/y.txt"
    assert storage.join("/", "x") == "/x"
    assert storage.join("a") == "a"
