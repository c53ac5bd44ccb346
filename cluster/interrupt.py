"""The signals that end a command: Ctrl-C, what schedulers send before they kill, and a terminal that closes.

Each means the same in every command and stage: KeyboardInterrupt in the main thread, so that whatever is open is closed in order.
"""

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from cluster import processes

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 1.0
"""A signal so soon after the first one is a part of it: `timeout` and schedulers tell a process, and then its whole group."""
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 8.0
"""For the end in order. Docker kills 10 s after it has asked, Slurm and Kubernetes 30 s."""
OTHER_HANDLER = "RAY_DISABLE_FAILURE_SIGNAL_HANDLER"
INTERRUPTED = "interrupted; what is finished is kept: run the same command to go on"


class Signaled(KeyboardInterrupt):
    """One of `ENDING` has come. Python ends a process whose code in a string meets KeyboardInterrupt itself as SIGINT would, whatever follows."""


class Interruption:
    """Watches for the first of `ENDING`, from now until this process is gone.

    That one raises `Signaled` in the main thread. A second one, `PATIENCE_SECONDS` without an end, or the end of a child that was told as well,
    end the process and all that it started at once, wherever the main thread is. What this process was started to ignore (`nohup`) stays ignored.
    """

    closing = False
    """Whether this process ends its children itself: from then on, it is no news that they end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The number of the first one; None until there is one."""
        self.over = False
        """Whether the work is done, so that there is nothing left to interrupt."""
        self._raised = False
        self._ending = threading.Lock()
        Interruption.closing = False
        # Ray's own handler writes a stack and aborts. It looks here when it is loaded; its workers keep theirs.
        os.environ.setdefault(OTHER_HANDLER, "1")
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._raise)
        threading.Thread(target=self._watch, daemon=True).start()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not (self._raised or self.over):
            self._raised, self.signal = True, number
            raise Signaled

    def _watch(self) -> None:
        """A thread of its own: handlers run in the main thread, which may be in a call that does not come back."""
        first = self._next(None)
        if not self.over:
            self.signal = first  # also where the handler is not ours for a moment: Ray, as it starts, and Ray Train have their own
        same, last = time.monotonic() + SAME_SECONDS, time.monotonic() + PATIENCE_SECONDS
        children = processes.children()
        while (now := time.monotonic()) < last:
            if self._next(now + POLL_SECONDS) is not None and now > same:
                break
            if not (self.closing or children <= processes.children()):
                break  # Ray was told as well, and ends; it would end this process too, in its own words
        self.signal = self.signal or first
        self.end(INTERRUPTED)

    def end(self, line: str) -> NoReturn:
        """Ends this process and all that it started, with a line about it. Ray is not asked: it ends a process whose other threads still
        use it, in its own words and with its own code."""
        self._ending.acquire()  # whoever comes second waits for the first one's end
        with suppress(OSError, ValueError):  # whoever would read it is gone
            sys.stdout.flush()
        with suppress(OSError):
            os.write(2, f"error: {line}\n".encode(errors="replace"))
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silence, stream)
        processes.kill()
        os._exit(128 + (self.signal or 0))

    def _next(self, until: float | None) -> int | None:
        """The next of the signals that comes; None when the time is over."""
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            if (number := os.read(self._pipe, 1)[0]) in ENDING:
                return number
