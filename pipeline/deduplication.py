"""Deduplication as stages: what is left out of U before selection (supplement 5).

Used by a run and by `tophat duplicates`. The last stage, `excluded`, is an exclusion list: a folder of Parquet files with the columns
shard and index, in which an image may occur more than once.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from cluster import storage
from cluster.errors import InputError, ModelError, RunError
from cluster.progress import Display
from pipeline import scoring
from pipeline.copies import find_copies
from pipeline.duplicates import LabeledSet, embed, find_pairs, left_out, read_pairs
from pipeline.labeled import REJECTED, load_labels
from pipeline.recipe import RESNET18, TEACHER, Deduplicate, Score, Source
from pipeline.review import Review, decided, read_decisions, write_review
from pipeline.sources import ImageSource, open_source
from pipeline.store import Finished, RunStore, fingerprint, read_json

# isort: split
# After cluster.storage: pyarrow.parquet loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STAGES = ("embeddings", "pairs", "copies", "excluded")
"""In order; those that the settings do not ask for are not run."""
EXCLUDED = pa.schema([("shard", pa.string()), ("index", pa.uint32()), ("reason", pa.string())])
"""Columns of an exclusion list."""
PAIRS_FILE = "pairs.parquet"
REVIEW = "review"
CLAIM = "tophat-duplicates"
"""Whose a folder is that `tophat duplicates` made."""


class Once(Protocol):
    """`RunStore.once`."""

    def __call__(
        self,
        name: str,
        sections: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[str], dict[str, Any]],
    ) -> Finished: ...


@dataclass(frozen=True)
class Subject:
    """What is compared with what.

    Attributes:
        unlabeled: U.
        sets: labeled images that must not be in it.
        model_uri: the model whose features are compared.
        embeddings: a score table with U's embeddings by that model; None where they are to be made.
        inputs: fingerprints of `unlabeled`, `labeled`, `model` and `embeddings`.
    """

    unlabeled: ImageSource
    sets: tuple[LabeledSet, ...]
    model_uri: str
    embeddings: str | None
    inputs: Mapping[str, str]


def surveyed_sets(labeled_uri: str, names: Sequence[str]) -> tuple[LabeledSet, ...]:
    """The sets of those names of a run's stage `labeled`, with the images that are used of each."""
    sets = []
    for name in names:
        source, labels = load_labels(storage.join(labeled_uri, name))
        sets.append(LabeledSet(name, source, tuple(np.flatnonzero(shard != REJECTED) for shard in labels)))
    return tuple(sets)


def features_model(field: str, settings: Deduplicate, store: RunStore) -> str | None:
    """Directory of the model whose features are compared, which torchvision's gets in the run; None for the teacher, or without need.

    Args:
        field: what names the model, for messages.
        settings: with the model.
        store: of the run.

    Raises:
        ModelError: there is none, or it cannot be had.
    """
    from models.card import CARD, read_card

    if not settings.second_pass:
        return None
    if settings.model == RESNET18:
        uri = store.place(RESNET18)
        if not storage.exists(storage.join(uri, CARD)):
            from models.pretrained import publish_resnet18

            publish_resnet18(uri, field)
        return uri
    uri = storage.absolute(settings.model)
    try:
        read_card(uri)
    except ModelError as error:
        raise ModelError(field, settings.model, error.rule, f"name a model directory, or {RESNET18}") from None
    return uri


def deduplicate(
    once: Once, display: Display, subject: Subject, settings: Deduplicate, score: Score, field: str
) -> Iterator[Finished]:
    """The stages that `settings` ask for, each as it is finished; the last is the exclusion list.

    Args:
        once: keeps what is finished.
        display: shows progress.
        subject: what is compared with what.
        settings: what is looked for and left out.
        score: batch size and actors of an embedding.
        field: what names the decision file, for messages.
    """
    found: dict[str, Finished] = {}
    if settings.near:
        yield (embeddings := _embeddings(once, display, subject, score))
        yield (pairs := _pairs(once, display, subject, settings, embeddings))
        found["pairs"] = pairs
    if settings.copies:
        yield (copies := _copies(once, display, subject))
        found["copies"] = copies
    yield exclude(once, found, settings.decisions, field)


