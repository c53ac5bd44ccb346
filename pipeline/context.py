"""A run under way: what every stage gets, and how it is done once."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import RunError
from cluster.lease import Holder
from cluster.progress import Display
from cluster.resources import Demand
from cluster.session import Session
from cluster.storage import absolute, is_remote, join, list_files
from cluster.store import Key, Made, Outside, RunStore, Watched
from pipeline.data.sources import ImageSource, open_source
from pipeline.recipe.images import Source

T = TypeVar("T")


Stages = Mapping[str, Made[Any]]
"""The stages of a run that are made, by name."""


BEGINS = ("scores", "selection")
"""The first stage of a round: its scores, or a selection that exists."""


def begun(stages: Stages) -> list[str]:
    """What the names of the stages of each pass from a teacher to a student begin with, of those that have begun."""
    names = (name.rpartition("/") for name in stages)
    return list(dict.fromkeys(f"{prefix}{slash}" for prefix, slash, name in names if name in BEGINS))


def rounds_of(stages: Stages) -> list[str]:
    """What the names of each round's stages begin with, of the rounds that have begun: "", or "round-1/", "round-2/", and so on."""
    return [prefix for prefix in begun(stages) if prefix == "" or prefix.startswith("round-")]


def teacher_of(stages: Stages) -> Made[Any] | None:
    """The teacher of the first round; None where it is not made yet. One that is taught by itself is the student of that."""
    return stages.get("self-training/student" if "self-training/teacher" in stages else "teacher")


def _real(uri: str) -> str:
    """A local path without links, of which its absolute form may have some; another URI as it is."""
    return uri if is_remote(uri) else os.path.realpath(uri)


def place_of(made: Made[Any], given: str, own: str = "") -> str:
    """Where a stage's files are: in its own folder, or where the input `given` is, where the stage only refers to that."""
    outside = made.key.inputs.get(given)
    return outside.uri if isinstance(outside, Outside) else join(made.uri, own)


def referred(made: Made[Any], given: str) -> tuple[Watched, ...]:
    """What a stage that reads another one's files watches, where that only refers to them."""
    outside = made.key.inputs.get(given)
    return (outside,) if isinstance(outside, Outside) else ()


class Reached(Exception):  # noqa: N818 - no error
    """The stage that a run was to end with is made."""


class Sources:
    """Sources of images by the recipe's fields, each listed once, when it is first asked for."""

    def __init__(self, given: Mapping[str, Source]) -> None:
        self._given = given
        self._found: dict[str, ImageSource] = {}

    def __getitem__(self, field: str) -> ImageSource:
        """Lists the source of a field.

        Raises:
            SourceError: it is missing or holds no images.
        """
        if field not in self._found:
            self._found[field] = open_source(field, self._given[field], labeled=field.startswith("labeled."))
        return self._found[field]

    def listed(self) -> Mapping[str, ImageSource]:
        """The sources that were asked for so far, by field."""
        return self._found

    def check(self, store: RunStore) -> None:
        """Lists every source, before any work depends on one.

        Raises:
            SourceError: one that is missing or holds no images.
            RunError: the run directory lies inside one, and would become a part of it.
        """
        if not is_remote(store.uri) and Path(store.uri).is_file():
            raise RunError("--run-dir", store.uri, "is a file", "give a folder")
        for name, source in self._given.items():
            if f"{_real(store.uri)}/".startswith(f"{join(_real(absolute(source.uri)))}/"):
                raise RunError("--run-dir", store.uri, f"lies inside {name}", "put it elsewhere")
        for name in self._given:
            self[name]


@dataclass(frozen=True)
class ListedFiles:
    """The files of a source, as they were listed: what a stage that reads them watches.

    Attributes:
        name: the source's field, for messages.
        listed: gives the listing.
    """

    name: str
    listed: Callable[[], ImageSource]
    fix = "put it back as it was, or give a new --run-dir to take what is there now"

    def changed(self) -> str | None:
        """The first file that is not what it was; files that came later are none of the source."""
        source = self.listed()
        if source.labels is not None and source.labels.changed():
            return source.labels.uri
        root = source.reader.root
        now = {file.path: file.etag for file in list_files(root)}
        for shard in source.listing:
            files = zip(shard.files, shard.etags, strict=True) if shard.etags else [(shard.name, shard.etag)]
            for path, etag in files:
                if now.get(path) != etag:
                    return join(root, path)
        return None


