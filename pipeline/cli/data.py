"""Commands about images: ingest and score."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import InputError, one_line
from pipeline.cli.app import (
    Address,
    ClassesPerImage,
    ImageColumn,
    LabelColumn,
    Labels,
    Layout,
    Model,
    Sets,
    Verbose,
    app,
    in_options,
    listed,
    out,
    pairs,
    ray_session,
    source_of,
)

if TYPE_CHECKING:
    from pipeline.data.sources import ImageSource


@app.command()
def ingest(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder of images or shards, or a known data set: digits, fashion-mnist, drawings."
        ),
    ],
    to: Annotated[str, typer.Option("--out", metavar="URI", help="An empty or new folder.")],
    written_as: Annotated[
        str, typer.Option("--as", metavar="LAYOUT", help="What is written: webdataset or parquet.")
    ] = "webdataset",
    images_per_shard: Annotated[int, typer.Option(min=1, max=10**9, help="Images in one shard.")] = 1000,
    layout: Layout = "auto",
    image_column: ImageColumn = None,
    label_column: LabelColumn = "label",
    labels: Labels = None,
    origin: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="Where a known data set's files are.")
    ] = None,
    train_per_class: Annotated[
        int | None, typer.Option(min=1, help="Known data sets: labeled images of each class.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffle and the split.")] = 0,
    resize: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=4096,
            help="Make the shorter side of larger images so many pixels; by default nothing is changed.",
        ),
    ] = None,
) -> None:
    """Turn images into shards, so that plain files can be used as a source."""
    from cluster.progress import Display
    from pipeline.cli.tables import print_passed_over
    from pipeline.data import known as datasets
    from pipeline.data.ingest import ingest as ingest_source

    lost: tuple[tuple[str, str], ...] = ()
    sources: dict[str, ImageSource] = {}
    licence: str | None = None
    display = Display(out, here=True)
    if source in datasets.NAMES:
        if resize is not None:
            raise InputError("--resize", resize, "is not for known data sets", "leave it out")
        with display.task("ingest", None) as progress:
            made = datasets.make(
                source, to, origin=origin, train_per_class=train_per_class, seed=seed, progress=progress
            )
        table = pairs(f"{'Made' if made.fresh else 'Found'} {made.uri}", made.counts)
        licence = made.licence
    else:
        for option, value in (("--from", origin), ("--train-per-class", train_per_class)):
            if value is not None:
                raise InputError(option, value, f"is for {' and '.join(datasets.NAMES)}", "leave it out")
        if written_as not in ("webdataset", "parquet"):
            raise InputError("--as", written_as, "is not a layout of shards", "use webdataset or parquet")
        found = listed("SOURCE", source_of("SOURCE", source, layout, image_column, label_column, labels), labeled=True)
        with in_options("SOURCE", out=to), display.task("ingest", None) as progress:
            written = ingest_source(
                found,
                to,
                layout=written_as,  # type: ignore[arg-type]
                images_per_shard=images_per_shard,
                seed=seed,
                resize=resize,
                progress=progress,
            )
        of_resizing = (
            {}
            if written.resized is None
            else {
                f"  resized to {resize} pixels": written.resized,
                "  kept as they were": written.images - written.resized - written.broken,
                **({"  kept, and cannot be decoded": written.broken} if written.broken else {}),
            }
        )
        counts: dict[str, Any] = {
            "images": written.images,
            **of_resizing,
            "labeled": written.labeled,
            **{f"left out: {reason}": count for reason, count in written.left_out.items()},
            "shards": written.shards,
            "bytes": written.bytes,
        }
        table = pairs(f"{'Made' if written.fresh else 'Found'} {written.uri}", counts)
        lost = written.unreadable
        sources["SOURCE"] = found
    out.print(table)
    if licence:
        out.print(f"licence: {licence}", markup=False)
    for shard, reason in lost:
        out.print(one_line(f"not read to its end: {shard}: {reason}"), markup=False)
    print_passed_over(out, sources)


@app.command()
def score(
    model: Model,
    source: Annotated[str, typer.Option("--source", metavar="URI", help="Images, in any layout.")],
    to: Annotated[
        str,
        typer.Option(
            "--out", metavar="URI", help="Folder of table/, the scores; rejects/ and listing.parquet beside it."
        ),
    ],
    classes_per_image: ClassesPerImage = None,
    layout: Layout = "auto",
    image_column: ImageColumn = None,
    label_column: LabelColumn = "label",
    sets: Sets = None,
    address: Address = "local",
    verbose: Verbose = False,
) -> None:
    """Score a source with a model: P classes for each image. Run again to go on where it stopped."""
    from cluster import storage
    from cluster.progress import Display
    from models.card import read_card
    from pipeline.cli.tables import print_passed_over, rejects_lines
    from pipeline.data.rejects import REJECTS
    from pipeline.recipe.reading import score_settings
    from pipeline.scoring import beside
    from pipeline.scoring import score as scoring

    with in_options("--source"):
        classes = len(read_card(model).class_names)
    settings = score_settings(sets or [], classes_per_image, classes)
    images = listed("--source", source_of("--source", source, layout, image_column, label_column))
    images.check_outside("--out", to)
    target = storage.absolute(to)
    beside.claim("--out", target, storage.absolute(model), images, settings)
    session = ray_session(address, verbose, on_start=lambda: scoring.check_cluster(settings))
    with in_options("--source", out=to), session:
        session.start()
        with Display(out).task("scores", None) as progress:
            table, rejects = storage.join(target, beside.TABLE), storage.join(target, REJECTS)
            scored = scoring.score(images, storage.absolute(model), table, rejects, settings, progress)
    counts = {
        "images listed": scored.listed,
        "scored": scored.scored,
        "rejected": scored.rejected,
        "unreadable shards": scored.unreadable_shards,
    }
    counts |= {f"  {reason}": count for reason, count in scored.rejects.items()}
    out.print(pairs(f"Score table {scored.uri}", counts))
    print_passed_over(out, {"--source": images})
    out.print(f"images: {scored.listed:,} listed = {scored.scored:,} scored + {scored.rejected:,} rejected")
    for line in rejects_lines(scored, rejects):
        out.print(line, markup=False)
