"""Commands about a run of a recipe: demo, run, status, prune, estimate, submit."""

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize

from cluster.errors import InputError, RecipeError, RunError
from pipeline.cli.app import RecipeArgument, RunDir, Sets, Until, Verbose, app, out

if TYPE_CHECKING:
    from cluster.store import Key, RunStore
    from pipeline.context import Run
    from pipeline.recipe.sections import Recipe


@app.command()
def demo(
    run_dir: Annotated[str, typer.Option("--run-dir", metavar="URI", help="Where the run is written.")] = "runs/demo",
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="Where the images are put.")] = "data/digits",
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """The whole method on real images that come with an ordinary package; minutes on two cores."""
    from pipeline.data.known import make
    from pipeline.recipe.reading import load

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
    from pipeline.recipe.reading import load

    loaded = load(recipe, sets or [])
    _run(loaded, run_dir or f"runs/{loaded.name}", until, verbose)


def _run(recipe: "Recipe", run_dir: str, until: str | None, verbose: bool) -> None:
    from cluster import storage
    from cluster.progress import Display
    from cluster.resources import check, cluster_shape
    from cluster.session import Session
    from cluster.store import RunStore
    from pipeline.advice import advise
    from pipeline.cli import tables
    from pipeline.content import write_run_report
    from pipeline.context import Reached, Run, rounds_of
    from pipeline.duplicates import exclude as deduplication
    from pipeline.plan import check_networks, demands, plan, sources_of, until_stage
    from pipeline.ready import made_early
    from pipeline.run import run as run_pipeline

    store, sources = RunStore(storage.absolute(run_dir)), sources_of(recipe)
    sources.check(store)
    tables.print_warnings(out, sources.listed())
    whole = plan(recipe, store)
    planned = until_stage(whole.planned, until)
    check_networks(recipe, whole.planned, sources)
    if not store.claim(recipe.name, recipe.to_yaml()):
        out.print(
            f"note: the store of {store.uri} does not honor conditional writes: "
            "two runs at once in this directory may do the same work twice",
            markup=False,
        )
    needed = demands(whole.planned)
    ray = Session(recipe.cluster, on_start=lambda: check(needed, cluster_shape()), verbose=verbose)
    with store.in_use(), ray as session:
        this = Run(recipe.name, recipe.to_yaml(), store, sources, session, Display(out), until).after(whole)
        if any(one.made.key.stage == "embeddings" for one in planned):
            # Hours before it is needed: what is wrong with it can be mended now.
            deduplication.features_model(this, "deduplicate.model", recipe.deduplicate)
        with suppress(Reached):
            made_early(this, recipe)
            run_pipeline(this, recipe)
        stages, everything = dict(this.made), this.stages()
        write_run_report(this)
        this.name_result()
    for name in _changed(this):
        out.print(
            f"note: {name} has changed since this run listed it; the run keeps what it listed. A new --run-dir takes the new."
        )
    tables.print_stages(out, stages)
    tables.print_closing(out, everything)
    for one in advise(everything):
        out.print(f"next: {one}", markup=False, highlight=False)
    tables.print_passed_over(out, sources.listed())
    for name in (*(f"{prefix}gallery" for prefix in rounds_of(everything)), "report"):
        if name in this.stages():
            folder = this.stages()[name].uri if storage.is_remote(store.uri) else storage.join(store.uri, name)
            out.print(f"{name}: {storage.join(folder, 'index.html')}", markup=False)


def _changed(this: "Run") -> list[str]:
    """The sources that are not what they were when the run listed them; it goes on with what it listed."""
    from pipeline.stages import images_of

    names = {
        "labeled-train": "labeled.train",
        "labeled-validation": "labeled.validation",
        "labeled-test": "labeled.test",
    }
    names["unlabeled"] = "unlabeled"
    return [
        source
        for name, source in names.items()
        if name in this.made and this.made[name].outputs.source != this.sources[source].fingerprint()
    ] + [
        "teacher.weak.images"
        for name, made in this.made.items()
        if name.endswith("weak-tags")
        and images_of(made).fingerprint() != this.sources["teacher.weak.images"].fingerprint()
    ]


def _own_plan(store: "RunStore") -> "Run":
    """The plan of a run's own recipe.

    Raises:
        RunError: it is no run of a recipe.
        InputError: the recipe, or what it names, cannot be used here.
    """
    from cluster import storage
    from cluster.store import RECIPE
    from pipeline.plan import plan
    from pipeline.recipe.reading import load_text

    text = store.recipe()
    if not text:
        raise RunError("RUN", store.uri, "holds no recipe", "give the --run-dir of a `tophat run`")
    return plan(load_text("RUN", storage.join(store.uri, RECIPE), text), store)


