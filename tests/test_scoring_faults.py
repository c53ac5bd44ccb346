"""Scoring what is broken, on stores that fail and processes that die: nothing is lost, nothing is told wrong."""

import io
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest

import broken_images
import killing
from cluster import storage
from cluster.errors import StorageError
from cluster.progress import SILENT
from faulty_proxy import FAULTS, faulty_proxy
from models.config import ModelConfig, Transform
from models.inputs.decoding import Decoder
from models.inputs.image import UndecodableImage, evaluation_image
from pipeline.data import reader
from pipeline.data.rejects import REJECTS
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Score
from pipeline.scoring.beside import TABLE
from pipeline.scoring.ledger import RangeReader
from pipeline.scoring.score import score

TRANSFORM = Transform(size=28, resize=32)
CONFIG = ModelConfig(architecture="resnet8", options={"width": 4}, transform=TRANSFORM)
ROWS = 400
"""Of a range, at most."""
SETTINGS = Score(classes_per_image=3, batch_size=16, actors=1, cpus_per_actor=0.5, decode_seconds=0.3)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(partial(evaluation_image, transform=TRANSFORM, seconds=0.3), 0.3)


@pytest.mark.parametrize("way", broken_images.BROKEN)
def test_every_broken_image_has_its_true_reason(decoder: Decoder, way: str) -> None:
    reason, make = broken_images.BROKEN[way]
    data = make(random.Random(0))
    with pytest.raises(UndecodableImage) as caught:
        decoder(data)
    assert caught.value.reason == reason
    assert len(data) < 2**18  # hostile, not large


@pytest.mark.parametrize("way", broken_images.ODD)
def test_odd_images_decode_in_time_and_apart_as_well(decoder: Decoder, way: str) -> None:
    data = broken_images.ODD[way](random.Random(0))
    np.testing.assert_array_equal(decoder(data), evaluation_image(data, TRANSFORM))


@pytest.mark.parametrize("way", ["many scans", "hidden tiles"])
def test_a_decode_that_hangs_ends_at_its_limit_and_the_next_image_is_decoded(decoder: Decoder, way: str) -> None:
    rng = random.Random(0)
    good = broken_images.ODD["TIFF"](rng)
    decoder(good)  # its process has started
    begin = time.process_time(), os.times().children_user
    with pytest.raises(UndecodableImage, match=r"^slow: decoding took more than 0\.3 s"):
        decoder(broken_images.BROKEN[way][1](rng))
    assert time.process_time() - begin[0] + os.times().children_user - begin[1] < 5
    assert decoder(good).shape == (3, 28, 28)


def test_a_decoder_that_dies_is_a_reject_and_is_started_again() -> None:
    decoder = Decoder(_die_of_zeros, 1.0)
    good = b"II*\0" + b"1"
    assert decoder(good).tolist() == [0]
    with pytest.raises(UndecodableImage, match=r"^decode_error: the decoder ended with exit status -11"):
        decoder(b"II*\0" + b"0")
    assert decoder(good).tolist() == [0]


def _die_of_zeros(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    import ctypes

    if data.endswith(b"0"):
        ctypes.string_at(0)
    return np.zeros(1, np.uint8)


def read(source: ImageSource) -> Iterator[dict[str, object]]:
    """What the readers hand to the model, without Ray."""
    reader = RangeReader(source.reader, TRANSFORM, rows=ROWS, decode_seconds=0.3)
    for shard in source.shards():
        for table in reader.ranges([(0, shard)], {}):
            for row in table.to_pylist():
                yield row | {"shard": row["shards"][0]}


def good(count: int) -> list[bytes]:
    rng = random.Random(1)
    return [broken_images.jpeg(rng) for _ in range(count)]


def parquet(images: Sequence[bytes]) -> bytes:
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), sink)
    return bytes(sink.getvalue().to_pybytes())


def test_a_shard_that_changed_is_not_scored_under_the_old_listing(place: str) -> None:
    storage.publish(storage.join(place, "a.tar"), broken_images.tar(good(9)))
    storage.publish(storage.join(place, "b.tar"), broken_images.tar(good(5)))
    source = open_source("U", Source(uri=place))
    storage.publish(storage.join(place, "a.tar"), broken_images.tar(good(9)[::-1]))  # of the same size
    changed, same = read(source)
    assert (changed["shard"], changed["indices"], changed["last"], changed["missing"]) == ("a.tar", [], False, True)
    assert [r["reason"] for r in changed["rejects"]] == ["changed_shard"]  # type: ignore[attr-defined]
    assert (same["shard"], same["indices"], same["last"]) == ("b.tar", [0, 1, 2, 3, 4], True)


def test_a_shard_that_changes_while_it_is_read_is_not_scored(place: str) -> None:
    storage.publish(storage.join(place, "a.tar"), broken_images.tar(good(ROWS + 40)))
    tables = read(open_source("U", Source(uri=place)))
    assert len(next(tables)["indices"]) == ROWS  # type: ignore[arg-type]
    storage.publish(storage.join(place, "a.tar"), broken_images.tar(good(3)))
    rest = list(tables)
    assert [(r["start"], r["indices"], r["missing"]) for r in rest] == [(ROWS, [], True)]


