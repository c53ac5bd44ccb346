"""Labels in a file beside the images: every way to write one, what is counted, and that its content decides."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from cluster import storage
from cluster.errors import SourceError
from cluster.store import RunStore
from pipeline.context import ListedFiles
from pipeline.data.labels import read_labels
from pipeline.data.shards import Label
from pipeline.data.sources import ImageSource, open_source
from pipeline.plan import plan
from pipeline.recipe.images import Source
from pipeline.recipe.reading import validate

IMAGES = ("a.png", "b.png", "deep/c.png", "deep/x/d, e.png", "ü.png", "back\\slash.png")


def write_images(place: str, *more: str) -> str:
    root = storage.join(place, "images")
    for path in (*IMAGES, *more):
        storage.publish(f"{root}/{path}", path.encode())
    return root


def labels_of(source: ImageSource) -> dict[str, Label]:
    return {row.data.decode(): row.label for shard in source.shards() for row in source.read(shard.name)}


@pytest.mark.parametrize("inside", [True, False])
def test_images_get_the_labels_of_the_file(place: str, inside: bool) -> None:
    root = write_images(place, "more/z.png", "more/y.png", "more/notes.doc")
    file = f"{root}/deep/labels.csv" if inside else storage.join(place, "labels.csv")
    text = 'a.png,ant\nb.png,7\ndeep/c.png,007\n"deep/x/d, e.png","the ""bee"""\nü.png,-1\nback\\slash.png,ant\nnot/there.png,cow\n'
    storage.publish(file, text.encode())
    source = open_source("labeled.train", Source(uri=root, labels=file))
    expected = {"a.png": "ant", "b.png": 7, "deep/c.png": "007", "deep/x/d, e.png": 'the "bee"', "ü.png": -1}
    assert labels_of(source) == {**expected, "back\\slash.png": "ant"}
    assert source.reader.layout == "folder"
    assert [(one.reason, one.count, one.examples) for one in source.passed_over] == [
        ("images without a label in labels.csv", 2, ("more/y.png", "more/z.png")),
        ("files of the kind .doc", 1, ("more/notes.doc",)),
    ]
    assert source.parts == inside
    assert source.objects == len(IMAGES) + 3 + inside
    told = source.told()
    assert told is not None
    assert told.endswith(f"; 1 of 7 rows of {file} name no image (not/there.png)")
    assert source.lacks_much
    saved = storage.join(place, "listing.parquet")
    source.save(saved)
    loaded = ImageSource.load(saved)
    assert loaded.listing == source.listing
    assert labels_of(loaded) == labels_of(source)


