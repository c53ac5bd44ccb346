"""The run's report: one static page that says what was run, what came of it, and where every image went.

`ReportContent` is plain data, filled in by the pipeline; `write_report` renders it with the templates beside this
module and publishes the page with its assets. What came from outside (class names, file names, errors, image bytes) is
hostile: text is escaped for HTML and for plotly; the images are those of the gallery, which were decoded and written anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from pipeline.data.rejects import Reject
from pipeline.report import judgment as judgments
from pipeline.report import templating as pages
from pipeline.report.charts import MANY_CLASSES, NAME_LETTERS, Chart, chart, trace
from pipeline.report.gallery import ClassCount, ClassRow
from pipeline.report.judgment import Judgment
from pipeline.report.text import finite, percent, plotly_text, score, short

MISTAKES = "mistakes.jpg"
"""The contact strip of mistakes, among the page's assets."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the evaluation images, as fractions from 0 to 1."""

    top1: float
    top5: float | None = None
    """None where it says nothing (five classes or fewer)."""
    interval: tuple[float, float] | None = None
    """Of top1, 95%."""


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
    `listed` is None where the run began with a selection, of which only the candidates are known.
    """

    listed: int | None
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
    """One trial of the sweep over the fine-tuning learning rate, which is per 256 images."""

    learning_rate: float
    val_top1: float
    """Fraction, on held-out labeled images."""
    chosen: bool = False


@dataclass(frozen=True)
class TriedK:
    """One value of K that was tried before one was taken."""

    images_per_class: int
    dhat: int
    """Images of its D-hat."""
    top1: Sequence[float | None]
    """At the end of each rung, as fractions; None where it did not enter it."""
    error: Sequence[float | None]
    """Standard errors of these."""
    close: bool = False
    """Whether it is within a standard error of the best of the last rung."""
    chosen: bool = False


@dataclass(frozen=True)
class Choice:
    """How K was chosen."""

    values: Sequence[TriedK]
    judged: int
    """Labeled images that the trials were judged on."""
    images: int
    """Seen in all trials."""


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
class Advice:
    """A fact, and what to do about it.

    Attributes:
        fact: what was measured.
        do: what would help.
    """

    fact: str
    do: str

    def __str__(self) -> str:
        return f"{self.fact}: {self.do}"


@dataclass(frozen=True)
class ReportContent:
    """Everything that the report shows. Sections without data are left out of the page."""

    run: str
    """The run's name or URI."""
    recipe_yaml: str
    """The resolved recipe."""
    created: str = ""
    """When the report was written, as text."""
    advice: Sequence[Advice] = ()
    """What to do next, the most important first."""
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
    judgment: Judgment | None = None
    """The evaluation, class by class."""
    conservation: Conservation | None = None
    rejects_by_reason: Mapping[str, int] = field(default_factory=dict)
    reject_examples: Sequence[Reject] = ()
    images_per_class: int | None = None
    """K."""
    choice: Choice | None = None
    """How K was chosen, where the recipe left it open."""
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
    if content.judgment is not None and content.judgment.tiles:
        storage.publish(storage.join(out_uri, "assets", MISTAKES), storage.read_bytes(content.judgment.strip))
    for name, data in _render(content, strips, plotly_name).items():
        storage.publish(storage.join(out_uri, name), data.encode())
    return storage.join(out_uri, "index.html")


