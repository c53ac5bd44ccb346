"""Leases: one process at a time, in the order in which it can; on a disk and in an S3 store."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import lease, storage
from cluster.errors import StageError
from cluster.lease import Holder
from faulty_proxy import faulty_proxy

HOLDER = """
import sys, time
from cluster import lease
with lease.hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
    print(time.monotonic(), flush=True)
"""

COUNTER = """
import sys
from pathlib import Path
from cluster import lease
file = Path(sys.argv[2])
for _ in range(5):
    with lease.hold(sys.argv[1]):
        file.write_text(str(int(file.read_text()) + 1))
"""


@contextmanager
def holding(place: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease of `place` until it gets a line; then it says when, by the clock of the machine."""
    command = [sys.executable, "-c", HOLDER, place]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_it_is_held_and_given_back(place: str) -> None:
    assert lease.holder_of(place) is None
    with lease.hold(place):
        holder = lease.holder_of(place)
        assert holder is not None
        assert (holder.pid, holder.over) == (os.getpid(), False)
    assert lease.holder_of(place) is None
    with lease.hold(place):
        assert [f.path for f in storage.list_files(place)] == ["00000002.json"]


def test_it_is_given_back_when_the_block_fails(place: str) -> None:
    with pytest.raises(KeyboardInterrupt), lease.hold(place):
        raise KeyboardInterrupt
    assert lease.holder_of(place) is None


def test_another_process_is_waited_for_and_named(place: str) -> None:
    told: list[Holder] = []
    with holding(place) as process:

        def waits(holder: Holder) -> None:
            told.append(holder)
            assert process.stdin is not None
            print(file=process.stdin, flush=True)

        with lease.hold(place, waits):
            mine = time.monotonic()
        assert process.stdout is not None
        assert float(process.stdout.readline()) < mine
        assert [holder.pid for holder in told] == [process.pid]
        assert f"process {process.pid} on " in str(told[0])


def test_a_process_that_was_killed_is_taken_over_at_once(place: str) -> None:
    with holding(place) as process:
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with lease.hold(place):
        assert time.monotonic() - began < lease.SILENT_SECONDS / 2


def test_a_silent_holder_of_another_machine_is_taken_over(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    elsewhere = Holder("id", "elsewhere", 1, "another boot", "long ago")
    lease._write(place, 7, elsewhere)
    began = time.monotonic()
    with lease.hold(place):
        assert time.monotonic() - began >= 2.0
        assert [f.path for f in storage.list_files(place)] == ["00000008.json"]


def test_a_heartbeat_keeps_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.2), ("SILENT_SECONDS", 1.0), ("POLL_SECONDS", 0.05)):
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(Holder, "is_known_dead", False)
    taken = threading.Event()

    def take() -> None:
        with lease.hold(str(tmp_path)):
            taken.set()

    thread = threading.Thread(target=take)
    with lease.hold(str(tmp_path)):
        thread.start()
        assert not taken.wait(2.5)
    thread.join(timeout=10)
    assert taken.is_set()


def test_who_lives_is_seen_by_the_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.2), ("SILENT_SECONDS", 2.0), ("POLL_SECONDS", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    dead, alive = str(tmp_path / "dead"), str(tmp_path / "alive")
    lease._write(dead, 1, Holder("id", "elsewhere", 1, "another boot", "long ago"))
    assert lease.holder_of(dead) is not None  # as far as one look tells
    assert lease.living([dead]) == []
    with lease.hold(alive):
        assert [holder.pid for holder in lease.living([dead, alive])] == [os.getpid()]


def test_one_that_was_taken_over_publishes_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 600.0)
    with lease.hold(place) as held:
        held.check()
        lease._write(place, 2, Holder.here())
        with pytest.raises(StageError, match="took this work over"):
            held.check()


def count_together(place: str, counter: Path) -> None:
    """Four processes, each of which adds 1 five times to a number in a file, which has no lock but the lease."""
    counter.write_text("0")
    command = [sys.executable, "-c", COUNTER, place, str(counter)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert counter.read_text() == "20"


def test_processes_never_hold_it_together(tmp_path: Path) -> None:
    count_together(str(tmp_path / "lease"), tmp_path / "counter")


@pytest.mark.slow
def test_processes_never_hold_it_together_in_an_object_store(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with faulty_proxy(server, 0.05, conditional=True) as proxy:  # an answer in twenty is lost
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        count_together(storage.join(s3, "lease"), tmp_path / "counter")
