"""Jobs on a cluster over the Ray Job API: submit, then follow the log to the end.

The API listens on the loopback of the cluster's head; `ray dashboard cluster.yaml` brings it to this machine
through ssh. Every request carries the cluster's token.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

from cluster.errors import ClusterError, InputError, Interrupted, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

EXCLUDED: Final = ("/.git/", "/.venv*/", "/runs/", "/data/", "/dist/", "/build/", "__pycache__/")
"""What never travels with a job, beside what .gitignore and .rayignore list."""

UPLOAD_MIB: Final = 100
"""The most that Ray's Job API takes as a working directory, zipped (`DASHBOARD_CLIENT_MAX_SIZE` in Ray 2.60)."""

CHATTY: Final = (
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
CONNECT_SECONDS: Final = 10.0
RECONNECT_SECONDS: Final = 60.0


def submit(
    entrypoint: Sequence[str],
    *,
    address: str,
    working_dir: str | Path,
    env: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Start `entrypoint` on the cluster's head and return the job's id; the job needs this process no more.

    Args:
        entrypoint: the program and its arguments, one word each; no word is read as shell syntax.
        address: the Job API, `http://127.0.0.1:8265`.
        working_dir: the folder that travels, less `EXCLUDED` and what its .gitignore lists; the job starts in it.
        env: environment variables of the job. Ray shows them to everyone who has the token: no secrets.
        metadata: what the job list shows beside the job.

    Raises:
        ClusterError: nothing answers at `address`, the token is missing or wrong, or the folder is too large.
        InputError: `working_dir` is not a folder.
    """
    runtime_env = {"working_dir": str(working_dir), "excludes": list(EXCLUDED), "env_vars": dict(env or {})}
    command = shlex.join(entrypoint)
    if not Path(working_dir).is_dir():
        raise InputError("working_dir", str(working_dir), "must be an existing folder", "give the checkout")
    with _connected(address) as client:
        try:
            return client.submit_job(entrypoint=command, runtime_env=runtime_env, metadata=dict(metadata or {}))
        except (
            RuntimeError
        ) as error:  # Ray's client has the status in its words alone, and no other call that would tell it
            rule = f"was not taken by the Job API ({_cause(error)})"
            fix = f"if the folder is more than {UPLOAD_MIB} MiB, list what can stay in .rayignore"
            raise ClusterError("working_dir", str(working_dir), rule, fix) from None


def follow(job_id: str, *, address: str, write: Callable[[str], object] | None = None) -> int:
    """Show the log of a job as it grows, until the job ends.

    A lost connection is taken up again where it broke. Ctrl-C stops the following, never the job.

    Args:
        job_id: what `submit` returned.
        address: the Job API.
        write: takes each piece of the log; by default it goes to standard output.

    Returns:
        0 when the job succeeded, else the exit code of its entrypoint (1 where it has none).

    Raises:
        Interrupted: Ctrl-C.
        ClusterError: no such job, nothing answers at `address` for a minute, or the token is missing or wrong.
    """
    try:
        return _followed(job_id, address, _Log(write or _to_stdout))
    except KeyboardInterrupt:
        stop = _ray_job("stop", "--address", address, job_id)
        raise Interrupted(one_line(f"interrupted; job {job_id} goes on; to stop it: {stop}")) from None


def path_in_job(field: str, path: str | Path, working_dir: str | Path) -> str:
    """`path` as a job that starts in `working_dir` sees it.

    Raises:
        InputError: the file is not inside `working_dir`, so it does not travel.
    """
    folder = Path(working_dir).resolve()
    try:
        return Path(path).resolve().relative_to(folder).as_posix()
    except ValueError:
        raise InputError(
            field, str(path), f"must be inside {folder}, as only that folder travels to the cluster", "copy it there"
        ) from None


class _UnreachableError(ClusterError):
    """Nothing answers, or the connection broke: worth another try."""


class _Log:
    """A job's log on its way to `write`; `pump` starts at the beginning of the log and skips what was shown before."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write, self.shown = write, 0

    async def pump(self, pieces: AsyncIterator[str]) -> None:
        position = 0
        async for piece in pieces:
            new = piece[max(self.shown - position, 0) :]
            position += len(piece)
            if new:
                self.write(new)
                self.shown = position


def _followed(job_id: str, address: str, log: _Log) -> int:
    last_answer: float | None = None
    while True:
        try:
            with _connected(address) as client:
                _details(client, job_id, address)
                last_answer = time.monotonic()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "ssl=None", DeprecationWarning)  # Ray's call of aiohttp
                    try:
                        asyncio.run(log.pump(client.tail_job_logs(job_id)))
                    except RuntimeError as error:  # how Ray's client reports a log that was cut off
                        raise _unreachable(address, error) from None
                job = _details(client, job_id, address)
            if job.status.is_terminal():
                return _exit_code(job)
        except _UnreachableError:
            if last_answer is None or time.monotonic() - last_answer > RECONNECT_SECONDS:
                raise
        time.sleep(1.0)


def _exit_code(job: "JobDetails") -> int:
    if job.status == "SUCCEEDED":
        return 0
    reason = (job.message or "").partition(", last available logs")[0].strip().partition("\n")[0]
    print(one_line(f"Job {job.submission_id} {job.status.lower()}: {reason}"), file=sys.stderr)
    return job.driver_exit_code or 1


def _details(client: "JobSubmissionClient", job_id: str, address: str) -> "JobDetails":
    import requests

    path = quote(job_id, safe="")
    try:
        return client.get_job_info(path)
    except RuntimeError:  # with the status in its words alone
        url = f"{address.rstrip('/')}/api/jobs/{path}"
        if requests.get(url, headers=_headers(_token()[0]), timeout=CONNECT_SECONDS).status_code != 404:
            raise
        listing = _ray_job("list", "--address", address)
        raise ClusterError("job", job_id, "is not known to the cluster", f"see its jobs with `{listing}`") from None


def _ray_job(*words: str) -> str:
    """A command for the user's shell; Ray's own client sends no token unless it is told that there is one."""
    return f"RAY_AUTH_MODE=token {shlex.join(['ray', 'job', *words])}"


@contextlib.contextmanager
def _connected(address: str) -> Iterator["JobSubmissionClient"]:
    """A client of the Job API at `address`; what goes wrong in the block becomes one line."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    token, source = _token()
    try:
        _knock(address)
        yield _client(address, token)
    except AuthenticationError:
        if token:
            rule, fix = f"refuses the token of {source}", "use the token of that cluster's head (~/.ray/auth_token)"
        else:
            rule, fix = "asks for a token and none was found", f"set RAY_AUTH_TOKEN, or put the token into {source}"
        raise ClusterError("address", address, rule, fix) from None
    except (ConnectionError, TimeoutError, aiohttp.ClientError, requests.RequestException) as error:
        raise _unreachable(address, error) from None
    except (RuntimeError, ValueError, KeyError) as error:
        rule = f"gave an answer that is not understood ({_cause(error)})"
        raise ClusterError("address", address, rule, "check that it is the Job API of Ray") from None


def _knock(address: str) -> None:
    """Fail at once where nothing listens: Ray's client has no time limit of its own."""
    try:
        parts = urlsplit(address)
        default = {"http": 80, "https": 443}[parts.scheme]
        host, port = parts.hostname, parts.port or default
    except (KeyError, ValueError):
        host, port = None, 0
    if not host:
        raise ClusterError("address", address, "must be the URL of a Job API", "write it as http://127.0.0.1:8265")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: BaseException) -> _UnreachableError:
    rule, fix = f"does not answer ({_cause(error)})", "check it, and that `ray dashboard cluster.yaml` runs"
    return _UnreachableError("address", address, rule, fix)


def _client(address: str, token: str) -> "JobSubmissionClient":
    """Ray's client. The token is in its headers, so that neither RAY_AUTH_MODE nor what Ray cached of it matters."""
    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    overriding = {
        name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ
    }
    try:
        return JobSubmissionClient(address, headers=_headers(token))
    finally:
        os.environ.update(overriding)


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}" if token else ""}


def _token() -> tuple[str, str]:
    """The cluster's token and where it came from, in Ray's own order; the token is empty when there is none.

    Source: Ray 2.60, "Token authentication": RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
    """
    token, source = os.environ.get("RAY_AUTH_TOKEN", "").strip(), "RAY_AUTH_TOKEN"
    if not token:
        source = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
        try:
            token = Path(source).read_text().strip()
        except FileNotFoundError:
            return "", source
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterError("token", source, f"cannot be read ({_cause(error)})", "check that file") from None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ClusterError("token", source, "holds something else than a token", "copy the token of the cluster there")
    return token, source


def _cause(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
