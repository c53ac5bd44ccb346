"""The command line, `tophat`.

Loads nothing heavy: each command imports what it needs, so that help and a mistyped option answer at once.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cluster.errors import InputError, Interrupted, RunError, SourceError, TophatError, one_line

if TYPE_CHECKING:
    from cluster.session import Session
    from pipeline.recipe import Recipe
    from pipeline.sources import ImageSource
    from pipeline.store import Finished, RunStore

app = typer.Typer(
    name="tophat",
    help="Semi-supervised image classification: a teacher labels a huge unlabeled pool, a student learns from the best of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe: demo, fashion-mnist, paper.")
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


@app.command()
def demo(
    run_dir: Annotated[str, typer.Option("--run-dir", metavar="URI", help="Where the run is written.")] = "runs/demo",
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="Where the images are put.")] = "data/digits",
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """The whole method on real images that come with an ordinary package; minutes on two cores."""
    from pipeline.datasets import make
    from pipeline.recipe import load

    fields = {f"labeled.{name}.uri": name for name in ("train", "validation", "test")} | {"unlabeled.uri": "unlabeled"}
    places = [f"{field}={json.dumps(f'{data}/{name}')}" for field, name in fields.items()]  # quoted, as YAML wants it
    recipe = load("demo", [*places, *(sets or [])])
    made = make("digits", data)
    counts = ", ".join(f"{count:,} {name}" for name, count in made.counts.items())
    out.print(f"{'Made' if made.fresh else 'Found'} {made.uri}: {counts}", markup=False)
    _run(recipe, run_dir, None, verbose)


@app.command()
def run(
    recipe: RecipeArgument, run_dir: RunDir = None, sets: Sets = None, until: Until = None, verbose: Verbose = False
) -> None:
    """Run a recipe. Finished stages are kept; what a changed field affects is done again."""
    from pipeline.recipe import load

    loaded = load(recipe, sets or [])
    _run(loaded, run_dir or f"runs/{loaded.name}", until, verbose)


def _run(recipe: "Recipe", run_dir: str, until: str | None, verbose: bool) -> None:
    from cluster import storage
    from cluster.progress import Display
    from cluster.resources import check, cluster_shape
    from cluster.session import Session
    from pipeline import summary
    from pipeline.run import changed_sources, demands, open_sources
    from pipeline.run import run as run_pipeline
    from pipeline.stages import Run
    from pipeline.store import RunStore

    _check_until(recipe, until)
    store = RunStore(storage.absolute(run_dir))
    sources = open_sources(recipe, store)
    store.claim(recipe.name, recipe.to_yaml())
    with Session(recipe.cluster, on_start=lambda: check(demands(recipe), cluster_shape()), verbose=verbose) as session:
        this = Run(recipe, store, session, Display(out), sources)
        done = run_pipeline(this, until)
    for name in changed_sources(this, done):
        out.print(
            f"note: {name} has changed since this run listed it; the run keeps what it listed. A new --run-dir takes the new."
        )
    index = storage.join(store.uri, "report", "index.html")
    if any(stage.fresh for stage in done.values()) or not storage.exists(index):
        index = summary.write_run_report(recipe, store, done)
    summary.print_stages(out, done)
    summary.print_closing(out, done)
    if "gallery" in done:
        out.print(f"gallery: {storage.join(done['gallery'].uri, 'index.html')}", markup=False)
    out.print(f"report: {index}", markup=False)


def _check_until(recipe: "Recipe", until: str | None) -> None:
    from pipeline.run import stages_of

    if until is not None and until not in stages_of(recipe):
        raise InputError("--until", until, "is not a stage", f"use one of {', '.join(stages_of(recipe))}")


@app.command()
def estimate(
    recipe: RecipeArgument,
    run_dir: RunDir = None,
    sets: Sets = None,
    images: Annotated[int, typer.Option("--images", min=1, help="In the sample that is scored.")] = 1000,
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, help="When the sample ends at the latest.")] = 120.0,
    deadline: Annotated[
        float | None, typer.Option("--deadline", metavar="HOURS", min=0.001, help="Say how many nodes it takes.")
    ] = None,
    cluster_file: Annotated[
        str | None, typer.Option("--cluster-file", metavar="FILE", help="A file for `ray up`: its types of nodes.")
    ] = None,
    prices: Annotated[
        list[str] | None,
        typer.Option("--price", metavar="TYPE=PRICE", help="Of a node for an hour, by its type or `here`. Repeatable."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Score a small sample of U, and say what scoring all of it takes: images/s, hours, bytes, nodes, cost."""
    from cluster.progress import Display
    from pipeline import summary
    from pipeline.estimate import forecast
    from pipeline.recipe import load

    loaded = load(recipe, sets or [])
    found = forecast(
        loaded,
        run_dir or f"runs/{loaded.name}",
        Display(out),
        images=images,
        seconds=seconds,
        deadline=deadline,
        prices=prices or (),
        cluster_file=cluster_file,
        verbose=verbose,
    )
    summary.print_forecast(out, loaded.name, found)
    if loaded.deduplicate.second_pass:
        out.print(f"Not counted: the pass over U for deduplicate.model = {loaded.deduplicate.model}.", markup=False)


