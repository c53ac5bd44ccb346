"""Fixtures that stand for the outside world: a real Ray and a real S3 server, each started once, a real browser; and a finished run."""

import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

import cluster
from cluster import interrupt

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from runs import Finished

hypothesis.settings.register_profile("tophat", deadline=None)  # on a shared machine, times say nothing
hypothesis.settings.load_profile("tophat")

# Playwright keeps its browsers in the user's home folder.
os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", str(Path.home() / ".cache" / "ms-playwright"))
# A home folder of our own, before any test module can load Ray, which reads its token there once; and no credentials of the user's.
HOME = Path(tempfile.mkdtemp(prefix="tophat-tests-"))
for _name in [n for n in os.environ if n.startswith(("AWS_", "RAY_"))]:
    del os.environ[_name]
os.environ |= {"HOME": str(HOME), **cluster.ENVIRONMENT}
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # how soon Ray Train sees that a training has ended
# In the background of a shell, and under nohup, commands that we start would ignore these.
for _signal, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _usual)
# Ray's workers find the networks of the tests there.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


NEED_MORE = {"browser", "head"}
"""Fixtures whose tests are slow: those of a browser, which not every machine has, and of a whole cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NEED_MORE & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def private_home() -> Iterator[Path]:
    """The home folder of the tests."""
    yield HOME
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_local(private_home: Path, s3_server: None) -> Iterator[None]:
    """A local Ray with two CPUs, for every test that needs one; it takes this machine to have a GPU."""
    from cluster.config import Cluster
    from cluster.session import Session

    with Session(Cluster(cpus=2, gpus=1, object_store_mib=512)) as session:
        session.start()
        yield


@pytest.fixture(scope="session")
def s3_server(private_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real S3 server over HTTP (rclone's), which checks signatures; the environment points at it."""
    import killing

    with killing.s3_server(tmp_path_factory.mktemp("s3")):
        yield


@pytest.fixture
def s3(s3_server: None, request: pytest.FixtureRequest) -> str:
    """A URI in the S3 server for one test alone."""
    return f"s3://bucket/{secrets.token_hex(4)}"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URI for one test alone: once on the local disk, once in the S3 server."""
    uri: str = str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("s3")
    return uri


@pytest.fixture(scope="module")
def browser(private_home: Path) -> "Iterator[Browser]":
    """A Chromium: one that is installed, or else Playwright's own.

    It ends with the module: as long as Playwright runs, this thread has an event loop that runs, and `asyncio.run` refuses.
    """
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    quiet = [
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *quiet])
        yield started
        started.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set, to be read alone."""
    import tiny

    root = tmp_path_factory.mktemp("tiny")
    tiny.write_folders(root)
    return root


@pytest.fixture(scope="session")
def finished(folders: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """A finished run of the tiny recipe, to be read alone; `Finished.copy` gives one to work in."""
    import tiny
    from pipeline.recipe.reading import validate
    from runs import Finished, execute

    uri = str(tmp_path_factory.mktemp("runs") / "tiny")
    return Finished(uri, execute(validate(tiny.recipe(str(folders))), uri))


@pytest.fixture
def tophat(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process, on the Ray of the tests; gives exit code, output and errors."""
    from pipeline.cli import main

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tophat", *words])
        handlers = {number: signal.getsignal(number) for number in interrupt.ENDING}
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call
