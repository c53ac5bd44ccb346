"""The actors of a scoring: each holds the teacher, scores row ranges of decoded images, and publishes them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import RecipeError, ResourceError, TophatError, one_line
from cluster.tasks import told_errors
from models.config import Outputs, Transform
from pipeline.data.reader import Reader
from pipeline.data.rejects import Reject, publish_rejects
from pipeline.recipe.sections import Score
from pipeline.scoring.ledger import Range

if TYPE_CHECKING:
    from models.inference import Prediction

CALLS = 2
"""Ranges that an actor works on at once: one is in the model, the other is published, or waits for a GPU's answers."""
KEPT_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Environment of an actor on CPUs, in which Linux's C library keeps memory that is freed for the next forward pass, which needs as much.

ResNet-50 at 224 pixels takes 83 ms of CPU for an image with these and 108 ms without (medians of two alternating runs on 2 shared cores), as
memory that comes new from the system costs time.
"""
REPEATING = ["shard", "class_ids.list.element"]
"""Columns of a score table whose values repeat; dictionaries of the others would be as large as they are."""


@dataclass(frozen=True)
class Scoring:
    """What every process of a scoring needs to know.

    Attributes:
        reader: of the source.
        model_uri: the teacher's model directory.
        scores_uri: folder of the score table.
        rejects_uri: folder of the rejects.
        transform: how the images are decoded.
        classes: how many there are.
        settings: batch size, actors, P.
        outputs: as in `models.inference.Inference`.
    """

    reader: Reader
    model_uri: str
    scores_uri: str
    rejects_uri: str
    transform: Transform
    classes: int
    settings: Score
    outputs: Outputs | None = None


class RangeScorer:
    """Scores ranges and publishes them.

    Args:
        scoring: what is scored.
        weights: a reference to what `models.card.read_weights` returned, in a list, so that Ray does not resolve it.
    """

    def __init__(self, scoring: Scoring, weights: "list[Any]") -> None:
        import ray

        from models.inference import Inference, Predictor

        settings = scoring.settings
        how = Inference(
            classes_per_image=settings.kept_of(scoring.classes),
            outputs=scoring.outputs,
            batch_size=settings.batch,
            views=settings.views,
            logits=settings.logits,
            precision=settings.precision,
            compile=settings.compile,
            features=settings.embedding,
            threads=max(1, int(settings.cpus_per_actor)),
            gpu=settings.gpus_per_actor > 0,
        )
        self._scoring = scoring
        self._problem: TophatError | None = None
        try:
            with told_errors():
                check_gpu(settings)
                self._predict = Predictor(scoring.model_uri, how, ray.get(weights[0]))
        except TophatError as error:
            # Raised at the first range: of an actor that fails as it is made, only a text comes back.
            self._problem = error
        self._counting = Lock()
        self._ended, self._cpu = time.monotonic(), time.process_time()

    def __call__(self, table: pa.Table) -> dict[str, Any]:
        """Scores and publishes one range, the single row of what `RangeReader.ranges` yields."""
        with told_errors():
            if self._problem is not None:
                raise self._problem
            return self._score(table)

    def _score(self, table: pa.Table) -> dict[str, Any]:
        side = self._scoring.transform.size
        images = only_value(table["images"]).reshape(-1, 3, side, side)
        indices = table["indices"].combine_chunks().flatten().to_numpy()
        row: dict[str, Any] = table.drop_columns(["images", "indices"]).to_pylist()[0]
        began = time.monotonic()
        found = self._predicted(images)
        seconds, cpu = self._taken(began)
        self._publish(row, indices, found)
        return {
            "shard": [row["shards"][0]],
            "last": [row["last"]],
            "size": [row["size"]],
            "scored": [len(images)],
            "rejected": [sum(reject["index"] is not None for reject in row["rejects"])],
            "read_seconds": [row["read_seconds"]],
            "read_cpu_seconds": [row["read_cpu_seconds"]],
            "model_seconds": [seconds],
            "model_cpu_seconds": [cpu],
        }

    def _taken(self, began: float) -> tuple[float, float]:
        """Seconds of the model, and CPU seconds of the process, that are this range's and no earlier one's."""
        with self._counting:
            before, cpu_before = max(began, self._ended), self._cpu
            self._ended, self._cpu = time.monotonic(), time.process_time()
            return self._ended - before, self._cpu - cpu_before

    def _predicted(self, images: npt.NDArray[np.uint8]) -> "Prediction":
        """Raises a RecipeError where the kernels of `score.compile` cannot be made."""
        try:
            return self._predict(images)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            rule = f"kernels for this model cannot be made here ({compiler_error(str(error))})"
            fix = "set it to false, or mend what fails on the nodes"
            raise RecipeError("score.compile", True, rule, fix) from error

    def _publish(self, row: dict[str, Any], indices: npt.NDArray[np.uint32], found: "Prediction") -> None:
        scoring, shards = self._scoring, row["shards"]
        file = Range(shards[0], row["start"], row["stop"], row["last"], len(shards)).file
        if row["rejects"]:
            # Before the scores: where those exist, the range is complete.
            publish_rejects(storage.join(scoring.rejects_uri, file), [Reject(**reject) for reject in row["rejects"]])
        if row["missing"]:
            return
        codes = np.repeat(np.arange(len(shards), dtype=np.int32), row["counts"])
        shard = pa.DictionaryArray.from_arrays(codes, pa.array(shards, pa.string()))
        table = score_table(shard, indices, found.classes, found.scores, scoring.classes, found.features)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=REPEATING)
        storage.publish(storage.join(scoring.scores_uri, file), sink.getvalue().to_pybytes())


def only_value(values: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """The bytes of the only one of binary values, where they lie: `as_buffer` would be a copy."""
    (chunk,) = values.chunks
    _, offsets, content = chunk.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + 2]
    return np.frombuffer(content, np.uint8)[start:stop]


def check_gpu(settings: Score) -> None:
    """Raises a ResourceError where an actor holds a GPU that torch does not find."""
    import torch

    if settings.gpus_per_actor and not torch.cuda.is_available():
        rule = f"torch {torch.__version__} finds no GPU on a node that Ray takes to have one"
        fix = "mend the node's driver, or install a torch with CUDA; 0 scores on CPUs"
        raise ResourceError("score.gpus_per_actor", settings.gpus_per_actor, rule, fix)


def compiler_error(text: str) -> str:
    """The reason in what torch says of kernels that cannot be made: the compiler's first error, else how it begins; without its advice."""
    lines = text.partition("\nSet TORCHDYNAMO_VERBOSE")[0].splitlines()
    return one_line(next((line for line in lines if "error: " in line), " ".join(lines)))[:300]


def score_table(
    shard: pa.DictionaryArray,
    indices: Sequence[int] | npt.NDArray[np.uint32],
    class_ids: npt.NDArray[np.int32],
    scores: npt.NDArray[np.float32],
    classes: int,
    embedding: npt.NDArray[np.float16] | None = None,
) -> pa.Table:
    """Rows of a score table.

    Args:
        shard: [N], of strings.
        indices: [N], each row's place in its shard.
        class_ids: int32 [N, P], in score order.
        scores: float32 [N, P], descending.
        classes: how many classes there are, for the schema's metadata.
        embedding: float16 [N, d], for a column `embedding` of fixed-size lists.
    """

    def lists(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    more = {} if embedding is None else {"embedding": lists(embedding)}
    return pa.table(
        {
            "shard": shard,
            "index": pa.array(indices, pa.uint32()),
            "class_ids": lists(class_ids),
            "scores": lists(scores),
            **more,
        }
    ).replace_schema_metadata({"tophat.num_classes": str(classes)})
