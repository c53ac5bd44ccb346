"""JPEGs to score, in any number: random crops of three real photographs, which come with scikit-learn and matplotlib."""

import io
import multiprocessing
import random
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

QUALITY = 90


@dataclass(frozen=True)
class Size:
    """What is scored: the architecture, the side that enters it, the shorter side before the crop, the JPEGs' size."""

    architecture: str
    options: dict[str, int]
    side: int
    resize: int
    jpeg: tuple[int, int]


SIZES = {
    "heavy": Size("resnet50", {}, 224, 256, (340, 256)),
    "large": Size("resnext101_32x8d", {}, 224, 256, (340, 256)),
    "light": Size("resnet8", {}, 64, 64, (96, 72)),
}


@cache
def photographs() -> list[Any]:
    """Three real photographs, RGB."""
    import matplotlib
    from PIL import Image
    from sklearn import datasets

    folders = [Path(datasets.__file__).parent / "images", Path(matplotlib.get_data_path()) / "sample_data"]
    return [Image.open(p).convert("RGB") for folder in folders for p in sorted(folder.glob("*.jpg"))]


def generate(folder: Path, size: Size, images: int, shards: int) -> None:
    """Writes the tar shards `tars/`, the files `files/`, and the model directory `model/`; what exists stays."""
    import torch

    from models.architectures import build
    from models.config import ModelConfig, Transform
    from models.directory import save

    transform = Transform(size=size.side, resize=size.resize)
    config = ModelConfig(architecture=size.architecture, options=dict(size.options), transform=transform)
    torch.manual_seed(0)
    names = [f"class {i}" for i in range(1000)]
    save(str(folder / "model"), build(config, 1000), config=config, class_names=names, metrics={}, provenance={})
    (folder / "tars").mkdir()
    (folder / "files").mkdir()
    parts = (part.tolist() for part in np.array_split(np.arange(images), shards))
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.starmap(_write, [(folder, size, shard, part) for shard, part in enumerate(parts)])


def _write(folder: Path, size: Size, shard: int, numbers: list[int]) -> None:
    """Images of one shard, as a tar and as files."""
    with tarfile.open(folder / "tars" / f"{shard:06d}.tar", "w") as archive:
        for number in numbers:
            data = _jpeg(photographs(), size, number)
            (folder / "files" / f"{number:08d}.jpg").write_bytes(data)
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _jpeg(originals: list[Any], size: Size, number: int) -> bytes:
    rng = random.Random(number)
    original = originals[number % len(originals)]
    across = rng.uniform(0.4, 0.95) * min(original.width, original.height * size.jpeg[0] / size.jpeg[1])
    down = across * size.jpeg[1] / size.jpeg[0]
    left, top = rng.uniform(0, original.width - across), rng.uniform(0, original.height - down)
    sink = io.BytesIO()
    original.resize(size.jpeg, box=(left, top, left + across, top + down)).save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()
