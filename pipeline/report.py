"""The run's report: one static page that says what was run, what came of it, and where every image went.

`ReportContent` is plain data, filled in by the pipeline; `write_report` renders it with the templates beside this
module and publishes the page with its assets. What came from outside (class names, file names, errors, image bytes) is
hostile: text is escaped for HTML and for plotly, images are decoded here and written anew as thumbnails.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cluster import storage
from models.config import Transform
from models.transforms import UndecodableImage, evaluation_image
from pipeline.rejects import Reject
from pipeline.text import duration, finite, parameters, percent, plain, plotly_text, points, score, short, thousands

MANY_CLASSES = 40
"""Up to so many classes are charted by name; more are in falling order. Most classes short of K that are listed."""
TILE = 96
"""Side of a thumbnail, in pixels."""
MAX_PIXELS = 64_000_000
"""An image of more pixels than this is not decoded for its thumbnail."""
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the evaluation images, as fractions from 0 to 1."""

    top1: float
    top5: float | None = None
    """None where it says nothing (five classes or fewer)."""


@dataclass(frozen=True)
class ModelFacts:
    """A network: its architecture's name and the number of its parameters."""

    architecture: str
    parameters: int


@dataclass(frozen=True)
class Conservation:
    """The counts which prove that nothing was dropped in silence.

    It holds when `listed == scored + rejected` (images) and `candidates == selected + unselected + excluded + nonfinite` (candidates).
    """

    listed: int
    scored: int
    rejected: int
    candidates: int
    selected: int
    unselected: int
    excluded: int = 0
    nonfinite: int = 0


@dataclass(frozen=True)
class Curve:
    """The training of one model."""

    name: str
    """"teacher", "student, pre-training", ..."""
    history: Sequence[Mapping[str, float | None]]
    """Rows in order; keys `images_seen`, `learning_rate`, `loss`, `top1`, `val_top1` (fractions), absent or None where
    not measured."""


@dataclass(frozen=True)
class Trial:
    """One trial of the sweep over the fine-tuning learning rate."""

    learning_rate: float
    val_top1: float
    """Fraction, on held-out labeled images."""
    chosen: bool = False


@dataclass(frozen=True)
class ClassCount:
    """What D-hat holds of one class."""

    class_id: int
    name: str
    count: int
    lowest_score: float | None
    """The score of the last selected image; None when there is none."""


@dataclass(frozen=True)
class RankedImage:
    """A selected image: where it stands in its class, and its original encoded bytes."""

    rank: int
    score: float
    shard: str
    index: int
    image: bytes


@dataclass(frozen=True)
class ClassRow:
    """Images of one class at chosen ranks (see `figure_ranks`), by ascending rank."""

    class_id: int
    name: str
    images: Sequence[RankedImage]


@dataclass(frozen=True)
class StageRow:
    """One stage of the run."""

    name: str
    state: str
    """"done", "reused" (finished in an earlier run), "running", "failed" or "not run"."""
    seconds: float | None = None
    images: int | None = None


