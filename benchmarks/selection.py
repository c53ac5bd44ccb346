"""How fast selection is, against reading the same bytes (the floor) and against other tools that take the top K.

    python -m benchmarks.selection --images 10000000 --images-per-class 1600 --rounds 3 --peers all

A score table is generated once in the given folder: every image has P distinct classes of C, with scores that fall with
their place in the row. Then every contender runs once a round, in turn; reported are the medians over the rounds, as
seconds and as ratios to ours, and the peak of the memory that all processes of a contender have together (proportional
set size). The first round, which also starts Ray's workers, is not counted.

- `floor`: Arrow reads the columns of every file with its threads, and nothing else.
- `duckdb window`: exact, ties too, all columns, written to Parquet. Its count is compared with ours.
- `duckdb max_by`: the ids alone; ties are not fixed. `polars top_k_by`: the same.
- `ray data`: sort and group by class; only of at most a million images.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.processes import Memory

CLASSES = 1000
CLASSES_PER_IMAGE = 10
ROWS_PER_FILE = 250_000
IMAGES_PER_SHARD = 10_000
OURS = "tophat select"


def generate(folder: Path, images: int, seed: int = 0) -> None:
    """Writes a score table of `images` rows with the contract's columns."""
    folder.mkdir(parents=True)
    schema = pa.schema(
        [
            ("shard", pa.dictionary(pa.int32(), pa.string())),
            ("index", pa.uint32()),
            ("class_ids", pa.list_(pa.int32(), CLASSES_PER_IMAGE)),
            ("scores", pa.list_(pa.float32(), CLASSES_PER_IMAGE)),
        ],
        {"tophat.num_classes": str(CLASSES)},
    )
    for number, start in enumerate(range(0, images, ROWS_PER_FILE)):
        rng = np.random.default_rng([seed, number])
        rows = min(ROWS_PER_FILE, images - start)
        steps = rng.integers(1, CLASSES // CLASSES_PER_IMAGE, (rows, CLASSES_PER_IMAGE))
        class_ids = (rng.integers(0, CLASSES, (rows, 1)) + np.cumsum(steps, axis=1)) % CLASSES
        scores = -np.sort(-(rng.random((rows, CLASSES_PER_IMAGE), np.float32) ** 3), axis=1)
        image = np.arange(start, start + rows)
        first = start // IMAGES_PER_SHARD
        names = pa.array([f"shard-{first + i:06d}.tar" for i in range(-(-rows // IMAGES_PER_SHARD))])
        shard = pa.DictionaryArray.from_arrays(pa.array((image // IMAGES_PER_SHARD - first).astype(np.int32)), names)
        lists = [
            pa.FixedSizeListArray.from_arrays(pa.array(values.ravel().astype(kind)), CLASSES_PER_IMAGE)
            for values, kind in ((class_ids, np.int32), (scores, np.float32))
        ]
        index = pa.array((image % IMAGES_PER_SHARD).astype(np.uint32))
        pq.write_table(pa.table([shard, index, *lists], schema), folder / f"scores-{number:05d}.parquet")


def floor(scores: Path, _: Path, __: int) -> int:
    """Reads the four columns of every file, in this process with Arrow's threads; nothing else."""
    rows = 0
    for file in sorted(scores.glob("*.parquet")):
        for batch in pq.ParquetFile(file, read_dictionary=["shard"]).iter_batches(1 << 16):
            rows += batch.num_rows
    return rows


def ours(scores: Path, out: Path, images_per_class: int) -> int:
    """The selection, on the Ray that is running."""
    from pipeline.selection.select import select

    return select(str(scores), str(out), images_per_class=images_per_class).selected


def _candidates(scores: Path) -> str:
    return f"""select shard, index, unnest(class_ids) as class_id, unnest(scores) as score
               from read_parquet('{scores}/*.parquet')"""


def duckdb_window(scores: Path, out: Path, images_per_class: int) -> int:
    """DuckDB's exact window query, written to Parquet."""
    import duckdb

    connection = duckdb.connect()
    connection.execute(
        f"""copy (
            select * from (
                select class_id, score, shard, index,
                    row_number() over (partition by class_id order by score desc, shard, index) - 1 as rank
                from ({_candidates(scores)})
            ) where rank < {images_per_class} order by class_id, rank
        ) to '{out}.parquet' (format parquet)"""
    )
    return int((connection.execute(f"select count(*) from '{out}.parquet'").fetchone() or (0,))[0])


def duckdb_max_by(scores: Path, _: Path, images_per_class: int) -> int:
    """DuckDB's `max_by` with a count."""
    import duckdb

    query = f"""select sum(len(best)) from (
        select class_id, max_by(index, score, {images_per_class}) as best from ({_candidates(scores)}) group by class_id)"""
    return int((duckdb.connect().execute(query).fetchone() or (0,))[0])


def polars_top_k_by(scores: Path, _: Path, images_per_class: int) -> int:
    """Polars, streaming."""
    import polars as pl

    best = pl.col("shard", "index").top_k_by("score", images_per_class)
    lists = [pl.col(name).arr.to_list() for name in ("class_ids", "scores")]
    table = pl.scan_parquet(f"{scores}/*.parquet").with_columns(lists).explode("class_ids", "scores")
    named = table.rename({"class_ids": "class_id", "scores": "score"})
    found = named.group_by("class_id").agg(best).collect(engine="streaming")
    return int(found["index"].list.len().sum())


def ray_data(scores: Path, _: Path, images_per_class: int) -> int:
    """Ray Data: explode, group by class, sort each group."""
    import ray.data

    def explode(batch: pa.Table) -> pa.Table:
        row = np.repeat(np.arange(len(batch)), CLASSES_PER_IMAGE)
        image = batch.select(["shard", "index"]).take(pa.array(row))
        columns = {name: batch[name].combine_chunks().flatten() for name in ("class_ids", "scores")}
        shard = image["shard"].cast(pa.string())
        return pa.table(
            {"class_id": columns["class_ids"], "score": columns["scores"], "shard": shard, "index": image["index"]}
        )

    def first(group: pa.Table) -> pa.Table:
        order = [("score", "descending"), ("shard", "ascending"), ("index", "ascending")]
        return group.sort_by(order).slice(0, images_per_class)

    table = ray.data.read_parquet(str(scores)).map_batches(explode, batch_format="pyarrow")
    return int(table.groupby("class_id").map_groups(first, batch_format="pyarrow").count())


PEERS: dict[str, Callable[[Path, Path, int], int]] = {
    "duckdb window": duckdb_window,
    "duckdb max_by": duckdb_max_by,
    "polars top_k_by": polars_top_k_by,
    "ray data": ray_data,
}
ALL: dict[str, Callable[[Path, Path, int], int]] = {"floor": floor, OURS: ours, **PEERS}
EXACT = {OURS, "duckdb window", "duckdb max_by", "polars top_k_by", "ray data"}


def serve(name: str) -> None:
    """Runs one contender for as often as a line on the standard input asks for it; answers a line each time."""
    if name in (OURS, "ray data"):
        import ray

        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's name; its own default, 15, is not the others')
        ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    for line in sys.stdin:
        scores, out, images_per_class = json.loads(line)
        start = time.monotonic()
        count = ALL[name](Path(scores), Path(out), images_per_class)
        print("answer", json.dumps([time.monotonic() - start, count]), flush=True)


@contextmanager
def contender(name: str) -> Any:
    """A process for one contender, and a function that lets it work once: seconds, count, peak GiB."""
    command = [sys.executable, "-m", "benchmarks.selection", "--serve", name]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def once(*arguments: Any) -> tuple[float, int, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        with Memory(process.pid) as memory:
            for line in process.stdout:
                if line.startswith("answer "):
                    seconds, count = json.loads(line.removeprefix("answer "))
                    break
            else:
                raise RuntimeError(f"{name} ended early")
        return seconds, count, memory.peak

    try:
        yield once
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def compare(scores: Path, folder: Path, images_per_class: int, names: list[str], rounds: int) -> None:
    """Runs the contenders in turn, `rounds` times after one that is not counted, and prints medians and ratios."""
    found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            if number == 0 and name not in (OURS, "floor"):
                continue
            with contender(name) as once:
                out = str(folder / name.replace(" ", "-"))
                if name == OURS:
                    once(str(scores), out, images_per_class)  # starts the workers
                result = once(str(scores), out, images_per_class)
            if number:
                found[name].append(result)
                print(f"round {number}: {name:<16} {result[0]:8.2f} s, {result[2]:.2f} GiB", flush=True)
    counts = {name: found[name][0][1] for name in names if name in EXACT}
    assert len(set(counts.values())) == 1, counts
    medians = {name: statistics.median(seconds for seconds, _, _ in runs) for name, runs in found.items()}
    print(f"\n{'':<16} {'seconds':>9} {'to ours':>8} {'to floor':>9} {'peak GiB':>9}")
    for name in names:
        peak = max(memory for _, _, memory in found[name])
        to_ours, to_floor = medians[name] / medians[OURS], medians[name] / medians["floor"]
        print(f"{name:<16} {medians[name]:9.2f} {to_ours:8.2f} {to_floor:9.2f} {peak:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--images-per-class", type=int, help="by default in the paper's proportion, 16,000 of 100M")
    parser.add_argument("--folder", type=Path, help="where the score table is kept; by default a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="", help=f"some of {', '.join(PEERS)}, with commas; or all")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    peers = list(PEERS) if arguments.peers == "all" else [name for name in arguments.peers.split(",") if name]
    for name in [name for name in peers if importlib.util.find_spec(name.split()[0]) is None]:
        print(f"{name.split()[0]} is not installed, and left out")
        peers.remove(name)
    if arguments.images > 1_000_000:
        peers = [name for name in peers if name != "ray data"]
    images_per_class = arguments.images_per_class or max(1, arguments.images * 16 // 100_000)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="tophat-selection-"))
    scores = folder / f"scores-{arguments.images}"
    try:
        if not scores.exists():
            generate(scores, arguments.images)
        print(f"{arguments.images:,} images, K = {images_per_class:,}, {arguments.rounds} rounds", flush=True)
        compare(scores, folder, images_per_class, ["floor", OURS, *peers], arguments.rounds)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
