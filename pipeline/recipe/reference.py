"""The fields of a recipe in words, out of how they are declared: for `tophat recipe --explain` and docs/recipe.md. Imports nothing heavy."""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.errors import InputError
from cluster.section import FREE, USUAL, Said, Unit, fields_within, sections_in
from models import usual
from models.config import SMALL_RESNETS
from pipeline.recipe.sections import Recipe

FREE_WORDS = "By itself, this decides nothing about the result."


@dataclass(frozen=True)
class Entry:
    """A field, in words.

    Attributes:
        name: as a recipe has it within its section.
        kind: its type, its bounds and its unit, as a noun: "a whole number from 1 to 10".
        default: as YAML, or as a clause; None where it must be given.
        decides: whether it decides a result.
        text: what it does.
        sections: what may stand in it.
    """

    name: str
    kind: str
    default: str | None
    decides: bool
    text: str
    sections: tuple[type[BaseModel], ...]

    @property
    def stated(self) -> str:
        """Type and default, as a clause."""
        return f"{self.kind}; {'must be given' if self.default is None else f'default: {self.default}'}"


def entries(section: type[BaseModel]) -> list[Entry]:
    """The fields of a section, in their order."""
    return [_entry(name, field) for name, field in section.model_fields.items()]


def _entry(name: str, field: FieldInfo) -> Entry:
    return Entry(
        name,
        _words(field.annotation, field.metadata),
        _default(field),
        FREE not in field.metadata,
        _flat(field.description or ""),
        tuple(dict.fromkeys(sections_in(field.annotation))),
    )


def _flat(text: str) -> str:
    return " ".join(text.split())


def first_sentence(text: str) -> str:
    """The first sentence of what a field does, or a section."""
    return re.split(r"(?<=\.)\s(?=[A-Z])", text, maxsplit=1)[0]


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if value is USUAL:
        return "none" if NoneType in get_args(field.annotation) else "as is usual for the network"
    return "its own defaults" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


# Types


def _words(kind: Any, about: Sequence[Any] = ()) -> str:
    """A type as a noun; `about` is what is declared with it, bounds among it."""
    if (said := next((one.words for one in about if isinstance(one, Said)), None)) is not None:
        return said
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(inside[0], [*about, *_flattened(inside[1:])])
    if origin in (Union, UnionType):
        return _alternatives([_words(one, about) for one in inside if one is not NoneType], NoneType in inside)
    if origin is Literal:
        return _alternatives([f"`{_yaml(one)}`" for one in inside])
    if origin is tuple:
        return _list_words(inside, about) + _unit(about)
    if origin is dict:
        return f"a mapping, each value {_words(inside[1])}"
    if kind is bool:
        return "`true` or `false`"
    if kind in (int, float):
        return f"{'a whole number' if kind is int else 'a number'}{_bounds(about)}{_unit(about)}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section `{kind.__name__}`"
    pattern = _declared(about, "pattern")
    return "a text" + ("" if pattern is None else f" of the form `{pattern}`")


def _flattened(about: Sequence[Any]) -> list[Any]:
    """What is declared with a type, out of `Field` too."""
    return [inner for one in about for inner in (one.metadata if isinstance(one, FieldInfo) else [one])]


def _alternatives(words: Sequence[str], nothing: bool = False) -> str:
    several = list(dict.fromkeys(words))
    said = several[0] if len(several) == 1 else f"{', '.join(several[:-1])} or {several[-1]}"
    return f"{said}, or none" if nothing else said


def _unit(about: Sequence[Any]) -> str:
    return "".join(f", {one.words}" for one in about if isinstance(one, Unit))


def _list_words(inside: Sequence[Any], about: Sequence[Any]) -> str:
    if inside[-1] is not Ellipsis:
        return f"a list of {len(inside)}, each {_words(inside[0])}"
    least = _declared(about, "min_length")
    return f"a list{f' of at least {least}' if least else ''}, each {_words(inside[0])}"


def _bounds(about: Sequence[Any]) -> str:
    low, above, high, below = (_declared(about, name) for name in ("ge", "gt", "le", "lt"))
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    words = (("from", low), ("above", above), ("at most", high), ("below", below))
    said = [f"{word} {_number(value)}" for word, value in words if value is not None]
    return f" {', '.join(said)}" if said else ""


def _declared(about: Sequence[Any], name: str) -> Any:
    return next((value for one in about if (value := getattr(one, name, None)) is not None), None)


# One field


