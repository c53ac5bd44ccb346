"""The run store: finished stages are skipped, unfinished ones go on, changed ones start anew; on a disk and in an S3 store."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from cluster import storage
from cluster.errors import RunError, StorageError
from pipeline.recipe import Select
from pipeline.store import RunStore, fingerprint, read_json

KILLED = """
import os, signal, sys
from cluster import storage
from pipeline.store import RunStore

def work(place):
    storage.publish(storage.join(place, "half"), b"1")
    os.kill(os.getpid(), signal.SIGKILL)

RunStore(sys.argv[1]).once("score", {"k": 1}, {}, work)
"""


class Work:
    """Counts its calls; keeps what an earlier call left, as a stage that resumes does."""

    def __init__(self, **outputs: Any) -> None:
        self.calls = 0
        self.found: list[str] = []
        self._outputs = outputs

    def __call__(self, place: str) -> dict[str, Any]:
        self.calls += 1
        self.found = [f.path for f in storage.list_files(place)]
        storage.publish(storage.join(place, f"part-{self.calls}"), b"x")
        return self._outputs


def test_a_finished_stage_is_skipped(place: str) -> None:
    work = Work(images=3, top1=0.5, by_rank=(1, 2))
    first = RunStore(place).once("score", {"select": Select()}, {"teacher": "abc"}, work)
    again = RunStore(place).once("score", {"select": Select()}, {"teacher": "abc"}, work)
    assert work.calls == 1
    assert (first.fresh, again.fresh) == (True, False)
    assert first == again
    assert again.outputs == {"images": 3, "top1": 0.5, "by_rank": [1, 2]}
    assert again.uri == storage.join(place, "score")
    assert read_json(storage.join(place, "stages", again.name, "metrics.json")) == again.outputs
    assert RunStore(place).finished("score") == again
    assert RunStore(place).finished("select") is None


@pytest.mark.parametrize(
    ("sections", "inputs", "version"),
    [
        ({"select": Select(images_per_class=5)}, {"teacher": "abc"}, 1),
        ({"select": Select()}, {"teacher": "abd"}, 1),
        ({"select": Select()}, {"teacher": "abc", "more": "x"}, 1),
        ({"select": Select()}, {"teacher": "abc"}, 2),
    ],
)
def test_a_changed_dependency_starts_anew(
    place: str, sections: dict[str, Any], inputs: dict[str, str], version: int
) -> None:
    work = Work()
    store = RunStore(place)
    before = store.once("score", {"select": Select()}, {"teacher": "abc"}, work)
    other = store.once("select", {}, {}, work)
    after = store.once("score", sections, inputs, work, version=version)
    assert work.calls == 3
    assert work.found == []
    assert before.fingerprint != after.fingerprint
    assert store.finished("select") == other


def test_a_failed_stage_goes_on_with_its_files(place: str) -> None:
    work = Work()

    def fail(stage: str) -> dict[str, Any]:
        work(stage)
        raise RuntimeError("power cut")

    store = RunStore(place)
    with pytest.raises(RuntimeError):
        store.once("score", {"k": 1}, {}, fail)
    assert store.finished("score") is None
    store.once("score", {"k": 1}, {}, work)
    assert work.found == ["part-1"]
    assert store.finished("score") is not None


def test_a_failed_stage_of_another_recipe_leaves_nothing(place: str) -> None:
    def fail(stage: str) -> dict[str, Any]:
        storage.publish(storage.join(stage, "deep/part"), b"x")
        raise RuntimeError

    work = Work()
    store = RunStore(place)
    with pytest.raises(RuntimeError):
        store.once("score", {"k": 1}, {}, fail)
    store.once("score", {"k": 2}, {}, work)
    assert work.found == []


def test_a_process_killed_in_a_stage(place: str) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, place], env=dict(os.environ), timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    work = Work()
    store = RunStore(place)
    assert store.finished("score") is None
    assert store.once("score", {"k": 1}, {}, work).fresh
    assert work.found == ["half"]


def test_the_manifest_is_written_last(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    publish = storage.publish

    def recorded(uri: str, data: Any) -> None:
        order.append(uri.removeprefix(place))
        publish(uri, data)

    monkeypatch.setattr(storage, "publish", recorded)
    RunStore(place).once("score", {}, {}, Work())
    assert order == [
        "/stages/score/started.json",
        "/score/part-1",
        "/stages/score/metrics.json",
        "/stages/score/manifest.json",
    ]


def test_redoing_removes_the_manifest_before_the_outputs(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(place)
    store.once("score", {"k": 1}, {}, Work())

    def power_cut(uri: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "delete_tree", power_cut)
    with pytest.raises(KeyboardInterrupt):
        store.once("score", {"k": 2}, {}, Work())
    assert store.finished("score") is None


def test_claiming(place: str) -> None:
    store = RunStore(place)
    store.claim("demo", "name: demo\n")
    store.claim("demo", "name: demo\nseed: 1\n")
    assert storage.read_bytes(storage.join(place, "recipe.yaml")) == b"name: demo\nseed: 1\n"
    with pytest.raises(RunError) as error:
        store.claim("pa'per", "name: paper\n")
    assert str(error.value) == (
        f"--run-dir = {place!r}: belongs to the recipe 'demo', not to \"pa'per\"; give another --run-dir"
    )
    assert storage.read_bytes(storage.join(place, "recipe.yaml")) == b"name: demo\nseed: 1\n"


def test_a_folder_of_something_else_is_not_claimed(place: str) -> None:
    storage.publish(storage.join(place, "teacher/holiday.jpg"), b"x")
    with pytest.raises(RunError, match="holds files that are no run; give an empty or new folder"):
        RunStore(place).claim("demo", "")
    assert [f.path for f in storage.list_files(place)] == ["teacher/holiday.jpg"]


def test_a_run_directory_that_cannot_be_written(tmp_path: object) -> None:
    storage.publish(f"{tmp_path}/file", b"")
    with pytest.raises(StorageError, match=r"^--run-dir = "):
        RunStore(f"{tmp_path}/file/run").claim("demo", "")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_record_that_is_no_json_object(tmp_path: object, content: bytes) -> None:
    storage.publish(f"{tmp_path}/run.json", content)
    with pytest.raises(RunError, match=r"run\.json': is not .*; remove the file"):
        RunStore(str(tmp_path)).claim("demo", "")


def test_fingerprints() -> None:
    content = {"a": 1, "b": [1.5, None, "ü"]}
    assert fingerprint(content) == fingerprint(json.loads(json.dumps({"b": content["b"], "a": 1})))
    assert len({fingerprint(c) for c in (content, {**content, "a": 2}, {**content, "a": "1"}, {"a": 1})}) == 4
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint(float("nan"))
