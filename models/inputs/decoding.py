"""Decoding under a time limit that holds whatever the bytes are.

Most decoders ask for their bytes piece by piece, and `models.inputs.image` looks at the clock whenever one does: that costs a few
microseconds an image. Those of TIFF, AVIF, HEIC and JPEG XL are one call into C, which a few hostile bytes can keep busy for hours
and which nothing in Python can interrupt. They run in a process of their own, started for the first such image, which the operating
system ends when its time is up; that process also keeps a decoder's crash, and its hunger for memory, away from everything else.
"""

import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.inputs.formats import known
from models.inputs.image import UndecodableImage

Decode = Callable[[bytes], NDArray[np.uint8]]

APART = ("TIFF", "AVIF", "HEIF", "JXL")
"""Formats whose decoders do not come back before they are done."""

MEMORY = 4 * 2**30
"""Bytes of address space that the process may have; 100 million pixels need 1.6 GB."""

ROOT = str(Path(__file__).resolve().parent.parent.parent)
"""What the process imports this package from."""

WAIT = 20
"""How many times its CPU time the process is waited for: on a busy machine it gets less than what goes by."""


class Decoder:
    """Decodes within a limit; not for use by several threads at once.

    Args:
        decode: of an image's bytes; picklable, and itself within the limit for every format but `APART`.
        seconds: CPU time that one image may take.
    """

    def __init__(self, decode: Decode, seconds: float) -> None:
        self._decode = decode
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """The decoded image.

        Raises:
            UndecodableImage: whatever the bytes are; `slow` when the time was not enough.
        """
        return self._apart(data) if known(data) in APART else self._decode(data)

    def _apart(self, data: bytes) -> NDArray[np.uint8]:
        process, pipe = self._helper()
        try:
            pipe.send_bytes(data)
            in_time = pipe.poll(WAIT * self._seconds)
            answer: NDArray[np.uint8] | UndecodableImage | None = pipe.recv() if in_time else None
        except (EOFError, OSError):  # it ended
            in_time, answer = True, None
        if isinstance(answer, UndecodableImage):
            raise answer
        if answer is not None:
            return answer
        self._process = self._pipe = None
        pipe.close()
        if not in_time:
            process.kill()
        code = process.wait()
        if not in_time or code == -signal.SIGPROF:
            raise UndecodableImage("slow", f"decoding took more than {self._seconds:g} s")
        raise UndecodableImage("decode_error", f"the decoder ended with exit status {code}")

    def _helper(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._process is None or self._pipe is None or self._process.poll() is not None:
            ours, theirs = Pipe()
            with theirs:
                command = [
                    sys.executable,
                    "-P",  # else a user's own `models` in the current folder would come first
                    "-c",
                    "from models.inputs.decoding import serve; serve()",
                    str(theirs.fileno()),
                ]
                environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *filter(None, sys.path)])}
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
            self._pipe = ours
            weakref.finalize(self, _end, self._process, ours)
            ours.send((self._decode, self._seconds))
            ours.recv()  # it is ready: its start takes nothing from an image's time
        return self._process, self._pipe


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()  # which ends a process that waits; one that decodes has its time
    process.kill()
    process.wait()


def serve() -> None:
    """What the process does: gets the function and the limit once, then an image's bytes at a time, and answers until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that holds the other end
    with Connection(int(sys.argv[1])) as pipe:
        try:
            decode, seconds = pipe.recv()
            Image.init()
            pipe.send(None)
            with open(
                os.devnull, "wb"
            ) as nowhere:  # what C libraries print about hostile bytes is no news for a terminal
                os.dup2(nowhere.fileno(), 2)
            while True:
                data = pipe.recv_bytes()
                signal.setitimer(signal.ITIMER_PROF, seconds)
                try:
                    answer = decode(data)
                except UndecodableImage as error:
                    answer = error
                signal.setitimer(signal.ITIMER_PROF, 0)
                pipe.send(answer)
        except (EOFError, ConnectionError):
            return