@app.command()
def status(run_dir: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """What of a run is finished, and where it is."""
    from rich.markup import escape

    from cluster import storage
    from cluster.store import STORE, RunStore
    from pipeline.cli import tables

    store = RunStore(storage.absolute(run_dir))
    named, planned = store.result(), []
    try:
        planned = _own_plan(store).planned
    except InputError as error:
        out.print(f"note: what is still to be done cannot be told: {error}", markup=False)
    table = tables.table(f"Run {run_dir}", "stage", "state", "seconds", "images", "folder")
    done = {one.name: one.made for one in planned if one.made.record is not None}
    for one in planned:
        made = done.get(one.name)
        table.add_row(
            escape(one.name),
            "done" if made else escape(_unfinished(store, one.made.key, done)),
            f"{made.seconds:,.1f}" if made else "",
            f"{made.images:,}" if made and made.images is not None else "",
            escape(one.made.uri) if made else "",
        )
    for name in sorted(named.keys() - {one.name for one in planned}):
        table.add_row(escape(name), "done", "", "", escape(storage.join(store.uri, STORE, named[name])))
    out.print(table)
    tables.print_closing(out, done)


def _unfinished(store: "RunStore", key: "Key", done: "dict[str, Any]") -> str:
    from cluster import storage
    from cluster.store import STORE
    from pipeline.scoring.ledger import complete, ledger
    from pipeline.stages import TABLE

    if not store.begun(key):
        return "not started"
    holder = store.holder(key)
    state = "started" if holder is None else f"under way, by {holder}"
    if key.stage == "scores" and "unlabeled" in done:
        scored = ledger(storage.join(store.uri, STORE, key.folder, TABLE)).values()
        shards = sum(ranges[-1].shards for ranges in scored if complete(ranges))
        total = done["unlabeled"].outputs.shards
        return f"{state}: {min(shards, total):,} of {total:,} shards"
    return state


@app.command()
def prune(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
) -> None:
    """Show what of a run's store its result does not name, and its bytes; with --yes, remove it."""
    from rich.markup import escape

    from cluster import storage
    from cluster.store import RunStore
    from pipeline.cli.tables import table

    store = RunStore(storage.absolute(run_dir))
    # What the recipe's own stages have so far stays, made or not.
    unnamed = store.unnamed(_own_plan(store).folders if store.recipe() else ())
    if users := store.users():
        raise RunError("RUN", run_dir, f"is in use by {users[0]}", "wait until that ends")
    made = table(f"Not named by the result of {run_dir}", "folder", "bytes")
    for folder, size in unnamed.items():
        made.add_row(escape(folder), filesize.decimal(size))
    made.add_row(f"{len(unnamed):,} folders", filesize.decimal(sum(unnamed.values())))
    out.print(made)
    if yes:
        store.prune(unnamed)
        out.print(f"removed: {len(unnamed):,} folders")
    elif unnamed:
        out.print("Nothing is removed yet: --yes removes these folders.")


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
    from pipeline.cli import tables
    from pipeline.context import Sources
    from pipeline.recipe.reading import load
    from pipeline.scoring.forecast import forecast

    loaded = load(recipe, sets or [])
    if loaded.given is not None:
        value = loaded.score.table or loaded.select.selection
        raise RecipeError(loaded.given, value, "leaves nothing to score", "leave it out to estimate a scoring")
    where = run_dir or f"runs/{loaded.name}"
    source = Sources({"unlabeled": loaded.unlabeled})["unlabeled"]
    tables.print_warnings(out, {"unlabeled": source})
    found = forecast(
        loaded,
        source,
        where,
        Display(out),
        images=images,
        seconds=seconds,
        deadline=deadline,
        prices=prices or (),
        cluster_file=cluster_file,
        teacher=_teacher(loaded, where),
        verbose=verbose,
    )
    tables.print_forecast(out, loaded.name, found)
    if loaded.deduplicate.second_pass:
        out.print(f"Not counted: the pass over U for deduplicate.model = {loaded.deduplicate.model}.", markup=False)


def _teacher(recipe: "Recipe", run_dir: str) -> "tuple[str, str] | None":
    """The model directory of the run's teacher, as the recipe has it, and what it is, in words; None where there is none yet."""
    from cluster import storage
    from cluster.store import RunStore
    from pipeline.plan import plan

    planned = plan(recipe, RunStore(storage.absolute(run_dir))).planned
    first = "round-1/scores" if recipe.rounds > 1 else "scores"
    wanted = next(one.made.key.inputs["teacher"] for one in planned if one.name == first)
    teacher = next(one.made for one in planned if one.made.fingerprint == wanted)
    if teacher.record is not None:
        return teacher.uri, "the run's own"
    ready = None if recipe.taught is None else recipe.taught.ready
    return (storage.absolute(ready), "the ready one") if ready else None


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
    import secrets

    from cluster import jobs
    from cluster.session import ROOT
    from cluster.store import RunStore
    from pipeline.plan import plan, until_stage
    from pipeline.recipe.reading import load, shipped

    loaded = load(recipe, sets or [])
    if until is not None:
        nowhere = RunStore(f"/tophat-{secrets.token_hex(8)}")  # of what is made, the cluster knows more
        until_stage(plan(loaded, nowhere).planned, until)
    where = recipe if recipe in shipped() else jobs.path_in_job("RECIPE", recipe, ROOT)
    words = ["python", "-m", "pipeline", "run", where, *(["--run-dir", run_dir] if run_dir else [])]
    words += [word for item in sets or [] for word in ("--set", item)] + (["--until", until] if until else [])
    job = jobs.submit(words, address=address, working_dir=ROOT, metadata={"recipe": loaded.name})
    out.print(f"job: {job}", markup=False)
    if follow:
        raise typer.Exit(jobs.follow(job, address=address))
