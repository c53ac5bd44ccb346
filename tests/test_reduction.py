"""The parallel map and the scatter: complete, bounded, retrying, honest about errors."""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cluster.errors import RunError, SourceError, StageError, TophatError
from cluster.tasks import parallel_map, scatter, told_errors


@pytest.fixture
def on_ray(ray_local: None) -> Iterator[None]:
    """Ray, whose workers get this module's functions by value."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    yield
    cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]


def _digits(number: int, bases: Sequence[int]) -> tuple[int, ...]:
    return number, *(number % base for base in bases)


def _sum(*numbers: int) -> tuple[int, int]:
    return sum(numbers), len(numbers)


@pytest.mark.parametrize("count", [1, 2, 10, 23])
def test_notes_arrive_and_shares_go_on_to_other_tasks(count: int, on_ray: None) -> None:
    import ray

    notes, shares = [], []
    for note, rest in scatter(_digits, ((number, [3, 5, 7]) for number in range(count)), values=3, in_flight=3):
        notes.append(note)
        shares.append(rest)
    assert sorted(notes) == list(range(count))
    for base, column in zip([3, 5, 7], zip(*shares, strict=True), strict=True):
        ((total, (number,)),) = scatter(_sum, [column], values=1)
        assert total == sum(n % base for n in range(count))
        assert ray.get(number) == count


def test_a_later_item_can_depend_on_earlier_notes(on_ray: None) -> None:
    seen: list[int] = []

    def items() -> Iterator[tuple[int, list[int]]]:
        for _ in range(6):
            yield max(seen, default=0) + 1, []

    for note, _ in scatter(_digits, items(), values=0, in_flight=1):
        seen.append(note)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_items_are_drawn_only_as_tasks_finish(on_ray: None) -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(40):
            drawn += 1
            yield number

    results = parallel_map(abs, items(), in_flight=3)
    next(results)
    assert drawn <= 4
    assert len(list(results)) == 39
    assert drawn == 40


def _refuse(number: int) -> int:
    if number == 5:
        raise SourceError("scores", f"file-{number}", "is bad", "repair it")
    return number


def test_an_error_arrives_as_it_was_raised(on_ray: None) -> None:
    with pytest.raises(SourceError) as caught:
        list(parallel_map(_refuse, range(8)))
    assert str(caught.value) == "scores = 'file-5': is bad; repair it"
    assert type(caught.value) is SourceError
    assert caught.value.value == "file-5"


def _refuse_some(number: int) -> tuple[int]:
    return (_refuse(number),)


def test_an_error_in_a_scatter_arrives_as_it_was_raised(on_ray: None) -> None:
    with pytest.raises(SourceError, match="'file-5'"):
        list(scatter(_refuse_some, ((number,) for number in range(8)), values=0))


def _fails_at_first(path: str) -> int:
    with open(path, "a") as file:
        file.write("x")
    tries = len(Path(path).read_text())
    if tries == 1:
        raise OSError("the store is slow")
    if tries == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return tries


def test_store_errors_and_killed_workers_are_retried(tmp_path: Path, on_ray: None) -> None:
    assert list(parallel_map(_fails_at_first, [str(tmp_path / "tries")])) == [3]


def _always_fails(_: int) -> int:
    raise OSError("the store is gone")


def test_a_store_that_stays_away_is_an_error(on_ray: None) -> None:
    with pytest.raises(OSError, match="the store is gone"):
        list(parallel_map(_always_fails, [0]))


def _note(path: str) -> str:
    Path(path).touch()
    time.sleep(0.2)
    return path


def test_at_most_the_given_number_is_in_flight(tmp_path: Path, on_ray: None) -> None:
    names = [str(tmp_path / f"{number}") for number in range(4)]
    most = 0
    finished = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.01):
            most = max(most, sum(Path(name).exists() for name in names) - finished)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in parallel_map(_note, names, in_flight=1):
            finished += 1
    finally:
        stop.set()
        watcher.join()
    assert finished == 4
    assert most <= 2  # one that runs, and one whose end the caller has not heard of yet


class UnpicklableError(Exception):
    """As of a user's network: its arguments are not those it is made with."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one}\n{other}")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("two\nlines \x1b[1m"), "ValueError: two lines  [1m"),
        (AssertionError(), "AssertionError"),
        (KeyError("x"), "KeyError: 'x'"),
        (FileNotFoundError(2, "No such file", "weights"), "FileNotFoundError: [Errno 2] No such file: 'weights'"),
        (UnpicklableError("one", "other"), "UnpicklableError: one other"),
        (StageError("of ours"), "of ours"),
        (RunError("--out", "x", "is not empty", "give another"), "--out = 'x': is not empty; give another"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_task_of_ray_data_raises_is_told_whole(raised: Exception, told: str) -> None:
    with pytest.raises(TophatError) as caught, told_errors():
        raise raised
    error = caught.value
    assert type(error) is (type(raised) if isinstance(raised, TophatError) else StageError)
    error.args = (f"{error.args[0]}\nFailed to apply UDF transform after 1/1 attempts",)  # what Ray does on the way
    assert str(pickle.loads(pickle.dumps(error))) == told
