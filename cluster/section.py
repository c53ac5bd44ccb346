"""The base of every section of a recipe."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: immutable, and no unknown key is let through.

    The docstring under a field is its description, in the schema and in error messages.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
