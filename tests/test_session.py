"""A local Ray, as `cluster.session` starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import processes
from cluster.config import Cluster
from cluster.session import ROOT, Session
from commands import Command

pytestmark = pytest.mark.usefixtures("ray_local")


def test_workers_import_this_checkout() -> None:
    import ray

    @ray.remote
    def path() -> str:
        return os.environ["PYTHONPATH"]

    assert ray.get(path.remote()).split(os.pathsep)[0] == str(ROOT)
    assert str(ROOT) not in os.environ.get("PYTHONPATH", "").split(os.pathsep)  # it is set for Ray's processes alone


def test_it_has_no_dashboard() -> None:
    import ray

    assert not ray.init(ignore_reinit_error=True).dashboard_url


@pytest.mark.slow
@pytest.mark.parametrize(("token", "joined"), [({}, True), ({"RAY_AUTH_TOKEN": "wrong"}, False)])
def test_whoever_joins_needs_its_token(token: dict[str, str], joined: bool) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    join = f"import ray; ray.init(address={address!r}, log_to_driver=False, logging_level='ERROR')"
    environment = {**os.environ, **token, "RAY_NUM_REDIS_GET_RETRIES": "1"}  # else a refusal takes 24 s
    ended = subprocess.run([sys.executable, "-c", join], env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode == 0) is joined, ended.stderr
    assert ("InvalidAuthToken" in ended.stderr) is not joined


def test_its_token_is_its_owners_alone(private_home: Path) -> None:
    assert (private_home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_it_is_quiet(tmp_path: Path) -> None:
    """Nothing of what Ray, Ray Data and its workers say reaches the user, who has not asked for it."""
    program = """
from cluster.config import Cluster
from cluster.session import Session

with Session(Cluster(cpus=1, object_store_mib=128)) as session:
    session.start()
    import ray.data
    assert ray.data.range(3).map(lambda row: print("worker") or row).sum("id") == 3
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


STUBBORN = """
import atexit, subprocess, time
from cluster.config import Cluster
from cluster.session import Session

class Stubborn:
    def __init__(self):
        atexit.register(time.sleep, 600)
        script = "trap '' TERM; while :; do sleep 1; done"
        self.child = subprocess.Popen(["sh", "-c", script])
    def ready(self):
        pass

beside = subprocess.Popen(["sleep", "600"])  # of this program, not of Ray
with Session(Cluster(cpus=1, object_store_mib=128)) as session:
    session.start()
    import ray
    held = ray.remote(Stubborn).remote()
    ray.get(held.ready.remote())
    began = time.monotonic()
assert beside.poll() is None
beside.kill()
beside.wait()
print("ended", time.monotonic() - began)
"""


@pytest.mark.slow
def test_no_process_outlives_it(tmp_path: Path) -> None:
    """Not one that hangs at its exit, nor what a worker has started and nothing but SIGKILL ends."""
    ended = Command("-c", STUBBORN, folder=tmp_path).end(120)
    assert (ended.code, ended.errors, ended.left) == (0, [], [])
    assert float(ended.out.split()[-1]) < 10


@pytest.mark.slow
def test_it_ends_as_soon_as_ray_does(tmp_path: Path) -> None:
    """Waiting for the processes costs nothing where all are well."""
    program = """
import time
from cluster import processes
from cluster.config import Cluster
from cluster.session import Session
end, took = processes.end, []
def timed(found):
    began = time.monotonic()
    end(found)
    took.append(time.monotonic() - began)
processes.end = timed
with Session(Cluster(cpus=1, object_store_mib=128)) as session:
    session.start()
print(*took)
"""
    ended = Command("-c", program, folder=tmp_path).end(120)
    assert (ended.code, ended.errors, ended.left) == (0, [], [])
    assert float(ended.out) < 0.9


def test_a_ray_that_was_there_is_left_alone() -> None:
    import ray

    before = processes.children()
    with Session(Cluster()) as session:
        session.start()
    assert ray.is_initialized()
    assert before <= processes.children()
