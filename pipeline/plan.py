"""What a run will come to, before it does: its stages, what is made of them, and what the rest needs of the cluster."""

from collections.abc import Sequence
from contextlib import nullcontext

from rich.console import Console

from cluster.config import Cluster
from cluster.errors import InputError, ModelError
from cluster.progress import Display
from cluster.resources import Demand
from cluster.session import Session
from cluster.store import RunStore
from models.config import IMPORT_PATH, ModelConfig
from pipeline.context import Planned, Run, Sources
from pipeline.recipe.images import Source
from pipeline.recipe.sections import Recipe
from pipeline.run import run


def sources_of(recipe: Recipe) -> Sources:
    """The sources of a recipe, by field."""
    labeled, weak = recipe.labeled, None if recipe.taught is None else recipe.taught.weak
    given: dict[str, Source | None] = {
        "labeled.train": labeled.train,
        "labeled.validation": labeled.validation,
        "labeled.test": labeled.test,
        "unlabeled": recipe.unlabeled,
        "teacher.weak.images": None if weak is None else weak.images,
    }
    return Sources({name: source for name, source in given.items() if source is not None})


def plan(recipe: Recipe, store: RunStore) -> Run:
    """The stages that a run of the recipe comes to, in order, and which are made: `run` itself, with nothing done."""
    quiet = Display(Console(quiet=True), enabled=False)
    this = Run(recipe.name, "", store, sources_of(recipe), Session(Cluster()), quiet, planning=True)
    run(this, recipe)
    return this


def until_stage(planned: Sequence[Planned], until: str | None) -> list[Planned]:
    """The stages up to one; all of them when it is None.

    Raises:
        InputError: there is no such stage.
    """
    names = [one.name for one in planned]
    if until is not None and until not in names:
        raise InputError("--until", until, "is not a stage", f"use one of {', '.join(names)}")
    return list(planned) if until is None else list(planned[: names.index(until) + 1])


def demands(planned: Sequence[Planned]) -> list[Demand]:
    """What the stages that are not made yet need of the cluster at once, each."""
    return [one.demand for one in planned if one.demand is not None and one.made.record is None]


def check_networks(recipe: Recipe, planned: Sequence[Planned], sources: Sources) -> None:
    """Builds the networks that are to be trained, and holds the recipe against the number of classes, before any work depends on them.

    A user's factory may take the right number of classes alone. Where the recipe, the listing of D and an earlier survey of it do not tell
    that number, the factory is looked up and not called.

    Raises:
        ModelError: one cannot be built; names the recipe's field.
        RecipeError: a field does not fit the number of classes.
    """
    surveyed = next(one.made for one in planned if one.made.key.stage == "labeled-train")
    known = surveyed.outputs.class_names if surveyed.record is not None else sources["labeled.train"].reader.class_names
    classes = len(recipe.labeled.classes or known or ())
    if classes:
        recipe.check_class_count(classes)
    unmade = {one.made.key.stage for one in planned if one.made.record is None}
    networks: dict[str, ModelConfig] = {}
    teacher = recipe.taught
    if teacher is not None and not isinstance(teacher.model, str) and unmade & {"teacher", "weak-pretrained"}:
        networks["teacher.model"] = teacher.model
    factories = {} if teacher is None else {"teacher": teacher.ready}
    for role, said in {**factories, "student": recipe.student.start}.items():
        if said is not None and IMPORT_PATH.fullmatch(said) and f"{role}-source" in unmade:
            networks["teacher.model" if role == "teacher" else "student.start"] = ModelConfig(architecture=said)
    if recipe.student.model is not None and unmade & {"pretrained", "student", "supervised"}:
        networks["student.model"] = recipe.student.model
    if not networks:
        return

    import torch

    from models.architectures import build, factory_of

    for field, config in networks.items():
        named = ":" not in config.architecture
        try:
            if named or classes:
                with torch.device("meta") if named else nullcontext():
                    build(config, classes or 10)
            else:
                factory_of(config.architecture)
        except ModelError as error:
            exists = field == "student.start" or (
                isinstance(getattr(teacher, "model", None), str) and field == "teacher.model"
            )
            place = field if exists else f"{field}.{error.field}"
            raise ModelError(place, error.value, error.rule, error.fix) from None
