"""A local Ray, as `cluster.session` starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.session import ROOT

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
