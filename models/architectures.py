"""Networks by name, other libraries', and any user's own by import path.

The large ones are torchvision's own class with the paper's sizes (section 4.1). Parameters, in millions, against
Table 3: ResNet-50 25.6 (25), ResNeXt-50 32x4 25.0 (25), ResNeXt-101 32x4 44.2 (43), 32x8 88.8 (88), 32x16 194.0 (193),
32x48 828.4 (829). The table rounds without one rule, within 3%; its 8.6M for ResNet-18 is not the standard network, which
has 11.7M and is the one here.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from cluster.errors import ModelError, shown
from models.config import LIBRARIES, ModelConfig
from models.libraries import build_named

Factory = Callable[..., nn.Module]


class SmallResNet(nn.Module):
    """The CIFAR networks of He et al. 2015, section 4.2: 6n+2 layers, stages of 16, 32 and 64 channels, for small images.

    Names in the state dict are as in torchvision's ResNet. Shortcuts between stages are 1x1 convolutions.

    Args:
        depth: 6n+2.
        width: channels of the first stage; the paper's is 16.
    """

    def __init__(self, depth: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """float [N, 3, H, W] to logits [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def _large(block: type[BasicBlock | Bottleneck], layers: list[int], **sizes: int) -> Factory:
    return lambda num_classes, **options: ResNet(block, layers, num_classes=num_classes, **{**sizes, **options})


def _small(depth: int) -> Factory:
    return lambda num_classes, **options: SmallResNet(depth, num_classes, **options)


_FACTORIES: dict[str, Factory] = {
    "resnet18": _large(BasicBlock, [2, 2, 2, 2]),
    "resnet50": _large(Bottleneck, [3, 4, 6, 3]),
    "resnext50_32x4d": _large(Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4),
    **{
        f"resnext101_32x{width}d": _large(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=width)
        for width in (4, 8, 16, 48)
    },
    **{f"resnet{depth}": _small(depth) for depth in (8, 14, 20, 32, 44, 56)},
}


def build(config: ModelConfig, num_classes: int) -> nn.Module:
    """A network with fresh weights, float32, on the CPU, in training mode.

    A library's network (`models.libraries`) needs that library. An import path runs the user's code: `package.module` is
    imported and `factory(num_classes=..., **options)` called.

    Args:
        config: the architecture, its options, and the size of its input.
        num_classes: length of the output; at least 1.

    Raises:
        ModelError: a failing import or factory, a result that is not a network of the right output.
    """
    name = config.architecture
    library = name.partition(":")[0] in LIBRARIES
    factory: Factory = partial(_of_library, name) if library else factory_of(name)
    try:
        model = factory(num_classes=num_classes, **config.options)
    except ModelError:
        raise
    except Exception as error:  # a factory is the user's code, options are the user's
        raise ModelError(
            "architecture",
            name,
            f"could not be built with num_classes = {num_classes} and options {shown(config.options)} "
            f"({type(error).__name__}: {error})",
            "correct the options or the factory",
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError("architecture", name, f"returned a {type(model).__name__}", "return a torch.nn.Module")
    if ":" in name:
        _check_output(name, model, config.transform.size, num_classes)
    return model.train()


def _of_library(name: str, num_classes: int, **options: Any) -> nn.Module:
    return build_named(name, num_classes, options)


def factory_of(name: str) -> Factory:
    """What builds a network: a known one, or a user's own by its import path.

    Raises:
        ModelError: the path cannot be imported, or what is there cannot be called.
    """
    if name in _FACTORIES:
        return _FACTORIES[name]
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the import runs the user's code
        raise ModelError(
            "architecture",
            name,
            f"could not be imported ({type(error).__name__}: {error})",
            "install the package or correct the path",
        ) from error
    if not callable(found):
        raise ModelError("architecture", name, "cannot be called", "name a factory or an nn.Module class")
    factory: Factory = found
    return factory


def _check_output(name: str, model: nn.Module, size: int, num_classes: int) -> None:
    model.eval()
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, 3, size, size))
    except Exception as error:  # the forward pass is the user's code
        raise ModelError(
            "architecture",
            name,
            f"does not take a batch of 3 x {size} x {size} ({type(error).__name__}: {error})",
            "correct the network or transform.size",
        ) from error
    shape = tuple(getattr(output, "shape", ()))
    if shape != (1, num_classes):
        raise ModelError(
            "architecture",
            name,
            f"returned {list(shape) or type(output).__name__} for one image of {num_classes} classes",
            f"return logits [N, {num_classes}]",
        )
