"""The run's report: one static page that says what was run, what came of it, and where every image went.

`ReportContent` is plain data, filled in by the pipeline; `write_report` renders it with the templates beside this
module and publishes the page with its assets. What came from outside (class names, file names, errors, image bytes) is
hostile: text is escaped for HTML and for plotly; the images are those of the gallery, which were decoded and written anew.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster import storage
from pipeline.data.rejects import Reject
from pipeline.report import templating as pages
from pipeline.report.gallery import ClassCount, ClassRow
from pipeline.report.text import finite, percent, plotly_text, score, short

MANY_CLASSES = 40
"""Up to so many classes are charted by name; more are in falling order. Most classes short of K that are listed."""
NAME_LETTERS = 16
"""Letters of a class's name in a chart."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the evaluation images, as fractions from 0 to 1."""

    top1: float
    top5: float | None = None
    """None where it says nothing (five classes or fewer)."""


@dataclass(frozen=True)
class ModelFacts:
    """A network: its architecture's name, the number of its parameters, and where it was found, if others trained it."""

    architecture: str
    parameters: int
    source: str = ""


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
class Tags:
    """How many images have a class by their tags, and how many each class got."""

    images: int
    tagged: int
    per_class: Sequence[tuple[str, int]]
    """Class names and images."""

    @property
    def ordered(self) -> list[tuple[str, int]]:
        """The classes, those with the fewest images first."""
        return sorted(self.per_class, key=lambda one: one[1])


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
    teacher_data: str = "D"
    """What the teacher was trained on."""
    earlier_rounds: Sequence[tuple[Accuracy, Accuracy]] = ()
    """Pre-trained and fine-tuned student of each round but the last."""
    tags: Tags | None = None
    """What became of weak labels."""
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
    """Classes to show images of, all or some of `classes`; the page says how many it shows. Each `strip` is
    the URI of one, which is copied."""
    gallery: str = ""
    """Where the gallery of all classes is, relative to the report's page."""
    curves: Sequence[Curve] = ()
    sweep: Sequence[Trial] = ()
    stages: Sequence[StageRow] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions, machine shape, commit."""


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
    strips = [f"class-{row.class_id:05d}.jpg" for row in content.rows]
    for row, strip in zip(content.rows, strips, strict=True):
        if row.images:
            storage.publish(storage.join(out_uri, "assets", strip), storage.read_bytes(row.strip))
    for name, data in _render(content, strips, plotly_name).items():
        storage.publish(storage.join(out_uri, name), data.encode())
    return storage.join(out_uri, "index.html")


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
        names = [plotly_text(short(c.name, NAME_LETTERS)) for c in classes]
        x = {"tickmode": "array", "tickvals": list(range(len(classes))), "ticktext": names}

    def trace(name: str, some: Sequence[tuple[int, ClassCount]], value: str, **style: Any) -> dict[str, Any]:
        y = [getattr(c, value) for _, c in some]
        ids = [c.class_id for _, c in some]  # report.js puts the names in their place
        return _trace(
            name, [i for i, _ in some], [v if finite(v) is None else round(v, 5) for v in y], customdata=ids, **style
        )

    by_count = list(enumerate(sorted(classes, key=lambda c: -c.count) if many else classes))
    by_score = [c for c in classes if finite(c.lowest_score) is not None or not many]
    ranked = list(enumerate(sorted(by_score, key=lambda c: -(c.lowest_score or 0.0)) if many else by_score))
    full = [(i, c) for i, c in by_count if k is None or c.count >= k]
    lacking = [(i, c) for i, c in by_count if k is not None and c.count < k]
    bars = [
        trace(name, some, "count", type="bar", hovertemplate="%{customdata}: %{y:,} images<extra></extra>")
        for name, some in (("K images", full), ("short of K", lacking))
        if some
    ]
    hover = "%{customdata}: lowest score %{y:.4f}<extra></extra>"
    style = {"mode": "markers", "marker": {"size": 4 if many else 9}, "hovertemplate": hover}
    marks = trace("score", ranked, "lowest_score", **style)
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


def _render(content: ReportContent, strips: Sequence[str], plotly_name: str) -> dict[str, str]:
    """The page's text files by their path inside the report's folder, `index.html` last."""
    environment = pages.environment()
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
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
        names={
            c.class_id: short(c.name, NAME_LETTERS if len(content.classes) > MANY_CLASSES else 120)
            for c in content.classes
        },
        lacking=_short_of_k(content),
        error=_standard_error(content),
        limit=MANY_CLASSES,
        plotly_name=plotly_name,
    )
    columns = max((len(row.images) for row in content.rows), default=0)
    return {
        "assets/report.css": pages.style(columns),
        "assets/report.js": pages.asset("report.js"),
        "index.html": page,
    }


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