@app.command()
def ingest(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder of images or shards, or a known data set: digits, fashion-mnist."
        ),
    ],
    to: Annotated[str, typer.Option("--out", metavar="URI", help="An empty or new folder.")],
    layout: Annotated[str, typer.Option(help="Of the shards: webdataset or parquet.")] = "webdataset",
    images_per_shard: Annotated[int, typer.Option(min=1, help="Images in one shard.")] = 1000,
    origin: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="Where a known data set's files are.")
    ] = None,
    train_per_class: Annotated[
        int | None, typer.Option(min=1, help="Known data sets: labeled images of each class.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffle and the split.")] = 0,
) -> None:
    """Turn images into shards, so that plain files can be used as a source."""
    from cluster.progress import Display
    from pipeline import datasets
    from pipeline.ingest import ingest as ingest_source

    lost: tuple[tuple[str, str], ...] = ()
    display = Display(out, here=True)
    if source in datasets.NAMES:
        with display.task("ingest", None) as progress:
            made = datasets.make(
                source, to, origin=origin, train_per_class=train_per_class, seed=seed, progress=progress
            )
        table = _pairs(f"{'Made' if made.fresh else 'Found'} {made.uri}", made.counts)
    else:
        if layout not in ("webdataset", "parquet"):
            raise InputError("--layout", layout, "is not a layout of shards", "use webdataset or parquet")
        found = _open("SOURCE", source)
        with display.task("ingest", None) as progress:
            written = ingest_source(
                found,
                to,
                layout=layout,  # type: ignore[arg-type]
                images_per_shard=images_per_shard,
                seed=seed,
                progress=progress,
            )
        counts: dict[str, Any] = {
            "images": written.images,
            "labeled": written.labeled,
            "shards": written.shards,
            "bytes": written.bytes,
        }
        table = _pairs(f"{'Made' if written.fresh else 'Found'} {written.uri}", counts)
        lost = written.unreadable
    out.print(table)
    for shard, reason in lost:
        out.print(one_line(f"not read to its end: {shard}: {reason}"), markup=False)


def _pairs(title: str, values: dict[str, Any]) -> Any:
    from pipeline.summary import table

    made = table(title, "", "count")
    for name, value in values.items():
        made.add_row(name, f"{value:,}")
    return made


def _open(field: str, uri: str) -> "ImageSource":
    from pipeline import recipe
    from pipeline.sources import open_source

    return open_source(field, recipe.Source(uri=uri))


def _session(address: str, verbose: bool, on_start: Callable[[], None] | None = None) -> "Session":
    from cluster.config import Cluster
    from cluster.session import Session

    return Session(Cluster(address=address), on_start=on_start, verbose=verbose)


Address = Annotated[str, typer.Option("--address", help="`local`, or a running Ray cluster's address.")]
Model = Annotated[str, typer.Option("--model", metavar="DIR", help="A model directory.")]


@app.command()
def score(
    model: Model,
    source: Annotated[str, typer.Option("--source", metavar="URI", help="Images, in any layout.")],
    to: Annotated[
        str, typer.Option("--out", metavar="URI", help="Folder of the score table; rejects go to its _rejects.")
    ],
    classes_per_image: ClassesPerImage = None,
    sets: Sets = None,
    address: Address = "local",
    verbose: Verbose = False,
) -> None:
    """Score a source with a model: P classes for each image. Run again to go on where it stopped."""
    from cluster import storage
    from cluster.progress import Display
    from models.card import read_card
    from pipeline import scoring
    from pipeline.recipe import score_settings
    from pipeline.rejects import REJECTS

    classes = len(read_card(model).class_names)
    settings = score_settings(sets or [], classes_per_image, classes)
    images = _open("--source", source)
    target = storage.absolute(to)
    scoring.claim("--out", target, storage.absolute(model), images, settings)
    with _session(address, verbose, on_start=lambda: scoring.check_cluster(settings)) as session:
        session.start()
        with Display(out).task("scores", None) as progress:
            rejects = storage.join(target, REJECTS)
            scored = scoring.score(images, storage.absolute(model), target, rejects, settings, progress)
    counts = {
        "images listed": scored.listed,
        "scored": scored.scored,
        "rejected": scored.rejected,
        "unreadable shards": scored.unreadable_shards,
    }
    counts |= {f"  {reason}": count for reason, count in scored.rejects.items()}
    out.print(_pairs(f"Score table {scored.uri}", counts))
    out.print(f"images: {scored.listed:,} listed = {scored.scored:,} scored + {scored.rejected:,} rejected")


