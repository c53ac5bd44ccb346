"""How fast scoring is, against the limit of the machine and against what else a user would run.

    python -m benchmarks.scoring --heavy --images 2000 --shards 20 --rounds 5 --peers all
    python -m benchmarks.scoring --light --images 100000 --shards 100 --rounds 5 --peers all
    python -m benchmarks.scoring --light --images 10000,100000 --shards 10,100
    python -m benchmarks.scoring --light --images 100000 --shards 10,10000
    python -m benchmarks.scoring --heavy --images 2000 --shards 20 --compile
    python -m benchmarks.scoring --heavy --images 4000 --shards 40 --rounds 4 --turns 6

The same JPEGs lie in the given folder twice, as tar shards and as files: random crops of three real photographs, which come with
scikit-learn and matplotlib. The model has random weights: ResNet-50 at 224 pixels from JPEGs of 340 x 256 (`--heavy`), one of the
paper's smaller teachers from the same (`--large`, for GPUs), or a ResNet of 8 layers at 64 pixels from JPEGs of 96 x 72 (`--light`).
Every contender runs once a round, in turn, in a process of its own and on the same cores. Reported are medians over the rounds:

- whole: images/s from the start of the process to its last score, everything included;
- steady: images/s between a quarter and nine tenths of the images;
- first: seconds from the start of the process to the first scores;
- peak: memory of all processes of the contender together (proportional set size, looked at now and then), the highest of the rounds;
- / base: where several numbers of images or shards are given, the rate against the one with the first of them; a round has them all.

With `--turns`, the contenders of a round run at once on the same cores, in turns of so many seconds: all processes of the others are stopped
meanwhile. What the machine gains or loses in minutes is then nobody's. Only steady rates are reported, of a contender's own turns and
while all have scored a quarter and none nine tenths of the images.

The contenders are those of `benchmarks.contenders`: a hand-written loop that is the limit, ours, and, with `--peers`, others.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.contenders import OURS, PEERS, Clock, How, rate
from benchmarks.jpegs import SIZES, generate
from benchmarks.processes import Memory, Turns, send
from pipeline.scoring.actors import KEPT_MEMORY

START_SECONDS = 40
"""The first turn of each, in which it starts; the next ones wait as long for each of the others."""


class Run(NamedTuple):
    """One run of one contender: images, images/s as a whole and in steady state, seconds to the first scores, GiB at most."""

    images: int
    whole: float
    steady: float | None
    first: float
    peak: float


@contextmanager
def started(name: str, folder: Path, cores: int, how: How) -> Iterator["subprocess.Popen[str]"]:
    """A contender, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.contenders", name, "--folder", str(folder), "--cores", str(cores)]
    environment = {
        **os.environ,
        "RAY_worker_niceness": "0",  # Ray's own default, 15, is not the others'
        "RAY_AUTH_MODE": "disabled" if name == "ray data" else "token",
        **(KEPT_MEMORY if name in ("limit", "ceiling") else {}),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryDirectory(prefix="tophat-kernels-") as kernels:  # each run makes its own
        process = subprocess.Popen(
            [*command, *["--gpu"] * how.gpu, *["--compile"] * how.compile],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "TORCHINDUCTOR_CACHE_DIR": kernels},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends a contender: as ^C does, and where that does not, at once."""
    send(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        send(process.pid, signal.SIGKILL)


def answer(name: str, printed: str, errors: str) -> Clock:
    """When a contender had scored how many images."""
    found = next((line for line in printed.splitlines() if line.startswith("answer ")), None)
    if found is None:
        raise RuntimeError(f"{name} ended early:\n{errors[-3000:]}")
    return Clock(**json.loads(found.removeprefix("answer ")))


def once(name: str, folder: Path, cores: int, how: How) -> Run:
    """Runs a contender once."""
    with started(name, folder, cores, how) as process, Memory(process.pid, share=0.005) as memory:
        clock = answer(name, *process.communicate())
    at, images = clock.marks[-1]
    return Run(images, images / at, clock.steady(), clock.marks[0][0], memory.peak)


def in_turns(names: list[str], folder: Path, cores: int, how: How, seconds: float) -> dict[str, float]:
    """Images/s of contenders that run at once and in turns, each in its own turns; of all in the same minutes."""
    clocks: dict[str, Clock] = {}
    with ExitStack() as stack:
        turns = {}
        for name in names:
            turns[name] = Turns(stack.enter_context(started(name, folder, cores, how)))
            if (printed := turns[name].take(START_SECONDS)) is not None:
                answer(name, *printed)
                raise RuntimeError(f"{name} ended within {START_SECONDS} seconds: give more images")
        begin = time.time()
        while len(clocks) < len(names):
            for name in names:
                # Where one has ended, the others do so at leisure: that is not counted.
                if name not in clocks and (printed := turns[name].take(None if clocks else seconds)) is not None:
                    clocks[name] = answer(name, *printed)
    if len({clock.marks[-1][1] for clock in clocks.values()}) > 1:
        raise RuntimeError("the contenders did not score as many images")
    marks = {name: [(clock.start + at, images) for at, images in clock.marks] for name, clock in clocks.items()}
    total = next(iter(marks.values()))[-1][1]
    begin = max(begin, *(next(at for at, images in each if images >= 0.25 * total) for each in marks.values()))
    end = min(next(at for at, images in each if images >= 0.9 * total) for each in marks.values())
    rates = {}
    for name, each in marks.items():
        inside = [(turns[name].ran(at), images) for at, images in each if begin <= at <= end]
        if len(inside) < 10:
            raise RuntimeError(f"{name} scored too few images while all ran: give more")
        rates[name] = rate(inside)
    return rates


def compare_in_turns(
    folders: dict[Path, str], names: list[str], rounds: int, cores: int, how: How, seconds: float
) -> None:
    """Runs the contenders `rounds` times in turns of so many seconds, and prints medians and ratios."""
    for folder, title in folders.items():
        found: list[dict[str, float]] = []
        for number in range(rounds):
            order = names[:: -1 if number % 2 else 1]  # as who started last was seen to gain 3% by it
            found.append(in_turns(order, folder, cores, how, seconds))
            rates = ", ".join(f"{name} {found[-1][name]:.1f}/s" for name in order)
            print(f"round {number + 1}: {folder.name}, {rates}", flush=True)
        print(f"\n{title}, {cores} cores, medians of {rounds} rounds in turns of {seconds:g} s")
        print(f"{'':<13} {'steady/s':>9} {'ours / it':>9}  in each round")
        for name in names:
            its, ours = (statistics.median(rates[one] for rates in found) for one in (name, OURS))
            each = " ".join(f"{rates[OURS] / rates[name]:.2f}" for rates in found)
            print(f"{name:<13} {its:9.1f} {ours / its:9.2f}  {each}")


def compare(folders: dict[Path, str], names: list[str], rounds: int, cores: int, how: How) -> None:
    """Runs the contenders in turn, `rounds` times, on every folder in turn, and prints medians and ratios."""
    found: dict[tuple[Path, str], list[Run]] = {(folder, name): [] for folder in folders for name in names}
    images: dict[Path, int] = {}
    for number in range(rounds):
        # Every other round backwards: what the machine loses or gains in the meantime is nobody's.
        for folder, name in list(found)[:: -1 if number % 2 else 1]:
            run = once(name, folder, cores, how)
            found[folder, name].append(run)
            if name in ("limit", OURS) and images.setdefault(folder, run.images) != run.images:
                raise RuntimeError(f"{name} scored {run.images} images, and another run {images[folder]}")
            steady = "      -" if run.steady is None else f"{run.steady:7.1f}"
            print(
                f"round {number + 1}: {folder.name}, {name:<13} whole {run.whole:7.1f}/s, steady {steady}/s, "
                f"first {run.first:.1f} s, peak {run.peak:.2f} GiB",
                flush=True,
            )

    def median(folder: Path, name: str, what: str) -> float:
        values = [value for run in found[folder, name] if (value := getattr(run, what)) is not None]
        return statistics.median(values) if values else float("nan")

    base = next(iter(folders))
    for folder, title in folders.items():
        print(f"\n{title}, {cores} cores, medians of {rounds} rounds")
        print(
            f"{'':<13} {'whole/s':>9} {'ours / it':>9} {'/ base':>7} {'steady/s':>9} {'ours / it':>9} {'/ base':>7} "
            f"{'first s':>8} {'peak GiB':>9}"
        )
        for name in names:
            line = f"{name:<13}"
            for what in ("whole", "steady"):
                rate, ours_rate, base_rate = (
                    median(*at, what) for at in ((folder, name), (folder, OURS), (base, name))
                )
                line += f" {rate:9.1f} {ours_rate / rate:9.2f} {rate / base_rate:7.2f}"
            print(f"{line} {median(folder, name, 'first'):8.1f} {max(run.peak for run in found[folder, name]):9.2f}")


def _folders(arguments: argparse.Namespace, base: Path) -> Iterator[tuple[Path, str]]:
    size = next((size for size in SIZES if getattr(arguments, size)), "light")
    several = max(len(arguments.images), len(arguments.shards))
    counts = [each * several if len(each) == 1 else each for each in (arguments.images, arguments.shards)]
    for images, shards in zip(*counts, strict=True):
        folder = base / f"{size}-{images}-{shards}"
        if not folder.exists():
            temporary = folder.with_name(f".{folder.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            generate(temporary, SIZES[size], images, shards)
            temporary.rename(folder)
        yield folder, f"{size}, {images:,} images in {shards:,} shards"


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts) or len({*counts}) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1, like 2000, or several with commas")
    return [int(count) for count in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--heavy", action="store_true", help="ResNet-50 at 224 pixels")
    kind.add_argument("--large", action="store_true", help="ResNeXt-101 32x8d at 224 pixels, for GPUs")
    kind.add_argument("--light", action="store_true", help="ResNet-8 at 64 pixels, the default")
    parser.add_argument("--images", type=_counts, default=[2_000], help="one number, or several with commas")
    parser.add_argument("--shards", type=_counts, default=[20], help="that they lie in: one number, or as many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--turns", type=float, metavar="SECONDS", help="run the contenders of a round at once, in turns"
    )
    parser.add_argument("--peers", default="", help=f"some of {', '.join(PEERS)}, with commas; or all")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--gpu", action="store_true", help="models on one GPU, in bfloat16 where that is ours to choose"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the models of limit, tophat score and ceiling"
    )
    parser.add_argument("--folder", type=Path, help="where the images are kept; by default a temporary folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as ^C: nothing is left, stopped or running
    if 1 not in (len(arguments.images), len(arguments.shards)) and len(arguments.images) != len(arguments.shards):
        parser.error("argument --shards: takes one number, or as many as --images")
    if arguments.rounds < 1:
        parser.error("argument --rounds: must be a whole number from 1")
    if arguments.turns is not None:
        if not arguments.turns > 0:
            parser.error("argument --turns: must be a number above 0")
        if arguments.gpu:
            parser.error("argument --turns: a GPU goes on with what a stopped process asked of it")
        if arguments.rounds % 2:
            parser.error("argument --rounds: must be even with --turns, so that each is as often the last to start")
    how = How(arguments.gpu, arguments.compile)
    peers = list(PEERS) if arguments.peers == "all" else [name for name in arguments.peers.split(",") if name]
    if unknown := ", ".join(peer for peer in peers if peer not in PEERS):
        parser.error(f"argument --peers: {unknown} is none of {', '.join(PEERS)}")
    if "daft" in peers and importlib.util.find_spec("daft") is None:
        print("daft is not installed, and left out")
        peers.remove("daft")
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="tophat-scoring-"))
    try:
        folders = dict(_folders(arguments, base))
        names = ["limit", OURS, *peers]
        if arguments.turns is None:
            compare(folders, names, arguments.rounds, arguments.cores, how)
        else:
            compare_in_turns(folders, names, arguments.rounds, arguments.cores, how, arguments.turns)
    finally:
        if arguments.folder is None:
            shutil.rmtree(base)


if __name__ == "__main__":
    main()
