"""Deduplication as stages: what is left out of U before selection (supplement 5).

Used by a run and by `tophat duplicates`. The last stage, `excluded`, is an exclusion list: a folder of Parquet files with the columns
shard and index, in which an image may occur more than once.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cluster import storage
from cluster.errors import InputError, ModelError, RunError
from cluster.progress import Progress
from cluster.store import RUN, Key, Made, Outside, RunStore, fingerprint
from pipeline.context import Run
from pipeline.data.labeled import REJECTED, load_labels
from pipeline.data.sources import ImageSource, open_source
from pipeline.duplicates.copies import find_copies
from pipeline.duplicates.nearest import LabeledSet, find_pairs, left_out, read_pairs
from pipeline.duplicates.review import Review, decided, read_decisions, write_review
from pipeline.recipe.deduplicate import Deduplicate
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Score
from pipeline.recipe.uris import RESNET18, TEACHER
from pipeline.scoring import beside
from pipeline.scoring import score as scoring

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EXCLUDED = pa.schema([("shard", pa.string()), ("index", pa.uint32()), ("reason", pa.string())])
"""Columns of an exclusion list."""
PAIRS_FILE = "pairs.parquet"
REVIEW = "review"
CLAIM = "tophat-duplicates"
"""Whose a folder is that `tophat duplicates` made."""


@dataclass(frozen=True)
class Features:
    """A model whose features are compared.

    Attributes:
        uri: its directory.
        fingerprint: changes when its weights do.
    """

    uri: str
    fingerprint: str | Outside


@dataclass(frozen=True)
class Subject:
    """What is compared with what.

    Attributes:
        unlabeled: gives U.
        sets: gives the labeled images that must not be in it.
        model_uri: the model whose features are compared.
        embeddings: a score table with U's embeddings by that model; None where they are to be made.
        inputs: fingerprints of the labeled sets, and of `unlabeled`, `model` and `embeddings`.
    """

    unlabeled: Callable[[], ImageSource]
    sets: Callable[[], tuple[LabeledSet, ...]]
    model_uri: str
    embeddings: str | None
    inputs: Mapping[str, str | Outside]

    def of(self, *without: str) -> dict[str, str | Outside]:
        """The inputs but some."""
        return {name: value for name, value in self.inputs.items() if name not in without}


@dataclass(frozen=True)
class Embeddings:
    """How many images were embedded: all, with features, and without."""

    images: int
    scored: int
    rejected: int


@dataclass(frozen=True)
class Pairs:
    """The ranked pairs of an image of U and a labeled one.

    Attributes:
        images: of U that were compared.
        nonfinite: other images of U, whose features are no numbers.
        labeled: images that they were compared with.
        pairs: that are kept.
        left_out: images of U that the settings leave out.
        finding: a hash of the pairs.
        nearest, within: those settings.
        review: the page on which people decide.
    """

    images: int
    nonfinite: int
    labeled: int
    pairs: int
    left_out: int
    finding: str
    nearest: int | None
    within: float | None
    review: str


@dataclass(frozen=True)
class Copies:
    """Images of U that were hashed, copies among them, and shards that could not be read to their end."""

    images: int
    copies: int
    unreadable_shards: int


@dataclass(frozen=True)
class Excluded:
    """An exclusion list: images on it as near-duplicates, as copies, and how many people decided on."""

    near: int
    copies: int
    decided: int


def surveyed_set(name: str, uri: str) -> LabeledSet:
    """A labeled set of a run, with the images that are used of it."""
    source, labels = load_labels(uri)
    return LabeledSet(name, source, tuple(np.flatnonzero(shard != REJECTED) for shard in labels))


def features_model(this: Run, field: str, settings: Deduplicate) -> Features | None:
    """The model whose features are compared, which torchvision's gets in the run; None for the teacher, or without need.

    Args:
        this: the run.
        field: what names the model, for messages.
        settings: with the model.

    Raises:
        ModelError: there is none, or it cannot be had.
    """
    from models.card import read_card

    if not settings.second_pass:
        return None
    if settings.model == RESNET18:
        made = _resnet18(this, field)
        return Features(made.uri, made.fingerprint)
    uri = storage.absolute(settings.model)
    try:
        return Features(uri, Outside.at(field, settings.model, lambda: read_card(uri).fingerprint))
    except ModelError as error:
        raise ModelError(field, settings.model, error.rule, f"name a model directory, or {RESNET18}") from None


@dataclass(frozen=True)
class Published:
    """A model that was published by others: where its weights come from."""

    url: str


def _resnet18(this: Run, field: str) -> Made[Published]:
    def work(place: str) -> Published:
        from models.weights import URL, publish_resnet18

        publish_resnet18(place, field)
        return Published(URL)

    return this.once(Key(RESNET18), Published, work, needs_ray=False)


def deduplicate(this: Run, subject: Subject, settings: Deduplicate, score: Score, field: str) -> Made[Excluded]:
    """The stages that `settings` ask for; returns the last, the exclusion list.

    Args:
        this: the run.
        subject: what is compared with what.
        settings: what is looked for and left out.
        score: batch size and actors of an embedding.
        field: what names the decision file, for messages.
    """
    pairs = _pairs(this, subject, settings, _embeddings(this, subject, score)) if settings.near else None
    copies = _copies(this, subject) if settings.copies else None
    return exclude(this, pairs, copies, settings.decisions, field)


def _embeddings(this: Run, subject: Subject, score: Score) -> Made[Embeddings]:
    def work(place: str) -> Embeddings:
        sources = {f"labeled-{number}": labeled.source for number, labeled in enumerate(subject.sets())}
        if subject.embeddings is None:
            sources["unlabeled"] = subject.unlabeled()
        with this.display.task("embeddings", None) as progress:
            return _embed(place, sources, subject.model_uri, score, progress)

    without = ("embeddings",) if subject.embeddings is None else ("embeddings", "unlabeled")
    return this.once(
        Key("embeddings", {"precision": score.precision}, subject.of(*without)),
        Embeddings,
        work,
        demand=scoring.demand(score),
    )


def _embed(
    place: str, sources: Mapping[str, ImageSource], model_uri: str, settings: Score, progress: Progress
) -> Embeddings:
    """Embeds the images of each source, as a score table `place/NAME` with P = 1. Goes on where it stopped."""
    alone = {"embedding": True, "classes_per_image": 1, "views": "center", "logits": False, "max_reject_fraction": 1.0}
    settings = settings.model_copy(update=alone)
    made = [
        scoring.score(
            source,
            model_uri,
            storage.join(place, name),
            storage.join(place, "rejects", name),
            settings,
            progress.part(name),
        )
        for name, source in sources.items()
    ]
    return Embeddings(sum(m.listed for m in made), sum(m.scored for m in made), sum(m.rejected for m in made))


def _pairs(this: Run, subject: Subject, settings: Deduplicate, embeddings: Made[Embeddings]) -> Made[Pairs]:
    def work(place: str) -> Pairs:
        uri, sets = storage.join(place, PAIRS_FILE), subject.sets()
        tables = [(one, storage.join(embeddings.uri, f"labeled-{number}")) for number, one in enumerate(sets)]
        unlabeled = subject.embeddings or storage.join(embeddings.uri, "unlabeled")
        with this.display.task("pairs", None) as progress:
            outputs = find_pairs(uri, tables, unlabeled, settings, progress)
        ranked = read_pairs(uri)
        sources = {labeled.name: labeled.source for labeled in sets}
        with this.display.task("review", None) as progress:
            out = left_out(ranked, settings.nearest, settings.within)
            review = Review(ranked, out, outputs["finding"], subject.unlabeled(), sources)
            page = write_review(storage.join(place, REVIEW), review, progress)
        return Pairs(**outputs, nearest=settings.nearest, within=settings.within, review=page)

    deciding = {k: v for k, v in settings.deciding().items() if k not in ("decisions", "copies", "model")}
    key = Key("pairs", {"deduplicate": deciding}, {**subject.of("model"), "embedded": embeddings.fingerprint})
    return this.once(key, Pairs, work)


def _copies(this: Run, subject: Subject) -> Made[Copies]:
    def work(place: str) -> Copies:
        with this.display.task("copies", None) as progress:
            return Copies(**find_copies(subject.unlabeled(), place, progress))

    return this.once(Key("copies", {}, {"unlabeled": subject.inputs["unlabeled"]}), Copies, work)


def exclude(
    this: Run, pairs: Made[Pairs] | None, copies: Made[Copies] | None, decisions_uri: str | None, field: str
) -> Made[Excluded]:
    """The exclusion list out of the stages `pairs` and `copies`, as far as they are there.

    Args:
        this: the run.
        pairs: near-duplicates.
        copies: copies inside U.
        decisions_uri: a review's decision file.
        field: what names it, for messages.

    Raises:
        InputError: the decision file is wrong, or of other pairs.
        RunError: there is nothing to decide on.
    """
    decisions = None if decisions_uri is None else read_decisions(field, decisions_uri)
    if decisions is not None and pairs is None:
        raise RunError(field, decisions_uri, "finds no pairs to decide on", "look for near-duplicates first")

    def work(place: str) -> Excluded:
        near, count, judged = EXCLUDED.empty_table(), 0, 0
        if pairs is not None:
            ranked = read_pairs(storage.join(pairs.uri, PAIRS_FILE))
            out = left_out(ranked, pairs.outputs.nearest, pairs.outputs.within)
            if decisions is not None and decisions_uri is not None:
                judged = len(decisions.remove) + len(decisions.keep)
                out = decided(field, decisions_uri, decisions, ranked, pairs.outputs.finding, out)
            near = ranked.filter(pa.array(out))
        _publish_excluded(storage.join(place, "near.parquet"), near, "near-duplicate")
        if copies is not None:
            count = copies.outputs.copies
            _copy_parts(copies.uri, place)
        return Excluded(len(near), count, judged)

    said = None if decisions is None else hashlib.sha256(decisions.model_dump_json().encode()).hexdigest()
    made = {"pairs": pairs, "copies": copies}
    inputs = {name: stage.fingerprint for name, stage in made.items() if stage is not None}
    return this.once(Key("excluded", {"decisions": said}, inputs), Excluded, work, needs_ray=False)


def _copy_parts(source: str, target: str) -> None:
    def copy(entry: storage.FileEntry) -> None:
        with storage.open_input(storage.join(source, entry.path)) as file:
            _publish_excluded(storage.join(target, entry.path), pq.read_table(file), "copy")

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(copy, storage.list_files(source, ".parquet")))


def _publish_excluded(uri: str, images: pa.Table, reason: str) -> None:
    columns = [images["shard"], images["index"], pa.repeat(reason, len(images))]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=EXCLUDED), sink)
    storage.publish(uri, sink.getvalue().to_pybytes())


# Without a run


def prepare(
    store: RunStore, unlabeled: ImageSource, against: Sequence[Source], settings: Deduplicate, scores_uri: str | None
) -> Subject:
    """Claims the folder of `tophat duplicates`, once nothing is wrong with what it compares.

    Args:
        store: the folder.
        unlabeled: U.
        against: labeled images.
        settings: with the model.
        scores_uri: a score table with U's embeddings by that model.

    Returns:
        What is compared; the model is still to be had, by `find`.

    Raises:
        InputError: something is missing, or the scores are another model's.
        ModelError: there is no such model.
        RunError: the folder is another's.
    """
    from models.card import read_card

    if not settings.on:
        raise InputError("--nearest", "nothing", "must be given", "add --nearest N, --within D or --copies")
    inputs: dict[str, str | Outside] = {"unlabeled": unlabeled.fingerprint()}
    if not settings.near:
        store.claim(CLAIM, "")
        return Subject(lambda: unlabeled, tuple, "", None, inputs)
    if not against:
        raise InputError("--against", "nothing", "must be given", "add --against, or look for --copies alone")
    if settings.model == TEACHER:
        raise InputError("--model", TEACHER, "is known to a recipe's run only", "give the teacher's model directory")
    if settings.model == RESNET18 and scores_uri is not None:
        raise InputError("--scores", scores_uri, "are of a model that is not named", "add --model DIR, the model")
    sets = tuple(LabeledSet(one.uri, open_source("--against", one, labeled=False)) for one in dict.fromkeys(against))
    inputs["labeled"] = fingerprint([[labeled.name, labeled.source.fingerprint()] for labeled in sets])
    model = ""
    if settings.model != RESNET18:
        model = storage.absolute(settings.model)
        try:
            given = Outside.at("--model", settings.model, lambda: read_card(model).fingerprint)
        except ModelError as error:
            raise ModelError("--model", settings.model, error.rule, f"name a model directory, or {RESNET18}") from None
        inputs["model"] = given
        if scores_uri is not None:
            found = beside.find(scores_uri)
            table = scores_uri = found.table
            if (said := found.said()) is not None and said.get("model") != given.fingerprint:
                raise RunError("--scores", scores_uri, "holds scores made with another model", "give that --model")
            inputs["embeddings"] = Outside.at("--scores", scores_uri, lambda: _table_now(table))
    store.claim(CLAIM, "")
    return Subject(lambda: unlabeled, lambda: sets, model, scores_uri, inputs)


def _table_now(uri: str) -> str:
    return fingerprint([[f.path, f.size, f.etag] for f in storage.list_files(uri)])


def find(this: Run, what: Subject, settings: Deduplicate, score: Score) -> Made[Excluded]:
    """Deduplicates into a folder of its own. Goes on where it stopped.

    Args:
        this: a run in the folder, which is claimed.
        what: is compared.
        settings: what is left out.
        score: batch size and actors of an embedding.
    """
    if settings.near and not what.model_uri:
        model = _resnet18(this, "--model")
        what = replace(what, model_uri=model.uri, inputs={**what.inputs, "model": model.fingerprint})
    found = deduplicate(this, what, settings, score, "--decisions")
    this.name_result()
    return found


def decide(this: Run, decisions_uri: str) -> Made[Excluded]:
    """Takes a review's decision file back into the folder that `find` made.

    Raises:
        RunError: `find` did not finish there.
        InputError: the decision file is wrong.
    """
    fix = "find them first, with --source and --against"
    nothing = RunError("--out", this.store.uri, "holds no pairs to decide on", fix)
    if not storage.exists(storage.join(this.store.uri, RUN)):
        raise nothing
    this.reuse(RESNET18, Published)
    this.reuse("embeddings", Embeddings)
    pairs, copies = this.reuse("pairs", Pairs), this.reuse("copies", Copies)
    if pairs is None:
        raise nothing
    found = exclude(this, pairs, copies, decisions_uri, "--decisions")
    this.name_result()
    return found