def _curve_charts(number: int, curve: Curve) -> list[Chart]:
    """Loss, accuracy and learning rate of one model over the images it has seen."""
    seen = [row.get("images_seen") for row in curve.history]

    def line(key: str, name: str, **more: Any) -> dict[str, Any]:
        pairs = [(x, row[key]) for x, row in zip(seen, curve.history, strict=True) if row.get(key) is not None]
        mode = "lines" if len(pairs) > 30 else "lines+markers"
        return trace(name, [x for x, _ in pairs], [y for _, y in pairs], mode=mode, **more)

    loss = line("loss", "loss", hovertemplate="%{x:,} images: %{y:.4f}<extra></extra>")
    rate = line(
        "learning_rate", "learning rate", hovertemplate="%{x:,} images: %{y:.3g}<extra></extra>", line={"shape": "hv"}
    )
    hover = {"hovertemplate": "%{x:,} images: %{y:.1%}"}
    accuracy = [line("top1", "training", **hover), line("val_top1", "held out", **hover)]
    x = {"title": {"text": "images seen"}, "rangemode": "tozero"}
    charts = [
        chart(f"loss-{number}", "Loss", f"loss {_span(loss)}", [loss], xaxis=x, yaxis={"rangemode": "tozero"}),
        chart(
            f"accuracy-{number}",
            "Top-1 accuracy",
            "; ".join(f"{trace['name']} top-1 accuracy {_span(trace)}" for trace in accuracy if trace["y"]),
            [trace for trace in accuracy if trace["y"]],
            xaxis=x,
            yaxis={"tickformat": ".0%"},
        ),
        chart(
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
    hover = "%{x:.4g} per 256 images: %{y:.1%}<extra></extra>"
    traces = [
        trace(name, [t.learning_rate for t in some], [t.val_top1 for t in some], hovertemplate=hover, **style)
        for name, some, style in (
            ("trials", trials, {"mode": "lines+markers"}),
            ("chosen", chosen, {"mode": "markers", "marker": {"size": 15, "symbol": "star"}}),
        )
    ]
    summary = "; ".join(
        f"{t.learning_rate:.3g}: {percent(t.val_top1)}{' (chosen)' if t.chosen else ''}" for t in trials
    )
    x: dict[str, Any] = {
        "type": "log",
        "title": {"text": "fine-tuning learning rate, per 256 images"},
        "tickformat": "~g",
        "dtick": 1,
    }
    if len(trials) <= 8:
        x |= {"tickmode": "array", "tickvals": [trial.learning_rate for trial in trials]}
    y = {"tickformat": ".1%", "title": {"text": "held-out top-1"}}
    return [chart("sweep", "Fine-tuning learning rate", summary, traces, xaxis=x, yaxis=y)] if trials else []


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

    def of_classes(name: str, some: Sequence[tuple[int, ClassCount]], value: str, **style: Any) -> dict[str, Any]:
        y = [getattr(c, value) for _, c in some]
        ids = [c.class_id for _, c in some]  # report.js puts the names in their place
        return trace(
            name, [i for i, _ in some], [v if finite(v) is None else round(v, 5) for v in y], customdata=ids, **style
        )

    by_count = list(enumerate(sorted(classes, key=lambda c: -c.count) if many else classes))
    by_score = [c for c in classes if finite(c.lowest_score) is not None or not many]
    ranked = list(enumerate(sorted(by_score, key=lambda c: -(c.lowest_score or 0.0)) if many else by_score))
    full = [(i, c) for i, c in by_count if k is None or c.count >= k]
    lacking = [(i, c) for i, c in by_count if k is not None and c.count < k]
    bars = [
        of_classes(name, some, "count", type="bar", hovertemplate="%{customdata}: %{y:,} images<extra></extra>")
        for name, some in (("K images", full), ("short of K", lacking))
        if some
    ]
    hover = "%{customdata}: lowest score %{y:.4f}<extra></extra>"
    style = {"mode": "markers", "marker": {"size": 4 if many else 9}, "hovertemplate": hover}
    marks = of_classes("score", ranked, "lowest_score", **style)
    counts = [c.count for c in classes]
    lowest = [value for value in marks["y"] if value is not None]
    charts = [
        chart(
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
        chart(
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
    judged = content.judgment
    judgment_charts = [] if judged is None else judgments.charts(judged)
    charts = [*(one for _, some in training for one in some), *sweep, *class_charts, *judgment_charts]
    class_names = {c.class_id: c.name for c in content.classes} or dict(enumerate(judged.class_names if judged else ()))
    page = environment.get_template("report.html").render(
        content=content,
        strips=strips,
        training=training,
        sweep=sweep,
        class_charts=class_charts,
        figures={chart.key: chart.figure for chart in charts},
        judgment_charts=judgment_charts,
        matrix=judgments.matrix(judged) if judged else [],
        pairs=judgments.pairs(judged) if judged else [],
        mistakes=f"assets/{MISTAKES}",
        names={
            number: short(name, NAME_LETTERS if len(class_names) > MANY_CLASSES else 120)
            for number, name in class_names.items()
        },
        lacking=_short_of_k(content),
        name_letters=NAME_LETTERS,
        limit=MANY_CLASSES,
        plotly_name=plotly_name,
    )
    tiles = len(judged.tiles) if judged else 0
    columns = max((len(row.images) for row in content.rows), default=0)
    return {
        "assets/report.css": pages.style(max(columns, tiles)),
        "assets/report.js": pages.asset("report.js"),
        "index.html": page,
    }


def _short_of_k(content: ReportContent) -> list[ClassCount]:
    """The classes short of K, the smallest first."""
    k = content.images_per_class
    return sorted((c for c in content.classes if k is not None and c.count < k), key=lambda c: (c.count, c.class_id))
