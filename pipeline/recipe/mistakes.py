"""What is wrong with a recipe, by its fields: pydantic's errors as people read them. Imports nothing heavy."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.section import sections_in

PLAIN = {"bool", "int", "float", "str"}
LONGEST_NAME = 60
"""Of a field, in a message: a key that nobody knows may be of any length."""
OFFERED = 3
"""Places that a key is offered, at most, where it stands in none."""

RULES = {"tuple_type": "must be a list, as [a, b]", "model_type": "must be a section", "dict_type": "must be a mapping"}
"""For what pydantic says of Python's types."""


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
    found = []
    for place, value in unknown.items():
        near = _near(section, place)
        missing = [other for other in missing if other != (*place[:-1], *near[:1])]
        found.append(Mistake(named(place), value, "is not a field of a recipe", _offer(section, place, near)))
    found += [_wrong(place, several) for place, several in wrong.items()]
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


def _wrong(place: tuple[str, ...], errors: Sequence[Any]) -> Mistake:
    """What is wrong with a value, which may be one for each kind of value that the field takes."""
    rules = list(dict.fromkeys(RULES.get(e["type"]) or e["msg"].removeprefix("Value error, ") for e in errors))
    if {e["loc"][-1] for e in errors if e["loc"]} == PLAIN:
        rules = ["must be true, false, a finite number or a text"]
    rule = ", or ".join([rules[0], *(rule.removeprefix("Input should be ") for rule in rules[1:])])
    return Mistake(named(place), errors[0]["input"] if place else "(several fields)", rule)


def _near(section: type[BaseModel], place: tuple[str, ...]) -> list[str]:
    """The field that an unknown key was meant to be, if there is one of such a name beside it."""
    return difflib.get_close_matches(place[-1], _fields_at(section, place[:-1]), n=1)


def _offer(section: type[BaseModel], place: tuple[str, ...], near: Sequence[str]) -> str:
    """What to do about an unknown key: the field that it is nearly, or those of its very name elsewhere, or which there are."""
    if near:
        return f"did you mean {near[0]}?"
    everywhere = [".".join(other) for other in _places_of(section, place[-1])]
    inside = [other for other in everywhere if other.startswith("".join(f"{part}." for part in place[:-1]))]
    if offered := (inside or everywhere)[:OFFERED]:
        return f"did you mean {' or '.join([', '.join(offered[:-1]), offered[-1]] if offered[1:] else offered)}?"
    return f"use one of {', '.join(_fields_at(section, place[:-1]))}"


def _fields_at(section: type[BaseModel], place: Sequence[str]) -> list[str]:
    for name in place:
        field = section.model_fields.get(name)
        nested = None if field is None else next(sections_in(field.annotation), None)
        if nested is None:
            return []
        section = nested
    return list(section.model_fields)


def _places_of(section: type[BaseModel], name: str) -> Iterator[tuple[str, ...]]:
    """Where in a section, and the sections within, there is a field of that name."""
    for own, field in section.model_fields.items():
        if own == name:
            yield (own,)
        for nested in sections_in(field.annotation):
            yield from ((own, *place) for place in _places_of(nested, name))
