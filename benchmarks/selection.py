"""How fast selection is, against the floor (reading the same columns) and DuckDB's exact window query.

    python benchmarks/selection.py --images 10000000 --images-per-class 1600

A score table is generated once in the given folder: every image has P distinct classes of C, with scores that fall with
their place in the row. Times are of single runs after a warm-up of the file cache.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLASSES = 1000
CLASSES_PER_IMAGE = 10
ROWS_PER_FILE = 250_000
IMAGES_PER_SHARD = 10_000


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


def floor(scores: Path) -> int:
    """Reads the four columns of every file, in this process with Arrow's threads; nothing else."""
    rows = 0
    for file in sorted(scores.glob("*.parquet")):
        for batch in pq.ParquetFile(file, read_dictionary=["shard"]).iter_batches(1 << 16):
            rows += batch.num_rows
    return rows


def duckdb_window(scores: Path, out: Path, images_per_class: int) -> int:
    """DuckDB's exact window query, written to Parquet."""
    import duckdb

    connection = duckdb.connect()
    connection.execute(
        f"""copy (
            select * from (
                select class_id, score, shard, index,
                    row_number() over (partition by class_id order by score desc, shard, index) - 1 as rank
                from (select shard, index, unnest(class_ids) as class_id, unnest(scores) as score
                      from read_parquet('{scores}/*.parquet'))
            ) where rank < {images_per_class} order by class_id, rank
        ) to '{out}' (format parquet)"""
    )
    (count,) = connection.execute(f"select count(*) from '{out}'").fetchone() or (0,)
    return int(count)


def measure(name: str, work: Callable[[], Any]) -> Any:
    """Prints how long `work` took."""
    start = time.monotonic()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<16} {time.monotonic() - start:8.2f} s   (peak of this process so far {peak:.2f} GiB)", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--images-per-class", type=int, default=160)
    parser.add_argument("--folder", type=Path, help="where the score table is kept; by default a temporary folder")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--duckdb", action="store_true")
    arguments = parser.parse_args()

    from pipeline.selection import select

    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="tophat-selection-"))
    scores = folder / f"scores-{arguments.images}"
    try:
        if not scores.exists():
            measure("generate", lambda: generate(scores, arguments.images))
        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
        for _ in range(arguments.rounds):
            measure("floor", lambda: floor(scores))
            selected = measure(
                "tophat select",
                lambda: select(str(scores), str(folder / "selection"), images_per_class=arguments.images_per_class),
            )
            if arguments.duckdb:
                count = measure(
                    "duckdb window",
                    lambda: duckdb_window(scores, folder / "duckdb.parquet", arguments.images_per_class),
                )
                assert count == selected.selected
        print(f"{selected.candidates:,} candidates, {selected.selected:,} selected")
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
