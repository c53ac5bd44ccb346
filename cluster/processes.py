"""The processes that this one started, and all that these started: found in /proc, and ended."""

import os
import signal
import time
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

Process = tuple[int, int]
"""Number, and when it began, in clock ticks since the boot: numbers are used again."""

TERMINATE_SECONDS, KILL_SECONDS, LAST_SECONDS = 1.0, 2.0, 10.0
"""When `end` asks, kills, and gives up on a process that the system itself does not let go."""


def children() -> set[Process]:
    """What this process itself started."""
    return {process for process, parent in _table().items() if parent == os.getpid()}


def family(roots: Set[Process]) -> set[Process]:
    """Those of the processes that are there, and all that they started; a process whose parent has ended is no longer found."""
    table = _table()
    found = roots & table.keys()
    while more := {process for process, parent in table.items() if parent in dict(found)} - found:
        found |= more
    return found


def end(found: Set[Process]) -> None:
    """Returns when the processes are gone: by themselves within a second, or made to."""
    began, unsent = time.monotonic(), [(TERMINATE_SECONDS, signal.SIGTERM), (KILL_SECONDS, signal.SIGKILL)]
    while (alive := found & _table().keys()) and (seconds := time.monotonic() - began) < LAST_SECONDS:
        if unsent and seconds > unsent[0][0]:
            send(unsent.pop(0)[1], alive)
        time.sleep(0.02)


def send(number: signal.Signals, found: Set[Process]) -> None:
    """Sends a signal to those that are still there."""
    for process in found:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process[0], number)


def _table() -> dict[Process, int]:
    """The parent's number of every process that has not ended; empty where the system has no /proc."""
    table = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()  # see proc(5), from `state` on
            if fields[0] not in "ZX":
                table[int(stat.parent.name), int(fields[19])] = int(fields[1])
    return table
