"""Commands about what of U is taken: select, duplicates."""

from functools import partial
from typing import Annotated

import typer

from cluster.errors import InputError, StageError, shown
from pipeline.cli.app import (
    Address,
    ImageColumn,
    Layout,
    Verbose,
    app,
    in_options,
    listed,
    out,
    pairs,
    ray_session,
    source_of,
)


@app.command()
def select(
    scores: Annotated[
        str, typer.Option("--scores", metavar="URI", help="The --out of tophat score, or any folder of score files.")
    ],
    to: Annotated[
        str, typer.Option("--out", metavar="URI", help="Folder of the selection (of several, their folders).")
    ],
    images_per_class: Annotated[list[int], typer.Option("--images-per-class", metavar="K", help="Repeatable.")],
    classes_per_image: Annotated[
        list[int] | None, typer.Option("--classes-per-image", metavar="P", min=1, help="Repeatable; by default all.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option("--min-score", help="Candidates below it are never selected.")
    ] = None,
    zipf_exponent: Annotated[
        float | None, typer.Option("--zipf-exponent", metavar="S", help="Quotas by Zipf's law, K their mean.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="URI", help="Parquet: shard, index of images to leave out.")
    ] = None,
    tags: Annotated[
        bool, typer.Option("--tags", help="The table has tags and no scores: select at random among them.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of --tags and --zipf-exponent.")] = 0,
    gallery: Annotated[
        str | None,
        typer.Option("--gallery", metavar="URI", help="Folder for pages that show each class at chosen ranks."),
    ] = None,
    memory_mib: Annotated[int, typer.Option("--memory-mib", min=64, help="For each scanning task.")] = 2048,
    address: Address = "local",
    verbose: Verbose = False,
) -> None:
    """Select the K best-scored images of each class out of any score table.

    Several K or P make a selection of each pair, in one pass over the scores, in folders named by them, P10-K16000. Where the images are files
    of their own, _files.csv beside a selection names them.
    """
    from cluster import storage
    from cluster.progress import Display
    from cluster.store import Outside
    from pipeline.cli import tables
    from pipeline.recipe.reading import select_settings
    from pipeline.report import preview
    from pipeline.scoring import beside
    from pipeline.selection import record as selection_record
    from pipeline.selection import select as selection

    ps: list[int | None] = list(classes_per_image) if classes_per_image else [None]
    pairs = [(p, k) for p in dict.fromkeys(ps) for k in dict.fromkeys(images_per_class)]
    each = [
        select_settings(
            images_per_class=k,
            classes_per_image=p,
            zipf_exponent=zipf_exponent,
            min_score=min_score,
            exclude=exclude,
            tags=scores if tags else None,
            memory_mib=memory_mib,
        )
        for p, k in pairs
    ]
    settings = each[0]
    places = ["" if len(pairs) == 1 else f"P{p or ''}-K{k}" for p, k in pairs]
    wanted = [selection.Wanted(storage.join(to, at), k, p) for at, (p, k) in zip(places, pairs, strict=True)]
    with in_options("--scores"):
        found = beside.find(scores)
        record, source = found.record(), found.listing()
    selection_record.check_folder("--out", storage.absolute(to))
    if gallery is not None:
        if source is None:
            rule = "cannot be made: no listing of the images lies beside these scores"
            raise InputError("--gallery", gallery, rule, "score with `tophat score`, or leave it out")
        source.check_outside("--gallery", gallery)
        preview.check_gallery("--gallery", storage.absolute(gallery))
    given = [("--scores", found.table), *(("--exclude", uri) for uri in settings.exclude)]
    with in_options("--scores", "classes_per_image"), ray_session(address, verbose) as session:
        read = [Outside.at(name, uri, partial(selection.listing, name, uri)) for name, uri in given]
        session.start()
        with Display(out).task("selection", None) as progress:
            selected = selection.select_several(
                found.table,
                wanted,
                zipf_exponent=zipf_exponent,
                min_score=min_score,
                exclude=settings.exclude,
                tags=tags,
                seed=seed,
                memory_mib=memory_mib,
                progress=progress,
            )
        for outside in read:
            if (uri := outside.changed()) is not None:
                rule = "has changed while images were selected: run the same command again"
                raise StageError(f"{outside.name} = {shown(uri)}: {rule}")
        names = record.classes if record is not None and len(record.classes) == selected[0].num_classes else None
        files = [
            selection_record.publish(one, how.deciding(), names, source)
            for one, how in zip(selected, each, strict=True)
        ]
        galleries = [] if gallery is None else [storage.join(storage.absolute(gallery), at) for at in places]
        for one, folder in zip(selected, galleries, strict=False):
            assert source is not None
            with Display(out).task("gallery", None) as progress:
                title = f"{scores}, K = {one.images_per_class}"
                preview.show_selection(folder, one, source, names, title=title, progress=progress)
    if len(selected) == 1:
        tables.print_selection(out, selected[0], names)
    else:
        tables.print_selections(out, selected, names)
    for one, listed_files in zip(selected, files, strict=True):
        out.print(f"selection: {one.uri}", markup=False)
        if listed_files is not None and source is not None:
            out.print(f"files: {listed_files} (below {shown(source.reader.root)})", markup=False)
    for folder in galleries:
        out.print(f"gallery: {storage.join(folder, 'index.html')}", markup=False)


@app.command()
def duplicates(
    to: Annotated[str, typer.Option("--out", metavar="URI", help="Folder of the pairs, the review and the list.")],
    source: Annotated[str | None, typer.Option("--source", metavar="URI", help="U: images, in any layout.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="URI", help="Labeled images that must not be in U. Repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="Whose features are compared; by default torchvision's ResNet-18, downloaded.",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option("--scores", metavar="URI", help="U's score table by that model, made with score.embedding."),
    ] = None,
    nearest: Annotated[int | None, typer.Option("--nearest", metavar="N", help="Leave out the N nearest.")] = None,
    within: Annotated[
        float | None, typer.Option("--within", metavar="D", help="Leave out what is at most so far.")
    ] = None,
    copies: Annotated[bool, typer.Option("--copies", help="Leave out all but the first of equal files in U.")] = False,
    decisions: Annotated[
        str | None, typer.Option("--decisions", metavar="FILE", help="What the review page saved.")
    ] = None,
    layout: Layout = "auto",
    image_column: ImageColumn = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of deduplicate, or score.FIELD. Repeatable."),
    ] = None,
    address: Address = "local",
    verbose: Verbose = False,
) -> None:
    """Find images of U that are near-duplicates of evaluation images, or copies; review them; list what to leave out.

    First with --source and --against; then look at the review page, and give its file: --out URI --decisions FILE.
    """
    from cluster import storage
    from cluster.progress import Display
    from cluster.store import RunStore
    from pipeline.context import Run, Sources
    from pipeline.duplicates import exclude as deduplication
    from pipeline.recipe.reading import deduplicate_settings

    store = RunStore(storage.absolute(to))
    with ray_session(address, verbose) as session:
        this = Run(deduplication.CLAIM, "", store, Sources({}), session, Display(out))
        if source is None:
            if decisions is None:
                fix = "add --source URI, or --decisions FILE to decide"
                raise InputError("--source", "nothing", "must be given", fix)
            if against or model or scores or copies or sets or nearest is not None or within is not None:
                rule = "must be given with the other options"
                raise InputError("--source", "nothing", rule, "add it, or give --out and --decisions alone")
            excluded = deduplication.decide(this, decisions)
        else:
            options = {"nearest": nearest, "within": within, "copies": copies, "decisions": decisions, "model": model}
            settings, score = deduplicate_settings(sets or [], **options)
            with in_options("--against"), in_options("--source", "within"):
                unlabeled = listed("--source", source_of("--source", source, layout, image_column))
                unlabeled.check_outside("--out", to)
                labeled = [source_of("--against", uri, layout, image_column) for uri in against or ()]
                subject = deduplication.prepare(store, unlabeled, labeled, settings, scores)
                excluded = deduplication.find(this, subject, settings, score)
    counts = {"near-duplicates": excluded.outputs.near, "copies": excluded.outputs.copies}
    out.print(pairs(f"Left out of U: {excluded.uri}", counts | {"decided in the review": excluded.outputs.decided}))
    if "pairs" in this.made:
        found: deduplication.Pairs = this.made["pairs"].outputs
        out.print(f"compared: {found.images:,} images of U with {found.labeled:,}; {found.pairs:,} pairs kept")
        out.print(f"review: {found.review}", markup=False)
