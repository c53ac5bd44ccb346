"""Where a training worker was when it failed: at which step, and for a crash the stack of its threads.

A process that a signal ends cannot report anything. So each worker keeps its step in a small file on its own node, through memory that
the system writes out whatever becomes of the process, and Python writes the stack into the same file when the process crashes. Only after
a failure does anybody read the files, on every node.
"""

import faulthandler
import mmap
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import StorageError, TophatError, one_line

STEP = struct.Struct("<q")
READ_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Trace:
    """What a worker left behind.

    Attributes:
        rank: of the worker.
        step: that it was at, counted from 1; 0 before the first.
        stack: what Python's `faulthandler` wrote when the process crashed; empty if it did not crash.
    """

    rank: int
    step: int
    stack: str

    @property
    def crash(self) -> str:
        """The kind of crash, in `faulthandler`'s words ("Segmentation fault"); empty if there was none."""
        return self.stack.partition("\n")[0].rpartition(": ")[2].strip()


class Tracer:
    """A worker's side."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def at(self, step: int) -> None:
        """Notes the step that begins."""
        STEP.pack_into(self._memory, 0, step)


@contextmanager
def traced(key: str, rank: int) -> Iterator[Tracer]:
    """Keeps a trace of this process while the block runs.

    Args:
        key: of the training on this try; a file name.
        rank: of this worker.
    """
    path = _path(key, rank)
    with path.open("wb+", buffering=0) as file:
        file.write(STEP.pack(0))
        with mmap.mmap(file.fileno(), STEP.size) as memory:
            faulthandler.enable(file)
            try:
                yield Tracer(memory)
            finally:
                faulthandler.enable(sys.__stderr__ or 2, all_threads=False)  # as Ray has it
    path.unlink()  # not after an exception: its step is wanted


def collect(key: str) -> list[Trace]:
    """The traces that the workers left on any node that is alive, sorted by rank; they are removed."""
    read: Any = ray.remote(num_cpus=0, max_retries=0)(_collect_here)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    asked = [
        read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(key) for node in nodes
    ]
    found: list[Trace] = []
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=READ_SECONDS)
    for answer in answered:
        with suppress(RayError):  # a node that was lost in the meantime
            found += ray.get(answer)
    return sorted(found, key=lambda trace: trace.rank)


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure of a group of workers.

    Attributes:
        rank: of the worker that failed first, as far as that can be known.
        cause: what ended it; of Ray where its process died, none where Ray did not notice yet.
        trace: what it left behind; none where its node was lost.
    """

    rank: int
    cause: Exception | None
    trace: Trace | None

    @property
    def died(self) -> bool:
        """Whether the process died, rather than raise an error."""
        return self.cause is None or isinstance(self.cause, RayActorError)

    def repeats(self, earlier: "Failure") -> bool:
        """Whether it is the same failure again, which will come at every try: at the same step, and no store's or network's."""
        if self.trace is None or earlier.trace is None or isinstance(self.cause, OSError | StorageError):
            return False
        begun = self.trace.step > 0 or bool(self.trace.crash)  # workers that do not find each other may do so later
        return begun and self.trace.step == earlier.trace.step


def failure_of(errors: Mapping[int, Exception], traces: Sequence[Trace]) -> Failure:
    """The failure at the root of what all workers met: when one dies, the others lose their connections.

    Args:
        errors: of the workers by rank, as Ray Train has them.
        traces: of that try.
    """
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in errors.items()}
    crashed = [trace.rank for trace in traces if trace.crash]
    dead = [rank for rank, cause in causes.items() if isinstance(cause, RayActorError)]
    ours = [rank for rank, cause in causes.items() if isinstance(cause, TophatError)]
    rank = min(crashed or dead or ours or causes)
    return Failure(rank, causes.get(rank), next((trace for trace in traces if trace.rank == rank), None))


def described(failures: Sequence[Failure], allowed: int, log: str) -> str:
    """The last of some failures on one line, with what to do.

    Args:
        failures: all of a training, at least one.
        allowed: `max_failures`.
        log: the file in which the rest is.
    """
    last = failures[-1]
    crash = last.trace.crash if last.trace else ""
    if crash:
        verb, why = "crashed", crash
        fix = f"{log} shows where; the network, or a library under it, cannot do that step: change its sizes or that library"
    elif last.died:
        verb, why = "died", "it had no time to say why"
        fix = f"it was killed, often for want of memory (lower batch_size), or its node was lost; see {log}"
    else:
        verb, why = "failed", _shortened(last.cause)
        fix = f"see {log}"
    where = (
        "" if last.trace is None else f" at step {last.trace.step:,}" if last.trace.step else " before its first step"
    )
    if len(failures) > 1 and last.repeats(failures[-2]):
        times = ", twice at the same step"
    else:
        times = f", failure {len(failures)} (max_failures = {allowed})"
    return one_line(f"worker {last.rank} {verb}{where} ({why}){times}; {fix}")


def _collect_here(key: str) -> list[Trace]:
    found = []
    for path in _path(key, "*").parent.glob(_path(key, "*").name):
        data = path.read_bytes()
        path.unlink()
        stack = data[STEP.size :].decode(errors="replace")
        found.append(Trace(int(path.name.rpartition("-")[2]), STEP.unpack_from(data)[0], stack))
    return found


def _path(key: str, rank: int | str) -> Path:
    return Path(tempfile.gettempdir(), f"tophat-{key}-{rank}")


def _shortened(error: Exception | None, limit: int = 300) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= limit else f"{text[:limit]}…"
