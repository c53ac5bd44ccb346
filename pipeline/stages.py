"""The stages of a run that are about images: what each depends on, and what it says of what it made.

A stage is a function from a slice of the recipe and the stages before it to a `Made` handle. `pipeline.teaching` has those that make models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster import storage
from cluster.errors import RecipeError, SourceError, StageError
from cluster.resources import Bundle, Demand
from cluster.store import Key, Made, Outside, Watched
from pipeline.context import ListedFiles, Run
from pipeline.data import labeled as labeled_stage
from pipeline.data.labeled import Survey
from pipeline.data.labels import label_file
from pipeline.data.loading import TrainingSet, dhat_training_set
from pipeline.data.sources import ImageSource
from pipeline.duplicates import exclude as deduplication
from pipeline.duplicates.exclude import Excluded
from pipeline.evaluation import Candidate, Measured, Trained, measure
from pipeline.recipe.sections import SIDECAR, Recipe, Score, Source
from pipeline.report import gallery
from pipeline.report.gallery import Gallery
from pipeline.scoring import score as scoring
from pipeline.scoring.score import Scored
from pipeline.selection import dhat as dhat_stage
from pipeline.selection import select as selection
from pipeline.selection import tags as tags_stage
from pipeline.selection.dhat import Dhat
from pipeline.selection.select import Selected
from pipeline.selection.tags import Matched

# Labeled images


@dataclass(frozen=True)
class Surveyed:
    """What a labeled source holds.

    Attributes:
        class_names: class i of the labels is class_names[i].
        images: that can be used.
        rejected: that cannot.
        shards: of the source.
        per_class: `images` of each class.
        source: fingerprint of its listing.
        held_out: images of D that are kept for validation, beside `images`.
    """

    class_names: tuple[str, ...]
    images: int
    rejected: int
    shards: int
    per_class: tuple[int, ...]
    source: str
    held_out: int = 0


@dataclass(frozen=True)
class LabeledSet:
    """Labeled images, to train on or to measure with.

    Attributes:
        made: the stage that surveyed them.
        folder: of the stage's, the one that holds them.
    """

    made: Made[Surveyed]
    folder: str

    @property
    def inputs(self) -> Mapping[str, str]:
        """What a stage that uses them depends on."""
        return {f"labeled.{self.folder}": self.made.fingerprint}

    @property
    def uri(self) -> str:
        """Where their listing and labels are."""
        return storage.join(self.made.uri, self.folder)

    @property
    def watched(self) -> tuple[Watched, ...]:
        """What a stage that uses them reads outside of the store."""
        name, uri = self.made.key.stage.replace("-", ".", 1), self.uri  # and no more: a trial travels with it
        return (ListedFiles(name, lambda: labeled_stage.load_labels(uri)[0]),)

    def load(self) -> TrainingSet:
        """The images."""
        source, labels = labeled_stage.load_labels(self.uri)
        return labeled_stage.training_set(source, labels, self.made.outputs.class_names)


@dataclass(frozen=True)
class LabeledData:
    """D, and what settings are chosen and models are measured on."""

    train: LabeledSet
    validation: LabeledSet
    test: LabeledSet

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the networks' outputs."""
        return self.train.made.outputs.class_names


_ONE_CPU = Demand("labeled", 1, (Bundle(1, 1.0),))


