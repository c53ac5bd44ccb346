"""Models on labeled images: what each says of every image, by the readers, the actors and the predictor of a scoring.

One pass serves several models and several sets of images: a reader reads an image once and decodes it once for models that see the same,
and an actor holds all of the models. Only what is kept of an image leaves the actor, so that the number of classes costs nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.errors import TophatError
from cluster.progress import SILENT, Progress
from cluster.tasks import original_errors, told_errors
from models.config import Transform
from pipeline.data.loading import TrainingSet
from pipeline.evaluation import BEST, Candidate, prediction_table
from pipeline.recipe.sections import Score
from pipeline.scoring.actors import check_gpu, only_value
from pipeline.scoring.ledger import one_value, range_rows
from pipeline.scoring.score import check_views, default_actors, through_actors

if TYPE_CHECKING:
    import ray

PIXELS_PER_ACTOR = 10_000_000
"""What is worth the start of another actor, by default: 200 images of 224 pixels for one model, some 15 seconds of a ResNet-18 on a core."""


@dataclass(frozen=True)
class Judging:
    """What every process knows.

    Attributes:
        sets: the labeled images.
        models: all of them, in an order.
        judges: of each set, which of the models.
        views: of each model, which of `transforms` it sees.
        transforms: how images are decoded.
        settings: batch size, precision, views, resources.
    """

    sets: tuple[TrainingSet, ...]
    models: tuple[Candidate, ...]
    judges: tuple[tuple[int, ...], ...]
    views: tuple[int, ...]
    transforms: tuple[Transform, ...]
    settings: Score


def judge(
    models: Mapping[str, Candidate],
    sets: Mapping[str, tuple[TrainingSet, Sequence[str]]],
    class_names: Sequence[str],
    settings: Score,
    progress: Progress = SILENT,
) -> dict[str, dict[str, pa.Table]]:
    """What models say of labeled images, on the Ray that is running.

    Args:
        models: by a name.
        sets: by a name, labeled images and the names of the models that judge them.
        class_names: of the labels.
        settings: `precision`, `views`, and the resources; kernels are not compiled, and the scores are probabilities.
        progress: gets images judged, over all models.

    Returns:
        By set and model, what `pipeline.evaluation.prediction_table` makes, in the order of the set's shards and rows.

    Raises:
        StageError: an image that could be used when the set was surveyed cannot be now.
        ModelError: a model that cannot be used.
    """
    from models.card import read_card

    names = list(models)
    transforms: list[Transform] = []
    views = []
    for model in models.values():
        transform = read_card(model.uri).model.transform
        check_views(transform, settings)
        decoded = _pixels(transform.seen_by(settings.views))
        if decoded not in transforms:
            transforms.append(decoded)
        views.append(transforms.index(decoded))
    data = tuple(images for images, _ in sets.values())
    judges = tuple(tuple(names.index(name) for name in wanted) for _, wanted in sets.values())
    judging = Judging(data, tuple(models.values()), judges, tuple(views), tuple(transforms), settings)
    parts: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in original_errors(_stream(judging)):
        progress.add(len(row["index"]))
        parts.setdefault((row["set"], row["model"]), []).append(row)
    return {
        name: {
            model: prediction_table(
                sorted(parts.get((place, number), []), key=lambda row: (row["shard"], row["start"])),
                images.shards,
                class_names,
            )
            for model, number in zip(wanted, judges[place], strict=True)
        }
        for place, (name, (images, wanted)) in enumerate(sets.items())
    }


def _pixels(transform: Transform) -> Transform:
    """The same, where only what decides the decoded image is not the default."""
    still = {name: getattr(Transform(), name) for name in ("crop", "scale", "padding", "flip", "mean", "std")}
    return transform.model_copy(update=still)


def _stream(judging: Judging) -> Iterator[dict[str, Any]]:
    import ray

    settings = judging.settings
    sides = [judging.transforms[view].size for view in judging.views]
    pixels = sum(
        data.images * sides[model] ** 2
        for data, judges in zip(judging.sets, judging.judges, strict=True)
        for model in judges
    )
    actors = settings.actors or min(default_actors(settings), -(-pixels // PIXELS_PER_ACTOR))
    read_once = ray.remote(_all_weights).options(num_cpus=settings.reader_cpus)
    weights = read_once.remote([model.uri for model in judging.models])
    tasks = [
        {"set": place, "shard": shard} for place, data in enumerate(judging.sets) for shard in range(len(data.shards))
    ]
    known = ray.put(judging)
    for found in through_actors(tasks, _LabeledReader(known), _Judge, ([known, weights],), settings, actors):
        yield from found.to_pylist()


def _all_weights(uris: list[str]) -> list[bytes]:
    """The files of weights of model directories, read once for all actors; one task, as each would start a process."""
    from models.card import read_card, read_weights

    return [read_weights(uri, read_card(uri)) for uri in uris]


class _LabeledReader:
    """Reads the labeled images of a shard once, and decodes them in each way: a row for so many images and a way."""

    def __init__(self, known: "ray.ObjectRef[Judging]") -> None:
        self._known = known

    def __call__(self, tasks: pa.Table) -> Iterator[pa.Table]:
        import ray

        judging: Judging = ray.get(self._known)
        for task in tasks.to_pylist():
            with told_errors():
                yield from self._decoded(judging, **task)

    def _decoded(self, judging: Judging, set: int, shard: int) -> Iterator[pa.Table]:
        views = sorted({judging.views[model] for model in judging.judges[set]})
        transforms = [judging.transforms[view] for view in views]
        settings = judging.settings
        rows = min(range_rows(transform, settings.range_bytes, settings.batch) for transform in transforms)
        images, start = judging.sets[set].decoded(shard, transforms), 0
        while held := list(islice(images, rows)):
            yield from self._tables(held, views, {"set": set, "shard": shard, "start": start})
            start += len(held)

    def _tables(
        self, held: "list[tuple[int, int, list[np.ndarray[Any, Any]]]]", views: list[int], where: dict[str, int]
    ) -> Iterator[pa.Table]:
        for place, view in enumerate(views):
            yield pa.table(
                {
                    **{name: pa.array([value], pa.int64()) for name, value in where.items()},
                    "view": pa.array([view], pa.int64()),
                    "index": pa.array([[index for index, _, _ in held]], pa.list_(pa.uint32())),
                    "label": pa.array([[label for _, label, _ in held]], pa.list_(pa.int64())),
                    "images": one_value([images[place] for _, _, images in held]),
                }
            )


class _Judge:
    """Holds the models; of each image, keeps what `prediction_table` needs.

    Args:
        known: references to what is judged and to the models' files of weights; in a list, so that Ray does not resolve them.
    """

    def __init__(self, known: "list[Any]") -> None:
        import ray

        from models.card import read_card
        from models.inference import Inference, Predictor

        self._judging: Judging = ray.get(known[0])
        self._problem: TophatError | None = None
        settings = self._judging.settings
        self._predictors: list[Predictor] = []
        try:
            with told_errors():
                check_gpu(settings)
                for model, content in zip(self._judging.models, ray.get(known[1]), strict=True):
                    classes = len(read_card(model.uri).class_names if model.outputs is None else model.outputs)
                    how = Inference(
                        classes_per_image=min(BEST, classes),
                        outputs=model.outputs,
                        batch_size=settings.batch,
                        views=settings.views,
                        precision=settings.precision,
                        threads=max(1, int(settings.cpus_per_actor)),
                        gpu=settings.gpus_per_actor > 0,
                    )
                    self._predictors.append(Predictor(model.uri, how, content))
        except TophatError as error:
            self._problem = (
                error  # raised at the first images: of an actor that fails as it is made, only a text comes back
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        with told_errors():
            if self._problem is not None:
                raise self._problem
            return self._judged(table)

    def _judged(self, table: pa.Table) -> pa.Table:
        judging = self._judging
        task = table.select(["set", "view", "shard", "start"]).to_pylist()[0]
        side = judging.transforms[task["view"]].size
        images = only_value(table["images"]).reshape(-1, 3, side, side)
        labels = table["label"].combine_chunks().flatten().to_numpy()
        models = [model for model in judging.judges[task["set"]] if judging.views[model] == task["view"]]
        found = [self._predictors[model](images, labels) for model in models]
        # The place of the label among the best; -1 where it is not among them.
        hits = [one.classes == labels[:, None] for one in found]
        ranks = [np.where(hit.any(axis=1), hit.argmax(axis=1), -1).astype(np.int8) for hit in hits]

        def lists(values: "Sequence[np.ndarray[Any, Any]]") -> pa.ListArray:
            ends = list(accumulate((len(each) for each in values), initial=0))
            return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.concatenate(values)))

        count = len(models)
        return pa.table(
            {
                "set": pa.array([task["set"]] * count, pa.int32()),
                "model": pa.array(models, pa.int32()),
                "shard": pa.array([task["shard"]] * count, pa.int32()),
                "start": pa.array([task["start"]] * count, pa.int64()),
                "index": pa.chunked_array(table["index"].chunks * count),
                "label": lists([labels] * count),
                "predicted": lists([one.classes[:, 0] for one in found]),
                "score": lists([one.scores[:, 0] for one in found]),
                "label_score": lists([one.label_scores for one in found if one.label_scores is not None]),
                "rank": lists(ranks),
            }
        )
