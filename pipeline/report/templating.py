"""The templates of the static pages: the report, the gallery, the review of near-duplicates.

Text of a page may be hostile (names of classes and files, errors): templates escape everything, and the filters `plain`
and `short` spell out what prints nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report import text

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "pages"
_FILTERS = (
    *(text.plain, text.short, text.percent, text.points, text.score, text.duration, text.thousands),
    *(text.parameters, text.interval, text.comparison, text.basename),
)


def environment() -> "jinja2.Environment":
    """Renders `TEMPLATES`: escapes for HTML, refuses undefined names, and has the filters of `pipeline.report.text`."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update({function.__name__: function for function in _FILTERS})
    return made


def style(columns: int = 0) -> str:
    """The pages' common style sheet, `report.css`; `columns`: tiles in the widest contact strip."""
    return environment().get_template("report.css").render(columns=columns)


def asset(name: str) -> str:
    """A script or a style sheet that is published as it stands."""
    return (TEMPLATES / name).read_text(encoding="utf-8")