def test_an_image_file_that_changed_is_a_reject(place: str) -> None:
    for number, data in enumerate(good(4)):
        storage.publish(storage.join(place, f"{number}.jpg"), data)
    source = open_source("U", Source(uri=place))
    listed = source.shards()[0].files
    storage.publish(storage.join(place, listed[2]), good(5)[4])
    (row,) = read(source)
    assert row["indices"] == [0, 1, 3]
    said = "the file changed since it was listed"
    found = [(r["index"], r["error"], r["file"]) for r in row["rejects"]]  # type: ignore[attr-defined]
    assert found == [(2, said, listed[2])]


DAMAGE: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "middle.tar": (lambda: _damaged(broken_images.tar(good(20))), 12, "unreadable_shard"),
    "cut.tar": (lambda: broken_images.tar(good(20))[:9000], 4, "unreadable_shard"),
    "names.tar": (lambda: _long_name(), 2, "unreadable_shard"),
    "mask.tar": (lambda: _members("0.png", "0.json", "1.mask.png"), 1, "unreadable_shard"),
    "labels.tar": (lambda: _members("0.cls", "0.png", "1.png"), 1, "unreadable_shard"),
    "first.tar": (lambda: _members("0.png"), 0, "unreadable_shard"),
    "cut.parquet": (lambda: parquet(good(20))[:-300], 0, "unreadable_shard"),
}


def _damaged(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :]


def _long_name() -> bytes:
    """A tar whose third image's name is said to have 2 GiB."""
    import tarfile

    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = b"L", 2**31
    return broken_images.tar(good(2), trailer=False) + header.tobuf(tarfile.GNU_FORMAT) + bytes(10240)


def _members(*names: str) -> bytes:
    """A tar of these files, images but for labels and JSON, and then damage."""
    import tarfile

    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name in names:
            member, content = tarfile.TarInfo(name), good(1)[0] if name.endswith("png") else b"1"
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        end = archive.offset
    return sink.getvalue()[:end] + b"\xff" * 1024 + bytes(10240)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_keeps_its_good_rows_and_says_what_it_is(tmp_path: Path, name: str) -> None:
    make, whole_rows, reason = DAMAGE[name]
    storage.publish(f"{tmp_path}/{name}", make())
    (row,) = read(open_source("U", Source(uri=str(tmp_path))))
    assert row["indices"] == list(range(whole_rows))
    whole = [r for r in row["rejects"] if r["index"] is None]  # type: ignore[attr-defined]
    assert [r["reason"] for r in whole] == [reason]
    assert row["last"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    from models.architectures import build
    from models.directory import save

    torch.manual_seed(0)
    uri = str(tmp_path_factory.mktemp("model") / "teacher")
    save(uri, build(CONFIG, 4), config=CONFIG, class_names=list("abcd"), metrics={}, provenance={})
    return uri


BROKEN_IMAGES, IMAGES = 60, 600


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], str]]:
    """600 images in 15 shards, a tenth of them broken in every way; which, and why."""
    root = tmp_path_factory.mktemp("pool")
    expected: dict[tuple[str, int], str] = {}
    for number, rows in enumerate(broken_images.shards(0, IMAGES, 40, BROKEN_IMAGES / IMAGES, slow=1)):
        (root / f"{number:02d}.tar").write_bytes(broken_images.tar([data for data, _ in rows]))
        expected |= {(f"{number:02d}.tar", index): reason for index, (_, reason) in enumerate(rows) if reason}
    return root, expected


def command(teacher: str, source: str, out: str) -> list[str]:
    chosen = ("classes_per_image", "batch_size", "actors", "cpus_per_actor", "decode_seconds")
    sets = [part for name in chosen for part in ("--set", f"{name}={getattr(SETTINGS, name)}")]
    return ["--model", teacher, "--source", source, "--out", out, *sets]


@pytest.fixture(scope="module")
def undisturbed(
    pool: tuple[Path, dict[tuple[str, int], str]],
    teacher: str,
    tmp_path_factory: pytest.TempPathFactory,
    ray_local: None,
) -> str:
    out = str(tmp_path_factory.mktemp("scored") / "scores")
    source = open_source("U", Source(uri=str(pool[0])))
    found = score(source, teacher, storage.join(out, TABLE), storage.join(out, REJECTS), SETTINGS, SILENT)
    assert (found.listed, found.scored, found.rejected) == (IMAGES, IMAGES - BROKEN_IMAGES, BROKEN_IMAGES)
    return out


@pytest.mark.slow
def test_no_good_image_is_missing_and_every_broken_one_says_why(
    pool: tuple[Path, dict[tuple[str, int], str]], undisturbed: str
) -> None:
    expected = pool[1]
    assert {reason for reason, _ in broken_images.BROKEN.values()} == set(expected.values())
    assert {(shard, index): reason for shard, index, reason in killing.rejects(undisturbed)} == expected
    table = killing.table(undisturbed)
    scored = set(zip(table["shard"].to_pylist(), table["index"].to_pylist(), strict=True))
    assert len(scored) == table.num_rows == IMAGES - BROKEN_IMAGES
    assert not scored & expected.keys()


