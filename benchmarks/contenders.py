"""The contenders of `benchmarks.scoring`, each in a process of its own:

    python -m benchmarks.contenders NAME --folder FOLDER --cores 2

They score the images of a folder that `benchmarks.jpegs` made. What is printed at the end, as JSON: when the process started, in Unix time, and
after how many seconds how many images were scored.

- `limit`: a process for each core that reads tars, decodes and forwards with the same predictor as ours, and does nothing else;
- `tophat score`: ours, with the default settings, Parquet files published and the balance proven;
- `naive`: PyTorch's DataLoader with torchvision's transforms, `eval()` and `no_grad()`, a batch of 64;
- `ray data`: Ray's documented image classification pattern: `read_images`, `map`, `map_batches` with a class;
- `daft`: a Daft class UDF on downloaded, decoded and resized images; where the package `daft` is installed;
- `decode`: as `limit`, without the model;
- `ceiling`: the model alone, on a batch of floats that is already in memory, in a process for each core; on a GPU, in its memory.
"""

import argparse
import json
import multiprocessing
import os
import queue
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

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
        return rate(inside) if len(inside) >= 3 else None


def rate(marks: list[tuple[float, int]]) -> float:
    """Images/s from the first to the last of marks."""
    (began, before), (ended, images) = marks[0], marks[-1]
    return (images - before) / (ended - began)


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
    from models.inputs.image import evaluation_image

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
    from models.inputs.image import evaluation_image

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
    processes = [context.Process(target=work, args=(*one, answers), daemon=True) for one in arguments]
    for process in processes:
        process.start()
    running, images = len(processes), 0
    while running:
        try:
            scored = answers.get(timeout=10)
        except queue.Empty:
            if failed := next((process for process in processes if process.exitcode), None):
                raise RuntimeError(f"{failed.name} ended with {failed.exitcode}") from None
            continue
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
    from pipeline.data.sources import open_source
    from pipeline.recipe.images import Source
    from pipeline.recipe.sections import Score
    from pipeline.scoring.beside import TABLE, claim
    from pipeline.scoring.score import score

    class Marks(Progress):
        def update(self, done: int, rejected: int = 0, *, total: int | None = None, **facts: float) -> None:
            clock.mark(done)

    more: dict[str, Any] = {"gpus_per_actor": 1, "precision": "bfloat16"} if how.gpu else {}
    settings = Score(classes_per_image=CLASSES_PER_IMAGE, compile=how.compile, **more)
    source = open_source("--source", Source(uri=str(folder / "tars")))
    with tempfile.TemporaryDirectory(prefix="scores-", dir=folder) as out, Session(Cluster(cpus=cores)) as session:
        claim("--out", out, str(folder / "model"), source, settings)
        session.start()
        score(source, str(folder / "model"), f"{out}/{TABLE}", f"{out}/rejects", settings, Marks())


def naive(folder: Path, cores: int, how: How, clock: Clock) -> None:
    """The loop of PyTorch's tutorials."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from models.directory import load

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
            from models.directory import load

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
            from models.directory import load

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ALL)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gpu", action="store_true", help="one GPU, in bfloat16 where that is ours to choose")
    parser.add_argument("--compile", action="store_true", help="compiles the models of limit, tophat score and ceiling")
    arguments = parser.parse_args()
    clock = Clock()
    ALL[arguments.name](arguments.folder, arguments.cores, How(arguments.gpu, arguments.compile), clock)
    print("answer", json.dumps(asdict(clock)), flush=True)


if __name__ == "__main__":
    main()
