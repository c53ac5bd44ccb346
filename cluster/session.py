"""Starting Ray, or joining a cluster, and leaving it again."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import ENVIRONMENT
from cluster.config import Cluster
from cluster.errors import Interrupted, ResourceError

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: what workers import `pipeline`, `tuning`, `models` and `cluster` from."""


class Session:
    """Ray for the length of a `with` block: a local one, or the cluster at `cluster.address` (or of the job this process runs in).

    Nothing starts until `start` is called, so that work which finds everything finished does not wait for Ray. A local Ray requires
    its token, has no dashboard, and ends with the block.

    Args:
        cluster: where.
        on_start: called once Ray runs; raises when the cluster will not do.
        verbose: shows Ray's own messages.
    """

    def __init__(self, cluster: Cluster, *, on_start: Callable[[], None] | None = None, verbose: bool = False) -> None:
        self._cluster = cluster
        self._on_start = on_start
        self._verbose = verbose
        self._started = False
        self._owned = False

    def __enter__(self) -> "Session":
        return self

    def start(self) -> None:
        """Makes sure that Ray runs; where this process has one already, that one is used and left running.

        Raises:
            ResourceError: nothing answers at the address.
        """
        if self._started:
            return
        import ray

        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS") or self._cluster.address
            _connect(address, self._cluster, self._verbose)
            self._owned = True
        self._started = True
        if self._on_start is not None:
            self._on_start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._owned:
            import ray

            ray.shutdown()
        if kind is KeyboardInterrupt:
            raise Interrupted("interrupted; what is finished is kept: run the same command to go on") from None


def _connect(address: str, cluster: Cluster, verbose: bool) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.INFO if verbose else logging.ERROR, "log_to_driver": verbose}
    inherited: dict[str, str] = {}
    if address == "local":
        _tighten_token()
        # Inherited, and not a runtime environment: Ray starts its first workers at once, and would start others for that.
        inherited["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        options |= {
            "num_cpus": cluster.cpus or len(os.sched_getaffinity(0)),
            "num_gpus": cluster.gpus,
            "object_store_memory": cluster.object_store_mib and cluster.object_store_mib * 2**20,
            "include_dashboard": False,
        }
    else:
        options["runtime_env"] = {"env_vars": {name: os.environ[name] for name in ENVIRONMENT}}
    try:
        with _environment(inherited):
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        rule = f"no Ray cluster could be used ({str(error).strip().splitlines()[0]})"
        raise ResourceError("cluster.address", address, rule, "start one, or set it to local") from None
    _tighten_token()
    if not verbose:
        _quiet()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes that the block starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _tighten_token() -> None:
    """Ray writes the token of a local cluster readable by everyone; only its owner should read it."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.is_file() and token.stat().st_mode & 0o077:
        token.chmod(0o600)


def _quiet() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised, and told in one line
