"""Commands about models: teacher."""

from typing import Annotated

import typer

from cluster.errors import InputError, ModelError
from pipeline.cli.app import Sets, app, out


@app.command()
def teacher(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="torchvision:NAME, timm:NAME, timm:local-dir:PATH, open_clip:NAME/TAG, hf:NAME, hf:PATH or package.module:factory.",
        ),
    ],
    to: Annotated[str, typer.Option("--out", metavar="DIR", help="The model directory, empty or new.")],
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FILE", help="Weights: safetensors, or torch's without code.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE", help="Names of the classes, one per line, in their order."),
    ] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="TEXT",
            help="CLIP: a text of an image, {} for the class; by default `a photo of a {}.` Repeatable.",
        ),
    ] = None,
    sets: Sets = None,
) -> None:
    """Make a model directory of a network that exists elsewhere: its weights, its input, its classes, its license."""
    from rich.markup import escape

    from cluster import storage
    from models.sources import SourceSpec, is_spec, obtain
    from pipeline.cli.tables import table
    from pipeline.recipe.reading import transform_overrides
    from pipeline.report import text

    if not is_spec(spec):
        fix = "write torchvision:NAME, timm:NAME, open_clip:NAME/TAG, hf:NAME or package.module:factory"
        raise ModelError("SPEC", spec, "names no network of a library and no factory", fix)
    uri = storage.absolute(to)
    if next(iter(storage.list_files(uri)), None) is not None:
        raise ModelError("--out", to, "is not empty", "name an empty or new folder")
    names = tuple(_lines(classes)) if classes else ()
    texts = tuple(templates or (["a photo of a {}."] if spec.startswith("open_clip:") else []))
    if wrong := next((one for one in texts if one.count("{}") != 1), None):
        raise ModelError("--template", wrong, "must have {} once, for the class", "write it so: a photo of a {}.")
    wanted = SourceSpec(spec, weights, names, texts, transform_overrides(sets or []))
    try:
        card = obtain(wanted, uri, "SPEC")
    except InputError as error:
        fields = {"weights": "--weights", "classes": "--classes", "architecture": "SPEC"}
        option = fields.get(error.field)
        if option is None and error.field.startswith("transform."):
            option = f"--set {error.field}"
        if option is None:
            raise
        raise type(error)(option, error.value, error.rule, error.fix) from None
    transform, source = card.model.transform, card.source
    assert source is not None
    made = table(f"{to}", "", "")
    side = f"{transform.size} x {transform.size}, {transform.fit}"
    side += f" of {transform.resize}" if transform.fit == "crop" else ""
    shown = {
        "network": card.model.architecture,
        "from": " ".join(part for part in (source.spec, source.revision, source.url) if part),
        "license": source.license or "not stated by its source",
        "parameters": f"{card.parameters:,}",
        "input": f"{side}, {transform.interpolation}",
        "mean, std": f"{_figures(transform.mean)}; {_figures(transform.std)}",
        "classes": f"{len(card.class_names):,}: {', '.join(card.class_names[:3])}, ...",
    }
    for name, value in shown.items():
        made.add_row(name, escape(text.plain(value)))
    out.print(made)


def _figures(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _lines(path: str) -> list[str]:
    """The names in a file, one per line."""
    from pathlib import Path

    try:
        names = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except OSError as error:
        raise ModelError("--classes", path, f"cannot be read ({error.strerror})", "name a file of names") from None
    except UnicodeDecodeError:
        raise ModelError("--classes", path, "is no text in UTF-8", "save it as UTF-8") from None
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        rule = "is empty" if not names else f"has an empty line {names.index('') + 1}"
        raise ModelError("--classes", path, rule, "write one name per line")
    return names
