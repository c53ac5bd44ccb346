"""The base of every section of a recipe, and the mark of fields that decide nothing."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict


class _Free:
    """The type of `FREE`."""

    def __repr__(self) -> str:
        return "FREE"


FREE: Final = _Free()
"""Marks a field that decides nothing about a result: how fast it comes, on what, or how it is shown. `workers: Annotated[int, FREE]`."""


class Section(BaseModel):
    """A part of a recipe: immutable, and no unknown key is let through.

    The docstring under a field is its description, in the schema and in error messages.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

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
    return plain
