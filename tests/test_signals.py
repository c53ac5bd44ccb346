"""Commands that a signal ends: one line, an exit code that tells which signal, and nothing left but what is finished."""

import json
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from cluster import interrupt
from cluster.store import RunStore
from commands import INTERRUPTED, Command, Ended
from pipeline.plan import plan
from pipeline.recipe.reading import validate
from runs import Finished

SIGNALS = [(signal.SIGINT, "group"), (signal.SIGTERM, "one"), (signal.SIGTERM, "all"), (signal.SIGHUP, "group")]
"""A terminal's Ctrl-C; Kubernetes, systemd, docker; Slurm; a terminal that closes."""


def interrupted(ended: Ended, number: signal.Signals, line: str = INTERRUPTED) -> None:
    assert (ended.code, ended.errors, ended.left) == (128 + number, [line], [])
    assert ended.seconds < interrupt.PATIENCE_SECONDS + 15  # Ray may keep the whole process waiting as it starts


# The watch itself

STUBBORN = """
import subprocess, sys, time
from cluster.interrupt import Interruption
watch = Interruption()
subprocess.Popen(["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1; done"])
try:
    print("ready", flush=True)
    time.sleep(600)
finally:
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("number", interrupt.ENDING)
def test_a_second_signal_ends_at_once_whatever_hangs(number: signal.Signals, tmp_path: Path) -> None:
    command = Command("-c", STUBBORN, "600", folder=tmp_path)
    command.wait_for(lambda: "ready" in command.out)
    command.send(number, "one")
    time.sleep(interrupt.SAME_SECONDS + 0.3)
    command.send(signal.SIGINT, "one")
    ended = command.end()
    interrupted(ended, number)
    assert ended.seconds < 2


def test_the_same_signal_twice_at_once_is_one(tmp_path: Path) -> None:
    """`timeout` tells its child, and then the group."""
    command = Command("-c", STUBBORN, "2", folder=tmp_path)
    command.wait_for(lambda: "ready" in command.out)
    command.send(signal.SIGTERM, "one")
    command.send(signal.SIGTERM, "group")
    ended = command.end()
    assert ended.seconds > 1.5
    assert "Signaled" in ended.errors[-1]  # in order: this program has no more to say about it


def test_an_end_that_takes_too_long_is_cut_short(tmp_path: Path) -> None:
    command = Command("-c", STUBBORN, "600", folder=tmp_path)
    command.wait_for(lambda: "ready" in command.out)
    command.send(signal.SIGTERM, "one")
    interrupted(command.end(), signal.SIGTERM)


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STUBBORN
    command = Command("-c", program, "0", folder=tmp_path)
    command.wait_for(lambda: "ready" in command.out)
    command.send(signal.SIGHUP, "one")
    time.sleep(0.5)
    command.send(signal.SIGTERM, "one")
    time.sleep(interrupt.SAME_SECONDS + 0.3)
    assert command.process.poll() is not None
    command.end()


# Commands without Ray


@pytest.mark.parametrize(("number", "whom"), SIGNALS)
def test_ingest(number: signal.Signals, whom: str, folders: Path, tmp_path: Path) -> None:
    """In the middle of it: the source is a folder whose listing does not come back, as the store does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "AWS_REGION": "us-east-1"}
        environment |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        words = ["-m", "pipeline", "ingest", "s3://bucket/pool", "--out", str(tmp_path / "shards")]
        command = Command(*words, folder=tmp_path, environment=environment)
        with silent.accept()[0]:
            command.send(number, whom)
            interrupted(command.end(), number)
    assert not (tmp_path / "shards").exists()


def test_a_reader_that_has_seen_enough(finished: Finished, tmp_path: Path) -> None:
    """`tophat status RUN | head -1`."""
    program = "import os, subprocess, sys\nread, write = os.pipe(); os.close(read)\nsys.exit(subprocess.call(sys.argv[1:], stdout=write))"
    words = [sys.executable, "-m", "pipeline", "status", finished.uri]
    ended = Command("-c", program, *words, folder=tmp_path).end()
    assert ended.errors == []
    assert ended.code != 0