def _embeddings(once: Once, display: Display, subject: Subject, score: Score) -> Finished:
    sources = {f"labeled-{number}": labeled.source for number, labeled in enumerate(subject.sets)}
    names = {"labeled", "model"}
    if subject.embeddings is None:
        sources["unlabeled"] = subject.unlabeled
        names.add("unlabeled")

    def work(place: str) -> dict[str, Any]:
        with display.task("embeddings", None) as progress:
            return embed(place, sources, subject.model_uri, score, progress)

    return once("embeddings", {}, {name: subject.inputs[name] for name in sorted(names)}, work)


def _pairs(once: Once, display: Display, subject: Subject, settings: Deduplicate, embeddings: Finished) -> Finished:
    tables = [
        (labeled, storage.join(embeddings.uri, f"labeled-{number}")) for number, labeled in enumerate(subject.sets)
    ]

    def work(place: str) -> dict[str, Any]:
        uri = storage.join(place, PAIRS_FILE)
        unlabeled = subject.embeddings or storage.join(embeddings.uri, "unlabeled")
        with display.task("pairs", None) as progress:
            outputs = find_pairs(uri, tables, unlabeled, settings, progress)
        ranked = read_pairs(uri)
        sources = {labeled.name: labeled.source for labeled in subject.sets}
        with display.task("review", None) as progress:
            review = Review(
                ranked,
                left_out(ranked, settings.nearest, settings.within),
                outputs["finding"],
                subject.unlabeled,
                sources,
            )
            page = write_review(storage.join(place, REVIEW), review, progress)
        return {**outputs, "nearest": settings.nearest, "within": settings.within, "review": page}

    sections = {"deduplicate": settings.model_dump(mode="json", exclude={"decisions", "copies", "model"})}
    inputs = {"embeddings": embeddings.fingerprint, "labeled": subject.inputs["labeled"]}
    if subject.embeddings is not None:
        inputs["scores"] = subject.inputs["embeddings"]
    return once("pairs", sections, inputs, work)


def _copies(once: Once, display: Display, subject: Subject) -> Finished:
    def work(place: str) -> dict[str, Any]:
        with display.task("copies", None) as progress:
            return find_copies(subject.unlabeled, place, progress)

    return once("copies", {}, {"unlabeled": subject.inputs["unlabeled"]}, work)


