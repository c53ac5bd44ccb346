"""Jobs over the Ray Job API, against a real cluster with token authentication in processes of its own."""

import contextlib
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
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

import tiny
from cluster import jobs
from cluster.errors import ClusterError, InputError
from cluster.store import RunStore


@dataclass(frozen=True)
class Head:
    """A running head: the URL of its Job API, and its token."""

    address: str
    token: str


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
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
        names = (
            "",
            "object-manager-",
            "node-manager-",
            "ray-client-server-",
            "dashboard-agent-listen-",
            "metrics-export-",
        )
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
    (tmp_path / "show.py").write_text(
        "import os, pathlib, sys\n"
        "print('args', sys.argv[1:], os.environ.get('SHOWN'))\n"
        "print('files', sorted(map(str, pathlib.Path('.').rglob('file'))))\n"
    )
    (tmp_path / ".gitignore").write_text("/ignored/\n")
    for folder in ("ignored", "runs", "data", ".venv", "pipeline", "pipeline/data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
    return tmp_path


def test_words_environment_and_files_reach_the_job(head: Head, token: str, checkout: Path) -> None:
    hostile = ["a b", "$(touch /tmp/never)", "it's; exit 3", '"', "*", "--set=x=é"]
    job_id = jobs.submit(
        ["python", "show.py", *hostile], address=head.address, working_dir=checkout, env={"SHOWN": "yes"}
    )
    log: list[str] = []
    assert jobs.follow(job_id, address=head.address, write=log.append) == 0
    lines = "".join(log).splitlines()
    assert f"args {hostile!r} yes" in lines
    assert "files ['pipeline/data/file', 'pipeline/file']" in lines


def test_a_failed_job_gives_its_exit_code(
    head: Head, token: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = jobs.submit(["sh", "-c", "echo reason; exit 2"], address=head.address, working_dir=checkout)
    assert jobs.follow(job_id, address=head.address) == 2
    shown = capsys.readouterr()
    assert "reason" in shown.out.splitlines()
    assert len(shown.err.splitlines()) == 1
    assert job_id in shown.err


class Relay:
    """A TCP relay in front of the head, as an ssh tunnel is; `cut` breaks what is open and lets new ones through."""

    def __init__(self, address: str) -> None:
        self.target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(self.target)
                self.open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.open.clear()

    def close(self) -> None:
        self.listener.close()
        self.cut()


def test_the_log_is_live_and_goes_on_after_a_lost_connection(head: Head, token: str, checkout: Path) -> None:
    script = "echo one; sleep 4; echo two"
    job_id = jobs.submit(["sh", "-c", script], address=head.address, working_dir=checkout)
    seen: dict[str, list[float]] = {"one": [], "two": []}
    with contextlib.closing(Relay(head.address)) as relay:

        def write(piece: str) -> None:
            for line in piece.splitlines():
                if line in seen:
                    seen[line].append(time.monotonic())
            if seen["one"] and not seen["two"]:
                relay.cut()

        assert jobs.follow(job_id, address=relay.address, write=write) == 0
    assert [len(times) for times in seen.values()] == [1, 1]
    assert seen["two"][0] - seen["one"][0] > 1.5


def test_an_interrupt_stops_the_following_and_not_the_job(head: Head, token: str, checkout: Path) -> None:
    job_id = jobs.submit(["sh", "-c", "echo begun; sleep 60"], address=head.address, working_dir=checkout)
    follow = f"jobs.follow({job_id!r}, address={head.address!r})"
    code = f"from cluster import jobs, errors\ntry: {follow}\nexcept errors.Interrupted as error: raise SystemExit(str(error))"
    follower = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    assert any(line == "begun\n" for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    _, message = follower.communicate(timeout=30)
    client = JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {token}"})
    assert client.get_job_status(job_id) == "RUNNING"
    client.stop_job(job_id)
    assert follower.returncode == 1
    stop = f"RAY_AUTH_MODE=token ray job stop --address {head.address} {job_id}"
    assert message == f"interrupted; job {job_id} goes on; to stop it: {stop}\n"


def one_line_of(error: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which must be of one line and keep the token to itself."""
    message = str(error.value)
    assert "\n" not in message
    assert os.environ.get("RAY_AUTH_TOKEN", "?") not in message
    return message


def test_wrong_token(head: Head, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.raises(ClusterError) as error:
        jobs.submit(["true"], address=head.address, working_dir=checkout)
    assert "refuses the token of RAY_AUTH_TOKEN" in one_line_of(error)
    with pytest.raises(ClusterError, match="refuses the token"):
        jobs.follow("raysubmit_x", address=head.address)


@pytest.mark.parametrize("named", [True, False])
def test_missing_token(
    head: Head, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    path = tmp_path / ("elsewhere" if named else ".ray/auth_token")
    monkeypatch.setenv("HOME", str(tmp_path))
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ClusterError) as error:
        jobs.submit(["true"], address=head.address, working_dir=checkout)
    assert f"asks for a token and none was found; set RAY_AUTH_TOKEN, or put the token into {path}" in one_line_of(
        error
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n")
    with pytest.raises(ClusterError, match="asks for a token and none was found"):
        jobs.submit(["true"], address=head.address, working_dir=checkout)


@pytest.mark.parametrize("named", [True, False])
def test_token_files(head: Head, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    path = tmp_path / ("elsewhere" if named else ".ray/auth_token")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{head.token}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ClusterError, match="not known to the cluster"):
        jobs.follow("raysubmit_x", address=head.address)


@pytest.mark.parametrize("content", [b"two\nlines", b"\xff\xfe", "tökén".encode()])
def test_file_that_holds_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterError) as error:
        jobs.follow("raysubmit_x", address="http://127.0.0.1:1")
    assert "two" not in one_line_of(error)
    assert str(tmp_path / "token") in str(error.value)


def test_unknown_job(head: Head, token: str) -> None:
    with pytest.raises(ClusterError) as error:
        jobs.follow("raysubmit_\nx/../y", address=head.address)
    assert f"`RAY_AUTH_MODE=token ray job list --address {head.address}`" in one_line_of(error)


def test_the_given_address_wins_over_the_environment(head: Head, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="not known to the cluster"):
        jobs.follow("raysubmit_x", address=head.address)
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


def test_nothing_answers(checkout: Path) -> None:
    address = f"http://127.0.0.1:{_free_ports(1)[0]}"
    with pytest.raises(ClusterError) as error:
        jobs.submit(["true"], address=address, working_dir=checkout)
    assert "does not answer" in one_line_of(error)
    assert address in str(error.value)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://x:y", ""])
def test_address_that_is_no_url_of_a_job_api(address: str, checkout: Path) -> None:
    with pytest.raises(ClusterError, match=r"must be the URL of a Job API; write it as http://127\.0\.0\.1:8265"):
        jobs.submit(["true"], address=address, working_dir=checkout)


def test_a_server_of_another_kind(checkout: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ClusterError, match="check"):
            jobs.submit(["true"], address=f"http://127.0.0.1:{server.server_port}", working_dir=checkout)
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_too_large_to_travel(head: Head, token: str, checkout: Path) -> None:
    with (checkout / "large").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(ClusterError) as error:
        jobs.submit(["true"], address=head.address, working_dir=checkout)
    assert "if the folder is more than 100 MiB" in one_line_of(error)
    assert ".rayignore" in str(error.value)
    (checkout / ".rayignore").write_text("/large\n")
    assert jobs.submit(["true"], address=head.address, working_dir=checkout)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be an existing folder"):
        jobs.submit(["true"], address="http://127.0.0.1:1", working_dir=tmp_path / "none")


def test_path_in_job(tmp_path: Path) -> None:
    assert jobs.path_in_job("RECIPE", tmp_path / "a" / "b.yaml", tmp_path) == "a/b.yaml"
    with pytest.raises(InputError, match=r"RECIPE = .*must be inside"):
        jobs.path_in_job("RECIPE", tmp_path / ".." / "b.yaml", tmp_path)


def test_tophat_submit_runs_a_recipe_on_the_cluster(
    head: Head, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipeline.cli import main

    tiny.write_folders(tmp_path)
    places = [f"labeled.{part}.uri={tmp_path}/{part}" for part in ("train", "validation", "test")]
    sets = [*places, f"unlabeled.uri={tmp_path}/unlabeled", "score.cpus_per_actor=0.5"]
    for workers, code, shown in ((1, 0, "report: "), (999, 2, "error: pretrain.workers = 999")):
        words = [
            "submit",
            "demo",
            "--address",
            head.address,
            "--run-dir",
            f"{tmp_path}/run-{workers}",
            "--until",
            "unlabeled",
            "--follow",
        ]
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "tophat",
                *words,
                *(word for item in sets for word in ("--set", item)),
                "--set",
                f"pretrain.workers={workers}",
            ],
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == code
        assert shown in capfd.readouterr().out
    assert "unlabeled" in RunStore(str(tmp_path / "run-1")).result()
