"""Whole commands in processes of their own: started, signaled, and what they leave."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
INTERRUPTED = "error: interrupted; what is finished is kept: run the same command to go on"


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit status.
        out: its standard output.
        errors: the lines of its standard error that hold something.
        left: command lines of the processes that it started and that are still there.
        seconds: from the signal to the end.
    """

    code: int
    out: str
    errors: list[str]
    left: list[str]
    seconds: float


class Command:
    """A program of Python in a session (setsid) of its own, which it shares with all that it starts; not so much as a Ray outlives it."""

    def __init__(self, *words: str, folder: Path, environment: dict[str, str] | None = None) -> None:
        self._out, self._errors = folder / f"out-{time.monotonic_ns()}", folder / f"errors-{time.monotonic_ns()}"
        with self._out.open("w") as out, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Waits until the condition holds; False when the command has ended before."""
        until = time.monotonic() + 300
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < until, self.out
            time.sleep(0.05)
        return False

    def send(self, number: signal.Signals, whom: str) -> None:
        """Sends a signal to the process alone, to its `group` (as a terminal does), or to `all` of its processes (as Slurm does)."""
        if whom == "all":
            for pid in self._processes():
                os.kill(pid, number)
        elif whom == "group":
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def _processes(self) -> dict[int, str]:
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
            except OSError:
                continue
        return found

    def end(self, seconds: float = 60) -> Ended:
        """Waits for its end."""
        began = time.monotonic()
        try:
            code = self.process.wait(seconds)
            took, left = time.monotonic() - began, self._processes()
            while left and time.monotonic() - began < took + 2:  # what was killed takes a moment
                time.sleep(0.05)
                left = self._processes()
        finally:
            for pid in self._processes():
                os.kill(pid, signal.SIGKILL)
        errors = [line for line in self._errors.read_text().splitlines() if line.strip()]
        return Ended(code, self.out, errors, list(left.values()), took)
