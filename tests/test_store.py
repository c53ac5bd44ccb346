"""The run store: what is finished is found, what differs lies beside it, one process makes it; on a disk and in an S3 store."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny
from cluster import storage
from cluster.errors import RunError, StageError, StorageError
from cluster.store import Key, Made, Outside, RunStore, fingerprint, publish_json, read_json
from pipeline.recipe.reading import load, validate
from pipeline.recipe.sections import Score
from pipeline.recipe.select import Select

WORKER = """
import os, sys
from cluster import storage
from cluster.store import Key, RunStore
from test_store import Outputs

def work(place):
    storage.publish(storage.join(place, f"by-{os.getpid()}"), b"1")
    print("at work", flush=True)
    if sys.argv[2] == "waits":
        sys.stdin.readline()
    return Outputs(images=os.getpid())

def waits(holder):
    print(f"waits for {holder.pid}", flush=True)

print(RunStore(sys.argv[1]).once(Key("score", {"k": 1}), Outputs, work, waits).outputs.images)
"""


@dataclass(frozen=True)
class Outputs:
    images: int = 0
    by_rank: tuple[int, ...] = ()


class Work:
    """Counts its calls; keeps what an earlier call left, as a stage that resumes does."""

    def __init__(self, outputs: Outputs | None = None) -> None:
        self.calls = 0
        self.found: list[str] = []
        self._outputs = outputs or Outputs()

    def __call__(self, place: str) -> Outputs:
        self.calls += 1
        self.found = [f.path for f in storage.list_files(place)]
        storage.publish(storage.join(place, f"part-{self.calls}"), b"x")
        storage.publish(storage.join(place, "work", "scratch"), b"x")
        return self._outputs


KEY = Key("score", {"select": Select()}, {"teacher": "abc"})


def test_a_finished_stage_is_found(place: str) -> None:
    work = Work(Outputs(3, (1, 2)))
    first = RunStore(place).once(KEY, Outputs, work)
    again = RunStore(place).once(KEY, Outputs, work)
    assert work.calls == 1
    assert (first.fresh, again.fresh) == (True, False)
    assert first == again
    assert again.outputs == Outputs(3, (1, 2))
    assert again.uri == storage.join(place, "store", f"score-{KEY.fingerprint}")
    assert [f.path for f in storage.list_files(again.uri)] == [
        "_record.json",
        "part-1",
    ]  # what was only for the work is gone


@pytest.mark.parametrize(
    "other",
    [
        Key("score", {"select": Select(images_per_class=5)}, {"teacher": "abc"}),
        Key("score", {"select": Select()}, {"teacher": "abd"}),
        Key("score", {"select": Select()}, {"teacher": "abc", "more": "x"}),
        Key("score", {"select": Select()}, {"teacher": "abc"}, version=2),
        Key("scores", {"select": Select()}, {"teacher": "abc"}),
    ],
)
def test_what_depends_on_other_things_lies_beside_it(place: str, other: Key) -> None:
    work, store = Work(), RunStore(place)
    before = store.once(KEY, Outputs, work)
    after = store.once(other, Outputs, work)
    assert (work.calls, work.found) == (2, [])
    assert before.uri != after.uri
    assert store.once(KEY, Outputs, work) == before
    assert work.calls == 2


def test_a_field_that_decides_nothing_is_no_other_stage() -> None:
    assert Key("score", {"select": Select(memory_mib=64)}, {"teacher": "abc"}).fingerprint == KEY.fingerprint
    with_actors = Score(actors=3, batch_size=7, readers=2, decode_seconds=3.0)
    assert with_actors.deciding() == Score().deciding()
    assert Score(views="ten").deciding() != Score().deciding()


def deciding(*overrides: str) -> dict[str, Any]:
    return load("demo", overrides).deciding()


def test_what_decides_is_said_at_any_depth() -> None:
    free = (
        "teacher.training.cpus_per_worker=2",
        "teacher.training.max_failures=0",
        "fine_tune.sweep.concurrent=2",
        "report.classes=3",
        "cluster.cpus=1",
        "score.actors=2",
    )
    assert deciding(*free) == deciding()
    for override in ("teacher.training.momentum=0.8", "fine_tune.sweep.learning_rates=[1]", "dhat.images_per_shard=5"):
        assert deciding(override) != deciding()
    # The minibatch decides, and not how many workers share it.
    halves = ("teacher.training.workers=2", "teacher.training.batch_size=10")
    assert deciding(*halves) == deciding()
    assert deciding("teacher.training.workers=2") != deciding()
    # A new field, which has a default, leaves every finished stage what it was.
    assert deciding("score.views=center", "seeds={}", "rounds=1") == deciding()
    assert "score" not in validate(tiny.recipe("x", score={"actors": 3})).deciding()


def test_a_failed_stage_goes_on_with_its_files(place: str) -> None:
    work = Work()

    def fail(stage: str) -> Outputs:
        work(stage)
        raise RuntimeError("power cut")

    store = RunStore(place)
    with pytest.raises(RuntimeError):
        store.once(KEY, Outputs, fail)
    assert store.find(KEY, Outputs).record is None
    assert store.begun(KEY)
    store.once(KEY, Outputs, work)
    assert work.found == ["part-1", "work/scratch"]
    assert store.find(KEY, Outputs).record is not None


def worker(place: str, *, waits: bool = False) -> subprocess.Popen[str]:
    """A process that makes a stage; one that waits is at work until it gets a line."""
    command = [sys.executable, "-c", WORKER, place, "waits" if waits else ""]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def test_two_processes_make_it_once(place: str) -> None:
    with worker(place, waits=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "at work\n"
        with worker(place) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == f"waits for {first.pid}\n"
            made, _ = first.communicate("\n", timeout=60)
            said, _ = second.communicate(timeout=60)
    assert said == made
    assert made == f"{first.pid}\n"
    files = [f.path for f in storage.list_files(storage.join(place, "store"))]
    assert [file.rpartition("/")[2] for file in files] == ["_record.json", f"by-{first.pid}"]


def test_one_that_was_killed_is_taken_over_with_its_files(place: str) -> None:
    with worker(place, waits=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "at work\n"
        first.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with worker(place) as second:
        said, _ = second.communicate(timeout=60)
    assert said == f"at work\n{second.pid}\n"
    assert time.monotonic() - began < 20
    names = {f.path.rpartition("/")[2] for f in storage.list_files(storage.join(place, "store"))}
    assert names == {"_record.json", f"by-{first.pid}", f"by-{second.pid}"}


def test_the_record_is_written_last(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    publish = storage.publish

    def recorded(uri: str, data: Any) -> None:
        order.append(uri.removeprefix(f"{place}/store/score-{KEY.fingerprint}/"))
        publish(uri, data)

    monkeypatch.setattr(storage, "publish", recorded)
    RunStore(place).once(KEY, Outputs, Work())
    assert [name for name in order if "leases" not in name] == ["part-1", "work/scratch", "_record.json"]


# The directory


def result(store: RunStore, *ks: int) -> dict[str, Made[Outputs]]:
    return {f"score-{k}": store.once(Key("score", {"k": k}), Outputs, Work()) for k in ks}


def test_a_result_is_named_and_linked(place: str) -> None:
    store = RunStore(place)
    store.claim("demo", "name: demo\n")
    assert store.result() == {}
    made = store.once(Key("score", {"k": 1}), Outputs, Work())
    other = store.once(Key("score", {"k": 2}), Outputs, Work())
    store.name_result("name: demo\n", {"scores": made, "round-1/scores": other}, {"scores": f"{made.key.folder}/table"})
    assert store.result() == {"scores": made.key.folder, "round-1/scores": other.key.folder}
    assert store.named("scores", Outputs) == made
    assert store.named("teacher", Outputs) is None
    assert store.recipe() == b"name: demo\n"
    if not storage.is_remote(place):
        assert os.readlink(f"{place}/scores") == f"store/{made.key.folder}/table"
        assert Path(place, "round-1/scores/part-1").read_bytes() == b"x"
        assert os.readlink(f"{place}/round-1/scores") == f"../store/{other.key.folder}"
    store.name_result("name: demo\nseed: 1\n", {"dhat": other}, {})
    assert store.result() == {"dhat": other.key.folder}
    if not storage.is_remote(place):
        links = {p.name for p in Path(place).rglob("*") if p.is_symlink()}
        assert links == {"dhat"}
        assert Path(place, "dhat/part-1").exists()


def test_links_are_mended_and_those_of_others_stay(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    store.claim("demo", "")
    made = result(store, 1)
    store.name_result("", made, {})
    own = tmp_path / "run" / "mine"
    own.symlink_to("/etc")
    (tmp_path / "run" / "score-1").unlink()
    store.name_result("", made, {})
    assert (tmp_path / "run" / "score-1" / "part-1").exists()
    store.name_result("", result(store, 2), {})
    assert own.is_symlink()
    assert not (tmp_path / "run" / "score-1").is_symlink()
    (tmp_path / "run" / "score-3").mkdir()
    with pytest.raises(RunError, match="is in the way of a link to what the run made; move it away"):
        store.name_result("", result(store, 3), {})


def test_a_holder_that_was_silent_takes_nothing_from_the_next(place: str) -> None:
    store = RunStore(place)

    def lose(stage: str) -> Outputs:
        folder = storage.join(place, "leases", KEY.folder)
        storage.publish(
            storage.join(folder, "00000009.json"), storage.read_bytes(storage.join(folder, "00000001.json"))
        )
        storage.publish(storage.join(stage, "work", "of the next"), b"x")
        return Outputs()

    with pytest.raises(StageError, match="took this work over"):
        store.once(KEY, Outputs, lose)
    assert [f.path for f in storage.list_files(store.find(KEY, Outputs).uri)] == ["work/of the next"]


def test_a_holder_that_is_overtaken_at_the_very_end_publishes_nothing(place: str) -> None:
    """While the inputs are looked at once more, which takes long where they are many."""
    store, looks = RunStore(place), []

    def look() -> str:
        looks.append(1)
        if len(looks) == 3:  # after the key, and at the beginning
            folder = storage.join(place, "leases", key.folder)
            lease = storage.read_bytes(storage.join(folder, "00000001.json"))
            storage.publish(storage.join(folder, "00000009.json"), lease)
        return "1"

    key = Key("score", {}, {"list": Outside.at("select.exclude", "x", look)})
    with pytest.raises(StageError, match="took this work over"):
        store.once(key, Outputs, Work())
    assert len(looks) == 3
    assert store.find(key, Outputs).record is None


def test_pruning_keeps_what_the_result_names(place: str) -> None:
    store = RunStore(place)
    store.claim("demo", "")
    made = result(store, 1, 2, 3)
    store.name_result("", {"score-2": made["score-2"]}, {})
    assert set(store.unnamed([made["score-3"].key.folder])) == {made["score-1"].key.folder}
    unnamed = store.unnamed()
    assert set(unnamed) == {made["score-1"].key.folder, made["score-3"].key.folder}
    record = len(storage.read_bytes(storage.join(made["score-1"].uri, "_record.json")))
    assert unnamed[made["score-1"].key.folder] == record + 1  # and its one byte
    store.prune(unnamed)
    assert store.unnamed() == {}
    left = {f.path.partition("/")[0] for f in storage.list_files(storage.join(place, "store"))}
    assert left == {made["score-2"].key.folder}


def test_a_run_in_use_is_told(place: str) -> None:
    store = RunStore(place)
    assert store.users() == []
    with store.in_use():
        assert [holder.pid for holder in store.users()] == [os.getpid()]
    assert store.users() == []
    assert storage.list_files(storage.join(place, "leases")) == []


def test_claiming(place: str) -> None:
    store = RunStore(place)
    assert store.claim("demo", "name: demo\n") is not storage.is_remote(place)  # rclone's server honors no conditions
    store.claim("demo", "name: demo\nseed: 1\n")
    assert store.recipe() == b"name: demo\n"
    with pytest.raises(RunError) as error:
        store.claim("pa'per", "")
    assert str(error.value) == (
        f"--run-dir = {place!r}: belongs to the recipe 'demo', not to \"pa'per\"; give another --run-dir"
    )


def test_a_folder_of_something_else_is_not_claimed(place: str) -> None:
    storage.publish(storage.join(place, "teacher/holiday.jpg"), b"x")
    with pytest.raises(RunError, match="holds files that are no run; give an empty or new folder"):
        RunStore(place).claim("demo", "")
    assert [f.path for f in storage.list_files(place)] == ["teacher/holiday.jpg"]


def test_a_run_of_an_earlier_version_is_refused(place: str) -> None:
    publish_json(storage.join(place, "run.json"), {"recipe": "demo", "format": 1})
    for use in (lambda: RunStore(place).claim("demo", ""), RunStore(place).result):
        with pytest.raises(
            RunError, match=r"was made by an earlier version of tophat \(format 1\).*; give a new --run-dir"
        ):
            use()


def test_a_folder_that_is_no_run(place: str) -> None:
    for use in (RunStore(place).result, RunStore(place).recipe, RunStore(place).unnamed):
        with pytest.raises(RunError, match="is not a run directory"):
            use()


def test_a_run_directory_that_cannot_be_written(tmp_path: object) -> None:
    storage.publish(f"{tmp_path}/file", b"")
    with pytest.raises(StorageError, match=r"^--run-dir = "):
        RunStore(f"{tmp_path}/file/run").claim("demo", "")


@pytest.mark.parametrize("stages", [None, [1], {"teacher": 1}])
def test_a_damaged_list_of_stages(place: str, stages: object) -> None:
    publish_json(storage.join(place, "run.json"), {"recipe": "demo", "format": 2, "stages": stages})
    with pytest.raises(RunError, match=r"run\.json': is damaged"):
        RunStore(place).result()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_record_that_is_no_json_object(tmp_path: object, content: bytes) -> None:
    storage.publish(f"{tmp_path}/run.json", content)
    with pytest.raises(RunError, match=r"run\.json': is not .*; remove the file"):
        RunStore(str(tmp_path)).claim("demo", "")


def test_json_is_read_as_it_was_written(place: str) -> None:
    publish_json(f"{place}/x.json", {"ü": [1.5, None]})
    assert read_json(f"{place}/x.json") == {"ü": [1.5, None]}


def test_fingerprints() -> None:
    content = {"a": 1, "b": [1.5, None, "ü"]}
    assert fingerprint(content) == fingerprint(json.loads(json.dumps({"b": content["b"], "a": 1})))
    assert len({fingerprint(c) for c in (content, {**content, "a": 2}, {**content, "a": "1"}, {"a": 1})}) == 4
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint(float("nan"))
