"""Jobs over the Ray Job API, against a real cluster with token authentication in processes of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import jobs
from cluster.errors import ClusterError, InputError


@dataclass(frozen=True)
class Head:
    """A running head: the URL of its Job API, and its token."""

    address: str
    token: str


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _pid_namespace() -> list[str]:
    """The command prefix that gives the head a PID namespace of its own, where the machine lets us."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0:
        return command
    return []


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with a token, on ports, a home and a temporary folder that nobody else uses.

    It ends by killing its own namespace or process group: `ray stop` would end every Ray of the machine.
    """
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: Ray's socket paths have 107 characters
        token = secrets.token_hex(32)
        dashboard, *others = _free_ports(7)
        names = ("", "object-manager-", "node-manager-", "ray-client-server-", "dashboard-agent-listen-", "metrics-export-")
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
        command += [f"--{name}port={port}" for name, port in zip(names, others, strict=True)]
        command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--object-store-memory=100000000"]
        command += [f"--temp-dir={folder}/t", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
        env |= {"HOME": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": path}
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(
                [*_pid_namespace(), *command], env=env, stdout=log, stderr=log, start_new_session=True
            )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _await_answer(address, token, process, Path(folder, "log"))
            yield Head(address, token)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)


def _await_answer(address: str, token: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head did not start:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.3)


@pytest.fixture
def token(head: Head, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return head.token


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "show.py").write_text("import os, sys\nprint('args', sys.argv[1:], os.environ.get('SHOWN'))\n")
    (tmp_path / ".gitignore").write_text("/ignored/\n")
    for folder in ("ignored", "runs", "data", ".venv", "pipeline"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
    return tmp_path


def test_words_reach_the_job_as_they_are_and_the_environment_too(head: Head, token: str, checkout: Path) -> None:
    hostile = ["a b", "$(touch /tmp/never)", "it's; exit 3", '"', "*", "--set=x=é"]
    job_id = jobs.submit(
        ["python", "show.py", *hostile], address=head.address, working_dir=checkout, env={"SHOWN": "yes"}
    )
    log: list[str] = []
    assert jobs.follow(job_id, address=head.address, write=log.append) == 0
    assert f"args {hostile!r} yes" in "".join(log).splitlines()


def test_what_travels(head: Head, token: str, checkout: Path) -> None:
    job_id = jobs.submit(["find", ".", "-name", "file"], address=head.address, working_dir=checkout)
    log: list[str] = []
    assert jobs.follow(job_id, address=head.address, write=log.append) == 0
    assert [line for line in "".join(log).splitlines() if line.startswith("./")] == ["./pipeline/file"]


def test_a_failed_job_gives_its_exit_code(
    head: Head, token: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = jobs.submit(["sh", "-c", "echo reason; exit 2"], address=head.address, working_dir=checkout)
    assert jobs.follow(job_id, address=head.address) == 2
    shown = capsys.readouterr()
    assert "reason" in shown.out.splitlines()
    assert len(shown.err.splitlines()) == 1
    assert job_id in shown.err


def test_the_log_is_live_and_survives_a_lost_connection(head: Head, token: str, checkout: Path) -> None:
    job_id = jobs.submit(
        ["sh", "-c", "echo one; while [ ! -e go ]; do sleep 0.1; done; echo two; rm go"],
        address=head.address,
        working_dir=checkout,
    )
    with _Relay(head.address) as relay:
        log: list[str] = []
        seen_running = []

        def write(piece: str) -> None:
            log.append(piece)
            if "one" in "".join(log).splitlines() and not seen_running:
                seen_running.append(True)
                relay.cut()
                jobs.submit(["sh", "-c", f"touch $(ls -d {_job_folder(log)})/go"], address=head.address, working_dir=checkout)

        assert jobs.follow(job_id, address=relay.address, write=write) == 0
    lines = "".join(log).splitlines()
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
