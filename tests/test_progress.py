"""Progress from worker processes to the terminal."""

import io
import time

import pytest
import ray
from rich.console import Console

from cluster.progress import SILENT, Display, Progress, _Pace


def test_counts_of_workers_and_parts_add_up(ray_local: None) -> None:
    @ray.remote(num_cpus=0.1)
    def work(progress: Progress, part: str) -> None:
        for _ in range(5):
            progress.part(part).add(done=2, rejected=1)

    out = io.StringIO()
    display = Display(Console(file=out))
    with display.task("counting", 50) as progress:
        ray.get([work.remote(progress, part) for part in ("a", "a", "b")])
        progress.part("c").update(7, 1, total=9, loss=0.5)
        deadline = time.monotonic() + 20
        while (state := display._read(progress)) is None or state.done < 37:
            assert time.monotonic() < deadline
    assert (state.done, state.rejected, state.total, state.facts) == (37, 16, 9, {"loss": 0.5})
    assert out.getvalue().strip().endswith("16 rejected loss 0.5")


def test_a_log_gets_lines_and_no_control_characters() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=40), here=True).task("[red]scores", 10) as progress:
        progress.update(8, 2, top1=0.25)
    line = out.getvalue().strip().splitlines()[-1]
    assert line.startswith("[red]scores: 10 of 10 images")
    assert line.endswith("2 rejected top1 0.25")
    assert "\x1b" not in line


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=160), here=True).task("scores", 10) as progress:
        progress.update(10)
    assert "10/10" in out.getvalue()
    assert "✓" in out.getvalue()


def test_work_of_this_process_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "remote", None)
    monkeypatch.setattr(ray, "get", None)
    out = io.StringIO()
    with Display(Console(file=out, width=40), here=True).task("ingest", None) as progress:
        progress.update(3, total=9)
        progress.part("other").add(1, rejected=2)
    assert out.getvalue().startswith("ingest: 6 of 9 images")
    assert "2 rejected" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_stays_of_what_had_nothing_to_do(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=terminal)
    with Display(console, here=True).task("ingest", None):
        pass
    assert ("ingest" in out.getvalue()) == terminal  # its bar is drawn first
    left = out.getvalue().rpartition("\x1b[2K")[2]  # what follows the last line that is cleared
    assert "ingest" not in left


def test_the_pace_leaves_out_the_start() -> None:
    pace = _Pace()
    assert pace.text(0, 100) == "starting"
    pace.text(10, 100)
    time.sleep(0.2)
    rate = pace.text(30, 100)
    assert rate.endswith(" left")
    assert 50 < float(rate.partition("/s")[0]) <= 100  # 20 images in at least 0.2 s


def test_silence_is_free() -> None:
    SILENT.update(1)
    SILENT.add(1)
    assert SILENT.part("x") == Progress(name="x")
