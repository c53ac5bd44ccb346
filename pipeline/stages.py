"""The stages of a run that are about images: what each depends on, and what it says of what it made.

A stage is a function from a slice of the recipe and the stages before it to a `Made` handle. `pipeline.teaching` has those that make models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cluster import storage
from cluster.errors import RecipeError, SourceError
from cluster.resources import Bundle, Demand
from cluster.store import Key, Made, Outside, Watched
from models.card import read_card
from pipeline.context import ListedFiles, Run, place_of, referred
from pipeline.data import labeled as labeled_stage
from pipeline.data import rejects as rejected
from pipeline.data.labeled import Survey
from pipeline.data.labels import label_file
from pipeline.data.loading import TrainingSet, dhat_training_set
from pipeline.data.sources import ImageSource
from pipeline.duplicates.exclude import Excluded
from pipeline.evaluation import Trained
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Recipe, Score
from pipeline.recipe.uris import SIDECAR
from pipeline.report import gallery
from pipeline.report.gallery import Gallery
from pipeline.scoring import beside
from pipeline.scoring import score as scoring
from pipeline.scoring.score import Scored
from pipeline.selection import dhat as dhat_stage
from pipeline.selection import record as selection_record
from pipeline.selection import select as selection
from pipeline.selection import tags as tags_stage
from pipeline.selection.dhat import Dhat
from pipeline.selection.pick import Table, lists, pick
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
        held_for_test: images of D that are kept for the test set, beside those.
        copies: of a test or validation set: images whose bytes are those of one of D.
    """

    class_names: tuple[str, ...]
    images: int
    rejected: int
    shards: int
    per_class: tuple[int, ...]
    source: str
    held_out: int = 0
    held_for_test: int = 0
    copies: int = 0


@dataclass(frozen=True)
class LabeledSet:
    """Labeled images, to train on or to measure with.

    Attributes:
        made: the stage that surveyed them.
        folder: of the stage's, the one that holds them.
        balance: whether the images of smaller classes count several times, so that an epoch has of each class as many.
    """

    made: Made[Surveyed]
    folder: str
    balance: bool = False

    @property
    def inputs(self) -> Mapping[str, str]:
        """What a stage that uses them depends on."""
        return {f"labeled.{self.folder}": self.made.fingerprint, **({"balance": "classes"} if self.balance else {})}

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
        return labeled_stage.training_set(source, labels, self.made.outputs.class_names, balance=self.balance)


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
    """D and the labeled sets that are held out: each read once, every image checked. What D itself gives up for the test set is drawn
    first, so that it stays where more or less is held out for validation."""
    settings, seed = recipe.labeled, recipe.seed_of("data")
    fractions = {"test": settings.test_fraction} if settings.test is None else {}
    fractions |= {"validation": settings.validation_fraction} if settings.validation is None else {}
    draw = {f"{name}_fraction": fraction for name, fraction in fractions.items()} | (
        {"seed": seed} if fractions else {}
    )

    def survey_train(place: str) -> Surveyed:
        found = _survey(this, "train")
        names = labeled_stage.class_names(found, settings.classes)
        recipe.check_class_count(len(names))
        labels = labeled_stage.number_labels("labeled.train", found, names, complete=True)
        held = dict.fromkeys(("test", "validation"), 0)
        for name, fraction in fractions.items():
            number = labeled_stage.TEST if name == "test" else labeled_stage.VALIDATION
            labels, drawn = labeled_stage.hold_out(labels, fraction, seed, draw=number)
            if not labeled_stage.count_labels(drawn, len(names)).any():
                rule = "can hold out no image, as every class of D has a single one left"
                fix = f"add images, or name a labeled.{name} source"
                raise RecipeError(f"labeled.{name}_fraction", fraction, rule, fix)
            held[name] = labeled_stage.save_labels(storage.join(place, name), found.source, drawn, ())
        labeled_stage.save_digests(place, found.digests)
        return _surveyed(place, "train", found, labels, names, **held)

    def survey_other(name: str, place: str) -> Surveyed:
        found, names = _survey(this, name), train.outputs.class_names
        labels = labeled_stage.number_labels(f"labeled.{name}", found, names, complete=False)
        if not labeled_stage.count_labels(labels, len(names)).any():
            root = found.source.reader.root
            raise SourceError(f"labeled.{name}.uri", root, "holds no image that can be used", "look at the files")
        copies = labeled_stage.count_copies(train.uri, found.digests)
        return replace(_surveyed(place, name, found, labels, names), copies=copies)

    def other(name: str, source: Source | None) -> LabeledSet:
        if source is None:
            return LabeledSet(train, name)
        inputs = {"labeled.train": train.fingerprint, **label_file(f"labeled.{name}", source.labels)}
        key = Key(f"labeled-{name}", {name: source}, inputs, watched=_listing(this, f"labeled.{name}"))
        return LabeledSet(this.once(key, Surveyed, lambda place: survey_other(name, place), demand=_ONE_CPU), name)

    sections = {"train": settings.train, "classes": settings.classes, **draw}
    file = label_file("labeled.train", settings.train.labels)
    key = Key("labeled-train", sections, file, watched=_listing(this, "labeled.train"))
    train = this.once(key, Surveyed, survey_train, demand=_ONE_CPU)
    if train.record is not None:
        recipe.check_class_count(len(train.outputs.class_names))
    validation = other("validation", settings.validation)
    return LabeledData(LabeledSet(train, "train", settings.balance), validation, other("test", settings.test))


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
    validation: int = 0,
    test: int = 0,
) -> Surveyed:
    images = labeled_stage.save_labels(storage.join(place, name), found.source, labels, found.rejects)
    return Surveyed(
        class_names=names,
        images=images,
        rejected=len(found.rejects),
        shards=len(found.source.shards()),
        per_class=tuple(labeled_stage.count_labels(labels, len(names)).tolist()),
        source=found.source.fingerprint(),
        held_out=validation,
        held_for_test=test,
    )


