"""The processes that this one started, and all that these started, and how they are ended."""

import signal
import time
from collections.abc import Iterable, Set
from contextlib import suppress

import psutil
from psutil import Process

TERMINATE_SECONDS, KILL_SECONDS, LAST_SECONDS = 1.0, 2.0, 10.0
"""When `end` asks, kills, and gives up on a process that the system itself does not let go."""


def children() -> set[Process]:
    """What this process itself started."""
    return _alive(Process().children())


def family(roots: Set[Process]) -> set[Process]:
    """Those of the processes that are there, and all that they started; a process whose parent has ended is no longer found."""
    found = _alive(roots)
    for root in tuple(found):
        with suppress(psutil.NoSuchProcess):
            found |= _alive(root.children(recursive=True))
    return found


def end(found: Set[Process]) -> None:
    """Returns when the processes are gone: by themselves within a second, or made to."""
    began, unsent = time.monotonic(), [(TERMINATE_SECONDS, signal.SIGTERM), (KILL_SECONDS, signal.SIGKILL)]
    while (alive := _alive(found)) and (seconds := time.monotonic() - began) < LAST_SECONDS:
        if unsent and seconds > unsent[0][0]:
            send(unsent.pop(0)[1], alive)
        time.sleep(0.02)


def kill() -> None:
    """Ends all that this process started, at once.

    Its own children come last, and are stopped until then: a raylet would start workers anew, and takes its driver with it when it ends.
    """
    roots = children()
    send(signal.SIGSTOP, roots)
    others = family(roots) - roots
    send(signal.SIGKILL, others)
    end(others)
    send(signal.SIGKILL, roots)


def send(number: signal.Signals, found: Set[Process]) -> None:
    """Sends a signal to those that are still there."""
    for process in found:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def _alive(found: Iterable[Process]) -> set[Process]:
    """Those that have not ended: one that its parent has not asked about has, too."""
    alive = set()
    for process in found:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.add(process)
    return alive
