"""The run store: what each stage made, kept under its fingerprint.

A stage's outputs lie in `RUN/store/NAME-FINGERPRINT/`. The fingerprint is a hash of everything that decides them: the recipe's fields, the
fingerprints of the stages that it was made from, and the version of its code. So variants of a recipe lie side by side, share what they
have in common, and nothing finished is ever replaced. The record is written last: a record that exists means complete.

`RUN/run.json` names the stages that are the run's result now. On a local disk, links under readable names point to them.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import TypeAdapter

from cluster import lease, storage
from cluster.errors import InputError, MissingError, RunError, StageError, StorageError, one_line, shown
from cluster.lease import Holder
from cluster.section import Section

T = TypeVar("T")

FORMAT = 2
"""Of a run directory. In the first one, each stage had one folder."""
RECORD = "_record.json"
"""In a stage's folder, and written last. Readers of folders of Parquet files pass over names with an underscore."""
RUN, RECIPE, STORE, LEASES = "run.json", "recipe.yaml", "store", "leases"
WORK = "work"
"""Folder, in a stage's, of what it needs only while it is under way."""


class Watched(Protocol):
    """Something outside of the store that a stage is made from, and that others may change meanwhile."""

    @property
    def name(self) -> str:
        """The field or option that gives it, for messages."""
        ...

    @property
    def fix(self) -> str:
        """What to do where it has changed."""
        ...

    def changed(self) -> str | None:
        """What of it is not what it was, as a URI; None where all is."""
        ...


@dataclass(frozen=True)
class Outside:
    """An input outside of the store, in `Key.inputs`: a stage whose input has changed at its end is not published.

    Attributes:
        name: the field or option that gives it, for messages.
        uri: where it is.
        fingerprint: what it was when the key was made.
        read: gives its fingerprint now.
    """

    name: str
    uri: str
    fingerprint: str
    read: Callable[[], str] = field(compare=False, repr=False)
    fix = "run the same command again to take what is there now"

    @classmethod
    def at(cls, name: str, uri: str, read: Callable[[], str]) -> "Outside":
        """What is there now."""
        return cls(name, uri, read(), read)

    def changed(self) -> str | None:
        """`uri`, where it is not what it was."""
        try:
            return None if self.read() == self.fingerprint else self.uri
        except InputError:  # it is gone, or no longer what it is to be
            return self.uri


@dataclass(frozen=True)
class Key:
    """What a stage is: its name, and everything that decides what it makes.

    Attributes:
        stage: its name, which begins its folder's.
        sections: parts of the recipe, by name; of a section, the fields that decide something.
        inputs: fingerprints of what it is made from, by name.
        version: of its code's meaning; raised when the same inputs would give other outputs.
        watched: what it reads outside of the store and does not name among its inputs.
    """

    stage: str
    sections: Mapping[str, Section | Any] = field(default_factory=dict)
    inputs: Mapping[str, str | Outside] = field(default_factory=dict)
    version: int = 1
    watched: tuple[Watched, ...] = field(default=(), compare=False, repr=False)

    def plain(self) -> dict[str, Any]:
        """All of it as plain JSON data."""
        sections = {k: v.deciding() if isinstance(v, Section) else v for k, v in self.sections.items()}
        inputs = {k: v.fingerprint if isinstance(v, Outside) else v for k, v in self.inputs.items()}
        return {"stage": self.stage, "version": self.version, "sections": sections, "inputs": inputs}

    def check_watched(self) -> None:
        """Makes sure that nothing was swapped under the stage.

        Raises:
            StageError: something was; says what.
        """
        outside = [one for one in self.inputs.values() if isinstance(one, Outside)]
        for one in (*outside, *self.watched):
            if (uri := one.changed()) is not None:
                raise StageError(
                    f"{one.name} = {shown(uri)}: has changed since {self.stage} began with it, so that nothing of it is kept; {one.fix}"
                )

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of it."""
        return fingerprint(self.plain())

    @property
    def folder(self) -> str:
        """The name of the stage's folder in the store."""
        return f"{self.stage}-{self.fingerprint}"


