"""Models that exist, as teachers and as beginnings of students: the user's own directories, and what a library has under a name."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import normalize

from pydantic import ValidationError

from cluster import storage
from cluster.errors import ModelError, RecipeError, shown
from cluster.store import Key, Made, Outside
from cluster.tasks import parallel_map
from models.card import CARD, WEIGHTS, ModelCard, read_card, read_weights
from models.config import LIBRARIES, ModelConfig, Outputs
from models.sources import SourceSpec, is_spec, obtain
from pipeline.context import Run
from pipeline.data.labeled import REJECTED, Labels, load_labels
from pipeline.data.sources import ImageSource
from pipeline.evaluation import BEST, Trained, prediction_table, save_predictions
from pipeline.recipe.sections import Recipe, Score, Teacher
from pipeline.scoring import score as scoring
from pipeline.stages import REJECTS, TABLE, LabeledData

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

MOST_ROWS = 200_000
"""Of a class map."""
TEMPLATES = ("a photo of a {}.",)
"""Of `zero-shot`, where the recipe has none."""
HELD_OUT = "held-out.parquet"
"""In the folder of a linear head: what it said of D's images when it was fitted without them."""


@dataclass(frozen=True)
class Existing:
    """A model directory that is not of the run's own training.

    Attributes:
        field: of the recipe, which names it.
        said: what the field says.
        uri: of the directory.
        fingerprint: what it depends on.
    """

    field: str
    said: str
    uri: str
    fingerprint: str | Outside

    def card(self) -> ModelCard:
        """What it says of itself.

        Raises:
            ModelError: it is no model directory.
        """
        try:
            return read_card(self.uri)
        except ModelError as error:
            raise ModelError(self.field, self.said, error.rule, error.fix) from None

    def config(self, changed: Mapping[str, Any] | None = None) -> ModelConfig:
        """Its network, with some fields of the transform changed.

        Raises:
            ModelError: it is no model directory, or the fields do not fit the others.
        """
        model = self.card().model
        try:
            return model.with_input(changed or {})
        except ValidationError as error:
            rule = error.errors()[0]["msg"].removeprefix("Value error, ")
            fix = f"give every field that must fit; {self.said} has the others"
            raise ModelError("student.transform", changed, rule, fix) from None

    def now(self, made: Made[Trained]) -> "Existing":
        """What a stage has made of it."""
        return replace(self, uri=made.uri, fingerprint=made.fingerprint)

    @property
    def given(self) -> bool:
        """Whether it is there before the run: a directory of the user's."""
        return isinstance(self.fingerprint, Outside)


def made_early(this: Run, recipe: Recipe) -> None:
    """Makes the model directories of libraries' names that need nothing of D: a name that does not exist, or weights that cannot be had, are
    told before anything is started."""
    teacher = recipe.taught
    wanted: list[tuple[str, str | None, Teacher | None]] = [("student", recipe.student.start, None)]
    if teacher is not None:
        wanted.insert(0, ("teacher", teacher.ready, teacher))
    for role, said, section in wanted:
        library = (said or "").partition(":")[0]
        if said is not None and is_spec(said) and library in LIBRARIES and library != "open_clip":
            alone = role == "teacher" and section is not None and section.self_training is not None
            with this.named("self-training" if alone else ""):
                model = existing(this, role, said, None, section)
            if role == "student":
                model.config(recipe.student.changed_input)


