"""Charts of a page: plotly's JSON, without colors, which report.js takes from the page's theme."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.text import finite

MANY_CLASSES = 40
"""Up to so many classes are charted by name; more are in falling order. Most classes short of K that are listed."""
NAME_LETTERS = 16
"""Letters of a class's name in a chart."""


class Chart(NamedTuple):
    """A chart of the page: `key` names its figure in the page's data, `summary` says in words what it shows."""

    key: str
    caption: str
    summary: str
    figure: Mapping[str, Any]


def chart(key: str, caption: str, summary: str, traces: Sequence[Mapping[str, Any]], **layout: Any) -> Chart:
    """A chart of traces."""
    return Chart(key, caption, summary, {"data": list(traces), "layout": layout})


def trace(name: str, x: Sequence[float | None], y: Sequence[float | None], **more: Any) -> dict[str, Any]:
    """A trace: a scatter, but where `type` says otherwise."""
    return {"type": "scatter", "name": name, "x": [finite(v) for v in x], "y": [finite(v) for v in y], **more}
