"""Starting Ray, or joining a cluster, and leaving it again."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import Cluster
from cluster.errors import ResourceError
from cluster.storage import CHECKSUM_ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: what workers import `pipeline`, `tuning`, `models` and `cluster` from."""

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "PYTHONWARNINGS": "ignore",
}


@contextlib.contextmanager
def session(cluster: Cluster, *, verbose: bool = False) -> Iterator[None]:
    """Ray for the length of a block: a local one, or the cluster at `cluster.address` (or of the job this process runs in).

    A local Ray always requires its token and listens on the loopback or the host's own address only for the block's length.

    Raises:
        ResourceError: nothing answers at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or cluster.address
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    level = logging.INFO if verbose else logging.ERROR
    environment = {name: os.environ[name] for name in (*CHECKSUM_ENVIRONMENT, *QUIET)}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "logging_level": level,
        "log_to_driver": verbose,
    }
    if address == "local":
        _tighten_token()
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        options |= {
            "num_cpus": cluster.cpus or len(os.sched_getaffinity(0)),
            "num_gpus": cluster.gpus,
            "object_store_memory": cluster.object_store_mib * 2**20,
            "include_dashboard": False,
        }
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            "cluster.address",
            address,
            f"no Ray cluster could be used ({str(error).strip().splitlines()[0]})",
            "start one, or set it to local",
        ) from None
    _tighten_token()
    _quiet_ray_data(verbose)
    try:
        yield
    finally:
        ray.shutdown()


def _tighten_token() -> None:
    """Ray writes the token of a local cluster readable by everyone; only its owner should read it."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.is_file() and token.stat().st_mode & 0o077:
        token.chmod(0o600)


def _quiet_ray_data(verbose: bool) -> None:
    if verbose:
        return
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