@dataclass(frozen=True)
class ReportContent:
    """Everything that the report shows. Sections without data are left out of the page."""

    run: str
    """The run's name or URI."""
    recipe_yaml: str
    """The resolved recipe."""
    created: str = ""
    """When the report was written, as text."""
    teacher: ModelFacts | None = None
    student: ModelFacts | None = None
    teacher_accuracy: Accuracy | None = None
    pretrained: Accuracy | None = None
    """The student after pre-training on D-hat: Table 2, first column."""
    fine_tuned: Accuracy | None = None
    """The student after fine-tuning on D: Table 2, second column."""
    supervised: Accuracy | None = None
    """The same student trained on D alone: Table 2, third column."""
    test_images: int | None = None
    """How many images the accuracies are measured on."""
    conservation: Conservation | None = None
    rejects_by_reason: Mapping[str, int] = field(default_factory=dict)
    reject_examples: Sequence[Reject] = ()
    images_per_class: int | None = None
    """K."""
    classes: Sequence[ClassCount] = ()
    """All classes, by class_id."""
    rows: Sequence[ClassRow] = ()
    """Classes to show images of, all or some of `classes`; the page says how many it shows."""
    curves: Sequence[Curve] = ()
    sweep: Sequence[Trial] = ()
    stages: Sequence[StageRow] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions, machine shape, commit."""


def figure_ranks(count: int, first: int, strided: int) -> list[int]:
    """The ranks to show of a class, as in Figure 2: its first ones, then evenly strided ones down to its last.

    Args:
        count: how many images the class has, ranks 0 to count - 1.
        first: how many of the first ranks.
        strided: how many more, the last of which is rank count - 1.

    Returns:
        min(count, first + strided) distinct ranks, ascending.

    Raises:
        ValueError: an argument is negative.
    """
    if min(count, first, strided) < 0:
        raise ValueError(f"figure_ranks({count}, {first}, {strided}): counts must not be negative")
    first = min(first, count)
    rest = count - first
    strided = min(strided, rest)
    return [*range(first), *(first + (i + 1) * rest // strided - 1 for i in range(strided))]


def write_report(out_uri: str, content: ReportContent) -> str:
    """Publishes the report into the folder `out_uri` (local or object store): its assets first, `index.html` last.

    Returns:
        The URI of index.html.

    Raises:
        StorageError: the folder cannot be written.
    """
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    plotly_name = f"plotly-{get_plotlyjs_version()}.min.js"
    plotly_uri = storage.join(out_uri, "assets", plotly_name)
    if not storage.exists(plotly_uri):
        storage.publish(plotly_uri, get_plotlyjs().encode())
    strips = []
    for row in content.rows:
        strip, shown = contact_strip([image.image for image in row.images])
        strips.append(Strip(row, f"class-{row.class_id:05d}.jpg", shown))
        storage.publish(storage.join(out_uri, "assets", strips[-1].file), strip)
    for name, data in _render(content, strips, plotly_name).items():
        storage.publish(storage.join(out_uri, name), data.encode())
    return storage.join(out_uri, "index.html")


# Images


class Strip(NamedTuple):
    """A published contact strip: its class, its file under assets/, and which of its images could be shown."""

    row: ClassRow
    file: str
    shown: Sequence[bool]


def contact_strip(images: Sequence[bytes]) -> tuple[bytes, list[bool]]:
    """Thumbnails of `images` (encoded, hostile), side by side in one JPEG of TILE x len(images) * TILE pixels.

    Returns:
        The JPEG, and for each image whether it could be decoded (a blank tile stands for one that could not).
    """
    from PIL import Image

    strip = Image.new("RGB", (TILE * max(1, len(images)), TILE), (128, 128, 128))
    thumbnails = [_thumbnail(image) for image in images]
    for column, thumbnail in enumerate(thumbnails):
        if thumbnail is not None:
            strip.paste(thumbnail, (column * TILE, 0))
    out = io.BytesIO()
    strip.save(out, "JPEG", quality=88)
    return out.getvalue(), [thumbnail is not None for thumbnail in thumbnails]


def _thumbnail(image: bytes) -> Any:
    """The central square of `image`, upright, TILE x TILE RGB on white; None if it cannot be decoded."""
    from PIL import Image

    try:
        pixels = evaluation_image(image, Transform(size=TILE, resize=TILE, max_pixels=MAX_PIXELS))
    except UndecodableImage:
        return None
    return Image.fromarray(pixels.transpose(1, 2, 0))


# Charts: plotly's JSON, without colors, which report.js takes from the page's theme


class Chart(NamedTuple):
    """A chart of the page: `key` names its figure in the page's data, `summary` says in words what it shows."""

    key: str
    caption: str
    summary: str
    figure: Mapping[str, Any]


def _chart(key: str, caption: str, summary: str, traces: Sequence[Mapping[str, Any]], **layout: Any) -> Chart:
    return Chart(key, caption, summary, {"data": list(traces), "layout": layout})


