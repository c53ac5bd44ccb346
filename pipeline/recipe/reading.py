"""Recipes read: YAML in, `--set section.field=value` on top, and each mistake told by its field. Imports nothing heavy."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.errors import RecipeError, RecipeErrors, shown
from pipeline.recipe.deduplicate import Deduplicate
from pipeline.recipe.document import MOST_BYTES, Unreadable, parse
from pipeline.recipe.images import Source
from pipeline.recipe.mistakes import LONGEST_NAME, mistakes_of, named
from pipeline.recipe.sections import USUAL_P, Recipe, Score
from pipeline.recipe.select import MOST_K, Select

SHIPPED = Path(__file__).parent / "shipped"
CORRECT = "correct it, or quote a text as YAML does, too: --set 'FIELD=\"TEXT\"'"
S = TypeVar("S", bound=BaseModel)


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a file, or a shipped one by its name (`demo`, `fashion-mnist`, `paper`), with `a.b=c` overrides.

    Raises:
        RecipeError: the file, a field, or an override is wrong; the message names it.
        RecipeErrors: several fields are.
    """
    document = _read(path)
    document.setdefault("name", _name_of(path))
    both = {override.partition("=")[0].strip() for override in overrides}
    for override in overrides:
        _override(document, override, both)
    return validate(document)


def _name_of(path: str) -> str:
    """A name for the recipe of a file that has none in it: the file's, without what no name has."""
    return re.sub(r"[^A-Za-z0-9._-]+|\A[._-]+", "-", Path(path).stem).strip("-")[:100] or "recipe"


def validate(document: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data.

    Raises:
        RecipeError: a field is wrong.
        RecipeErrors: several are.
    """
    return _valid(Recipe, document, lambda field: field or "recipe", "correct it in the recipe, or --set {}=...")


def _valid(section: type[S], document: Mapping[str, Any], said: Callable[[str], str], fix: str) -> S:
    """A section from plain data.

    Args:
        section: which one.
        document: the data.
        said: how messages call a field, or several together, whose name is empty.
        fix: what to do about a wrong value, with `{}` where the field is named.

    Raises:
        RecipeError: a field is wrong.
        RecipeErrors: several are.
    """
    try:
        return section.model_validate(document)
    except ValidationError as error:
        found = mistakes_of(error, section, document)
    told = [
        RecipeError(said(one.field), one.value, one.rule, one.fix or fix.format(one.field or "FIELD")) for one in found
    ]
    raise RecipeErrors(told) if len(told) > 1 else told[0]


def score_settings(overrides: Sequence[str], classes_per_image: int | None, classes: int) -> Score:
    """The section `score` for a scoring without a recipe.

    Args:
        overrides: `field=value` of that section.
        classes_per_image: P; by default the usual 10, or every class where there are fewer.
        classes: of the model.

    Raises:
        RecipeError: an override is wrong, or P is above the class count.
    """
    document: dict[str, Any] = {"classes_per_image": classes_per_image or min(USUAL_P, classes)}
    for override in overrides:
        _override(document, override.removeprefix("score."))
    settings = _of_options(Score, document, "" if classes_per_image is None else "classes_per_image")
    if settings.kept_of(classes) > classes:
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
    if not 1 <= (k := given.get("images_per_class", 1)) <= MOST_K:  # the section would offer `auto`, which is for a run
        raise RecipeError("--images-per-class", k, f"must be a whole number from 1 to {MOST_K:,}", "correct it")
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
    return _of_options(Source, {"uri": uri, **given}, *given, uri=uri_option)


def _of_options(section: type[S], document: Mapping[str, Any], *options: str, **others: str) -> S:
    """A section of a command that has no recipe; its fields `options` have options of their own, `others` are called so, and the rest has
    --set."""
    names = {name: f"--{name.replace('_', '-')}" for name in options} | others

    def said(field: str) -> str:
        name, dot, inside = field.partition(".")
        return f"{names[name]}{dot}{inside}" if name in names else f"--set {field}" if field else "the options"

    return _valid(section, document, said, "correct it")


def shipped() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _read(path: str) -> dict[str, Any]:
    file = shipped().get(path) or Path(path)
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        near = get_close_matches(path, shipped(), n=1)
        fix = f"did you mean {near[0]}?" if near else f"give a YAML file, or one of {', '.join(shipped())}"
        raise RecipeError("RECIPE", path, "is not a file", fix) from None
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


def _override(document: dict[str, Any], override: str, together: Collection[str] = ()) -> None:
    """Sets a field; `together` names all that are set."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(
            "--set", override, "must have the form section.field=value", "write e.g. select.images_per_class=200"
        )
    field = f"--set {named(parts)}"
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
            within = named(parts[: depth + 1])
            raise RecipeError(field, text, f"goes into {within}, which is no section", "check the field's name")
    node[_place_in(node, parts[-1], field, text)] = value
    # One way to state a length takes the other's place, where not both are set.
    for one, other in (("epochs", "images_seen"), ("images_seen", "epochs")):
        if parts[-1] == one and value is not None and ".".join([*parts[:-1], other]) not in together:
            node.pop(other, None)


def _place_in(node: dict[str, Any] | list[Any], part: str, field: str, text: str) -> Any:
    """The key of a mapping, or the index of a list, that a part of a field's name is."""
    if isinstance(node, dict):
        return part
    if part not in (places := [str(number) for number in range(len(node))]):
        fix = f"use a number from 0 to {len(places) - 1}" if places else "set the whole list"
        raise RecipeError(field, text, f"has {shown(part, LONGEST_NAME)} for the place in a list", fix)
    return int(part)