@dataclass(frozen=True)
class Made(Generic[T]):
    """What a stage made, or is to make.

    Attributes:
        key: what it depends on.
        uri: the folder of its files.
        kind: the type of `outputs`.
        record: the content of its record; None as long as there is none.
        fresh: whether this process made it (False: it was found finished).
    """

    key: Key
    uri: str
    kind: type[T]
    record: Mapping[str, Any] | None
    fresh: bool = field(default=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Of the key."""
        return self.key.fingerprint

    @cached_property
    def outputs(self) -> T:
        """What the stage says of what it made: counts, metrics."""
        assert self.record is not None, f"{self.key.stage} is not made yet"
        found: T = TypeAdapter(self.kind).validate_python(self.record["outputs"])
        return found

    @property
    def images(self) -> int | None:
        """How many images it is about, where its outputs say so."""
        outputs = (self.record or {}).get("outputs", {})
        images = outputs.get("images", outputs.get("listed"))
        return images if isinstance(images, int) else None

    @property
    def seconds(self) -> float:
        """How long it took when it ran."""
        return float((self.record or {}).get("seconds", 0.0))


@dataclass(frozen=True)
class RunStore:
    """A run directory, on a local path or in an object store."""

    uri: str

    def once(
        self, key: Key, kind: type[T], work: Callable[[str], T], waits: Callable[[Holder], None] = lambda holder: None
    ) -> Made[T]:
        """Runs `work` unless what it makes is there; waits where another process is at it.

        What an unfinished attempt left stays, so that `work` can go on where that stopped.

        Args:
            key: what the stage depends on.
            kind: a frozen dataclass of plain data, the type of its outputs.
            work: gets the stage's folder; returns what it says of its files there.
            waits: told whom this process waits for.

        Raises:
            StageError: another process took the stage over while this one was silent, or what it is made from has changed meanwhile.
        """
        if (found := self.find(key, kind)).record is not None:
            return found
        with lease.hold(storage.join(self.uri, LEASES, key.folder), waits) as held:
            if (found := self.find(key, kind)).record is not None:
                return found
            begin = time.monotonic()
            key.check_watched()
            outputs = work(found.uri)
            held.check()  # what lies in the folder may be another process's now
            try:
                key.check_watched()
            except StageError:
                storage.delete_tree(found.uri)  # or a later attempt would go on with it
                raise
            storage.delete_tree(storage.join(found.uri, WORK))
            held.check()
            record = {
                **key.plain(),
                "fingerprint": key.fingerprint,
                "outputs": TypeAdapter(kind).dump_python(outputs, mode="json"),
                "seconds": round(time.monotonic() - begin, 3),
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            publish_json(storage.join(found.uri, RECORD), record)
        return Made(key, found.uri, kind, json.loads(json.dumps(record)), fresh=True)

    def find(self, key: Key, kind: type[T]) -> Made[T]:
        """The stage, with its record if it is complete."""
        uri = storage.join(self.uri, STORE, key.folder)
        return Made(key, uri, kind, _record(uri))

    def begun(self, key: Key) -> bool:
        """Whether any file of the stage is there, or somebody is at it."""
        return bool(storage.list_files(storage.join(self.uri, LEASES, key.folder)))

    def holder(self, key: Key) -> Holder | None:
        """Who is at it now, as far as one look tells."""
        return lease.holder_of(storage.join(self.uri, LEASES, key.folder))

    # The directory

    def claim(self, name: str, recipe: str) -> bool:
        """Makes the directory a run's; returns whether its store keeps several processes apart (`storage.conditional`).

        Args:
            name: of the recipe; a directory belongs to one name.
            recipe: as YAML; `RUN/recipe.yaml` until there is a result.

        Raises:
            RunError: it belongs to another recipe, was made by an earlier version, or holds something that is no run.
            StorageError: it cannot be written.
        """
        try:
            conditional = storage.conditional(self.uri)
        except StorageError as error:
            raise StorageError("--run-dir", self.uri, error.rule, error.fix) from None
        found = self._run()
        if found is None:
            if any(file.path not in (RUN, RECIPE) for file in storage.list_files(self.uri)):
                raise RunError("--run-dir", self.uri, "holds files that are no run", "give an empty or new folder")
            new = json.dumps({"format": FORMAT, "recipe": name, "stages": {}}).encode()
            if not storage.create(storage.join(self.uri, RUN), new):
                return self.claim(name, recipe)  # another process has claimed it in this moment
            storage.publish(storage.join(self.uri, RECIPE), recipe.encode())
        elif found.get("recipe") != name:
            owner = found.get("recipe")
            raise RunError(
                "--run-dir", self.uri, f"belongs to the recipe {owner!r}, not to {name!r}", "give another --run-dir"
            )
        return conditional

    def _run(self) -> dict[str, Any] | None:
        """The content of `run.json`; None where there is none."""
        try:
            found = read_json(storage.join(self.uri, RUN))
        except MissingError:
            return None
        if found.get("format") != FORMAT:
            raise RunError(
                "--run-dir",
                self.uri,
                f"was made by an earlier version of tophat (format {found.get('format', 1)}), which this one cannot read",
                "give a new --run-dir",
            )
        stages = found.get("stages")
        if not (isinstance(stages, dict) and all(isinstance(folder, str) for folder in stages.values())):
            raise RunError("--run-dir", storage.join(self.uri, RUN), "is damaged", "run its recipe in a new --run-dir")
        return found

    def result(self) -> dict[str, str]:
        """The stages that are the run's result now: folders in the store, by the stages' names in the run.

        Raises:
            RunError: this is no run directory.
        """
        found = self._run()
        if found is None:
            raise RunError("RUN", self.uri, "is not a run directory", "give the --run-dir of a `tophat run`")
        return dict(found["stages"])

    def named(self, name: str, kind: type[T]) -> Made[T] | None:
        """The stage that has this name in the run's result, whatever it depends on; None where there is none.

        Raises:
            RunError: this is no run directory.
        """
        folder = self.result().get(name)
        record = None if folder is None else _record(storage.join(self.uri, STORE, folder))
        if folder is None or record is None:
            return None
        key = Key(record["stage"], record["sections"], record["inputs"], record["version"])
        return Made(key, storage.join(self.uri, STORE, folder), kind, record)

    def name_result(self, recipe: str, stages: Mapping[str, Made[Any]], parts: Mapping[str, str]) -> None:
        """Makes finished stages the run's result.

        Args:
            recipe: as YAML; `RUN/recipe.yaml` afterwards.
            stages: by their names in the run; a name may have slashes.
            parts: of stages whose readable name is for a folder within theirs, or that have several: that folder, as
                STAGE-FOLDER/PART, by readable name.
        """
        named = {name: made.key.folder for name, made in stages.items()}
        links = {name: storage.join(STORE, folder) for name, folder in named.items()}
        links |= {name: storage.join(STORE, path) for name, path in parts.items()}
        found = self._run() or {}
        if found.get("stages") == named and found.get("links") == links and self._recipe() == recipe.encode():
            if not storage.is_remote(self.uri):
                _link(Path(self.uri), links, ())  # mends what was lost
            return
        with lease.hold(storage.join(self.uri, LEASES, "result")):
            storage.publish(storage.join(self.uri, RECIPE), recipe.encode())
            publish_json(storage.join(self.uri, RUN), {**found, "stages": named, "links": links})
            if not storage.is_remote(self.uri):
                _link(Path(self.uri), links, found.get("links", ()))

    def _recipe(self) -> bytes | None:
        try:
            return storage.read_bytes(storage.join(self.uri, RECIPE))
        except MissingError:
            return None

    def recipe(self) -> bytes:
        """The recipe of the run's result, as YAML; empty where there is none.

        Raises:
            RunError: this is no run directory.
        """
        self.result()
        return self._recipe() or b""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps `prune` away while the block runs."""
        folder = storage.join(self.uri, LEASES, f"driver-{uuid.uuid4().hex}")
        try:
            with lease.hold(folder):
                yield
        finally:
            storage.delete_tree(folder)

    def users(self) -> list[Holder]:
        """Processes that are at work in the run. Waits, where some may be, until one shows that it lives, or all have been silent for too long.

        Leases of drivers that have died are removed.
        """
        root = storage.join(self.uri, LEASES)
        folders = {f.path.rpartition("/")[0] for f in storage.list_files(root, ".json")}
        return lease.living([storage.join(root, folder) for folder in sorted(folders)])

    def unnamed(self, kept: Collection[str] = ()) -> dict[str, int]:
        """What no result names, and is not among `kept`: folders of the store, and their bytes."""
        named = {*self.result().values(), *kept}
        sizes: dict[str, int] = {}
        for file in storage.list_files(storage.join(self.uri, STORE)):
            folder = file.path.partition("/")[0]
            if folder not in named:
                sizes[folder] = sizes.get(folder, 0) + file.size
        return sizes

    def prune(self, folders: Mapping[str, int]) -> None:
        """Removes folders of the store; the record first, so that what is half removed does not look complete."""
        for folder in folders:
            place = storage.join(self.uri, STORE, folder)
            storage.delete_file(storage.join(place, RECORD))
            storage.delete_tree(place)
            storage.delete_tree(storage.join(self.uri, LEASES, folder))


def _record(uri: str) -> dict[str, Any] | None:
    try:
        return read_json(storage.join(uri, RECORD))
    except MissingError:
        return None


def _link(run: Path, links: Mapping[str, str], former: Collection[str]) -> None:
    """Makes `links` the links of a run directory: each is replaced in one step, and `former` ones of other names are removed.

    Raises:
        RunError: something else has such a name.
    """
    for name, target in links.items():
        place = run / name
        place.parent.mkdir(parents=True, exist_ok=True)
        relative = os.path.relpath(run / target, place.parent)
        if place.is_symlink() and os.readlink(place) == relative:
            continue
        if place.exists() and not place.is_symlink():
            raise RunError("--run-dir", str(place), "is in the way of a link to what the run made", "move it away")
        temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        temporary.symlink_to(relative)
        temporary.replace(place)
    for place in (run / name for name in former if name not in links):
        if place.is_symlink():
            place.unlink()
            if place.parent != run and not any(place.parent.iterdir()):
                place.parent.rmdir()


def fingerprint(content: Any) -> str:
    """A hash of plain data, the same for equal data whatever the order of keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def publish_json(uri: str, content: Any) -> None:
    """Writes plain data as JSON, atomically."""
    storage.publish(uri, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(uri: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        MissingError: nothing is there.
        RunError: it is no JSON object.
    """
    try:
        content = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise RunError("--run-dir", uri, f"is not valid JSON ({one_line(str(error))})", "remove the file") from None
    if not isinstance(content, dict):
        raise RunError("--run-dir", uri, "is not a JSON object", "remove the file")
    return content
