"""The command `init`: a recipe for images of one's own."""

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ModelError, RunError, SourceError, StorageError, one_line, shown
from pipeline.cli.app import Labels, app, in_options, listed, out, source_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.data.sources import ImageSource
    from pipeline.guide.decide import Plan
    from pipeline.guide.findings import Findings, Look, Place, Ready


@app.command()
def init(
    labeled: Annotated[
        str, typer.Option("--labeled", metavar="URI", help="D: one folder of images per class, or shards.")
    ],
    unlabeled: Annotated[str, typer.Option("--unlabeled", metavar="URI", help="U: any folder of images, or shards.")],
    labels: Labels = None,
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="URI", help="Labeled images to measure with; by default a part of D."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="SPEC", help="A teacher that exists: a model directory, or e.g. timm:resnet50."
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option("--student", metavar="SPEC", help="A model whose weights the student begins with."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run; by default that of D's folder.")] = None,
    to: Annotated[str | None, typer.Option("--out", metavar="FILE", help="By default NAME.yaml.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=1.0, help="That a run may take: trainings get shorter, inputs smaller."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over FILE.")] = False,
) -> None:
    """Look at images, and write a recipe that fits them."""
    from pipeline.recipe.sections import NAME

    uris = {"--labeled": labeled, "--unlabeled": unlabeled, **({} if test is None else {"--test": test})}
    name = _name_of(labeled) if name is None else name
    if not re.fullmatch(NAME, name):
        rule = "is none that a run can have"
        raise RunError("--name", name, rule, "use up to 100 letters, digits, dots and dashes, a letter or digit first")
    file = Path(f"{name}.yaml" if to is None else to)
    _check_free(file, "" if to is None else to, force)
    sources = {
        option: listed(
            option,
            source_of(option, uri, labels=labels if option == "--labeled" else None),
            labeled=option != "--unlabeled",
        )
        for option, uri in uris.items()
    }
    # Only now what takes seconds to load: a mistyped path is told at once.
    from pipeline.guide import budget, decide, timing, writing
    from pipeline.guide.look import look

    looks: dict[str, Look] = {}
    for option, source in sources.items():
        with in_options(option), out.status(f"looking at {option}"):
            looks[option] = look(option, source, labeled=option != "--unlabeled")
    _check_classes(sources["--labeled"], looks["--labeled"], looks.get("--test"), test)
    given = {"--teacher": teacher, "--student": student}
    with out.status("measuring this machine"), tempfile.TemporaryDirectory(prefix="tophat-") as folder:
        ready, directories = {}, {}
        for option, spec in given.items():
            if spec is not None:
                ready[option], directories[option] = _ready(option, spec, looks["--labeled"], f"{folder}/{option[2:]}")
        found = _findings(sources, looks, ready)
        plan = decide.decide(found)
        option = next(iter(directories), "--teacher")  # of the teacher's model, where one is given
        with _by_option(option, given[option]):
            costs = timing.measure(plan, found, directories.get(option))
    if minutes is not None:
        plan = budget.in_time(plan, costs, found, minutes)
    seconds = budget.estimate(plan, costs, found)
    copies = file.with_suffix(".copies.parquet")
    excluded = [one for one, _ in found.copies.pool]
    places = writing.Sources(
        name=name,
        labeled={"uri": labeled} | ({} if labels is None else {"labels": labels}),
        unlabeled={"uri": unlabeled},
        test=None if test is None else {"uri": test},
        excluded=str(copies) if excluded else None,
    )
    _write(file, writing.recipe_text(plan, found, places, sum(seconds.values()) / 60), copies, excluded)
    notes = [*writing.warnings_of(found), *plan.notes, *filter(None, [budget.slow_images(plan, costs)])]
    _print(found, plan, seconds, notes)
    if excluded:
        out.print(f"{copies}: images of U that are labeled or test images, too; none is selected", markup=False)
    out.print(f"{file}: the recipe, with reasons; next: tophat run {shlex.quote(str(file))}", markup=False)


def _name_of(uri: str) -> str:
    """A run's name, after D's folder, or after what that is in where its own name says nothing."""
    from cluster.storage import absolute

    parts = [part for part in absolute(uri).split("/") if part]
    told = [part for part in reversed(parts) if part.lower() not in ("train", "labeled", "labelled", "images", "data")]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", told[0] if told else "").strip("-._")[:100]
    return plain or "images"


def _check_free(file: Path, said: str, force: bool) -> None:
    from cluster.storage import is_remote

    if is_remote(said) or not file.name:
        rule = "is in an object store" if file.name else "names no file"
        raise RunError("--out", said, rule, "give a local file, such as birds.yaml")
    if file.is_dir():
        raise RunError("--out", str(file), "is a folder", "give a file")
    if file.exists() and not force:
        raise RunError("--out", str(file), "exists already", "give another --out, or --force to write over it")
    if not file.absolute().parent.is_dir():
        raise RunError("--out", str(file), "is in no folder that exists", "make the folder")
    if not os.access(file.absolute().parent, os.W_OK):
        raise RunError("--out", str(file), "is in a folder that cannot be written", "give another one")


def _check_classes(source: "ImageSource", labeled: "Look", test: "Look | None", test_uri: str | None) -> None:
    """Refuses what no run could begin with."""
    root = source.reader.root
    empty = [name for name in source.reader.class_names or () if name not in labeled.per_class]
    if empty and labeled.whole:
        rule = (
            f"has no usable images of {len(empty):,} of its classes ({', '.join(shown(one, 40) for one in empty[:5])})"
        )
        raise SourceError("--labeled", root, rule, "add images of them, or remove their folders or names")
    if len(labeled.per_class) == 1:
        only = shown(next(iter(labeled.per_class)), 40)
        rule = f"has one class ({only}), and there is nothing to tell it from"
        raise SourceError("--labeled", root, rule, "add a folder of images of what it is not")
    most, needed = max(labeled.per_class.values()), 3 if test is None else 2
    if most < needed and labeled.whole:
        sets = "a test and a validation set" if test is None else "a validation set"
        fix = "add images, or give --test" if test is None else "add images"
        raise SourceError("--labeled", root, f"has {most} of each class, too few to hold out {sets}", fix)
    strange = [] if test is None else [one for one in test.per_class if one not in labeled.per_class]
    if strange and labeled.whole:
        few = ", ".join(shown(one, 40) for one in strange[:5])
        rule = f"has {len(strange):,} classes that --labeled does not have ({few})"
        raise SourceError("--test", test_uri, rule, "name its folders as those of --labeled")


def _findings(
    sources: "Mapping[str, ImageSource]", looks: "Mapping[str, Look]", ready: "Mapping[str, Ready]"
) -> "Findings":
    """All that was found, by option; refuses a pool that holds nothing new."""
    from pipeline.guide.findings import Findings, repeats
    from pipeline.guide.look import inside, machine

    labeled, pool, test = looks["--labeled"], looks["--unlabeled"], looks.get("--test")
    copies, root = repeats(labeled, test, pool), sources["--unlabeled"]
    if len(copies.pool) >= pool.images:
        rule = f"holds {pool.images:,} images, and all of them are copies of labeled or test images"
        raise SourceError("--unlabeled", root.reader.root, rule, "name images that have no labels")
    return Findings(
        labeled=labeled,
        unlabeled=pool,
        test=test,
        machine=machine(),
        copies=copies,
        teacher=ready.get("--teacher"),
        student=ready.get("--student"),
        inside=tuple(option for option, one in sources.items() if option != "--unlabeled" and inside(root, one)),
    )


@contextmanager
def _by_option(option: str, spec: str | None) -> Iterator[None]:
    """Has mistakes about a model told by the option that names it."""
    try:
        yield
    except (ModelError, StorageError) as error:
        raise ModelError(option, spec, error.rule, error.fix) from None


def _ready(option: str, spec: str, labeled: "Look", folder: str) -> "tuple[Ready, str]":
    """A model that is given, and its model directory, which is made in `folder` where a library has it.

    Raises:
        ModelError: it cannot be used.
    """
    from cluster.storage import absolute
    from models.card import read_card
    from models.config import LIBRARIES
    from models.sources import SourceSpec, is_spec, obtain
    from pipeline.guide.decide import CPU_SIZE
    from pipeline.guide.findings import Ready
    from pipeline.guide.timing import takes

    library = spec.partition(":")[0] if is_spec(spec) else ""
    place = folder if library else absolute(spec)
    with _by_option(option, spec):
        named = bool(library) and (library == "open_clip" or library not in LIBRARIES)  # it has no classes of its own
        names = tuple(labeled.per_class) if named else ()
        card = obtain(SourceSpec(spec, class_names=names), place, option) if library else read_card(place)
        resizable = card.model.transform.size <= CPU_SIZE or takes(place, CPU_SIZE)
    known = () if named else tuple(card.class_names)
    return Ready(spec, card.model, card.parameters, library, known, resizable), place


def _write(file: Path, text: str, copies: Path, excluded: "Sequence[Place]") -> None:
    """The recipe, and beside it the images that are never selected, where there are some; nothing where no run could read it."""
    from cluster import storage
    from pipeline.recipe.reading import load_text

    load_text("--out", str(file), text.encode())
    try:
        if excluded:
            storage.publish(str(copies.absolute()), _table_of(excluded))
        storage.publish(str(file.absolute()), text.encode())
    except StorageError as error:
        raise StorageError("--out", str(file), error.rule, error.fix) from None


def _table_of(excluded: "Sequence[Place]") -> bytes:
    """A list to leave out, as `select.exclude` reads it: a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "shard": [one.shard for one in excluded],
        "index": pa.array([one.index for one in excluded], pa.uint32()),
        "file": [one.shown for one in excluded],
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _print(found: "Findings", plan: "Plan", seconds: "Mapping[str, float]", notes: "Sequence[str]") -> None:
    from rich.markup import escape

    from pipeline.cli.tables import table
    from pipeline.guide import writing

    for line in writing.found_lines(found):
        out.print(line, markup=False)
    decided = table("", "decided", "", "because")
    for column in decided.columns:
        column.justify = "left"
    for cells in writing.decided_lines(plan, found):
        decided.add_row(*map(escape, cells))
    out.print(decided)
    for note in notes:
        out.print(one_line(f"warning: {note}"), markup=False)
    out.print(writing.time_line(seconds, found), markup=False)
