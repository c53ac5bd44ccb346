"""A local Ray."""

import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.session import ROOT, SCHED_SETATTR, SPARING, TURN_SECONDS, _batch, _schedule

PROGRAM = """
import json, os
from cluster.config import Cluster
from cluster.session import SPARING, Session

os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
with Session(Cluster(cpus=1)) as session:
    session.start()
    import ray

    @ray.remote
    def seen():
        policies = [os.sched_getscheduler(process) for process in (os.getpid(), os.getppid())]
        return policies, {name: os.environ.get(name) for name in SPARING}

    policies, settings = ray.get(seen.remote())
    policies.insert(0, os.sched_getscheduler(0))
policies.append(os.sched_getscheduler(0))
print(json.dumps([policies, settings, sorted(SPARING.keys() & os.environ.keys())]))
"""


def test_a_local_ray_is_a_batch_and_spares_what_the_user_has_not_set() -> None:
    chosen = {"RAY_event_stats": "1"}
    environment = {name: value for name, value in os.environ.items() if name not in SPARING} | chosen
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    policies, settings, left = json.loads(done.stdout)
    assert policies == [*3 * [os.SCHED_BATCH], os.SCHED_OTHER]
    assert settings == {**SPARING, **chosen}
    assert left == list(chosen)


def turn() -> float:
    """Seconds that this thread may compute for while others wait."""
    for line in Path("/proc/thread-self/sched").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "se.slice":
            return int(value) / 1e9
    pytest.skip("this Linux has one length of turns for all")


@pytest.mark.skipif(
    platform.machine() not in SCHED_SETATTR or not Path("/proc/thread-self/sched").exists(),
    reason="turns are not lengthened here, or not told",
)
def test_a_batch_has_long_turns_and_keeps_its_niceness() -> None:
    def lengths() -> list[float]:
        _schedule(os.SCHED_OTHER)  # the tests' own Ray may have made it a batch
        os.setpriority(os.PRIO_PROCESS, 0, 3)
        before = turn()
        with _batch():
            meanwhile, nice = turn(), os.getpriority(os.PRIO_PROCESS, 0)
        return [before, meanwhile, turn(), nice]

    with ThreadPoolExecutor(1) as pool:  # all of it is a thread's own
        before, meanwhile, after, nice = pool.submit(lengths).result()
    if meanwhile == before and tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 12):
        pytest.skip("this Linux has one length of turns for all")
    assert before < meanwhile == TURN_SECONDS
    assert (after, nice) == (before, 3)


@pytest.mark.parametrize("numbers", [{}, {platform.machine(): 10**6}], ids=["unknown machine", "refused"])
def test_without_long_turns_it_is_a_batch_all_the_same(
    monkeypatch: pytest.MonkeyPatch, numbers: dict[str, int]
) -> None:
    monkeypatch.setattr("cluster.session.SCHED_SETATTR", numbers)

    def policies() -> list[int]:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        with _batch():
            meanwhile = os.sched_getscheduler(0)
        return [meanwhile, os.sched_getscheduler(0)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(policies).result() == [os.SCHED_BATCH, os.SCHED_OTHER]


def test_a_policy_that_the_user_chose_stays() -> None:
    def chosen() -> list[int]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with _batch():
            meanwhile = os.sched_getscheduler(0)
        return [meanwhile, os.sched_getscheduler(0)]

    with ThreadPoolExecutor(1) as pool:  # a policy is a thread's own
        assert pool.submit(chosen).result() == [os.SCHED_IDLE, os.SCHED_IDLE]