def _trace(name: str, x: Sequence[float | None], y: Sequence[float | None], **more: Any) -> dict[str, Any]:
    return {"type": "scatter", "name": name, "x": [finite(v) for v in x], "y": [finite(v) for v in y], **more}


def _curve_charts(number: int, curve: Curve) -> list[Chart]:
    """Loss, accuracy and learning rate of one model over the images it has seen."""
    seen = [row.get("images_seen") for row in curve.history]

    def line(key: str, name: str, **more: Any) -> dict[str, Any]:
        pairs = [(x, row[key]) for x, row in zip(seen, curve.history, strict=True) if row.get(key) is not None]
        mode = "lines" if len(pairs) > 30 else "lines+markers"
        return _trace(name, [x for x, _ in pairs], [y for _, y in pairs], mode=mode, **more)

    loss = line("loss", "loss", hovertemplate="%{x:,} images: %{y:.4f}<extra></extra>")
    rate = line(
        "learning_rate", "learning rate", hovertemplate="%{x:,} images: %{y:.3g}<extra></extra>", line={"shape": "hv"}
    )
    hover = {"hovertemplate": "%{x:,} images: %{y:.1%}"}
    accuracy = [line("top1", "training", **hover), line("val_top1", "held out", **hover)]
    x = {"title": {"text": "images seen"}, "rangemode": "tozero"}
    charts = [
        _chart(f"loss-{number}", "Loss", f"loss {_span(loss)}", [loss], xaxis=x, yaxis={"rangemode": "tozero"}),
        _chart(
            f"accuracy-{number}",
            "Top-1 accuracy",
            "; ".join(f"{trace['name']} top-1 accuracy {_span(trace)}" for trace in accuracy if trace["y"]),
            [trace for trace in accuracy if trace["y"]],
            xaxis=x,
            yaxis={"tickformat": ".0%"},
        ),
        _chart(
            f"rate-{number}",
            "Learning rate",
            f"learning rate {_span(rate)}",
            [rate],
            xaxis=x,
            yaxis={"rangemode": "tozero"},
        ),
    ]
    return [chart for chart in charts if any(trace["y"] for trace in chart.figure["data"])]


def _span(trace: Mapping[str, Any]) -> str:
    values = [value for value in trace["y"] if value is not None]
    return f"from {values[0]:.4g} to {values[-1]:.4g}" if values else "not measured"


def _sweep_charts(sweep: Sequence[Trial]) -> list[Chart]:
    """Held-out accuracy over the fine-tuning learning rate, the chosen trial marked."""
    trials = sorted(sweep, key=lambda trial: trial.learning_rate)
    chosen = [trial for trial in trials if trial.chosen]
    hover = "learning rate %{x:.4g}: %{y:.1%}<extra></extra>"
    traces = [
        _trace(name, [t.learning_rate for t in some], [t.val_top1 for t in some], hovertemplate=hover, **style)
        for name, some, style in (
            ("trials", trials, {"mode": "lines+markers"}),
            ("chosen", chosen, {"mode": "markers", "marker": {"size": 15, "symbol": "star"}}),
        )
    ]
    summary = "; ".join(
        f"{t.learning_rate:.3g}: {percent(t.val_top1)}{' (chosen)' if t.chosen else ''}" for t in trials
    )
    x: dict[str, Any] = {"type": "log", "title": {"text": "fine-tuning learning rate"}, "tickformat": "~g", "dtick": 1}
    if len(trials) <= 8:
        x |= {"tickmode": "array", "tickvals": [trial.learning_rate for trial in trials]}
    y = {"tickformat": ".1%", "title": {"text": "held-out top-1"}}
    return [_chart("sweep", "Fine-tuning learning rate", summary, traces, xaxis=x, yaxis=y)] if trials else []


