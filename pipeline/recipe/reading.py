"""Recipes read: YAML in, `--set section.field=value` on top, and each mistake told by its field. Imports nothing heavy."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cluster.errors import RecipeError, one_line
from pipeline.recipe.sections import NETWORK, READY, Deduplicate, Recipe, Score

SHIPPED = Path(__file__).parent / "shipped"
PLAIN = ("bool", "int", "float", "str")
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError)
"""What PyYAML raises for a text that is no YAML, or whose dates, numbers or nesting it cannot take."""


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a file, or a shipped one by its name (`demo`, `fashion-mnist`, `paper`), with `a.b=c` overrides.

    Raises:
        RecipeError: the file, a field, or an override is wrong; the message names it.
    """
    document = _read(path)
    for override in overrides:
        _override(document, override)
    return validate(document)


def validate(document: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data.

    Raises:
        RecipeError: the first field that is wrong.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _first_error(error, Recipe) from None


def score_settings(overrides: Sequence[str], classes_per_image: int | None, classes: int) -> Score:
    """The section `score` for a scoring without a recipe.

    Args:
        overrides: `field=value` of that section.
        classes_per_image: P; by default the usual 10, or every class where there are fewer.
        classes: of the model.

    Raises:
        RecipeError: an override is wrong, or P is above the class count.
    """
    document: dict[str, Any] = {"classes_per_image": classes_per_image or min(10, classes)}
    for override in overrides:
        _override(document, override.removeprefix("score."))
    try:
        settings = Score.model_validate(document)
    except ValidationError as error:
        raise _first_error(error, Score) from None
    if settings.classes_per_image > classes:
        rule = f"must be at most {classes}, the number of classes of the model"
        raise RecipeError("--classes-per-image", settings.classes_per_image, rule, f"set it to {classes} or less")
    return settings


def deduplicate_settings(overrides: Sequence[str], **options: Any) -> tuple[Deduplicate, Score]:
    """The section `deduplicate`, and `score` for its embeddings, without a recipe.

    Args:
        overrides: `field=value` of the section `deduplicate`, or `score.field=value`.
        options: fields of `deduplicate`; None leaves the default.

    Raises:
        RecipeError: a field is wrong.
    """
    documents: tuple[dict[str, Any], dict[str, Any]] = ({k: v for k, v in options.items() if v is not None}, {})
    for override in overrides:
        to_score = override.startswith("score.")
        _override(documents[to_score], override.removeprefix("score.").removeprefix("deduplicate."))
    try:
        return Deduplicate.model_validate(documents[0]), Score.model_validate(documents[1])
    except ValidationError as error:
        section = Deduplicate if error.title == Deduplicate.__name__ else Score
        raise _first_error(error, section) from None


def shipped() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _read(path: str) -> dict[str, Any]:
    file = shipped().get(path) or Path(path)
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise RecipeError(
            "RECIPE", path, "is not a file", f"give a YAML file, or one of {', '.join(shipped())}"
        ) from None
    except OSError as error:
        raise RecipeError("RECIPE", path, f"cannot be read ({error})", "give a YAML file") from None
    return _mapping("RECIPE", path, text)


def _mapping(field: str, value: str, text: bytes) -> dict[str, Any]:
    """The mapping that a YAML text is; `field` and `value` name it in messages."""
    try:
        document = yaml.safe_load(text.decode())
    except UNREADABLE as error:
        raise RecipeError(field, value, f"is not valid YAML ({one_line(str(error))})", "correct that line") from None
    if not isinstance(document, dict):
        raise RecipeError(field, value, "must be a mapping of sections", "start from a shipped recipe")
    return document


def load_text(field: str, value: str, text: bytes) -> Recipe:
    """A recipe from a YAML text; `field` and `value` name it in messages.

    Raises:
        RecipeError: it is none.
    """
    return validate(_mapping(field, value, text))


def _override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(
            "--set", override, "must have the form section.field=value", "write e.g. select.images_per_class=200"
        )
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        raise RecipeError(f"--set {key}", text, "is not a YAML value", "quote it") from None
    if isinstance(value, str):
        value = _number(value)
    node: Any = document
    for part in parts[:-1]:
        child = node.get(part)
        if not isinstance(child, dict | None):
            raise RecipeError(f"--set {key}", text, f"goes into {part}, which is no section", "check the field's name")
        node[part] = dict(child or {})  # a copy: YAML anchors make several sections one object
        node = node[part]
    node[parts[-1]] = value
    # Two ways to state a length exclude each other: setting one takes the other's place.
    for one, other in (("epochs", "images_seen"), ("images_seen", "epochs")):
        if parts[-1] == one and value is not None:
            node.pop(other, None)


def _number(text: str) -> str | float:
    """YAML 1.1 reads `1e-3` as text; a user means the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _first_error(error: ValidationError, section: type[BaseModel]) -> RecipeError:
    details = error.errors(include_url=False)
    # An unknown key says more than the missing one that it was meant to be.
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    place = [str(part) for part in first["loc"] if part not in (NETWORK, READY)]
    plain = bool(place) and place[-1] in PLAIN  # which of the kinds of a value pydantic tried first
    place = place[:-1] if plain else place
    field = ".".join(place) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _fields_at(section, place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        return RecipeError(field, first["input"], "is not a field of a recipe", fix)
    if first["type"] == "missing":
        return RecipeError(field, "nothing", "must be given", f"add {field} to the recipe, or --set {field}=...")
    rule = "must be true, false, a finite number or a text" if plain else first["msg"].removeprefix("Value error, ")
    return RecipeError(
        field, first["input"] if place else "(several fields)", rule, f"correct it in the recipe, or --set {field}=..."
    )


def _fields_at(section: type[BaseModel], place: Sequence[str]) -> list[str]:
    for name in place:
        field = section.model_fields.get(name)
        nested = None if field is None else next(_sections_in(field.annotation), None)
        if nested is None:
            return []
        section = nested
    return list(section.model_fields)


def _sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The sections that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _sections_in(part)
