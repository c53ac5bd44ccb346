"""Tags and words that stand beside images."""

import json
import re

TAG_FIELDS = ("tags", "caption")
"""Columns of a Parquet source, and keys of a JSON sidecar, that hold tags; both are read where there are both."""
MAX_SIDECAR_BYTES = 2**20


def split_tags(value: object) -> tuple[str, ...]:
    """The tags of one image.

    Args:
        value: a text, which is split at white space, commas and semicolons, and before each `#`; or a list, each text of which is a tag.
            Anything else has no tags.
    """
    if isinstance(value, str):
        return tuple(re.findall(r"#?[^\s,;#]+", value))
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def sidecar_words(suffix: str, content: bytes) -> tuple[str, ...]:
    """The words of a text, or those in the tags and the caption of a JSON object; none of what is no JSON object."""
    text = content.decode("utf-8-sig", "replace")
    if suffix == "txt":
        return split_tags(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return tuple(w for name in TAG_FIELDS for w in split_tags(found.get(name))) if isinstance(found, dict) else ()