def existing(this: Run, role: str, said: str, data: LabeledData | None, teacher: Teacher | None = None) -> Existing:
    """The model that a recipe names for a role, `teacher` or `student`; what a library has becomes a directory of the run's.

    Args:
        this: the run.
        role: whose it is.
        said: the directory's URI, or a name such as `timm:resnet50`.
        data: has the classes, for a model that is made for them by their names; None where it needs none.
        teacher: its section, where it is one.
    """
    field = "teacher.model" if role == "teacher" else f"{role}.start"
    if not is_spec(said):
        model = Existing(field, said, storage.absolute(said), "")
        return Existing(field, said, model.uri, Outside.at(field, said, lambda: model.card().fingerprint))
    library = said.partition(":")[0]
    named = library == "open_clip" or library not in LIBRARIES  # which have no classes of their own
    zero_shot = teacher is not None and teacher.head == "zero-shot"
    templates = (teacher.templates or TEMPLATES) if teacher is not None and zero_shot else ()

    def work(place: str) -> Trained:
        names = data.class_names if named and data is not None else ()
        card = obtain(SourceSpec(said, class_names=names, templates=templates), place, field)
        return Trained(0, card.model.architecture, card.parameters, dict(card.metrics), [])

    classes = {"labeled.train": data.train.made.fingerprint} if named and data is not None else {}
    key = Key(f"{role}-source", {"model": said, "templates": templates}, classes)
    made = this.once(key, Trained, work, needs_ray=False)
    return Existing(field, said, made.uri, made.fingerprint)


def ready_model(this: Run, model: Existing, class_map: str | None, data: LabeledData) -> Made[Trained]:
    """A teacher that exists, as it is; copied, so that the run has all that it depends on.

    Raises:
        ModelError: it is no model directory, or does not know every class of D.
    """

    def work(place: str) -> Trained:
        card = model.card()
        names = _renamed(card.class_names, class_map, data.class_names)
        outputs = class_outputs(model.said, names, data.class_names, merge=class_map is not None)
        copy_model(model.uri, place)
        read_weights(place, read_card(place))  # the copy is whole, and of one model
        same = outputs == tuple(range(len(card.class_names)))
        metrics = dict(card.metrics)
        return Trained(
            0,
            card.model.architecture,
            card.parameters,
            metrics,
            [],
            class_outputs=None if same else outputs,
            source=str(card.source or ""),
        )

    inputs: dict[str, str | Outside] = {"model": model.fingerprint, "labeled.train": data.train.made.fingerprint}
    if class_map is not None:
        inputs["class_map"] = Outside.at("teacher.class_map", class_map, lambda: _content(class_map))
    return this.once(Key("teacher", {}, inputs), Trained, work, needs_ray=False)


# Classes


def class_outputs(
    uri: str, known: Sequence[str], wanted: Sequence[str], of: str = "D", *, merge: bool = False
) -> Outputs:
    """The model's output for each class, of D or of something else, found by name.

    Args:
        uri: of the model, for messages.
        known: the name of each output.
        wanted: the classes.
        of: whose they are, for messages.
        merge: whether several outputs of one name are one class, whose probabilities add up.

    Raises:
        ModelError: it has none for some of them, or several for one.
    """
    places: dict[str, list[int]] = {}
    for number, name in enumerate(known):
        places.setdefault(normalize("NFC", name), []).append(number)
    found = [places.get(normalize("NFC", name), []) for name in wanted]
    missing = [name for name, numbers in zip(wanted, found, strict=True) if not numbers]
    for name, numbers in zip(wanted, found, strict=True):
        if len(numbers) > 1 and not merge:
            rule = f"has {len(numbers)} outputs of the name {shown(name, 60)}, a class of {of}"
            raise ModelError("teacher.model", uri, rule, "give its outputs names that differ, in its model.json")
    if missing:
        raise ModelError(
            "teacher.model",
            uri,
            f"has no output for {len(missing)} of the {len(wanted)} classes of {of} ({_few(missing)}); "
            f"its own {len(known)} are {_few(known)}",
            "rename the classes of D, give teacher.class_map, or have a new last layer with teacher.head: linear",
        )
    return tuple(numbers[0] if len(numbers) == 1 else tuple(numbers) for numbers in found)


def _few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(shown(name, 60) for name in names[:5]) + more


