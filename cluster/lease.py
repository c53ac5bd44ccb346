"""Leases: of several processes, on any machines, one at a time works in a place.

A lease is an object `FOLDER/00000007.json` in a run directory. Numbers only grow, and each is created by exactly one process
(`storage.create`), which holds the lease until it says there that it is over, or falls silent. Whoever holds it changes the object every few
seconds: its heartbeat. A process that waits watches for that change by its own clock, so that clocks need not agree.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster import storage
from cluster.errors import MissingError, StageError, StorageError

BEAT_SECONDS = 5.0
"""Between two heartbeats."""
SILENT_SECONDS = 30.0
"""Without a heartbeat for so long, whoever held a lease is taken for dead."""
POLL_SECONDS = 1.0
READS = 10
"""Of a lease that cannot be understood, before it is taken for something else."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        id: of the holding, unique.
        host: name of its machine.
        pid: of its process there.
        space: the boot of that machine and the space in which process numbers mean something.
        since: when it began, UTC, as text.
        beats: heartbeats so far.
        over: whether it has ended.
    """

    id: str
    host: str
    pid: int
    space: str
    since: str
    beats: int = 0
    over: bool = False

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(secrets.token_hex(8), socket.gethostname(), os.getpid(), _space(), since)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, which began at {self.since}"

    @property
    def is_known_dead(self) -> bool:
        """Whether it was a process of this machine that is there no more."""
        return bool(self.space) and self.space == _space() and not Path(f"/proc/{self.pid}").exists()


def _space() -> str:
    """Names this boot and process namespace; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """A lease that this process holds; its heartbeat is a thread. See `hold`."""

    def __init__(self, folder: str, number: int, holder: Holder) -> None:
        self._folder, self._number, self._holder = folder, number, holder
        self._ended = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Makes sure that nobody took it over, before what was made under it is published.

        Raises:
            StageError: somebody did, as this process was silent for too long.
        """
        if self._lost or _numbers(self._folder)[-1:] != [self._number]:
            raise StageError(
                "another process took this work over while this one was silent (was the machine asleep?); "
                "run the same command again to have what it made"
            )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                if _numbers(self._folder)[-1:] != [self._number]:
                    self._lost = True
                    return
                self._holder = replace(self._holder, beats=self._holder.beats + 1)
                _write(self._folder, self._number, self._holder)
            except StorageError:
                continue  # the store is away for a moment; the next beat tries again

    def end(self) -> None:
        """Gives the lease back."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            _write(self._folder, self._number, replace(self._holder, over=True))


@contextmanager
def hold(folder: str, waits: Callable[[Holder], None] = lambda holder: None) -> Iterator[Lease]:
    """Holds the lease of `folder` while the block runs, once nobody else does.

    Args:
        folder: a URI for the lease alone.
        waits: told once of each holder that is waited for.

    Raises:
        StorageError: the store refuses.
    """
    lease = _acquire(folder, waits)
    try:
        yield lease
    finally:
        lease.end()


def holder_of(folder: str) -> Holder | None:
    """Who holds the lease now, as far as one look tells: a holder that has just died may still be named."""
    numbers = _numbers(folder)
    holder = _read(folder, numbers[-1]) if numbers else None
    return None if holder is None or holder.over or holder.is_known_dead else holder


def living(folders: Sequence[str]) -> list[Holder]:
    """Holders of leases that show that they live: the first of them that do, as soon as one does; none, once all were silent for too long."""
    seen = {folder: holder for folder in folders if (holder := holder_of(folder)) is not None}
    began = time.monotonic()
    while seen and time.monotonic() - began < SILENT_SECONDS:
        time.sleep(POLL_SECONDS)
        now = {folder: holder_of(folder) for folder in seen}
        if alive := [holder for folder, holder in now.items() if holder is not None and holder != seen[folder]]:
            return alive
        seen = {folder: seen[folder] for folder, holder in now.items() if holder is not None}
    return []


def _acquire(folder: str, waits: Callable[[Holder], None]) -> Lease:
    told: set[str] = set()
    seen: tuple[str, int] | None = None
    since = time.monotonic()
    while True:
        numbers = _numbers(folder)
        newest = numbers[-1] if numbers else 0
        holder = _read(folder, newest) if newest else None
        if holder is not None and not holder.over and not holder.is_known_dead:
            if (holder.id, holder.beats) != seen:
                seen, since = (holder.id, holder.beats), time.monotonic()
            if time.monotonic() - since < SILENT_SECONDS:
                if holder.id not in told:
                    told.add(holder.id)
                    waits(holder)
                time.sleep(POLL_SECONDS)
                continue
        mine = Holder.here()
        if storage.create(_uri(folder, newest + 1), _encoded(mine)):
            if _numbers(folder)[-1:] == [newest + 1]:
                for number in numbers:
                    storage.delete_file(_uri(folder, number))
                return Lease(folder, newest + 1, mine)
            storage.delete_file(
                _uri(folder, newest + 1)
            )  # it had been held and given back while this process looked away


def _numbers(folder: str) -> list[int]:
    return sorted(int(f.path.removesuffix(".json")) for f in storage.list_files(folder, ".json"))


def _uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:08d}.json")


def _encoded(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _write(folder: str, number: int, holder: Holder) -> None:
    storage.publish(_uri(folder, number), _encoded(holder))


def _read(folder: str, number: int) -> Holder | None:
    """None where the object has just been removed, as a newer one is there.

    Raises:
        StorageError: it is no lease.
    """
    for _ in range(READS):
        try:
            return Holder(**json.loads(storage.read_bytes(_uri(folder, number))))
        except MissingError:
            return None
        except (ValueError, TypeError):
            time.sleep(0.2)  # some servers show an object while it is being written
    raise StorageError("uri", _uri(folder, number), "is no lease", "remove it, if nothing is at work there")
