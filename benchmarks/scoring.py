"""How fast scoring is, against the limit of the machine and against what else a user would run.

    python -m benchmarks.scoring --heavy --images 2000 --shards 20 --rounds 5 --peers all
    python -m benchmarks.scoring --light --images 100000 --shards 100 --rounds 5 --peers all
    python -m benchmarks.scoring --light --images 10000,100000 --shards 10,100
    python -m benchmarks.scoring --light --images 100000 --shards 10,10000
    python -m benchmarks.scoring --heavy --images 2000 --shards 20 --compile

The same JPEGs lie in the given folder twice, as tar shards and as files: random crops of three real photographs, which come with
scikit-learn and matplotlib. The model has random weights: ResNet-50 at 224 pixels from JPEGs of 340 x 256 (`--heavy`), one of the
paper's smaller teachers from the same (`--large`, for GPUs), or a ResNet of 8 layers at 64 pixels from JPEGs of 96 x 72 (`--light`).
Every contender runs once a round, in turn, in a process of its own and on the same cores. Reported are medians over the rounds:

- whole: images/s from the start of the process to its last score, everything included;
- steady: images/s between a quarter and nine tenths of the images;
- first: seconds from the start of the process to the first scores;
- peak: memory of all processes of the contender together (proportional set size), the highest of the rounds;
- / base: where several numbers of images or shards are given, the rate against the one with the first of them; a round has them all.

The contenders:

- `limit`: a process for each core that reads tars, decodes and forwards with the same predictor as ours, and does nothing else;
- `tophat score`: ours, with the default settings, Parquet files published and the balance proven;
- `naive`: PyTorch's DataLoader with torchvision's transforms, `eval()` and `no_grad()`, a batch of 64;
- `ray data`: Ray's documented image classification pattern: `read_images`, `map`, `map_batches` with a class;
- `daft`: a Daft class UDF on downloaded, decoded and resized images; where the package `daft` is installed;
- `decode`: as `limit`, without the model;
- `ceiling`: the model alone, on a batch of floats that is already in memory, in a process for each core; on a GPU, in its memory.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.jpegs import SIZES, generate
from benchmarks.selection import Memory

OURS = "tophat score"
CLASSES_PER_IMAGE = 10


@dataclass
class Clock:
    """When how many images were scored, in seconds since this process started."""

    start: float = field(default_factory=lambda: time.time() - _age())
    marks: list[tuple[float, int]] = field(default_factory=list)

    def mark(self, images: int) -> None:
        """So many images are scored now."""
        if images and (not self.marks or images > self.marks[-1][1]):
            self.marks.append((time.time() - self.start, images))

    def steady(self) -> float | None:
        """Images/s between a quarter and nine tenths of all; None where there are too few marks to tell."""
        total = self.marks[-1][1]
        inside = [(at, images) for at, images in self.marks if 0.25 * total <= images <= 0.9 * total]
        if len(inside) < 3:
            return None
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def _age() -> float:
    """Seconds since this process started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


class How(NamedTuple):
    """What the models run on, and whether those of `limit`, ours and `ceiling` are compiled."""

    gpu: bool
    compile: bool


def _predictor(folder: Path, how: How) -> Any:
    from models.inference import Inference, Predictor

    precision: Literal["bfloat16", "float32"] = "bfloat16" if how.gpu else "float32"
    predict = Predictor(
        str(folder / "model"), Inference(CLASSES_PER_IMAGE, gpu=how.gpu, precision=precision, compile=how.compile)
    )
    if how.compile or how.gpu:
        side = predict.transform.size
        predict(np.zeros((predict.batch_size, 3, side, side), np.uint8))
    return predict


def _contents(folder: Path, part: int, parts: int) -> Iterator[bytes]:
    """Every `parts`th image of the tars; the others are skipped over by their headers."""
    row = 0
    for tar in sorted((folder / "tars").iterdir()):
        with tarfile.open(tar) as archive:
            for member in archive:
                row += 1
                if row % parts == part:
                    content = archive.extractfile(member)
                    assert content is not None
                    yield content.read()


def _limit_part(folder: Path, part: int, parts: int, how: How, answers: Any) -> None:
    from models.card import read_card
    from models.transforms import evaluation_image

    predict, transform = _predictor(folder, how), read_card(str(folder / "model")).model.transform
    buffer = np.empty((predict.batch_size, 3, transform.size, transform.size), np.uint8)
    filled = 0
    for content in _contents(folder, part, parts):
        buffer[filled] = evaluation_image(content, transform)
        filled += 1
        if filled == len(buffer):
            answers.put(len(predict(buffer).classes))
            filled = 0
    if filled:
        answers.put(len(predict(buffer[:filled]).classes))
    answers.put(None)


def _decode_part(folder: Path, part: int, parts: int, answers: Any) -> None:
    from models.card import read_card
    from models.transforms import evaluation_image

    transform = read_card(str(folder / "model")).model.transform
    number = 0
    for number, content in enumerate(_contents(folder, part, parts), 1):
        evaluation_image(content, transform)
        if number % 64 == 0:
            answers.put(64)
    answers.put(number % 64)
    answers.put(None)


