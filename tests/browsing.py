"""Pages that people open: names and images that are hostile, a page opened in a real browser, and what can be told without one."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, Request

NAMES = [
    "<script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "</script><script>window.pwned=1</script>",
    '<a href="javascript:pwned=1">x</a>',
    "<b>bold</b>",
    "&lt;i&gt;",
    "{{ 7 * 7 }} %{x}",
    "photo\u202egpj.exe",
    "line\nbreak\x00nul",
    "\udcff lost byte",
    "نمر",
    "plain",
]


def encoded(color: tuple[int, ...], mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, kind)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN_IMAGES = {
    "empty": b"",
    "text": b"not an image",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>window.pwned=1</script></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "truncated": encoded((1, 2, 3), kind="JPEG", size=(200, 200))[:700],
    "65 Mpx": png_header(65_000, 1_000),
    "10 Gpx": png_header(100_000, 100_000),
}


@contextmanager
def opened(browser: Browser, uri: str, width: int = 1280, scheme: str = "light") -> Iterator[Page]:
    """The page, loaded; afterwards it must have asked for its own files alone, and complained of nothing."""
    requests: list[str] = []
    complaints: list[str] = []

    def failed(request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # a reload gives up what is still on its way
            complaints.append(f"failed: {request.url} ({request.failure})")

    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", failed)
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    try:
        page.goto(f"file://{uri}")
        yield page
        assert page.evaluate("window.pwned") is None
        assert complaints == []
        folder = f"file://{os.path.dirname(uri)}/"
        assert [url for url in requests if not url.startswith(folder)] == []
    finally:
        context.close()


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(uri: str) -> str:
    """The text of a page, scripts and all, once none of its elements is one that a hostile name would make."""
    page = _Elements()
    page.feed(Path(uri).read_text())
    for tag, attributes in page.found:
        source = str(attributes.get("src"))
        assert tag != "img" or source.startswith(("assets/", "strips/")), attributes
        assert tag != "script" or source.startswith("assets/") or attributes.get("type") == "application/json", (
            attributes
        )
        assert not str(attributes.get("href")).startswith("javascript"), attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
    return page.text
