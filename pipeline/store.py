"""The run store: which stages of a run are finished, and where their outputs are.

A stage's outputs live under `RUN/NAME/`, and nothing else does, so that other tools can read that folder whole. What the run knows of the
stage is under `RUN/stages/NAME/`. `manifest.json` is written there last: where it exists, the stage is complete. It holds the stage's
fingerprint, a hash of everything the stage depends on: its slice of the recipe, its inputs' fingerprints and the version of its code.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from cluster import storage
from cluster.errors import RunError, one_line

MANIFEST = "manifest.json"
STARTED = "started.json"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Finished:
    """A complete stage.

    Attributes:
        name: the stage's name.
        fingerprint: hexadecimal hash of what it depended on.
        uri: the folder of its outputs.
        outputs: what it said of them (counts, metrics): plain JSON data.
        seconds: how long it took when it ran.
        inputs: fingerprints of the stages that it was made from, by name.
        fresh: whether this process ran it (False: it was found finished).
    """

    name: str
    fingerprint: str
    uri: str
    outputs: dict[str, Any]
    seconds: float
    inputs: dict[str, str] = field(default_factory=dict)
    fresh: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class RunStore:
    """A run directory, on a local path or in an object store."""

    uri: str

    def place(self, name: str) -> str:
        """The folder of a stage's outputs."""
        return storage.join(self.uri, name)

    def started(self, name: str) -> bool:
        """Whether the stage was ever begun."""
        return storage.exists(self._record(name, STARTED))

    def _record(self, name: str, file: str) -> str:
        return storage.join(self.uri, "stages", name, file)

    def claim(self, recipe_name: str, recipe_yaml: str) -> None:
        """Makes the directory this recipe's: refuses one that belongs to another, and writes `recipe.yaml`.

        Raises:
            RunError: it belongs to a recipe of another name, or holds something that is no run.
            StorageError: it cannot be written.
        """
        storage.check_writable("--run-dir", self.uri)
        target = storage.join(self.uri, "recipe.yaml")
        owner = storage.join(self.uri, "run.json")
        if storage.exists(owner):
            name = read_json(owner).get("recipe")
            if name != recipe_name:
                raise RunError(
                    "--run-dir",
                    self.uri,
                    f"belongs to the recipe {name!r}, not to {recipe_name!r}",
                    "give another --run-dir",
                )
        else:
            if storage.list_files(self.uri):
                raise RunError("--run-dir", self.uri, "holds files that are no run", "give an empty or new folder")
            publish_json(owner, {"recipe": recipe_name, "format": 1})
        storage.publish(target, recipe_yaml.encode())

    def finished(self, name: str) -> Finished | None:
        """The stage, if it is complete, whatever it depended on."""
        uri = self._record(name, MANIFEST)
        if not storage.exists(uri):
            return None
        content = read_json(uri)
        inputs = content["inputs"]
        return Finished(name, content["fingerprint"], self.place(name), content["outputs"], content["seconds"], inputs)

    def current(self, stage: Finished) -> bool:
        """Whether the stages that a stage was made from are finished and still the same, all the way up."""
        found = {name: self.finished(name) for name in stage.inputs if self.started(name)}
        return all(
            parent is not None and parent.fingerprint == stage.inputs[name] and self.current(parent)
            for name, parent in found.items()
        )

    def once(
        self,
        name: str,
        sections: Mapping[str, BaseModel | Any],
        inputs: Mapping[str, str],
        work: Callable[[str], dict[str, Any]],
        *,
        version: int = 1,
    ) -> Finished:
        """Runs `work` unless it is finished with the same dependencies.

        An unfinished stage with the same fingerprint keeps its files, so that `work` can go on where it stopped. Outputs that were
        made from other dependencies are removed before `work` starts.

        Args:
            name: the stage's name and folder.
            sections: the parts of the recipe that decide its outputs.
            inputs: fingerprints of the stages that it reads, by name.
            work: gets the stage's folder; returns plain JSON data about what it made.
            version: of the code's meaning; raised when the same inputs would give other outputs.
        """
        print_of = fingerprint(
            {"stage": name, "version": version, "sections": _plain(sections), "inputs": dict(inputs)}
        )
        done = self.finished(name)
        if done is not None and done.fingerprint == print_of:
            return done
        place = self.place(name)
        started = self._record(name, STARTED)
        if done is not None or not storage.exists(started) or read_json(started).get("fingerprint") != print_of:
            # The manifest goes first: outputs that are half removed must not look complete.
            storage.delete_file(self._record(name, MANIFEST))
            storage.delete_tree(place)
            publish_json(started, {"fingerprint": print_of})
        begin = time.monotonic()
        outputs = json.loads(json.dumps(work(place)))  # the same plain data now as when it is found finished
        seconds = round(time.monotonic() - begin, 3)
        content = {
            "stage": name,
            "fingerprint": print_of,
            "version": version,
            "sections": _plain(sections),
            "inputs": dict(inputs),
            "outputs": outputs,
            "seconds": seconds,
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        publish_json(self._record(name, METRICS), outputs)
        publish_json(self._record(name, MANIFEST), content)
        return Finished(name, print_of, place, outputs, seconds, dict(inputs), fresh=True)


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
        RunError: it is not one.
    """
    try:
        content = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise RunError("--run-dir", uri, f"is not valid JSON ({one_line(str(error))})", "remove the file") from None
    if not isinstance(content, dict):
        raise RunError("--run-dir", uri, "is not a JSON object", "remove the file")
    return content


def _plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in sections.items()}
