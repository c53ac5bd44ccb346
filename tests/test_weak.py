"""Weakly labeled data: the rule of supplement 4.1 against brute force, then tags of real images wherever they come from."""

import io
import itertools
import json
import tarfile
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from snowballstemmer import stemmer

import tiny
from cluster import storage
from cluster.errors import InputError, SourceError
from models.config import Transform
from models.inputs.image import evaluation_image
from pipeline.data.rejects import read_rejects
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source
from pipeline.selection.select import read_selection, select
from pipeline.selection.tags import FUNCTION_WORDS, Matched, Matcher, match_tags
from pipeline.selection.weak import weak_training_set

STEM = stemmer("english").stemWord


def test_the_example_of_the_paper() -> None:
    matcher = Matcher(["riding a bike", "playing the guitar"])
    for tag in ("playingtheguitar", "playguitar", "playingguitar", "guitarplaying", "guitarplay", "#TheGuitarPlaying"):
        assert matcher.classes(tag) == (1,), tag
    for tag in (
        "guitar",
        "playing",
        "the",
        "playtheguitarthe",
        "playguitars",
        "playguitarplay",
        "aplayguitar",
        "#",
        "",
    ):
        assert matcher.classes(tag) == (), tag


def test_what_separates_words_in_names_and_means_nothing_in_tags() -> None:
    names = [
        "Jack-o'-lantern",
        "ice_cream (cone)",
        "great white shark, White Shark",
        "Küchenuhr",
        "on and off",
        "C-3",
        "?!",
    ]
    matcher = Matcher(names)
    found = {
        "#JackOLantern": 0,
        "Jack-O'-Lantern": 0,
        "cone ice cream": 1,
        "WHITE_SHARK": 2,
        "greatwhiteshark": 2,
        "Ku\u0308chenuhr": 3,
        "ONANDOFF": 4,
        "c3": 5,
        "3c": 5,
    }
    assert {tag: matcher.classes(tag) for tag in found} == {tag: (number,) for tag, number in found.items()}
    # Function words are left out only where a word stays that is none.
    assert Matcher(["the", "on and the"]).classes("on") == ()
    assert Matcher(["the", "on and the"]).classes("the") == (0,)


def test_a_tag_may_mean_several_classes() -> None:
    assert Matcher(["crane", "dog", "crane, bird", "bird of crane"]).classes("Crane") == (0, 2)
    assert Matcher(["hot dog", "dog hot", "dogs, hot dogs"]).classes("dogHot") == (0, 1, 2)


def spelled(name: str) -> set[str]:
    """Every tag that means a name of plain words, by enumeration."""
    found = set()
    for synonym in name.split(","):
        words = synonym.split()
        optional = FUNCTION_WORDS if set(words) - FUNCTION_WORDS else frozenset()
        forms = [{word, STEM(word), *([""] if word in optional else [])} for word in words]
        for chosen in itertools.product(*forms):
            found |= {"".join(order) for order in itertools.permutations(chosen)}
    return found - {""}


WORDS = st.sampled_from(
    ["a", "the", "of", "aa", "ab", "ba", "b", "abs", "tabs", "ties", "thea", "eating", "eat", "sing"]
)
NAME = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=2).map(",".join)


@given(st.lists(NAME, min_size=1, max_size=4), st.data())
def test_a_matcher_finds_what_enumeration_finds(names: list[str], data: st.DataObject) -> None:
    every = [spelled(name) for name in names]
    matcher = Matcher(names)
    for tag in set().union(*every):
        assert matcher.classes(tag) == tuple(n for n, tags in enumerate(every) if tag in tags), tag
    tag = data.draw(st.lists(WORDS, max_size=5).map("".join))
    assert matcher.classes(tag) == tuple(n for n, tags in enumerate(every) if tag in tags)


def test_names_may_have_many_words() -> None:
    words = [f"w{number:02d}" for number in range(40)]
    matcher = Matcher([" ".join(words), " ".join(words[:39])])
    assert matcher.classes("".join(reversed(words))) == (0,)
    assert matcher.classes("".join(words[1:])) == ()
    assert matcher.classes("w00" * 100_000) == ()


# Images


CLASSES = ("zero", "one, uno", "two", "playing the guitar", "nobody")
TAGS: tuple[list[str], ...] = (
    ["#Zero", "nice"],
    ["UNO", "two", "one"],
    ["ones", "zeros"],
    ["GuitarPlaying", "zero"],
    [],
    ["two"],  # cannot be decoded
    ["Two", "#two"],
    ["one"],
)
WANTED = ((0,), (1, 2), (), (0, 3), (), (2,), (2,), (1,))
BROKEN = 5
MATCHED = Matched(images=8, tagged=5, rejected=1, per_class=(2, 2, 2, 1, 0))