def survey_labeled(this: Run, recipe: Recipe) -> LabeledData:
    """D and the labeled sets that are held out: each read once, every image checked."""
    settings, seed = recipe.labeled, recipe.seed_of("data")
    holds_out = settings.validation is None
    draw = {"validation_fraction": settings.validation_fraction, "seed": seed} if holds_out else {}

    def survey_train(place: str) -> Surveyed:
        found = _survey(this, "train")
        names = labeled_stage.class_names(found, settings.classes)
        recipe.check_class_count(len(names))
        labels, held = labeled_stage.number_labels("labeled.train", found, names, complete=True), None
        if holds_out:
            labels, held = labeled_stage.hold_out(labels, settings.validation_fraction, seed)
            if not labeled_stage.count_labels(held, len(names)).any():
                rule = "can hold out no image, as every class of D has a single one"
                fix = "add images, or name a labeled.validation source"
                raise RecipeError("labeled.validation_fraction", settings.validation_fraction, rule, fix)
            labeled_stage.save_labels(storage.join(place, "validation"), found.source, held, ())
        return _surveyed(place, "train", found, labels, names, held)

    def survey_other(name: str, place: str) -> Surveyed:
        found, names = _survey(this, name), train.outputs.class_names
        labels = labeled_stage.number_labels(f"labeled.{name}", found, names, complete=False)
        if not labeled_stage.count_labels(labels, len(names)).any():
            root = found.source.reader.root
            raise SourceError(f"labeled.{name}.uri", root, "holds no image that can be used", "look at the files")
        return _surveyed(place, name, found, labels, names)

    def other(name: str, source: Source) -> LabeledSet:
        inputs = {"labeled.train": train.fingerprint, **label_file(f"labeled.{name}", source.labels)}
        key = Key(f"labeled-{name}", {name: source}, inputs, watched=_listing(this, f"labeled.{name}"))
        return LabeledSet(this.once(key, Surveyed, lambda place: survey_other(name, place), demand=_ONE_CPU), name)

    sections = {"train": settings.train, "classes": settings.classes, **draw}
    file = label_file("labeled.train", settings.train.labels)
    key = Key("labeled-train", sections, file, watched=_listing(this, "labeled.train"))
    train = this.once(key, Surveyed, survey_train, demand=_ONE_CPU)
    if train.record is not None:
        recipe.check_class_count(len(train.outputs.class_names))
    given = settings.validation
    validation = LabeledSet(train, "validation") if given is None else other("validation", given)
    return LabeledData(LabeledSet(train, "train"), validation, other("test", settings.test))


def _listing(this: Run, field: str) -> tuple[Watched, ...]:
    return (ListedFiles(field, lambda: this.sources[field]),)


def _survey(this: Run, name: str) -> Survey:
    with this.display.task(f"labeled-{name}", None) as progress:
        return labeled_stage.survey(f"labeled.{name}", this.sources[f"labeled.{name}"], progress)


def _surveyed(
    place: str,
    name: str,
    found: Survey,
    labels: labeled_stage.Labels,
    names: tuple[str, ...],
    held: labeled_stage.Labels | None = None,
) -> Surveyed:
    images = labeled_stage.save_labels(storage.join(place, name), found.source, labels, found.rejects)
    return Surveyed(
        class_names=names,
        images=images,
        rejected=len(found.rejects),
        shards=len(found.source.shards()),
        per_class=tuple(labeled_stage.count_labels(labels, len(names)).tolist()),
        source=found.source.fingerprint(),
        held_out=0 if held is None else int(labeled_stage.count_labels(held, len(names)).sum()),
    )


# Unlabeled images


@dataclass(frozen=True)
class Listed:
    """U as it was listed: shards, their bytes, and the listing's fingerprint."""

    shards: int
    bytes: int
    source: str


LISTING = "listing.parquet"


def list_unlabeled(this: Run, unlabeled: Source) -> Made[Listed]:
    """U, listed once."""

    def work(place: str) -> Listed:
        source = this.sources["unlabeled"]
        source.save(storage.join(place, LISTING))
        return Listed(len(source.shards()), source.bytes, source.fingerprint())

    deciding = {k: v for k, v in unlabeled.deciding().items() if k != "label_column"}  # U has no labels
    return this.once(Key("unlabeled", {"unlabeled": deciding}), Listed, work, needs_ray=False)


def images_of(pool: Made[Listed] | Made[Matched]) -> ImageSource:
    """The images that a stage has listed."""
    return ImageSource.load(storage.join(pool.uri, LISTING))


TABLE, REJECTS = "table", "rejects"
"""Folders of a scoring: the score table, and beside it the images that have no scores."""


def score_unlabeled(this: Run, settings: Score, teacher: Made[Trained], pool: Made[Listed]) -> Made[Scored]:
    """(2) The teacher on every image of U."""

    def work(place: str) -> Scored:
        table, rejects = storage.join(place, TABLE), storage.join(place, REJECTS)
        with this.display.task("scores", None) as progress:
            outputs = teacher.outputs.class_outputs
            return scoring.score(images_of(pool), teacher.uri, table, rejects, settings, progress, outputs)

    key = Key("scores", {"score": settings}, {"teacher": teacher.fingerprint, "unlabeled": pool.fingerprint})
    return this.once(key, Scored, work, demand=scoring.demand(settings), parts={"scores": TABLE, "rejects": REJECTS})


