"""The command `evaluate`: a model on labeled images, alone or against another one."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import InputError, ModelError, SourceError
from pipeline.cli.app import (
    Address,
    ImageColumn,
    LabelColumn,
    Labels,
    Layout,
    Sets,
    Verbose,
    app,
    in_options,
    listed,
    out,
    ray_session,
    source_of,
)

if TYPE_CHECKING:
    from pipeline.evaluation import Candidate, Measured

WORST = 20
"""Classes that are listed, at most."""


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")],
    source: Annotated[str, typer.Option("--source", metavar="URI", help="Labeled images.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="DIR", help="Another model of the same classes, to compare with.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--out", metavar="URI", help="An empty or new folder for the predictions, as Parquet.")
    ] = None,
    layout: Layout = "auto",
    image_column: ImageColumn = None,
    label_column: LabelColumn = "label",
    labels: Labels = None,
    sets: Sets = None,
    address: Address = "local",
    verbose: Verbose = False,
) -> None:
    """Measure a model on labeled images: top-1 and top-5, each class, and whether it is better than another one."""
    from cluster import storage
    from cluster.progress import Display
    from pipeline.cli import tables
    from pipeline.data import labeled
    from pipeline.data.rejects import counted
    from pipeline.evaluation import Candidate, compared, measured, save_predictions
    from pipeline.ready import class_outputs
    from pipeline.recipe.reading import score_settings
    from pipeline.report import text
    from pipeline.scoring import score as scoring
    from pipeline.scoring.judging import judge

    names = _classes("MODEL", model)
    models = {"model": Candidate(storage.absolute(model))}
    if against is not None:
        known = _classes("--against", against)
        try:
            outputs = class_outputs(against, known, tuple(names), of="MODEL")
        except ModelError as error:
            fix = "give a model that has the same classes, by name, in whatever order"
            raise ModelError("--against", against, error.rule, fix) from None
        models["against"] = Candidate(storage.absolute(against), outputs)
    settings = score_settings(sets or [], None, len(names))
    images = listed("--source", source_of("--source", source, layout, image_column, label_column, labels), labeled=True)
    if to is not None:
        images.check_outside("--out", to)
        storage.check_writable("--out", storage.absolute(to))
        if storage.list_files(storage.absolute(to)):
            raise InputError("--out", to, "is not empty", "give another folder")
    session = ray_session(address, verbose, on_start=lambda: scoring.check_cluster(settings))
    with in_options("--source", out=to), session:
        session.start()
        display = Display(out)
        with display.task("reading", None) as progress:
            found = labeled.survey("--source", images, progress)
        numbered = labeled.number_labels("--source", found, names, complete=False)
        data = labeled.training_set(images, numbered, names)
        if not data.images:
            raise SourceError("--source", source, "holds no image that can be used", "look at the files")
        with display.task("evaluation", data.images * len(models)) as progress, _told(models):
            judged = judge(models, {"source": (data, list(models))}, names, settings, progress)["source"]
        for name, table in judged.items() if to is not None else ():
            save_predictions(storage.join(storage.absolute(str(to)), f"{name}.parquet"), table)
    by_model = {name: measured(table, len(names)) for name, table in judged.items()}
    table = tables.table(
        "Evaluation", "", "images", "rejected", "top-1", "95% interval", "top-5", "loss", "calibration error"
    )
    for name, one in by_model.items():
        top = (text.percent(one.top1), text.interval(one.interval), text.percent(one.top5))
        table.add_row(
            name, f"{one.images:,}", f"{len(found.rejects):,}", *top, f"{one.loss:.4f}", text.percent(one.ece)
        )
    out.print(table)
    _print_classes(names, by_model)
    if against is not None:
        out.print(f"model against the other: {text.comparison(compared(judged['model'], judged['against']))}")
    if found.rejects:
        out.print(f"rejected: {counted(Counter(one.reason for one in found.rejects))}")
    if to is not None:
        out.print(f"predictions: {storage.absolute(to)}", markup=False)
    tables.print_passed_over(out, {"--source": images})


def _classes(option: str, uri: str) -> list[str]:
    from cluster import storage
    from models.card import read_card
    from pipeline.evaluation import Candidate

    with _told({"model" if option == "MODEL" else "against": Candidate(storage.absolute(uri))}):
        return read_card(storage.absolute(uri)).class_names


@contextmanager
def _told(models: "Mapping[str, Candidate]") -> Iterator[None]:
    """Has what is wrong with a model told by the option that gave it."""
    try:
        yield
    except ModelError as error:
        of_other = "against" in models and error.value == models["against"].uri
        raise ModelError("--against" if of_other else "MODEL", error.value, error.rule, error.fix) from None


def _print_classes(names: list[str], models: "dict[str, Measured]") -> None:
    """The classes with images that the first model finds least of."""
    from rich.markup import escape

    from pipeline.cli import tables
    from pipeline.report import text

    first = models["model"]
    ranked = sorted((recall, number) for number, recall in enumerate(first.recall) if recall is not None)
    title = f"Classes, the lowest recall first ({WORST} of {len(ranked):,})" if len(ranked) > WORST else "Classes"
    other = models.get("against")
    columns = ("class", "images", "recall", "precision")
    made = tables.table(title, *columns, *(("recall of the other",) if other is not None else ()))
    for recall, number in ranked[:WORST]:
        cells = [f"{first.support[number]:,}", text.percent(recall), text.percent(first.precision[number])]
        cells += [text.percent(other.recall[number])] if other is not None else []
        made.add_row(escape(text.plain(names[number])), *cells)
    out.print(made)