# Unlabeled images


@dataclass(frozen=True)
class Listed:
    """U as it was listed: shards, their bytes, and the listing's fingerprint."""

    shards: int
    bytes: int
    source: str


LISTING = beside.LISTING


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


TABLE, REJECTS = beside.TABLE, rejected.REJECTS
"""Folders of a scoring: the score table, and beside it the images that have no scores."""


def rejects_of(scores: Made[Scored]) -> str:
    """The rejects of a scoring: beside its table."""
    given: str = scores.outputs.rejects_uri
    return given if referred(scores, "table") else storage.join(scores.uri, REJECTS)


def score_unlabeled(
    this: Run, settings: Score, teacher: Made[Trained], data: LabeledData, pool: Made[Listed]
) -> Made[Scored]:
    """(2) The teacher on every image of U."""

    def work(place: str) -> Scored:
        source = images_of(pool)
        record = beside.Record.of(read_card(teacher.uri).fingerprint, source, data.class_names, settings)
        beside.publish(place, record, source)
        table, rejects = storage.join(place, TABLE), storage.join(place, REJECTS)
        with this.display.task("scores", None) as progress:
            outputs = teacher.outputs.class_outputs
            return scoring.score(source, teacher.uri, table, rejects, settings, progress, outputs)

    key = Key("scores", {"score": settings}, {"teacher": teacher.fingerprint, "unlabeled": pool.fingerprint})
    return this.once(key, Scored, work, demand=scoring.demand(settings), parts={"scores": TABLE, "rejects": REJECTS})


# Selection


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
            table, rejects = storage.join(place, TABLE), storage.join(place, REJECTS)
            return tags_stage.match_tags(
                tagged.field, source, data.class_names, table, rejects, tags_uri=where, progress=progress
            )

    listing = "" if tagged.tags == SIDECAR else _outside(tagged.field, tagged.tags)
    inputs = {**tagged.inputs, "tags": listing, "labeled.train": data.train.made.fingerprint}
    key = Key(name, {"images": tagged.images, "tags": tagged.tags}, inputs)
    return this.once(key, Matched, work, demand=_ONE_CPU, parts={name: TABLE})


def score_table(scores: Made[Scored], excluded: Made[Excluded] | None, data: LabeledData) -> Table:
    """What images are selected from by their scores."""
    left_out = () if excluded is None else (excluded.uri,)
    return Table(place_of(scores, "table", TABLE), len(data.class_names), scores.outputs.scored, left_out)


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
            table = score_table(scores, excluded, data)
            table = replace(table, uri=tags, scored=None) if tags else table
            selected = pick(settings, table, seed, place, progress)
        selection_record.publish(selected, settings.deciding(), data.class_names, images_of(pool))
        return selected

    key = Key(
        "selection",
        {"select": settings, "seed": seed},
        {**inputs, **lists(settings)},
        version=2,
        watched=referred(scores, "table"),
    )
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
                place_of(chosen, "selection"),
                images_of(pool),
                place,
                images_per_shard=recipe.dhat.images_per_shard,
                seed=seed,
                class_names=data.class_names,
                progress=progress,
            )

    key = Key(
        "dhat",
        {"dhat": recipe.dhat, "seed": seed},
        {"selection": chosen.fingerprint},
        watched=referred(chosen, "selection"),
    )
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
