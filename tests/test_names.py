"""What lies beside a score table and a selection, and the names of the images in it."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from cluster import storage
from cluster.errors import RunError, SourceError
from models.card import read_card
from pipeline.data.rejects import Reject, publish_rejects, read_rejects, some_rejects
from pipeline.data.shards import Shard
from pipeline.data.sources import open_source
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Score
from pipeline.scoring import beside
from pipeline.selection.record import FILES, check_whole, files_table, read_record
from pipeline.selection.select import ENCODED, RECORD, SCHEMA
from runs import Finished

Answer = tuple[int, str, str]
HOSTILE = ['<img src=x onerror="pwned=1">.png', "\x1b[31m red,\n.png", 'quoted "name".png']


def hostile_files(root: Path) -> str:
    """A flat folder of digits, three of them with hostile names, and one that is no image."""
    root.mkdir()
    for number, name in enumerate([*HOSTILE, *(f"{n:02d}.png" for n in range(17))]):
        (root / name).write_bytes(tiny.digits()["zero"][number])
    (root / "\x1b]0;broken.png").write_bytes(b"no image")
    return str(root)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_teacher(str(tmp_path_factory.mktemp("teacher")))


# Names of rows


def test_rows_know_their_files(tmp_path: Path) -> None:
    source = open_source("U", Source(uri=hostile_files(tmp_path / "pool")))
    (shard,) = source.shards()
    assert [row.file for row in source.read(shard.name)] == list(shard.files)
    tiny.write_tar(tmp_path / "tars" / "a b.tar", tiny.digits()["one"][:2])
    (tar,) = open_source("U", Source(uri=str(tmp_path / "tars"))).shards()
    read = open_source("U", Source(uri=str(tmp_path / "tars"))).read(tar.name)
    assert [row.file for row in read] == ["a b.tar/0000.png", "a b.tar/0001.png"]


def test_a_member_of_a_tar_whose_name_is_no_text(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("caf\udce9.png")  # a byte of Latin-1
        member.size = 1
        archive.addfile(member, io.BytesIO(b"a"))
    (row,) = open_source("U", Source(uri=str(tmp_path))).read("x.tar")
    assert row.file == "x.tar/caf\\xe9.png"


def test_rejects_have_names_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    named = [
        Reject("files-000000", 3, "truncated", "ends early", HOSTILE[0]),
        Reject("a.tar", None, "missing_shard", ""),
    ]
    publish_rejects(str(tmp_path / "r" / "1.parquet"), named)
    old = pa.table({"shard": ["b.tar"], "index": pa.array([7], pa.uint32()), "reason": ["empty"], "error": [""]})
    pq.write_table(old, tmp_path / "r" / "2.parquet")
    counts, rows = read_rejects(str(tmp_path / "r"), limit=9)
    assert rows == [*named, Reject("b.tar", 7, "empty", "")]
    assert sum(counts.values()) == 3
    assert [row.where for row in rows] == [HOSTILE[0], "a.tar", "b.tar [7]"]
    (tmp_path / "r" / "3.parquet").write_bytes(b"never read")
    assert some_rejects(str(tmp_path / "r"), 3) == rows
    assert some_rejects(str(tmp_path / "r"), 1) == rows[:1]


# Names beside a selection


def selection_of(rows: list[tuple[int, int, float, str, int]]) -> pa.Table:
    table = pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
    return table.set_column(3, ENCODED.field(3), table["shard"].dictionary_encode())


def test_the_files_of_a_selection() -> None:
    shards = [Shard("files-000000", 1, "", ("a", "b,c")), Shard("files-000001", 1, "", ("d",))]
    chosen = selection_of(
        [(0, 0, 0.5, "files-000001", 0), (0, 1, 0.25, "files-000000", 1), (2, 0, 0.5, "files-000000", 0)]
    )
    named = files_table(chosen, shards, ["x", "y", "<z>"])
    assert named.to_pylist() == [
        {"class": "x", "rank": 0, "score": 0.5, "file": "d"},
        {"class": "x", "rank": 1, "score": 0.25, "file": "b,c"},
        {"class": "<z>", "rank": 0, "score": 0.5, "file": "a"},
    ]
    assert files_table(chosen, shards, None)["class"].to_pylist() == ["0", "0", "2"]
    for lost in (("files-000001", 1), ("files-000009", 0)):
        with pytest.raises(SourceError, match="is not an image of the source"):
            files_table(selection_of([(0, 0, 0.5, *lost)]), shards, None)


# Score tables


def test_a_table_is_found_by_either_folder(place: str, model: str, folders: Path) -> None:
    source = open_source("U", Source(uri=str(folders / "unlabeled")))
    made = storage.join(place, "scores")
    beside.claim("--out", made, model, source, Score(classes_per_image=2))
    for uri in (made, f"{made}/", f"{made}/table", f"{made}/table/"):
        found = beside.find(uri)
        assert (found.table, found.folder, found.rejects) == (f"{made}/table", made, f"{made}/rejects")
        listing, record = found.listing(), found.record()
        assert listing == source
        assert record == beside.Record(
            read_card(model).fingerprint, source.fingerprint(), tiny.CLASSES, {"classes_per_image": 2}
        )
    alone = beside.find(f"{place}/table")  # a table of that name, with nothing beside it
    assert (alone.table, alone.folder, alone.listing(), alone.record()) == (f"{place}/table", None, None, None)


def test_a_table_of_an_earlier_version(tmp_path: Path, model: str, folders: Path) -> None:
    source = open_source("U", Source(uri=str(folders / "unlabeled")))
    said = {"model": "m", "source": source.fingerprint(), "classes_per_image": 2}
    (tmp_path / beside.OWNER).write_text(json.dumps(said))
    found = beside.find(str(tmp_path))
    assert (found.table, found.said(), found.record(), found.listing()) == (str(tmp_path), said, None, None)
    with pytest.raises(RunError, match="holds scores of an earlier version"):
        beside.claim("--out", str(tmp_path), model, source, Score(classes_per_image=2))


def test_a_listing_that_was_not_written_is_written_by_the_next_attempt(
    tmp_path: Path, model: str, folders: Path
) -> None:
    source, uri = open_source("U", Source(uri=str(folders / "unlabeled"))), str(tmp_path / "s")
    beside.claim("--out", uri, model, source, Score())
    (tmp_path / "s" / beside.LISTING).unlink()
    beside.claim("--out", uri, model, source, Score())
    assert beside.find(uri).listing() == source


# The commands


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return hostile_files(tmp_path_factory.mktemp("hostile") / "pool")


@pytest.mark.usefixtures("ray_local")
def test_scores_and_a_selection_say_which_files(
    tophat: Callable[..., Answer], pool: str, model: str, tmp_path: Path
) -> None:
    import duckdb

    scores, picked = str(tmp_path / "scores"), str(tmp_path / "picked")
    code, output, errors = tophat(
        "score", "--model", model, "--source", pool, "--out", scores, "--classes-per-image", "2"
    )
    assert code == 0, errors
    assert r"    \x1b]0;broken.png: not_an_image" in output
    assert "\x1b" not in output

    # A glob over the table reads scores and nothing else; the listing gives the file of each.
    table = pq.read_table(f"{scores}/table").to_pylist()
    assert len(table) == 20
    query = (
        "SELECT l.files[s.index + 1] AS file "
        f"FROM '{scores}/table/**/*.parquet' s JOIN '{scores}/listing.parquet' l USING (shard)"
    )
    joined = [file for (file,) in duckdb.connect().execute(query).fetchall()]
    assert sorted(joined) == sorted(p.name for p in Path(pool).iterdir() if "broken" not in p.name)
    listing = {row["shard"]: row["files"] for row in pq.read_table(f"{scores}/listing.parquet").to_pylist()}
    assert sorted(listing[row["shard"]][row["index"]] for row in table) == sorted(joined)
    assert [row.file for row in read_rejects(f"{scores}/rejects", limit=9)[1]] == ["\x1b]0;broken.png"]

    code, output, errors = tophat(
        *("select", "--scores", scores, "--out", picked, "--images-per-class", "30"),
        "--gallery",
        str(tmp_path / "show"),
    )
    assert code == 0, errors
    for name in tiny.CLASSES:
        assert f"\n  {name} " in output
    assert f"files: {picked}/_files.csv" in output
    selection = pq.read_table(picked).to_pylist()
    with open(f"{picked}/{FILES}", newline="") as file:
        files = list(csv.DictReader(file))
    assert [row["file"] for row in files] == [listing[row["shard"]][row["index"]] for row in selection]
    assert [row["class"] for row in files] == [tiny.CLASSES[row["class_id"]] for row in selection]
    assert set(HOSTILE) <= {row["file"] for row in files}

    record = read_record("--", picked)
    assert (record.classes, record.root, record.settings) == (tiny.CLASSES, pool, {"images_per_class": 30})
    check_whole("--", picked, record)
    page = (tmp_path / "show" / "page-0001.html").read_text()
    assert "<bdi>zero</bdi>" in page
    assert "&lt;img src=x onerror=&#34;pwned=1&#34;&gt;.png" in page
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert not (tmp_path / "show" / "copies").exists()

    code, output, errors = tophat(
        *(
            "select",
            "--scores",
            f"{scores}/table",
            "--out",
            picked,
            "--images-per-class",
            "3",
            "--images-per-class",
            "5",
        ),
        *("--gallery", str(tmp_path / "several")),
    )
    assert code == 0, errors
    assert "Lowest score of each class" in output
    assert (tmp_path / "several" / "P-K5" / "index.html").exists()
    assert read_record("--", f"{picked}/P-K3").settings == {"images_per_class": 3}


@pytest.mark.usefixtures("ray_local")
def test_a_table_alone_has_no_gallery(tophat: Callable[..., Answer], finished: Finished, tmp_path: Path) -> None:
    alone = tmp_path / "old"
    for path in Path(finished.stages["scores"].outputs.uri).rglob("*.parquet"):
        (alone / path.parent.name).mkdir(parents=True, exist_ok=True)
        (alone / path.parent.name / path.name).write_bytes(path.read_bytes())
    (alone / "_rejects").mkdir()
    publish_rejects(str(alone / "_rejects" / "x.parquet"), [Reject("s", 0, "empty", "")])
    words = ("select", "--scores", str(alone), "--out", str(tmp_path / "out"), "--images-per-class", "4")
    code, _, errors = tophat(*words, "--gallery", str(tmp_path / "g"))
    assert code == 2
    assert "--gallery" in errors
    assert "no listing of the images lies beside these scores" in errors
    code, output, errors = tophat(*words)
    assert code == 0, errors
    assert "candidates: 300 = 12 selected" in output
    assert not (tmp_path / "out" / FILES).exists()
    said: dict[str, Any] = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (said["classes"], said["source"]) == (None, None)


@pytest.mark.usefixtures("ray_local")
def test_a_gallery_overwrites_nothing(tophat: Callable[..., Answer], finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    scores = str(Path(finished.uri, "scores"))  # a link into the store
    words = ("select", "--scores", scores, "--out", str(tmp_path / "out"), "--images-per-class", "4")
    code, _, errors = tophat(*words, "--gallery", str(tmp_path / "mine"))
    assert (code, "holds files that are no gallery" in errors) == (2, True)
    code, _, errors = tophat(*words, "--out", str(tmp_path / "mine"))
    assert (code, "holds files that are no selection" in errors) == (2, True)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["index.html"]
    for _ in range(2):
        code, _, errors = tophat(*words, "--gallery", str(tmp_path / "own"))
        assert code == 0, errors


@pytest.mark.usefixtures("ray_local")
def test_a_run_shows_files(finished: Finished) -> None:
    page = Path(finished.uri, "gallery", "page-0001.html").read_text()
    (one, *_) = read_rejects(f"{finished.uri}/rejects", limit=1)[1]
    assert one.file in tiny.BROKEN
    copies = pq.read_table(finished.stages["dhat"].uri).to_pylist()
    listing = beside.find(f"{finished.uri}/scores").listing()
    assert listing is not None
    files = {(shard.name, index): file for shard in listing.shards() for index, file in enumerate(shard.files)}
    assert [row["file"] for row in copies] == [files[row["shard"], row["index"]] for row in copies]
    best = next(row for row in copies if row["rank"] == 0)
    assert f"<bdi>{best['file']}</bdi>" in page
    assert f"<code>{one.file}</code>" in Path(finished.uri, "report", "index.html").read_text()
    with Path(finished.uri, "selection", FILES).open(newline="") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {row["file"] for row in copies}