def _class_charts(content: ReportContent) -> list[Chart]:
    """Images of D-hat per class against K, and the lowest selected score per class.

    A few classes stand in their own order, by name; many stand in falling order, so that the chart reads as a curve.
    """
    classes, k = content.classes, content.images_per_class
    many = len(classes) > MANY_CLASSES
    x: dict[str, Any] = {"title": {"text": "classes, in falling order"}}
    if not many:
        names = [plotly_text(short(c.name, 16)) for c in classes]
        x = {"tickmode": "array", "tickvals": list(range(len(classes))), "ticktext": names}

    def trace(name: str, some: Sequence[tuple[int, ClassCount]], value: str, **style: Any) -> dict[str, Any]:
        hover = [
            f"{plotly_text(short(c.name))}: {thousands(c.count)} images, lowest score {score(c.lowest_score)}"
            for _, c in some
        ]
        style |= {"hovertext": hover, "hoverinfo": "text"}
        return _trace(name, [i for i, _ in some], [getattr(c, value) for _, c in some], **style)

    by_count = list(enumerate(sorted(classes, key=lambda c: -c.count) if many else classes))
    by_score = [c for c in classes if finite(c.lowest_score) is not None or not many]
    ranked = list(enumerate(sorted(by_score, key=lambda c: -(c.lowest_score or 0.0)) if many else by_score))
    full = [(i, c) for i, c in by_count if k is None or c.count >= k]
    lacking = [(i, c) for i, c in by_count if k is not None and c.count < k]
    bars = [
        trace(name, some, "count", type="bar") for name, some in (("K images", full), ("short of K", lacking)) if some
    ]
    marks = trace("score", ranked, "lowest_score", mode="markers", marker={"size": 4 if many else 9})
    counts = [c.count for c in classes]
    lowest = [value for value in marks["y"] if value is not None]
    charts = [
        _chart(
            "counts",
            "Images of D̂ per class",
            f"{len(classes):,} classes of {min(counts):,} to {max(counts):,} images; {len(lacking):,} short of K",
            bars,
            xaxis=x,
            yaxis={"rangemode": "tozero", "tickformat": ",d"},
            barmode="overlay",
            bargap=0 if many else 0.2,
        )
        if classes
        else None,
        _chart(
            "lowest",
            "Lowest selected score per class",
            f"from {score(min(lowest))} to {score(max(lowest))}",
            [marks],
            xaxis=x,
        )
        if lowest
        else None,
    ]
    return [chart for chart in charts if chart]


# The page


def _render(content: ReportContent, strips: Sequence[Strip], plotly_name: str) -> dict[str, str]:
    """The page's text files by their path inside the report's folder, `index.html` last."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for text_filter in (plain, short, percent, points, score, duration, thousands, parameters):
        environment.filters[text_filter.__name__] = text_filter
    training = [(curve.name, _curve_charts(number, curve)) for number, curve in enumerate(content.curves)]
    training = [(name, charts) for name, charts in training if charts]
    sweep, class_charts = _sweep_charts(content.sweep), _class_charts(content)
    charts = [*(chart for _, some in training for chart in some), *sweep, *class_charts]
    page = environment.get_template("report.html").render(
        content=content,
        strips=strips,
        training=training,
        sweep=sweep,
        class_charts=class_charts,
        figures={chart.key: chart.figure for chart in charts},
        lacking=_short_of_k(content),
        error=_standard_error(content),
        limit=MANY_CLASSES,
        plotly_name=plotly_name,
    )
    columns = max((len(strip.shown) for strip in strips), default=0)
    style = environment.get_template("report.css").render(columns=columns)
    return {"assets/report.css": style, "assets/report.js": (_TEMPLATES / "report.js").read_text(), "index.html": page}


def _short_of_k(content: ReportContent) -> list[ClassCount]:
    """The classes short of K, the smallest first."""
    k = content.images_per_class
    return sorted((c for c in content.classes if k is not None and c.count < k), key=lambda c: (c.count, c.class_id))


def _standard_error(content: ReportContent) -> float | None:
    """One binomial standard error of the fine-tuned student's (else any) top-1 accuracy, as a fraction."""
    measured = [a for a in (content.fine_tuned, content.supervised, content.pretrained, content.teacher_accuracy) if a]
    if not measured or not content.test_images:
        return None
    return math.sqrt(max(0.0, measured[0].top1 * (1 - measured[0].top1)) / content.test_images)