def exclude(once: Once, found: Mapping[str, Finished], decisions_uri: str | None, field: str) -> Finished:
    """The exclusion list out of the finished stages `pairs` and `copies`, as far as they are there.

    Args:
        once: keeps what is finished.
        found: those stages, by name.
        decisions_uri: a review's decision file.
        field: what names it, for messages.

    Raises:
        InputError: the decision file is wrong, or of other pairs.
        RunError: there is nothing to decide on.
    """
    decisions = None if decisions_uri is None else read_decisions(field, decisions_uri)
    if decisions is not None and "pairs" not in found:
        raise RunError(field, decisions_uri, "finds no pairs to decide on", "look for near-duplicates first")

    def work(place: str) -> dict[str, Any]:
        outputs = {"near": 0, "copies": 0, "decided": 0}
        near = EXCLUDED.empty_table()
        if "pairs" in found:
            pairs = found["pairs"]
            ranked = read_pairs(storage.join(pairs.uri, PAIRS_FILE))
            out = left_out(ranked, pairs.outputs["nearest"], pairs.outputs["within"])
            if decisions is not None and decisions_uri is not None:
                outputs["decided"] = len(decisions.remove) + len(decisions.keep)
                out = decided(field, decisions_uri, decisions, ranked, pairs.outputs["finding"], out)
            near = ranked.filter(pa.array(out))
        outputs["near"] = len(near)
        _publish_excluded(storage.join(place, "near.parquet"), near, "near-duplicate")
        if "copies" in found:
            outputs["copies"] = found["copies"].outputs["copies"]
            _copy_parts(found["copies"].uri, place)
        return outputs

    said = None if decisions is None else hashlib.sha256(decisions.model_dump_json().encode()).hexdigest()
    return once("excluded", {"decisions": said}, {name: stage.fingerprint for name, stage in found.items()}, work)


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
    store: RunStore, unlabeled: ImageSource, against: Sequence[str], settings: Deduplicate, scores_uri: str | None
) -> Subject:
    """Claims the folder of `tophat duplicates`, once nothing is wrong with what it compares, and puts torchvision's model there.

    Args:
        store: the folder.
        unlabeled: U.
        against: URIs of labeled images.
        settings: with the model.
        scores_uri: a score table with U's embeddings by that model.

    Returns:
        What is compared, by which model.

    Raises:
        InputError: something is missing, or the scores are another model's.
        ModelError: the model cannot be had.
        RunError: the folder is another's.
    """
    from models.card import read_card

    if not settings.on:
        raise InputError("--nearest", "nothing", "must be given", "add --nearest N, --within D or --copies")
    text = yaml.safe_dump({"deduplicate": settings.model_dump(mode="json")})
    inputs = {"unlabeled": unlabeled.fingerprint()}
    if not settings.near:
        store.claim(CLAIM, text)
        return Subject(unlabeled, (), "", None, inputs)
    if not against:
        raise InputError("--against", "nothing", "must be given", "add --against, or look for --copies alone")
    if settings.model == TEACHER:
        raise InputError("--model", TEACHER, "is known to a recipe's run only", "give the teacher's model directory")
    if settings.model == RESNET18 and scores_uri is not None:
        raise InputError("--scores", scores_uri, "are of a model that is not named", "add --model DIR, the model")
    model = None if settings.model == RESNET18 else features_model("--model", settings, store)
    sets = tuple(LabeledSet(uri, open_source("--against", Source(uri=uri))) for uri in dict.fromkeys(against))
    inputs["labeled"] = fingerprint([[labeled.name, labeled.source.fingerprint()] for labeled in sets])
    if scores_uri is not None and model is not None:
        scores_uri = storage.absolute(scores_uri)
        owner = storage.join(scores_uri, scoring.OWNER)
        if storage.exists(owner) and read_json(owner).get("model") != read_card(model).weights.sha256:
            raise RunError("--scores", scores_uri, "holds scores made with another model", "give that --model")
        inputs["embeddings"] = fingerprint([[f.path, f.size, f.etag] for f in storage.list_files(scores_uri)])
    store.claim(CLAIM, text)
    model = features_model("--model", settings, store)
    assert model is not None
    inputs["model"] = read_card(model).weights.sha256
    return Subject(unlabeled, sets, model, scores_uri, inputs)


def find(
    store: RunStore,
    what: Subject,
    settings: Deduplicate,
    score: Score,
    start: Callable[[], None],
    display: Display,
) -> dict[str, Finished]:
    """Deduplicates into a folder of its own; the stages by name. Goes on where it stopped.

    Args:
        store: the folder, which is claimed.
        what: is compared.
        settings: what is left out.
        score: batch size and actors of an embedding.
        start: starts Ray.
        display: shows progress.
    """
    start()
    return {s.name: s for s in deduplicate(store.once, display, what, settings, score, "--decisions")}


def decide(out_uri: str, decisions_uri: str) -> dict[str, Finished]:
    """Takes a review's decision file back into the folder that `find` made; the stages by name.

    Raises:
        RunError: `find` did not finish there.
        InputError: the decision file is wrong.
    """
    store = RunStore(storage.absolute(out_uri))
    found = {name: stage for name in ("pairs", "copies") if (stage := store.finished(name)) is not None}
    if "pairs" not in found:
        raise RunError("--out", out_uri, "holds no pairs to decide on", "find them first, with --source and --against")
    return found | {"excluded": exclude(store.once, found, decisions_uri, "--decisions")}
