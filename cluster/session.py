"""Starting Ray, or joining a cluster, and leaving it again."""

import ctypes
import logging
import os
import platform
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import ENVIRONMENT
from cluster.config import Cluster
from cluster.errors import Interrupted, ResourceError

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: what workers import `pipeline`, `tuning`, `models` and `cluster` from."""


SPARING = {
    "RAY_event_stats": "0",  # how long each of its handlers took, written to logs: 1% of two cores
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # else all logs are looked for ten times a second: 0.6% of a core
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # what each process takes, for a dashboard that is not there: 0.3% of a core
    "RAY_enable_metrics_collection": "0",  # for the same: 0.3% of a core
    "RAY_task_events_report_interval_ms": "0",  # what became of each task, for the same: 0.2% of a core
}
"""What a local Ray does less of, where the user has not set it."""

TURN_SECONDS = 0.1
"""That a thread of a local Ray computes for, at most, while others wait; the longest that Linux allows."""

SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The number of that system call, which Python does not have."""


class Session:
    """Ray for the length of a `with` block: a local one, or the cluster at `cluster.address` (or of the job this process runs in).

    Nothing starts until `start` is called, so that work which finds everything finished does not wait for Ray. A local Ray requires
    its token, has no dashboard, and ends with the block. For as long, Linux schedules this thread, and the threads and processes that it
    starts, as a batch with long turns.

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
        self._exits = ExitStack()

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
            if address == "local":
                self._exits.enter_context(_batch())
            _connect(address, self._cluster, self._verbose)
            self._owned = True
        self._started = True
        if self._on_start is not None:
            self._on_start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._owned:
            import ray

            ray.shutdown()
        self._exits.close()
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
        # Without `verbose`, nobody reads its workers' logs.
        sparing = SPARING if verbose else {**SPARING, "LOG_NAME_UPDATE_INTERVAL_S": "86400"}
        inherited |= {name: os.environ.get(name, value) for name, value in sparing.items()}
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
def _batch() -> Iterator[None]:
    """Has this thread, and the threads and processes that it starts in the block, wait for their turn when they wake up (Linux's SCHED_BATCH),
    and take longer ones.

    Each of Ray's processes wakes a hundred times a second to look around, and may interrupt a forward pass each time.
    """
    normal = os.sched_getscheduler(0) == os.SCHED_OTHER  # else the user chose
    if normal:
        _schedule(os.SCHED_BATCH, TURN_SECONDS)
    try:
        yield
    finally:
        if normal:
            _schedule(os.SCHED_OTHER)


def _schedule(policy: int, seconds: float = 0) -> None:
    """Gives this thread a policy and, from Linux 6.12, turns of so many seconds before another thread has its own; 0: the system's choice.

    Where a sandbox refuses that, the policy alone; where it refuses both, neither.
    """
    # struct sched_attr: its size, policy, flags, nice, priority, runtime, deadline and period.
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("=IIQiIQQQ", 48, policy, 0, nice, 0, int(seconds * 1e9), 0, 0)
    number = SCHED_SETATTR.get(platform.machine())
    if number is None or ctypes.CDLL(None).syscall(number, 0, attributes, 0):
        with suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(0))


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
