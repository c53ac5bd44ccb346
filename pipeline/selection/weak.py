"""Weakly labeled images W as training data (section 3.3)."""

from concurrent.futures import ThreadPoolExecutor

from cluster import storage
from cluster.errors import SourceError, shown
from pipeline.data.loading import Integers, TrainingSet
from pipeline.data.shards import Shard
from pipeline.data.sources import ImageSource
from pipeline.selection.table import CLASSES_METADATA, blamed

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq


def weak_training_set(uri: str, source: ImageSource, classes: int) -> TrainingSet:
    """W as training data: every tagged image with its class; one that has several classes appears once for each, as in D-hat (section 3.3).

    All of its images were decoded when the tags were matched, so that none ends a training.

    Args:
        uri: the folder that `pipeline.selection.tags.match_tags` wrote.
        source: that it was made of.
        classes: how many there are.

    Raises:
        SourceError: the folder is not that, or is of another source or of other classes.
    """
    by_name = {shard.name: shard for shard in source.shards()}
    fix = "match the tags of this source again"

    def read(path: str) -> list[tuple[Shard, Integers, Integers]]:
        place = storage.join(uri, path)
        with storage.open_input(place) as file, blamed("weak labels", lambda: place, fix):
            table = pq.read_table(file, columns=["shard", "index", "class_ids"])
            if int(said := (table.schema.metadata or {}).get(CLASSES_METADATA, 0)) != classes:
                raise ValueError(f"has {int(said)} classes, and {classes} are expected")
            names, lists = table["shard"].combine_chunks().dictionary_encode(), table["class_ids"].combine_chunks()
            row, labels = pc.list_parent_indices(lists).to_numpy(), lists.flatten().to_numpy().astype(np.int64)
            index = table["index"].to_numpy().astype(np.int64)[row]
            code = names.indices.to_numpy()[row]
        found = []
        for number, name in enumerate(names.dictionary.to_pylist()):
            if name not in by_name:
                rule = f"names the shard {shown(name)}, which the source does not have"
                raise SourceError("weak labels", place, rule, fix)
            found.append((by_name[name], index[code == number], labels[code == number]))
        return found

    files = [file.path for file in storage.list_files(uri, ".parquet") if not file.path.startswith("_")]
    if not files:
        raise SourceError("weak labels", uri, "holds no Parquet files", fix)
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = [each for part in pool.map(read, files) for each in part]  # no shard is in two files
    shards, rows, labels = zip(*found, strict=True)
    return TrainingSet(source.reader, shards, rows, {number: number for number in range(classes)}, labels)
