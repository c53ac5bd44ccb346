"""Networks for tests that go well on a small batch, as in the check when they are made, and fail on a larger one."""

import os

from torch import Tensor, nn


class Failing(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def reason(self) -> str:
        return "nothing\nto see"

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ValueError(self.reason())
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Telling(Failing):
    """Tells of its process how the C library keeps memory."""

    def reason(self) -> str:
        return " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
