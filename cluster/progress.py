"""Live progress of work that happens in other processes, or in this one.

The board holds the state of the task under way. It is an actor, or an object of this process. Whoever works holds a `Progress`, a handle, and
sends counts; to an actor, without waiting, and the handle can be pickled. The driver draws them. It is display only: no result depends on it.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0


@dataclass
class State:
    """What the workers of one task have said: counts of items, and facts (a loss, an accuracy) by name."""

    done: int = 0
    rejected: int = 0
    total: int | None = None
    facts: dict[str, float] = field(default_factory=dict)


class Board:
    """What is behind `Progress`: the latest state of every part of every task."""

    def __init__(self) -> None:
        self._tasks: dict[str, dict[str, State]] = {}

    def set(self, task: str, part: str, state: State) -> None:
        self._tasks.setdefault(task, {})[part] = state

    def add(self, task: str, part: str, done: int, rejected: int) -> None:
        state = self._tasks.setdefault(task, {}).setdefault(part, State())
        state.done += done
        state.rejected += rejected

    def get(self, task: str) -> State:
        parts = list(self._tasks.get(task, {}).values())
        facts = {name: value for state in parts for name, value in state.facts.items()}
        totals = [state.total for state in parts if state.total is not None]
        return State(sum(s.done for s in parts), sum(s.rejected for s in parts), sum(totals) if totals else None, facts)


@dataclass(frozen=True)
class Progress:
    """A handle that workers report to. Without a board it does nothing."""

    task: str = ""
    board: Any = None
    name: str = ""

    def part(self, name: str) -> "Progress":
        """A handle for a share of the task; the shares' counts are added up."""
        return Progress(self.task, self.board, name)

    def update(self, done: int, rejected: int = 0, *, total: int | None = None, **facts: float) -> None:
        """Sets the absolute counts, any facts, and the total where it is known only now (or estimated)."""
        if self.board is not None:
            _method(self.board, "set")(self.task, self.name, State(done, rejected, total, facts))

    def add(self, done: int = 0, rejected: int = 0) -> None:
        """Adds to the counts; for many workers that each know only their own share."""
        if self.board is not None:
            _method(self.board, "add")(self.task, self.name, done, rejected)


def _method(board: Any, name: str) -> Callable[..., Any]:
    """A method of the board; an actor's returns at once."""
    method = getattr(board, name)
    return method if isinstance(board, Board) else method.remote  # type: ignore[no-any-return]


SILENT = Progress()


class _Pace:
    """How fast a task goes, counted from its first report: starting processes is not part of the rate."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def text(self, done: int, total: int | None) -> str:
        """Rate and time left, as text."""
        now = time.monotonic()
        if done and self._first is None:
            self._first = (now, done)
        if self._first is None:
            return "starting"
        seconds, counted = now - self._first[0], done - self._first[1]
        if not counted or not seconds:
            return ""
        rate = counted / seconds
        text = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
        return f"{text}, {_clock((total - done) / rate)} left" if total and total > done else text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """Draws tasks on a terminal as a live bar, and elsewhere (a job's log) as a line every ten seconds.

    Args:
        console: where to draw.
        enabled: False draws nothing and starts no actor.
        here: the work happens in one thread of this process, without Ray.
    """

    def __init__(self, console: Console, enabled: bool = True, here: bool = False) -> None:
        self.console = console
        self._enabled = enabled
        self._board: Any = Board() if here else None

    def _handle(self, task: str) -> Progress:
        if self._board is None:
            import ray

            self._board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
        return Progress(task, self._board)

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "images") -> Iterator[Progress]:
        """Shows one task while the block runs.

        Args:
            name: a stage's name.
            total: how many items there will be, if known.
            unit: what the counts count.
        """
        if not self._enabled:
            yield SILENT
            return
        handle = self._handle(f"{name}/{time.monotonic_ns()}")
        stop = threading.Event()
        draw = self._draw_live if self.console.is_terminal else self._draw_lines
        thread = threading.Thread(target=draw, args=(name, total, unit, handle, stop), daemon=True)
        thread.start()
        try:
            yield handle
        finally:
            stop.set()
            thread.join(timeout=10)

    def _read(self, handle: Progress) -> State | None:
        if isinstance(handle.board, Board):
            return handle.board.get(handle.task)
        import ray

        try:
            state: State = ray.get(handle.board.get.remote(handle.task), timeout=5)
        except ray.exceptions.RayError:
            return None  # the board is starting or restarting: the next poll asks again
        return state

    def _nothing_to_do(self, state: State) -> bool:
        """Whether a task of this process ends without having begun; a worker's report may just not have come."""
        return isinstance(self._board, Board) and state == State()

    def _draw_live(self, name: str, total: int | None, unit: str, handle: Progress, stop: threading.Event) -> None:
        columns = [
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            TextColumn("{task.fields[pace]}", markup=False, style="cyan"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        ]
        with RichProgress(*columns, console=self.console, refresh_per_second=4) as bars:
            bar: TaskID = bars.add_task(name, total=total, note="", pace="starting")
            pace = _Pace()
            while True:
                last = stop.wait(POLL_SECONDS)
                if (state := self._read(handle)) is not None:
                    done, of = state.done + state.rejected, state.total or total
                    bars.update(bar, completed=done, total=of, note=_note(state), pace=pace.text(done, of))
                if last:
                    bars.live.transient = state is not None and self._nothing_to_do(state)
                    return

    def _draw_lines(self, name: str, total: int | None, unit: str, handle: Progress, stop: threading.Event) -> None:
        started, next_line, pace = time.monotonic(), LINE_SECONDS, _Pace()
        while True:
            last = stop.wait(POLL_SECONDS)
            seconds = time.monotonic() - started
            state = self._read(handle)
            if state is not None:
                text = pace.text(state.done + state.rejected, state.total or total)
                if seconds >= next_line or (last and not self._nothing_to_do(state)):
                    self._print_line(name, total, unit, state, text, seconds)
                    next_line = seconds + LINE_SECONDS
            if last:
                return

    def _print_line(self, name: str, total: int | None, unit: str, state: State, pace: str, seconds: float) -> None:
        done = state.done + state.rejected
        total = state.total or total
        of = f" of {total:,}" if total else ""
        parts = [f"{name}: {done:,}{of} {unit}", pace, _clock(seconds), _note(state)]
        self.console.print(", ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()


def _note(state: State) -> str:
    parts = [f"{state.rejected:,} rejected"] if state.rejected else []
    parts += [f"{name} {value:.4g}" for name, value in state.facts.items()]
    return " ".join(parts)
