"""What the environment of a machine does to Ray: put right where that is possible, and told in one line where it is not, before Ray starts."""

import io
import os
import resource
import secrets
import socket
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from cluster.errors import ClusterError, InputError, ResourceError
from cluster.interrupt import OTHER_HANDLER

ROOT = Path(__file__).resolve().parent.parent
"""The checkout, or the folder of the installed packages: what workers import `pipeline`, `tuning`, `models` and `cluster` from."""
PACKAGES = ("cluster", "models", "tuning", "pipeline")

OPEN_FILES = 1024
"""That a local Ray may have at the least; with fewer, its processes lose their connections."""
SOCKET_BYTES = 107
"""Of the path of a Unix socket, at most (unix(7), less the zero at its end)."""
BELOW_TEMPORARY = len("/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store.0")
"""The rest of that path, which Ray makes."""
CONNECT_SECONDS = 5.0


def prepare_command() -> None:
    """Makes a process that somebody's shell, scheduler or container has started fit to run a command.

    Raises:
        InputError: the folder that it was started in is gone.
    """
    for number, mode in enumerate("rww"):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file or connection would get its number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name := ("stdin", "stdout", "stderr")[number]) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names of files have characters that a terminal may not have
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("ignore")  # PYTHONWARNINGS is for the user's own code; libraries warn
    try:
        here = os.getcwd()
    except OSError:
        raise InputError("the current folder", os.environ.get("PWD"), "is gone", "change to another") from None
    if here not in sys.path:
        sys.path.append(here)  # for the user's own networks, by import path


def for_local_ray() -> dict[str, str | None]:
    """Variables that the processes of a local Ray need, other than this process has them; None is for one that they must not have.

    Raises:
        ResourceError: a Ray could not work here.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < OPEN_FILES:
        rule = f"must be at least {OPEN_FILES} for Ray"
        raise ResourceError("open files (`ulimit -Hn`)", most, rule, "raise it, or ask who runs this machine")
    theirs: dict[str, str | None] = {
        # Inherited, and not a runtime environment: Ray starts its first workers at once, and would start others for that.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # Ray puts the folder that a driver was started in first, and with it whatever the user calls `models`; a module that is loaded stays.
        "RAY_preload_python_modules": ",".join(PACKAGES),
        "PYTHONWARNINGS": None,  # with `error`, Ray's own processes end
        OTHER_HANDLER: None,
    }
    return {**theirs, **_temporary(), **_token()}


def _temporary() -> dict[str, str]:
    """Where Ray has its sockets, logs, and what does not fit into memory."""
    if given := os.environ.get("RAY_TMPDIR"):
        if problem := _unfit(folder := os.path.abspath(given)):
            raise ResourceError("RAY_TMPDIR", given, problem, "give a short one that can be written, or unset it")
        return {"RAY_TMPDIR": folder}
    given = os.environ.get("TMPDIR", "/tmp")
    if not (problem := _unfit(folder := os.path.abspath(given))):
        return {"RAY_TMPDIR": folder}
    if folder == "/tmp" or _unfit("/tmp"):
        raise ResourceError("TMPDIR", given, problem, "set RAY_TMPDIR to a short folder that can be written")
    print(f"note: TMPDIR = {given!r} {problem}: Ray uses /tmp; RAY_TMPDIR would be another folder", file=sys.stderr)
    return {"RAY_TMPDIR": "/tmp"}


def _unfit(folder: str) -> str:
    """Why Ray cannot work in a folder; empty where it can."""
    most = SOCKET_BYTES - BELOW_TEMPORARY
    if (size := len(os.fsencode(folder))) > most:
        return f"has {size} bytes, and Ray's sockets leave room for {most}"
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def _token() -> dict[str, str]:
    """The token that a local Ray asks for; Ray would write one readable by everyone, and fail in a home folder that cannot be written."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return {}
    new = secrets.token_hex(32)
    try:
        path = token_path()
        if not os.environ.get("RAY_AUTH_TOKEN_PATH") and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # which nobody else can read
                file.write(new)
                file.flush()
                with suppress(FileExistsError):  # another process was first
                    os.link(file.name, path)
        tighten_token()
        path.read_text()
    except (OSError, RuntimeError):  # the user may have no home folder at all
        return {"RAY_AUTH_TOKEN": new}
    return {}


def token_path() -> Path:
    """Where Ray looks for a token that is not in the environment.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def tighten_token() -> None:
    """Lets only its owner read the token."""
    with suppress(OSError, RuntimeError):
        path = token_path()
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def check_token_mode() -> None:
    """Makes sure that a Ray asks for its token: whoever reaches one can run code in it.

    Raises:
        ClusterError: the user has turned that off.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ClusterError("RAY_AUTH_MODE", mode, "must be token: every Ray here asks for one", "unset it")


def check_reachable(field: str, address: str, fix: str) -> None:
    """Fails within seconds where nothing answers: Ray's own attempts take minutes.

    Args:
        field: that has the address.
        address: `auto`, HOST:PORT, or ray://HOST:PORT.
        fix: what to do where it cannot be used.

    Raises:
        ClusterError: it is no address, or nothing answers there.
    """
    if address == "auto":
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("", "ray") or not host or not port:
        raise ClusterError(field, address, "must be HOST:PORT of a Ray cluster, ray://HOST:PORT, auto or local", fix)
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(field, address, f"does not answer ({error.strerror or error})", fix) from None
    if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):  # else only Ray can talk to it
        _check_speaks(field, address, f"{f'[{host}]' if ':' in host else host}:{port}", fix)


def _check_speaks(field: str, address: str, target: str, fix: str) -> None:
    """Fails where something else than a Ray listens: a web server, a port that a tunnel forwards to nowhere."""
    import grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            rule = "answers, but not as a Ray cluster does (the port of its head is mostly 6379; 8265 is for jobs)"
            raise ClusterError(field, address, rule, fix) from None