# Whole runs

PAUSES = {"teacher": 6.0, "pretrained": 6.0, "student": 9.0, "supervised": 6.0, "scores": 3.0, "evaluation": 1.0}
STAGES = ("scores", "selection", "dhat", "pretrained", "evaluation")


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_each_kind_of_stage(finished: Finished, folders: Path, tmp_path: Path) -> None:
    """It goes on each time, and comes to what an undisturbed one has come to."""
    number, whom = signal.SIGTERM, "one"
    recipe, run = tiny.recipe(str(folders)), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["-m", "pipeline", "run", str(tmp_path / "recipe.yaml"), "--run-dir", str(run)]
    for stage in STAGES:
        command = Command(*words, folder=tmp_path)
        if command.wait_for(lambda stage=stage: any(run.glob(f"leases/{stage}-*"))):  # type: ignore[misc]
            time.sleep(PAUSES.get(stage, 0.0))
            command.send(number, whom)
        interrupted(command.end(), number)
    ended = Command(*words, folder=tmp_path).end(300)
    assert (ended.code, ended.errors, ended.left) == (0, [], [])
    assert outputs(recipe, run) == outputs(recipe, Path(finished.uri))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom", "stage"),
    [(*SIGNALS[1], "teacher"), (*SIGNALS[2], "teacher"), (*SIGNALS[0], "student"), (*SIGNALS[2], "student")],
)
def test_a_training_or_a_sweep_in_its_middle(
    number: signal.Signals, whom: str, stage: str, finished: Finished, folders: Path, tmp_path: Path
) -> None:
    recipe, run = tiny.recipe(str(folders)), Path(finished.copy(tmp_path / "run"))
    endless = {"batch_size": 12, "learning_rate": 0.5, "epochs": 4000}
    recipe["fine_tune"] = {"training": endless, "sweep": {"learning_rates": [0.02, 0.03]}}
    if stage == "teacher":
        recipe["teacher"]["training"] = endless
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["-m", "pipeline", "run", str(tmp_path / "recipe.yaml"), "--run-dir", str(run), "--until", stage]
    command = Command(*words, folder=tmp_path)
    assert command.wait_for(lambda: any(line.startswith(stage) and "loss" in line for line in command.out.splitlines()))
    command.send(number, whom)
    interrupted(command.end(), number)
    made = {one.name: one.made.record for one in plan(validate(recipe), RunStore(str(run))).planned}
    assert made[stage] is None
    assert made["labeled-train"] is not None


@pytest.mark.slow
def test_ctrl_c_in_what_follows_a_sweep(finished: Finished, folders: Path, tmp_path: Path) -> None:
    """Ray Tune and Ray Train would each have kept the signal for themselves."""
    recipe, run = tiny.recipe(str(folders)), Path(finished.copy(tmp_path / "run"))
    recipe["fine_tune"]["sweep"] = {"learning_rates": [0.1, 0.03, 0.01]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    before = set(run.glob("leases/evaluation-*"))
    command = Command("-m", "pipeline", "run", str(tmp_path / "recipe.yaml"), "--run-dir", str(run), folder=tmp_path)
    assert command.wait_for(lambda: set(run.glob("leases/evaluation-*")) - before)
    command.send(signal.SIGINT, "group")
    interrupted(command.end(), signal.SIGINT)


def outputs(recipe: dict[str, Any], run: Path) -> dict[str, Any]:
    made = {one.name: one.made for one in plan(validate(recipe), RunStore(str(run))).planned}
    found = {name: (made[name].record or {})["outputs"] for name in ("scores", "selection", "evaluation")}
    return {name: {k: v for k, v in one.items() if not k.endswith("uri")} for name, one in found.items()}
