"""Networks for tests that fail, or tell of their process."""

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor, nn


class Failing(nn.Module):
    """Goes well on a small batch, as in the check when it is made, and fails on a larger one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def reason(self) -> str:
        return "nothing\nto see"

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ValueError(self.reason())
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Crashing(nn.Module):
    """A network whose process has a real segmentation fault at training step `at`, for the first `times` times.

    Each crash adds a line to the file `note`. The step is in the state dict, so that it goes on after a restart.
    """

    steps: Tensor

    def __init__(self, num_classes: int, at: int, times: int, note: str) -> None:
        super().__init__()
        self.at, self.times, self.note = at, times, Path(note)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            crashes = self.note.read_text().count("\n") if self.note.exists() else 0
            if self.steps == self.at and crashes < self.times:
                with self.note.open("a") as file:
                    file.write(f"{os.getpid()}\n")
                ctypes.string_at(0)
        return self.fc(self.conv(x).relu().mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Fragile(Crashing):
    """Its outputs are no numbers once a weight is above `limit`, as with too high a learning rate."""

    def __init__(self, num_classes: int, at: int, times: int, note: str, limit: float) -> None:
        super().__init__(num_classes, at, times, note)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.fc.weight.abs().max() < self.limit else float("nan"))


class Telling(Failing):
    """Tells of its process how the C library keeps memory."""

    def reason(self) -> str:
        return " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