# Selection


def exclude(
    this: Run,
    recipe: Recipe,
    teacher: Made[Trained],
    scores: Made[Scored],
    data: LabeledData,
    pool: Made[Listed],
) -> Made[Excluded] | None:
    """What of U is left out before selection (supplement 5); None where nothing is looked for."""
    settings = recipe.deduplicate
    if not settings.on:
        return None
    other = deduplication.features_model(this, "deduplicate.model", settings)
    model = deduplication.Features(teacher.uri, teacher.fingerprint) if other is None else other
    inputs = {
        "unlabeled": pool.fingerprint,
        **data.validation.inputs,
        **data.test.inputs,
        "model": model.fingerprint if settings.near else "",
        "embeddings": scores.fingerprint if settings.near and other is None else "",
    }
    subject = deduplication.Subject(
        unlabeled=lambda: images_of(pool),
        sets=lambda: tuple(
            deduplication.surveyed_set(name, labeled.uri)
            for name, labeled in (("validation", data.validation), ("test", data.test))
        ),
        model_uri=model.uri,
        embeddings=storage.join(scores.uri, TABLE) if other is None else None,
        inputs=inputs,
    )
    return deduplication.deduplicate(this, subject, settings, recipe.score, "deduplicate.decisions")


@dataclass(frozen=True)
class Tagged:
    """Images and their tags.

    Attributes:
        field: what names the tags, for messages.
        tags: URI of Parquet files with words, or `sidecar`.
        images: the source, as the recipe has it.
        listed: gives the source, listed.
        inputs: fingerprints of what that listing depends on.
    """

    field: str
    tags: str
    images: Source
    listed: Callable[[], ImageSource]
    inputs: Mapping[str, str]


def _outside(field: str, uri: str) -> Outside:
    """Parquet files that the user gives."""
    return Outside.at(field, uri, lambda: selection.listing(field, uri))


def match_tags(this: Run, name: str, tagged: Tagged, data: LabeledData) -> Made[Matched]:
    """The classes of images, by their tags (supplement 4.1); beside them the listing of the images, by which they are found again."""

    def work(place: str) -> Matched:
        source, where = tagged.listed(), None if tagged.tags == SIDECAR else tagged.tags
        source.save(storage.join(place, LISTING))
        with this.display.task(name, None) as progress:
            table = storage.join(place, TABLE)
            return tags_stage.match_tags(
                tagged.field, source, data.class_names, table, tags_uri=where, progress=progress
            )

    listing = "" if tagged.tags == SIDECAR else _outside(tagged.field, tagged.tags)
    inputs = {**tagged.inputs, "tags": listing, "labeled.train": data.train.made.fingerprint}
    key = Key(name, {"images": tagged.images, "tags": tagged.tags}, inputs)
    return this.once(key, Matched, work, demand=_ONE_CPU, parts={name: TABLE})


def select_top_k(
    this: Run,
    recipe: Recipe,
    scores: Made[Scored],
    excluded: Made[Excluded] | None,
    data: LabeledData,
    pool: Made[Listed],
) -> Made[Selected]:
    """(2) For each class the K best-scored images; or, with tags, K at random among those tagged with it; without the excluded."""
    settings, seed = recipe.select, recipe.seed_of("data")
    left_out = () if excluded is None else (excluded.uri,)
    inputs: dict[str, str | Outside] = {"labeled.train": data.train.made.fingerprint, "scores": scores.fingerprint}
    tags = settings.tags
    if tags is not None and (tags == SIDECAR or not tags_stage.is_matched("select.tags", tags)):
        own = {"unlabeled": pool.fingerprint}
        tagged = Tagged("select.tags", tags, recipe.unlabeled, lambda: images_of(pool), own)
        matched = match_tags(this, "tags", tagged, data)
        tags, inputs["tags"] = storage.join(matched.uri, TABLE), matched.fingerprint
    elif tags is not None:
        inputs["tags"] = _outside("select.tags", tags)
    if excluded is not None:
        inputs["excluded"] = excluded.fingerprint

    def work(place: str) -> Selected:
        with this.display.task("selection", None if tags else scores.outputs.scored) as progress:
            selected = selection.select(
                tags or storage.join(scores.uri, TABLE),
                place,
                images_per_class=settings.images_per_class,
                classes_per_image=settings.classes_per_image,
                num_classes=len(data.class_names),
                zipf_exponent=settings.zipf_exponent,
                class_weights=settings.class_weights,
                min_score=settings.min_score,
                exclude=(*settings.exclude, *left_out),
                tags=tags is not None,
                seed=seed,
                memory_mib=settings.memory_mib,
                progress=progress,
            )
        if tags is None and selected.images != scores.outputs.scored:
            raise StageError(
                f"{scores.outputs.scored} images are scored, but the selection saw {selected.images}: score again"
            )
        return selected

    lists = {f"select.exclude {uri}": _outside("select.exclude", uri) for uri in settings.exclude}
    key = Key("selection", {"select": settings, "seed": seed}, {**inputs, **lists}, version=2)
    return this.once(key, Selected, work)