def _ceiling_part(folder: Path, images: int, parts: int, how: How, answers: Any) -> None:
    import torch

    predict = _predictor(folder, how)
    side = predict.transform.size
    batch = torch.randn(predict.batch_size, 3, side, side).to("cuda" if how.gpu else "cpu")
    batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        predict._forward(batch)
        before = None
        for _ in range(-(-images // (parts * len(batch)))):
            predict._forward(batch)
            now = torch.cuda.current_stream().record_event() if how.gpu else None
            if before is not None:
                before.synchronize()  # a GPU has the next batch before it ends one
            before = now
            answers.put(len(batch))
        if before is not None:
            before.synchronize()
    answers.put(None)


def _in_parts(work: Callable[..., None], arguments: list[tuple[Any, ...]], clock: Clock) -> None:
    """Runs `work` in a process for each of `arguments`."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=work, args=(*one, answers)) for one in arguments]
    for process in processes:
        process.start()
    running, images = len(processes), 0
    while running:
        scored = answers.get()
        running -= scored is None
        images += scored or 0
        clock.mark(images)
    for process in processes:
        process.join()


def limit(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """A process for each core; reads, decodes and forwards."""
    _in_parts(_limit_part, [(folder, part, cores, how) for part in range(cores)], clock)


def decode(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """A process for each core; reads and decodes."""
    _in_parts(_decode_part, [(folder, part, cores) for part in range(cores)], clock)


def ceiling(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """The model on a resident batch."""
    images = sum(1 for _ in (folder / "files").iterdir())
    parts = 1 if how.gpu else cores
    _in_parts(_ceiling_part, [(folder, images, parts, how)] * parts, clock)


def ours(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """`tophat score`, without its terminal."""
    from cluster.config import Cluster
    from cluster.progress import Progress
    from cluster.session import Session
    from pipeline.recipe import Score, Source
    from pipeline.scoring import claim, score
    from pipeline.sources import open_source

    class Marks(Progress):
        def update(self, done: int, rejected: int = 0, *, total: int | None = None, **facts: float) -> None:
            clock.mark(done)

    more: dict[str, Any] = {"gpus_per_actor": 1, "precision": "bfloat16"} if how.gpu else {}
    settings = Score(classes_per_image=CLASSES_PER_IMAGE, compile=how.compile, **more)
    source = open_source("--source", Source(uri=str(folder / "tars")))
    with tempfile.TemporaryDirectory(prefix="scores-", dir=folder) as out, Session(Cluster(cpus=cores)) as session:
        claim("--out", out, str(folder / "model"), source, settings)
        session.start()
        score(source, str(folder / "model"), out, f"{out}/_rejects", settings, Marks())


def naive(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """The loop of PyTorch's tutorials."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from models.checkpoint import load

    loaded = load(str(folder / "model"))
    seen = loaded.config.transform
    steps = [transforms.Resize(seen.resize), transforms.CenterCrop(seen.size), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(seen.mean, seen.std)])
    files = sorted((folder / "files").iterdir())

    class Files(Dataset[Any]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> Any:
            with Image.open(files[index]) as image:
                return transform(image.convert("RGB"))

    device = torch.device("cuda" if how.gpu else "cpu")
    model = loaded.model.to(device).eval()
    images = 0
    with torch.no_grad():
        for batch in DataLoader(Files(), batch_size=64, num_workers=cores):
            model(batch.to(device)).softmax(1).topk(CLASSES_PER_IMAGE)
            images += len(batch)
            clock.mark(images)


def ray_data(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """As in Ray's example "Image Classification Batch Inference with PyTorch ResNet"."""
    import ray
    import torch
    from torchvision import transforms

    from models.card import read_card

    seen = read_card(str(folder / "model")).model.transform
    ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        steps = [
            transforms.ToTensor(),
            transforms.Resize(seen.resize, antialias=True),
            transforms.CenterCrop(seen.size),
        ]
        return {"image": transforms.Compose([*steps, transforms.Normalize(seen.mean, seen.std)])(row["image"])}

    class Model:
        def __init__(self) -> None:
            from models.checkpoint import load

            self.device = torch.device("cuda" if how.gpu else "cpu")
            self.model = load(str(folder / "model")).model.to(self.device).eval()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            with torch.inference_mode():
                found = self.model(torch.as_tensor(batch["image"], device=self.device)).softmax(1)
            top = found.topk(CLASSES_PER_IMAGE)
            return {"class_ids": top.indices.cpu().numpy(), "scores": top.values.cpu().numpy()}

    actors = 1 if how.gpu else max(1, cores // 2)  # as many hold CPUs as leave some to those that read
    predicted = (
        ray.data.read_images(str(folder / "files"), mode="RGB")
        .map(preprocess)
        .map_batches(Model, batch_size=64, concurrency=actors, num_gpus=int(how.gpu))
    )
    images = 0
    for batch in predicted.iter_batches(batch_size=None, batch_format="pyarrow"):
        images += len(batch)
        clock.mark(images)
    ray.shutdown()


def daft(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """As in Daft's guide to class UDFs."""
    import daft as peer
    import torch
    from torchvision import transforms

    from models.card import read_card

    seen = read_card(str(folder / "model")).model.transform
    steps = [transforms.ToTensor(), transforms.Resize(seen.resize, antialias=True), transforms.CenterCrop(seen.size)]
    transform = transforms.Compose([*steps, transforms.Normalize(seen.mean, seen.std)])

    @peer.cls(max_concurrency=1 if how.gpu else cores, gpus=int(how.gpu), use_process=True)  # type: ignore[untyped-decorator,unused-ignore]
    class Model:
        def __init__(self) -> None:
            from models.checkpoint import load

            torch.set_num_threads(1)
            self.device = torch.device("cuda" if how.gpu else "cpu")
            self.model = load(str(folder / "model")).model.to(self.device).eval()

        @peer.method.batch(return_dtype=peer.DataType.int64(), batch_size=64)  # type: ignore[untyped-decorator,unused-ignore]
        def best(self, images: Any) -> Any:
            batch = torch.stack([transform(image) for image in images.to_pylist()]).to(self.device)
            with torch.inference_mode():
                return self.model(batch).softmax(1).topk(CLASSES_PER_IMAGE).indices[:, 0].cpu().numpy()

    table = peer.from_glob_path(f"{folder}/files/*.jpg")
    decoded = table["path"].download().decode_image(mode=peer.ImageMode.RGB)
    images = 0
    for part in table.select(Model().best(decoded).alias("class_id")).to_arrow_iter():
        images += len(part)
        clock.mark(images)


PEERS: dict[str, Callable[[Path, int, How, Clock], None]] = {
    "naive": naive,
    "ray data": ray_data,
    "daft": daft,
    "decode": decode,
    "ceiling": ceiling,
}
ALL = {"limit": limit, OURS: ours, **PEERS}


def serve(name: str, folder: Path, cores: int, how: How) -> None:
    """Runs one contender and prints its answer."""
    clock = Clock()
    ALL[name](folder, cores, how, clock)
    at, images = clock.marks[-1]
    print("answer", json.dumps([images, images / at, clock.steady(), clock.marks[0][0]]), flush=True)


class Run(NamedTuple):
    """One run of one contender: images, images/s as a whole and in steady state, seconds to the first scores, GiB at most."""

    images: int
    whole: float
    steady: float | None
    first: float
    peak: float


def once(name: str, folder: Path, cores: int, how: How) -> Run:
    """Runs a contender once, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.scoring",
        "--serve",
        name,
        "--folder",
        str(folder),
        "--cores",
        str(cores),
    ]
    environment = {
        **os.environ,
        "RAY_worker_niceness": "0",  # Ray's own default, 15, is not the others'
        "RAY_AUTH_MODE": "disabled" if name == "ray data" else "token",
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
        with Memory(process.pid) as memory:
            printed, errors = process.communicate()
    found = next((line for line in printed.splitlines() if line.startswith("answer ")), None)
    if found is None:
        raise RuntimeError(f"{name} ended early:\n{errors[-3000:]}")
    images, whole, steady, first = json.loads(found.removeprefix("answer "))
    return Run(images, whole, steady, first, memory.peak)


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
    parser.add_argument("--peers", default="", help=f"some of {', '.join(PEERS)}, with commas; or all")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--gpu", action="store_true", help="models on one GPU, in bfloat16 where that is ours to choose"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the models of limit, tophat score and ceiling"
    )
    parser.add_argument("--folder", type=Path, help="where the images are kept; by default a temporary folder")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if 1 not in (len(arguments.images), len(arguments.shards)) and len(arguments.images) != len(arguments.shards):
        parser.error("argument --shards: takes one number, or as many as --images")
    if arguments.rounds < 1:
        parser.error("argument --rounds: must be a whole number from 1")
    how = How(arguments.gpu, arguments.compile)
    if arguments.serve:
        serve(arguments.serve, arguments.folder, arguments.cores, how)
        return
    peers = list(PEERS) if arguments.peers == "all" else [name for name in arguments.peers.split(",") if name]
    if unknown := ", ".join(peer for peer in peers if peer not in PEERS):
        parser.error(f"argument --peers: {unknown} is none of {', '.join(PEERS)}")
    if "daft" in peers and importlib.util.find_spec("daft") is None:
        print("daft is not installed, and left out")
        peers.remove("daft")
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="tophat-scoring-"))
    try:
        folders = dict(_folders(arguments, base))
        compare(folders, ["limit", OURS, *peers], arguments.rounds, arguments.cores, how)
    finally:
        if arguments.folder is None:
            shutil.rmtree(base)


if __name__ == "__main__":
    main()