def _renamed(own: Sequence[str], class_map: str | None, wanted: Sequence[str]) -> list[str]:
    """The name of each output, as D calls it; an output that a class map does not name has none."""
    if class_map is None:
        return list(own)
    mapped = read_class_map(class_map)
    unknown = [name for name in mapped if name not in {normalize("NFC", one) for one in own}]
    if unknown:
        rule = f"names {len(unknown)} classes that the model does not have ({_few(unknown)})"
        raise RecipeError("teacher.class_map", class_map, rule, f"its own {len(own)} are {_few(own)}")
    strange = sorted(set(mapped.values()) - {normalize("NFC", name) for name in wanted})
    if strange:
        rule = f"names {len(strange)} classes that D does not have ({_few(strange)})"
        raise RecipeError("teacher.class_map", class_map, rule, f"those of D are {_few(wanted)}")
    return [mapped.get(normalize("NFC", name), "") for name in own]


def _content(uri: str) -> str:
    """The text of a class map.

    Raises:
        RecipeError: it is none.
    """
    content = storage.read_bytes(uri)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError("teacher.class_map", uri, "is not a text in UTF-8", "save it as UTF-8") from None


def read_class_map(uri: str) -> dict[str, str]:
    """The class of D for classes of a model: CSV, two columns, no header.

    Raises:
        RecipeError: a row has not two columns, or a class of the model stands for two.
        StorageError: it cannot be read.
    """
    found: dict[str, str] = {}
    for number, row in enumerate(csv.reader(io.StringIO(_content(uri))), 1):
        if not row:
            continue
        if len(row) != 2 or not all(row) or number > MOST_ROWS:
            rule = (
                f"has in line {number} {len(row)} columns" if len(row) != 2 else f"has an empty name in line {number}"
            )
            raise RecipeError("teacher.class_map", uri, rule, "give two columns: class of the model, class of D")
        own, wanted = (normalize("NFC", name.strip()) for name in row)
        if found.setdefault(own, wanted) != wanted:
            rule = f"has {shown(own, 60)} twice, for {shown(found[own], 60)} and {shown(wanted, 60)}"
            raise RecipeError("teacher.class_map", uri, rule, "let each class of the model stand for one of D")
    return found


# A linear head


def fit_linear_head(
    this: Run, name: str, model: Existing, settings: Score, data: LabeledData, seed: int
) -> Made[Trained]:
    """The model with a last layer by logistic regression on its features of D: of all of it, those held out for validation too, where the
    model is the teacher then; of what is trained on, where it is trained further.

    Args:
        this: the run.
        name: of the stage.
        model: whose features they are.
        settings: how images pass through it.
        data: D.
        seed: of the parts in which images are held out to choose the L2.
    """
    settings = settings.model_copy(
        update={"classes_per_image": 1, "embedding": True, "views": "center", "logits": False}
    )

    def work(place: str) -> Trained:
        source, labels = _all_of(data) if name == "teacher" else load_labels(data.train.uri)
        table, rejects = storage.join(place, TABLE), storage.join(place, REJECTS)
        with this.display.task(name, None) as progress:
            scoring.score(source, model.uri, table, rejects, settings, progress)
        about = _Fitting(model.uri, model.said, table, data.class_names, seed, data.train.balance, place)
        (made,) = parallel_map(_fit, [(about, source, labels)])
        return made

    sections = {"precision": settings.precision, "seed": seed}
    inputs: Mapping[str, str | Outside] = {"model": model.fingerprint, **data.train.inputs, **data.validation.inputs}
    watched = (*data.train.watched, *data.validation.watched)
    key = Key(name, sections, inputs, watched=watched)
    return this.once(key, Trained, work, demand=scoring.demand(settings))


def _all_of(data: LabeledData) -> tuple[ImageSource, Labels]:
    """D: the images to train on and, where they are a part of it, those that are held out."""
    source, labels = load_labels(data.train.uri)
    if data.validation.made is not data.train.made:
        return source, labels
    _, held_out = load_labels(data.validation.uri)
    return source, [np.maximum(one, other) for one, other in zip(labels, held_out, strict=True)]