@pytest.mark.parametrize(
    "content",
    [
        b"a.png,ant\nb.png,bee\n",
        b"file,label\na.png,ant\nb.png,bee",
        b"\xef\xbb\xbfFileName, Class\r\na.png, ant\r\nb.png, bee\r\n",
        b"label\tsplit\tpath\nant\ttrain\ta.png\nbee\ttrain\tb.png\n",
        b"id;breed\na.png;ant\nb.png;bee\n",  # of two columns, the other one
        b"breed,image\nant,a.png\nbee,b.png\n",
        b'"a.png","ant"\r"b.png","bee"\r',
        b"\n./a.png,ant ,0.5\n\n.\\b.png,bee,0.5\n./b.png,bee,0.7\n",  # the same image twice, and a third column
    ],
)
def test_files_that_say_the_same(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l").write_bytes(content)
    file, labels = read_labels("x", str(tmp_path / "l"), ["a.png", "b.png", "c.png"])
    assert labels == {"a.png": "ant", "b.png": "bee"}
    assert (file.missing, file.told()) == (0, None)


def test_a_first_row_whose_label_is_a_word_of_headers(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("a.png,class\nb.png,bee\n")
    assert read_labels("x", str(tmp_path / "l.csv"), ["a.png", "b.png"])[1] == {"a.png": "class", "b.png": "bee"}


@pytest.mark.parametrize(
    "columns",
    [
        {"file": ["a.png", "b.png"], "label": [3, 0]},
        {"score": [1.0, 2.0], "category": pa.array(["3", "0"]).dictionary_encode(), "image": ["a.png", "b.png"]},
        {"one": ["a.png", "b.png"], "two": [3.0, 0.0]},
    ],
)
def test_parquet(tmp_path: Path, columns: dict[str, object]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    assert read_labels("x", str(tmp_path / "l.parquet"), ["a.png", "b.png"])[1] == {"a.png": "3", "b.png": "0"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "has no rows"),
        (b"file,label\n", "has no rows"),
        (b"a.png,ant\nb.png, \n", "has no label for 'b.png' in line 2"),
        (b"file,label\na.png,ant\n./a.png,bee\n", "gives 'a.png' the label 'ant' in line 2 and 'bee' in line 3"),
        (b"a.png,ant\nb.png\n", "has 1 columns in line 2"),
        (b"a.png\nb.png\n", "has 1 columns in line 1"),
        (b"a.png,ant\nb.png,\xffbee\n", "is not UTF-8 in line 2"),
        (b'a.png,ant\n"b.png,bee\n', "is no CSV in line 2"),
        (b"file,breed,size\na.png,ant,3\n", "not clear which are the paths and the labels (file, breed, size)"),
        (
            b"x/a.png,ant\nx/b.png,bee\nc.png,cow\n",
            "names 2 images, of 3, that are not in the source (x/a.png, x/b.png)",
        ),
        (b"PAR1 and no more", "is damaged"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(SourceError) as raised:
        read_labels("labeled.train.labels", str(tmp_path / "l.csv"), ["a.png", "b.png", "c.png"])
    assert told in str(raised.value)
    assert str(raised.value).startswith(f"labeled.train.labels = '{tmp_path}/l.csv': ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"a": ["a.png"], "b": ["x"], "c": [1]}, "not clear which are the paths"),
        ({"file": [1], "label": ["x"]}, "has 1 for a path in row 0"),
        ({"file": ["a.png"], "label": [1.5]}, "is no class number"),
        ({"file": ["a.png"], "label": [["x"]]}, "holds list"),
        ({"file": ["a.png"], "label": pa.array([None], pa.string())}, "has no label for 'a.png' in row 0"),
    ],
)
def test_mistakes_in_parquet(tmp_path: Path, columns: dict[str, object], told: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    with pytest.raises(SourceError) as raised:
        read_labels("x", str(tmp_path / "l.parquet"), ["a.png"])
    assert told in str(raised.value)


def test_only_labeled_folders_have_such_a_file(tmp_path: Path) -> None:
    root = write_images(str(tmp_path))
    (tmp_path / "l.csv").write_text("a.png,ant\n")
    source = Source(uri=root, labels=str(tmp_path / "l.csv"))
    with pytest.raises(SourceError, match=r"unlabeled.labels = .*is for images that are labeled"):
        open_source("unlabeled", source, labeled=False)
    with pytest.raises(SourceError, match=r"x.labels = .*nowhere.*exist"):
        open_source("x", source.model_copy(update={"labels": f"{tmp_path}/nowhere.csv"}))
    tiny.write_tar(tmp_path / "tars" / "0.tar", [tiny.png(np.zeros((2, 2), np.uint8))])
    with pytest.raises(SourceError, match="is for image files, and the source is of the layout webdataset"):
        open_source("x", source.model_copy(update={"uri": f"{tmp_path}/tars"}))


def flat(folders: Path, tmp_path: Path) -> Path:
    """The tiny training images in one folder, and `labels.csv` beside it."""
    root, rows = tmp_path / "flat", ["file,label"]
    root.mkdir()
    for file in sorted((folders / "train").glob("*/*.png")):
        name = f"{file.parent.name}-{file.name}"
        shutil.copy(file, root / name)
        rows.append(f"{name},{file.parent.name}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return root


def test_the_content_of_the_file_decides(folders: Path, tmp_path: Path) -> None:
    root, file = flat(folders, tmp_path), tmp_path / "labels.csv"
    data = tiny.recipe(str(folders))
    data["labeled"]["train"] = {"uri": str(root), "labels": str(file)}

    def keys() -> list[str]:
        return [one.made.fingerprint for one in plan(validate(data), RunStore(str(tmp_path / "run"))).planned]

    source = open_source("labeled.train", Source(uri=str(root), labels=str(file)))
    listed = ListedFiles("labeled.train", lambda: source)
    first, content, fingerprint = keys(), file.read_text(), source.fingerprint()
    file.write_text(content)
    assert keys() == first
    assert listed.changed() is None
    file.write_text(content.replace("one-1.png,one", "one-1.png,two"))
    assert all(one != other for one, other in zip(keys()[:1] + keys()[-1:], first[:1] + first[-1:], strict=True))
    assert listed.changed() == str(file)
    assert open_source("labeled.train", Source(uri=str(root), labels=str(file))).fingerprint() != fingerprint
    file.unlink()
    assert listed.changed() == str(file)


def test_ingest_and_evaluate(
    folders: Path, tmp_path: Path, tophat: Callable[..., tuple[int, str, str]], ray_local: None
) -> None:
    root, file = str(flat(folders, tmp_path)), str(tmp_path / "labels.csv")
    for layout in ("webdataset", "parquet"):
        out = f"{tmp_path}/{layout}"
        assert tophat("ingest", root, "--labels", file, "--out", out, "--as", layout)[0] == 0
        source = open_source("x", Source(uri=out))
        labels = [row.label for shard in source.shards() for row in source.read(shard.name)]
        assert sorted(map(str, labels)) == sorted(12 * tiny.CLASSES)
    model = tiny.save_teacher(f"{tmp_path}/model")
    code, printed, errors = tophat("evaluate", model, "--source", root, "--labels", file)
    assert (code, errors) == (0, "")
    same = tophat("evaluate", model, "--source", str(folders / "train"))[1]
    assert printed.splitlines()[-3:] == same.splitlines()[-3:]
    code, _, errors = tophat("evaluate", model, "--source", str(folders), "--labels", file)
    assert code == 2
    assert errors.startswith(f"error: --labels = '{file}': names 36 images, of 36, that are not in the source")
