"""Many tasks over Ray with few in flight: a parallel map, and a scatter whose results stay where they were made.

Both keep the number of unfinished tasks bounded, retry a task whose worker or node died or that met an OSError (a store
that failed for a moment), and raise what a task raised as it was, without Ray's wrapping.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import StageError, TophatError, one_line

if TYPE_CHECKING:  # Ray reads its environment when it is imported, and a session sets that first
    import ray

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3


def parallel_map(
    fn: Callable[[T], R], items: Iterable[T], *, in_flight: int | None = None, num_cpus: float = 1.0
) -> Iterator[R]:
    """`fn` of every item, each in its own Ray task; results in the order in which they arrive.

    Args:
        fn: picklable; its result should be small, because it travels to the caller.
        items: drawn from lazily, so a generator of large arguments is held only as far as tasks are in flight.
        in_flight: unfinished tasks at most; by default twice what the cluster's CPUs run at once.
        num_cpus: what each task reserves.

    Raises:
        whatever `fn` raised; tasks that have not ended are left to Ray, which ends them with the job.
    """
    import ray

    flight = _Flight(in_flight, num_cpus)
    for item in items:
        while flight.full:
            yield from (ray.get(result) for (result,) in flight.land())
        flight.launch(fn, item)
    while flight.busy:
        yield from (ray.get(result) for (result,) in flight.land())


def scatter(
    fn: Callable[..., tuple[Any, ...]],
    items: Iterable[tuple[object, ...]],
    *,
    values: int,
    in_flight: int | None = None,
    num_cpus: float = 1.0,
) -> "Iterator[tuple[Any, list[ray.ObjectRef[Any]]]]":
    """`fn(*item)` for every item, each in its own Ray task, where most of what it returns stays in the object store.

    So results go to the tasks that need them without passing through the caller: `values` is usually the number of
    those, and each gets its own share of every result.

    Args:
        fn: picklable; returns a note, which should be small, and then `values` objects.
        items: arguments; references among them are resolved. Drawn from lazily, after earlier results were yielded.
        values: how many objects follow the note.
        in_flight: unfinished tasks at most; by default twice what the cluster's CPUs run at once.
        num_cpus: what each task reserves.

    Returns:
        Notes, and references to the objects that came with each, in the order in which they arrive.

    Raises:
        whatever `fn` raised; tasks that have not ended are left to Ray, which ends them with the job.
    """
    import ray

    flight = _Flight(in_flight, num_cpus, values + 1)
    drawn = iter(items)
    while True:
        while flight.full:
            yield from ((ray.get(note), rest) for note, *rest in flight.land())
        if (item := next(drawn, None)) is None:
            break
        flight.launch(fn, *item)
    while flight.busy:
        yield from ((ray.get(note), rest) for note, *rest in flight.land())


def run_task(fn: Callable[..., R], *args: object, num_cpus: float = 1.0) -> R:
    """`fn(*args)` in one Ray task, with the retries and errors of the others; references among `args` are resolved."""
    import ray

    flight = _Flight(1, num_cpus)
    flight.launch(fn, *args)
    result: R = ray.get(flight.land()[0][0])
    return result


def _run(fn: Callable[..., Any], several: bool, *args: object) -> tuple[Any, ...]:
    found = fn(*args)
    return (None, *found) if several else (None, found)


def cpus() -> float:
    """CPUs of the cluster that Ray is connected to, at least 1."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1.0, resources.get("CPU", 0.0))


class _Flight:
    """The unfinished tasks.

    A task has a marker, which tells the caller that it succeeded, and results, which stay where they are. None is ever canceled: in Ray
    2.60, canceling a task that is just about to end can end the caller ("Tried to complete task that was not pending").
    """

    def __init__(self, limit: int | None, num_cpus: float, results: int | None = None) -> None:
        import ray

        self._limit = limit or max(2, int(2 * cpus() / num_cpus))
        remote: Any = ray.remote
        options = {"num_cpus": num_cpus, "max_retries": RETRIES, "retry_exceptions": [OSError]}
        self._task = remote(num_returns=1 + (results or 1), **options)(_run)
        self._several = results is not None
        self._functions: dict[Callable[..., Any], Any] = {}
        self._values: dict[Any, list[Any]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._values)

    @property
    def full(self) -> bool:
        return len(self._values) >= self._limit

    def launch(self, fn: Callable[..., Any], *args: object) -> None:
        import ray

        if fn not in self._functions:
            self._functions[fn] = ray.put(fn)  # shipped once, whatever it carries
        marker, *values = self._task.remote(self._functions[fn], self._several, *args)
        self._values[marker] = values

    def land(self) -> list[list[Any]]:
        """Waits until a task is finished; the results (references) of all that are."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        markers, _ = ray.wait(list(self._values), num_returns=1)
        values = [self._values.pop(marker) for marker in markers]
        try:
            ray.get(markers)
        except RayTaskError as error:
            raise _original(error) from None
        except RayError as error:
            raise StageError(f"a task was lost {RETRIES + 1} times: {one_line(str(error))}") from None
        return values


def _original(error: BaseException) -> BaseException:
    """What the task itself raised: Ray wraps it, once per task that it passed through."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


@contextmanager
def told_errors() -> Iterator[None]:
    """In a function that Ray Data runs: makes an error of ours of whatever is raised, as only those reach the driver whole.

    Raises:
        TophatError: what was raised, where it is one; else a StageError with its type and its text on one line.
    """
    try:
        yield
    except Exception as error:
        original = _original(error)
        if isinstance(original, TophatError):
            raise original from None
        raise StageError(_described(original)) from error


def original_errors(items: Iterator[T]) -> Iterator[T]:
    """The same items; what work in other processes raised comes out of whatever Ray Data wrapped around it.

    It is raised alone, and what it came out of is gone by then: that refers to the work, and so would keep its actors, with their CPUs.

    Raises:
        TophatError: the one that `told_errors` raised there; a StageError for what Ray itself met.
    """
    from ray.exceptions import RayError

    failure: TophatError | None = None
    try:
        yield from items
    except RayError as error:
        failure = _told(error)
    if failure is not None:
        gc.collect()  # it is in a cycle
        raise failure


def _told(error: Exception) -> TophatError:
    """What `original_errors` raises."""
    from ray.exceptions import RayError

    original = _original(error)
    if isinstance(original, TophatError):
        return original
    lines = str(original).strip().split("\n")
    # Ray's own errors end with the reason, and it ends those of others with advice.
    return StageError(_described(original, lines[-1 if isinstance(original, RayError) else 0]))


def _described(error: BaseException, text: str | None = None) -> str:
    return one_line(f"{type(error).__name__}: {str(error) if text is None else text}")[:500].removesuffix(":")
