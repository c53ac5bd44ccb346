"""A local Ray."""

import os

import pytest


@pytest.mark.usefixtures("ray_local")
def test_processes_of_a_local_ray_do_not_interrupt_what_computes() -> None:
    import ray

    @ray.remote
    def policies() -> list[int]:
        return [os.sched_getscheduler(process) for process in (os.getpid(), os.getppid())]

    assert [os.sched_getscheduler(0), *ray.get(policies.remote())] == 3 * [os.SCHED_BATCH]
