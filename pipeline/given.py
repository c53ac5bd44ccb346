"""A run that begins with what exists: a score table, or a selection, in place of the stages that would make it.

Such a stage makes nothing: it holds what is there against the recipe, and refers to it. It lies outside of the store, so whoever reads it
watches it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unicodedata import normalize

from cluster.errors import RecipeError, StageError, shown
from cluster.section import Section
from cluster.store import Key, Made, Outside
from pipeline.context import Run
from pipeline.recipe.sections import USUAL_P, Recipe
from pipeline.scoring import beside
from pipeline.scoring import score as scoring
from pipeline.scoring.score import Scored
from pipeline.selection import record as selection_record
from pipeline.selection import select as selection
from pipeline.selection.select import Selected
from pipeline.stages import LabeledData, Listed, images_of

TABLE_FIX = "score unlabeled with `tophat score`"
SELECTION_FIX = "select from scores of unlabeled"


def given_scores(this: Run, recipe: Recipe, data: LabeledData, pool: Made[Listed]) -> Made[Scored]:
    """(2) The score table that `score.table` names, in place of a scoring.

    Raises:
        RecipeError: it is no whole table of U with the classes of D, or the recipe's settings are not those that it was made with.
    """
    field, given = "score.table", recipe.score.table
    assert given is not None
    found = beside.find(given)
    record, listing = found.record(), None if found.folder is None else found.listing()
    if record is None or listing is None or found.rejects is None:
        rule = "has no record of its source and its classes beside it"
        raise RecipeError(field, given, rule, "give the --out of a `tophat score`, or a run's scores; else score again")
    _check_source(field, given, (record.source, listing.reader.root), _listing_now(this, pool), TABLE_FIX)
    _check_classes(field, given, record.classes, data)
    settings = {**recipe.score.deciding()}
    settings.pop("table", None)
    _check_settings("score", settings, record.score, recipe.score)
    stored = record.score.get("classes_per_image") or min(USUAL_P, len(record.classes))
    wanted = recipe.select.classes_per_image
    if wanted is not None and wanted > stored:
        rule = f"must be at most {stored}, the classes that score.table stores of each image"
        raise RecipeError("select.classes_per_image", wanted, rule, "lower it")
    rejects = found.rejects

    def work(place: str) -> Scored:
        try:
            return scoring.prove(images_of(pool), found.table, rejects)
        except StageError as error:
            rule = f"is not the whole of a scoring: {error.message}"
            raise RecipeError(field, given, rule, "give a score table that is finished") from None

    outside = Outside.at(field, found.table, lambda: selection.listing(field, found.table))
    inputs: dict[str, str | Outside] = {
        "table": outside,
        "unlabeled": pool.fingerprint,
        "labeled.train": data.train.made.fingerprint,
    }
    return this.once(Key("scores", {}, inputs), Scored, work)


def given_selection(this: Run, recipe: Recipe, data: LabeledData, pool: Made[Listed]) -> Made[Selected]:
    """(2) The selection that `select.selection` names, in place of a teacher, scores and a selection.

    Raises:
        RecipeError, RunError: it is no finished selection of U with the classes of D, or the recipe's settings are not those that it was
            made with.
    """
    field, given = "select.selection", recipe.select.selection
    assert given is not None
    uri = beside.real(given)
    record = selection_record.read_record(field, uri)
    if record.source is None or record.root is None or record.classes is None:
        rule = "was selected from scores that do not say of which images and classes they are"
        raise RecipeError(field, given, rule, "select from the --out of a `tophat score`, or a run's scores")
    _check_source(field, given, (record.source, record.root), _listing_now(this, pool), SELECTION_FIX)
    _check_classes(field, given, record.classes, data)
    settings = {**recipe.select.deciding()}
    settings.pop("selection", None)
    _check_settings("select", settings, record.settings, recipe.select)

    def work(place: str) -> Selected:
        selection_record.check_whole(field, uri, record)
        return replace(record.selected, uri=uri)

    outside = Outside.at(field, uri, lambda: selection.listing(field, uri))
    inputs: dict[str, str | Outside] = {
        "selection": outside,
        "unlabeled": pool.fingerprint,
        "labeled.train": data.train.made.fingerprint,
    }
    return this.once(Key("selection", {}, inputs), Selected, work)


def _listing_now(this: Run, pool: Made[Listed]) -> tuple[str, str]:
    """The fingerprint of U's listing, and where U is."""
    source = this.sources["unlabeled"]
    return source.fingerprint() if pool.record is None else pool.outputs.source, source.reader.root


def _check_source(field: str, given: str, its: tuple[str, str], unlabeled: tuple[str, str], fix: str) -> None:
    """Makes sure that what exists is of U, by the fingerprints of both listings."""
    if its[0] == unlabeled[0]:
        return
    if its[1] == unlabeled[1]:
        rule = f"is of unlabeled = {shown(its[1])} as it was before: its listing was {its[0]}, and is {unlabeled[0]}"
    else:
        rule = f"is of {shown(its[1])} (listing {its[0]}), not of unlabeled = {shown(unlabeled[1])} (listing {unlabeled[0]})"
    raise RecipeError(field, given, rule, f"{fix}, or let unlabeled be what this is of")


def _check_classes(field: str, given: str, its: Sequence[str], data: LabeledData) -> None:
    """Makes sure that class i is the same in both, as soon as the classes of D are known."""
    if data.train.made.record is None:
        return
    known, wanted = ([normalize("NFC", name) for name in names] for names in (its, data.class_names))
    if known == wanted:
        return
    if sorted(known) == sorted(wanted):
        rule, fix = "has the classes of D in another order", f"set labeled.classes to [{', '.join(its)}]"
        raise RecipeError(
            field, given, rule, fix if len(fix) < 300 else "set labeled.classes to the order of its record"
        )
    lacking, more = ([name for name in one if name not in other] for one, other in ((wanted, known), (known, wanted)))
    parts = [f"lacks {_few(lacking)}"] * bool(lacking) + [f"has {_few(more)} beside them"] * bool(more)
    rule = f"has other classes than D: of {len(wanted)} it {' and '.join(parts) or 'has some twice'}"
    raise RecipeError(field, given, rule, "score with a model of D's classes, or use its own D")


def _few(names: Sequence[str]) -> str:
    return ", ".join(shown(name, 60) for name in names[:3]) + (
        f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    )


def _check_settings(section: str, wanted: Mapping[str, Any], its: Mapping[str, Any], usual: Section) -> None:
    """Makes sure that a setting which the recipe states, one that is not at its default, is what the record has."""
    for name, value in wanted.items():
        default = type(usual).model_fields[name].get_default(call_default_factory=True)
        was = its.get(name, default)
        if value != was:
            whole = "score.table" if section == "score" else "select.selection"
            rule = f"cannot be with {whole}, which was made with {shown(was)}"
            raise RecipeError(f"{section}.{name}", value, rule, "leave it out")
