"""What contenders' processes take, and whose turn it is."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path


def family(process: int) -> list[int]:
    """The ids of a process and of all that it started, parents first, but for those whose parents have ended."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    members = [process]
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def send(process: int, what: signal.Signals) -> None:
    """A signal to a process and all that it started."""
    for member in family(process):
        with suppress(ProcessLookupError):
            os.kill(member, what)


class Memory:
    """The peak of the proportional set size, in GiB, of a process and all that it started, as far as looking now and then finds it.

    Args:
        process: its id.
        share: of the time that looking may take, as it stops the processes; at least every two seconds all the same.
    """

    def __init__(self, process: int, share: float = 0.02) -> None:
        self.peak = 0.0
        self._share = share
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = 0.2
        while not self._stop.wait(pause):
            began = time.monotonic()
            self.peak = max(self.peak, sum(map(_pss, family(self._process))) / 2**20)
            pause = max(0.2, min(2.0, (time.monotonic() - began) / self._share))


def _pss(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


class Turns:
    """A process that runs, with all that it started, only while it has a turn.

    Args:
        process: has just started, with pipes for what it prints.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._turns: list[tuple[float, float]] = []  # Unix times

    def take(self, seconds: float | None) -> tuple[str, str] | None:
        """Runs for so long, or to its end; what it printed and its errors where that came."""
        send(self._process.pid, signal.SIGCONT)
        began = time.time()
        try:
            return self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            send(self._process.pid, signal.SIGSTOP)
            return None
        finally:
            self._turns.append((began, time.time()))
            send(self._process.pid, signal.SIGSTOP)  # what was started meanwhile

    def ran(self, until: float) -> float:
        """Seconds of its turns until a Unix time."""
        return sum(min(end, until) - began for began, end in self._turns if began < until)
