"""A network for tests that goes well on a small batch, as in the check when it is made, and fails on a larger one."""

from torch import Tensor, nn


class Failing(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ValueError("nothing\nto see")
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]
