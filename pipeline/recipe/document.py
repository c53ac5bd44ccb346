"""Recipes as texts: YAML to plain data and back. Imports nothing heavy.

Two things are not as usual. A key that a mapping has twice is an error, as one of the two would be lost. And a value without quotes is a
`Plain`: the field that it is for says whether it is a text or a number.
"""

import re
from typing import Any

import yaml

from cluster.errors import shown
from cluster.section import FLOAT, Plain

MOST_BYTES = 2 * 2**20
"""Of a recipe; the names of 22,000 classes take half of one MiB."""
MOST_VALUES = 500_000
"""Of a recipe, each counted as often as aliases repeat it."""

MOST_LEVELS = 50
"""Of a recipe, one in another."""

_YAML = "tag:yaml.org,2002:"
_NULL, _TEXT, _MERGE, _LIST, _MAPPING = (f"{_YAML}{name}" for name in ("null", "str", "merge", "seq", "map"))
_UNQUOTED = "tag:tophat:plain"
_TOO_DEEP = "is nested too deeply, or in itself"
_PLAIN_TAGS = {_UNQUOTED, _MERGE, *(f"{_YAML}{name}" for name in ("int", "float", "bool"))}


class Unreadable(Exception):  # noqa: N818 - a reason, which whoever knows the field makes an error of
    """A text that is no document: a clause that says why."""


def parse(text: str) -> Any:
    """A YAML document as plain data: mappings with texts as keys, lists, None, texts that were quoted, and `Plain` ones that were not.

    Raises:
        Unreadable: it is none.
    """
    try:
        node = yaml.compose(text, _Loader)
        return None if node is None else _Reading().data(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(f"is not valid YAML ({error.problem}{'' if mark is None else f', {_place(mark)}'})") from None
    except yaml.reader.ReaderError as error:
        raise Unreadable(f"is not valid YAML (it has the character {chr(int(error.character))!r})") from None
    except ValueError:  # of an escape that is beyond all characters
        raise Unreadable("is not valid YAML (it has the number of a character that there is not)") from None


def dump(document: Any, *, one_line: bool = False) -> str:
    """Plain data as YAML that `parse` takes for the same, and so do readers of YAML 1.1 and 1.2; a list or a mapping on one line, if wanted."""
    width, flow = (10**9, True) if one_line else (120, False)
    return yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=flow
    )


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


class _Loader(yaml.SafeLoader):
    """Tells apart the scalars that have no quotes. It knows no tag but what `_Reading` does."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as PyYAML has it
    _levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise Unreadable(_TOO_DEEP)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if event.tag is None and event.style is None and node.tag == _TEXT:
            node.tag = _UNQUOTED
        return node


_Loader.add_implicit_resolver(_NULL, re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that either version of YAML would take for something else, and escapes what is not printed."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar(_TEXT, text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)

_Dumper.add_implicit_resolver(f"{_YAML}float", FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_YAML}int", re.compile(r"[-+]?([0-9][0-9_]*|0o[0-7_]+)\Z"), list("-+0123456789"))


class _Reading:
    """Makes data of YAML's nodes."""

    def __init__(self) -> None:
        self._values = 0
        self._levels = 0

    def data(self, node: yaml.Node) -> Any:
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise Unreadable(_TOO_DEEP)
        data = self._data(node)
        self._levels -= 1
        return data

    def _data(self, node: yaml.Node) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            raise Unreadable(f"has over {MOST_VALUES:,} values, with what its aliases repeat")
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
            return [self.data(one) for one in node.value]
        if isinstance(node, yaml.ScalarNode):
            text = _text(node)
            if node.tag == _NULL:
                return None
            if node.tag == _TEXT:
                return text
            if node.tag in _PLAIN_TAGS:
                return Plain(text)
        raise Unreadable(f"has the tag {shown(node.tag, 60)}, which no recipe has ({_place(node.start_mark)})")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        places: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Unreadable(f"has a key that is no text ({_place(key.start_mark)})")
            name = _text(key)
            if name in places:
                first, second = _place(places[name]), _place(key.start_mark)
                raise Unreadable(f"has {shown(name, 60)} twice, in {first}, and in {second}")
            places[name] = key.start_mark
            if key.tag != _MERGE:
                found[name] = self.data(value)
                continue
            given = self.data(value)
            for one in given if isinstance(given, list) else [given]:
                if not isinstance(one, dict):
                    raise Unreadable(f"merges with << what is no mapping ({_place(value.start_mark)})")
                merged = one | merged
        return merged | found


def _text(node: yaml.ScalarNode) -> str:
    try:  # JSON, which is YAML but for this, writes a character beyond the first 65,536 as two
        text: str = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise Unreadable(f"has a character that no text has ({_place(node.start_mark)})")
    return text
