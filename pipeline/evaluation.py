"""The models of a run, and what was measured of them on labeled images.

What a model said of each image is a table of predictions (`prediction_table`), kept as one Parquet file for each model; everything that is
measured comes out of these.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from cluster import storage
from models.config import Outputs
from models.judging import Comparison
from models.training.job import Row
from tuning.sweep import Trial

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.shards import Shard

BEST = 5
"""Classes among which an image's own is looked for in top-5, or all of them where there are fewer."""


@dataclass(frozen=True)
class Trained:
    """A model directory.

    Attributes:
        images: seen in training, over all trials; 0 of a model that was ready.
        architecture: its name.
        parameters: how many numbers are trained.
        metrics: the last row of its history.
        history: of its training, a row at each of some steps.
        learning_rate: the best of a sweep, per 256 images.
        trials: of that sweep.
        class_outputs: where its outputs are not the classes of D in their order: the output of each class, or several whose probabilities add up.
        held_out: where it was fitted on all of D: a file in its folder, of what it said of each image of D when it was fitted without it
            (`prediction_table`).
        source: where it was found and its license, of a network that others trained.
    """

    images: int
    architecture: str
    parameters: int
    metrics: dict[str, float | None]
    history: list[Row]
    learning_rate: float | None = None
    trials: tuple[Trial, ...] = ()
    class_outputs: Outputs | None = None
    held_out: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        uri: its directory.
        outputs: where the model's outputs are not the classes of the labels in their order: the output of each class.
    """

    uri: str
    outputs: Outputs | None = None


@dataclass(frozen=True)
class Measured:
    """What a model did on labeled images.

    Attributes:
        images: how many.
        top1: the share, in [0, 1], whose class is the best-scored.
        top5: the share whose class is among the five best.
        loss: mean cross-entropy, in nats.
        interval: of top1, 95%, by the bootstrap (percentile, 2,000 draws).
        ece: expected calibration error of the top-1 score, in 15 bins.
        recall: of each class, the share of its images that were found; None where it has none.
        precision: of each class, the share of the images taken for it that are of it; None where there are none.
        support: images of each class.
    """

    images: int
    top1: float
    top5: float
    loss: float
    interval: tuple[float, float]
    ece: float
    recall: tuple[float | None, ...]
    precision: tuple[float | None, ...]
    support: tuple[int, ...]


def prediction_table(
    parts: Iterable[Mapping[str, Any]], shards: Sequence[Shard], class_names: Sequence[str]
) -> pa.Table:
    """What a model said of labeled images, a row for each. Probabilities are the softmax over all of the model's outputs, as in a score table.

    Columns:
        shard: dictionary of strings, the image's shard, relative to the source's root.
        index: uint32, its row in the shard, from 0.
        file: string, its file, relative to the source's root, in a source of files; null in others.
        label: int32, its class, in the order of D's classes.
        label_name: dictionary of strings, that class's name.
        predicted: int32, the best-scored class.
        predicted_name: dictionary of strings, its name.
        score: float32, the probability of the predicted class.
        label_score: float32, the probability of the image's own class.
        rank: int8, the place of its own class among the five best, from 0, or null where it is not among them. Where two classes have
            exactly equal scores, either may come first.

    Args:
        parts: consecutive images, each part with `shard`, its place in `shards`, and lists `index`, `label`, `predicted`, `score`,
            `label_score` and `rank`, which is -1 for null.
        shards: of the source.
        class_names: by number.
    """
    parts = list(parts)
    places = np.repeat([part["shard"] for part in parts], [len(part["index"]) for part in parts]).astype(np.int32)

    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([value for part in parts for value in part[name]], kind)

    def named(numbers: pa.Array) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(numbers, pa.array(class_names, pa.string()))

    index, rank = column("index", pa.uint32()), column("rank", pa.int8())
    files = [
        shards[place].files[row] if shards[place].files else None
        for place, row in zip(places.tolist(), index.to_pylist(), strict=True)
    ]
    label, predicted = column("label", pa.int32()), column("predicted", pa.int32())
    return pa.table(
        {
            "shard": pa.DictionaryArray.from_arrays(pa.array(places), pa.array([s.name for s in shards], pa.string())),
            "index": index,
            "file": pa.array(files, pa.string()),
            "label": label,
            "label_name": named(label),
            "predicted": predicted,
            "predicted_name": named(predicted),
            "score": column("score", pa.float32()),
            "label_score": column("label_score", pa.float32()),
            "rank": pa.array(rank.to_numpy(), mask=rank.to_numpy() < 0),
        }
    )


def save_predictions(uri: str, table: pa.Table) -> None:
    """Publishes a table of predictions as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.publish(uri, sink.getvalue().to_pybytes())


def load_predictions(uri: str) -> pa.Table:
    """Reads what `save_predictions` wrote."""
    with storage.open_input(uri) as file:
        return pq.read_table(file)


def right(table: pa.Table) -> NDArray[np.bool_]:
    """Which images of a table of predictions the model has right, bool [N]."""
    found: NDArray[np.bool_] = table["label"].to_numpy() == table["predicted"].to_numpy()
    return found


def measured(table: pa.Table, classes: int) -> Measured:
    """What a table of predictions says of its model."""
    from models import judging

    hits = right(table)
    per_class = judging.per_class(table["label"].to_numpy(), table["predicted"].to_numpy(), classes)
    return Measured(
        images=len(hits),
        top1=float(hits.mean()),
        top5=1 - table["rank"].null_count / len(hits),
        loss=judging.cross_entropy(table["label_score"].to_numpy()),
        interval=judging.share_interval(int(hits.sum()), len(hits)),
        ece=judging.calibration(table["score"].to_numpy(), hits).error,
        recall=_or_none(per_class.recall),
        precision=_or_none(per_class.precision),
        support=tuple(per_class.support.tolist()),
    )


def compared(first: pa.Table, second: pa.Table) -> Comparison:
    """Two models, by their predictions on the same images in the same order."""
    from models import judging

    return judging.compare(right(first), right(second))


def _or_none(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(value if isfinite(value) else None for value in values.tolist())
