"""One training step of every shipped network, each in a process of its own: what crashes there is a failed test, not a dead one."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from models.config import ARCHITECTURES

STEPS = """
import json, sys
import torch
from torch.nn import functional
from models.architectures import build
from models.config import ModelConfig, Transform
from models.training.loop import layout, network_input

torch.set_num_threads(1)
name, cases = json.loads(sys.argv[1])
for options, size, batch in cases:
    print(options, size, flush=True)
    config = ModelConfig(architecture=name, options=options, transform=Transform(size=size, resize=size))
    torch.manual_seed(0)
    model, device = build(config, 10), torch.device("cpu")
    form = layout(model, device)
    model.to(device, memory_format=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    for _ in range(2):
        logits = model(network_input(images, config.transform, device, form))
        loss = functional.cross_entropy(logits, torch.arange(batch) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
"""
GIANTS = {"resnext101_32x48d": "828M parameters: a step takes over 10 GB"}


def cases(name: str) -> list[tuple[dict[str, int], int, int]]:
    """Options, sizes in pixels, batches."""
    if name.startswith("resnet") and int(name[6:]) not in (18, 50):
        return [({"width": width}, size, 4) for width in (2, 4, 8, 12, 16) for size in (28, 32, 64, 96)]
    widths: list[dict[str, int]] = [{}, {"width_per_group": 16}] if name == "resnet50" else [{}]
    sizes = (64,) if "101" in name else (32, 64, 96)
    return [(options, size, 2) for options in widths for size in sizes]


@pytest.mark.parametrize(
    "name", [name if name == "resnet8" else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_a_training_step(name: str) -> None:
    if name in GIANTS:
        pytest.skip(GIANTS[name])
    command = [sys.executable, "-c", STEPS, json.dumps([name, cases(name)])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (
        f"{name} ended with {done.returncode} at {done.stdout.splitlines()[-1:]}: {done.stderr}"
    )


@pytest.mark.parametrize(
    ("convolution", "narrow"),
    [
        (nn.Conv2d(8, 16, 1, stride=2), True),
        (nn.Conv2d(15, 64, 1, stride=2), True),
        (nn.Conv2d(16, 16, 1, stride=2), False),
        (nn.Conv2d(8, 16, 1), False),
        (nn.Conv2d(8, 16, 3, stride=2), False),
    ],
)
def test_only_narrow_networks_are_contiguous_and_only_on_a_cpu(convolution: nn.Module, narrow: bool) -> None:
    from models.training.loop import layout

    network = nn.Sequential(nn.ReLU(), convolution)
    assert (layout(network, torch.device("cpu")) is torch.contiguous_format) is narrow
    assert layout(network, torch.device("cuda")) is torch.channels_last
