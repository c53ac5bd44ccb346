"""The signals that end a command: Ctrl-C, what schedulers send before they kill, and a terminal that closes.

Each means the same in every command and stage: KeyboardInterrupt in the main thread, so that whatever is open is closed in order.
"""

import os
import select
import signal
import threading
import time
from types import FrameType

from cluster import processes

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 1.0
"""A signal so soon after the first one is a part of it: `timeout` and schedulers tell a process, and then its whole group."""
PATIENCE_SECONDS = 20.0
"""For the end in order. Slurm and Kubernetes kill 30 s after they have asked."""
INTERRUPTED = "interrupted; what is finished is kept: run the same command to go on"


class Interruption:
    """Watches for the first of `ENDING`, from now until this process is gone.

    That one raises KeyboardInterrupt in the main thread. A second one, or `PATIENCE_SECONDS` without an end, end the process and all that it
    started at once, wherever the main thread is. Signals that this process was started to ignore (`nohup`) stay ignored.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The number of the first one; None until there is one."""
        self.over = False
        """Whether the work is done, so that there is nothing left to interrupt."""
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._raise)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return 128 + (self.signal or 0)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and not self.over:
            self.signal = number
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """A thread of its own: handlers run in the main thread, which may be in a call that does not come back."""
        first = self._next(None)
        same, last = time.monotonic() + SAME_SECONDS, time.monotonic() + PATIENCE_SECONDS
        while self._next(last) is not None and time.monotonic() < same:
            pass
        processes.send(signal.SIGKILL, processes.family(processes.children()))
        os.write(2, f"error: {INTERRUPTED}\n".encode())
        os._exit(128 + (self.signal or first or 0))

    def _next(self, until: float | None) -> int | None:
        """The next of the signals that comes; None when the time is over."""
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            if (number := os.read(self._pipe, 1)[0]) in ENDING:
                return number
