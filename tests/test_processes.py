"""Finding processes, and ending them."""

import subprocess
import sys
import time

import pytest

from cluster import processes

TREE = """
import signal, subprocess, sys
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
child.wait()
signal.pause() if sys.argv[1] == "deaf" else None
"""


@pytest.mark.parametrize(
    ("kind", "seconds"), [("willing", processes.TERMINATE_SECONDS), ("deaf", processes.KILL_SECONDS)]
)
def test_a_family_is_found_and_ended_whatever_it_says(kind: str, seconds: float) -> None:
    before = processes.children()
    command = [sys.executable, "-c", TREE, kind]
    with (
        subprocess.Popen(["sleep", "600"]) as other,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent,
    ):
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        family = processes.family({process for process in processes.children() - before if process.pid == parent.pid})
        assert {process.pid for process in family} == {parent.pid, grandchild}
        began = time.monotonic()
        processes.end(family)
        assert seconds <= time.monotonic() - began < seconds + 2
        assert processes.family(family) == set()
        assert other.poll() is None
        other.kill()
