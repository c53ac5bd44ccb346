"""Starting Ray, or joining a cluster, and leaving it again."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from psutil import Process

from cluster import ENVIRONMENT, environment, processes
from cluster.config import Cluster
from cluster.environment import ROOT as ROOT
from cluster.errors import ResourceError
from cluster.interrupt import Interruption


class Session:
    """Ray for the length of a `with` block: a local one, or the cluster at `cluster.address` (or at RAY_ADDRESS, as in a submitted job).

    Nothing starts until `start` is called, so that work which finds everything finished does not wait for Ray. A local Ray requires
    its token, has no dashboard, and ends with the block: no process of it is left.

    Args:
        cluster: where.
        on_start: called once Ray runs; raises when the cluster will not do.
        verbose: shows Ray's own messages.
        field: what the user calls the address.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        on_start: Callable[[], None] | None = None,
        verbose: bool = False,
        field: str = "cluster.address",
    ) -> None:
        self._cluster = cluster
        self._on_start = on_start
        self._verbose = verbose
        self._field = field
        self._started = False
        self._owned = False
        self._roots: set[Process] = set()

    def __enter__(self) -> "Session":
        return self

    def start(self) -> None:
        """Makes sure that Ray runs; where this process has one already, that one is used and left running.

        Raises:
            ResourceError: a local Ray cannot work here.
            ClusterError: nothing answers at the address.
        """
        if self._started:
            return
        import ray

        if not ray.is_initialized():
            self._owned = True
            self._connect()
        self._started = True
        if self._on_start is not None:
            self._on_start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return  # `cluster.interrupt` ends this process, and Ray with it
        if self._owned:
            import ray

            Interruption.closing = True
            started = processes.family(self._roots)  # now: whose parent has ended is nobody's
            ray.shutdown()
            processes.end(started)

    def _connect(self) -> None:
        import ray
        from ray.exceptions import RayError

        field, address, fix = self._field, self._cluster.address, "start one, or set it to local"
        if inherited := os.environ.get("RAY_ADDRESS"):  # Ray sets it in a job, for the job's own cluster
            field, address, fix = "RAY_ADDRESS", inherited, f"unset it, and {field} = {address!r} is used"
        environment.check_token_mode()
        options: dict[str, Any] = {
            "logging_level": logging.INFO if self._verbose else logging.ERROR,
            "log_to_driver": self._verbose,
        }
        theirs: dict[str, str | None] = {}
        if address == "local":
            theirs = environment.for_local_ray()
            options |= {
                "num_cpus": self._cluster.cpus or len(os.sched_getaffinity(0)),
                "num_gpus": self._cluster.gpus,
                "object_store_memory": self._cluster.object_store_mib and self._cluster.object_store_mib * 2**20,
                "include_dashboard": False,
            }
        else:
            environment.check_reachable(field, address, fix)
            environment.tighten_token()
            options["runtime_env"] = {"env_vars": {name: os.environ[name] for name in ENVIRONMENT}}
        before = processes.children()
        try:
            with _environment(theirs), _kept_handlers():
                ray.init(address=address, **options)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if address == "local":
                fix = "look at the newest folder of logs that it has made"
                raise ResourceError("Ray", address, f"could not be started on this machine ({why})", fix) from None
            raise ResourceError(field, address, f"no Ray cluster could be used ({why})", fix) from None
        finally:
            if address == "local":
                self._roots = processes.children() - before
        if not self._verbose:
            _quiet()


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for the processes that the block starts; None unsets one."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Puts back this process's handler of SIGTERM: Ray sets two of its own, of which one writes a stack and aborts."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _quiet() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised, and told in one line