@dataclass(frozen=True)
class Planned:
    """A stage that a run comes to: its name in the run, what it makes, and what it needs at once."""

    name: str
    made: Made[Any]
    demand: Demand | None


@dataclass
class Run:
    """One run of a recipe, under way or only planned.

    Attributes:
        name: the recipe's.
        recipe: as YAML.
        store: its directory.
        sources: of the recipe.
        session: Ray, which starts with the first stage that has work to do.
        display: shows progress.
        until: the name of the stage that the run ends with; every stage when None.
        planning: whether stages are only listed: none works, and of those that are not made yet, nothing but the key is known.
        planned: every stage that the run has come to, in order.
        made: those of them that are made, by name.
        known: every stage of the recipe that was made before, also beyond `until`, by name and in order.
        folders: in the store, of every stage that the run has come to, made or not.
    """

    name: str
    recipe: str
    store: RunStore
    sources: Sources
    session: Session
    display: Display
    until: str | None = None
    planning: bool = False
    planned: list[Planned] = field(default_factory=list)
    made: dict[str, Made[Any]] = field(default_factory=dict)
    known: dict[str, Made[Any]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    _others: dict[str, Made[Any]] = field(default_factory=dict)
    _parts: dict[str, str] = field(default_factory=dict)
    _prefix: str = ""

    def once(
        self,
        key: Key,
        kind: type[T],
        work: Callable[[str], T],
        *,
        demand: Demand | None = None,
        parts: Mapping[str, str] | None = None,
        needs_ray: bool = True,
    ) -> Made[T]:
        """A stage: `RunStore.once`, with Ray running while `work` does.

        Args:
            key: what the stage depends on; its name in the run begins with those of `named`.
            kind: the type of what it says of its outputs.
            work: makes them in the folder that it gets. It alone may look at the outputs of other stages.
            demand: what it needs of the cluster at once.
            parts: of a stage whose folder holds several, their readable names and the folders within.
            needs_ray: whether `work` uses Ray.

        Raises:
            Reached: it was the last one wanted.
        """
        name = self.named_as(key.stage)

        def with_ray(place: str) -> T:
            if needs_ray:
                self.session.start()
            self.name_result()
            return work(place)

        def waits(holder: Holder) -> None:
            self.display.console.print(f"{name}: waits for {holder}, which is at it", markup=False, highlight=False)

        self.folders.add(key.folder)
        made = self.store.find(key, kind) if self.planning else self.store.once(key, kind, with_ray, waits)
        if made.record is not None:
            self.made[name] = made
            self._parts |= {self.named_as(part): join(key.folder, folder) for part, folder in (parts or {}).items()}
        if made.fresh:
            self.name_result()
        self.planned.append(Planned(name, made, demand))
        if name == self.until:
            raise Reached
        return made

    def reuse(self, name: str, kind: type[T]) -> Made[T] | None:
        """A stage of the run's result as it is now, whatever it depends on; None where there is none."""
        made = self.store.named(name, kind)
        if made is not None:
            self.made[name] = made
        return made

    def named_as(self, name: str) -> str:
        """A stage's name in the run, where it is now."""
        return f"{self._prefix}{name}"

    @contextmanager
    def named(self, prefix: str) -> Iterator[None]:
        """Has the names of the block's stages begin with `prefix/`; an empty one leaves them as they are."""
        before = self._prefix
        self._prefix = f"{before}{prefix}/" if prefix else before
        try:
            yield
        finally:
            self._prefix = before

    def call(self, name: str, made: Made[Any]) -> None:
        """Gives a stage a further name in the run's result, or a stage that another one's work has made its first."""
        self.folders.add(made.key.folder)
        if made.record is not None:
            self._others[self.named_as(name)] = made

    def name_result(self) -> None:
        """Makes the recipe's stages that are made so far the run's result."""
        self.store.name_result(self.recipe, {**self.stages(), **self._others}, self._parts)

    def stages(self) -> dict[str, Made[Any]]:
        """The recipe's stages that are made, by name: those that this run has come to, and those beyond `until`."""
        return {**self.made, **{name: made for name, made in self.known.items() if name not in self.made}}

    def after(self, plan: "Run") -> "Run":
        """The same run, which knows what a plan of all of it has found made."""
        self.known, self._others, self._parts = plan.made, dict(plan._others), dict(plan._parts)
        return self
