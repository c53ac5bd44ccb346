"""What scoring will take: the arithmetic, the count of images, and the command on a real Ray."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from cluster.errors import InputError, StageError
from cluster.resources import ClusterShape, NodeShape
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Score
from pipeline.scoring.forecast import HERE, Forecast, NodeType, node_types, nodes_rate, read_prices
from pipeline.scoring.sampling import Cost, Sample, SampleReader, actors_on, count_images

ROOT = Path(__file__).parent.parent
COST = Cost(read_seconds=0.02, read_cpu_seconds=0.01, model_seconds=0.03, model_cpu_seconds=0.03)
ON_GPUS = Score(gpus_per_actor=1, cpus_per_actor=1)
Answer = tuple[int, str, str]


def sample(rate: float | None = None) -> Sample:
    return Sample(1000, 0, {}, COST, rate, start_seconds=20.0, table_bytes=50.0, actors=2)


def forecast(
    types: list[NodeType], settings: Score, rate: float | None = None, deadline: float | None = None
) -> Forecast:
    here = {"CPU": 2.0}
    prices = {"gpu": 3.0}
    return Forecast(36_000, 0.01, 10, 10**9, "t", settings, sample(rate), here, types, deadline, prices)


def test_a_cpu_node_is_as_fast_as_its_cpus() -> None:
    assert actors_on({"CPU": 16.0}, Score()) == 16
    rate, limit = nodes_rate({"CPU": 16.0}, Score(), COST)
    assert rate == pytest.approx(16 / 0.04)
    assert limit == "CPU"
    assert nodes_rate({"CPU": 0.0}, Score(), COST)[0] == 0


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected", "limit"),
    [
        (48.0, 4.0, 4 / 0.03, "model"),  # 44 readers give 2200/s
        (6.0, 4.0, 2 / 0.02, "readers"),  # two are left for reading
        (5.0, 4.0, 1 / 0.02, "readers"),
    ],
)
def test_a_gpu_node_is_as_fast_as_the_slower_of_its_gpus_and_readers(
    cpus: float, gpus: float, expected: float, limit: str
) -> None:
    rate, found = nodes_rate({"CPU": cpus, "GPU": gpus}, ON_GPUS, COST)
    assert rate == pytest.approx(expected)
    assert found == limit


def test_nodes_for_a_deadline_and_what_they_cost() -> None:
    node = NodeType("gpu", "g6.12xlarge", NodeShape({"CPU": 48.0, "GPU": 4.0}, 2))
    one = 36_000 / (4 / 0.03)  # 270 s
    alone, both = forecast([node], ON_GPUS).plans()
    assert (alone.nodes, both.nodes, both.actors) == (1, 2, 8)
    assert alone.seconds == pytest.approx(20 + one)
    assert both.seconds == pytest.approx(20 + one / 2)
    assert both.cost == pytest.approx(2 * 3.0 * both.seconds / 3600)
    (wanted,) = forecast([node], ON_GPUS, deadline=20 + one / 2.5).plans()
    assert (wanted.nodes, wanted.possible) == (3, False)
    assert wanted.seconds <= 20 + one / 2.5
    (wanted,) = forecast([node], ON_GPUS, deadline=20 + one).plans()
    assert (wanted.nodes, wanted.possible) == (1, True)


def test_no_more_actors_and_readers_than_the_recipe_allows() -> None:
    node = NodeType("cpu", "", NodeShape({"CPU": 16.0}, 4))
    one, four = forecast([node], Score(actors=1)).plans()
    assert (one.actors, four.actors) == (1, 1)
    assert one.rate == four.rate == pytest.approx(1 / 0.03)
    _, four = forecast([node], Score(readers=3)).plans()
    assert four.rate == pytest.approx(3 / 0.02)
    assert four.limit == "readers"
    (late,) = forecast([node], Score(actors=1), deadline=60.0).plans()
    assert not late.possible
    limited = Forecast(36_000, 0.01, 10, 10**9, "t", Score(actors=1), sample(1 / 0.03), {"CPU": 16.0}, [node])
    assert limited.efficiency == 1.0  # what it measured was two actors, and one is allowed


def test_a_type_that_cannot_be_started() -> None:
    (plan,) = forecast([NodeType("cpu", "", NodeShape({"CPU": 16.0}, 0))], Score()).plans()
    assert (plan.nodes, plan.possible) == (1, False)


def test_what_else_runs_on_a_node_counts() -> None:
    here = NodeType(HERE, "", NodeShape({"CPU": 2.0}, 1))
    (ideal,) = forecast([here], Score()).plans()
    assert ideal.rate == pytest.approx(50.0)
    (measured,) = forecast([here], Score(), rate=45.0).plans()
    assert measured.rate == pytest.approx(45.0)
    assert measured.cost is None


def test_types_come_from_the_cluster_and_from_its_file() -> None:
    shape = ClusterShape((NodeShape({"CPU": 2.0}, 1), NodeShape({"CPU": 2.0}, 1)))
    found = node_types(shape, str(ROOT / "cluster.yaml"))
    assert [(node.name, node.instance, node.shape.count) for node in found] == [
        (HERE, "", 2),
        ("cpu", "m7i.4xlarge", 8),
        ("gpu", "g6.12xlarge", 16),
    ]
    assert read_prices(["gpu=4.6", "m7i.4xlarge=0"], found) == {"gpu": 4.6, "m7i.4xlarge": 0.0}
    for wrong in ("gpu", "gpu=", "gpu=-1", "gpu=nan", "=3"):
        with pytest.raises(InputError, match="TYPE=PRICE"):
            read_prices([wrong], found)
    with pytest.raises(InputError, match=r"use one of here, cpu, m7i\.4xlarge, gpu, g6\.12xlarge"):
        read_prices(["tpu=1"], found)


@pytest.mark.parametrize("content", ["[]", "max_workers: 3", "a: [", "{max_workers: 1, available_node_types: {w: {}}}"])
def test_a_cluster_file_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match="--cluster-file"):
        node_types(ClusterShape(()), str(path))


def write_tars(folder: Path, shards: int, rows: int) -> ImageSource:
    images = tiny.digits()["one"]
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in range(rows):
                more = ((f"{row}.cls", b"1"), (f"{row}.json", b"{}" * 400))
                for name, data in ((f"{row}.png", images[(shard * rows + row) % len(images)]), *more):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return open_source("source", Source(uri=str(folder)))


def test_images_are_counted_from_some(tmp_path: Path) -> None:
    count, error = count_images(write_tars(tmp_path / "tars", 30, 80))
    assert abs(count - 2400) < 0.03 * 2400
    assert error < 0.02
    (tmp_path / "parquet").mkdir()
    for shard in range(3):
        data = pa.array(tiny.digits()["two"][:100], pa.binary())
        pq.write_table(pa.table({"image": data}), tmp_path / "parquet" / f"{shard}.parquet")
    count, error = count_images(open_source("source", Source(uri=str(tmp_path / "parquet"))))
    assert (count, error) == (300, 0.0)
    tiny.write_folders(tmp_path / "folders")
    unlabeled = open_source("source", Source(uri=str(tmp_path / "folders" / "unlabeled")))
    assert count_images(unlabeled) == (tiny.UNLABELED + len(tiny.BROKEN), 0.0)


def test_nothing_can_be_told_from_broken_shards(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(StageError, match="no image could be read from 1 of the shards"):
        count_images(open_source("source", Source(uri=str(tmp_path))))


def test_a_sample_reads_the_first_rows(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "tars", 2, 20)
    reader = SampleReader(**source.reader.__dict__, first_rows=7)
    assert [row.index for row in reader.read(source.listing[1])] == list(range(7))


@pytest.mark.usefixtures("ray_local")
def test_the_command(tophat: Callable[..., Answer], tmp_path: Path) -> None:
    tiny.write_folders(tmp_path / "data")
    shards, path, run = tmp_path / "shards", tmp_path / "tiny.yaml", tmp_path / "run"
    write_tars(shards, 6, 40)
    path.write_text(json.dumps({**tiny.recipe(str(tmp_path / "data")), "unlabeled": {"uri": str(shards)}}))
    words = ["estimate", str(path), "--run-dir", str(run), "--cluster-file", str(ROOT / "cluster.yaml")]
    prices = ("--price", "here=0.5", "--price", "gpu=4")
    given = ("--deadline", "0.5", "--set", "deduplicate.nearest=5")
    code, output, errors = tophat(*words, "--images", "120", *prices, *given)
    assert code == 0, errors
    assert "a resnet8 of random weights" in output
    assert "120 scored, 0 rejected, 2 actors" in output
    assert "g6.12xlarge" in output
    assert not list(tmp_path.glob("run*"))  # nothing stays
    assert "Not counted: the pass over U for deduplicate.model = resnet18." in output
    assert "All of U within 30 min 00 s" in output
    code, output, errors = tophat(*words, "--images", "120", "--deadline", "0.001")
    assert code == 2
    assert "--deadline = 0.001: is less than" in errors
    code, _, errors = tophat(*words, "--deadline", "inf")
    assert code == 2
    assert "--deadline = inf: must be a finite number of hours" in errors
    code, _, errors = tophat(*words, "--set", "score.gpus_per_actor=1", "--set", "score.cpus_per_actor=64")
    assert code == 2
    assert "score.actors = 1: needs 64 CPU + 1 GPU on one node, and the cluster's nodes have" in errors
    code, _, errors = tophat(*words, "--price", "gpu=much")
    assert code == 2
    assert "--price = 'gpu=much': must have the form TYPE=PRICE" in errors
    assert not list(tmp_path.glob("run*"))
