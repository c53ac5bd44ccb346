"""A local Ray."""

import os
import subprocess
import sys

import pytest

from cluster.session import ROOT

PROGRAM = """
import os
from cluster.config import Cluster
from cluster.session import Session

os.sched_setscheduler(0, os.SCHED_{}, os.sched_param(0))
with Session(Cluster(cpus=1)) as session:
    session.start()
    import ray

    @ray.remote
    def policies():
        return [os.sched_getscheduler(process) for process in (os.getpid(), os.getppid())]

    print(os.sched_getscheduler(0), *ray.get(policies.remote()))
print(os.sched_getscheduler(0))
"""


@pytest.mark.parametrize(
    ("before", "meanwhile"),
    [("OTHER", os.SCHED_BATCH), ("IDLE", os.SCHED_IDLE)],
    ids=["default", "of the user's choice"],
)
def test_a_local_ray_is_a_batch_unless_the_user_chose_a_policy(before: str, meanwhile: int) -> None:
    program = [sys.executable, "-c", PROGRAM.format(before)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    then = getattr(os, f"SCHED_{before}")
    assert [int(policy) for policy in done.stdout.split()] == [meanwhile, meanwhile, meanwhile, then]
