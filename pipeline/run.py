"""The paper's pipeline, section 3.2, from a recipe to a student: its stages in their order, and what they need."""

from collections.abc import Iterable, Mapping

from cluster import storage
from cluster.errors import RunError
from cluster.resources import Bundle, Demand
from models.config import Training
from pipeline import deduplication, scoring
from pipeline.recipe import Recipe
from pipeline.sources import ImageSource, open_source
from pipeline.stages import (
    Run,
    deduplicate,
    evaluate_models,
    fine_tune_student,
    list_unlabeled,
    materialize_dhat,
    pretrain_student,
    score_unlabeled,
    select_top_k,
    show_gallery,
    survey_labeled,
    train_supervised,
    train_teacher,
)
from pipeline.store import Finished, RunStore

STAGES = (
    "labeled",
    "unlabeled",
    "teacher",
    "scores",
    "selection",
    "dhat",
    "gallery",
    "pretrained",
    "student",
    "supervised",
    "evaluation",
)
"""Every stage, in order: the name of its folder in the run, and what `--until` takes."""


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a run of this recipe, in order: with those of the deduplication, where it is on."""
    wanted = (recipe.deduplicate.near, recipe.deduplicate.near, recipe.deduplicate.copies, recipe.deduplicate.on)
    return stages_with(name for name, on in zip(deduplication.STAGES, wanted, strict=True) if on)


def stages_with(deduplicating: Iterable[str]) -> tuple[str, ...]:
    """`STAGES`, and some of those of the deduplication where they belong."""
    place = STAGES.index("selection")
    return (*STAGES[:place], *deduplicating, *STAGES[place:])


def run(this: Run, until: str | None = None) -> dict[str, Finished]:
    """The pipeline. Finished stages are found and not repeated.

    Args:
        this: recipe, store and display.
        until: the last stage to run, one of `stages_of`; all when None.

    Returns:
        The stages that are finished, by name, in order.

    Raises:
        ModelError: near-duplicates are looked for with a model that cannot be had.
        ValueError: the recipe has no stage of that name.
    """
    done: dict[str, Finished] = {}
    names = stages_of(this.recipe)
    if "embeddings" in names[: len(names) if until is None else names.index(until) + 1]:
        # Hours before it is needed: what is wrong with it can be mended now.
        deduplication.features_model("deduplicate.model", this.recipe.deduplicate, this.store)

    def reached(stage: Finished) -> bool:
        done[stage.name] = stage
        return stage.name == until

    labeled = survey_labeled(this)
    if reached(labeled.stage) or reached(unlabeled := list_unlabeled(this)):
        return done
    if reached(teacher := train_teacher(this, labeled)):  # (1)
        return done
    if reached(scores := score_unlabeled(this, unlabeled, teacher)):  # (2), ranking
        return done
    excluded = None
    if this.recipe.deduplicate.on:
        for excluded in deduplicate(this, labeled, unlabeled, teacher, scores):
            if reached(excluded):
                return done
    if reached(chosen := select_top_k(this, labeled, scores, excluded)):  # (2), picking
        return done
    if reached(dhat := materialize_dhat(this, labeled, unlabeled, chosen)):
        return done
    if reached(show_gallery(this, labeled, chosen, dhat)):
        return done
    if reached(pretrained := pretrain_student(this, labeled, dhat)):  # (3)
        return done
    if reached(student := fine_tune_student(this, labeled, pretrained)):  # (4)
        return done
    if reached(supervised := train_supervised(this, labeled)):
        return done
    reached(evaluate_models(this, labeled, (teacher, pretrained, student, supervised)))
    return done


def open_sources(recipe: Recipe, store: RunStore) -> dict[str, ImageSource]:
    """Lists every source of a recipe, before any work depends on one.

    Raises:
        SourceError: one that is missing or holds no images.
        RunError: the run directory lies inside one, and would become a part of it.
    """
    labeled = recipe.labeled
    fields = {"labeled.train": labeled.train, "labeled.validation": labeled.validation, "labeled.test": labeled.test}
    given = {name: source for name, source in {**fields, "unlabeled": recipe.unlabeled}.items() if source is not None}
    for name, source in given.items():
        if storage.join(store.uri, "").startswith(storage.join(storage.absolute(source.uri), "")):
            raise RunError("--run-dir", store.uri, f"lies inside {name}", "put it elsewhere")
    return {name: open_source(name, source) for name, source in given.items()}


def changed_sources(this: Run, done: Mapping[str, Finished]) -> list[str]:
    """The sources that are not what they were when the run listed them; it goes on with what it listed."""
    listed = {**done["labeled"].outputs["sources"]} if "labeled" in done else {}
    if "unlabeled" in done:
        listed["unlabeled"] = done["unlabeled"].outputs["source"]
    return [name for name, found in this.sources.items() if name in listed and listed[name] != found.fingerprint()]


def demands(recipe: Recipe) -> list[Demand]:
    """What each stage needs at once."""

    def workers(field: str, training: Training, times: int = 1) -> Demand:
        bundle = Bundle(training.workers * times, training.cpus_per_worker, training.gpus_per_worker)
        return Demand(field, training.workers * times, (bundle,))

    trials = min(recipe.fine_tune.sweep.concurrent, len(recipe.fine_tune.sweep.learning_rates))
    return [
        Demand("labeled", 1, (Bundle(1, 1.0),)),
        workers("teacher.training.workers", recipe.teacher.training),
        scoring.demand(recipe.score),
        workers("pretrain.workers", recipe.pretrain),
        workers("fine_tune.sweep.concurrent x fine_tune.training.workers", recipe.fine_tune.training, trials),
        workers("supervised.workers", recipe.supervised),
    ]