def explain(field: str) -> list[str]:
    """A field, or a section with its fields, in lines of text.

    Raises:
        InputError: there is none of that name.
    """
    found = next((one for name, one in places() if name == field), None)
    if found is None:
        raise InputError("--explain", field, "is not a field of a recipe", _nearest(field))
    lines = [field, f"  {found.stated}", f"  {found.text}", *([] if found.decides else [f"  {FREE_WORDS}"])]
    for one in found.sections:
        lines += ["", f"{one.__name__}: {_about(one)}", *(f"  {line}" for line in listing(one))]
    return lines


def listing(section: type[BaseModel]) -> list[str]:
    """The fields of a section, a line each."""
    found = entries(section)
    width = max(len(one.name) for one in found)
    return [f"{one.name:<{width}}  {first_sentence(one.text)} ({one.stated})" for one in found]


def _about(section: type[BaseModel]) -> str:
    return _flat(inspect.getdoc(section) or "")


def places() -> Iterator[tuple[str, Entry]]:
    """Every field of a recipe by its whole name, sections before their fields; what a section does not decide, none of its fields does."""
    free: set[tuple[str, ...]] = set()
    for place, field in fields_within(Recipe):
        one = _entry(place[-1], field)
        if not one.decides or place[:-1] in free:
            free.add(place)
            one = replace(one, decides=False)
        yield ".".join(place), one


def _nearest(field: str) -> str:
    names = [name for name, _ in places()]
    same = [name for name in names if name.rpartition(".")[2] == field.rpartition(".")[2]]
    near = difflib.get_close_matches(field, same or names, n=3, cutoff=0.0 if same else 0.6)
    return f"did you mean {_alternatives(near)}?" if near else "`tophat recipe` lists the sections"


# The page


def page() -> str:
    """docs/recipe.md: every field of a recipe, section by section."""
    found: dict[type[BaseModel], dict[str, Entry]] = {Recipe: {}}
    for name, one in places():
        for inside in one.sections:
            found.setdefault(inside, {})[name] = one
    parts = [_HEAD, *(_chapter(section, standing) for section, standing in found.items()), _usual()]
    return "\n\n".join(parts) + "\n"


_HEAD = """# The fields of a recipe

This page is made of the declared fields (`make docs`). `tophat recipe --explain FIELD` prints one field, such as `select.images_per_class`;
`tophat recipe RECIPE` prints a recipe with every default. A field is set in the recipe, or by `--set section.field=value`.

Only `labeled.train` and `unlabeled` must be given. Learning rates are stated per 256 images: a training's peak is
`learning_rate / 256 * batch_size * workers`, so that a rate stays right when the minibatch changes."""


def _chapter(section: type[BaseModel], standing: Mapping[str, Entry]) -> str:
    """A section; `standing` are the places where it does."""
    where = f"\n\nAt {', '.join(f'`{name}`' for name in standing)}." if standing else ""
    lines = [f"## {section.__name__}\n\n{_about(section)}{where}\n"]
    decides = not standing or any(one.decides for one in standing.values())
    for one in entries(section):
        free = "" if one.decides and decides else f" *{FREE_WORDS}*"
        lines.append(f"- **`{one.name}`** ({one.stated})  \n  {one.text}{free}")
    return re.sub(r"section `(\w+)`", lambda found: f"section [{found[1]}](#{found[1].lower()})", "\n".join(lines))


def _usual() -> str:
    """What is done where a recipe does not say (`models.usual`)."""
    random, trained = usual.FROM_RANDOM_WEIGHTS, usual.FROM_TRAINED_WEIGHTS
    rates = [", ".join(f"{rate:g}" for rate in some) for some in (usual.SWEPT_RATES, usual.SMALL_SWEPT_RATES)]
    small = ", ".join(SMALL_RESNETS)
    return f"""## What is usual

A training that says neither `epochs` nor `images_seen` is as long as is usual, which is the longer of two lengths:

| Its weights begin | Epochs | Images, at least |
|---|---:|---:|
| at random | {random.epochs} | {random.images_seen:,} |
| trained | {trained.epochs} | {trained.images_seen:,} |

Rates per 256 images that are left out depend on the network:

| Network | Training from random weights | Rates that fine-tuning tries |
|---|---:|---|
| {small} | {usual.SMALL_RATE:g} | {rates[1]} |
| any other | {usual.RATE:g} | {rates[0]} |

A network that begins with trained weights is trained with {usual.RATE:g} where the recipe says no rate."""


if __name__ == "__main__":
    print(page(), end="")
