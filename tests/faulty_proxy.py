"""An HTTP proxy before a real S3 server that does what object stores do on a bad day. It leaves requests as they are, so signatures hold."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import boto3
from botocore.exceptions import ClientError

FAULTS = ("500", "503", "reset", "stall")
_ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>injected</Message></Error>'


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, a share of them with a fault: 500, 503 SlowDown, a reset in mid-body, a stall in mid-body.

    Args:
        port: of the S3 server, on this machine.
        share: of requests, from 0 to 1, that meet a fault.
        seed: of which ones do.
        stall: seconds of silence, before the connection is cut.
        conditional: honor `If-None-Match: *` (RFC 9110, 13.1.2) as AWS's S3 does, for a server that ignores it.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, share: float, seed: int = 0, stall: float = 3.0, conditional: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.share = share
        self.stall = stall
        self.conditional = threading.Lock() if conditional else None
        self.requests = 0
        self.injected: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._lock = threading.Lock()

    def has(self, path: str) -> bool:
        """Whether the server has an object at the path of a request."""
        bucket, _, key = unquote(path.partition("?")[0]).lstrip("/").partition("/")
        try:
            session = boto3.Session()  # boto3.client() would keep the credentials of whoever asked first
            session.client("s3", endpoint_url=f"http://127.0.0.1:{self.upstream}").head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
                raise  # the connection breaks, and the request is made again
            return False
        return True

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str | None:
        """The next request's."""
        with self._lock:
            self.requests += 1
            if self._rng.random() >= self.share:
                return None
            kind = self._rng.choice(FAULTS)
            self.injected[kind] += 1
            return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are a part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        if self.server.conditional is None or self.headers.get("If-None-Match") != "*":
            self._pass_on()
            return
        with self.server.conditional:
            if not self.server.has(self.path):
                self._pass_on()
                return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(412, [("Content-Type", "application/xml")], _ERROR.format("PreconditionFailed").encode())

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.server.fault()
        if kind in ("500", "503"):
            code = "InternalError" if kind == "500" else "SlowDown"
            self._answer(int(kind), [("Content-Type", "application/xml")], _ERROR.format(code).encode())
            return
        upstream = HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")]
        self._answer(answer.status, headers, content, kind)

    do_GET = do_HEAD = do_POST = do_DELETE = _pass_on  # noqa: N815 - http.server's names

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: str | None = None) -> None:
        """The whole answer; with `cut`, half of it, or nothing of one without content although the store did what was asked."""
        if cut is None or content:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[: len(content) // 2])
        if cut is not None:
            self.wfile.flush()
            if cut == "stall":
                time.sleep(self.server.stall)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with a reset
            self.close_connection = True


@contextmanager
def faulty_proxy(
    port: int, share: float, seed: int = 0, stall: float = 3.0, conditional: bool = False
) -> Iterator[FaultyProxy]:
    """A running proxy."""
    proxy = FaultyProxy(port, share, seed, stall, conditional)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