@pytest.mark.slow
def test_whatever_is_killed_the_rows_are_the_same(
    pool: tuple[Path, dict[tuple[str, int], str]], teacher: str, undisturbed: str, tmp_path: Path
) -> None:
    expected, broken = killing.table(undisturbed), killing.rejects(undisturbed)
    out = str(tmp_path / "scores")
    with killing.Fleet() as fleet:
        driver = fleet.start(command(teacher, str(pool[0]), out))
        for kind in ("reader", "actor", "raylet", "driver"):
            assert fleet.kill(kind, driver, patience=120), f"no {kind} to kill"
        driver.communicate()
        assert driver.returncode == -signal.SIGKILL
        fleet.score(command(teacher, str(pool[0]), out))
    assert killing.table(out).equals(expected)
    assert killing.rejects(out) == broken


@pytest.mark.slow
def test_a_store_with_faults_gives_the_same_rows(
    pool: tuple[Path, dict[tuple[str, int], str]], teacher: str, undisturbed: str, s3: str
) -> None:
    for file in pool[0].iterdir():
        storage.publish(storage.join(s3, "u", file.name), file)
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    out = storage.join(s3, "scores")
    with (
        faulty_proxy(port, 0.2, stall=2.0) as proxy,
        killing.environment(AWS_ENDPOINT_URL=proxy.url, TOPHAT_S3_TIMEOUT="1"),
    ):
        killing.score_alone(command(teacher, storage.join(s3, "u"), out))
    assert set(proxy.injected) == set(FAULTS)
    assert killing.table(out).equals(killing.table(undisturbed))
    assert killing.rejects(out) == killing.rejects(undisturbed)


@pytest.mark.slow
def test_reads_and_writes_outlast_faults_and_a_stall_is_cut(s3: str) -> None:
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    content = random.Random(0).randbytes(200_000)
    with (
        faulty_proxy(port, 0.3, stall=30.0) as proxy,
        killing.environment(AWS_ENDPOINT_URL=proxy.url, TOPHAT_S3_TIMEOUT="1"),
    ):
        begin = time.monotonic()
        for number in range(12):
            storage.publish(storage.join(s3, f"{number}"), content)
            assert storage.read_bytes(storage.join(s3, f"{number}")) == content
        assert len(storage.list_files(s3)) == 12
        assert time.monotonic() - begin < 30 * proxy.injected["stall"]
    assert set(proxy.injected) == set(FAULTS)


@pytest.mark.parametrize(("share", "requests"), [(0.0, 12), pytest.param(0.4, 200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_shard_is_read_in_few_requests_and_outlasts_faults(s3: str, layout: str, share: float, requests: int) -> None:
    images = [random.Random(number).randbytes(100_000) for number in range(100)]
    name, content = ("a.tar", broken_images.tar(images)) if layout == "webdataset" else ("a.parquet", parquet(images))
    storage.publish(storage.join(s3, name), content)
    shard = open_source("U", Source(uri=s3)).shards()[0]
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with (
        faulty_proxy(port, share, seed=3, stall=2.0) as proxy,
        killing.environment(AWS_ENDPOINT_URL=proxy.url, TOPHAT_S3_TIMEOUT="1"),
    ):
        source = open_source("U", Source(uri=s3))
        listed = proxy.requests
        assert [row.data for row in source.reader.read(shard)] == images
        assert proxy.requests - listed <= requests
        assert bool(proxy.injected) == bool(share)


class Flaky:
    """An opened object whose every second read meets an outage, as pyarrow reports one."""

    def __init__(self, content: bytes) -> None:
        self._file = pa.BufferReader(content)
        self.calls: list[int] = []

    def size(self) -> int:
        return int(self._file.size())

    def read_at(self, size: int, offset: int) -> bytes:
        self.calls.append(offset)
        if len(self.calls) % 2:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56")
        return bytes(self._file.read_at(size, offset))

    def close(self) -> None:
        self._file.close()


def test_a_failed_read_goes_on_at_its_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "RETRY_SECONDS", (0.0, 0.0))
    content = random.Random(0).randbytes(10_000)
    flaky = Flaky(content)
    with io.BufferedReader(reader._RemoteFile("s3://bucket/a", flaky), 4000) as file:
        assert b"".join(iter(lambda: file.read(700), b"")) == content
    assert flaky.calls == [0, 0, 4000, 4000, 8000, 8000]

    def outage() -> None:
        raise OSError("AWS Error SLOW_DOWN")

    def damage() -> None:
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(StorageError, match=r"^source = 's3://bucket/a': could not be read in 3 attempts \(AWS Error"):
        reader._asked("s3://bucket/a", outage)
    with pytest.raises(FileNotFoundError):
        reader._asked("s3://bucket/a", damage)


def test_a_timeout_that_cannot_be(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPHAT_S3_TIMEOUT", "soon")
    with pytest.raises(StorageError, match=r"^TOPHAT_S3_TIMEOUT = 'soon': must be from 1 to 3600 seconds"):
        storage.read_bytes(storage.join(s3, "x"))
