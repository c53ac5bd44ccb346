"""Environments that real machines have: what works in them, and what is told in one line before any work."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from cluster import environment
from cluster.errors import ClusterError, ResourceError
from commands import ROOT, Command, Ended

LONG = "slurm_job_" * 8

INSTALLED = f"""
import os, sys
sys.path[0] = {str(ROOT)!r}  # where a script of an installed package finds it, and the current folder is not
from pipeline.cli import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_teacher(str(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images."""
    folder = tmp_path_factory.mktemp("pool")
    for number, image in enumerate(tiny.digits()["zero"][:4]):
        (folder / f"{number}.png").write_bytes(image)
    return folder


Score = Callable[..., Ended]


@pytest.fixture
def score(model: str, pool: Path, tmp_path: Path) -> Score:
    """`tophat score` in a process of its own, with changes to its environment."""

    def run(*words: str, program: str | None = None, folder: Path = tmp_path, **changes: str) -> Ended:
        start = ["-c", program] if program else ["-m", "pipeline"]
        command = ["score", "--model", model, "--source", str(pool), "--out", str(tmp_path / "scores"), *words]
        return Command(*start, *command, folder=folder, environment=changes).end(120)

    return run


def scored(ended: Ended, *notes: str) -> None:
    assert (ended.code, ended.left) == (0, []), ended.errors
    assert "images: 4 listed = 4 scored + 0 rejected" in ended.out
    assert [note for note, line in zip(notes, ended.errors, strict=True) if note not in line] == []


def refused(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended.errors
    assert len(ended.errors) == 1
    assert [part for part in ("error: ", *parts) if part not in ended.errors[0]] == []


# Addresses


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "nonsense", "host:port", "127.0.0.1:99999", "ray://x"])
def test_what_is_no_address(score: Score, address: str) -> None:
    refused(score(RAY_ADDRESS=address), f"RAY_ADDRESS = {address!r}: must be HOST:PORT", "unset it")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens(score: Score, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    ended = score(RAY_ADDRESS=address)
    refused(
        ended, f"RAY_ADDRESS = '{address}': does not answer (Connection refused); unset it, and --address = 'local'"
    )
    assert ended.seconds < 20
    refused(score("--address", address), f"--address = '{address}': does not answer", "start one, or set it to local")


def test_an_address_where_something_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match="answers, but not as a Ray cluster does"):
            environment.check_reachable("RAY_ADDRESS", address, "unset it")


def test_the_address_of_a_ray(ray_local: None) -> None:
    import ray

    environment.check_reachable("RAY_ADDRESS", ray.get_runtime_context().gcs_address, "unset it")


# Folders for temporary files, and the token


def test_temporary_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir("/tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path / LONG))
    assert environment.for_local_ray()["RAY_TMPDIR"] == "/tmp"
    assert "note: TMPDIR = " in capsys.readouterr().err
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / LONG))
    with pytest.raises(ResourceError, match=r"RAY_TMPDIR = .*Ray's sockets leave room for 37; give a short one"):
        environment.for_local_ray()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/here")
    with pytest.raises(ResourceError, match="RAY_TMPDIR = '/proc/here': cannot be written"):
        environment.for_local_ray()
    monkeypatch.setenv("RAY_TMPDIR", ".")
    assert environment.for_local_ray()["RAY_TMPDIR"] == "/tmp"
    assert capsys.readouterr().err == ""


def test_a_home_that_can_keep_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "RAY_AUTH_TOKEN" not in environment.for_local_ray()
    token = tmp_path / ".ray" / "auth_token"
    written = token.read_text()
    assert (len(written), token.stat().st_mode & 0o777) == (64, 0o600)
    assert "RAY_AUTH_TOKEN" not in environment.for_local_ray()
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    assert token.read_text() == written  # it stays
    monkeypatch.setenv("HOME", "/proc")
    assert len(environment.for_local_ray()["RAY_AUTH_TOKEN"] or "") == 64


def test_tokens_are_never_off(score: Score) -> None:
    refused(score(RAY_AUTH_MODE="disabled"), "RAY_AUTH_MODE = 'disabled': must be token", "unset it")


def test_too_few_open_files(score: Score) -> None:
    program = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
        "runpy.run_module('pipeline', run_name='__main__', alter_sys=True)"
    )
    refused(score(program=program), "open files (`ulimit -Hn`) = 64: must be at least 1024")


# What a shell leaves out


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n{INSTALLED}"
    ended = Command("-c", code, "status", "x", folder=tmp_path, environment={"PWD": str(gone)}).end()
    refused(ended, f"the current folder = '{gone}': is gone; change to another")


def test_streams_that_are_closed(pool: Path, tmp_path: Path) -> None:
    """No file gets their numbers, in which prints would end."""
    words = f"{sys.executable} -m pipeline ingest {pool} --out {tmp_path}/shards <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", words], cwd=ROOT).returncode == 0
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 1


def test_names_that_a_terminal_cannot_show(tmp_path: Path) -> None:
    for name in ("ölbild", os.fsdecode(b"\xff")):
        refused(
            Command(
                *("-m", "pipeline", "status", str(tmp_path / name)),
                folder=tmp_path,
                environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
            ).end(),
            f"'{tmp_path}/",
        )


@pytest.mark.slow
def test_it_works_all_the_same(score: Score, tmp_path: Path) -> None:
    """With warnings as errors, closed streams, no home folder that can be written, a long TMPDIR, a proxy that is not there."""
    (tmp_path / LONG).mkdir()
    changes = {
        "PYTHONWARNINGS": "error",
        "TMPDIR": str(tmp_path / LONG),
        "HOME": "/proc",
        "TERM": "dumb",
        "LC_ALL": "POSIX",
    }
    scored(score(**changes, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9"), "note: TMPDIR = ")


# Names like ours

WRONG = 'raise SystemExit("the wrong module")'


def shadow(folder: Path, as_packages: bool) -> None:
    folder.mkdir()
    for name in environment.PACKAGES:
        path = folder / name / "__init__.py" if as_packages else folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(WRONG)


@pytest.mark.slow
@pytest.mark.parametrize("as_packages", [False, True])
def test_a_folder_with_names_like_ours(folders: Path, tmp_path: Path, as_packages: bool) -> None:
    """A whole run there, with a network of the user's own."""
    work = tmp_path / "work"
    shadow(work, as_packages)
    (work / "mynetworks.py").write_text(
        "from torch import nn\n"
        "def small(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, num_classes))\n"
    )
    model = {"architecture": "mynetworks:small", "transform": tiny.MODEL["transform"]}
    recipe = tiny.recipe(str(folders), student={"model": model})
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    program = f"import os; os.chdir({str(work)!r})\n" + INSTALLED
    ended = Command("-c", program, "run", "recipe.yaml", "--run-dir", "run", folder=tmp_path).end(400)
    assert (ended.code, ended.errors, ended.left) == (0, [], [])
    source = ["--source", f"{folders}/unlabeled"]
    for words in (
        ["evaluate", "run/student", "--source", f"{folders}/test"],
        [
            "duplicates",
            *source,
            "--against",
            f"{folders}/test",
            "--model",
            "run/teacher",
            "--nearest",
            "3",
            "--out",
            "near",
        ],
    ):
        ended = Command("-c", program, *words, folder=tmp_path).end(200)
        assert (ended.code, ended.errors, ended.left) == (0, [], [])


def test_names_like_ours_on_the_path(tmp_path: Path) -> None:
    """PYTHONPATH=. in a folder that has them: ours are loaded with the first of ours."""
    shadow(tmp_path / "work", as_packages=False)
    first = f"import sys; sys.path[0] = {str(ROOT)!r}; import pipeline"
    code = f"{first}; sys.path[0] = {str(tmp_path / 'work')!r}; import models.card, tuning.sweep, cluster"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
