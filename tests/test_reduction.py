"""The parallel map and the tree reduction: right under any grouping, bounded, retrying, honest about errors."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cluster.errors import SourceError
from cluster.reduction import parallel_map, tree_reduce

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module", autouse=True)
def functions_travel_by_value() -> Iterator[None]:
    """Workers cannot import this module."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    yield
    cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]


def _words(numbers: Sequence[frozenset[int]]) -> frozenset[int]:
    assert 2 <= len(numbers) <= 3
    return frozenset().union(*numbers)


def _single(number: int) -> frozenset[int]:
    return frozenset([number])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 23])
def test_every_item_is_merged_once_whatever_the_count(count: int) -> None:
    import ray

    result = ray.get(tree_reduce(_single, range(count), _words, fan_in=3, in_flight=3))
    assert result == frozenset(range(count))


def _sum(numbers: Sequence[int]) -> int:
    return sum(numbers)


def test_sum_counts_nothing_twice() -> None:
    import ray

    assert ray.get(tree_reduce(abs, range(-30, 1), _sum, fan_in=4)) == sum(range(31))


def test_no_items_is_an_error() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        tree_reduce(_single, [], _words)


def test_fan_in_below_two_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        tree_reduce(_single, [1], _words, fan_in=1)


def test_items_are_drawn_only_as_tasks_finish() -> None:
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


def test_an_error_arrives_as_it_was_raised() -> None:
    with pytest.raises(SourceError) as caught:
        list(parallel_map(_refuse, range(8)))
    assert str(caught.value) == "scores = 'file-5': is bad; repair it"
    assert type(caught.value) is SourceError
    assert caught.value.value == "file-5"


def test_an_error_in_a_map_of_a_reduction_arrives_as_it_was_raised() -> None:
    with pytest.raises(SourceError, match="'file-5'"):
        tree_reduce(_refuse, range(8), _sum)


def _fails_at_first(path: str) -> int:
    with open(path, "a") as file:
        file.write("x")
    tries = len(Path(path).read_text())
    if tries == 1:
        raise OSError("the store is slow")
    if tries == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return tries


def test_store_errors_and_killed_workers_are_retried(tmp_path: Path) -> None:
    assert list(parallel_map(_fails_at_first, [str(tmp_path / "tries")])) == [3]


def _always_fails(_: int) -> int:
    raise OSError("the store is gone")


def test_a_store_that_stays_away_is_an_error() -> None:
    with pytest.raises(OSError, match="the store is gone"):
        list(parallel_map(_always_fails, [0]))


def _note(path: str) -> str:
    Path(path).touch()
    time.sleep(0.2)
    return path


def test_at_most_the_given_number_is_in_flight(tmp_path: Path) -> None:
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
