"""Locations in a recipe, and the words that may stand in their place. Imports nothing heavy."""

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from cluster.section import Said


def _one_spelling(uri: str) -> str:
    scheme, slashes, path = uri.partition("://")
    if slashes:
        return f"{scheme}://{path.rstrip('/')}"  # what else has two slashes in an object store is another key
    plain = str(PurePosixPath(uri))
    if plain != uri and plain in (SIDECAR, RESNET18, TEACHER):
        return f"./{plain}"  # a path that is spelled so that it is none of these words
    return plain[1:] if plain.startswith("//") else plain


SIDECAR = "sidecar"
"""The tags that a source of images has itself, beside them."""
RESNET18, TEACHER = "resnet18", "teacher"
"""Models that `deduplicate.model` knows by name."""
Uri = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2000, strip_whitespace=True),
    AfterValidator(_one_spelling),
    Said("a local path or a URI"),
]
"""A location, in one of its spellings: `a//b/`, `./a/b` and `a/b` are the same local path."""
