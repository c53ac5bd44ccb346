"""A local Ray."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from cluster.session import ROOT, _batch

PROGRAM = """
import os
from cluster.config import Cluster
from cluster.session import Session

os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
with Session(Cluster(cpus=1)) as session:
    session.start()
    import ray

    @ray.remote
    def policies():
        return [os.sched_getscheduler(process) for process in (os.getpid(), os.getppid())]

    print(os.sched_getscheduler(0), *ray.get(policies.remote()))
print(os.sched_getscheduler(0))
"""


def test_a_local_ray_is_a_batch_for_as_long_as_it_lasts() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [int(policy) for policy in done.stdout.split()] == [*3 * [os.SCHED_BATCH], os.SCHED_OTHER]


def test_a_policy_that_the_user_chose_stays() -> None:
    def chosen() -> list[int]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with _batch():
            meanwhile = os.sched_getscheduler(0)
        return [meanwhile, os.sched_getscheduler(0)]

    with ThreadPoolExecutor(1) as pool:  # a policy is a thread's own
        assert pool.submit(chosen).result() == [os.SCHED_IDLE, os.SCHED_IDLE]