@dataclass(frozen=True)
class DhatImages:
    """D-hat, to train on; its images are its own."""

    made: Made[Dhat]
    data: LabeledData
    watched: tuple[Watched, ...] = ()

    @property
    def inputs(self) -> Mapping[str, str]:
        """What a stage that uses it depends on."""
        return {"dhat": self.made.fingerprint}

    def load(self) -> TrainingSet:
        """The images."""
        return dhat_training_set(self.made.uri, len(self.data.class_names))


def materialize(this: Run, recipe: Recipe, chosen: Made[Selected], data: LabeledData, pool: Made[Listed]) -> DhatImages:
    """D-hat: the selected images, copied once into shuffled shards."""
    seed = recipe.seed_of("data")

    def work(place: str) -> Dhat:
        with this.display.task("dhat", chosen.outputs.selected) as progress:
            return dhat_stage.materialize(
                chosen.uri,
                images_of(pool),
                place,
                images_per_shard=recipe.dhat.images_per_shard,
                seed=seed,
                class_names=data.class_names,
                progress=progress,
            )

    key = Key("dhat", {"dhat": recipe.dhat, "seed": seed}, {"selection": chosen.fingerprint})
    return DhatImages(this.once(key, Dhat, work), data)


def show_gallery(
    this: Run, recipe: Recipe, chosen: Made[Selected], dhat: DhatImages, data: LabeledData
) -> Made[Gallery]:
    """The images of D-hat at chosen ranks of every class (Figure 2), as pages to look at before the training and after."""
    settings = recipe.report

    def work(place: str) -> Gallery:
        names = data.class_names
        facts = zip(names, dhat.made.outputs.counts, chosen.outputs.lowest_scores, strict=True)
        with this.display.task("gallery", None) as progress:
            return gallery.write_gallery(
                place,
                dhat.made.uri,
                [gallery.ClassCount(number, *fact) for number, fact in enumerate(facts)],
                title=recipe.name,
                first_ranks=settings.first_ranks,
                strided_ranks=settings.strided_ranks,
                rows_of=gallery.figure_ranks(len(names), 0, min(settings.classes, len(names))),  # spread over all
                progress=progress,
            )

    # Of models, these settings decide nothing; of these pages, everything.
    sections = {"report": settings.model_dump(mode="json"), "title": recipe.name}
    return this.once(Key("gallery", sections, dhat.inputs), Gallery, work)


# Evaluation


@dataclass(frozen=True)
class Evaluated:
    """Models on the test images: how many these are, and what each model did, by the model's name in the run."""

    images: int
    models: dict[str, Measured]


def evaluate(this: Run, test: LabeledSet, models: Mapping[str, Made[Trained]]) -> Made[Evaluated]:
    """Top-1 and top-5 of models, by their names in the run, on the test set, on which nothing was chosen."""

    def work(place: str) -> Evaluated:
        images = test.load()
        candidates = {name: Candidate(made.uri, made.outputs.class_outputs) for name, made in models.items()}
        with this.display.task("evaluation", images.images * len(models)) as progress:
            return Evaluated(images.images, measure(candidates, images, progress))

    inputs = {name: made.fingerprint for name, made in models.items()}
    key = Key("evaluation", {}, {**inputs, **test.inputs}, watched=test.watched)
    return this.once(key, Evaluated, work, demand=_ONE_CPU)
