"""What is wrong with a recipe, by its fields: pydantic's errors as people read them. Imports nothing heavy."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cluster.section import Unit, fields_within

PLAIN = {"bool", "int", "float", "str"}
LONGEST_NAME = 60
"""Of a field, in a message: a key that nobody knows may be of any length."""
OFFERED = 3
"""Places that a key is offered, at most, where it stands in none."""

Declared = Mapping[tuple[str, ...], FieldInfo]
"""Fields, by where they are."""
WHOLE, NUMBER, SWITCH, LIST = (
    "must be a whole number",
    "must be a number",
    "must be true or false",
    "must be a list, as [a, b]",
)
RULES = {
    **dict.fromkeys(("int_parsing", "int_from_float", "int_type"), WHOLE),
    **dict.fromkeys(("float_parsing", "float_type"), NUMBER),
    **dict.fromkeys(("bool_parsing", "bool_type"), SWITCH),
    **dict.fromkeys(("tuple_type", "list_type"), LIST),
    "string_type": "must be a text",
    "string_too_short": "must have a length of {min_length} or more",
    "string_too_long": "must have a length of {max_length} or less",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} or fewer entries",
    "model_type": "must be a section",
    "dict_type": "must be a mapping",
}
"""Of pydantic's kinds of errors, those that it tells in words of Python's."""


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a field, or with several together, whose name is empty then; `fix` is None where there is nothing to add to the rule."""

    field: str
    value: object
    rule: str
    fix: str | None = None


def mistakes_of(error: ValidationError, section: type[BaseModel], document: object) -> list[Mistake]:
    """Every mistake of a document that is not such a section: keys that nobody knows, then wrong values, then what is missing.

    A missing field is not told where an unknown key beside it was meant to be it.
    """
    unknown: dict[tuple[str, ...], object] = {}
    missing: list[tuple[str, ...]] = []
    wrong: dict[tuple[str, ...], list[Any]] = {}
    for one in error.errors(include_url=False):
        place, value = _found(one["loc"], document, whole=one["type"] == "missing")
        if isinstance(one["input"], Mapping):
            one["input"] = value  # as it was given, without what is usual
        if one["type"] == "extra_forbidden":
            unknown[place] = one["input"]
        elif one["type"] == "missing":
            missing.append(place)
        else:
            wrong.setdefault(place, []).append(one)
    found, declared = [], dict(fields_within(section))
    for place, value in unknown.items():
        known = [other[-1] for other in declared if other[:-1] == place[:-1]]
        near = difflib.get_close_matches(place[-1], known, n=1)
        missing = [other for other in missing if other != (*place[:-1], *near)]
        fix = _offer(declared, place, near, known)
        found.append(Mistake(named(place), value, "is not a field of a recipe", fix))
    found += [_wrong(place, several, _unit(declared, place)) for place, several in wrong.items()]
    for place in missing:
        field = named(place)
        found.append(Mistake(field, "nothing", "must be given", f"add {field} to the recipe, or --set {field}=..."))
    return found


def named(parts: Sequence[str]) -> str:
    """A field's name, as --set takes it."""
    return ".".join(part if len(part) <= LONGEST_NAME else f"{part[:LONGEST_NAME]}…" for part in parts)


def _found(location: Sequence[str | int], document: Any, *, whole: bool) -> tuple[tuple[str, ...], Any]:
    """Where in the document an error is, and what stands there.

    The place is pydantic's without its names for the kinds of a value, which lead nowhere in the document.

    Args:
        location: pydantic's.
        document: which it is in.
        whole: whether the last part counts all the same, as of a field that is missing.
    """
    place = []
    for number, part in enumerate(location):
        is_in = (
            part in document
            if isinstance(document, Mapping)
            else isinstance(document, list | tuple) and isinstance(part, int)
        )
        if is_in:
            document = document[part]
        elif not (whole and number == len(location) - 1):
            continue
        place.append(str(part))
    return tuple(place), document


def _wrong(place: tuple[str, ...], errors: Sequence[Any], unit: str) -> Mistake:
    """What is wrong with a value, which may be one for each kind of value that the field takes."""
    rules = list(dict.fromkeys(map(_rule, errors)))
    if {e["loc"][-1] for e in errors if e["loc"]} == PLAIN:
        rules = ["must be true, false, a finite number or a text"]
    rule = ", or ".join([rules[0], *(rule.removeprefix("must be ") for rule in rules[1:])])
    if not isinstance(errors[0]["input"], list | tuple | Mapping):
        rule += unit
    return Mistake(named(place), errors[0]["input"] if place else "(several fields)", rule)


def _rule(error: Any) -> str:
    """What one error says, in our words."""
    if (known := RULES.get(error["type"])) is not None:
        return known.format(**error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)  # type: ignore[no-any-return]


def _unit(declared: Declared, place: tuple[str, ...]) -> str:
    """The unit of a number, or of those of a list, as a clause; empty where it has none."""
    field = declared.get(place) or declared.get(place[:-1])
    return "" if field is None else "".join(f", {one.words}" for one in field.metadata if isinstance(one, Unit))


def _offer(declared: Declared, place: tuple[str, ...], near: Sequence[str], known: Sequence[str]) -> str:
    """What to do about an unknown key: the field beside it that it is nearly, or those of its very name elsewhere, or which there are."""
    if near:
        return f"did you mean {near[0]}?"
    everywhere = [other for other in declared if other[-1] == place[-1]]
    inside = [other for other in everywhere if other[: len(place) - 1] == place[:-1]]
    if offered := [".".join(other) for other in (inside or everywhere)[:OFFERED]]:
        return f"did you mean {' or '.join([', '.join(offered[:-1]), offered[-1]] if offered[1:] else offered)}?"
    return f"use one of {', '.join(known)}"
