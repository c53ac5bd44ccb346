"""The base of every section of a recipe, its unquoted values, and the mark of fields that decide nothing."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


class _Free:
    """The type of `FREE`."""

    def __repr__(self) -> str:
        return "FREE"


FREE: Final = _Free()
"""Marks a field that decides nothing about a result: how fast it comes, on what, or how it is shown. `workers: Annotated[int, FREE]`."""


USUAL: Final[Any] = None
"""The default of a field that a section around its own fills in, as it depends on what else is there."""


@dataclass(frozen=True)
class Said:
    """Marks a type that has words of its own, as a noun: `Annotated[str, Said("a local path or a URI")]`."""

    words: str


@dataclass(frozen=True)
class Unit:
    """Marks a number that has a unit: `Annotated[int, Unit("in pixels")]`."""

    words: str


_WORDS: Final = MappingProxyType(
    {word: said for said, words in ((True, "true yes on"), (False, "false no off")) for word in words.split()}
)
_INTEGER: Final = re.compile(r"[-+]?[0-9][0-9_]*")
_IN_BASE: Final = re.compile(r"[-+]?0(x[0-9a-fA-F_]+|o[0-7_]+|b[01_]+)")
FLOAT: Final = re.compile(
    r"([-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
)
"""A number, whole or not, as people write it."""


class Plain(str):
    """A value that stands in a recipe without quotes, as it is written: a text where the field is one, else what it says.

    YAML 1.1 takes `007` for 7, `1:30` for 90, `1e3` and `1e-3` for texts, `no` for false and `2024-01-31` for a day, whatever is wanted.
    """

    @property
    def said(self) -> bool | int | float | str:
        """Where a text is not what is wanted: a truth value, a number (decimal, if zeros stand before it), or else the text."""
        text = str(self)
        if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
            return _WORDS[text.lower()]
        try:
            if _INTEGER.fullmatch(text):
                return int(text.replace("_", ""))
            if _IN_BASE.fullmatch(text):
                return int(text.replace("_", ""), 0)
        except ValueError:
            return text  # thousands of digits
        if FLOAT.fullmatch(text):
            return float(re.sub(r"_|\.(?=[iInN])", "", text))
        return text

    def __repr__(self) -> str:
        return repr(self.said)


class Section(BaseModel):
    """A part of a recipe: immutable, and no unknown key is let through.

    The docstring under a field is its description, in the schema and in error messages.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _as_declared(cls, given: Any) -> Any:
        """Values without quotes become what the fields are."""
        if not isinstance(given, Mapping):
            return given
        kinds = _kinds_of_fields(cls)
        return {name: _settled(value, kinds[name]) if name in kinds else value for name, value in given.items()}

    def deciding(self) -> dict[str, Any]:
        """What decides a result, as plain JSON data: every field but those marked `FREE`, here and in the sections within.

        Fields at their default are left out, so that a new field, whose default is what was done before, makes nothing another result.
        """
        plain, found = self.model_dump(mode="json"), {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            said = _deciding(value, plain[name])
            default = field.get_default(call_default_factory=True)
            both = isinstance(value, Section) and isinstance(default, Section)
            usual = not field.is_required() and (said == default.deciding() if both else value == default)
            if FREE not in field.metadata and not usual:
                found[name] = said
        return found


def _deciding(value: object, plain: Any) -> Any:
    if isinstance(value, Section):
        return value.deciding()
    if isinstance(value, tuple | list):
        return [_deciding(one, plain[number]) for number, one in enumerate(value)]
    if isinstance(value, float):
        return plain + 0.0  # 0.0 and -0.0 are one number, and two texts
    return plain


@cache
def _kinds_of_fields(section: type[Section]) -> Mapping[str, frozenset[type]]:
    return {name: frozenset(_kinds(field.annotation)) for name, field in section.model_fields.items()}


def _kinds(annotation: Any) -> set[type]:
    """The classes that a type is made of."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(one) for one in arguments}
    if origin is Annotated:
        return _kinds(arguments[0])
    if arguments:
        return set().union(*map(_kinds, arguments))
    return {annotation} if isinstance(annotation, type) else set()


def sections_in(annotation: object) -> Iterator[type[Section]]:
    """The sections that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def fields_within(section: type[BaseModel], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of a section and of the sections within, by where it is; a section before its fields."""
    for name, field in section.model_fields.items():
        yield (*place, name), field
        for inside in sections_in(field.annotation):
            yield from fields_within(inside, (*place, name))


def _settled(value: Any, kinds: frozenset[type]) -> Any:
    """A value of a field of those types; a section within sees to its own values."""
    if isinstance(value, Plain):
        text = str in kinds and not kinds & {bool, int, float}
        # Python takes true for 1, and pydantic too.
        return str(value) if text or (isinstance(value.said, bool) and bool not in kinds) else value.said
    if isinstance(value, list):
        return [_settled(one, kinds) for one in value]
    if isinstance(value, Mapping) and not any(issubclass(kind, Section) for kind in kinds):
        return {name: _settled(one, kinds) for name, one in value.items()}
    return value