@cache
def images() -> list[bytes]:
    found = list(tiny.digits()["zero"][: len(TAGS)])
    found[BROKEN] = tiny.BROKEN["cut.png"]
    return found


def tar(samples: list[tuple[int, bytes, list[str]]]) -> bytes:
    """Samples whose tags are in a `.txt` or, where their number is odd, in a `.json`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, image, tags in samples:
            beside = ("json", json.dumps({"tags": tags})) if number % 2 else ("txt", ", ".join(tags))
            for suffix, content in (("png", image), (beside[0], beside[1].encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def publish_table(uri: str, columns: dict[str, Any], **types: pa.DataType) -> None:
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2)
    storage.publish(uri, sink.getvalue().to_pybytes())


def write(uri: str, layout: str) -> ImageSource:
    """The images, with their tags, in two shards or in one virtual one."""
    samples = list(zip(range(len(TAGS)), images(), TAGS, strict=True))
    if layout == "webdataset":
        storage.publish(f"{uri}/a.tar", tar(samples[:3]))
        storage.publish(f"{uri}/b.tar", tar(samples[3:]))
    elif layout == "parquet":
        for name, part in (("a", samples[:3]), ("b", samples[3:])):
            columns = {"image": [image for _, image, _ in part], "tags": [tags for _, _, tags in part]}
            publish_table(f"{uri}/{name}.parquet", columns, tags=pa.list_(pa.string()))
    else:
        for number, image, tags in samples:
            storage.publish(f"{uri}/{number:04d}.png", image)
            if tags:
                storage.publish(f"{uri}/{number:04d}.txt", " ".join(tags).encode())
    return open_source("weak", Source(uri=uri))


def places(source: ImageSource) -> list[tuple[str, int]]:
    """Shard and index of each image, in the order of `TAGS`."""
    found = {row.data: (shard.name, row.index) for shard in source.shards() for row in source.read(shard.name)}
    return [found[image] for image in images()]


def table_rows(uri: str) -> list[dict[str, Any]]:
    found = []
    for file in storage.list_files(uri, ".parquet"):
        if not file.path.startswith("_"):
            with storage.open_input(f"{uri}/{file.path}") as content:
                table = pq.read_table(content)
            assert table.schema.types == [pa.string(), pa.uint32(), pa.list_(pa.int32())]
            assert table.schema.metadata[b"tophat.num_classes"] == b"5"
            found += table.to_pylist()
    return found


def content(uri: str) -> dict[str, bytes]:
    return {file.path: storage.read_bytes(f"{uri}/{file.path}") for file in storage.list_files(uri)}


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("layout", ["webdataset", "parquet", "folder"])
def test_tags_in_the_source(place: str, layout: str) -> None:
    source = write(f"{place}/w", layout)
    matched = match_tags("teacher.tags", source, CLASSES, f"{place}/out", f"{place}/rejects")
    assert matched == MATCHED
    assert matched.without_images(CLASSES) == ("nobody",)
    assert Matched(**json.loads(json.dumps(asdict(matched)))).tagged == 5
    wanted = {
        (shard, index, ids)
        for number, ((shard, index), ids) in enumerate(zip(places(source), WANTED, strict=True))
        if ids and number != BROKEN
    }
    rows = [(row["shard"], row["index"], tuple(row["class_ids"])) for row in table_rows(f"{place}/out")]
    assert set(rows) == wanted
    assert rows == sorted(rows)
    counts, rejects = read_rejects(f"{place}/rejects", limit=9)
    assert [(r.shard, r.index) for r in rejects] == [places(source)[BROKEN]]
    assert sum(counts.values()) == 1

    data = weak_training_set(f"{place}/out", source, len(CLASSES))
    assert data.images == 7
    transform = Transform(size=28, resize=28, crop="pad")
    expected: Counter[tuple[bytes, int]] = Counter()
    for shard, index, ids in wanted:
        (row,) = source.read(shard, [index])
        expected.update((evaluation_image(row.data, transform).tobytes(), number) for number in ids)
    seen: Counter[tuple[bytes, int]] = Counter()
    for pixels, labels in data.evaluation_batches(transform, batch_size=2, rank=0, world=1):
        seen.update((image.numpy().tobytes(), n) for image, n in zip(pixels, labels.tolist(), strict=True))
    assert seen == expected


@pytest.mark.usefixtures("ray_local")
def test_tables_of_tags_give_the_same_bytes_however_they_are_cut(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(f"{place}/w", "webdataset")
    assert match_tags("tags", source, CLASSES, f"{place}/sidecars", f"{place}/rejects") == MATCHED
    wanted = content(f"{place}/sidecars")
    assert len(wanted) == 2
    order = [6, 2, 0, 7, 1, 4, 3, 5]
    rows: dict[str, list[Any]] = {
        "shard": [places(source)[n][0] for n in order],
        "index": [places(source)[n][1] for n in order],
    }
    whole = {**rows, "tags": [TAGS[n] for n in order]}
    publish_table(f"{place}/lists.parquet", whole, index=pa.uint32(), tags=pa.list_(pa.string()))
    publish_table(f"{place}/texts/x/1.parquet", {**rows, "tags": [", ".join(TAGS[n]) or None for n in order]})
    ids = {**rows, "class_ids": [WANTED[n][::-1] * 2 for n in order]}
    publish_table(f"{place}/ids/1.parquet", ids, index=pa.uint32(), class_ids=pa.list_(pa.int32()))
    monkeypatch.setattr("pipeline.selection.tags.TASK_BYTES", 1000)
    for number, row in enumerate(order):  # each image's tags in two files, some of them in both
        one = {name: [values[number]] * 2 for name, values in whole.items()}
        one["tags"] = [TAGS[row][:1], TAGS[row][::-1]]
        publish_table(f"{place}/cut/{number}.parquet", one, tags=pa.list_(pa.string()))
    for name, read in (("lists.parquet", 8), ("texts", 8), ("ids", 8), ("cut", 16)):
        found = match_tags("tags", source, CLASSES, f"{place}/out", f"{place}/rejects", tags_uri=f"{place}/{name}")
        assert found == Matched(read, 5, 1, MATCHED.per_class), name
        assert content(f"{place}/out") == wanted, name


@pytest.mark.usefixtures("ray_local")
def test_matched_tags_are_what_selection_reads(tmp_path: Path) -> None:
    source = write(f"{tmp_path}/w", "webdataset")
    match_tags("tags", source, CLASSES, f"{tmp_path}/out", f"{tmp_path}/rejects")
    selected = select(
        f"{tmp_path}/out", f"{tmp_path}/selection", images_per_class=9, tags=True, num_classes=len(CLASSES)
    )
    assert (selected.images, selected.candidates) == (5, 7)
    assert Counter(read_selection(f"{tmp_path}/selection")["class_id"].to_pylist()) == {0: 2, 1: 2, 2: 2, 3: 1}


@pytest.mark.usefixtures("ray_local")
def test_shards_that_cannot_be_read_are_rejects(tmp_path: Path) -> None:
    source = write(f"{tmp_path}/w", "webdataset")
    (tmp_path / "w/b.tar").write_bytes((tmp_path / "w/b.tar").read_bytes()[:3000])  # its first sample is whole
    assert match_tags("tags", source, CLASSES, f"{tmp_path}/out", f"{tmp_path}/rejects") == Matched(
        5, 3, 1, (2, 1, 1, 1, 0)
    )
    _, rejects = read_rejects(f"{tmp_path}/rejects", limit=9)
    assert [(r.shard, r.index, r.reason) for r in rejects] == [("b.tar", None, "unreadable_shard")]
    table = {"shard": ["a.tar", "b.tar", "b.tar", "b.tar"], "index": [0, 0, 2, 4], "tags": ["zero"] * 4}
    publish_table(f"{tmp_path}/tags.parquet", table)
    matched = match_tags(
        "tags", source, CLASSES, f"{tmp_path}/out", f"{tmp_path}/rejects", tags_uri=f"{tmp_path}/tags.parquet"
    )
    assert matched == Matched(4, 2, 2, (2, 0, 0, 0, 0))
    _, rejects = read_rejects(f"{tmp_path}/rejects", limit=9)
    assert [(r.shard, r.index, r.reason) for r in rejects] == [("b.tar", n, "unreadable_shard") for n in (2, 4)]


@pytest.mark.usefixtures("ray_local")
def test_bad_tables_of_tags_are_told_in_one_line(tmp_path: Path) -> None:
    source = write(f"{tmp_path}/w", "webdataset")
    rows = {"shard": ["a.tar", "a.tar"], "index": [0, 1]}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {**rows, "words": ["a", "b"]},
            "must have one column `tags`, and has shard, index, words; write shard string, index",
        ),
        ({"shard": ["a.tar"], "tags": ["zero"]}, "must have one column `index`"),
        ({**rows, "tags": [1, 2]}, "has a column `tags` of type int64; write shard string"),
        ({**rows, "class_ids": ["1", "2"]}, "has a column `class_ids` of type string"),
        ({**rows, "class_ids": [[0], [5]]}, r"\(holds class id 5, and ids must be from 0 to 4\)"),
        ({"shard": ["a.tar"], "index": [-1], "tags": ["zero"]}, r"tags.parquet': cannot be used \(.*-1"),
        (
            {"shard": ["a.tar", "b"], "index": [0, None], "tags": ["zero", ""]},
            "names the shard 'b', which the source does not",
        ),
        ({"shard": ["a.tar", None], "index": [0, 0], "tags": ["zero", ""]}, "names the shard None"),
        ({"shard": ["a.tar", "a.tar"], "index": [0, None], "tags": ["zero", ""]}, "null values in `index`"),
        (
            {"shard": ["b.tar"], "index": [7], "tags": ["zero"]},
            "has a tag for image 7 of 'b.tar', which has fewer images",
        ),
        ({**rows, "tags": ["", None]}, "has no tags: none of 2 images has one; give a Parquet file of tags"),
        (
            {**rows, "tags": ["cat #cat", "Dog"]},
            r"gives no usable image a class: 2 images have 3 tags \('cat', '#cat', 'Dog', ...\); compare the tags with",
        ),
        (
            {"shard": ["b.tar"], "index": [2], "tags": ["zero"]},
            r"1 images have 1 tags \('zero', ...\); 1 rejects, see .*/rej",
        ),
    ]
    for columns, message in cases:
        publish_table(f"{tmp_path}/tags.parquet", columns)
        with pytest.raises(SourceError, match=f"^select.tags = .*{message}") as caught:
            match_tags(
                "select.tags",
                source,
                CLASSES,
                f"{tmp_path}/out",
                f"{tmp_path}/rejects",
                tags_uri=f"{tmp_path}/tags.parquet",
            )
        assert "\n" not in str(caught.value)
    (tmp_path / "tags.parquet").write_bytes(b"PAR1 no more than this")
    with pytest.raises(SourceError, match=r"tags.parquet': cannot be used \(Parquet"):
        match_tags(
            "select.tags",
            source,
            CLASSES,
            f"{tmp_path}/out",
            f"{tmp_path}/rejects",
            tags_uri=f"{tmp_path}/tags.parquet",
        )


@pytest.mark.usefixtures("ray_local")
def test_folders_that_cannot_be_used_are_told_in_one_line(tmp_path: Path) -> None:
    source = write(f"{tmp_path}/w", "webdataset")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no Parquet files; give a Parquet file of tags, or a folder"):
        match_tags("tags", source, CLASSES, f"{tmp_path}/out", f"{tmp_path}/rejects", tags_uri=f"{tmp_path}/empty")
    with pytest.raises(InputError, match="does not exist"):
        match_tags(
            "tags", source, CLASSES, f"{tmp_path}/out", f"{tmp_path}/rejects", tags_uri=f"{tmp_path}/none.parquet"
        )
    publish_table(f"{tmp_path}/tags/1.parquet", {"shard": ["a.tar"], "index": [0], "tags": ["zero"]})
    with pytest.raises(InputError, match="is inside the table of tags"):
        match_tags("tags", source, CLASSES, f"{tmp_path}/tags/out", f"{tmp_path}/rejects", tags_uri=f"{tmp_path}/tags")
    with pytest.raises(InputError, match=r"1.parquet': cannot be used \(not of matched tags\); give another folder"):
        match_tags("tags", source, CLASSES, f"{tmp_path}/tags", f"{tmp_path}/rejects")
    assert (tmp_path / "tags/1.parquet").exists()
    tiny.write_tar(tmp_path / "plain/a.tar", images())
    plain = open_source("weak", Source(uri=str(tmp_path / "plain")))
    with pytest.raises(SourceError, match=r"^tags = .*plain': has no tags: none of 8 images has one; give a Parquet"):
        match_tags("tags", plain, CLASSES, f"{tmp_path}/out", f"{tmp_path}/rejects")


def test_a_folder_of_other_tags_is_no_training_set(tmp_path: Path) -> None:
    source = write(f"{tmp_path}/w", "webdataset")
    with pytest.raises(SourceError, match="holds no Parquet files; match the tags"):
        weak_training_set(f"{tmp_path}/out", source, 5)
    publish_table(f"{tmp_path}/out/part.parquet", {"shard": ["a.tar"], "index": [0], "class_ids": [[0]]})
    with pytest.raises(SourceError, match=r"part.parquet': cannot be used \(has 0 classes, and 5 are expected\)"):
        weak_training_set(f"{tmp_path}/out", source, 5)
    columns = pa.table({"shard": ["x.tar"], "index": [0], "class_ids": [[0]]})
    pq.write_table(columns.replace_schema_metadata({"tophat.num_classes": "5"}), tmp_path / "out/part.parquet")
    with pytest.raises(SourceError, match=r"names the shard 'x.tar', which the source does not have"):
        weak_training_set(f"{tmp_path}/out", source, 5)
