"""The application `tophat`: what its commands share. Loads nothing heavy: each command imports what it needs, so that help and a mistyped
option answer at once."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.exceptions
from rich.console import Console

from cluster.environment import prepare_command
from cluster.errors import InputError, Interrupted, RecipeErrors, TophatError, one_line
from cluster.interrupt import INTERRUPTED, Interruption

if TYPE_CHECKING:
    from cluster.session import Session
    from pipeline.data.sources import ImageSource
    from pipeline.recipe.images import Source

app = typer.Typer(
    name="tophat",
    help="Semi-supervised image classification: a teacher labels a huge unlabeled pool, a student learns from the best of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_terminal = sys.stdout is not None and sys.stdout.isatty()
out = Console(highlight=False, soft_wrap=not _terminal, width=None if _terminal else 160)

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe: demo, drawings, fashion-mnist, paper."),
]
RunDir = Annotated[
    str | None, typer.Option("--run-dir", metavar="URI", help="Where everything is written; by default runs/NAME.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: select.images_per_class=200. Repeatable."),
]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's own messages.")]
ClassesPerImage = Annotated[int | None, typer.Option("--classes-per-image", metavar="P", min=1)]
Address = Annotated[str, typer.Option("--address", help="`local`, or a running Ray cluster's address.")]
Model = Annotated[str, typer.Option("--model", metavar="DIR", help="A model directory.")]
Layout = Annotated[
    str, typer.Option("--layout", help="Of the source: webdataset, parquet or folder; by default what is found.")
]
ImageColumn = Annotated[
    str | None,
    typer.Option("--image-column", metavar="NAME", help="Parquet: the column of images; by default what is found."),
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", metavar="FILE", help="Folders: CSV, TSV or Parquet of paths and labels, for its images."),
]
LabelColumn = Annotated[str, typer.Option("--label-column", metavar="NAME", help="Parquet: the column of labels.")]


def pairs(title: str, values: Mapping[str, int]) -> Any:
    """A table of names and counts."""
    from pipeline.cli.tables import table

    made = table(title, "", "count")
    for name, value in values.items():
        made.add_row(name, f"{value:,}")
    return made


def source_of(
    option: str,
    uri: str,
    layout: str = "auto",
    image_column: str | None = None,
    label_column: str = "label",
    labels: str | None = None,
) -> "Source":
    """A source, as the options of a command describe it; `option` gives its URI."""
    from pipeline.recipe.reading import source_settings

    columns = {"image_column": image_column, "label_column": label_column}
    return source_settings(option, uri, layout=layout, labels=labels, **columns)


def listed(option: str, source: "Source", *, labeled: bool = False) -> "ImageSource":
    """A source, listed, with a warning where much of it is passed over; `option` gives its URI."""
    from pipeline.cli.tables import print_warnings
    from pipeline.data.sources import open_source

    with in_options(option):
        found = open_source(option, source, labeled=labeled)
    print_warnings(out, {option: found})
    return found


OPTIONS = ("layout", "image_column", "label_column", "labels", "model", "scores", "exclude", "out")
"""Fields that have an option of their name in each command that knows them."""


@contextmanager
def in_options(source: str, *others: str, out: str | None = None) -> Iterator[None]:
    """Has mistakes that the block tells by the fields of a recipe, or of a function, told by the options of a command.

    Args:
        source: the option that gives the source's URI.
        others: fields that have an option of their name in this command.
        out: what `--out` was given.
    """
    try:
        yield
    except InputError as error:
        field = error.field.removeprefix(f"{source}.").removeprefix("deduplicate.")
        if field == "uri":
            option = "--out" if out is not None and _is_in(str(error.value), out) else source
        elif field in (*OPTIONS, *others):
            option = f"--{field.replace('_', '-')}"
        elif field.startswith("score."):
            option = f"--set {field}"
        else:
            raise
        raise type(error)(option, error.value, error.rule, error.fix) from None


def _is_in(uri: str, folder: str) -> bool:
    from cluster.filesystems import absolute

    return f"{absolute(uri)}/".startswith(f"{absolute(folder).rstrip('/')}/")


def ray_session(address: str, verbose: bool, on_start: Callable[[], None] | None = None) -> "Session":
    """Ray for a command without a recipe."""
    from cluster.config import Cluster
    from cluster.session import Session

    return Session(Cluster(address=address), on_start=on_start, verbose=verbose, field="--address")


def main() -> None:
    """Runs the command line.

    Exit code 0 on success, 2 for a user's mistake, 1 for a failure, 128 + N when signal N ended it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    interruption = None
    try:
        prepare_command()
        interruption = Interruption()
        sys.exit(_run())
    except BaseException as error:
        if interruption is not None and interruption.signal is not None:  # whatever the signal has made of the work
            interruption.end(str(error) if isinstance(error, Interrupted) else INTERRUPTED)
        if not isinstance(error, TophatError):
            raise
        message = str(error) if isinstance(error, RecipeErrors) else one_line(str(error))
        _fail(message, 2 if isinstance(error, InputError) else 1)
    finally:
        if interruption is not None:
            interruption.over = True


def _run() -> int:
    """The command, and its exit code; what is wrong with how it was called is one line."""
    try:
        return app(standalone_mode=False) or 0
    except typer.exceptions.TyperException as error:
        message = one_line(error.format_message()).replace("Input should", "must")
        if not message:  # no arguments: the help was shown
            return 2
        place = getattr(getattr(error, "ctx", None), "command_path", "tophat")
        _fail(f"{message.rstrip('.')}; see {place} --help", 2)


def _fail(message: str, code: int) -> NoReturn:
    with suppress(OSError):  # whoever would read it is gone
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