@dataclass(frozen=True)
class _Fitting:
    """What a process that fits a head is told: the model and its name in the recipe, the score table with its features, the classes, the
    seed, whether all classes count alike, and the stage's folder."""

    model: str
    said: str
    table: str
    class_names: tuple[str, ...]
    seed: int
    balance: bool
    place: str


def _fit(job: tuple[_Fitting, ImageSource, Labels]) -> Trained:
    """Fits and publishes, in a process of Ray's."""
    from models.directory import save
    from models.linear import fit_head, with_head

    about, source, labels = job
    names = about.class_names
    images = _labeled_features(about.table, source, labels)
    numbers = images["label"].to_numpy()
    features = images["embedding"].combine_chunks().flatten().to_numpy().reshape(len(numbers), -1).astype(np.float32)
    head = fit_head(features, numbers, len(names), about.seed, balance=about.balance)
    network, config = with_head(about.model, head, list(names))
    metrics = {
        "images": float(len(numbers)),
        "val_top1": float((head.held_out.argmax(axis=1) == numbers).mean()),
        "val_loss": min(head.losses),
        "l2": 1 / head.strength,
    }
    card = save(
        about.place,
        network,
        config=config,
        class_names=list(names),
        metrics=metrics,
        provenance={"head": "linear", "of": about.said},
        source=read_card(about.model).source,
    )
    save_predictions(storage.join(about.place, HELD_OUT), _predictions(images, head.held_out, source, names))
    figures, source_said = dict(card.metrics), str(card.source or "")
    return Trained(
        len(numbers), config.architecture, card.parameters, figures, [], held_out=HELD_OUT, source=source_said
    )


def _labeled_features(table: str, source: ImageSource, labels: Labels) -> pa.Table:
    """The images in a score table that have a label, by the order of their shards, then index: `shard`, its place, `index`, `label` and
    `embedding`."""
    parts = []
    for entry in storage.list_files(table, ".parquet"):
        with storage.open_input(storage.join(table, entry.path)) as file:
            parts.append(pq.read_table(file, columns=["shard", "index", "embedding"]))
    found = pa.concat_tables(parts)
    places = {shard.name: place for place, shard in enumerate(source.shards())}
    rows = [
        (places[shard], index)
        for shard, index in zip(*(found[name].to_pylist() for name in ("shard", "index")), strict=True)
    ]
    numbers = pa.array([int(labels[place][index]) for place, index in rows], pa.int64())
    found = found.set_column(0, "shard", pa.array([place for place, _ in rows], pa.int32())).append_column(
        "label", numbers
    )
    return found.filter(pc.not_equal(numbers, REJECTED)).sort_by([("shard", "ascending"), ("index", "ascending")])


def _predictions(images: pa.Table, scores: NDArray[np.float32], source: ImageSource, names: Sequence[str]) -> pa.Table:
    """What a head said of images that it was fitted without, float32 [N, classes]."""
    labels = images["label"].to_numpy()
    best = np.argsort(-scores, axis=1, kind="stable")[:, :BEST]
    hits = best == labels[:, None]
    every = pa.table(
        {
            "shard": images["shard"],
            "index": images["index"],
            "label": labels,
            "predicted": best[:, 0],
            "score": np.take_along_axis(scores, best[:, :1], axis=1)[:, 0],
            "label_score": scores[np.arange(len(labels)), labels],
            "rank": np.where(hits.any(axis=1), hits.argmax(axis=1), -1),
        }
    )
    parts = [every.filter(pc.equal(every["shard"], place)).to_pydict() for place in pc.unique(every["shard"])]
    return prediction_table([part | {"shard": part["shard"][0]} for part in parts], source.shards(), names)


def copy_model(source: str, target: str) -> None:
    """Copies a model directory; the card, which makes it complete, goes last."""
    for file in (WEIGHTS, CARD):
        with storage.local_copy(storage.join(source, file)) as local:
            storage.publish(storage.join(target, file), local)
