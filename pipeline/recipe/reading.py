"""Recipes read: YAML in, `--set section.field=value` on top, and each mistake told by its field. Imports nothing heavy."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.errors import RecipeError, shown
from pipeline.recipe.document import MOST_BYTES, Unreadable, parse
from pipeline.recipe.sections import NETWORK, READY, Deduplicate, Recipe, Score, Select, Source

SHIPPED = Path(__file__).parent / "shipped"
PLAIN = ("bool", "int", "float", "str")
LONGEST_NAME = 60
"""Of a field, in a message: a key that nobody knows may be of any length."""

CORRECT = "correct it, or quote a text as YAML does, too: --set 'FIELD=\"TEXT\"'"
RULES = {"tuple_type": "must be a list, as [a, b]", "model_type": "must be a section", "dict_type": "must be a mapping"}
"""For what pydantic says of Python's types."""

S = TypeVar("S", bound=BaseModel)


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
    settings = _of_options(Score, document, "" if classes_per_image is None else "classes_per_image")
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
    given = {name: value for name, value in options.items() if value is not None}
    documents: tuple[dict[str, Any], dict[str, Any]] = (dict(given), {})
    for override in overrides:
        to_score = override.startswith("score.")
        _override(documents[to_score], override.removeprefix("score.").removeprefix("deduplicate."))
    return _of_options(Deduplicate, documents[0], *given), _of_options(Score, documents[1])


def select_settings(**options: Any) -> Select:
    """The section `select` for a selection without a recipe.

    Args:
        options: its fields; None leaves the default.

    Raises:
        RecipeError: a field is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return _of_options(Select, given, *given)


def transform_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Fields of a transform, of a command that has no recipe: `transform.field=value`.

    Raises:
        RecipeError: an override has another form.
    """
    document: dict[str, Any] = {}
    for override in overrides:
        _override(document, override.removeprefix("transform."))
    return document


def source_settings(uri_option: str, uri: str, **options: Any) -> Source:
    """A source without a recipe.

    Args:
        uri_option: what gives its URI.
        uri: of the source.
        options: its other fields; None leaves the default.

    Raises:
        RecipeError: a field is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return _of_options(Source, {"uri": uri, **given}, "uri", *given)
    except RecipeError as error:
        if error.field != "--uri":
            raise
        raise RecipeError(uri_option, error.value, error.rule, error.fix) from None


def _of_options(section: type[S], document: Mapping[str, Any], *options: str) -> S:
    """A section of a command that has no recipe; its fields `options` have options of their own, and the others have --set."""
    try:
        return section.model_validate(document)
    except ValidationError as error:
        found = _first_mistake(error, section)
    if not found.field:
        field = "the options"
    elif found.field.partition(".")[0] in options:
        field = f"--{found.field.replace('_', '-')}"
    else:
        field = f"--set {found.field}"
    raise RecipeError(field, found.value, found.rule, found.fix or "correct it")


def shipped() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _read(path: str) -> dict[str, Any]:
    file = shipped().get(path) or Path(path)
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(
            "RECIPE", path, "is not a file", f"give a YAML file, or one of {', '.join(shipped())}"
        ) from None
    except OSError as error:
        raise RecipeError("RECIPE", path, f"cannot be read ({error.strerror})", "give a YAML file") from None
    return _mapping("RECIPE", path, content)


def _mapping(field: str, value: str, content: bytes) -> dict[str, Any]:
    """The mapping that a YAML text is; `field` and `value` name it in messages."""
    if len(content) > MOST_BYTES:
        raise RecipeError(field, value, f"has over {MOST_BYTES // 2**20} MiB, as no recipe has", "give a YAML file")
    try:
        document = parse(content.decode())
    except UnicodeDecodeError:
        raise RecipeError(field, value, "is not a text in UTF-8", "give a YAML file, saved as UTF-8") from None
    except Unreadable as reason:
        raise RecipeError(field, value, str(reason), "correct it there") from None
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
    field = f"--set {_named(parts)}"
    try:
        value = parse(text)
    except Unreadable as reason:
        raise RecipeError(field, text, str(reason), CORRECT) from None
    node: Any = document
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_place_in(node, part, field, text)]
        if not isinstance(node, dict | list):
            within = _named(parts[: depth + 1])
            raise RecipeError(field, text, f"goes into {within}, which is no section", "check the field's name")
    node[_place_in(node, parts[-1], field, text)] = value
    # Two ways to state a length exclude each other: setting one takes the other's place.
    for one, other in (("epochs", "images_seen"), ("images_seen", "epochs")):
        if parts[-1] == one and value is not None:
            node.pop(other, None)


def _place_in(node: dict[str, Any] | list[Any], part: str, field: str, text: str) -> Any:
    """The key of a mapping, or the index of a list, that a part of a field's name is."""
    if isinstance(node, dict):
        return part
    if part not in (places := [str(number) for number in range(len(node))]):
        fix = f"use a number from 0 to {len(places) - 1}" if places else "set the whole list"
        raise RecipeError(field, text, f"has {shown(part, LONGEST_NAME)} for the place in a list", fix)
    return int(part)


def _named(parts: Sequence[str]) -> str:
    """A field's name, as --set takes it."""
    return ".".join(part if len(part) <= LONGEST_NAME else f"{part[:LONGEST_NAME]}…" for part in parts)


@dataclass(frozen=True)
class _Mistake:
    """What is wrong with a field, or with several together, whose name is empty then; `fix` is None where there is nothing to add to the rule."""

    field: str
    value: object
    rule: str
    fix: str | None = None


def _first_error(error: ValidationError, section: type[BaseModel]) -> RecipeError:
    found = _first_mistake(error, section)
    fix = found.fix or f"correct it in the recipe, or --set {found.field or 'FIELD'}=..."
    return RecipeError(found.field or "recipe", found.value, found.rule, fix)


def _first_mistake(error: ValidationError, section: type[BaseModel]) -> _Mistake:
    details = error.errors(include_url=False)
    # An unknown key says more than the missing one that it was meant to be.
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    place = [str(part) for part in first["loc"] if part not in (NETWORK, READY)]
    plain = len(place) > 1 and place[-1] in PLAIN  # which of the kinds of a value pydantic tried first
    place = place[:-1] if plain else place
    field = _named(place)
    if first["type"] == "extra_forbidden":
        known = _fields_at(section, place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        return _Mistake(field, first["input"], "is not a field of a recipe", fix)
    if first["type"] == "missing":
        return _Mistake(field, "nothing", "must be given", f"add {field} to the recipe, or --set {field}=...")
    rule = RULES.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    rule = "must be true, false, a finite number or a text" if plain else rule
    return _Mistake(field, first["input"] if place else "(several fields)", rule)


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
