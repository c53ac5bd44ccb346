"""The stage that measures a run's models on the test images, on which nothing was chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster import storage
from cluster.store import Key, Made
from cluster.tasks import parallel_map
from models.judging import Comparison
from pipeline.context import Run
from pipeline.data.loading import TrainingSet
from pipeline.data.reader import Reader
from pipeline.data.shards import Shard
from pipeline.evaluation import (
    Candidate,
    Measured,
    Trained,
    compared,
    load_predictions,
    measured,
    right,
    save_predictions,
)
from pipeline.recipe.sections import Score
from pipeline.report.gallery import contact_strip, thumbnail
from pipeline.scoring.judging import judge
from pipeline.scoring.score import demand
from pipeline.stages import LabeledData

PREDICTIONS, HELD_OUT, MISTAKES = "predictions", "held-out", "mistakes.jpg"
"""In the stage's folder: what each model said of the test images, and of the validation images where it is a teacher; and a contact strip."""
SHOWN = 24
"""Mistakes that are kept as images, at most."""
BASELINE = "supervised"


@dataclass(frozen=True)
class Mistake:
    """An image that a model has wrong.

    Attributes:
        name: its file, or its shard and row.
        label: its class.
        predicted: what it was taken for.
        score: the probability of that.
        shown: whether it could be made a thumbnail of.
    """

    name: str
    label: int
    predicted: int
    score: float
    shown: bool


@dataclass(frozen=True)
class Evaluated:
    """Models on the test images, by their names in the run.

    Attributes:
        images: how many test images.
        models: what each did.
        against: each round's fine-tuned student against the baseline, where the run has both.
        subject: the model that the run is about: the last student, else the last one there is.
        mistakes: its wrong answers of the highest scores, highest first; their thumbnails stand in `mistakes.jpg` in this order.
        held_out: what each teacher did on labeled images that it had not seen: the validation images, or those of D, each by a fit without it.
    """

    images: int
    models: dict[str, Measured]
    against: dict[str, Comparison]
    subject: str
    mistakes: tuple[Mistake, ...]
    held_out: dict[str, Measured]


def evaluate(this: Run, settings: Score, data: LabeledData, models: Mapping[str, Made[Trained]]) -> Made[Evaluated]:
    """What models, by their names in the run, say of the test images; and each teacher of the validation images.

    The predictor and the resources are those of `score`, and its precision; every model sees the center of an image, whatever
    `score.views` is, so that models of different recipes can be compared.
    """
    settings = settings.model_copy(update={"views": "center", "compile": False})
    students = [name for name in models if name.rpartition("/")[2] == "student"]
    teachers = [name for name in models if name == "teacher" or name in students[:-1]]

    def work(place: str) -> Evaluated:
        test, names = data.test.load(), data.class_names
        sets: dict[str, tuple[TrainingSet, Sequence[str]]] = {PREDICTIONS: (test, list(models))}
        own = {name: _own_held_out(models[name]) for name in teachers if models[name].outputs.held_out is not None}
        if judged := [name for name in teachers if name not in own]:
            sets[HELD_OUT] = (data.validation.load(), judged)
        total = sum(images.images * len(judges) for images, judges in sets.values())
        candidates = {name: Candidate(made.uri, made.outputs.class_outputs) for name, made in models.items()}
        with this.display.task("evaluation", total) as progress:
            found = judge(candidates, sets, names, settings, progress)
        if own:
            found[HELD_OUT] = found.get(HELD_OUT, {}) | own
        for folder, tables in found.items():
            for name, table in tables.items():
                save_predictions(_file(place, folder, name), table)
        on_test = found[PREDICTIONS]
        subject = students[-1] if students else list(models)[-1]
        mistakes, strip = _mistakes(test, on_test[subject])
        storage.publish(storage.join(place, MISTAKES), strip)
        return Evaluated(
            images=test.images,
            models={name: measured(table, len(names)) for name, table in on_test.items()},
            against={name: compared(on_test[name], on_test[BASELINE]) for name in students if BASELINE in on_test},
            subject=subject,
            mistakes=mistakes,
            held_out={name: measured(table, len(names)) for name, table in found.get(HELD_OUT, {}).items()},
        )

    key = Key(
        "evaluation",
        {"precision": settings.precision},
        {**{name: made.fingerprint for name, made in models.items()}, **data.test.inputs, **data.validation.inputs},
        version=2,
        watched=(*data.test.watched, *data.validation.watched),
    )
    parts = {PREDICTIONS: PREDICTIONS, HELD_OUT: HELD_OUT} if teachers else {PREDICTIONS: PREDICTIONS}
    return this.once(key, Evaluated, work, demand=demand(settings), parts=parts)


def _own_held_out(made: Made[Trained]) -> pa.Table:
    """Of a model that was fitted on validation images too: what it said of the images of D when it was fitted without them."""
    return load_predictions(storage.join(made.uri, str(made.outputs.held_out)))


def _file(place: str, folder: str, model: str) -> str:
    return storage.join(place, folder, f"{model}.parquet")


def predictions(made: Made[Evaluated], model: str) -> pa.Table:
    """What a model said of the test images (`pipeline.evaluation.prediction_table`)."""
    return load_predictions(_file(made.uri, PREDICTIONS, model))


def held_out_predictions(made: Made[Evaluated], teacher: str) -> pa.Table:
    """The same of a teacher, one of `Evaluated.held_out`, and the validation images.

    Those have labels, the teacher was not trained on them, and their scores are those of a score table (of one view): so the share of them
    that is right above a score tells how pure D-hat is there, for each class, without the test images being looked at.
    """
    return load_predictions(_file(made.uri, HELD_OUT, teacher))


def _mistakes(images: TrainingSet, table: pa.Table) -> tuple[tuple[Mistake, ...], bytes]:
    """The wrong answers of the highest scores, and their thumbnails side by side as a JPEG."""
    wrong = np.flatnonzero(~right(table))
    scores = np.nan_to_num(table["score"].to_numpy()[wrong], nan=-1.0)
    chosen = table.take(wrong[np.argsort(-scores, kind="stable")[:SHOWN]])
    places = {shard.name: number for number, shard in enumerate(images.shards)}
    shards = [places[name] for name in chosen["shard"].to_pylist()]
    rows = chosen.to_pylist()
    wanted: dict[int, list[int]] = {}
    for place, row in zip(shards, rows, strict=True):
        wanted.setdefault(place, []).append(row["index"])
    jobs = [(place, images.reader, images.shards[place], indices) for place, indices in wanted.items()]
    tiles = {(place, index): tile for made in parallel_map(_thumbnails, jobs) for place, index, tile in made}
    thumbnails = [tiles.get((place, row["index"])) for place, row in zip(shards, rows, strict=True)]
    mistakes = tuple(
        Mistake(
            row["file"] if row["file"] is not None else f"{row['shard']} [{row['index']}]",
            row["label"],
            row["predicted"],
            row["score"],
            tile is not None,
        )
        for row, tile in zip(rows, thumbnails, strict=True)
    )
    return mistakes, contact_strip(thumbnails)


def _thumbnails(job: tuple[int, Reader, Shard, list[int]]) -> list[tuple[int, int, bytes | None]]:
    place, reader, shard, indices = job
    rows = reader.read(shard, indices)
    return [(place, row.index, None if row.problem is not None else thumbnail(row.data)) for row in rows]