@app.command()
def select(
    scores: Annotated[str, typer.Option("--scores", metavar="URI", help="A score table: a folder of Parquet files.")],
    to: Annotated[
        str, typer.Option("--out", metavar="URI", help="Folder of the selection (of several, their folders).")
    ],
    images_per_class: Annotated[list[int], typer.Option("--images-per-class", metavar="K", min=1, help="Repeatable.")],
    classes_per_image: Annotated[
        list[int] | None, typer.Option("--classes-per-image", metavar="P", min=1, help="Repeatable; by default all.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option("--min-score", help="Candidates below it are never selected.")
    ] = None,
    zipf_exponent: Annotated[
        float | None, typer.Option("--zipf-exponent", metavar="S", min=0.0, help="Quotas by Zipf's law, K their mean.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="URI", help="Parquet: shard, index of images to leave out.")
    ] = None,
    tags: Annotated[
        bool, typer.Option("--tags", help="The table has tags and no scores: select at random among them.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --tags and --zipf-exponent.")] = 0,
    memory_mib: Annotated[int, typer.Option("--memory-mib", min=64, help="For each scanning task.")] = 2048,
    address: Address = "local",
    verbose: Verbose = False,
) -> None:
    """Select the K best-scored images of each class out of any score table.

    Several K or P make a selection of each pair, in one pass over the scores, in folders named by them, P10-K16000.
    """
    from dataclasses import asdict

    from cluster import storage
    from cluster.progress import Display
    from pipeline import selection, summary

    ps: list[int | None] = list(classes_per_image) if classes_per_image else [None]
    pairs = [(p, k) for p in dict.fromkeys(ps) for k in dict.fromkeys(images_per_class)]
    wanted = [selection.Wanted(to if len(pairs) == 1 else storage.join(to, f"P{p or ''}-K{k}"), k, p) for p, k in pairs]
    with _session(address, verbose) as session:
        session.start()
        with Display(out).task("selection", None) as progress:
            selected = selection.select_several(
                storage.absolute(scores),
                wanted,
                zipf_exponent=zipf_exponent,
                min_score=min_score,
                exclude=exclude or (),
                tags=tags,
                seed=seed,
                memory_mib=memory_mib,
                progress=progress,
            )
    if len(selected) == 1:
        summary.print_selection(out, asdict(selected[0]))
    else:
        summary.print_selections(out, [asdict(one) for one in selected])
    for one in selected:
        out.print(f"selection: {one.uri}", markup=False)


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
    from pipeline import deduplication

    if source is None:
        if decisions is None:
            raise InputError("--source", "nothing", "must be given", "add --source URI, or --decisions FILE to decide")
        if against or model or scores or copies or sets or nearest is not None or within is not None:
            rule = "must be given with the other options"
            raise InputError("--source", "nothing", rule, "add it, or give --out and --decisions alone")
        done = deduplication.decide(to, decisions)
    else:
        from cluster import storage
        from cluster.progress import Display
        from pipeline.recipe import deduplicate_settings
        from pipeline.store import RunStore

        options = {"nearest": nearest, "within": within, "copies": copies, "decisions": decisions, "model": model}
        settings, score = deduplicate_settings(sets or [], **options)
        store = RunStore(storage.absolute(to))
        subject = deduplication.prepare(store, _open("--source", source), against or [], settings, scores)
        with _session(address, verbose) as session:
            done = deduplication.find(store, subject, settings, score, session.start, Display(out))
    title = f"Left out of U: {done['excluded'].uri}"
    counts = {"near-duplicates": done["excluded"].outputs["near"], "copies": done["excluded"].outputs["copies"]}
    out.print(_pairs(title, counts | {"decided in the review": done["excluded"].outputs["decided"]}))
    if "pairs" in done:
        found = done["pairs"].outputs
        out.print(f"compared: {found['images']:,} images of U with {found['labeled']:,}; {found['pairs']:,} pairs kept")
        out.print(f"review: {found['review']}", markup=False)


@app.command()
def evaluate(
    model: Model,
    source: Annotated[str, typer.Option("--source", metavar="URI", help="Labeled images.")],
    address: Address = "local",
    verbose: Verbose = False,
) -> None:
    """Measure a model's top-1 and top-5 on labeled images."""
    from cluster import storage
    from cluster.progress import Display
    from models.card import read_card
    from pipeline import evaluation, labeled, summary, text

    names = read_card(model).class_names
    images = _open("--source", source)
    with _session(address, verbose) as session:
        session.start()
        display = Display(out)
        with display.task("reading", None) as progress:
            found = labeled.survey(images, progress)
        labels = labeled.number_labels("--source", found, names, complete=False)
        data = labeled.training_set(images, labels, names)
        if not data.images:
            raise SourceError("--source", source, "holds no image that can be used", "look at the files")
        with display.task("evaluation", data.images) as progress:
            metrics = evaluation.evaluate({"model": storage.absolute(model)}, data, progress)["model"]
    table = summary.table("Evaluation", "images", "rejected", "top-1", "top-5", "loss")
    top = [text.percent(metrics[name]) for name in ("top1", "top5")]
    table.add_row(f"{data.images:,}", f"{len(found.rejects):,}", *top, f"{metrics['loss']:.4f}")
    out.print(table)


@app.command()
def status(run_dir: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """What of a run is finished."""
    from cluster import storage
    from pipeline import deduplication, summary
    from pipeline.run import stages_with
    from pipeline.store import RunStore

    store = RunStore(storage.absolute(run_dir))
    if not storage.exists(storage.join(store.uri, "run.json")):
        raise RunError("RUN", run_dir, "is not a run directory", "give the --run-dir of a `tophat run`")
    names = stages_with(name for name in deduplication.STAGES if store.started(name))
    found = {name: stage for name in names if (stage := store.finished(name)) is not None}
    done = {name: stage for name, stage in found.items() if store.current(stage)}
    table = summary.table(f"Run {run_dir}", "stage", "state", "seconds", "images")
    for name in names:
        stage = done.get(name)
        images = stage.outputs.get("images") if stage else None
        state = "done" if stage else "out of date" if name in found else _unfinished(store, name, done.get("unlabeled"))
        table.add_row(
            name, state, f"{stage.seconds:,.1f}" if stage else "", f"{images:,}" if images is not None else ""
        )
    out.print(table)
    summary.print_closing(out, done)


def _unfinished(store: "RunStore", name: str, unlabeled: "Finished | None") -> str:
    from pipeline.ranges import complete, ledger

    if not store.started(name):
        return "not started"
    if name == "scores" and unlabeled is not None:
        scored = ledger(store.place(name)).values()
        shards = sum(ranges[-1].shards for ranges in scored if complete(ranges))
        total = unlabeled.outputs["shards"]
        return f"started: {min(shards, total):,} of {total:,} shards"
    return "started"


@app.command()
def submit(
    recipe: RecipeArgument,
    address: Annotated[str, typer.Option("--address", metavar="URL", help="The Job API: http://127.0.0.1:8265.")],
    run_dir: RunDir = None,
    sets: Sets = None,
    until: Until = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the log until the job ends, and exit as it does.")
    ] = False,
) -> None:
    """Run a recipe on a cluster, through Ray's Job API. The token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token."""
    from cluster import jobs
    from cluster.session import ROOT
    from pipeline.recipe import load, shipped

    loaded = load(recipe, sets or [])
    _check_until(loaded, until)
    where = recipe if recipe in shipped() else jobs.path_in_job("RECIPE", recipe, ROOT)
    words = ["python", "-m", "pipeline", "run", where, *(["--run-dir", run_dir] if run_dir else [])]
    words += [word for item in sets or [] for word in ("--set", item)] + (["--until", until] if until else [])
    job = jobs.submit(words, address=address, working_dir=ROOT, metadata={"recipe": loaded.name})
    out.print(f"job: {job}", markup=False)
    if follow:
        raise typer.Exit(jobs.follow(job, address=address))


def main() -> None:
    """Runs the command line: exit code 0 on success, 2 for a user's mistake, 1 for a failure, 130 when interrupted."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        _fail(str(error), 2)
    except Interrupted as error:
        _fail(str(error), 130)
    except TophatError as error:
        _fail(one_line(str(error)), 1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
