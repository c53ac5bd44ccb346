"""The actors of a scoring: each holds the teacher, scores row ranges of decoded images, and publishes them."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import RecipeError, ResourceError, TophatError, one_line
from cluster.reduction import told_errors
from pipeline.ranges import Range
from pipeline.rejects import Reject, publish_rejects

if TYPE_CHECKING:
    from models.inference import Prediction
    from pipeline.recipe import Score
    from pipeline.scoring import Job

CALLS = 2
"""Blocks that an actor works on at once: one is in the model, the other is read or published, or waits for a GPU's answers."""
PUBLISHERS = 8
"""Files that an actor publishes at once."""
REPEATING = ["shard", "class_ids.list.element"]
"""Columns of a score table whose values repeat; dictionaries of the others would be as large as they are."""


class RangeScorer:
    """Scores blocks of ranges: their images go through the model together, however small each range is.

    Args:
        job: what is scored.
        weights: a reference to what `models.card.read_weights` returned, in a list, so that Ray does not resolve it.
    """

    def __init__(self, job: "Job", weights: "list[Any]") -> None:
        import ray

        from models.inference import Inference, Predictor

        settings = job.settings
        how = Inference(
            classes_per_image=settings.classes_per_image,
            batch_size=settings.batch,
            views=settings.views,
            logits=settings.logits,
            precision=settings.precision,
            compile=settings.compile,
            features=settings.embedding,
            threads=max(1, int(settings.cpus_per_actor)),
            gpu=settings.gpus_per_actor > 0,
        )
        self._job = job
        self._problem: TophatError | None = None
        try:
            with told_errors():
                _check_gpu(settings)
                self._predict = Predictor(job.model_uri, how, ray.get(weights[0]))
        except TophatError as error:
            # Raised at the first block: of an actor that fails as it is made, only a text comes back.
            self._problem = error
        self._counting = Lock()
        self._ended, self._cpu = time.monotonic(), time.process_time()
        self._publishers = ThreadPoolExecutor(PUBLISHERS)

    def __call__(self, block: pa.Table) -> dict[str, Any]:
        with told_errors():
            if self._problem is not None:
                raise self._problem
            return self._score(block)

    def _score(self, block: pa.Table) -> dict[str, Any]:
        side = self._job.transform.size
        images = [values.reshape(-1, 3, side, side) for values in _bytes(block["images"])]
        indices = [v.values.to_numpy() for v in block["indices"]]
        rows: list[dict[str, Any]] = block.drop_columns(["images", "indices"]).to_pylist()
        for row in rows:
            row["range"] = Range(row["shards"][0], row["start"], row["stop"], row["last"], len(row["shards"]))
        began = time.monotonic()
        found = self._predicted(images)
        seconds, cpu = self._taken(began)
        ends = np.cumsum([0, *map(len, images)]).tolist()
        parts = [found.of(start, stop) for start, stop in pairwise(ends)]
        list(self._publishers.map(self._publish, rows, indices, parts))
        return {
            "shard": [row["range"].shard for row in rows],
            "last": [row["last"] for row in rows],
            "size": [row["size"] for row in rows],
            "scored": [len(part) for part in images],
            "rejected": [sum(r["index"] is not None for r in row["rejects"]) for row in rows],
            **{name: [row[name] for row in rows] for name in ("read_seconds", "read_cpu_seconds")},
            "model_seconds": [seconds / len(rows)] * len(rows),
            "model_cpu_seconds": [cpu / len(rows)] * len(rows),
        }

    def _taken(self, began: float) -> tuple[float, float]:
        """Seconds of the model, and CPU seconds of the process, that are this block's and no earlier one's."""
        with self._counting:
            before, cpu_before = max(began, self._ended), self._cpu
            self._ended, self._cpu = time.monotonic(), time.process_time()
            return self._ended - before, self._cpu - cpu_before

    def _predicted(self, images: Sequence[npt.NDArray[np.uint8]]) -> "Prediction":
        """Raises a RecipeError where the kernels of `score.compile` cannot be made."""
        try:
            return self._predict(*images)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            rule = f"kernels for this model cannot be made here ({compiler_error(str(error))})"
            fix = "set it to false, or mend what fails on the nodes"
            raise RecipeError("score.compile", True, rule, fix) from error

    def _publish(self, row: dict[str, Any], indices: npt.NDArray[np.uint32], found: "Prediction") -> None:
        job, file = self._job, row["range"].file
        if row["rejects"]:
            # Before the scores: where those exist, the range is complete.
            publish_rejects(storage.join(job.rejects_uri, file), [Reject(**reject) for reject in row["rejects"]])
        if row["missing"]:
            return
        codes = np.repeat(np.arange(len(row["shards"]), dtype=np.int32), row["counts"])
        shard = pa.DictionaryArray.from_arrays(codes, pa.array(row["shards"], pa.string()))
        table = score_table(shard, indices, found.classes, found.scores, job.classes, found.features)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=REPEATING)
        storage.publish(storage.join(job.scores_uri, file), sink.getvalue().to_pybytes())


def _bytes(values: pa.ChunkedArray) -> list[npt.NDArray[np.uint8]]:
    """Each of the binary values, where it lies; `as_buffer` of a value would be a copy."""
    found = []
    for chunk in values.chunks:
        _, offsets, content = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        found += [np.frombuffer(content, np.uint8)[start:stop] for start, stop in pairwise(ends)]
    return found


def _check_gpu(settings: "Score") -> None:
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
